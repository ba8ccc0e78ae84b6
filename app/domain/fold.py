"""Events → response.

`apply` folds at item borders: on the hot path that is all that is needed, since an item's last event carries the whole item.
`replay` folds every delta as well. It is the oracle of the tests: whatever way the events come to a client, putting them
together gives the response that is stored.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from msgspec.structs import replace

from app.wire.events import Event, ItemDone, Lifecycle
from app.wire.resources import Response


def apply(response: Response, event: Event) -> Response:
    """The response after one event of its run."""
    if isinstance(event, ItemDone):
        return replace(response, output=[*response.output, event.item])
    if isinstance(event, Lifecycle):
        return event.response
    return response


def replay(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The response that a client puts together from decoded events, delta by delta.

    Raises AssertionError where the events contradict each other: a gap in the numbers, a delta for an item or part that is
    not open, a `done` that differs from its deltas, anything after the end.
    """
    response: dict[str, Any] = {}
    items: dict[int, dict[str, Any]] = {}
    ended = False
    for number, event in enumerate(events):
        assert event["sequence_number"] == number, f"expected number {number}: {event}"
        assert not ended, f"after the end: {event}"
        kind = event["type"].removeprefix("response.")
        if "response" in event:
            assert not response or response["id"] == event["response"]["id"]
            response = event["response"]
            ended = response["status"] not in {"queued", "in_progress"}
        elif kind == "output_item.added":
            assert event["output_index"] == len(items), f"out of order: {event}"
            items[event["output_index"]] = {"item": event["item"], "open": {}, "done": False}
        else:
            _replay_item(kind, event, items[event["output_index"]])
    assert ended, "the stream broke off"
    made = [items[index]["item"] for index in sorted(items)]
    assert all(state["done"] for state in items.values()), "an item was never closed"
    assert made == response["output"], f"{made} != {response['output']}"
    return response


_DELTAS = {
    "output_text": "text",
    "refusal": "refusal",
    "reasoning_text": "text",
    "reasoning_summary_text": "text",
    "function_call_arguments": "arguments",
    "custom_tool_call_input": "input",
}
"""Kind of delta → the key of its whole text."""


def _replay_item(kind: str, event: Mapping[str, Any], state: dict[str, Any]) -> None:
    item = state["item"]
    assert not state["done"], f"after the item's end: {event}"
    if kind == "output_item.done":
        _replay_done(event["item"], state)
        return
    assert event["item_id"] == item["id"], f"another item's: {event}"
    of, _, what = kind.rpartition(".")
    where = (("summary" if "summary" in of else "content"), event.get("summary_index", event.get("content_index")))
    if what == "added":
        assert where not in state["open"]
        state["open"][where] = ""
    elif of in _DELTAS and what == "delta":
        state["open"][where] = state["open"].get(where, "" if where[1] is None else None) + event["delta"]
    elif of in _DELTAS:
        assert event[_DELTAS[of]] == state["open"].get(where, ""), f"differs from its deltas: {event}"
    else:
        said = event["part"].get("text", event["part"].get("refusal"))
        assert said == state["open"][where], f"differs from its deltas: {event}"
        item.setdefault(where[0], []).append(event["part"])


def _replay_done(done: Mapping[str, Any], state: dict[str, Any]) -> None:
    item = state["item"]
    assert (done["id"], done["type"], done.get("call_id")) == (item["id"], item["type"], item.get("call_id"))
    for key in ("content", "summary"):
        assert done.get(key, []) == item.get(key, []), f"{key} differs: {done} {item}"
    for key in ("arguments", "input"):
        if key in done:
            assert done[key] == state["open"].get(("content", None), ""), f"{key} differs: {done}"
    state["item"], state["done"] = done, True
