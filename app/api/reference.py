"""The reference of this API: its OpenAPI document, and a page that shows it to people.

Both are the same for every client, so they need no key, and they hold nothing of the deployment.
"""

import hashlib
from pathlib import Path
from typing import Any

from litestar import Request, Response, get
from litestar.enums import MediaType
from litestar.response import Stream
from msgspec import Struct

from app.storage.backlog import PAGE_BYTES

HERE = Path(__file__).parent / "openapi"

DOCUMENT = HERE / "openapi.json"
"""`python -m app.api.openapi` writes it."""

REDOC = HERE / "viewer" / "redoc.standalone.js"
"""A release of Redoc as it is: viewer/README.md."""

PAGE = b"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Reprise: the API</title>
<style>body { margin: 0 }</style>
<redoc spec-url="openapi.json" expand-responses="200" sort-required-props-first hide-hostname></redoc>
<script src="docs/redoc.standalone.js"></script>
</html>
"""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; worker-src blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Nothing comes from elsewhere. Redoc writes its styles into the page, and searches in a worker that it makes."""


SAFE = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}


class _File(Struct, frozen=True):
    body: bytes
    tag: str


_files: dict[Path, _File] = {}
"""Those that were asked for. They stay."""


@get("/openapi.json")
async def openapi(request: Request[Any, Any, Any]) -> Response[Any]:
    """The OpenAPI document of this server."""
    return _reply(request, DOCUMENT, MediaType.JSON)


@get("/docs", media_type=MediaType.HTML)
async def viewer() -> Response[bytes]:
    """The OpenAPI document as a page. It needs nothing from elsewhere."""
    return Response(PAGE, media_type=MediaType.HTML, headers={"content-security-policy": POLICY, **SAFE})


@get("/docs/redoc.standalone.js")
async def redoc(request: Request[Any, Any, Any]) -> Response[Any]:
    """The script of that page."""
    return _reply(request, REDOC, "text/javascript")


def _reply(request: Request[Any, Any, Any], path: Path, media_type: str) -> Response[Any]:
    """A file, in pieces: no more than one waits in memory for a client that does not read. 304 for the client that has it."""
    if path not in _files:
        body = path.read_bytes()
        _files[path] = _File(body, f'"{hashlib.sha256(body).hexdigest()[:32]}"')
    file = _files[path]
    headers = {"etag": file.tag, "cache-control": "no-cache", **SAFE}
    if request.headers.get("if-none-match") == file.tag:
        return Response(b"", status_code=304, headers=headers)
    pieces = (file.body[at : at + PAGE_BYTES] for at in range(0, len(file.body), PAGE_BYTES))
    return Stream(pieces, media_type=media_type, headers={**headers, "content-length": str(len(file.body))})
