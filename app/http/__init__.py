"""HTTP by uvicorn, with bounds on what clients may send. The bench serves its comparison the same way."""

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
    "proxy_headers": False,  # app/api/attempts.py reads them
    "backlog": BACKLOG,
}
"""Arguments of `uvicorn.Config` for any application."""


def options(door: Door) -> dict[str, Any]:
    """Arguments of `uvicorn.Config` for a server with this door."""
    return {**OPTIONS, "http": partial(Connection, door)}
