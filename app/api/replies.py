"""JSON replies. A large one is sent in pieces, and counts as unread until the client's connection has taken it."""

import asyncio
from collections.abc import Mapping
from contextlib import closing
from typing import Any

from litestar import Response
from litestar.enums import MediaType
from litestar.types import ASGIApp, Receive, Scope, Send
from msgspec import Struct

from app.errors import TooMuchUnread
from app.storage.backlog import PAGE_BYTES, Backlog, Backlogs
from app.wire.resources import encode


def small_reply(resource: Struct, headers: Mapping[str, str] | None = None) -> Response[bytes]:
    """A reply that is never large."""
    return Response(encode(resource), media_type=MediaType.JSON, headers=headers)


def json_reply(
    body: bytes,
    backlogs: Backlogs,
    headers: Mapping[str, str] | None = None,
    *,
    made: str | None = None,
    stored: bool = True,
) -> Response[Any]:
    """A reply with this JSON; `made` is the id of the response that was made for it, `stored` whether it can be retrieved."""
    return reply(body, backlogs, headers, media_type=MediaType.JSON, made=made, stored=stored)


def reply(
    body: bytes,
    backlogs: Backlogs,
    headers: Mapping[str, str] | None = None,
    *,
    media_type: str,
    made: str | None = None,
    stored: bool = True,
) -> Response[Any]:
    """The same of another type."""
    if len(body) <= PAGE_BYTES:
        # As a header: of a text's type the framework would say the charset once more.
        return Response(body, media_type=media_type, headers={"content-type": media_type, **(headers or {})})
    return LargeReply(body, backlogs, {"content-type": media_type, **(headers or {})}, made=made, stored=stored)


class LargeReply(Response[None]):
    """A body that is sent in pieces."""

    def __init__(
        self, body: bytes, backlogs: Backlogs, headers: Mapping[str, str], *, made: str | None, stored: bool
    ) -> None:
        super().__init__(None)
        self._large, self._backlogs, self._made, self._stored = body, backlogs, made, stored
        given = {"content-length": str(len(body)), **headers}
        self._head = [(name.encode(), value.encode()) for name, value in given.items()]

    def to_asgi_response(self, *args: Any, **kwargs: Any) -> ASGIApp:  # type: ignore[override]
        """The ASGI application that sends the reply."""
        return self._answer

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.current_task()
        assert task
        with closing(self._backlogs.open()) as backlog:
            backlog.add(len(self._large))
            if backlog.closed:
                raise TooMuchUnread(
                    self._made, stored=self._stored
                )  # in a variable it would be in a cycle with the body
            backlog.disconnect = task.cancel
            try:
                await self._write(send, backlog)
            except asyncio.CancelledError:
                if not backlog.closed:
                    raise
                task.uncancel()  # close the connection without the rest

    async def _write(self, send: Send, backlog: Backlog) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self._head})
        for at in range(0, len(self._large), PAGE_BYTES):
            piece = self._large[at : at + PAGE_BYTES]
            more = at + PAGE_BYTES < len(self._large)
            await send({"type": "http.response.body", "body": piece, "more_body": more})
            backlog.take(0)
