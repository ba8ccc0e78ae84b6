"""How HTTP is served, by uvicorn. The bench serves its comparison the same way."""

from typing import Any

BACKLOG = 2_048
"""Connections that may wait to be accepted."""

OPTIONS: dict[str, Any] = {
    "loop": "none",
    "http": "httptools",
    "ws": "none",
    "log_config": None,
    "access_log": False,
    "server_header": False,
    "proxy_headers": False,  # nothing here asks who the client is
    "backlog": BACKLOG,
}
"""Of `uvicorn.Config`, whatever the application."""
