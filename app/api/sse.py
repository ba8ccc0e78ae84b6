"""Events as Server-Sent Events: a reader of a run's log.

Everything that has gathered is written at once. Nothing but events, `[DONE]` and signs of life is ever sent: no `id:` lines,
which make a well-known client fail at the next comment. The connection is closed right after the last event.
"""

import asyncio
import secrets
from collections.abc import Sequence
from typing import Any, Protocol

import structlog
from litestar import Response
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from app.api.connected import until_disconnect
from app.errors import ApiError, TooMuchUnread
from app.runs.following import Followed
from app.storage.backlog import PAGE_BYTES
from app.storage.redisclient import break_off
from app.wire.events import DONE_FRAME, Entry
from app.wire.redaction import Redaction

log = structlog.get_logger()

KEEPALIVE = b": keep-alive\n\n"
"""A sign of life that no client sees."""

KEEPALIVE_EVENT = b'event: keepalive\ndata: {"type":"keepalive","sequence_number":%d}\n\n'
"""One for clients and proxies that count events only. It repeats the last event's number, which stays the place to resume from;
it is in no log."""

OBFUSCATION_CHARS = 16
"""A delta and its padding together are a multiple of this long."""

HEAD: list[tuple[bytes, bytes]] = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Frames(Protocol):
    """Writes events for one reader."""

    def frames(self, batch: Sequence[Entry]) -> bytes:
        """The SSE frames of a batch."""
        ...

    def keepalive(self) -> bytes:
        """A sign of life."""
        ...


class EventFrames:
    """Events as the Responses API has them."""

    def __init__(self, redaction: Redaction, *, obfuscate: bool, keepalive_events: bool, after: int) -> None:
        """`after` is the number of the event before the first."""
        self._redaction, self._obfuscate = redaction, obfuscate
        self._keepalive_events, self._last_number = keepalive_events, after

    def frames(self, batch: Sequence[Entry]) -> bytes:
        """Each as it was encoded, but for what this reader does not get."""
        self._last_number = batch[-1].sequence_number
        return b"".join(self._frame(entry) for entry in batch)

    def _frame(self, entry: Entry) -> bytes:
        if self._obfuscate and entry.type.endswith(".delta"):
            return padded(entry.frame, len(entry.body))
        return self._redaction.frame(entry)

    def keepalive(self) -> bytes:
        """A comment, or an event with the last number."""
        has_number = self._keepalive_events and self._last_number >= 0
        return KEEPALIVE_EVENT % self._last_number if has_number else KEEPALIVE


class EventStream(Response[None]):
    """The reply of a stream."""

    def __init__(self, followed: Followed, frames: Frames, headers: dict[str, str]) -> None:
        super().__init__(None)
        self._followed, self._backlog, self._frames = followed, followed.backlog, frames
        self._head = HEAD + [(name.encode(), value.encode()) for name, value in headers.items()]

    def to_asgi_response(self, *args: Any, **kwargs: Any) -> ASGIApp:  # type: ignore[override]
        """The ASGI side of it."""
        return self._answer

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._backlog.closed:  # it was dropped before it began
            self._followed.disconnected()
            raise TooMuchUnread(self._followed.response_id)
        writing = asyncio.create_task(self._write(send))
        leaving = asyncio.create_task(until_disconnect(receive))
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def end(_: "asyncio.Task[None] | None" = None) -> None:
            if not ended.done():
                ended.set_result(None)

        self._backlog.disconnect = end
        for task in (writing, leaving):  # `asyncio.wait` would hold a kilobyte as long as it waits
            task.add_done_callback(end)
        try:
            await ended
            if not writing.done() or writing.exception() is not None:
                self._followed.disconnected()
            if writing.done() and (error := writing.exception()) and not isinstance(error, ApiError):
                log.error("A stream broke off because of a bug.", action="stream_failed", exc_info=error)
        except asyncio.CancelledError:
            self._followed.disconnected()
            raise
        finally:
            self._backlog.close()
            await break_off([writing, leaving])

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self._head})
        async for batch in self._followed.batches:
            frames = self._frames.frames(batch) if batch else self._frames.keepalive()
            del batch  # the next one may be far away
            for at in range(0, len(frames), PAGE_BYTES):  # each waits until the connection has taken those before
                await send(_body(frames[at : at + PAGE_BYTES], more=True))
                if at:
                    self._backlog.take(0)
            del frames
        await send(_body(DONE_FRAME, more=False))


def _body(body: bytes, *, more: bool) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


def padded(frame: bytes, length: int) -> bytes:
    """The frame of a delta, whose JSON is so long, with `obfuscation`: so the sizes of packets reveal less about the text."""
    chars = OBFUSCATION_CHARS - length % OBFUSCATION_CHARS
    padding = secrets.token_urlsafe(OBFUSCATION_CHARS)[:chars].encode()
    return b'%b,"obfuscation":"%b"}\n\n' % (frame[:-3], padding)
