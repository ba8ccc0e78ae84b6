"""`python -m tests.bench.libraries`: the server's HTTP libraries with nothing between them.

uvicorn takes the request, the SDK's client sends it to the upstream, and what came in one read goes in one write: not decoded,
not routed, not stored. What the server costs beyond this is its own; what this costs beyond the floor is not.
"""

import asyncio
import socket
import sys

import httpx2
import uvicorn
import uvloop
from litestar.types import Receive, Scope, Send
from openai import DefaultAioHttpClient

from app import http
from app.http.door import Door
from app.settings import load
from tests.bench.floor import to_chat

HEADERS = {"content-type": "application/json", "accept-encoding": "identity"}


class Libraries:
    """The ASGI application."""

    def __init__(self, upstream_port: int) -> None:
        self._url = f"http://127.0.0.1:{upstream_port}/v1/chat/completions"
        self._http = DefaultAioHttpClient(timeout=None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            assert message["type"] == "http.request"
            body, more = body + message["body"], message["more_body"]
        asked = self._http.build_request("POST", self._url, headers=HEADERS, content=to_chat(body))
        response = await self._http.send(asked, stream=True)
        writing = asyncio.create_task(_pass_on(response, send))
        leaving = asyncio.create_task(receive())  # as every server must look that ends with its reader
        await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        for task in (writing, leaving):
            task.cancel()
        await asyncio.gather(writing, leaving, return_exceptions=True)
        await response.aclose()


async def _pass_on(response: httpx2.Response, send: Send) -> None:
    sent = [(b"content-type", response.headers["content-type"].encode())]
    await send({"type": "http.response.start", "status": 200, "headers": sent})
    assert isinstance(response.stream, httpx2.AsyncByteStream)
    async for read in response.stream:
        await send({"type": "http.response.body", "body": read, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def serve(port: int, upstream_port: int) -> None:
    """Until killed."""
    listener = socket.create_server(("127.0.0.1", port), backlog=http.BACKLOG)
    print(listener.getsockname()[1], flush=True)
    config = uvicorn.Config(Libraries(upstream_port), lifespan="off", **http.options(Door(load({}))))
    await uvicorn.Server(config).serve(sockets=[listener])


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), int(sys.argv[2])))
