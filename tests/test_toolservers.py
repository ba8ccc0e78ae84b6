"""Tool servers, called as a run calls them: every transport over real HTTP and real pipes, and every way to fail."""

import asyncio
import base64
import json
import socket
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from msgspec.structs import replace

from app.outbound.guard import Guard
from app.outbound.masking import Mask
from app.outbound.mcp import (
    IDEMPOTENCY_KEY,
    PART_BYTES_MIN,
    Listed,
    ToolFailure,
    ToolServer,
    ToolSessions,
    _Mended,
)
from app.settings import Settings
from tests.servers import ROOT
from tests.toolserver import Toolserver
from tests.toolserver.tools import PIXEL, TOOLS

SETTINGS = Settings(outbound_allow="127.0.0.1")
OVER_HTTP = ["mcp", "json", "sse"]
EVERY = [*OVER_HTTP, "stdio"]

At = Callable[..., ToolServer]
"""Transport and options → the scripted server, under the name of the test."""


@pytest.fixture
def name() -> str:
    """Under which this test's calls are found."""
    return f"t{uuid.uuid4().hex}"


@pytest.fixture
def at(toolserver: Toolserver, name: str) -> At:
    def make(transport: str = "mcp", **options: object) -> ToolServer:
        if transport == "stdio":
            given = [f"{option}={value}" for option, value in options.items()]
            return ToolServer("tools", command=(sys.executable, "-m", "tests.toolserver", *given), trusted=True)
        return ToolServer("tools", url=toolserver.url(transport, name, **options))

    return make


@pytest.fixture(autouse=True)
def _at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs are found from the project's directory."""
    monkeypatch.chdir(ROOT)


def sessions(mask: Mask | None = None, **settings: Any) -> ToolSessions:
    """The sessions of a run with these settings."""
    given = replace(SETTINGS, **settings)
    return ToolSessions(Guard.from_settings(given), given, mask or Mask([]))


@pytest.fixture
async def run() -> AsyncIterator[ToolSessions]:
    """The sessions of one run; afterwards nothing of them is left in the loop."""
    before = asyncio.all_tasks()
    async with sessions() as made:
        yield made
    assert asyncio.all_tasks() - before - {asyncio.current_task()} == set()


async def fails(work: Any) -> ToolFailure:
    with pytest.raises(ToolFailure) as caught:
        await work
    return caught.value


# What is listed.


@pytest.mark.parametrize("transport", EVERY)
async def test_tools_are_listed(run: ToolSessions, at: At, transport: str):
    listed = await run.list_tools(at(transport))
    assert [tool.name for tool in listed] == list(TOOLS)
    assert listed[1] == Listed(
        name="add",
        description="Adds two numbers.",
        input_schema=TOOLS["add"]["inputSchema"],
        annotations={"readOnlyHint": True, "title": "Add"},
    )


@pytest.mark.parametrize("transport", EVERY)
@pytest.mark.parametrize("pages", [2, 5, 50])
async def test_all_pages_of_a_list_are_read(run: ToolSessions, at: At, transport: str, pages: int):
    assert [tool.name for tool in await run.list_tools(at(transport, pages=pages))] == list(TOOLS)


async def test_a_list_is_asked_for_anew_on_the_same_session(
    run: ToolSessions, at: At, toolserver: Toolserver, name: str
):
    server = at(growing=1, tools="echo")
    first, second = await run.list_tools(server), await run.list_tools(server)
    assert len(second) == len(first) + 1
    assert len(toolserver.sessions(name)) == 1


@pytest.mark.parametrize("transport", EVERY)
async def test_lies_about_tools_are_put_right(run: ToolSessions, at: At, transport: str):
    listed = {tool.name: tool for tool in await run.list_tools(at(transport, lies=1))}
    names = "no_schema null_schema text_schema array_schema typeless twice numbered"
    assert list(listed) == names.split()
    for one in ("no_schema", "null_schema", "text_schema", "array_schema"):
        assert listed[one].input_schema == {"type": "object"}
    assert listed["typeless"] == Listed("typeless", None, {"type": "object", "properties": {"a": {}}}, None)
    assert listed["twice"].description == "the first"
    assert listed["numbered"].description is None


async def test_a_list_that_turns_in_a_circle_ends(run: ToolSessions, at: At, toolserver: Toolserver, name: str):
    assert [tool.name for tool in await run.list_tools(at(loop=1))] == ["echo"]
    asked = [request.body["method"] for request in toolserver.asked(name) if request.method == "POST"]
    assert asked.count("tools/list") == 2


async def test_more_tools_than_the_limit_are_a_failure(at: At):
    async with sessions(tools_listed_max=3) as run:
        failure = await fails(run.list_tools(at(pages=4)))
        assert (failure.kind, failure.code) == ("mcp_protocol_error", -32600)
        assert "more than 3 tools" in failure.message
        assert len(await run.list_tools(at(tools="echo,add,fail"))) == 3


# What is called.


@pytest.mark.parametrize("transport", EVERY)
async def test_a_call_is_answered(run: ToolSessions, at: At, transport: str):
    server = at(transport)
    result = await run.call(server, "add", {"a": 1, "b": 2.5}, call_id="mcp_1")
    assert (result.text, result.structured, result.images, result.is_error) == ("3.5", {"sum": 3.5}, (), False)
    arguments = {"text": "é\u2028\x00", "nested": [{"a": None}], "n": 2**53}
    assert json.loads((await run.call(server, "echo", arguments, call_id="mcp_2")).text) == arguments


@pytest.mark.parametrize("transport", OVER_HTTP)
async def test_a_call_carries_its_id_and_comes_once(
    run: ToolSessions, at: At, toolserver: Toolserver, name: str, transport: str
):
    await run.call(at(transport), "echo", {"x": 1}, call_id="mcp_42")
    (call,) = toolserver.calls(name)
    assert (call.tool, call.arguments, call.meta) == ("echo", {"x": 1}, {IDEMPOTENCY_KEY: "mcp_42"})


@pytest.mark.parametrize("transport", EVERY)
async def test_a_tools_own_error_is_a_result(run: ToolSessions, at: At, transport: str):
    result = await run.call(at(transport), "fail", {"text": "no such city"}, call_id="1")
    assert (result.text, result.is_error) == ("no such city", True)


@pytest.mark.parametrize("transport", EVERY)
async def test_an_error_of_the_protocol_is_a_failure(run: ToolSessions, at: At, transport: str):
    server = at(transport)
    failure = await fails(run.call(server, "refuse", {"code": -32099, "message": "not you"}, call_id="1"))
    assert (failure.kind, failure.code, failure.message) == ("mcp_protocol_error", -32099, "not you")
    failure = await fails(run.call(server, "unheard_of", {}, call_id="2"))
    assert (failure.kind, failure.code) == ("mcp_protocol_error", -32602)


BLOB = base64.b64encode(b"\x00\x01\x02").decode()


@pytest.mark.parametrize(
    ("part", "text", "images"),
    [
        ({"type": "text", "text": "plain"}, "plain", ()),
        ({"type": "text", "text": ""}, "", ()),
        (
            {"type": "image", "data": PIXEL, "mimeType": "image/png"},
            "[image/png, 16 bytes]",
            (("image/png", PIXEL),),
        ),
        ({"type": "image", "data": "§§", "mimeType": "image/png"}, "[image/png, not readable]", ()),
        ({"type": "image", "data": BLOB}, "[application/octet-stream, 3 bytes]", ()),
        ({"type": "image", "data": None}, "[content of type 'image']", ()),
        ({"type": "audio", "data": BLOB, "mimeType": "audio/wav"}, "[audio/wav, 3 bytes]", ()),
        ({"type": "resource", "resource": {"uri": "file:///a", "text": "inside"}}, "inside", ()),
        (
            {"type": "resource", "resource": {"uri": "file:///b", "blob": BLOB, "mimeType": "application/zip"}},
            "[resource file:///b, application/zip, 3 bytes]",
            (),
        ),
        (
            {"type": "resource", "resource": {"uri": "file:///c", "blob": BLOB, "mimeType": "image/gif"}},
            "[resource file:///c, image/gif, 3 bytes]",
            (("image/gif", BLOB),),
        ),
        (
            {"type": "resource_link", "uri": "https://x/y", "name": "y", "description": "a file"},
            "[resource link https://x/y, y: a file]",
            (),
        ),
        ({"type": "resource_link", "uri": "https://x/y"}, "[resource link https://x/y]", ()),
        ({"type": "hologram", "data": 1}, "[content of type 'hologram']", ()),
        ({"text": "no type"}, "[content of type None]", ()),
        ("no part", "", ()),
        ({"type": "text", "text": 7}, "[content of type 'text']", ()),
    ],
)
async def test_parts_of_a_result_are_rendered(
    run: ToolSessions, at: At, part: object, text: str, images: tuple[tuple[str, str], ...]
):
    result = await run.call(at("json"), "say", {"content": [part]}, call_id="1")
    assert (result.text, result.images) == (text, images)
    assert not result.is_error


async def test_several_parts_are_lines(run: ToolSessions, at: At):
    parts = [{"type": "text", "text": "a"}, {"type": "image", "data": PIXEL, "mimeType": "image/png"}]
    result = await run.call(at(), "say", {"content": [*parts, {"type": "text", "text": "b"}]}, call_id="1")
    assert result.text == "a\n[image/png, 16 bytes]\nb"


@pytest.mark.parametrize("transport", EVERY)
async def test_structured_content_is_the_text_where_there_is_none(run: ToolSessions, at: At, transport: str):
    """Also after a listing whose output schema says something else: that is no reason to lose a result."""
    server = at(transport)
    await run.list_tools(server)
    result = await run.call(server, "structured", {}, call_id="1")
    assert result.structured == {"sum": 3, "of": [1, 2]}
    assert json.loads(result.text) == result.structured


async def test_odd_values_are_kept(run: ToolSessions, at: At):
    odd = {"n": 2**70, "deep": [[[[[[]]]]]], "": None}
    result = await run.call(at("json"), "say", {"more": {"structuredContent": odd}}, call_id="1")
    assert result.structured == odd
    assert result.text == '{"n":1180591620717411303424,"deep":[[[[[[]]]]]],"":null}'


@pytest.mark.parametrize(
    "result", [{}, {"content": None}, {"content": "text"}, {"content": {}}, {"isError": "yes", "content": []}]
)
async def test_a_result_without_its_parts_is_an_empty_one(run: ToolSessions, at: At, result: object):
    answered = await run.call(at("json"), "raw", {"result": result}, call_id="1")
    assert (answered.text, answered.structured, answered.images, answered.is_error) == ("", None, (), False)


async def test_a_result_that_is_a_question_is_a_failure(run: ToolSessions, at: At):
    asked = {"resultType": "input_required", "inputRequests": {}}
    failure = await fails(run.call(at(), "raw", {"result": asked}, call_id="1"))
    assert failure.kind == "mcp_protocol_error"
    assert "asks for input" in failure.message


async def test_long_text_is_cut_off_between_characters(at: At):
    async with sessions(tool_output_bytes_max=1025) as run:
        whole = await run.call(at(), "long", {"chars": 512}, call_id="1")
        assert whole.text == "é" * 512
        cut = await run.call(at(), "long", {"chars": 600}, call_id="2")
        assert cut.text == "é" * 512 + "\n[cut off here: 1200 bytes in all, 1025 are shown]"


async def test_an_answer_above_a_mebibyte_arrives(run: ToolSessions, at: At):
    """Pictures are long; the SDK's own limit for an event would lose them."""
    large = base64.b64encode(bytes(3_000_000)).decode()
    parts = [{"type": "image", "data": large, "mimeType": "image/png"}]
    for transport in ("mcp", "json", "stdio"):
        result = await run.call(at(transport), "say", {"content": parts}, call_id="1")
        assert result.images == (("image/png", large),)


# Sessions.


@pytest.mark.parametrize("transport", EVERY)
async def test_calls_run_at_once_on_one_session(
    run: ToolSessions, at: At, toolserver: Toolserver, name: str, transport: str
):
    """One call waits, another one is asked and answered meanwhile."""
    server = at(transport)
    slow = asyncio.create_task(run.call(server, "slow", {"ms": 60_000}, call_id="1"))
    results = await asyncio.gather(*(run.call(server, "echo", {"n": n}, call_id=f"e{n}") for n in range(20)))
    assert [json.loads(result.text)["n"] for result in results] == list(range(20))
    assert not slow.done()
    slow.cancel()
    with pytest.raises(asyncio.CancelledError):
        await slow
    assert (await run.call(server, "echo", {}, call_id="2")).text == "{}"
    assert len(toolserver.sessions(name)) == (0 if transport == "stdio" else 1)


async def test_a_call_waits_for_its_tool(run: ToolSessions, at: At, toolserver: Toolserver, name: str):
    server = at()
    waiting = asyncio.create_task(run.call(server, "gate", {"name": name}, call_id="1"))
    await toolserver.until_reached(name)
    assert (await run.call(server, "echo", {}, call_id="2")).text == "{}"
    toolserver.open(name)
    assert (await waiting).text == "through"


@pytest.mark.parametrize("transport", OVER_HTTP)
async def test_sessions_and_connections_are_closed_with_the_run(name: str, transport: str):
    with Toolserver() as tools:
        server = ToolServer("tools", url=tools.url(transport, name))
        async with sessions() as run:
            await run.list_tools(server)
            await run.call(server, "echo", {}, call_id="1")
            (session,) = tools.sessions(name)
            assert session.greeted
            assert not session.closed.is_set()
            assert tools.connections
        assert await session.until_closed()
        assert await tools.until_quiet()


@pytest.mark.parametrize("transport", EVERY)
async def test_closing_ends_calls_that_hang(at: At, transport: str):
    before = asyncio.all_tasks()
    run = sessions()
    await run.list_tools(at(transport))
    hanging = asyncio.create_task(run.call(at(transport), "slow", {"ms": 60_000}, call_id="1"))
    await run.call(at(transport), "echo", {}, call_id="2")
    await run.close()
    failure = await fails(hanging)
    assert (failure.kind, failure.code) == ("mcp_protocol_error", -32000)
    assert asyncio.all_tasks() == before
    assert (await fails(run.call(at(transport), "echo", {}, call_id="3"))).code == -32000


async def test_a_cancelled_run_leaves_nothing(at: At, toolserver: Toolserver, name: str):
    before = asyncio.all_tasks()

    async def work() -> None:
        async with sessions() as run:
            await run.call(at(), "gate", {"name": name}, call_id="1")

    working = asyncio.create_task(work())
    await toolserver.until_reached(name)
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert asyncio.all_tasks() == before
    (call,) = toolserver.calls(name)
    assert await call.until_ended() == "left"


async def test_two_servers_have_two_sessions(run: ToolSessions, at: At, toolserver: Toolserver, name: str):
    first, second = at("mcp"), replace(at("mcp"), label="other")
    await asyncio.gather(*(run.call(one, "echo", {}, call_id="1") for one in (first, second, first, second)))
    assert len(toolserver.sessions(name)) == 2


# Failures in mid-call.


@pytest.mark.parametrize("transport", ["mcp", "json"])
async def test_a_broken_connection_fails_its_own_call_only(
    run: ToolSessions, at: At, toolserver: Toolserver, name: str, transport: str
):
    server = at(transport)
    waiting = asyncio.create_task(run.call(server, "gate", {"name": name}, call_id="1"))
    await toolserver.until_reached(name)
    failure = await fails(run.call(server, "cut", {}, call_id="2"))
    assert (failure.kind, failure.code) == ("http_error", 502)
    toolserver.open(name)
    assert (await waiting).text == "through"
    assert len(toolserver.calls(name, "cut")) == 1
    assert len(toolserver.sessions(name)) == 1


@pytest.mark.parametrize("transport", ["sse", "stdio"])
async def test_the_end_of_the_stream_fails_all_its_calls_and_the_next_one_has_a_new_session(
    run: ToolSessions, at: At, toolserver: Toolserver, name: str, transport: str, tmp_path: Path
):
    server = at(transport)
    record = tmp_path / "calls"
    if transport == "stdio":
        server = replace(server, command=(*server.command, "--record", str(record)))
    await run.list_tools(server)
    waiting = asyncio.create_task(run.call(server, "slow", {"ms": 60_000}, call_id="1"))
    cutting = asyncio.create_task(run.call(server, "cut", {}, call_id="2"))
    for failure in (await fails(cutting), await fails(waiting)):
        assert (failure.kind, failure.code) == ("mcp_protocol_error", -32000)
    assert (await run.call(server, "echo", {}, call_id="3")).text == "{}"
    if transport == "sse":
        called = [call.tool for call in toolserver.calls(name)]
        assert len(toolserver.sessions(name)) == 2
    else:
        called = [json.loads(line)["tool"] for line in record.read_text().splitlines()]
    assert sorted(called) == ["cut", "echo", "slow"]


@pytest.mark.parametrize("transport", OVER_HTTP)
@pytest.mark.parametrize("status", [400, 429, 500, 503])
async def test_an_http_error_in_mid_call_is_its_status(
    run: ToolSessions, at: At, toolserver: Toolserver, name: str, transport: str, status: int
):
    server = at(transport)
    failure = await fails(run.call(server, "status", {"status": status}, call_id="1"))
    assert (failure.kind, failure.code) == ("http_error", status)
    assert (await run.call(server, "echo", {}, call_id="2")).text == "{}"
    assert len(toolserver.sessions(name)) == 1


@pytest.mark.parametrize("transport", ["mcp", "json"])
async def test_a_forgotten_session_is_opened_anew_for_the_next_call(
    run: ToolSessions, at: At, toolserver: Toolserver, name: str, transport: str
):
    server = at(transport)
    failure = await fails(run.call(server, "gone", {}, call_id="1"))
    assert (failure.kind, failure.code) == ("http_error", 404)
    assert (await run.call(server, "echo", {}, call_id="2")).text == "{}"
    assert len(toolserver.sessions(name)) == 2
    assert len(toolserver.calls(name, "gone")) == 1


@pytest.mark.parametrize("transport", EVERY)
async def test_a_call_has_a_deadline(at: At, transport: str):
    async with sessions(tool_call_timeout_s=0.2) as run:
        server = at(transport)
        failure = await fails(run.call(server, "slow", {"ms": 60_000}, call_id="1"))
        assert (failure.kind, failure.code) == ("mcp_protocol_error", -32001)
        assert "within 0.2 s" in failure.message
        if transport != "stdio":  # A new program may take longer than that.
            assert (await run.call(server, "echo", {}, call_id="2")).text == "{}"


@pytest.mark.parametrize("transport", EVERY)
async def test_a_greeting_has_a_deadline(at: At, transport: str):
    """All that wait for it hear the same."""
    async with sessions(tool_connect_timeout_s=0.3) as run:
        for failure in await asyncio.gather(*(fails(run.list_tools(at(transport, silent=1))) for _ in range(3))):
            assert (failure.kind, failure.code) == ("mcp_protocol_error", -32001)


@pytest.mark.parametrize("transport", ["mcp", "json"])
async def test_an_endless_answer_meets_the_limit_of_bytes(at: At, toolserver: Toolserver, name: str, transport: str):
    async with sessions(tool_answer_bytes_max=100_000) as run:
        failure = await fails(run.call(at(transport), "endless", {}, call_id="1"))
        assert failure.kind == "mcp_protocol_error"
        assert "longer than 100000 bytes" in failure.message
        assert (await run.call(at(transport), "echo", {}, call_id="2")).text == "{}"
        assert len(toolserver.calls(name, "endless")) == 1


async def test_parts_of_a_line_count_for_what_they_cost():
    taken = 0

    class Drops(httpx2.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            nonlocal taken
            while True:
                taken += 1
                yield b"xx"

    with pytest.raises(httpx2.StreamError):
        async for _ in _Mended(Drops(), 100 * PART_BYTES_MIN):
            pass
    assert taken == 101


@pytest.mark.parametrize("transport", ["sse", "stdio"])
async def test_an_endless_stream_meets_the_deadline(at: At, transport: str):
    async with sessions(tool_call_timeout_s=0.5) as run:
        failure = await fails(run.call(at(transport), "endless", {}, call_id="1"))
        assert (failure.kind, failure.code) == ("mcp_protocol_error", -32001)


async def test_a_compressed_answer_is_not_unpacked(run: ToolSessions, at: At):
    failure = await fails(run.call(at("json", packed=1), "echo", {}, call_id="1"))
    assert failure.kind == "mcp_protocol_error"
    assert "compressed" in failure.message


@pytest.mark.parametrize("transport", ["mcp", "sse", "stdio"])
@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("sampling/createMessage", {"messages": [], "maxTokens": 1}),
        ("elicitation/create", {"message": "your password?", "requestedSchema": {"type": "object", "properties": {}}}),
        ("roots/list", {}),
        ("unheard/of", {}),
    ],
)
async def test_questions_of_a_server_are_refused(
    run: ToolSessions, at: At, transport: str, method: str, params: dict[str, Any]
):
    answer = await run.call(at(transport), "ask", {"method": method, "params": params}, call_id="1")
    heard = json.loads(answer.text)
    assert "result" not in heard
    assert heard["error"]["code"] in {-32600, -32601}


@pytest.mark.parametrize("transport", ["mcp", "sse", "stdio"])
async def test_a_changed_list_disturbs_nobody(run: ToolSessions, at: At, transport: str):
    assert (await run.call(at(transport), "notify", {}, call_id="1")).text == "notified"


# Opening.


@pytest.mark.parametrize("transport", OVER_HTTP)
async def test_a_server_that_wants_a_token_gets_it(run: ToolSessions, at: At, name: str, transport: str):
    server = at(transport, auth="s3cret-token")
    failure = await fails(run.list_tools(server))
    assert (failure.kind, failure.code) == ("http_error", 401)
    assert await run.list_tools(replace(server, authorization="s3cret-token"))
    assert await run.list_tools(replace(server, authorization="Bearer s3cret-token"))
    assert await run.list_tools(replace(server, headers={"authorization": "Bearer s3cret-token"}))


async def test_a_401_is_no_reason_to_try_the_older_transport(
    run: ToolSessions, at: At, toolserver: Toolserver, name: str
):
    await fails(run.list_tools(at("mcp", auth="x")))
    assert [request.method for request in toolserver.asked(name)] == ["POST"]


async def test_headers_are_sent_with_every_request(run: ToolSessions, at: At, toolserver: Toolserver, name: str):
    """But for those that belong to the transport."""
    given = {"x-team": "research", "Accept": "nothing", "Content-Length": "7", "Authorization": "old"}
    await run.call(replace(at(), headers=given, authorization="Basic abc"), "echo", {}, call_id="1")
    for request in toolserver.asked(name):
        assert request.headers["x-team"] == "research"
        assert request.headers["authorization"] == "Basic abc"
        assert request.headers["accept"] != "nothing"
        assert request.headers["accept-encoding"] == "identity"


@pytest.mark.parametrize(
    "headers",
    [{"x-key": value} for value in ("a\nb", "a\r\nX-Evil: 1", "schlüssel", "\x00")]
    + [{name: "secret"} for name in ("", "a b", "a:b", "a\r\nX-Evil: 1", "schlüssel")],
)
async def test_a_header_that_cannot_be_sent_is_a_failure(
    run: ToolSessions, at: At, toolserver: Toolserver, name: str, headers: dict[str, str]
):
    failure = await fails(run.list_tools(replace(at(), headers=headers)))
    assert (failure.kind, failure.code) == ("http_error", 400)
    assert not any(value in failure.message for value in headers.values())
    assert toolserver.asked(name) == []


@pytest.mark.parametrize("status", [400, 404, 405, 410])
async def test_a_refusal_is_reported_after_the_older_transport_was_tried(
    run: ToolSessions, at: At, toolserver: Toolserver, name: str, status: int
):
    """It was: there is a GET. But what the server said first is what counts."""
    server = replace(at("json", status=status), url=toolserver.url("nothing", name))
    failure = await fails(run.list_tools(server))
    assert (failure.kind, failure.code) == ("http_error", 404)
    failure = await fails(run.list_tools(at("json", status=status)))
    assert (failure.kind, failure.code) == ("http_error", status)
    assert "GET" in {request.method for request in toolserver.asked(name)}


@pytest.mark.parametrize("transport", ["mcp", "json", "stdio"])
async def test_a_server_without_handshakes_is_asked_what_it_speaks(
    run: ToolSessions, at: At, toolserver: Toolserver, name: str, transport: str
):
    server = at(transport, modern=1)
    assert [tool.name for tool in await run.list_tools(server)] == list(TOOLS)
    assert (await run.call(server, "add", {"a": 1, "b": 2}, call_id="mcp_1")).text == "3"
    if transport != "stdio":
        assert toolserver.calls(name)[0].meta[IDEMPOTENCY_KEY] == "mcp_1"
        assert {request.method for request in toolserver.asked(name)} == {"POST"}


@pytest.mark.parametrize("status", [500, 502, 503])
async def test_a_broken_server_is_its_status(run: ToolSessions, at: At, toolserver: Toolserver, name: str, status: int):
    failure = await fails(run.list_tools(at(status=status)))
    assert (failure.kind, failure.code) == ("http_error", status)
    assert [request.method for request in toolserver.asked(name)] == ["POST"]


async def test_a_server_that_came_back_is_opened_at_the_next_call(at: At, name: str):
    with Toolserver() as tools:
        server = ToolServer("tools", url=tools.url("mcp", name))
        tools.stop()
        async with sessions() as run:
            failure = await fails(run.list_tools(server))
            assert (failure.kind, failure.code) == ("http_error", 502)
            assert "can't be reached" in failure.message
            tools.start()
            assert (await run.call(server, "echo", {}, call_id="1")).text == "{}"


async def test_a_session_whose_stream_ended_between_calls_is_opened_anew(name: str):
    with Toolserver() as tools:
        server = ToolServer("tools", url=tools.url("sse", name))
        async with sessions() as run:
            await run.call(server, "echo", {}, call_id="1")
            await asyncio.to_thread(tools.stop)
            await run._all[0]._task  # It has noticed.
            tools.start()
            assert (await run.call(server, "echo", {}, call_id="2")).text == "{}"
            assert [call.meta[IDEMPOTENCY_KEY] for call in tools.calls(name)] == ["1", "2"]


async def test_what_the_guard_refuses_is_not_called(at: At, toolserver: Toolserver, name: str):
    async with sessions(outbound_allow="") as run:
        for transport in ("mcp", "sse"):
            failure = await fails(run.list_tools(at(transport)))
            assert (failure.kind, failure.code) == ("http_error", 403)
            assert "127.0.0.1" in failure.message and "REPRISE_OUTBOUND_ALLOW" in failure.message
        assert toolserver.asked(name) == []
        assert await run.list_tools(replace(at(), trusted=True))


async def test_a_redirect_to_another_place_is_not_followed(run: ToolSessions, at: At, name: str):
    with Toolserver() as other:
        server = replace(at(redirect=f"{other.url('mcp', name)}?token=tok-123"), authorization="s3cret-token")
        failure = await fails(run.list_tools(server))
        assert failure.kind == "mcp_protocol_error"
        assert "tok-123" not in failure.message
        assert other.asked(name) == []


async def test_a_redirect_within_the_server_is_followed(run: ToolSessions, at: At, toolserver: Toolserver, name: str):
    server = ToolServer("tools", url=toolserver.url("mcp", "door", redirect=toolserver.url("mcp", name)))
    assert (await run.call(server, "echo", {}, call_id="1")).text == "{}"
    assert len(toolserver.calls(name)) == 1


async def test_only_the_operator_starts_programs(run: ToolSessions, at: At):
    failure = await fails(run.list_tools(replace(at("stdio"), trusted=False)))
    assert (failure.kind, failure.code) == ("http_error", 403)


async def test_a_program_that_is_not_there_is_a_failure(run: ToolSessions):
    failure = await fails(run.list_tools(ToolServer("tools", command=("/no/such/program",), trusted=True)))
    assert (failure.kind, failure.code) == ("mcp_protocol_error", -32000)
    assert "/no/such" not in failure.message


async def test_a_program_that_is_no_tool_server_is_a_failure(run: ToolSessions):
    failure = await fails(run.list_tools(ToolServer("tools", command=(sys.executable, "-c", "0"), trusted=True)))
    assert (failure.kind, failure.code) == ("mcp_protocol_error", -32000)


async def test_a_program_gets_its_environment_and_not_ours(run: ToolSessions, at: At, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", "ours")
    result = await run.call(replace(at("stdio"), environment={"CITY": "Oslo"}), "headers", {}, call_id="1")
    found = json.loads(result.text)
    assert found["CITY"] == "Oslo"
    assert "OPENAI_API_KEY" not in found


@pytest.mark.parametrize(
    "url",
    ["", "nonsense", "http://", "http://[", "ftp://127.0.0.1/", "http://127.0.0.1:0/", f"http://{'a' * 64}.example/"],
)
async def test_a_bad_url_is_a_failure(run: ToolSessions, url: str):
    failure = await fails(run.list_tools(ToolServer("tools", url=url)))
    assert failure.kind == "http_error"


# Secrets.


def test_a_server_does_not_show_what_it_carries():
    server = ToolServer("tools", url="http://x/?k=SECRET", headers={"x": "SECRET"}, authorization="SECRET")
    assert "SECRET" not in f"{server!r} {list(server.__rich_repr__())}"


async def test_a_failure_tells_no_secrets(at: At):
    """A server may repeat what we told it; the client that hears of the failure may be another one."""
    server = replace(at(key="tok-query"), headers={"x-key": "key-header"}, authorization="Basic dXNlcjpwYXNz")
    said = "tok-query key-header Basic dXNlcjpwYXNz dXNlcjpwYXNz and more"
    async with sessions(Mask(server.secrets)) as run:
        failure = await fails(run.call(server, "refuse", {"message": said}, call_id="1"))
        assert failure.message == "*** *** *** *** and more"
        failure = await fails(run.call(server, "refuse", {"message": "x" * 5000}, call_id="1"))
        assert len(failure.message) == 1001


LOUD = """
import asyncio, logging, sys
from app import telemetry
from app.outbound.guard import Guard
from app.outbound.masking import Mask
from app.outbound.mcp import ToolFailure, ToolServer, ToolSessions
from app.settings import Settings

telemetry.start_logging("debug")
logging.getLogger().setLevel(logging.DEBUG)

async def main():
    settings = Settings(outbound_allow="127.0.0.1")
    server = ToolServer("tools", url=sys.argv[1], headers={"x-key": "SECRET-1"}, authorization="SECRET-2")
    async with ToolSessions(Guard.from_settings(settings), settings, Mask([])) as run:
        await run.list_tools(server)
        print((await run.call(server, "echo", {"say": "SECRET-3"}, call_id="1")).text)
        for tool in ("cut", "refuse", "say"):
            try:
                await run.call(server, tool, {"message": "SECRET-4", "content": 7, "more": {"x": "SECRET-5"}}, call_id="2")
            except ToolFailure:
                print("failed")

asyncio.run(main())
"""


@pytest.mark.parametrize("transport", ["mcp", "json", "sse"])
def test_nothing_secret_is_logged_even_when_all_is(toolserver: Toolserver, name: str, transport: str):
    url = toolserver.url(transport, name, key="SECRET-6")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", LOUD, url], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "SECRET-3" in done.stdout
    assert "SECRET" not in done.stderr


async def test_proxies_of_the_environment_are_not_asked(at: At, monkeypatch: pytest.MonkeyPatch):
    for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    async with sessions() as run:
        assert await run.list_tools(at())
        assert await run.list_tools(replace(at(), trusted=True))


# A server that is not ours: the SDK's.

SDK_SERVER = """
import sys
from mcp.server.mcpserver import MCPServer

server = MCPServer("theirs")


@server.tool()
def add(a: int, b: int) -> int:
    "Adds."
    return a + b


@server.tool()
def broken() -> str:
    raise ValueError("no")


transport, port = sys.argv[1:]
server.run(transport, **({} if transport == "stdio" else {"port": int(port)}))
"""


@pytest.fixture
def theirs() -> Iterator[Callable[[str], ToolServer]]:
    """The SDK's server over a transport; a program until the end of the test."""
    running: list[subprocess.Popen[bytes]] = []

    def start(transport: str) -> ToolServer:
        command = (sys.executable, "-c", SDK_SERVER, transport)
        if transport == "stdio":
            return ToolServer("theirs", command=(*command, "0"), trusted=True)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        running.append(subprocess.Popen([*command, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
        assert running[0].stderr is not None
        for line in running[0].stderr:
            if b"Uvicorn running" in line:
                break
        path = {"streamable-http": "mcp", "sse": "sse"}[transport]
        return ToolServer("theirs", url=f"http://127.0.0.1:{port}/{path}")

    yield start
    for one in running:
        assert one.stderr is not None
        with one.stderr:
            one.kill()
            one.wait()


@pytest.mark.parametrize("transport", ["streamable-http", "sse", "stdio"])
async def test_the_sdks_own_server_is_understood(
    run: ToolSessions, theirs: Callable[[str], ToolServer], transport: str
):
    server = theirs(transport)
    assert [tool.name for tool in await run.list_tools(server)] == ["add", "broken"]
    result = await run.call(server, "add", {"a": 1, "b": 2}, call_id="1")
    assert (result.text, result.structured, result.is_error) == ("3", {"result": 3}, False)
    assert (await run.call(server, "broken", {}, call_id="2")).is_error


# The scripted server as a process of its own, for tests that kill things.


@pytest.fixture
def process(tmp_path: Path) -> Iterator[str]:
    """Its URL."""
    command = [sys.executable, "-m", "tests.toolserver", "--port", "0", "--record", str(tmp_path / "calls")]
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    with running.stdout:
        yield running.stdout.readline().strip()
        running.kill()
        running.wait()


async def test_the_scripted_server_tells_other_processes_what_came(run: ToolSessions, process: str, tmp_path: Path):
    def ask(path: str, data: bytes | None = None) -> Any:
        with urllib.request.urlopen(f"{process}{path}", data=data) as reply:
            return json.load(reply)

    server = ToolServer("tools", url=f"{process}/mcp/crash")
    waiting = asyncio.create_task(run.call(server, "gate", {"name": "g"}, call_id="1"))
    assert (await run.call(server, "echo", {"x": 1}, call_id="2")).text == '{"x": 1}'
    assert await asyncio.to_thread(ask, "/gates/g", b"{}") == {"opened": "g"}
    assert (await waiting).text == "through"
    calls = await asyncio.to_thread(ask, "/calls")
    assert sorted((call["tool"], call["outcome"]) for call in calls) == [("echo", "answered"), ("gate", "answered")]
    assert [session["closed"] for session in await asyncio.to_thread(ask, "/sessions")] == [False]
    lines = (tmp_path / "calls").read_text().splitlines()
    assert sorted(json.loads(line)["tool"] for line in lines) == ["echo", "gate"]
