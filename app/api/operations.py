"""For operators: is the process alive, is it ready."""

from litestar import Response, get
from litestar.enums import MediaType
from sqlalchemy import text

from app.api.parts import Parts
from app.errors import ServerUnavailable
from app.storage.database import Query

_PING = Query(text("select 1 as ready"), across_tenants="asks only whether Postgres answers")


@get("/livez", media_type=MediaType.TEXT)
async def livez() -> str:
    """The process runs."""
    return "ok"


@get("/readyz", media_type=MediaType.TEXT)
async def readyz(parts: Parts) -> Response[str]:
    """Requests can be served: the process does not end, and Postgres answers. Else 503."""
    if parts.worker.draining:
        raise ServerUnavailable("The server is shutting down.")
    async with parts.database.autocommit() as tx:
        await tx.one(_PING)
    return Response("ok", media_type=MediaType.TEXT)
