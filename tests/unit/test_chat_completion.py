"""Responses and their events → completions and chunks."""

from typing import Any

import msgspec
import pytest

from app.api.chat import ChunkFrames
from app.api.sse import KEEPALIVE
from app.domain.chat_completion import Chunks, completion, error_of
from app.domain.lifecycle import Outcome, close_response, open_response
from app.domain.turn import Turn
from app.errors import UpstreamBusy, UpstreamError
from app.wire.events import TERMINAL, AnnotationAdded, Created, Event, ItemDone, McpArgumentsDelta, encode_event
from app.wire.resources import ErrorBody, InputTokensDetails, OutputTokensDetails, Response, Usage
from tests.chunks import added_up
from tests.unit.build import chunk, counting, function, piece, plain, request, toolbox

DONE = Outcome("completed")
USAGE = Usage(3, InputTokensDetails(1), 4, OutputTokensDetails(2), 7)
CITED = {"type": "url_citation", "url": "https://a", "title": "A", "start_index": 1, "end_index": 3}


def run(
    *turns: list[Any], outcome: Outcome = DONE, usage: Usage | None = USAGE, **body: Any
) -> tuple[list[Event], Response]:
    """The events of a run in which the model takes these turns, and its response."""
    response = open_response(request(**body), id="resp_1", created_at=5)
    events: list[Event] = [Created(response=response)]
    new_id, index = counting(), 0
    for chunks in turns:
        turn = Turn(toolbox(function("f"), {"type": "custom", "name": "c"}), new_id, output_index=index)
        events += [event for one in chunks for event in turn.feed(one)] + turn.close()
        index = turn.output_index
    output = [event.item for event in events if isinstance(event, ItemDone)]
    closed = close_response(msgspec.structs.replace(response, output=output), outcome, usage=usage, now=6)
    return [*events, TERMINAL[closed.status](response=closed)], closed


def chunks_of(events: list[Event], *, include_usage: bool = False) -> list[dict[str, Any]]:
    chunks = Chunks(include_usage=include_usage)
    return [plain(one) for event in events for one in chunks.take(encode_event(event))]


TOKEN = {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}

RUNS: dict[str, tuple[list[list[Any]], Outcome]] = {
    "nothing": ([[]], DONE),
    "text": ([[chunk(content="a"), chunk(content="b")]], DONE),
    "texts of two turns": ([[chunk(content="Let me see.")], [chunk(content="It"), chunk(content=" is.")]], DONE),
    "reasoning": ([[chunk(reasoning="h"), chunk(reasoning="m"), chunk(content="a")], [chunk(reasoning="x")]], DONE),
    "a refusal after text": ([[chunk(content="a"), chunk(refusal="no"), chunk(refusal="!")]], DONE),
    "text again after a refusal": ([[chunk(content="a"), chunk(refusal="no"), chunk(content="b")]], DONE),
    "logprobs": ([[chunk(content="a", logprobs={"content": [TOKEN]})]], DONE),
    "calls": (
        [
            [
                chunk(content="a"),
                chunk(tool_calls=[piece(0, "call_1", "f", '{"a"'), piece(1, "call_2", "f", "{}")]),
                chunk(tool_calls=[piece(0, None, None, ":1}")]),
            ]
        ],
        DONE,
    ),
    "a custom call": ([[chunk(tool_calls=[piece(0, "call_1", "c", '{"input":"ls"}')])]], DONE),
    "cut off": ([[chunk(content="a")]], Outcome("incomplete", reason="max_output_tokens")),
    "filtered": ([[chunk(content="a")]], Outcome("incomplete", reason="content_filter")),
    "too many turns": ([[chunk(content="a")]], Outcome("incomplete", reason="max_turns")),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_chunks_add_up_to_the_completion(name):
    turns, outcome = RUNS[name]
    events, response = run(*turns, outcome=outcome, store=False)
    chunks, [choice] = chunks_of(events), plain(completion(response))["choices"]
    assert added_up(chunks) == choice
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": None}
    assert len({one["id"] for one in chunks}) == 1


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("text", "stop"),
        ("calls", "tool_calls"),
        ("cut off", "length"),
        ("filtered", "content_filter"),
        ("too many turns", "length"),
    ],
)
def test_the_finish_reason(name, reason):
    turns, outcome = RUNS[name]
    assert completion(run(*turns, outcome=outcome)[1]).choices[0].finish_reason == reason


def test_texts_of_several_messages_stand_below_each_other():
    turns, _ = RUNS["texts of two turns"]
    message = completion(run(*turns)[1]).choices[0].message
    assert message.content == "Let me see.\n\nIt is."


def test_a_completion():
    assert plain(completion(run([chunk(content="a")], metadata={"k": "v"})[1])) == {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 5,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "a", "refusal": None, "annotations": []},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "service_tier": "default",
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 4,
            "total_tokens": 7,
            "prompt_tokens_details": {"cached_tokens": 1, "cache_write_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 2},
        },
        "metadata": {"k": "v"},
        "response_id": "resp_1",
    }


def test_usage_comes_in_a_last_chunk_without_choices_if_it_is_asked_for():
    events, response = run([chunk(content="a")])
    *chunks, last = chunks_of(events, include_usage=True)
    assert (last["choices"], last["usage"]) == ([], plain(completion(response).usage))
    assert all(one["usage"] is None and one["choices"] for one in chunks)
    assert all("usage" not in one and one["choices"] for one in chunks_of(events))
    assert chunks_of(run([chunk(content="a")], usage=None)[0], include_usage=True)[-1]["choices"]


def test_only_what_is_stored_has_an_id_that_can_be_continued():
    kept, lost = (chunks_of(run([chunk(content="a")], store=store)[0]) for store in (True, False))
    assert [one.get("response_id") for one in kept] == ["resp_1", None, "resp_1"]
    assert not any("response_id" in one for one in lost)
    assert completion(run([], store=False)[1]).response_id is msgspec.UNSET


def test_citations_of_addresses_stand_where_the_text_has_them():
    events, response = run([chunk(content="ab")], [chunk(content="cdef")])
    items = [msgspec.json.decode(raw) for raw in response.output]
    for number, one in enumerate(items):
        one["content"][0]["annotations"] = [
            CITED,
            {"type": "file_citation", "file_id": "f", "filename": "f", "index": 1},
        ]
        at = next(at for at, event in enumerate(events) if isinstance(event, ItemDone) and event.output_index == number)
        for index, annotation in enumerate(one["content"][0]["annotations"]):
            added = AnnotationAdded(
                item_id=one["id"], output_index=number, annotation_index=index, annotation=annotation
            )
            events.insert(at, added)
    response.output = [msgspec.Raw(msgspec.json.encode(one)) for one in items]
    [choice] = plain(completion(response))["choices"]
    assert [
        (one["url_citation"]["start_index"], one["url_citation"]["end_index"])
        for one in choice["message"]["annotations"]
    ] == [(1, 3), (5, 7)]
    assert added_up(chunks_of(events)) == choice


def test_a_failed_run_ends_with_an_error_and_no_finish_reason():
    failed = Outcome("failed", error=UpstreamBusy("Busy."))
    *chunks, last = chunks_of(run([chunk(content="a")], outcome=failed)[0], include_usage=True)
    assert last == {"message": "Busy.", "type": "requests", "param": None, "code": "rate_limit_exceeded"}
    assert not any(one["choices"][0]["finish_reason"] for one in chunks)


def test_why_there_is_no_completion():
    assert error_of(run([])[1]) is None
    failed = error_of(run([], outcome=Outcome("failed", error=UpstreamError("Broken.")))[1])
    assert failed == ErrorBody("Broken.", "server_error", None, "server_error")
    cancelled = error_of(run([], outcome=Outcome("cancelled"))[1])
    assert cancelled and cancelled.code == "cancelled"


@pytest.mark.parametrize(("keepalive_chunks", "sign"), [(False, KEEPALIVE), (True, b'"delta":{}')])
def test_events_that_make_no_chunks_leave_no_client_in_silence(keepalive_chunks, sign):
    times = iter([0.0, 1.0, 9.0, 16.0, 17.0, 31.0])
    frames = ChunkFrames(
        Chunks(include_usage=False),
        obfuscate=False,
        keepalive_s=15,
        keepalive_chunks=keepalive_chunks,
        clock=lambda: next(times),
    )
    assert b"assistant" in frames.frames([encode_event(run([])[0][0])])
    passed_over = encode_event(McpArgumentsDelta(item_id="mcp_1", output_index=0, delta="{"))
    written = [frames.frames([passed_over]) for _ in range(4)]
    assert [bool(one) for one in written] == [False, True, False, True]
    assert sign in written[1]
