"""What an upstream can do wrong, and what becomes of the response.

Before the first event an error is an HTTP status and nothing is stored; after it the response fails, with what was said
until then. Requests are tried again only while nothing was sent to anybody.
"""

import contextlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

import httpx
import pytest
from msgspec import Struct

from tests.api.streams import events_of
from tests.servers import Served
from tests.upstream import (
    Step,
    Upstream,
    answer,
    calling,
    cut,
    delta,
    error,
    finish,
    forever,
    junk,
    no_done,
    note,
    raw,
    reasoning,
    script,
    size,
    stall,
    status,
    text,
)

LIMITS = {
    "REPRISE_UPSTREAM_ANSWER_TIMEOUT_S": "1.5",
    "REPRISE_UPSTREAM_IDLE_TIMEOUT_S": "0.7",
    "REPRISE_UPSTREAM_RETRY_AFTER_MAX_S": "1",
    "REPRISE_UPSTREAM_LINE_BYTES_MAX": "1500000",
    "REPRISE_RUN_OUTPUT_BYTES_MAX": "6000000",
    "REPRISE_RUN_DURATION_MAX_S": "2",
}


def free_port() -> int:
    """A port at which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.fixture(scope="module")
def locked() -> Iterator[Upstream]:
    """An upstream that does not know our key."""
    with Upstream(api_key="another") as running:
        yield running


class Speechless(BaseHTTPRequestHandler):
    """An upstream that says 200, and then that it can't."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        self.wfile.write(b'data: {"error": {"message": "no worker is free"}}\n\n')

    def log_message(self, format: str, *args: object) -> None:
        """Nobody reads it."""


class Mute(Speechless):
    """An upstream that says 200, and nothing more."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        self.rfile.read(1)  # until the client leaves


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The base URL of such an upstream."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}/v1"
        running.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def speechless() -> Iterator[str]:
    with serving(Speechless) as url:
        yield url


@pytest.fixture(scope="module")
def mute() -> Iterator[str]:
    with serving(Mute) as url:
        yield url


@pytest.fixture(scope="module")
def faulty(
    base_env: Mapping[str, str],
    new_database: Callable[[], str],
    upstream: Upstream,
    locked: Upstream,
    speechless: str,
    mute: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    """A server with small limits, and upstreams that are dead, locked, scripted."""
    catalog = tmp_path_factory.mktemp("catalog") / "catalog.toml"
    catalog.write_text(f"""
        default = "scripted"
        upstreams.scripted.base_url = "{upstream.base_url}"
        upstreams.dead.base_url = "http://127.0.0.1:{free_port()}/v1"
        upstreams.locked.base_url = "{locked.base_url}"
        upstreams.speechless.base_url = "{speechless}"
        upstreams.mute.base_url = "{mute}"

        [[models]]
        name = "failover"
        routes = [{{ upstream = "dead" }}, {{ upstream = "locked" }}, {{ upstream = "scripted" }}]

        [[models]]
        name = "late-failover"
        routes = [{{ upstream = "speechless" }}, {{ upstream = "dead" }}, {{ upstream = "scripted" }}]

        [[models]]
        name = "latest-failover"
        routes = [{{ upstream = "mute" }}, {{ upstream = "scripted" }}]
    """)
    env = {**base_env, **LIMITS, "DATABASE_URL": new_database(), "REPRISE_CATALOG": str(catalog)}
    with Served(env) as running:
        yield running


@pytest.fixture
def http(faulty: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=faulty.url, timeout=30) as made:
        yield made


def ask(http, said, asking, *, stream, model="m"):
    body = {"model": model, "input": asking, "stream": stream, "metadata": {"test": said[-500:]}}
    return http.post("/responses", json=body)


def http_error(reply, status):
    """The error of a reply with this status; asserts its form."""
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    error = reply.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert error["message"]
    return error


def text_of(response):
    return "".join(part["text"] for item in response["output"] if item["type"] == "message" for part in item["content"])


# -- Before anything was sent -----------------------------------------------------------------------------------------------


class Refusal(Struct):
    """An upstream that never begins to answer: what it does, what the client gets, how often it was asked."""

    turn: list[Step]
    status: int
    type: str
    code: str | None
    said: str
    requests: int
    headers: dict[str, str | None] = {}


INVALID, FAILED = "invalid_request_error", "server_error"

REFUSALS = {
    "401": Refusal([status(401)], 502, "server_error", "server_error", "does not accept this server's key", 1),
    "403": Refusal([status(403)], 502, "server_error", "server_error", "does not accept this server's key", 1),
    "400": Refusal(
        [
            status(
                400, {"error": {"message": "bad top_k", "type": "invalid_request_error", "param": "top_k", "code": "x"}}
            )
        ],
        400,
        "invalid_request_error",
        "x",
        "bad top_k",
        1,
    ),
    "404": Refusal([status(404)], 404, "invalid_request_error", None, "scripted 404", 1),
    "422 as FastAPI says it": Refusal(
        [status(422, {"detail": "field required"})], 422, "invalid_request_error", None, "field required", 1
    ),
    "429 with a long Retry-After": Refusal(
        [status(429, headers={"retry-after": "7"})],
        429,
        "requests",
        "rate_limit_exceeded",
        "scripted 429",
        1,
        {"retry-after": "7"},
    ),
    "429 with a Retry-After that never ends": Refusal(
        [status(429, headers={"retry-after": "1"})],
        429,
        "requests",
        "rate_limit_exceeded",
        "scripted 429",
        3,
        {"retry-after": "1"},
    ),
    **{
        f"429 with the Retry-After {after!r}": Refusal(
            [status(429, headers={"retry-after": after})],
            429,
            "requests",
            "rate_limit_exceeded",
            "scripted 429",
            3,
            {"retry-after": None},
        )
        for after in ("²", "\xe2\x80\x93", "-1", "1e400", "9" * 50, "ÿ" * 20, "Mon, 99 Foo 2026")
    },
    "429 with a time as its Retry-After": Refusal(
        [status(429, headers={"retry-after": "Thu, 01 Jan 2015 00:00:00 GMT"})],
        429,
        "requests",
        "rate_limit_exceeded",
        "scripted 429",
        3,
        {"retry-after": "0"},
    ),
    "429 without Retry-After": Refusal([status(429)], 429, "requests", "rate_limit_exceeded", "scripted 429", 3),
    "500": Refusal([status(500)], 502, "server_error", "server_error", "failed with status 500: scripted 500", 3),
    "503 with a page": Refusal(
        [status(503, "<html>")], 502, "server_error", "server_error", "failed with status 503: <html>", 3
    ),
    "cut before anything": Refusal([cut()], 502, "server_error", "server_error", "can't be reached", 3),
    "reset before anything": Refusal([cut(reset=True)], 502, "server_error", "server_error", "can't be reached", 3),
    "stall before anything": Refusal([stall()], 504, "server_error", "server_error", "did not answer in time", 1),
    "501": Refusal(
        [status(501, {"error": {"message": "no tools", "type": "not_supported_error", "code": 501}})],
        400,
        INVALID,
        None,
        "no tools",
        1,
    ),
    "an image that the model can't read": Refusal(
        [status(500, {"error": {"message": "image input is not supported - hint: mmproj", "code": 500}})],
        400,
        INVALID,
        None,
        "image input is not supported",
        1,
    ),
    # Behind the head, and before the model has said anything.
    "silence after the head": Refusal([raw(""), stall()], 504, FAILED, FAILED, "did not answer in time", 1),
    "comments for ever": Refusal(
        [forever(raw(": hi\n\n"), every_ms=100)], 504, FAILED, FAILED, "did not answer in time", 1
    ),
    "nothing at all": Refusal([raw(""), no_done()], 502, FAILED, FAILED, "broke off its answer", 3),
    "a page instead of a stream": Refusal(
        [status(200, "<html>hello</html>")], 502, FAILED, FAILED, "neither a stream nor", 1
    ),
    "an error at once": Refusal([error("boom", code=500)], 502, FAILED, FAILED, "The upstream failed: boom", 3),
    "an error of another form": Refusal(
        [raw('data: {"error": "out of memory"}\n\n')], 502, FAILED, FAILED, "out of memory", 3
    ),
    "a refusal in the stream": Refusal(
        [error("bad top_k", "BadRequestError", 400)], 400, INVALID, None, "bad top_k", 1
    ),
    "a refusal behind the role": Refusal(
        [delta(role="assistant", content=""), error("no", "invalid_request_error", "422")], 422, INVALID, None, "no", 1
    ),
    "a refusal with 200": Refusal(
        [status(200, {"error": {"message": "bad", "type": "None", "param": "None", "code": "400"}})],
        400,
        INVALID,
        None,
        "bad",
        1,
    ),
    "a bare refusal in the stream": Refusal(
        [raw('data: {"object":"error","message":"bad","type":"BadRequestError","code":400}\n\n')],
        400,
        INVALID,
        None,
        "bad",
        1,
    ),
    "an unknown model in the stream": Refusal(
        [error("The model `x` does not exist.", "NotFoundError", 404)],
        404,
        INVALID,
        "model_not_found",
        "does not exist",
        1,
    ),
    "an overflow in the stream": Refusal(
        [error("This model's maximum context length is 8 tokens.", "BadRequestError", "400")],
        400,
        INVALID,
        "context_length_exceeded",
        "maximum context length",
        1,
    ),
    "an overflow in older llama.cpp's field": Refusal(
        [raw('error: {"code":400,"message":"too much","type":"exceed_context_size_error"}\n\n')],
        400,
        INVALID,
        "context_length_exceeded",
        "too much",
        1,
    ),
    "too many requests in the stream": Refusal(
        [error("slow down", code=429)], 429, "requests", "rate_limit_exceeded", "slow down", 3
    ),
    "no credit": Refusal(
        [error("no credit", code="insufficient_quota")], 429, "requests", "insufficient_quota", "no credit", 1
    ),
    "a key that is refused in the stream": Refusal(
        [error("bad key", code=401)], 502, FAILED, FAILED, "does not accept this server's key", 1
    ),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("case", REFUSALS.values(), ids=REFUSALS)
def test_an_upstream_that_never_begins_is_an_http_status(http, faulty, upstream, said, stored, case, stream):
    asking = script([note(said), *case.turn])
    reply = ask(http, said, asking, stream=stream)
    error = http_error(reply, case.status)
    assert (error["type"], error["code"]) == (case.type, case.code)
    assert case.said in error["message"]
    assert {name: reply.headers.get(name) for name in case.headers} == case.headers
    # What is cut off on a kept connection goes out once more on a new one.
    assert case.requests <= len(upstream.asked(asking)) <= case.requests * (2 if "cut" in case.turn[0] else 1)
    assert stored(faulty) == []


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    "turn",
    [
        [status(429, headers={"retry-after": "1"}, times=1)],
        [status(429, headers={"retry-after": "0"}, times=1)],
        [status(429, times=1)],
        [status(500, times=1)],
        [status(503, "<html>", times=2)],
    ],
    ids=["429 with a short Retry-After", "429 with none to wait", "429", "500", "503 twice"],
)
def test_an_upstream_that_recovers_in_time_is_not_noticed(http, faulty, upstream, said, stored, turn, stream):
    asking = script([note(said), *turn, *answer("At last")])
    reply = ask(http, said, asking, stream=stream)
    made = events_of(reply)[-1]["response"] if stream else reply.json()
    assert (made["status"], text_of(made)) == ("completed", "At last")
    assert len(upstream.asked(asking)) == 1 + turn[0]["times"]
    assert stored(faulty) == [made]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_an_upstream_that_is_not_there_is_an_http_status(http, faulty, said, stored, stream):
    error = http_error(ask(http, said, "hi", stream=stream, model="dead@m"), 502)
    assert (error["type"], error["code"]) == ("server_error", "server_error")
    assert error["message"] == "Upstream 'dead' can't be reached."
    assert stored(faulty) == []


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_key_that_the_upstream_does_not_know_is_no_secret_told(http, said, locked, stream):
    before = len(locked.requests)
    error = http_error(ask(http, said, "hi", stream=stream, model="locked@m"), 502)
    assert error["message"] == "Upstream 'locked' does not accept this server's key."
    assert len(locked.requests) == before + 1


@pytest.mark.parametrize("model", ["failover", "late-failover", "latest-failover"])
def test_the_next_route_is_taken_before_anything_is_said(http, upstream, said, model):
    reply = ask(http, said, said, stream=False, model=model)
    assert text_of(reply.json()) == f"ok: {said}"
    assert len(upstream.asked(said)) == 1


# -- After the first event --------------------------------------------------------------------------------------------------


class Failure(Struct):
    """An upstream that breaks down while it answers; `kept` is the text that must be kept."""

    turn: list[Step]
    kept: str
    status: int = 502
    code: str = "server_error"
    type: str = "server_error"
    said: str = ""


FAILURES = {
    "silence": Failure([text("half"), text(" said"), stall()], "half said", 504, said="silent for 0.7 seconds"),
    "comments in the place of tokens": Failure(
        [text("half"), forever(raw(": hi\n\n"), every_ms=100)], "half", 504, said="silent for 0.7 seconds"
    ),
    "chunks without a choice in the place of tokens": Failure(
        [text("half"), forever(raw('data: {"choices": []}\n\n'), every_ms=100)], "half", 504, said="silent for 0.7"
    ),
    "silence inside a line": Failure(
        [text("half"), raw('data: {"choices"'), stall()], "half", 504, said="silent for 0.7 seconds"
    ),
    "cut": Failure([text("half"), text(" said"), stall(0.2), cut()], "half said", said="broke off its answer"),
    "reset": Failure([text("half"), stall(0.2), cut(reset=True)], "half", said="broke off its answer"),
    "cut inside a line": Failure(
        [text("half"), raw('data: {"choices"'), stall(0.2), cut()], "half", said="broke off its answer"
    ),
    "no end": Failure([text("half"), no_done()], "half", said="broke off its answer"),
    "junk in the end's place": Failure([text("half"), junk(5000), no_done()], "half", said="broke off its answer"),
    "no JSON": Failure([text("half"), raw("data: {nonsense\n\n"), text("never"), finish()], "half", said="is no chunk"),
    "JSON of another form": Failure([text("half"), raw('data: {"choices": 7}\n\n'), finish()], "half", said="no chunk"),
    "no UTF-8": Failure([text("half"), raw("data: "), junk(100), raw("\n\n"), finish()], "half", said="is no chunk"),
    "a line over the limit": Failure([text("half"), size(2_000_000), finish()], "half", said="more than 1500000 bytes"),
    "a line that never ends": Failure(
        [text("half"), raw("data: "), forever(junk(100_000), every_ms=0)], "half", said="more than 1500000 bytes"
    ),
    "an error": Failure([text("half"), error("boom")], "half", said="The upstream failed: boom"),
    "an error with a code": Failure([text("half"), error("boom", code="engine_died")], "half", code="engine_died"),
    "an error about a rate": Failure(
        [text("half"), error("slow down", code=429)], "half", 429, "rate_limit_exceeded", "requests", "slow down"
    ),
    "a refusal": Failure(
        [text("half"), error("no", "BadRequestError", 400)], "half", 400, "invalid_prompt", INVALID, "no"
    ),
    "an overflow": Failure(
        [text("half"), error("exceeds the available context size", code=400)],
        "half",
        400,
        "context_length_exceeded",
        INVALID,
        "available context",
    ),
    "an error with its finish": Failure(
        [text("half"), finish("error"), error("the provider broke down", code=502)],
        "half",
        said="the provider broke down",
    ),
    "output without end": Failure(
        [text("half"), forever(size(1_000_000), every_ms=0)],
        "half",
        500,
        said="more output than REPRISE_RUN_OUTPUT_BYTES_MAX",
    ),
    "talk without end": Failure(
        [text("half"), forever(text(" and"), every_ms=50)], "half and and", 500, said="REPRISE_RUN_DURATION_MAX_S"
    ),
}


@pytest.mark.parametrize("case", FAILURES.values(), ids=FAILURES)
def test_a_stream_that_breaks_down_fails_with_what_was_said(http, faulty, upstream, said, stored, case):
    asking = script([note(said), *case.turn])
    events = events_of(ask(http, said, asking, stream=True))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    last = events[-1]
    assert last["type"] == "response.failed"
    made = last["response"]
    assert made["status"] == "failed"
    assert made["error"].keys() == {"code", "message"}
    assert made["error"]["code"] == case.code
    assert case.said in made["error"]["message"]
    assert (made["completed_at"], made["incomplete_details"]) == (None, None)
    assert text_of(made).startswith(case.kept)
    heard = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert text_of(made) == heard
    assert [item["status"] for item in made["output"]] == ["incomplete"] * bool(case.kept)
    assert len(upstream.asked(asking)) == 1
    assert stored(faulty) == [made]
    assert http.get(f"/responses/{made['id']}").json() == made


@pytest.mark.parametrize("case", FAILURES.values(), ids=FAILURES)
def test_a_whole_reply_that_breaks_down_is_an_http_status_and_a_failed_response(
    http, faulty, upstream, said, stored, case
):
    asking = script([note(said), *case.turn])
    error = http_error(ask(http, said, asking, stream=False), case.status)
    assert (error["type"], error["code"]) in {(case.type, case.code), (case.type, None)}
    assert case.said in error["message"]
    assert len(upstream.asked(asking)) == 1
    [made] = stored(faulty)
    assert (made["status"], made["error"]["code"]) == ("failed", case.code)
    assert made["error"]["message"] == error["message"]
    assert text_of(made).startswith(case.kept)


def test_a_call_and_reasoning_that_broke_off_are_kept_as_incomplete(http, faulty, said, stored):
    steps = [reasoning("hm"), text("I look"), *calling("look", '{"wh')[:1], stall()]
    tool = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {}}}
    body = {"model": "m", "input": script([note(said), *steps]), "tools": [tool], "metadata": {"test": said[-500:]}}
    http_error(http.post("/responses", json=body), 504)
    [made] = stored(faulty)
    assert [(item["type"], item.get("status")) for item in made["output"]] == [
        ("reasoning", "completed"),
        ("message", "completed"),
        ("function_call", "incomplete"),
    ]
    assert made["output"][2]["arguments"] == '{"wh'


def test_an_upstream_that_is_stopped_is_asked_no_more(http, faulty, upstream, said):
    asking = script([note(said), forever(size(100_000), every_ms=0)])
    http_error(ask(http, said, asking, stream=False), 500)
    [record] = upstream.asked(asking)
    assert record.closed.wait(5)
    assert record.peer_left


def test_a_fault_of_a_response_that_is_not_stored_leaves_nothing(http, faulty, said, stored):
    body = {"model": "m", "input": script([text("half"), stall()]), "store": False, "metadata": {"test": said[-500:]}}
    http_error(http.post("/responses", json=body), 504)
    last = events_of(http.post("/responses", json={**body, "stream": True}))[-1]
    assert (last["type"], text_of(last["response"])) == ("response.failed", "half")
    assert http.get(f"/responses/{last['response']['id']}").status_code == 404
    assert stored(faulty) == []


# -- No faults --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("turn", "whole"),
    [
        ([size(1_000_000), finish()], "x" * 1_000_000),
        ([text("a"), junk(100), raw("\n\n"), text("b"), finish()], "ab"),
        ([text("a"), stall(0.3), text("b"), stall(0.3), text("c"), finish()], "abc"),
        ([text("a"), finish(), no_done()], "a"),
        ([text("a")], "a"),
        ([raw(": comment\n\nevent: x\nid: 7\nretry: 1\n\n"), text("a"), finish()], "a"),
        ([raw("\ufeff"), text("a"), finish()], "a"),
        ([text("a"), finish(), stall(0.2), cut()], "a"),
        ([text("a"), finish(), stall(0.2), cut(reset=True)], "a"),
        ([text("a"), finish(), stall()], "a"),
        ([text("a"), raw("data: [DONE]\n\n"), stall()], "a"),
        ([text("a"), finish(), raw("data: {nonsense\n\n"), error("boom", code=400)], "a"),
        ([text("a"), finish(), size(2_000_000)], "a"),
        ([text("a"), finish(), forever(raw(": hi\n\n"), every_ms=100)], "a"),
    ],
    ids=[
        "1 MB in a chunk",
        "junk between",
        "pauses",
        "no [DONE]",
        "no finish",
        "other SSE fields",
        "a byte order mark",
        "cut after the end",
        "reset after the end",
        "silence after the finish",
        "silence after [DONE]",
        "nonsense and an error after the finish",
        "a line over the limit after the finish",
        "comments for ever after the finish",
    ],
)
def test_what_is_odd_and_no_fault(http, faulty, upstream, said, stored, turn, whole, stream):
    asking = script([note(said), *turn])
    reply = ask(http, said, asking, stream=stream)
    made = events_of(reply)[-1]["response"] if stream else reply.json()
    assert made["status"] == "completed"
    assert text_of(made) == whole
    assert len(upstream.asked(asking)) == 1
    assert stored(faulty) == [made]


def test_a_slow_start_shows_after_the_head_when_the_head_does_not_wait(new_server, upstream, said):
    served = new_server(REPRISE_STREAM_HEAD_WAIT_S="0.1", REPRISE_UPSTREAM_ANSWER_TIMEOUT_S="0.6")
    with httpx.Client(base_url=served.url, timeout=30) as http:
        late = script([note(said), stall()])
        events = events_of(ask(http, said, late, stream=True))
        assert [event["type"] for event in events] == ["response.created", "response.in_progress", "response.failed"]
        assert events[-1]["response"]["error"] == {
            "code": "server_error",
            "message": "The upstream did not answer in time.",
        }
        refused = script([note(said), stall(0.3), status(422, {"detail": "no"})])
        events = events_of(ask(http, said, refused, stream=True))
        assert events[-1]["type"] == "response.failed"
        assert events[-1]["response"]["error"] == {"code": "invalid_prompt", "message": "no"}
        assert http.get(f"/responses/{events[-1]['response']['id']}").json() == events[-1]["response"]


class Forgetful:
    """An upstream that keeps its connections, as it says, and closes each when the next request comes on it."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.base_url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/v1"
        self.asked = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._answer, args=self._listener.accept()[:1], daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        message = {"role": "assistant", "content": "Hello."}
        body = json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}).encode()
        with connection:
            self._read(connection)
            self.asked += 1
            head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            connection.recv(1)

    def _read(self, connection: socket.socket) -> None:
        received = b""
        while b"\r\n\r\n" not in received:
            received += connection.recv(65536)
        head, _, body = received.partition(b"\r\n\r\n")
        [length] = re.findall(rb"content-length: (\d+)", head.lower())
        while len(body) < int(length):
            body += connection.recv(65536)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()


def test_a_kept_connection_that_was_closed_is_no_failed_attempt(new_server, catalog_file):
    with Forgetful() as forgetful:
        catalog = f"""
            default = "forgetful"
            upstreams.forgetful.base_url = "{forgetful.base_url}"
            upstreams.forgetful.dialect = {{}}
            upstreams.forgetful.attempts_max = 1
        """
        served = new_server(REPRISE_CATALOG=catalog_file(catalog))
        with served.client() as client, ThreadPoolExecutor(4) as pool:
            made = list(pool.map(lambda _: client.responses.create(model="m", input="hi").output_text, range(24)))
        assert made == ["Hello."] * 24
        assert forgetful.asked == 24
