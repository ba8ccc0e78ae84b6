"""The demo model over HTTP: a plain ASGI callable, served inside a running loop."""

import asyncio
import contextlib
import re
import socket
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from typing import Any

import msgspec
import uvicorn

from app.echo.replies import ChatRequest, Reply, reply_to
from app.echo.schema_examples import SchemaError

MODEL = "echo"
WORD_PAUSE_S = 0.02

Asgi = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Asgi]]
Send = Callable[[Asgi], Awaitable[None]]
Json = dict[str, Any]


class EchoServer:
    """The demo model, serving."""

    def __init__(self, server: uvicorn.Server, listener: socket.socket) -> None:
        """Serve on a socket that listens already, so that no connection is refused."""
        host, port = listener.getsockname()[:2]
        self.base_url = f"http://{host}:{port}/v1"
        self._server = server
        self._task = asyncio.create_task(server.serve(sockets=[listener]), name="echo")

    async def close(self) -> None:
        """Stop listening, and end the replies in progress."""
        self._server.should_exit = True
        await self._task


class GuestServer(uvicorn.Server):
    """A server in the event loop of another program, which handles signals itself."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the process's signal handlers alone."""
        yield


async def serve(host: str = "127.0.0.1") -> EchoServer:
    """Serve the demo model in the running loop, on a free port."""
    config = uvicorn.Config(
        app, lifespan="off", ws="none", log_config=None, access_log=False, timeout_graceful_shutdown=1
    )
    return EchoServer(GuestServer(config), socket.create_server((host, 0)))


async def app(scope: Asgi, receive: Receive, send: Send) -> None:
    """The two routes of a Chat Completions server that a client needs."""
    match scope["method"], scope["path"]:
        case "POST", "/v1/chat/completions":
            await answer(receive, send)
        case "GET", "/v1/models":
            model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "reprise"}
            await send_json(send, 200, {"object": "list", "data": [model]})
        case _:
            await send_json(send, 404, problem("This path does not exist."))


async def answer(receive: Receive, send: Send) -> None:
    """Answer one chat request, streamed or whole."""
    try:
        request = msgspec.json.decode(await body_of(receive), type=ChatRequest)
        reply = reply_to(request)
    except (msgspec.DecodeError, UnicodeDecodeError, SchemaError) as error:
        await send_json(send, 400, problem(str(error)))
        return
    call_ids = [f"call_{uuid.uuid4().hex}" for _ in reply.calls]
    base = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": MODEL}
    if request.stream:
        await send_stream(receive, send, chunks(request, reply, call_ids), base)
    else:
        await send_json(send, 200, base | completion(request, reply, call_ids))


async def send_stream(receive: Receive, send: Send, found: Iterator[Json], base: Json) -> None:
    """Send chunks at reading speed, until the client disconnects."""
    head = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    for chunk in found:
        data = b"data: " + msgspec.json.encode(base | chunk) + b"\n\n"
        await send({"type": "http.response.body", "body": data, "more_body": True})
        if await has_disconnected(receive, within_s=WORD_PAUSE_S):
            return
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


async def has_disconnected(receive: Receive, within_s: float) -> bool:
    """Pause; returns True at once if the client disconnects, which is all that can be received after the request."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(within_s):
            await receive()
            return True
    return False


async def body_of(receive: Receive) -> bytes:
    """The whole request body."""
    body = bytearray()
    more = True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return bytes(body)


async def send_json(send: Send, status: int, content: object) -> None:
    """Send a whole JSON reply."""
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": msgspec.json.encode(content)})


def problem(message: str) -> Json:
    """An error in OpenAI's shape."""
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}


def completion(request: ChatRequest, reply: Reply, call_ids: Sequence[str]) -> Json:
    """The reply as a chat.completion."""
    calls = [
        {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        for (name, arguments), call_id in zip(reply.calls, call_ids, strict=True)
    ]
    message = {"role": "assistant", "content": reply.text or None} | ({"tool_calls": calls} if calls else {})
    choice = {"index": 0, "message": message, "finish_reason": finish_reason(reply)}
    return {"object": "chat.completion", "choices": [choice], "usage": usage_of(request, reply)}


def chunks(request: ChatRequest, reply: Reply, call_ids: Sequence[str]) -> Iterator[Json]:
    """The reply as the chunks of a stream."""
    for delta in deltas(reply, call_ids):
        yield chunk_of({"index": 0, "delta": delta, "finish_reason": None})
    yield chunk_of({"index": 0, "delta": {}, "finish_reason": finish_reason(reply)})
    if (request.stream_options or {}).get("include_usage"):
        yield chunk_of() | {"usage": usage_of(request, reply)}


def chunk_of(*choices: Json) -> Json:
    """One chunk."""
    return {"object": "chat.completion.chunk", "choices": choices}


def deltas(reply: Reply, call_ids: Sequence[str]) -> Iterator[Json]:
    """The reply, word by word."""
    yield {"role": "assistant", "content": "" if reply.text else None}
    for word in words_of(reply.text):
        yield {"content": word}
    for index, ((name, arguments), call_id) in enumerate(zip(reply.calls, call_ids, strict=True)):
        function = {"name": name, "arguments": ""}
        yield {"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": function}]}
        for word in words_of(arguments):
            yield {"tool_calls": [{"index": index, "function": {"arguments": word}}]}


def finish_reason(reply: Reply) -> str:
    """Why the reply ends."""
    return "tool_calls" if reply.calls else "stop"


def usage_of(request: ChatRequest, reply: Reply) -> dict[str, int]:
    """Usage, with words counted as tokens."""
    prompt = sum(len(message.text.split()) for message in request.messages)
    completion = sum(len(words_of(text)) for text in (reply.text, *(arguments for _, arguments in reply.calls)))
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def words_of(text: str) -> list[str]:
    """The text in words with the space before them; joined they are the text again."""
    return re.findall(r"\s*\S+|\s+$", text)
