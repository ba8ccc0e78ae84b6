"""`python -m tests.bench.floor`: the pass-through that stores nothing.

It takes what the server under test takes, asks the same upstream, decodes each chunk, and encodes each delta as an event with
a number; what came in one read goes in one write.
"""

import asyncio
import sys

import msgspec
import uvloop
from msgspec import Struct

from tests.bench.http import JSON_HEAD, STREAM_HEAD, Connection, Serving, chunked, request


class _Asked(Struct):
    model: str
    input: str
    stream: bool = False


class _Delta(Struct):
    content: str | None = None


class _Choice(Struct):
    delta: _Delta
    finish_reason: str | None = None


class _Chunk(Struct):
    choices: list[_Choice]


class _TextDelta(Struct, tag="response.output_text.delta"):
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int
    delta: str
    logprobs: list[str]


_asked = msgspec.json.Decoder(_Asked).decode
_chunk = msgspec.json.Decoder(_Chunk).decode
_encode = msgspec.json.Encoder().encode

ITEM_ID = "msg_00000000000000000000000000000000000000"
DONE = chunked(b"data: [DONE]\n\n") + b"0\r\n\r\n"


def to_chat(body: bytes) -> bytes:
    """A request for a response → the chat request that the upstream gets."""
    asked = _asked(body)
    messages = [{"role": "user", "content": asked.input}]
    return _encode({"model": asked.model, "messages": messages, "stream": asked.stream})


class Floor(Serving):
    """One client's connection, with one to the upstream."""

    port = 0
    _upstream: Connection | None = None

    def answer(self, body: bytes) -> None:
        self._task = asyncio.ensure_future(self._answer(to_chat(body), streams=_asked(body).stream))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._upstream:
            self._upstream.close()

    async def _answer(self, chat: bytes, *, streams: bool) -> None:
        if self._upstream is None:
            self._upstream = await Connection.open(self.port)
        asking = request("/v1/chat/completions", chat)
        if not streams:
            whole = await self._upstream.ask(asking)
            self.transport.write(JSON_HEAD % len(whole) + whole)
            return
        self._number, self._rest = 0, b""
        self.transport.write(STREAM_HEAD)
        await self._upstream.ask(asking, self._take)
        self.transport.write(DONE)

    def _take(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        frames = [self._frame(line[6:]) for line in lines if line.startswith(b"data: {")]
        if frames:
            self.transport.write(chunked(b"".join(frames)))

    def _frame(self, data: bytes) -> bytes:
        said = _chunk(data).choices[0].delta.content
        event = _TextDelta(self._number, ITEM_ID, 0, 0, said or "", [])
        self._number += 1
        return b"event: response.output_text.delta\ndata: %b\n\n" % _encode(event)


async def serve(port: int, upstream_port: int) -> None:
    """Until killed."""
    Floor.port = upstream_port
    server = await asyncio.get_running_loop().create_server(Floor, "127.0.0.1", port, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), int(sys.argv[2])))
