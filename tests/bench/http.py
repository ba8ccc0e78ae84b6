"""Just enough HTTP/1.1, as asyncio protocols: whole requests with a length come, whole or chunked replies go."""

import asyncio
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import cast

LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
END_OF_CHUNKS = b"\r\n0\r\n\r\n"

JSON_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunked(data: bytes) -> bytes:
    """One chunk of a body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def request(path: str, body: bytes | None = None) -> bytes:
    """A POST with a JSON body, a GET without one."""
    if body is None:
        return f"GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


class Serving(asyncio.Protocol, ABC):
    """A server's side of one connection; `answer` gets each request's body."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self._held = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is none by inheritance

    def data_received(self, data: bytes) -> None:
        self._held += data
        while (head_ends := self._held.find(b"\r\n\r\n")) >= 0:
            length = LENGTH.search(self._held, 0, head_ends)
            ends = head_ends + 4 + (int(length[1]) if length else 0)
            if len(self._held) < ends:
                return
            body, self._held = self._held[head_ends + 4 : ends], self._held[ends:]
            self.answer(body)

    @abstractmethod
    def answer(self, body: bytes) -> None:
        """Write a reply, now or later."""


class Refused(Exception):
    """A reply that is no 200."""


class Connection(asyncio.Protocol):
    """A client's side of one connection, for one request at a time."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self._reply: asyncio.Future[bytes] | None = None
        self._take: Callable[[bytes], None] | None = None

    @classmethod
    async def open(cls, port: int) -> "Connection":
        """A connection to a server on this machine."""
        _, made = await asyncio.get_running_loop().create_connection(cls, "127.0.0.1", port)
        return made

    def ask(self, request: bytes, take: Callable[[bytes], None] | None = None) -> "asyncio.Future[bytes]":
        """Send; gives the body. `take` gets the bytes of a stream as they come, chunk borders included, instead.

        Raises Refused.
        """
        self._reply, self._take = asyncio.get_running_loop().create_future(), take
        self._held, self._ends = b"", -1
        self._in_body = False
        self.transport.write(request)
        return self._reply

    def close(self) -> None:
        """The end, also for the server."""
        self.transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is none by inheritance

    def connection_lost(self, exc: Exception | None) -> None:
        if self._reply and not self._reply.done():
            self._reply.set_exception(Refused(f"the connection was lost: {exc}"))

    def data_received(self, data: bytes) -> None:
        if not self._in_body:
            self._held += data
            head_ends = self._held.find(b"\r\n\r\n")
            if head_ends < 0:
                return
            self._in_body = True
            if not self._held.startswith(b"HTTP/1.1 200"):
                self._take = None
            length = LENGTH.search(self._held, 0, head_ends)
            self._ends = head_ends + 4 + int(length[1]) if length else -1
            self._begins = head_ends + 4
            data = self._held[head_ends + 4 :]
            self._tail = b"\r\n"  # of a body whose only chunk is the last one
        elif self._ends >= 0 or not self._take:
            self._held += data
        if self._ends >= 0:
            if len(self._held) >= self._ends:
                self._end()
            return
        if self._take and data:
            self._take(data)
        self._tail = (self._tail + data)[-len(END_OF_CHUNKS) :]
        if self._tail == END_OF_CHUNKS:
            self._end()

    def _end(self) -> None:
        assert self._reply
        if self._held.startswith(b"HTTP/1.1 200"):
            self._reply.set_result(self._held[self._begins :])
        else:
            self._reply.set_exception(Refused(self._held.decode(errors="replace")))
