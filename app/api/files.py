"""`/v1/files`: upload, list, retrieve, content, delete."""

import asyncio
from contextlib import closing
from typing import Any
from urllib.parse import quote

import structlog
from litestar import Controller, Request, Response, delete, get, post
from litestar.types import ASGIApp, Receive, Scope, Send

from app.api import pages, queries, uploads
from app.api.replies import small_reply
from app.api.services import Services
from app.errors import ApiError
from app.runs.admission import Caller
from app.storage import audit, files
from app.storage.backlog import PAGE_BYTES, Backlog
from app.storage.files import StoredFile
from app.telemetry import describe
from app.wire import files as wire
from app.wire.resources import Deleted

log = structlog.get_logger()


class FilesController(Controller):
    """Files, which parts of messages refer to."""

    path = "/v1/files"
    request_max_body_size = None  # `uploads` has limits of its own

    @post(status_code=200)
    async def create(self, request: Request[Any, Any, Any], caller: Caller, services: Services) -> Response[bytes]:
        """A new file, from a form."""
        await services.storage_quota.demand_room(caller.storage_limits)
        content_type = request.headers.get("content-type", "")
        with services.bodies.reading(request) as body:
            file = await uploads.receive(body, content_type, services.settings, services.database, caller.tenant_id)
        return small_reply(_shown(file))

    @get(opt=queries.TAKEN)
    async def list(self, request: Request[Any, Any, Any], caller: Caller, services: Services) -> Response[Any]:
        """Files by creation."""
        query = queries.parse(request, queries.FilePage)
        return await pages.resources(services, query, files.list_files, caller.tenant_id, query.purpose, show=_shown)

    @get("/{file_id:str}")
    async def retrieve(self, file_id: str, caller: Caller, services: Services) -> Response[bytes]:
        """One file, without its content."""
        async with services.database.autocommit() as tx:
            return small_reply(_shown(await files.get_file(tx, caller.tenant_id, file_id)))

    @get("/{file_id:str}/content")
    async def content(self, file_id: str, caller: Caller, services: Services) -> Response[Any]:
        """The content of a file, as it was uploaded."""
        async with services.database.autocommit() as tx:
            file = await files.get_file(tx, caller.tenant_id, file_id)
        return ContentReply(services, caller.tenant_id, file)

    @delete("/{file_id:str}", status_code=200)
    async def remove(self, file_id: str, caller: Caller, services: Services) -> Response[bytes]:
        """Delete a file; items that refer to it keep the reference."""
        entry = audit.entry(caller.rights, "file.deleted", file_id)
        async for attempt in services.database.settling():
            with attempt:
                async with services.database.begin() as tx:
                    await files.delete_file(tx, caller.tenant_id, file_id, again=attempt.num > 1)
                    await audit.write(tx, caller.rights.tenant, entry)
        return small_reply(Deleted(file_id, "file"))


class ContentReply(Response[None]):
    """A file's content. One piece of it is in memory, and no connection is held while that is sent."""

    def __init__(self, services: Services, tenant_id: str, file: StoredFile) -> None:
        super().__init__(None)
        self._services, self._tenant_id, self._file = services, tenant_id, file
        self._head = [
            (b"content-type", b"application/octet-stream"),
            (b"content-length", str(file.bytes).encode()),
            (b"content-disposition", f"attachment; filename*=UTF-8''{quote(file.filename, safe='')}".encode()),
            (b"x-content-type-options", b"nosniff"),
        ]

    def to_asgi_response(self, *args: Any, **kwargs: Any) -> ASGIApp:  # type: ignore[override]
        """The ASGI application that sends the reply."""
        return self._answer

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.current_task()
        assert task
        piece = await self._piece(0)
        with closing(self._services.backlogs.open()) as backlog:
            backlog.disconnect = task.cancel
            try:
                await send({"type": "http.response.start", "status": 200, "headers": self._head})
                for number in self._file.pieces:
                    await self._send(send, backlog, piece if number == 0 else await self._piece(number))
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            except ApiError as error:  # the connection closes without the rest
                log.warning("A file could not be sent whole.", action="file_broken_off", error=describe(error))
            except asyncio.CancelledError:
                if not backlog.closed:
                    raise
                task.uncancel()

    async def _piece(self, number: int) -> bytes:
        async with self._services.database.autocommit() as tx:
            return await files.read_piece(tx, self._tenant_id, self._file.id, number)

    async def _send(self, send: Send, backlog: Backlog, piece: bytes) -> None:
        backlog.add(len(piece))
        for at in range(0, len(piece), PAGE_BYTES):
            data = piece[at : at + PAGE_BYTES]
            await send({"type": "http.response.body", "body": data, "more_body": True})
            backlog.take(len(data))


def _shown(file: StoredFile) -> wire.File:
    return wire.File(file.id, file.bytes, file.created_at, file.filename, file.purpose)
