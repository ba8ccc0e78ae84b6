"""How HTTP is served: by uvicorn, behind a door that bounds what clients may send. The bench serves its comparison the same
way."""

from functools import partial
from typing import Any

from app.http.connection import Connection
from app.http.door import Door
from app.http.listener import BACKLOG

OPTIONS: dict[str, Any] = {
    "loop": "none",
    "ws": "none",
    "log_config": None,
    "access_log": False,
    "server_header": False,
    "proxy_headers": False,  # nothing here asks who the client is
    "backlog": BACKLOG,
}
"""Of `uvicorn.Config`, whatever the application."""


def options(door: Door) -> dict[str, Any]:
    """Of `uvicorn.Config`, for a server behind this door."""
    return {**OPTIONS, "http": partial(Connection, door)}
