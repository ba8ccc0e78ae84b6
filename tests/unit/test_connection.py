"""The names of uvicorn's inside that `app/http/connection.py` uses are still there. If this fails after an update of uvicorn, read
its `httptools_impl.py` against that file before the bound in pyproject.toml is raised."""

import asyncio
import inspect

import uvicorn
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from app.http.connection import Connection
from app.http.door import Door
from app.settings import load

OVERRIDDEN = [name for name in vars(Connection) if not name.startswith("__") and hasattr(HttpToolsProtocol, name)]
OVERRIDDEN_EXPECTED = set(
    "connection_made connection_lost data_received pause_writing resume_writing shutdown send_400_response on_message_begin "
    "on_header on_headers_complete on_body on_message_complete on_response_complete".split()
)


def test_what_is_overridden_is_there_to_be():
    assert set(OVERRIDDEN) == OVERRIDDEN_EXPECTED


async def test_what_is_read_and_set_is_there():
    config = uvicorn.Config(lambda: None, lifespan="off", log_config=None)
    made = Connection(Door(load({})), config=config, server_state=ServerState(), app_state={})
    for name in ("cycle", "flow", "headers", "loop", "connections", "server_state", "parser", "transport", "pipeline"):
        assert hasattr(made, name), name
    assert {"disconnected", "keep_alive", "message_event", "response_started", "response_complete"} <= set(
        inspect.getsource(RequestResponseCycle.__init__).replace(":", " ").replace("self.", "").split()
    )
    assert {"read_paused", "write_paused"} <= vars(FlowControl(asyncio.Transport())).keys()
    assert STATUS_LINE[431].startswith(b"HTTP/1.1 431 ")
    assert {"total_requests", "connections", "default_headers"} <= vars(ServerState()).keys()
    source = inspect.getsource(HttpToolsProtocol)
    for call in (
        "self.parser.feed_data(data)",
        "self.send_400_response(msg)",
        "keep_alive=",
        "transport=self.transport",
    ):
        assert call in source, call
    assert (
        "if not self.keep_alive:\n                    self.transport.close()\n                self.on_response()"
        in (inspect.getsource(RequestResponseCycle.send))
    )
