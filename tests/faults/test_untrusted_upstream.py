"""An upstream is not trusted: it is followed nowhere, what it sends is bounded, and none of it is quoted in the log."""

import asyncio
import gzip
import itertools
import json
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import httpx
import pytest
from msgspec import Struct

from tests.api.streams import events_of
from tests.faults.memory import GROWTH_MAX_KB, needs_proc
from tests.rogue import EVENTS, JSON, PIECE, ZEROS, Answer, Rogue, headed
from tests.servers import Served
from tests.upstream import Upstream
from tests.waiting import until

MARK = "quoted-by-nobody"
"""Stands in what must not be logged."""

GIGABYTE = 2**30

RUN_BYTES_MAX = 8 * 2**20

LIMITS = {"REPRISE_RUN_OUTPUT_BYTES_MAX": str(RUN_BYTES_MAX), "REPRISE_UPSTREAM_LINE_BYTES_MAX": str(4 * 2**20)}


@pytest.fixture(scope="module")
def rogue() -> Iterator[Rogue]:
    with Rogue() as running:
        yield running


@pytest.fixture(scope="module")
def served(
    base_env: Mapping[str, str],
    new_database: Callable[[], str],
    upstream: Upstream,
    rogue: Rogue,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    """A server before such an upstream, and before one that tells who is sent there."""
    catalog = tmp_path_factory.mktemp("catalog") / "catalog.toml"
    catalog.write_text(f"""
        default = "rogue"
        upstreams.rogue.base_url = "{rogue.base_url}"
        upstreams.rogue.key = "key-of-rogue"
        upstreams.rogue.dialect = {{}}
        upstreams.good.base_url = "{upstream.base_url}"

        [[models]]
        name = "failover"
        routes = [{{ upstream = "rogue" }}, {{ upstream = "good" }}]
    """)
    env = {**base_env, **LIMITS, "DATABASE_URL": new_database(), "REPRISE_CATALOG": str(catalog)}
    with Served(env) as running:
        yield running


@pytest.fixture
def http(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=120) as made:
        yield made


def ask(http: httpx.Client, model: str, *, stream: bool = False, **more: object) -> httpx.Response:
    return http.post("/responses", json={"model": model, "input": "hi", "stream": stream, **more})


def failed(reply: httpx.Response) -> tuple[int, dict[str, object]]:
    """Status and error of a reply that failed, before its head or after it; asserts the shapes."""
    if reply.headers["content-type"].startswith("text/event-stream"):
        last = events_of(reply)[-1]
        assert last["type"] == "response.failed"
        return 502, last["response"]["error"]
    error = reply.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    return reply.status_code, error


def line(value: object) -> bytes:
    return b"data: %b\n\n" % json.dumps(value).encode()


def said(text: str) -> bytes:
    return line({"choices": [{"delta": {"content": text}}]})


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


# -- Not understood: 502 ----------------------------------------------------------------------------------------------------


class Garbled(Struct):
    """Bytes that are no answer, and what the client hears of them."""

    bytes: bytes
    why: str


UNREADABLE_HEAD = "sent an answer whose head can't be read"
NO_CHUNK = "sent what is no chunk"
NO_ANSWER = "neither a stream nor a chat completion"
COMPRESSED = "compressed"
DEEP = nested(100_000)

GARBLED = {
    "a header that is too long": Garbled(headed(f"x-long: {MARK * 10_000}"), UNREADABLE_HEAD),
    "a name that is too long": Garbled(headed(f"{MARK * 10_000}: x"), UNREADABLE_HEAD),
    "too many headers": Garbled(headed(*(f"x-{n}: {MARK}" for n in range(10_000))), UNREADABLE_HEAD),
    "a reason that is too long": Garbled(headed(status=f"200 {MARK * 10_000}"), UNREADABLE_HEAD),
    "a reason that is no UTF-8": Garbled(headed(status=f"200 {MARK}\xff\xfe"), UNREADABLE_HEAD),
    "no HTTP at all": Garbled(f"SSH-2.0-{MARK}\r\n\r\n".encode(), UNREADABLE_HEAD),
    "a header without a name": Garbled(headed(f": {MARK}"), UNREADABLE_HEAD),
    "a length that is none": Garbled(headed(f"content-length: {MARK}"), UNREADABLE_HEAD),
    "a deep chunk": Garbled(EVENTS + b'data: {"x": ' + DEEP + b"}\n\n", NO_CHUNK),
    "a deep error": Garbled(EVENTS + b'data: {"error": ' + nested(900) + b"}\n\n", "The upstream failed"),
    "a deep completion": Garbled(JSON + b'{"choices": ' + DEEP + b"}", NO_ANSWER),
    "a chunk that is no UTF-8": Garbled(
        EVENTS + b'data: {"choices": [{"delta": {"content": "' + MARK.encode() + b'\xff"}}]}\n\n', NO_CHUNK
    ),
    "an error that is no UTF-8": Garbled(
        EVENTS + b'data: {"error": {"message": "' + MARK.encode() + b'\xff"}}\n\n', "The upstream failed"
    ),
    "an error with an odd code": Garbled(EVENTS + line({"error": {"code": "²"}}), "The upstream failed"),
    "a completion that is no UTF-8": Garbled(
        JSON + b'{"choices": [{"message": {"content": "' + MARK.encode() + b'\xff"}}]}', NO_ANSWER
    ),
    "no JSON": Garbled(JSON + MARK.encode(), NO_ANSWER),
    "a long completion": Garbled(JSON + b'{"x": "' + MARK.encode() * 2**19 + b'"}', "more than 4194304 bytes"),
    "a chunk's size that is none": Garbled(
        headed("content-type: text/event-stream", "transfer-encoding: chunked") + f"{MARK}\r\n".encode(),
        UNREADABLE_HEAD,
    ),
    "a number beyond all bounds": Garbled(
        EVENTS + b'data: {"usage": {"prompt_tokens": ' + b"9" * 9_000 + b"}}\n\n", NO_CHUNK
    ),
    "a packed stream": Garbled(
        headed("content-type: text/event-stream", "content-encoding: gzip") + gzip.compress(said(MARK)), COMPRESSED
    ),
    "a packed completion": Garbled(
        headed("content-type: application/json", "content-encoding: br") + MARK.encode(), COMPRESSED
    ),
    "a deep error body": Garbled(headed(status="500 No") + DEEP, "failed with status 500"),
    "an error body that is no UTF-8": Garbled(headed(status="500 No") + b'{"error": "\xff"}', "failed with status 500"),
    "a packed error body": Garbled(
        headed("content-encoding: gzip", status="500 No") + gzip.compress(MARK.encode()), "it gave no reason"
    ),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("case", GARBLED.values(), ids=GARBLED)
def test_what_is_no_answer_is_a_502_and_not_logged(http, served, rogue, case, stream):
    rogue.answers["garbled"] = lambda _: [case.bytes]
    begun = len(served.printed)
    status, error = failed(ask(http, "garbled", stream=stream))
    assert status == 502
    assert case.why in error["message"]
    printed = "".join(served.printed[begun:])
    assert MARK not in printed
    assert "Traceback" not in printed


def test_the_next_route_is_taken_from_a_head_that_cant_be_read(http, rogue):
    rogue.answers["failover"] = lambda _: [GARBLED["too many headers"].bytes]
    assert ask(http, "failover").json()["status"] == "completed"


def test_words_of_an_error_are_cut(http, rogue):
    long = {"error": {"message": "m" * 50_000, "type": "t" * 5_000, "param": "p" * 5_000, "code": "c" * 5_000}}
    rogue.answers["wordy"] = lambda _: [headed(status="400 No") + json.dumps(long).encode()]
    reply = ask(http, "wordy")
    assert (reply.status_code, len(reply.content) < 5_000) == (400, True)
    assert reply.json()["error"]["message"] == "m" * 1000
    rogue.answers["wordy"] = lambda _: [EVENTS + line(long)]
    assert len(ask(http, "wordy").content) < 5_000


# -- Redirects, cookies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(http, rogue, upstream, status, stream):
    before = len(upstream.requests)
    elsewhere = f"location: {upstream.base_url}/chat/completions"
    rogue.answers["moved"] = lambda _: [headed(elsewhere, "content-length: 0", status=f"{status} Moved")]
    code, error = failed(ask(http, "moved", stream=stream))
    assert (code, error["code"]) == (502, "server_error")
    assert f"status {status}" in error["message"]
    assert len(upstream.requests) == before
    rogue.answers["round"] = lambda _: [
        headed("location: /v1/chat/completions", "content-length: 0", status=f"{status} Moved")
    ]
    asked = len(rogue.asked("round"))
    assert failed(ask(http, "round", stream=stream))[0] == 502
    assert len(rogue.asked("round")) == asked + 1


def test_cookies_are_not_kept(http, rogue):
    rogue.answers["baker"] = lambda _: [headed("set-cookie: who=me; Path=/", "content-type: application/json") + b"{}"]
    for _ in range(2):
        ask(http, "baker")
    assert len(rogue.asked("baker")) == 2
    assert not any("cookie" in visit.head.lower() for visit in rogue.asked("baker"))


# -- Bounded ----------------------------------------------------------------------------------------------------------------


def endless(first: bytes, part: bytes) -> Answer:
    piece = part * (PIECE // len(part) + 1)
    return lambda _: itertools.chain([first], itertools.repeat(piece))


def gigabyte(first: bytes, part: bytes) -> Answer:
    return lambda _: itertools.chain([first], itertools.repeat(part * (PIECE // len(part)), GIGABYTE // PIECE))


RUN = "REPRISE_RUN_OUTPUT_BYTES_MAX"
LONG_LINE = "a line of more than 4194304 bytes"
LONG_ANSWER = "an answer of more than 4194304 bytes"

FLOODS = {
    "an error body of a gigabyte": (gigabyte(headed(status="400 No"), b"x"), "xxx"),
    "a failure's body of a gigabyte": (gigabyte(headed(status="500 No"), b"x"), "failed with status 500"),
    "a redirect's body of a gigabyte": (gigabyte(headed("location: /x", status="307 No"), b"x"), "status 307"),
    "an endless line": (endless(EVENTS, b"data: x"), LONG_LINE),
    "an endless line of one chunk": (endless(EVENTS + b'data: {"choices": [', b"{},"), LONG_LINE),
    "an endless completion": (endless(JSON + b'{"choices": [', b" "), LONG_ANSWER),
    "a bomb as a stream": (
        endless(headed("content-type: text/event-stream", "content-encoding: gzip"), ZEROS),
        COMPRESSED,
    ),
    "a bomb as a completion": (endless(headed("content-type: text/json", "content-encoding: gzip"), ZEROS), COMPRESSED),
    "a bomb as an error": (endless(headed("content-encoding: gzip", status="400 No"), ZEROS), "with status 400"),
    "endless white space": (endless(EVENTS, said("\n  ")), RUN),
    "endless comments": (endless(EVENTS, b": hi\n\n"), RUN),
    "endless blank lines": (endless(EVENTS, b"\n"), RUN),
    "endless empty chunks": (endless(EVENTS, b"data: {}\n\n"), RUN),
    "endless empty data": (endless(EVENTS, b"data:\n\n"), RUN),
    "endless unread fields": (endless(EVENTS, line({"x": "y" * 1000})), RUN),
    "endless usage": (endless(EVENTS, line({"usage": {"prompt_tokens": 1}})), RUN),
    "endless calls of nothing": (endless(EVENTS, line({"choices": [{"delta": {"tool_calls": [{"index": 0}]}}]})), RUN),
    "an endless name": (
        endless(EVENTS, line({"choices": [{"delta": {"tool_calls": [{"function": {"name": "abc" * 100}}]}}]})),
        RUN,
    ),
    "an endless tag": (endless(EVENTS + said("<think>"), said("</thin")), RUN),
    "endless headers": (endless(b"HTTP/1.1 200 OK\r\n", b"x-more: and more\r\n"), UNREADABLE_HEAD),
    "an endless header": (endless(b"HTTP/1.1 200 OK\r\nx-long: ", b"x"), UNREADABLE_HEAD),
}


@needs_proc
@pytest.mark.parametrize("case", FLOODS.values(), ids=FLOODS)
def test_a_flood_is_bounded(http, served, rogue, grown, case):
    flood, why = case
    grown.begin(served)
    rogue.answers["flood"] = flood
    status, error = failed(ask(http, "flood", store=False))
    assert why in error["message"]
    assert status in {400, 500, 502}
    assert grown.most_kb() < GROWTH_MAX_KB
    for visit in rogue.asked("flood"):
        assert visit.closed.wait(5)
        assert visit.sent_bytes < 4 * RUN_BYTES_MAX


@needs_proc
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_turn_makes_a_limited_number_of_calls(http, served, rogue, grown, stream):
    grown.begin(served)
    calls = [{"index": index, "function": {"name": "f"}} for index in range(50_000)]
    body = (
        EVENTS
        + line({"choices": [{"delta": {"content": "half"}}]})
        + line({"choices": [{"delta": {"tool_calls": calls}}]})
    )
    rogue.answers["caller"] = lambda _: [body, None]
    tool = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}
    status, error = failed(ask(http, "caller", stream=stream, tools=[tool]))
    assert status == 502
    assert "more than 1000 calls" in error["message"]
    assert grown.most_kb() < GROWTH_MAX_KB
    assert rogue.asked("caller")[-1].closed.wait(5)


def test_what_is_odd_about_calls_is_no_fault(http, rogue):
    calls = [
        {"index": 10**30, "id": "a" * 1_000_000, "function": {"name": "g" * 1_000_000, "arguments": "{}"}},
        {"index": -7, "id": "b", "function": {"name": "f", "arguments": '{"a": ' + nested(5_000).decode() + "}"}},
    ]
    rogue.answers["odd"] = lambda visit: (
        [EVENTS + line({"choices": [{"delta": {"tool_calls": calls}}, {"delta": "no chunk"}]}) + b"data: [DONE]\n\n"]
        if len(visit.body["messages"]) == 1
        else [EVENTS + said("done") + b"data: [DONE]\n\n"]
    )
    tool = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}
    reply = ask(http, "odd", tools=[tool])
    made = reply.json()
    assert (reply.status_code, made["status"]) == (200, "completed")
    assert [item["name"] for item in made["output"]] == ["f"]
    assert len(reply.content) < 50_000


# -- Models -----------------------------------------------------------------------------------------------------------------

LISTS = {
    "a redirect": [headed("location: /elsewhere", "content-length: 0", status="307 Moved")],
    "a deep list": [JSON + b'{"data": ' + DEEP + b"}"],
    "no UTF-8": [JSON + b'{"data": [{"id": "\xff"}]}'],
    "a bomb": [headed("content-encoding: gzip") + ZEROS],
    "a gigabyte": [JSON, *[b" " * PIECE] * (GIGABYTE // PIECE)],
}


@pytest.mark.parametrize("parts", LISTS.values(), ids=LISTS)
def test_a_list_of_models_that_is_none_lists_nothing(http, served, rogue, grown, parts):
    grown.begin(served)
    rogue.answers["models"] = lambda _: parts
    listed = http.get("/models")
    assert listed.status_code == 200
    assert not any(model["id"].startswith("rogue@") for model in listed.json()["data"])
    assert grown.most_kb() < GROWTH_MAX_KB


# -- Clients that leave -----------------------------------------------------------------------------------------------------

LEAVE_WITHIN_S = 2.0

ESTABLISHED = "01"
"""In /proc/net/tcp."""

WAITS: dict[str, Answer] = {
    "before the head": lambda _: [None],
    "in the head": lambda _: [b"HTTP/1.1 200 OK\r\n", None],
    "in a completion": lambda _: [JSON, b'{"choices": [', None],
    "in an error": lambda _: [headed(status="400 No"), b"x", None],
    "in a failure": lambda _: [headed(status="503 No"), b"x", None],
    "in a stream's first line": lambda _: [EVENTS, b"data: ", None],
    "in comments": lambda _: itertools.chain([EVENTS], itertools.repeat(b": hi\n\n")),
}


async def leave(
    served: Served, model: str, until_s: Callable[[], object], *, stream: bool, asking: str = "hi"
) -> float:
    """Ask, wait for something, and leave; gives when that was."""
    async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
        body = {"model": model, "input": asking, "stream": stream}
        asked = asyncio.create_task(client.post("/responses", json=body))
        await asyncio.to_thread(until, until_s)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        return time.monotonic()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("answer", WAITS.values(), ids=WAITS)
async def test_reading_stops_when_the_client_leaves(served, rogue, answer, stream):
    rogue.answers["waits"] = answer
    before = len(rogue.asked("waits"))
    left_s = await leave(served, "waits", lambda: len(rogue.asked("waits")) > before, stream=stream)
    [visit] = rogue.asked("waits")[before:]
    assert await asyncio.to_thread(visit.closed.wait, 5)
    assert visit.closed_s - left_s < LEAVE_WITHIN_S


@pytest.mark.parametrize("path", ["/models", "/models/some"])
async def test_models_are_listed_no_longer_than_the_client_waits(served, rogue, path):
    rogue.answers["models"] = lambda _: [JSON, b"{", None]
    before = len(rogue.asked("models"))
    async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
        asked = asyncio.create_task(client.get(path))
        await asyncio.to_thread(until, lambda: len(rogue.asked("models")) > before)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        left_s = time.monotonic()
    [visit] = rogue.asked("models")[before:]
    assert await asyncio.to_thread(visit.closed.wait, 5)
    assert visit.closed_s - left_s < LEAVE_WITHIN_S


async def test_a_client_that_leaves_is_not_asked_for_again(served, rogue):
    refused = threading.Event()

    def busy(_: object) -> Iterator[bytes]:
        yield headed("retry-after: 2", "content-length: 0", status="503 Busy")
        refused.set()

    rogue.answers["backoff"] = busy
    left_s = await leave(served, "backoff", refused.is_set, stream=False)
    await asyncio.to_thread(
        time.sleep, max(0.0, left_s + 3 - time.monotonic())
    )  # that nothing comes can only be waited for
    assert len(rogue.asked("backoff")) == 1


@needs_proc
async def test_a_request_that_an_upstream_does_not_read_is_dropped(new_server):
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        served = await asyncio.to_thread(new_server, OPENAI_BASE_URL=f"http://127.0.0.1:{deaf.getsockname()[1]}/v1")
        taken: list[socket.socket] = []

        def begun() -> bool:
            if not taken and select.select([deaf], [], [], 0)[0]:
                taken.append(deaf.accept()[0])
            return bool(taken and select.select(taken, [], [], 0)[0])

        await leave(served, "m", begun, stream=False, asking="x" * 8_000_000)
        with taken[0] as connection:
            await asyncio.to_thread(until, lambda: not _is_open(connection.getpeername()[1]), 5)


def _is_open(port: int) -> bool:
    """Whether the end of a connection that has this port is not closed by its process."""
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()]
    return any(row[1].endswith(f":{port:04X}") and row[3] == ESTABLISHED for row in rows)
