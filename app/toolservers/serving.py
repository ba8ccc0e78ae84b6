"""How a tool server is reached: over stdio as a client's subprocess, or over Streamable HTTP."""

import hmac
import socket
from typing import Any

import click
import uvicorn
from mcp.server import MCPServer
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from app.toolservers.address import Address

BODY_BYTES_MAX = 64 * 1024 * 1024


def serve(server: MCPServer[Any], address: Address | None) -> None:
    """Serve on stdio until stdin ends, or over HTTP until a signal. Raises click.ClickException if the address can't be bound."""
    if address is None:
        server.run("stdio")
        return
    host, port, token = address
    app: ASGIApp = server.streamable_http_app(host=host, max_request_body_size=BODY_BYTES_MAX)
    if token:
        app = RequireToken(app, token)
    shown = f"[{host}]" if ":" in host else host
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise click.ClickException(f"can't listen on {shown}:{port}: {error.strerror}.") from error
    click.echo(f"{server.name} listens on http://{shown}:{listener.getsockname()[1]}/mcp")
    config = uvicorn.Config(app, loop="asyncio", log_level="warning", ws="none", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[listener])


class RequireToken:
    """ASGI middleware: answers 401 without the bearer token."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the token, and pass the request on."""
        if scope["type"] == "http":
            given = Headers(scope=scope).get("authorization", "").encode()
            if not hmac.compare_digest(given, self._expected):
                await PlainTextResponse("A valid bearer token is needed.", 401)(scope, receive, send)
                return
        await self._app(scope, receive, send)
