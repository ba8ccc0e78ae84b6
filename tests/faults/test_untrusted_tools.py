"""A tool server is not trusted: how much it says, and how often, is bounded, and it is left when the client leaves."""

import asyncio
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import httpx
import pytest

from tests.faults.memory import GROWTH_MAX_KB, Grown, needs_proc
from tests.rogue import EVENTS, JSON, PIECE, ZEROS, Rogue, Visit, headed
from tests.servers import Served
from tests.upstream import Upstream, answer, calling, note, script
from tests.waiting import until

LIMITS = {"REPRISE_TOOL_ANSWER_BYTES_MAX": str(2 * 2**20), "REPRISE_TOOL_CALL_TIMEOUT_S": "5"}

LISTED = {"tools": [{"name": "go", "inputSchema": {"type": "object"}}]}
SAID = {"content": [{"type": "text", "text": "fine"}]}
PING = b'data: {"jsonrpc":"2.0","id":"p","method":"ping"}\n\n'
NEWS = b'data: {"jsonrpc":"2.0","method":"notifications/message","params":{"level":"info","data":"x"}}\n\n'

Bytes = Iterable[bytes | None]
Act = Callable[[Visit], Bytes]


@pytest.fixture(scope="module")
def server(base_env: Mapping[str, str], new_database: Callable[[], str]) -> Iterator[Served]:
    """A server with small limits."""
    with Served({**base_env, **LIMITS, "DATABASE_URL": new_database()}) as running:
        yield running


@pytest.fixture(scope="module")
def rogue() -> Iterator[Rogue]:
    with Rogue() as running:
        yield running


def result(visit: Visit, given: object) -> Bytes:
    """A whole JSON answer."""
    body = json.dumps({"jsonrpc": "2.0", "id": visit.body["id"], "result": given}).encode()
    return [headed("content-type: application/json", f"content-length: {len(body)}") + body]


def greeting(visit: Visit) -> Bytes:
    given = {
        "protocolVersion": "2025-06-18",
        "capabilities": {"tools": {}},
        "serverInfo": {"name": "rogue", "version": "1"},
    }
    body = json.dumps({"jsonrpc": "2.0", "id": visit.body["id"], "result": given}).encode()
    lines = ("content-type: application/json", f"content-length: {len(body)}", "mcp-session-id: s1")
    return [headed(*lines) + body]


def serving(**acts: Act) -> Act:
    """A server that does what it should but for some requests: `get`, `delete`, `answered` (what we answer), or a method's
    last word."""

    def act(visit: Visit) -> Bytes:
        method = visit.head.split(" ")[0].lower()
        word = method if method != "post" else visit.body.get("method", "answered").rsplit("/", 1)[-1]
        if word in acts:
            return acts[word](visit)
        match word:
            case "initialize":
                return greeting(visit)
            case "list":
                return result(visit, LISTED)
            case "call":
                return result(visit, SAID)
            case "delete":
                return [headed("content-length: 0")]
            case "get":
                return [headed("content-length: 0", status="405 No")]
        return [headed("content-length: 0", status="202 Accepted")]

    return act


def endless(first: bytes, part: bytes) -> Act:
    piece = part * (PIECE // len(part) + 1)
    return lambda _: itertools.chain([first], itertools.repeat(piece))


def paged(**page: Any) -> Act:
    """Pages without end, each with a cursor of its own."""
    numbers = itertools.count()

    def act(visit: Visit) -> Bytes:
        number = next(numbers)
        tools = [{"name": "go", "description": page.get("text", ""), "inputSchema": {"type": "object"}}]
        return result(visit, {"tools": tools, "nextCursor": f"{number}{page.get('cursor', '')}"})

    return act


def ask(server: Served, rogue: Rogue, said: str, *turns: list[dict[str, Any]]) -> dict[str, Any]:
    """A response that calls the rogue's tools."""
    tool = {"type": "mcp", "server_label": "box", "server_url": f"{rogue.base_url}/box", "require_approval": "never"}
    given = script([note(said), *turns[0]], *turns[1:]) if turns else "hi"
    body = {"model": "m", "input": given, "tools": [tool]}
    reply = httpx.post(f"{server.url}/responses", json=body, timeout=120)
    assert reply.status_code == 200, reply.text
    return reply.json()


# -- Lists ------------------------------------------------------------------------------------------------------------------

MOVED = "location: /v1/box"

LISTS: dict[str, tuple[dict[str, Act], str]] = {
    "pages without end": ({"list": paged()}, "lists more than 100 pages"),
    "long pages": ({"list": paged(text="x" * 2**20)}, "lists more than 4194304 bytes"),
    "long cursors": ({"list": paged(cursor="x" * 2**20)}, "lists more than 4194304 bytes"),
    "a gigabyte": ({"list": endless(JSON, b" ")}, "longer than 2097152 bytes"),
    "an endless event": ({"list": endless(EVENTS, b"data: x\n")}, "is not understood"),
    "an endless line": ({"list": endless(EVENTS, b"data: x")}, "longer than 2097152 bytes"),
    "endless comments": ({"list": endless(EVENTS, b": hi\n\n")}, "longer than 2097152 bytes"),
    "endless news": ({"list": endless(EVENTS, NEWS)}, "longer than 2097152 bytes"),
    "a bomb": ({"list": endless(headed("content-encoding: gzip"), ZEROS)}, "compressed"),
    "a bomb as a greeting": ({"initialize": endless(headed("content-encoding: zstd"), ZEROS)}, "compressed"),
    "a redirect with an endless body": (
        {"list": endless(headed(MOVED, status="307 Moved"), b"x")},
        "longer than 2097152 bytes",
    ),
    "redirects without end": (
        {"list": lambda _: [headed(MOVED, "content-length: 0", status="307 Moved")]},
        "not followed",
    ),
    "endless headers": ({"list": endless(b"HTTP/1.1 200 OK\r\n", b"x-more: and more\r\n")}, "broke off the connection"),
    "deep JSON": ({"list": lambda _: [JSON + b"[" * 100_000]}, "is not understood"),
    "no UTF-8": ({"list": lambda _: [JSON + b'{"jsonrpc": "2.0", "id": "\xff"}']}, "is not understood"),
    "an error with a number beyond all bounds": (
        {
            "list": lambda visit: [
                JSON
                + b'{"jsonrpc":"2.0","id":"%b","error":{"code":%b,"message":"no"}}'
                % (visit.body["id"].encode(), b"9" * 99)
            ]
        },
        "no",
    ),
    "an error in many words": (
        {
            "list": lambda visit: [
                JSON
                + json.dumps(
                    {"jsonrpc": "2.0", "id": visit.body["id"], "error": {"code": 1, "message": "x" * 2**20}}
                ).encode()
            ]
        },
        "x…",
    ),
}


@needs_proc
@pytest.mark.parametrize("case", LISTS.values(), ids=LISTS)
def test_a_list_is_bounded(server, rogue, said, grown: Grown, case):
    acts, why = case
    rogue.answers["box"] = serving(**acts)
    grown.begin(server)
    made = ask(server, rogue, said)
    [listed] = [item for item in made["output"] if item["type"] == "mcp_list_tools"]
    assert listed["tools"] == []
    assert why in listed["error"]
    assert len(listed["error"]) < 2_000
    assert grown.most_kb() < GROWTH_MAX_KB


# -- Calls ------------------------------------------------------------------------------------------------------------------

CALLS: dict[str, tuple[dict[str, Act], str]] = {
    "a gigabyte": ({"call": endless(JSON, b" ")}, "longer than 2097152 bytes"),
    "chunks of one byte": (
        {"call": endless(headed("content-type: application/json", "transfer-encoding: chunked"), b"1\r\n \r\n")},
        "longer than 2097152 bytes",
    ),
    "endless requests": ({"call": endless(EVENTS, PING)}, "did not answer within 5 s"),
    "requests whose answers are not taken": (
        {"call": endless(EVENTS, PING), "answered": lambda _: [None]},
        "did not answer within 5 s",
    ),
}


@needs_proc
@pytest.mark.parametrize("case", CALLS.values(), ids=CALLS)
def test_a_call_is_bounded(server, rogue, said, grown: Grown, case):
    acts, why = case
    rogue.answers["box"] = serving(**acts)
    grown.begin(server)
    made = ask(server, rogue, said, calling("go"), answer("done"))
    [call] = [item for item in made["output"] if item["type"] == "mcp_call"]
    assert why in json.dumps(call["error"])
    assert made["status"] == "completed"
    assert grown.most_kb() < GROWTH_MAX_KB


@needs_proc
@pytest.mark.parametrize(
    "act",
    [
        {"delete": endless(headed(), b"x\n")},
        {"get": endless(headed(MOVED, status="307 Moved"), b"x\n")},
        {"get": endless(headed("content-type: text/event-stream", "content-encoding: gzip"), ZEROS)},
        {"get": endless(EVENTS, b"data: x\n")},
        {"get": endless(EVENTS, PING), "answered": lambda _: [None]},
    ],
    ids=["a goodbye", "a redirect", "a bomb", "an endless event", "requests"],
)
def test_what_comes_beside_the_answers_is_bounded(server, rogue, said, grown: Grown, act):
    rogue.answers["box"] = serving(**act)
    grown.begin(server)
    made = ask(server, rogue, said, calling("go"), answer("done"))
    assert (made["status"], made["output"][-1]["content"][0]["text"]) == ("completed", "done")
    until(lambda: all(visit.closed.is_set() for visit in rogue.asked("box")), timeout_s=30)
    assert grown.most_kb() < GROWTH_MAX_KB


def test_arguments_that_are_too_long_are_not_sent(server, rogue, said):
    rogue.answers["box"] = serving()
    before = len(rogue.asked("box"))
    made = ask(server, rogue, said, calling("go", {"x": "y" * 2**20}), answer("done"))
    [call] = [item for item in made["output"] if item["type"] == "mcp_call"]
    assert "The arguments are longer than 1048576 bytes" in json.dumps(call["error"])
    assert "tools/call" not in [visit.body.get("method") for visit in rogue.asked("box")[before:] if visit.body]


# -- Clients that leave -----------------------------------------------------------------------------------------------------

LEAVE_WITHIN_S = 2.0

WAITS: dict[str, dict[str, Act]] = {
    "greeting": {"initialize": lambda _: [None]},
    "list": {"list": lambda _: [None]},
    "list in its body": {"list": lambda _: [JSON, b"{", None]},
    "call": {"call": lambda _: [None]},
    "call in its body": {"call": lambda _: [EVENTS, PING, None]},
}


@pytest.mark.parametrize("step", WAITS)
async def test_a_tool_server_is_left_when_the_client_leaves(
    server: Served, rogue: Rogue, upstream: Upstream, said, step
):
    word = step.split(" ")[0].replace("greeting", "initialize")

    def reached() -> list[Visit]:
        methods = [(visit, (visit.body or {}).get("method", "")) for visit in rogue.asked("box")[before:]]
        return [visit for visit, method in methods if method.rsplit("/", 1)[-1] == word]

    rogue.answers["box"] = serving(**WAITS[step])
    before = len(rogue.asked("box"))
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        tool = {
            "type": "mcp",
            "server_label": "box",
            "server_url": f"{rogue.base_url}/box",
            "require_approval": "never",
        }
        body = {"model": "m", "input": script([note(said), *calling("go")], answer("no")), "tools": [tool]}
        asked = asyncio.create_task(client.post("/responses", json=body))
        [visit] = await asyncio.to_thread(until, reached)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        left_s = time.monotonic()
    assert await asyncio.to_thread(visit.closed.wait, 5)
    assert visit.closed_s - left_s < LEAVE_WITHIN_S
