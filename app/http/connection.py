"""One client connection: uvicorn's protocol, which is fed whole heads, and nothing beyond the end of a request.

It bounds what a client may send, before a key is checked: a head's bytes, headers and time, a body's time (the application
bounds its size), and pipelined requests. A request over a limit gets a status in OpenAI's shape. Only this module uses
uvicorn's internals; `tests/unit/test_connection.py` lists them.
"""

import asyncio
import re
from collections.abc import Callable
from enum import Enum, auto
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from app.api.problems import error_body
from app.errors import ApiError, HeadTooLarge, InvalidRequest, RequestTooSlow, ServerUnavailable, UriTooLong
from app.http.door import REFUSED_MAX, Door
from app.ids import new_id

HEAD_ENDS = b"\r\n\r\n"

UPGRADE = re.compile(rb"\r\nupgrade:[^\r\n]*(?:\r\n[ \t][^\r\n]*)*", re.IGNORECASE)
"""With this header the parser takes the body for another protocol."""

LINGER_S = 2.0
"""How long a client may take to read a reply that was sent before its request was complete. Its input is discarded."""

UNSENT_BYTES_MAX = 16 * 1024
"""The high-water mark of a connection's write buffer: above it a sender waits."""

LAST_REQUEST_S = 1.0
"""How long an idle connection stays open while the server shuts down."""


class Stage(Enum):
    """Where a connection is in the exchange of a request and its reply."""

    HEAD = auto()
    """It is idle, or has a part of a head."""
    BODY = auto()
    REPLY = auto()
    """The request is complete; further input belongs to the next one, and waits."""
    LINGERING = auto()
    """The reply is sent, and the connection closes."""


class Connection(HttpToolsProtocol):
    """All times are those of the loop's clock."""

    def __init__(self, door: Door, **given: Any) -> None:
        super().__init__(**given)
        self._door, self._limits = door, door.settings
        self._stage = Stage.HEAD
        self._received = b""
        """Input that the parser has not been given yet."""
        self._searched = 0
        """How many bytes of it hold no end of a head."""
        self._body_left: int | None = 0
        """Bytes of the body to come; None: it is chunked."""
        self._body_bytes = 0
        self._bare_bytes = 0
        """Bytes of a chunked body's framing since its last data: sizes, extensions, trailers."""
        self._body_begun = 0.0
        self._body_checked = 0
        """`_body_bytes` when the deadline was last checked."""
        self._reusable = False
        """Whether the client may send another request, if this one is complete before its reply."""
        self._refused = False
        self._deadline: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._unsent = 0

    # -- The transport's side ---------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        self._wire = transport
        transport.set_write_buffer_limits(high=UNSENT_BYTES_MAX)
        super().connection_made(_Wire(transport, self._leave))  # type: ignore[arg-type]
        if len(self.connections) - self._door.refused > self._door.connections_max:
            self._refuse(ServerUnavailable("Too many connections; please try again."))
        else:
            self._expect_request(self._limits.head_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        self._stage, self._received = Stage.LINGERING, b""
        self._door.refused -= self._refused
        if self._timer:
            self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Input."""
        if self._stage is Stage.LINGERING:
            return
        self._received = self._received + data if self._received else data
        self._parse()

    # -- From bytes to requests -------------------------------------------------------------------------------------------

    def _parse(self) -> None:
        while self._received and self._stage in {Stage.HEAD, Stage.BODY}:
            if self._stage is Stage.BODY:
                self._take_body()
            elif not self._take_head():
                break
        if self._stage is Stage.REPLY and len(self._received) > self._limits.head_bytes_max:
            self._wire.pause_reading()

    def _take_head(self) -> bool:
        """Feed a whole head to the parser. Returns whether there was one."""
        if self._searched == 0:
            self._received = self._received.lstrip(b"\r\n")  # RFC 9112, 2.2: ignore empty lines before a request
            if not self._received:
                return False
        ends = self._received.find(HEAD_ENDS, max(0, self._searched - len(HEAD_ENDS) + 1))
        size = ends + len(HEAD_ENDS) if ends >= 0 else len(self._received)
        if self._received.count(b"\n", 0, size) > self._limits.headers_max + 2:  # the request line and the empty one
            self._refuse(HeadTooLarge("The request has more headers than this server takes (REPRISE_HEADERS_MAX)."))
            return False
        if size > self._limits.head_bytes_max:
            line_fits = self._received.find(b"\r\n", 0, self._limits.head_bytes_max) >= 0
            what = "headers are" if line_fits else "URL is"
            error = (HeadTooLarge if line_fits else UriTooLong)(
                f"The request's {what} longer than this server takes (REPRISE_HEAD_BYTES_MAX)."
            )
            self._refuse(error)
            return False
        if ends < 0:
            if self._searched == 0:
                self._end_by(self._limits.head_timeout_s)
            self._searched = size
            return False
        head, self._received, self._searched = self._received[:size], self._received[size:], 0
        if not head.startswith(b"GET "):  # an upgrade request has no body, and this server supports no upgrade
            head = UPGRADE.sub(b"", head)
        super().data_received(head)
        return True

    def _take_body(self) -> None:
        size = len(self._received) if self._body_left is None else min(self._body_left, len(self._received))
        part, self._received = self._received[:size], self._received[size:]
        if self._body_left is None:
            self._bare_bytes += size
        else:
            self._body_left -= size
        super().data_received(part)
        if self._stage is Stage.BODY and self._bare_bytes > self._limits.head_bytes_max + size:
            self._refuse(
                HeadTooLarge("The body's trailers are longer than this server takes (REPRISE_HEAD_BYTES_MAX).")
            )

    def send_400_response(self, msg: str) -> None:
        """The parser can't read the input. After a chunked body that may be a pipelined request: then the reply announces that the
        connection closes, and the client sends the request again."""
        if self._stage is Stage.REPLY:
            self._received = b""
            self._close_after_reply()
        elif self._stage is not Stage.LINGERING:
            self._refuse(InvalidRequest(msg))

    # -- The parser's side ------------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """Raises ValueError if a request begins within another."""
        if self._stage is not Stage.HEAD:
            raise ValueError
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; trailers are ignored."""
        if self._stage is Stage.HEAD:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Start the application."""
        super().on_headers_complete()
        self._stage, self._deadline = Stage.BODY, None
        self._body_left = _body_length(self.headers)
        self._body_bytes = self._body_checked = self._bare_bytes = 0
        self._reusable = self.cycle.keep_alive and not self._door.closing
        self.cycle.keep_alive = False
        if self._body_left != 0:
            self._body_begun = self.loop.time()
            self._end_by(self._limits.body_timeout_s)

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._body_bytes += len(body)
        self._bare_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is complete."""
        self._stage, self._deadline = Stage.REPLY, None
        if self.parser.should_upgrade():  # further input is not a request
            self._received = b""
            self._reusable = False
        if not self.cycle.response_started:
            self.cycle.keep_alive = self._reusable
        super().on_message_complete()

    # -- The reply's side -------------------------------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        """The reply is written; read the next request."""
        self.server_state.total_requests += 1
        if self._stage is Stage.REPLY:
            self._wire.resume_reading()
            self.flow.resume_reading()
            self._expect_request(self._limits.send_timeout_s if self.flow.write_paused else self._idle_s)
            self._parse()

    @property
    def _idle_s(self) -> float:
        return LAST_REQUEST_S if self._door.closing else self._limits.idle_timeout_s

    def pause_writing(self) -> None:
        """The write buffer is above its high-water mark."""
        super().pause_writing()
        if self._stage is Stage.REPLY or (self._stage is Stage.HEAD and not self._received):
            self._end_by(self._limits.send_timeout_s)

    def resume_writing(self) -> None:
        """The write buffer is below its low-water mark."""
        super().resume_writing()
        if self._stage is Stage.REPLY:
            self._deadline = None
        elif self._stage is Stage.HEAD and not self._received:
            self._end_by(self._idle_s)

    def _refuse(self, error: ApiError) -> None:
        """Send an error instead of the application's reply, and close."""
        self._door.refused += not self._refused
        self._refused = True
        cycle = self.cycle
        if cycle and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
            if cycle.response_started or self._stage is not Stage.BODY:
                self._wire.abort()
                return
        if self._door.refused > REFUSED_MAX:
            self._wire.abort()
            return
        body = error_body(error)
        headers = [
            *self.server_state.default_headers,
            *((name.lower().encode(), value.encode()) for name, value in error.headers.items()),
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
            (b"x-request-id", new_id("req").encode()),
        ]
        self._wire.write(
            STATUS_LINE[error.status] + b"".join(b"%b: %b\r\n" % pair for pair in headers) + b"\r\n" + body
        )
        self._leave(unread=True)

    def _leave(self, *, unread: bool = False) -> None:
        """Close when the client has the reply: closing a socket with unread input resets it, and the reply is lost."""
        unread = unread or self._stage is Stage.BODY or self._received != b""
        self._stage, self._received = Stage.LINGERING, b""
        if self._wire.is_closing():
            return
        if not unread:
            self._wire.close()
            self._end_by(self._limits.send_timeout_s)
            return
        self._wire.resume_reading()
        self._wire.write_eof()
        self._end_by(LINGER_S)

    # -- Shutdown --------------------------------------------------------------------------------------------------------

    def wind_down(self) -> None:
        """The server shuts down: close with the next reply, unless its head is already sent."""
        if self._stage is Stage.HEAD and not self._received:
            self._end_by(max(LAST_REQUEST_S, self._limits.shutdown_delay_s))
        else:
            self._close_after_reply()

    def _close_after_reply(self) -> None:
        self._reusable = False
        if self.cycle and not self.cycle.response_started:
            self.cycle.keep_alive = False

    def shutdown(self) -> None:
        """Leave idle connections to `wind_down`; uvicorn would close them at once."""

    # -- Time -------------------------------------------------------------------------------------------------------------

    def _expect_request(self, timeout_s: float) -> None:
        self._stage, self._searched = Stage.HEAD, 0
        self._end_by(timeout_s)

    def _end_by(self, seconds: float) -> None:
        """Set the deadline. A timer that fires too early is set again, which costs less than a timer for each request."""
        self._unsent = self._wire.get_write_buffer_size()
        self._deadline = self.loop.time() + seconds
        if self._timer and self._timer.when() > self._deadline:
            self._timer.cancel()
            self._timer = None
        if not self._timer:
            self._timer = self.loop.call_at(self._deadline, self._ring)

    def _ring(self) -> None:
        self._timer = None
        if self._deadline is None:
            return
        if self.loop.time() < self._deadline:
            self._timer = self.loop.call_at(self._deadline, self._ring)
        elif self._is_slow():
            self._deadline = None
            self._expire()

    def _is_slow(self) -> bool:
        """Whether the client makes no progress; if it does, extend the deadline."""
        if self._stage is Stage.BODY and (left_s := self._body_left_s()) > 0:
            self._end_by(left_s)
            return False
        if 0 < self._wire.get_write_buffer_size() < self._unsent:
            self._end_by(self._limits.send_timeout_s)
            return False
        return True

    def _body_left_s(self) -> float:
        """How long the body may still take, or pause; 0 after too long a pause."""
        if self.flow.read_paused:  # the application does not read it
            return self._limits.body_timeout_s
        is_silent, self._body_checked = self._body_bytes == self._body_checked, self._body_bytes
        allowed_s = self._limits.body_timeout_s + self._body_bytes / self._limits.body_bytes_per_s_min
        left_s = self._body_begun + allowed_s - self.loop.time()
        return 0.0 if is_silent else min(left_s, self._limits.body_timeout_s)

    def _expire(self) -> None:
        if self._stage is Stage.LINGERING or self._wire.get_write_buffer_size():
            self._wire.abort()
        elif self._stage is Stage.BODY:
            self._refuse(RequestTooSlow("The request's body did not arrive in time."))
        elif self._received:
            self._refuse(RequestTooSlow("The request's headers did not arrive in time."))
        else:
            self._wire.close()


class _Wire:
    """The transport for uvicorn: its `close` is `Connection._leave`."""

    __slots__ = ("close", "get_extra_info", "is_closing", "pause_reading", "resume_reading", "write")

    def __init__(self, transport: asyncio.Transport, leave: Callable[[], None]) -> None:
        self.close = leave
        self.write, self.is_closing, self.get_extra_info = (
            transport.write,
            transport.is_closing,
            transport.get_extra_info,
        )
        self.pause_reading, self.resume_reading = transport.pause_reading, transport.resume_reading


def _body_length(headers: list[tuple[bytes, bytes]]) -> int | None:
    """The length in bytes; None for a chunked body. The parser has checked both headers."""
    length = 0
    for name, value in headers:
        if name == b"transfer-encoding":
            return None
        if name == b"content-length":
            length = int(value)
    return length
