"""The scripted upstream does what its scripts say: a liar here would make every other test lie."""

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest

from tests.upstream import (
    Step,
    Upstream,
    answer,
    call,
    calling,
    chunk,
    coalesce,
    cut,
    delta,
    error,
    finish,
    forever,
    gate,
    junk,
    no_done,
    no_usage,
    note,
    raw,
    reasoning,
    repeat,
    script,
    size,
    split,
    stall,
    status,
    text,
    usage,
    usage_in_finish,
)


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    """One upstream for this module; every test has scripts and gates of its own."""
    with Upstream() as server:
        yield server


@pytest.fixture
def client(upstream: Upstream) -> Iterator[httpx.Client]:
    """A plain HTTP client at the upstream."""
    with httpx.Client(base_url=upstream.base_url, timeout=10) as http:
        yield http


def asking(content: object, **options: Any) -> dict[str, Any]:
    """A streaming chat request with one user message."""
    return {"model": "scripted", "stream": True, "messages": [{"role": "user", "content": content}], **options}


def chat(client: httpx.Client, content: object, **options: Any) -> httpx.Response:
    """Ask and read the whole reply."""
    return client.post("/chat/completions", json=asking(content, **options))


def data_lines(body: str) -> list[str]:
    """The data of each SSE event."""
    return [event.removeprefix("data: ") for event in body.split("\n\n") if event]


def chunks(body: str) -> list[dict[str, Any]]:
    """The chunks of a whole stream, which must end with [DONE]."""
    *lines, last = data_lines(body)
    assert last == "[DONE]"
    return [msgspec.json.decode(line) for line in lines]


def content_of(found: list[dict[str, Any]]) -> str:
    """The text of all chunks."""
    return "".join(choice["delta"].get("content", "") for one in found for choice in one["choices"])


def deltas(client: httpx.Client, *steps: Step) -> list[dict[str, Any]]:
    """The first choice of each chunk that these steps make."""
    return [one["choices"][0] for one in chunks(chat(client, script(steps)).text)]


def test_plain_text_is_answered_in_words(client: httpx.Client) -> None:
    """A message that is no script comes back in words, with role, finish and the usage that was asked for."""
    found = chunks(chat(client, "hi there [1]", stream_options={"include_usage": True}).text)
    assert [one["choices"][0]["delta"].get("content") for one in found[:-1]] == ["ok:", " hi", " there", " [1]", None]
    assert found[0]["choices"][0]["delta"]["role"] == "assistant"
    assert found[-2]["choices"][0]["finish_reason"] == "stop"
    assert found[-1]["choices"] == []
    assert found[-1]["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}


def test_a_text_part_is_a_script_too(client: httpx.Client) -> None:
    """The script may stand in the first text part of a content array."""
    found = chunks(chat(client, [{"type": "text", "text": script(answer("one\u2028two"))}]).text)
    assert content_of(found) == "one\u2028two"


def test_each_turn_has_its_line(client: httpx.Client) -> None:
    """The number of assistant messages after the last user message chooses the line."""
    said = script(calling("f", {"a": 1}), answer("after the tool"))
    messages: list[dict[str, Any]] = [{"role": "user", "content": "earlier"}, {"role": "assistant", "content": "ok"}]
    messages += [{"role": "user", "content": said}]
    first = chunks(client.post("/chat/completions", json=asking("") | {"messages": messages}).text)
    made = first[0]["choices"][0]["delta"]["tool_calls"][0]
    assert made == {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    messages += [
        {"role": "assistant", "content": None, "tool_calls": [{key: made[key] for key in ("id", "type", "function")}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "done"},
    ]
    second = chunks(client.post("/chat/completions", json=asking("") | {"messages": messages}).text)
    assert content_of(second) == "after the tool"
    messages += [{"role": "assistant", "content": "after the tool"}]
    third = client.post("/chat/completions", json=asking("") | {"messages": messages})
    assert (third.status_code, third.json()["error"]["code"]) == (400, "script_exhausted")


def test_every_kind_of_delta(client: httpx.Client) -> None:
    """Each step makes exactly one chunk with its delta."""
    found = deltas(
        client,
        reasoning("r"),
        reasoning("s", field="reasoning"),
        text("t", logprobs={"content": []}),
        {"refusal": "no"},
        size(3),
        call(arguments='{"x', index=None),
        call(id="c", custom={"name": "sh", "input": "ls"}),
        delta(content=None, odd=1),
        finish("length"),
    )
    assert [one["delta"] for one in found] == [
        {"role": "assistant", "reasoning_content": "r"},
        {"reasoning": "s"},
        {"content": "t"},
        {"refusal": "no"},
        {"content": "xxx"},
        {"tool_calls": [{"function": {"arguments": '{"x'}}]},
        {"tool_calls": [{"index": 0, "id": "c", "type": "custom", "custom": {"name": "sh", "input": "ls"}}]},
        {"content": None, "odd": 1},
        {},
    ]
    assert found[2]["logprobs"] == {"content": []}
    assert found[-1]["finish_reason"] == "length"


def test_raw_bytes_and_no_end(client: httpx.Client) -> None:
    """Raw text, junk, raw chunks and errors go out as they are, and [DONE] can be left out."""
    said = script([raw(": hello\n\n"), chunk(x=1), junk(7), raw("\n\n"), error("boom"), no_done()])
    body = chat(client, said, stream_options={"include_usage": True}).content
    assert body.startswith(b': hello\n\ndata: {"x":1}\n\njunk\xff\x00j\n\n')
    assert body.endswith(b'data: {"error":{"message":"boom","type":"server_error","param":null,"code":null}}\n\n')


def test_usage_where_the_script_wants_it(client: httpx.Client) -> None:
    """Usage comes as its own chunk, in the finish chunk, or not at all."""
    asked = {"stream_options": {"include_usage": True}}
    own = chunks(chat(client, script([finish(), usage(2, 3)]), **asked).text)
    assert [one.get("usage", {}).get("total_tokens") for one in own] == [None, 5]
    inside = chunks(chat(client, script([usage_in_finish(1, 1), finish()]), **asked).text)
    assert [one["usage"]["total_tokens"] for one in inside] == [2]
    none = chunks(chat(client, script([finish(), no_usage()]), **asked).text)
    assert [one.get("usage") for one in none] == [None]


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 200])
def test_split_cuts_anywhere(client: httpx.Client, piece: int) -> None:
    """Pieces of n bytes arrive one by one, through characters and over lines, and join to the same stream."""
    with client.stream(
        "POST", "/chat/completions", json=asking(script([split(piece), text("é€😀"), finish()]))
    ) as reply:
        pieces = list(reply.iter_raw())
    assert {len(one) for one in pieces[:-1]} == {piece}
    assert content_of(chunks(b"".join(pieces).decode())) == "é€😀"


def test_coalesce_is_one_piece(client: httpx.Client) -> None:
    """A whole reply can arrive in one piece."""
    with client.stream("POST", "/chat/completions", json=asking(script([coalesce(), *answer("a b c")]))) as reply:
        pieces = list(reply.iter_raw())
    assert len(pieces) == 1
    assert content_of(chunks(pieces[0].decode())) == "a b c"


def test_repeat_numbers_its_rounds(client: httpx.Client) -> None:
    """A repeated text can carry the number of its round."""
    assert content_of(chunks(chat(client, script([repeat(3, text("{i},")), text("{i}")])).text)) == "0,1,2,{i}"


def test_status_for_the_first_requests_only(client: httpx.Client) -> None:
    """`times` counts the requests of one script; others and the rest of the script are not touched."""
    said = script([status(429, headers={"retry-after": "3"}, times=2), status(503, "<html>", times=1), *answer("fine")])
    first = chat(client, said)
    assert (first.status_code, first.headers["retry-after"]) == (429, "3")
    assert first.json()["error"]["message"] == "scripted 429"
    assert chat(client, script([status(429, times=1)], answer(""))).status_code == 429
    assert chat(client, said).status_code == 429
    third = chat(client, said)
    assert (third.status_code, third.text, third.headers["content-type"]) == (503, "<html>", "text/html")
    assert content_of(chunks(chat(client, said).text)) == "fine"


@pytest.mark.parametrize("reset", [False, True])
def test_cut_breaks_the_connection(client: httpx.Client, upstream: Upstream, reset: bool) -> None:
    """The peer gets what was sent before, then an error; the record says that it was not the peer who left."""
    said = script([text("half"), cut(reset=reset)])
    got = b""
    with (
        pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)),
        client.stream("POST", "/chat/completions", json=asking(said)) as reply,
    ):
        for piece in reply.iter_raw():
            got += piece
    assert b"half" in got
    (record,) = upstream.asked(said)
    assert record.closed.wait(5)
    assert not record.peer_left


def test_cut_before_any_answer(client: httpx.Client) -> None:
    """A cut as the first step gives not even a status."""
    with pytest.raises(httpx.RemoteProtocolError):
        chat(client, script([cut()]))


def test_gate_holds_until_opened(client: httpx.Client, upstream: Upstream) -> None:
    """What is before the gate arrives; what is behind it only after the test opens it."""
    with client.stream("POST", "/chat/completions", json=asking(script([text("a"), gate("g1"), text("b")]))) as reply:
        pieces = reply.iter_text()
        assert '"a"' in next(pieces)
        upstream.wait_reached("g1")
        (record,) = [one for one in upstream.requests if not one.closed.is_set()]
        upstream.open("g1")
        assert '"b"' in "".join(pieces)
    assert record.closed.wait(5)
    with pytest.raises(TimeoutError):
        upstream.wait_reached("never", timeout_s=0.01)


@pytest.mark.parametrize("waiting", [stall(None), forever(text("x"), every_ms=1), forever(text("x"), every_ms=0)])
def test_the_peer_who_leaves_is_noticed(client: httpx.Client, upstream: Upstream, waiting: Step) -> None:
    """Whether the reply is silent or busy, the end of the peer ends it within milliseconds."""
    said = script([text("a"), waiting])
    with client.stream("POST", "/chat/completions", json=asking(said)) as reply:
        pieces = reply.iter_raw()
        next(pieces)
        (record,) = upstream.asked(said)
        assert not record.closed.is_set()
    left_s = time.monotonic()
    assert record.closed.wait(5)
    assert record.peer_left
    assert record.closed_s is not None
    assert record.closed_s - left_s < 2.0


async def test_coroutines_can_wait_too(upstream: Upstream) -> None:
    """The waiting methods for coroutines do not block the loop in which the request is made."""
    said = script([gate("g2"), *answer("done")])
    async with httpx.AsyncClient(base_url=upstream.base_url) as client:
        asked = asyncio.create_task(client.post("/chat/completions", json=asking(said)))
        await upstream.until_reached("g2")
        upstream.open("g2")
        assert content_of(chunks((await asked).text)) == "done"
    assert await upstream.asked(said)[0].until_closed()


def test_without_stream_the_reply_is_whole(client: httpx.Client) -> None:
    """The same steps make a chat.completion when the request does not stream."""
    steps = [
        reasoning("r"),
        *answer("a b")[:-1],
        call("f", '{"a":', id="c1"),
        call(arguments="1}"),
        finish("tool_calls"),
    ]
    whole = chat(client, script(steps), stream=False).json()
    (choice,) = whole["choices"]
    assert whole["object"] == "chat.completion"
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"] == {
        "role": "assistant",
        "content": "a b",
        "reasoning_content": "r",
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}],
    }
    assert whole["usage"]["completion_tokens"] == 3
    assert chat(client, script([error("boom")]), stream=False).status_code == 500


USER = {"role": "user", "content": "hi"}
CALLS = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALLS]}
TOOL = {"role": "tool", "tool_call_id": "c1", "content": "x"}
FUNCTION = {"type": "function", "function": {"name": "f"}}
PARTS = [{"type": "text", "text": "hi"}]


@pytest.mark.parametrize(
    "body",
    [
        pytest.param({"messages": [USER, TOOL]}, id="tool message without calls"),
        pytest.param({"messages": [USER, CALLING]}, id="call without tool message"),
        pytest.param({"messages": [USER, CALLING, USER]}, id="call answered by someone else"),
        pytest.param({"messages": [USER, CALLING, TOOL, TOOL]}, id="call answered twice"),
        pytest.param({"messages": [USER, CALLING | {"tool_calls": [CALLS, CALLS]}, TOOL, TOOL]}, id="one id twice"),
        pytest.param({"messages": [USER, CALLING | {"tool_calls": []}]}, id="empty calls"),
        pytest.param({"messages": [{"role": "bot", "content": "x"}]}, id="unknown role"),
        pytest.param({"messages": [{"role": "assistant", "content": None}]}, id="no content"),
        pytest.param({"messages": []}, id="no messages"),
        pytest.param({"model": None}, id="no model"),
        pytest.param({"tools": []}, id="empty tools"),
        pytest.param({"tool_choice": "auto"}, id="choice without tools"),
        pytest.param({"tools": [{"type": "function", "function": {"name": "a.b"}}]}, id="bad name"),
        pytest.param({"max_output_tokens": 3}, id="parameter of another API"),
        pytest.param({"stream": False, "stream_options": {"include_usage": True}}, id="usage option without stream"),
        pytest.param({"model": "any-no-usage-option", "stream_options": {}}, id="usage option refused"),
        pytest.param({"model": "any-strict", "messages": [{"role": "user", "content": PARTS}]}, id="parts refused"),
        pytest.param({"messages": [{"role": "user", "content": '[{"txt": "a"}]'}]}, id="unknown step"),
    ],
)
def test_it_is_as_strict_as_real_servers(client: httpx.Client, body: dict[str, Any]) -> None:
    """What real servers refuse is refused, in the shape of OpenAI's errors."""
    reply = client.post("/chat/completions", json=asking("hi") | body)
    assert reply.status_code == 400
    assert reply.json()["error"].keys() == {"message", "type", "param", "code"}


def test_what_is_right_is_taken(client: httpx.Client) -> None:
    """Parallel calls with their tool messages in any order, parts and tools are fine."""
    second = CALLS | {"id": "c2"}
    messages = [USER, CALLING | {"tool_calls": [CALLS, second]}, TOOL | {"tool_call_id": "c2"}, TOOL]
    body = asking("") | {
        "messages": [*messages, {"role": "user", "content": PARTS}],
        "tools": [FUNCTION],
        "tool_choice": "none",
    }
    assert content_of(chunks(client.post("/chat/completions", json=body).text)) == "ok: hi"


def test_invalid_json_and_other_paths(client: httpx.Client) -> None:
    """Invalid JSON is a 400, an unknown path a 404, and the models are listed."""
    assert client.post("/chat/completions", content=b"{").status_code == 400
    assert client.post("/completions", json={}).status_code == 404
    assert "scripted" in [model["id"] for model in client.get("/models").json()["data"]]


def test_requests_are_recorded(client: httpx.Client, upstream: Upstream) -> None:
    """Path, headers, decoded body and times of a request can be looked at; `clear` forgets them."""
    said = script([note("recorded"), *answer("x")])
    client.post("/chat/completions", json=asking(said), headers={"authorization": "Bearer k"})
    (record,) = upstream.asked(said)
    assert record.closed.wait(5)
    assert (record.method, record.path, record.status, record.turn) == ("POST", "/v1/chat/completions", 200, 0)
    assert record.headers["authorization"] == "Bearer k"
    assert record.body["messages"][0]["content"] == said
    assert record.closed_s is not None and record.first_byte_s is not None
    assert record.arrived_s <= record.first_byte_s <= record.closed_s
    upstream.clear()
    assert upstream.requests == []


def test_stop_and_start_on_the_same_port() -> None:
    """A stopped upstream refuses connections; started again it has the same address and asks for its key."""
    upstream = Upstream(api_key="secret")
    with upstream:
        url = f"{upstream.base_url}/chat/completions"
        assert httpx.post(url, json=asking("hi")).status_code == 401
    with pytest.raises(httpx.ConnectError):
        httpx.post(url, json=asking("hi"))
    with upstream:
        assert httpx.post(url, json=asking("hi"), headers={"authorization": "Bearer secret"}).status_code == 200
