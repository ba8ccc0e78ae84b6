"""An MCP server that is not ours, `mcp-server-time`: as a program of the operator's catalog, and over HTTP as its SDK serves it."""

import json
import sys
import threading
from collections.abc import Iterator

import pytest
import uvicorn
from mcp_server_time.server import create_server

from tests.processes import children, command
from tests.servers import Served
from tests.upstream import answer, call, finish, script
from tests.waiting import until

CATALOG = """
[upstreams.scripted]
base_url = "{upstream}"

[tool_servers.clock]
command = ["{python}", "-m", "mcp_server_time", "--local-timezone", "UTC"]
"""
TOKYO = {"source_timezone": "UTC", "time": "12:00", "target_timezone": "Asia/Tokyo"}
NOWHERE = {**TOKYO, "target_timezone": "Asia/Nowhere"}


@pytest.fixture
def clocked(new_server, upstream, catalog_file) -> Served:
    """A server whose operator has the program in the catalog; nobody keeps it running between two runs."""
    catalog = catalog_file(CATALOG.format(upstream=upstream.base_url, python=sys.executable))
    return new_server(REPRISE_CATALOG=catalog, REPRISE_TOOL_PROGRAM_IDLE_S="0")


def programs_of(served: Served) -> list[str]:
    """The commands of the processes that a server has started, and that live."""
    return [command(child) for child in children(served.process.pid)]


@pytest.fixture(scope="module")
def clock_urls() -> Iterator[dict[str, str]]:
    """The same server over Streamable HTTP, as SSE and as JSON, with and without sessions, and over HTTP+SSE."""
    apps = {
        "streamable": create_server("UTC").streamable_http_app(),
        "json": create_server("UTC").streamable_http_app(json_response=True),
        "stateless": create_server("UTC").streamable_http_app(stateless_http=True),
        "sse": create_server("UTC").sse_app(),
    }
    running = {name: uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning")) for name, app in apps.items()}
    threads = [threading.Thread(target=one.run, daemon=True) for one in running.values()]
    for thread in threads:
        thread.start()
    until(lambda: all(one.started for one in running.values()))
    paths = {name: "sse" if name == "sse" else "mcp" for name in apps}
    yield {
        name: f"http://127.0.0.1:{one.servers[0].sockets[0].getsockname()[1]}/{paths[name]}"
        for name, one in running.items()
    }
    for one in running.values():
        one.should_exit = True
    for thread in threads:
        thread.join(10)


def ask(client, tool):
    """A response with two calls in one turn: one that is right, and one that the tool refuses."""
    turn = [
        call("convert_time", TOKYO, id="a"),
        call("convert_time", NOWHERE, index=1, id="b"),
        finish("tool_calls"),
    ]
    given = {"type": "mcp", "server_label": "clock", "require_approval": "never", **tool}
    return client.responses.create(model="m", input=script(turn, answer("Nine in the evening.")), tools=[given])


def check(response):
    """What any of the transports must give."""
    listed, right, wrong, message = response.output
    assert [tool.name for tool in listed.tools] == ["get_current_time", "convert_time"]
    assert listed.tools[0].annotations["readOnlyHint"] is True
    assert listed.tools[1].input_schema["required"] == ["source_timezone", "time", "target_timezone"]
    assert (right.status, right.error) == ("completed", None)
    assert json.loads(right.output)["target"]["datetime"].endswith("T21:00:00+09:00")
    assert (wrong.status, wrong.output, wrong.error.type) == ("failed", None, "mcp_tool_execution_error")
    assert "Asia/Nowhere" in wrong.error.content[0]["text"]
    assert message.content[0].text == "Nine in the evening."


def test_a_program_of_the_catalog_is_started_called_and_ended(clocked):
    with clocked.client() as client:
        check(ask(client, {}))
    until(lambda: not any("mcp_server_time" in program for program in programs_of(clocked)))


def test_read_only_tools_of_the_program_need_no_approval_when_that_is_asked_for(clocked):
    """Its annotations say which are."""
    with clocked.client() as client:
        check(ask(client, {"require_approval": {"never": {"read_only": True}}, "allowed_tools": {"read_only": True}}))


@pytest.mark.parametrize("transport", ["streamable", "json", "stateless", "sse"])
def test_the_same_server_over_http(client, clock_urls, transport):
    check(ask(client, {"server_url": clock_urls[transport]}))
