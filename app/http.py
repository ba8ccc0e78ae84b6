"""How HTTP is served, by uvicorn. The bench serves its comparison the same way."""

import asyncio
from functools import partial
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

BACKLOG = 2_048
"""Connections that may wait to be accepted."""

UNSENT_BYTES_MAX = 16 * 1024
"""What a connection holds beside the system's own buffers before a sender waits."""


def options(send_timeout_s: float) -> dict[str, Any]:
    """Of `uvicorn.Config`, whatever the application."""
    return {
        "loop": "none",
        "http": partial(Connection, send_timeout_s=send_timeout_s),
        "ws": "none",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "proxy_headers": False,  # nothing here asks who the client is
        "backlog": BACKLOG,
    }


class Connection(HttpToolsProtocol):
    """A client that takes nothing for `send_timeout_s` of what waits for it is disconnected."""

    def __init__(self, *args: Any, send_timeout_s: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._send_timeout_s = send_timeout_s
        self._watch: asyncio.TimerHandle | None = None
        self._unsent = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Its sender waits once so much is unsent."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=UNSENT_BYTES_MAX)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is left to watch."""
        super().connection_lost(exc)
        self._watch_no_more()

    def pause_writing(self) -> None:
        """The system takes no more for now."""
        super().pause_writing()
        self._watch_sending()

    def resume_writing(self) -> None:
        """The client has read."""
        super().resume_writing()
        self._watch_no_more()

    def on_response_complete(self) -> None:
        """What is unsent goes on by itself, and the connection is closed behind it, or waits for another request."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._watch_sending()

    def timeout_keep_alive_handler(self) -> None:
        """No other request has come."""
        super().timeout_keep_alive_handler()
        self._watch_sending()

    def _watch_sending(self) -> None:
        if self._watch is None:
            self._unsent = self.transport.get_write_buffer_size()
            self._watch = self.loop.call_later(self._send_timeout_s, self._look)

    def _watch_no_more(self) -> None:
        if self._watch:
            self._watch.cancel()
            self._watch = None

    def _look(self) -> None:
        self._watch = None
        if self.transport.get_write_buffer_size() < self._unsent:
            self._watch_sending()  # it is slow
        else:
            self.transport.abort()
