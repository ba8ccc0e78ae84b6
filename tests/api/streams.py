"""Reading an event stream byte by byte: what clients that are not the official one see."""

from collections.abc import Iterable
from typing import Any

import httpx
import msgspec


def events_of(answer: httpx.Response) -> list[dict[str, Any]]:
    """The events of a whole stream; asserts what every stream must hold: frames of `event:` and `data:`, then `[DONE]`."""
    assert answer.status_code == 200, answer.read()
    *frames, done, rest = answer.read().decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    events = []
    for frame in frames:
        if frame.startswith(":"):
            continue
        event, data = frame.split("\n")
        events.append(msgspec.json.decode(data.removeprefix("data: ")))
        assert event == f"event: {events[-1]['type']}"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def types_of(events: Iterable[dict[str, Any]]) -> list[str]:
    """The types in order, without `response.`; the same delta many times is one."""
    types: list[str] = []
    for event in events:
        name = event["type"].removeprefix("response.")
        if not (name.endswith(".delta") and types and types[-1] == name):
            types.append(name)
    return types
