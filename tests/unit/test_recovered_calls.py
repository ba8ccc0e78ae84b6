"""A crash in the midst of server-run tools: what stays, what is closed, what is left out."""

from typing import Any

import msgspec

from app.domain.calls import approval_request, mcp_call, open_list
from app.domain.recovery import Recovered, recover
from app.domain.tools.answers import Answer
from app.wire.events import AnnotationAdded, Event, ItemAdded, PartAdded, TextDelta, split_frames
from app.wire.items import Message, OutputText
from tests.replay import replay
from tests.unit.build import counting, heard, plain


def told(events: list[Event], *, last: int | None = None) -> list[dict[str, Any]]:
    """Events as a client hears them, without the end; only the first so many of these."""
    said = heard(events)[:-1]
    return said if last is None else said[: 2 + last]


def recovered(said: list[dict[str, Any]]) -> Recovered:
    """What a new owner finds."""
    frames = [b"event: %b\ndata: %b\n\n" % (event["type"].encode(), msgspec.json.encode(event)) for event in said]
    return recover(split_frames(b"".join(frames)))


def continued(said: list[dict[str, Any]], found: Recovered) -> list[dict[str, Any]]:
    """What was said, and what closes it; checked by the oracle as if the response then ended."""
    events = [*said]
    for event in found.closing:
        event.sequence_number = len(events)
        events.append(plain(event))
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    end = {**said[0]["response"], "status": "failed", "output": done}
    replay([*events, {"type": "response.failed", "sequence_number": len(events), "response": end}])
    return done


def test_of_two_calls_at_once_the_one_that_ended_stays_and_the_other_is_not_made_again():
    new_id = counting()
    one, other = (mcp_call(new_id, "box", name, '{"a":1}') for name in ("add", "echo"))
    said = told([*one.open(0), *other.open(1), *one.close(Answer("x"))])
    found = recovered(said)
    items = [msgspec.json.decode(raw) for raw in found.output]
    assert [(one["name"], one["status"], one["output"]) for one in items] == [
        ("add", "completed", "x"),
        ("echo", "failed", None),
    ]
    assert "may have been carried out" in items[1]["error"]["message"]
    assert items[1]["arguments"] == '{"a":1}'
    assert [raw["name"] for raw in map(msgspec.json.decode, found.done)] == ["add"]
    assert (found.next_number, found.next_output_index) == (len(said), 2)
    continued(said, found)


def test_a_list_that_broke_off_is_made_again():
    _, opening = open_list(counting(), "box", 0)
    said = told(opening)
    found = recovered(said)
    [closed] = continued(said, found)
    assert (found.output, closed["tools"], "status" in closed) == ([], [], False)
    assert closed["error"]
    assert [plain(event)["type"] for event in found.closing] == [
        "response.mcp_list_tools.failed",
        "response.output_item.done",
    ]


def test_a_request_for_approval_that_broke_off_is_left_out():
    said = told(approval_request(counting(), "box", "add", "{}", 0), last=1)
    found = recovered(said)
    [closed] = continued(said, found)
    assert (found.output, "status" in closed) == ([], False)


def test_a_message_with_citations_that_broke_off_keeps_them():
    where: dict[str, Any] = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    cited = {"type": "url_citation", "url": "http://a", "title": "A", "start_index": 0, "end_index": 8}
    said = told(
        [
            ItemAdded(output_index=0, item=Message(id="msg_1", role="assistant", content=[], status="in_progress")),
            PartAdded(**where, part=OutputText(text="")),
            TextDelta(**where, delta="http://a"),
            AnnotationAdded(**where, annotation_index=0, annotation=cited),
        ]
    )
    found = recovered(said)
    [closed] = continued(said, found)
    assert (found.output, closed["status"]) == ([], "incomplete")
    assert (closed["content"][0]["text"], closed["content"][0]["annotations"]) == ("http://a", [cited])
