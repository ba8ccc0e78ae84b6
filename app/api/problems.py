"""Errors → HTTP, in one place; and the id that every reply carries."""

import re
import time
from collections.abc import Awaitable
from typing import Any

import msgspec
import structlog
from litestar import Request, Response
from litestar.enums import MediaType, ScopeType
from litestar.exceptions import HTTPException
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import ApiError, BodyTooLarge, InvalidRequest, MethodNotAllowed, NotFound, ServerError
from app.ids import new_id
from app.telemetry import describe
from app.wire.resources import ErrorBody, ErrorReply, encode

log = structlog.get_logger()

API_VERSION = b"2020-10-01"
"""The hosted API's `openai-version`."""

REQUEST_ID = b"x-request-id"
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")

METHOD_CHARS_MAX = 16

REPLY_HEADERS = "reply_headers"
"""Headers of a request's reply in the state of its scope: whatever the reply becomes, it has them."""

PROBES = frozenset({"/livez", "/readyz"})
"""Polled every few seconds: logged at the level debug only."""


def error_body(error: ApiError) -> bytes:
    """OpenAI's error object, with its four keys."""
    return encode(ErrorReply(ErrorBody(error.message, error.type, error.param, error.code)))


def answer_api_error(request: Request[Any, Any, Any], error: ApiError) -> Response[bytes]:
    """Errors of this server."""
    if error.status >= 500:
        log.warning("A request failed.", action="request_failed", status=error.status, error=describe(error))
    headers = {**error.headers, "x-should-retry": "false"} if error.is_final else error.headers
    return Response(error_body(error), status_code=error.status, media_type=MediaType.JSON, headers=headers)


def answer_http_error(request: Request[Any, Any, Any], error: HTTPException) -> Response[bytes]:
    """Litestar's errors: unknown paths, wrong methods, bodies that are too large."""
    return answer_api_error(request, _translate(request, error))


def answer_bug(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """Every other exception; the client sees no internals."""
    log.error("A request failed because of a bug.", action="request_failed", status=500, exc_info=error)
    return answer_api_error(request, ServerError("The server had an error while processing your request."))


def _translate(request: Request[Any, Any, Any], error: HTTPException) -> ApiError:
    where = f"{request.method} {request.url.path}"
    match error.status_code:
        case 404:
            return NotFound(f"Invalid URL ({where})")
        case 405:
            allowed = next((value for name, value in (error.headers or {}).items() if name.lower() == "allow"), "")
            methods = ", ".join(sorted(allowed.split(", ")))
            return MethodNotAllowed(f"Not allowed to {where}.", headers={"Allow": methods} if methods else None)
        case 413:
            return BodyTooLarge("The request's body is larger than this server takes (REPRISE_BODY_BYTES_MAX).")
        case status if status < 500:
            return InvalidRequest(error.detail)
    return ServerError("The server had an error while processing your request.")


async def answer_options(request: Request[Any, Any, Any]) -> Response[None] | None:
    """The methods of a path, in the place of Litestar's own answer to OPTIONS: that has those of one handler."""
    if request.method != "OPTIONS":
        return None
    template = request.scope["path_template"]
    methods = next(route.methods for route in request.app.routes if route.path_format == template)
    return Response(None, status_code=204, headers={"Allow": ", ".join(sorted(methods))})


def with_request_id(app: ASGIApp) -> ASGIApp:
    """Add `x-request-id` and the processing time to each reply, the id to each log line of the request, and a last line with
    the status. That names the route, since paths hold ids."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await app(scope, receive, send)
            return
        begun = time.perf_counter()
        request_id = _request_id(scope)
        status = 0

        def took_ms() -> int:
            return int((time.perf_counter() - begun) * 1000)

        def stamped(message: Message) -> Awaitable[None]:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", []),
                    (REQUEST_ID, request_id.encode()),
                    (b"openai-processing-ms", str(took_ms()).encode()),
                    (b"openai-version", API_VERSION),
                    *_reply_headers(scope),
                ]
            return send(message)

        structlog.contextvars.bind_contextvars(request_id=request_id)  # a request is a task with a context of its own
        try:
            await app(scope, receive, stamped)
        finally:
            route = scope.get("path_template") or "unknown"
            write = log.debug if route in PROBES else log.info
            write(
                "A request was answered.",
                action="request_answered",
                method=scope["method"][:METHOD_CHARS_MAX],
                route=route,
                status=status,
                ms=took_ms(),
            )

    return answer


def _reply_headers(scope: Scope) -> list[tuple[bytes, bytes]]:
    given: dict[str, str] = scope.get("state", {}).get(REPLY_HEADERS, {})
    return [(name.encode(), value.encode()) for name, value in given.items()]


def _request_id(scope: Scope) -> str:
    """The client's `x-request-id` if it is valid, else a new one."""
    given = next((value for name, value in scope["headers"] if name == REQUEST_ID), b"")
    return given.decode() if _REQUEST_ID.fullmatch(given) else new_id("req")


HANDLERS: dict[Any, Any] = {
    ApiError: answer_api_error,
    HTTPException: answer_http_error,
    msgspec.MsgspecError: answer_bug,
    Exception: answer_bug,
}
