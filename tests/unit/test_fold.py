"""The oracle itself: it takes what is right, and rejects every way to be wrong that it stands for."""

from collections.abc import Callable
from typing import Any

import pytest

from app.domain.fold import Fold
from app.domain.item_builders import OutputOptions
from app.domain.lifecycle import Outcome, close_response, open_response
from app.domain.turn import Turn
from app.wire.events import TERMINAL, Created, TextDelta
from tests.replay import replay
from tests.unit.build import chunk, counting, function, heard, piece, plain, request, said, toolbox

Events = list[dict[str, Any]]


def right() -> Events:
    """A stream with every kind of item and part."""
    turn = Turn(
        toolbox(function("f"), {"type": "custom", "name": "run"}), counting(), options=OutputOptions(summarize=True)
    )
    chunks = [
        chunk(reasoning_content="hm"),
        chunk(content="a"),
        chunk(content="b"),
        chunk(refusal="no"),
        chunk(tool_calls=[piece(0, "c1", "f", '{"a"'), piece(1, "c2", "run", '{"input":"ls"}')]),
        chunk(tool_calls=[piece(0, arguments=":1}")]),
    ]
    return heard(said(turn, chunks))


def the(events: Events, type: str) -> dict[str, Any]:
    """The first event of a type."""
    return next(event for event in events if event["type"] == f"response.{type}")


def renumbered(events: Events) -> Events:
    """The events without a gap in their numbers."""
    return [event | {"sequence_number": number} for number, event in enumerate(events)]


def without(type: str) -> Callable[[Events], Events]:
    """All events but the first of a type."""
    return lambda events: renumbered([event for event in events if event is not the(events, type)])


def twice(type: str) -> Callable[[Events], Events]:
    """The first event of a type comes twice."""
    return lambda events: renumbered([one for event in events for one in [event] * (1 + (event is the(events, type)))])


def changed(type: str, /, **fields: Any) -> Callable[[Events], Events]:
    """The first event of a type has other fields."""
    return lambda events: [event | fields if event is the(events, type) else event for event in events]


def swapped(first: str, second: str) -> Callable[[Events], Events]:
    """Two events have changed places."""

    def swap(events: Events) -> Events:
        one, two = the(events, first), the(events, second)
        return renumbered([two if event is one else one if event is two else event for event in events])

    return swap


def repeated_at_the_end(type: str) -> Callable[[Events], Events]:
    """The first event of a type comes again just before the last event."""
    return lambda events: renumbered([*events[:-1], the(events, type), events[-1]])


def with_response(type: str, /, **fields: Any) -> Callable[[Events], Events]:
    """A response event's snapshot has other fields."""
    return lambda events: changed(type, response=the(events, type)["response"] | fields)(events)


def with_item(type: str, /, **fields: Any) -> Callable[[Events], Events]:
    """An item event's item has other fields."""
    return lambda events: changed(type, item=the(events, type)["item"] | fields)(events)


WRONG: dict[str, Callable[[Events], Events]] = {
    "a gap in the numbers": changed("output_item.added", sequence_number=99),
    "an event that is missing": lambda events: events[:3] + events[4:],
    "no beginning": without("created"),
    "a second beginning": twice("created"),
    "no end": without("completed"),
    "something after the end": lambda events: renumbered([*events, the(events, "output_item.done")]),
    "a second end": twice("completed"),
    "another response": with_response("completed", id="resp_2"),
    "a beginning that knows what follows": with_response("in_progress", output=[{"type": "message"}]),
    "an item out of order": changed("output_item.added", output_index=1),
    "an item that was never added": without("output_item.added"),
    "an item that is added twice": twice("output_item.added"),
    "an item that is never done": without("output_item.done"),
    "an item that is done twice": twice("output_item.done"),
    "another item's id": changed("output_text.delta", item_id="msg_9"),
    "an item that changes its id": with_item("output_item.done", id="rs_9"),
    "an item that changes its type": with_item("output_item.done", type="message"),
    "a delta of an item that is done": repeated_at_the_end("output_text.delta"),
    "a part that was never added": without("content_part.added"),
    "a part that is added twice": twice("content_part.added"),
    "a part that is never done": without("content_part.done"),
    "a part that is done twice": twice("content_part.done"),
    "a part out of order": changed("content_part.added", content_index=1),
    "a part of another kind": changed("content_part.added", part={"type": "refusal", "refusal": ""}),
    "a part that is done before its text": swapped("output_text.done", "content_part.done"),
    "a text that is never done": without("output_text.done"),
    "a text that is done twice": twice("output_text.done"),
    "a reasoning text that is never done": without("reasoning_text.done"),
    "a refusal that is never done": without("refusal.done"),
    "a summary that is never done": without("reasoning_summary_text.done"),
    "a summary part that is never done": without("reasoning_summary_part.done"),
    "arguments that are never done": without("function_call_arguments.done"),
    "an input that is never done": without("custom_tool_call_input.done"),
    "deltas in the wrong order": swapped("output_text.delta", "output_text.done"),
    "a text that is lost": without("output_text.delta"),
    "a text that is doubled": twice("output_text.delta"),
    "a text that differs from its deltas": changed("output_text.done", text="ax"),
    "a part that differs from its deltas": changed(
        "content_part.done", part={"type": "reasoning_text", "text": "other"}
    ),
    "a refusal that differs from its deltas": changed("refusal.done", refusal="yes"),
    "a summary that differs from its deltas": changed("reasoning_summary_text.done", text="other"),
    "arguments that are lost": without("function_call_arguments.delta"),
    "arguments that differ from their deltas": changed("function_call_arguments.done", arguments="{}"),
    "an input that differs from its deltas": changed("custom_tool_call_input.done", input="rm"),
    "an item that differs from its parts": with_item("output_item.done", content=[]),
    "a summary that differs from its parts": with_item("output_item.done", summary=[]),
    "an output that lacks an item": lambda events: with_response(
        "completed", output=events[-1]["response"]["output"][:-1]
    )(events),
    "an output in another order": lambda events: with_response(
        "completed", output=events[-1]["response"]["output"][::-1]
    )(events),
    "an unknown event": changed("output_text.delta", type="response.output_text_of_mine.delta"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_oracle_rejects(wrong: str):
    events = right()
    damaged = WRONG[wrong](events)
    assert damaged != events
    with pytest.raises(AssertionError):
        replay(damaged)


def test_the_oracle_takes_what_is_right():
    events = right()
    response = replay(events)
    assert response == events[-1]["response"]
    assert [one["type"] for one in response["output"]] == [
        "reasoning",
        "message",
        "function_call",
        "custom_tool_call",
    ]


def test_a_stream_that_broke_off_is_no_response():
    with pytest.raises(AssertionError, match="broke off"):
        replay(right()[:5])
    with pytest.raises(AssertionError, match="broke off"):
        replay([])


def test_folding_at_item_borders_gives_the_same_response():
    """The hot path's fold and the oracle agree."""
    turn = Turn(toolbox(function("f")), counting())
    chunks = [chunk(content="a"), chunk(tool_calls=[piece(0, "c1", "f", "{}")])]
    fold = Fold(open_response(request(), id="resp_1", created_at=1))
    events = said(turn, chunks)
    for event in events:
        fold.apply(event)
    assert plain(fold.response)["output"] == replay(heard(events))["output"]


def test_only_item_borders_and_snapshots_change_the_response():
    response = open_response(request(), id="resp_1", created_at=1)
    fold = Fold(response)
    fold.apply(TextDelta(item_id="msg_1", output_index=0, delta="x"))
    fold.apply(Created(response=response))
    assert fold.response == response
    closed = close_response(response, Outcome("completed"), usage=None, now=2)
    fold.apply(TERMINAL["completed"](response=closed))
    assert fold.response == closed
