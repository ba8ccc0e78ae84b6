"""Streams: the order of events for everything a model may say, and the bytes around them."""

from collections.abc import Callable, Iterator, Mapping

import httpx
import pytest

from tests.api.streams import events_of, types_of
from tests.servers import Served
from tests.upstream import (
    answer,
    call,
    error,
    finish,
    gate,
    note,
    reasoning,
    refusal,
    script,
    stall,
    status,
    text,
    usage,
)

CITY = {"type": "function", "name": "get_weather"}
SHELL = {"type": "custom", "name": "shell"}

MESSAGE = """
    output_item.added content_part.added output_text.delta output_text.done content_part.done output_item.done
"""
CALL = "output_item.added function_call_arguments.delta function_call_arguments.done output_item.done"
REASONING = """
    output_item.added content_part.added reasoning_text.delta reasoning_text.done content_part.done output_item.done
"""


def order(*groups: str, end: str = "completed") -> list[str]:
    """The types of a whole stream."""
    return f"created in_progress {' '.join(groups)} {end}".split()


def streamed(http: httpx.Client, given: str, **more: object) -> list[dict]:
    """The events of a stream; what they add up to is what is stored."""
    events = events_of(http.post("/responses", json={"model": "m", "input": given, "stream": True, **more}))
    last = events[-1]["response"]
    assert http.get(f"/responses/{last['id']}").json() == last
    assert [event["item"] for event in events if event["type"] == "response.output_item.done"] == last["output"]
    return events


# -- Order ------------------------------------------------------------------------------------------------------------------


def test_a_text_streams_event_by_event(http):
    """One stream whole: every field of every event."""
    events = streamed(http, script([text("Hel"), text("lo"), finish(), usage(3, 2)]))
    final = events[-1]["response"]
    id = final["output"][0]["id"]
    begun = final | {"status": "in_progress", "completed_at": None, "usage": None, "output": []}
    at = {"item_id": id, "output_index": 0, "content_index": 0}
    whole = {"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}
    message = {"type": "message", "id": id, "role": "assistant", "content": [whole], "status": "completed"}
    expected = [
        {"type": "response.created", "response": begun},
        {"type": "response.in_progress", "response": begun},
        {
            "type": "response.output_item.added",
            "output_index": 0,
            "item": message | {"content": [], "status": "in_progress"},
        },
        {"type": "response.content_part.added", **at, "part": whole | {"text": ""}},
        {"type": "response.output_text.delta", **at, "delta": "Hel", "logprobs": []},
        {"type": "response.output_text.delta", **at, "delta": "lo", "logprobs": []},
        {"type": "response.output_text.done", **at, "text": "Hello", "logprobs": []},
        {"type": "response.content_part.done", **at, "part": whole},
        {"type": "response.output_item.done", "output_index": 0, "item": message},
        {"type": "response.completed", "response": final},
    ]
    assert events == [{**event, "sequence_number": number} for number, event in enumerate(expected)]
    assert (final["status"], final["output"], final["usage"]["total_tokens"]) == ("completed", [message], 5)


def test_a_refusal_streams_as_a_part_of_a_message(http):
    events = streamed(http, script([refusal("I "), refusal("won't."), finish()]))
    assert types_of(events) == order(
        "output_item.added content_part.added refusal.delta refusal.done content_part.done output_item.done"
    )
    assert events[3]["part"] == {"type": "refusal", "refusal": ""}
    assert events[-1]["response"]["output"][0]["content"] == [{"type": "refusal", "refusal": "I won't."}]


def test_text_and_then_a_refusal_are_two_parts_of_one_message(http):
    events = streamed(http, script([text("Well. "), refusal("No."), finish()]))
    assert types_of(events) == order(
        "output_item.added content_part.added output_text.delta output_text.done content_part.done",
        "content_part.added refusal.delta refusal.done content_part.done output_item.done",
    )
    assert [event["content_index"] for event in events if "content_index" in event] == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_reasoning_streams_before_the_message(http, field):
    events = streamed(http, script([reasoning("Hm, ", field), reasoning("yes.", field), text("Hi"), finish()]))
    assert types_of(events) == order(REASONING, MESSAGE)
    assert [event["output_index"] for event in events if "output_index" in event] == [0] * 7 + [1] * 6
    assert events[2]["item"]["summary"] == []


def test_reasoning_with_a_summary_streams_both(http):
    given = script([reasoning("Hm."), text("Hi"), finish()])
    events = streamed(http, given, reasoning={"summary": "auto"})
    group = [event for event in events if event.get("output_index") == 0]
    assert types_of(group) == [
        "output_item.added",
        "content_part.added",
        "reasoning_summary_part.added",
        "reasoning_text.delta",
        "reasoning_summary_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "reasoning_summary_text.done",
        "reasoning_summary_part.done",
        "output_item.done",
    ]
    assert all(event["summary_index"] == 0 for event in group if "summary" in event["type"])
    assert group[-1]["item"]["summary"] == [{"type": "summary_text", "text": "Hm."}]


def test_a_function_call_streams_its_arguments(http):
    given = script(
        [
            call("get_weather", "", id="call_1"),
            call(arguments='{"city":'),
            call(arguments='"Oslo"}'),
            finish("tool_calls"),
        ]
    )
    events = streamed(http, given, tools=[CITY])
    assert types_of(events) == order(CALL)
    id = events[2]["item"].pop("id")
    assert events[2]["item"] == {
        "type": "function_call",
        "call_id": "call_1",
        "name": "get_weather",
        "arguments": "",
        "status": "in_progress",
    }
    assert [event["delta"] for event in events[3:5]] == ['{"city":', '"Oslo"}']
    assert events[5] == {
        "type": "response.function_call_arguments.done",
        "sequence_number": 5,
        "item_id": id,
        "output_index": 0,
        "name": "get_weather",
        "arguments": '{"city":"Oslo"}',
    }


def test_parallel_calls_that_come_mixed_up_stream_one_after_the_other(http):
    given = script(
        [
            text("Let me see."),
            call("get_weather", "", index=0, id="call_a"),
            call("get_weather", "", index=1, id="call_b"),
            call(arguments='{"city":', index=1),
            call(arguments='{"city":', index=0),
            call(arguments='"Rome"}', index=1),
            call(arguments='"Oslo"}', index=0),
            finish("tool_calls"),
        ]
    )
    events = streamed(http, given, tools=[CITY])
    assert types_of(events) == order(MESSAGE, CALL, CALL)
    indexes = [event["output_index"] for event in events if "output_index" in event]
    assert indexes == sorted(indexes)
    assert [(one["call_id"], one["arguments"]) for one in events[-1]["response"]["output"][1:]] == [
        ("call_a", '{"city":"Oslo"}'),
        ("call_b", '{"city":"Rome"}'),
    ]


def test_thinking_inside_the_text_streams_as_reasoning(http):
    given = script([text("<th"), text("ink>Hm.</thi"), text("nk>\n\nHi"), finish()])
    events = streamed(http, given)
    assert types_of(events) == order(REASONING, MESSAGE)
    thought, message = events[-1]["response"]["output"]
    assert (thought["content"][0]["text"], message["content"][0]["text"]) == ("Hm.", "Hi")


def test_an_answer_of_nothing_completes_with_no_output(http):
    events = streamed(http, script([note("nothing"), finish()]))
    assert types_of(events) == order()
    assert events[-1]["response"]["output"] == []


@pytest.mark.parametrize(
    ("finish_reason", "reason"), [("length", "max_output_tokens"), ("content_filter", "content_filter")]
)
def test_what_is_cut_short_is_closed_and_the_response_is_incomplete(http, finish_reason, reason):
    events = streamed(http, script([text("Once"), finish(finish_reason), usage(1, 1)]))
    assert types_of(events) == order(MESSAGE, end="incomplete")
    final = events[-1]["response"]
    assert (final["status"], final["incomplete_details"], final["error"]) == ("incomplete", {"reason": reason}, None)
    assert final["output"][0]["status"] == "incomplete"
    assert (final["usage"]["total_tokens"], final["completed_at"]) == (2, None)


def test_a_call_that_is_cut_short_is_incomplete(http):
    given = script([call("get_weather", '{"city":', id="call_1"), finish("length")])
    events = streamed(http, given, tools=[CITY])
    assert types_of(events) == order(CALL, end="incomplete")
    [made] = events[-1]["response"]["output"]
    assert (made["arguments"], made["status"]) == ('{"city":', "incomplete")


def test_a_failure_in_mid_stream_is_one_failed_event_with_what_was_said(http):
    events = streamed(http, script([text("Once"), error("out of memory")]))
    assert types_of(events) == order(MESSAGE, end="failed")
    final = events[-1]["response"]
    assert final["error"] == {"code": "server_error", "message": "The upstream failed: out of memory"}
    assert (final["status"], final["output"][0]["status"]) == ("failed", "incomplete")
    assert final["output"][0]["content"][0]["text"] == "Once"


def test_log_probabilities_stream_with_their_deltas(http):
    one = {"token": "Hi", "logprob": -0.5, "bytes": [72, 105], "top_logprobs": []}
    given = script([text("Hi", logprobs={"content": [one]}), finish()])
    events = streamed(http, given, include=["message.output_text.logprobs"])
    assert [event["logprobs"] for event in events if "output_text" in event["type"]] == [[one], [one]]


# -- The official client ----------------------------------------------------------------------------------------------------


def test_the_stream_helper_follows_a_turn_of_everything(client):
    given = script(
        [
            reasoning("Hm."),
            text("I look."),
            call("get_weather", {"city": "Oslo"}, index=0, id="call_a"),
            call("shell", {"input": "ls"}, index=1, id="call_b"),
            finish("tool_calls"),
        ]
    )
    with client.responses.stream(model="m", input=given, tools=[CITY, SHELL], reasoning={"summary": "auto"}) as stream:
        heard = [event.type for event in stream]
        final = stream.get_final_response()
    assert heard[-1] == "response.completed"
    assert final.output_text == "I look."
    assert [one.type for one in final.output] == ["reasoning", "message", "function_call", "custom_tool_call"]
    assert client.responses.retrieve(final.id).output[2].to_dict() == {
        "type": "function_call",
        "id": final.output[2].id,
        "call_id": "call_a",
        "name": "get_weather",
        "arguments": '{"city":"Oslo"}',
        "status": "completed",
    }


def test_the_events_of_create_are_of_the_clients_own_types(client):
    stream = client.responses.create(model="m", input=script(answer("Hello there")), stream=True)
    events = list(stream)
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Hello there"
    assert events[0].response.id == events[-1].response.id
    assert events[-1].response.output_text == "Hello there"


def test_a_client_that_continues_at_the_last_event_never_comes_too_early(client):
    for _ in range(10):
        with client.responses.create(model="m", input="Hello", stream=True) as first:
            id = next(event.response.id for event in first if event.type == "response.completed")
        assert client.responses.create(model="m", input="And?", previous_response_id=id).status == "completed"


# -- The bytes around it ----------------------------------------------------------------------------------------------------


def test_the_head_of_a_stream(http):
    reply = http.post("/responses", json={"model": "m", "input": "Hello", "stream": True})
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.headers["x-accel-buffering"] == "no"
    assert reply.headers["x-request-id"].startswith("req_")
    assert "content-length" not in reply.headers


def test_a_stream_holds_nothing_but_events_and_ends_with_done(http):
    """No `id:` lines, no carriage returns; `events_of` checks the frames."""
    reply = http.post("/responses", json={"model": "m", "input": "Hello", "stream": True})
    lines = reply.text.split("\n")
    assert {line.partition(":")[0] for line in lines} == {"event", "data", ""}
    assert "\r" not in reply.text
    assert reply.text.endswith("data: [DONE]\n\n")
    assert events_of(reply)[-1]["type"] == "response.completed"


@pytest.mark.parametrize("accept", ["application/json", "*/*", "text/event-stream"])
def test_what_a_client_accepts_does_not_matter(http, accept):
    reply = http.post("/responses", json={"model": "m", "input": "Hello", "stream": True}, headers={"accept": accept})
    assert reply.headers["content-type"].startswith("text/event-stream")


@pytest.mark.parametrize("options", [None, {}, {"include_obfuscation": False}])
def test_deltas_are_not_padded_unless_asked_for(http, options):
    body = {"model": "m", "input": "Hello", "stream": True, "stream_options": options}
    assert not [event for event in events_of(http.post("/responses", json=body)) if "obfuscation" in event]


def test_padded_deltas_hide_the_length_of_the_text(http):
    """The bytes of a delta and its padding are a multiple of 16; the text is not touched, nor what is stored."""
    given = script(
        [*(text("x" * length) for length in range(1, 40)), text("“ü”"), call("get_weather", "{}", id="c"), finish()]
    )
    options = {"stream_options": {"include_obfuscation": True}, "tools": [CITY]}
    reply = http.post("/responses", json={"model": "m", "input": given, "stream": True, **options})
    events = events_of(reply)
    deltas = [event for event in events if event["type"].endswith(".delta")]
    assert len(deltas) == 41
    assert [event for event in events if "obfuscation" in event] == deltas
    frames = [line.removeprefix("data: ") for line in reply.text.split("\n") if '"obfuscation"' in line]
    assert {len((frame.replace(',"obfuscation":""', "")).encode()) % 16 for frame in frames} == {
        len(',"obfuscation":""') % 16
    }
    assert all(1 <= len(event["obfuscation"]) <= 16 for event in deltas)
    final = events[-1]["response"]
    assert http.get(f"/responses/{final['id']}").json() == final


def test_text_is_heard_as_soon_as_it_is_said(client, upstream):
    given = script([text("Hel"), gate("soon"), text("lo"), finish()])
    heard = []
    for event in client.responses.create(model="m", input=given, stream=True):
        if event.type == "response.output_text.delta":
            heard.append(event.delta)
            upstream.open("soon")
    assert heard == ["Hel", "lo"]


# -- Before the first event -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("code", "body", "expected"),
    [
        (
            400,
            {"error": {"message": "Bad prompt.", "type": "invalid_request_error", "param": "x", "code": "bad"}},
            (400, {"message": "Bad prompt.", "type": "invalid_request_error", "param": "x", "code": "bad"}),
        ),
        (
            400,
            {"error": {"message": "Bad prompt."}},
            (400, {"message": "Bad prompt.", "type": "invalid_request_error", "param": None, "code": None}),
        ),
        (
            404,
            {"error": {"message": "No such model.", "type": "NotFoundError", "param": None, "code": 404}},
            (
                404,
                {
                    "message": "No such model.",
                    "type": "invalid_request_error",
                    "param": "model",
                    "code": "model_not_found",
                },
            ),
        ),
        (
            429,
            {"error": {"message": "Slow down."}},
            (429, {"message": "Slow down.", "type": "requests", "param": None, "code": "rate_limit_exceeded"}),
        ),
    ],
    ids=["400", "bare 400", "404", "429"],
)
def test_what_the_upstream_refuses_at_once_is_an_http_status_and_nothing_is_stored(
    http, upstream, said, stream, code, body, expected
):
    given = script([note(said), status(code, body, {"retry-after": "77"})])
    newest = http.get("/responses", params={"limit": 1}).json()
    reply = http.post("/responses", json={"model": "m", "input": given, "stream": stream})
    assert (reply.status_code, reply.json()["error"]) == expected
    assert reply.headers["content-type"] == "application/json"
    assert http.get("/responses", params={"limit": 1}).json() == newest
    assert len(upstream.asked(given)) == 1


def test_an_upstream_that_was_busy_for_a_moment_is_asked_again(client, upstream):
    given = script([status(503, times=1), text("Here."), finish()])
    assert client.responses.create(model="m", input=given).output_text == "Here."
    assert len(upstream.asked(given)) == 2


# -- Silence ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def impatient(base_env: Mapping[str, str], new_database: Callable[[], str]) -> Iterator[Served]:
    """A server with little patience."""
    settings = {"REPRISE_KEEPALIVE_S": "0.05", "REPRISE_STREAM_HEAD_WAIT_S": "0.2"}
    with Served({**base_env, **settings, "DATABASE_URL": new_database()}) as running:
        yield running


@pytest.fixture
def hasty(impatient: Served) -> Iterator[httpx.Client]:
    """Raw HTTP to that server."""
    with httpx.Client(base_url=impatient.url, timeout=10) as made:
        yield made


def test_the_head_of_a_stream_leaves_although_the_upstream_is_silent(hasty, upstream):
    given = script([gate("silent"), text("Hi"), finish()])
    with hasty.stream("POST", "/responses", json={"model": "m", "input": given, "stream": True}) as reply:
        assert reply.status_code == 200
        frames = frames_of(reply)
        assert next(frames).startswith("event: response.created")
        assert next(frames).startswith("event: response.in_progress")
        upstream.wait_reached("silent")
        [record] = upstream.asked(given)
        assert record.first_byte_s is None
        upstream.open("silent")
        assert list(frames)[-1] == "data: [DONE]"


def test_comments_show_in_a_silence_that_the_server_is_alive(hasty, upstream):
    given = script([text("Hel"), gate("pause"), text("lo"), finish()])
    with hasty.stream("POST", "/responses", json={"model": "m", "input": given, "stream": True}) as reply:
        heard = []
        for frame in frames_of(reply):
            heard.append(frame)
            if heard.count(": keep-alive") == 3:
                upstream.open("pause")
    assert heard.count(": keep-alive") >= 3
    assert {frame.partition(" ")[0] for frame in heard} == {":", "event:", "data:"}
    assert '"delta":"lo"' in "".join(heard)


def test_the_official_client_does_not_mind_comments(impatient):
    given = script([text("Hel"), stall(0.3), text("lo"), finish()])
    with impatient.client() as client, client.responses.stream(model="m", input=given) as stream:
        assert stream.get_final_response().output_text == "Hello"


def test_what_the_upstream_refuses_too_late_for_a_status_is_a_failed_response(hasty, upstream):
    given = script([gate("late"), status(400, {"error": {"message": "Bad prompt."}})])
    with hasty.stream("POST", "/responses", json={"model": "m", "input": given, "stream": True}) as reply:
        upstream.open("late")
        events = events_of(reply)
    assert types_of(events) == order(end="failed")
    assert events[-1]["response"]["error"] == {"code": "invalid_prompt", "message": "Bad prompt."}
    id = events[-1]["response"]["id"]
    assert hasty.get(f"/responses/{id}").json() == events[-1]["response"]


def frames_of(reply: httpx.Response) -> Iterator[str]:
    """Frames as they come."""
    held = ""
    for piece in reply.iter_text():
        held += piece
        *frames, held = held.split("\n\n")
        yield from frames
    assert held == ""
