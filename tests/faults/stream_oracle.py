"""The oracle of the fault suite: checks the events that one client of a background stream received."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tests.replay import replay

Event = Mapping[str, Any]


def checked_response(seen: Sequence[Event], *, jumps: int = 0) -> dict[str, Any]:
    """The final response of one client's events, over any number of connections.

    Raises AssertionError unless: the numbers are consecutive, but for `jumps` at most, each announced by `response.in_progress`;
    each item is opened, filled and closed in order; items that a recovery closed as `incomplete` and left out of its snapshot
    are not in the output, nor is reasoning that it took back; there is one terminal event, the last one; and the deltas fold
    into its response.
    """
    assert seen, "there are no events"
    assert seen[0]["sequence_number"] == 0, f"begins with {seen[0]}"
    left_out: set[int] = set()
    items: dict[int, Mapping[str, Any] | None] = {}
    at_jump = False
    for last, event in zip([None, *seen], seen, strict=False):
        if last is not None and event["sequence_number"] != last["sequence_number"] + 1:
            assert event["sequence_number"] > last["sequence_number"], f"{event} after {last}"
            jumps, at_jump = jumps - 1, True
            assert event["type"] == "response.in_progress", f"an unannounced gap: {event} after {last}"
        if event["type"] == "response.output_item.added":
            assert event["output_index"] not in items, f"an index twice: {event}"
            items[event["output_index"]] = None
        elif event["type"] == "response.output_item.done":
            items[event["output_index"]] = event["item"]
            left_out.discard(event["output_index"])  # a call that was open at a jump
        elif event["type"] == "response.in_progress":
            left_out |= _left_out(items, left_out, event, at_jump=at_jump)
            at_jump = False
    assert jumps >= 0, "the numbers jumped"
    return replay(_renumbered([event for event in seen if event.get("output_index") not in left_out]))


def _left_out(items: Mapping[int, Any], before: set[int], event: Event, *, at_jump: bool) -> set[int]:
    """The items that this snapshot lacks: broken off by a crash, and closed unless that event was lost too."""
    ids = {item["id"] for item in event["response"]["output"]}
    lacking = {
        index for index, item in items.items() if index not in before and (item is None or item["id"] not in ids)
    }
    for index in lacking:
        item = items[index]
        assert at_jump or item is not None, f"an open item before {event}"
        assert item is None or _is_broken_off(item), f"a whole item was taken back: {item}"
    return lacking


def _is_broken_off(item: Event) -> bool:
    """Whether a recovery may leave this item out. Lists have no status."""
    match item["type"]:
        case "reasoning":
            return True
        case "mcp_list_tools":
            return bool(item.get("error"))
        case "compaction":
            return not item["encrypted_content"]
    return bool(item["status"] == "incomplete")


def _renumbered(seen: Sequence[Event]) -> list[Event]:
    """The events, numbered as if those that were left out had never been sent."""
    indexes = sorted({event["output_index"] for event in seen if "output_index" in event})
    places = {index: {"output_index": place} for place, index in enumerate(indexes)}
    return [
        {**event, **places.get(event.get("output_index", -1), {}), "sequence_number": number}
        for number, event in enumerate(seen)
    ]


def text_of(response: Mapping[str, Any]) -> str:
    """All text of a response."""
    parts = [part for item in response["output"] for part in item.get("content") or []]
    return "".join(part.get("text", "") for part in parts)


def rounds_of(text: str) -> list[int]:
    """The numbers of the rounds in a text of `repeat`; a gap or a repetition shows a loss or a duplicate."""
    return [int(number) for number in re.findall(r"w(\d+) ", text)]


def closed_as(seen: Sequence[Event]) -> list[str | None]:
    """How each item was closed; a list of tools has no status."""
    return [event["item"].get("status") for event in seen if event["type"] == "response.output_item.done"]
