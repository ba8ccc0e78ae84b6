"""The oracle of the tests: folds events into a response, as a client does, delta by delta.

The result must be the stored response, however the events reached the client.
"""

from collections.abc import Iterable, Mapping
from typing import Any


def replay(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The response that a client folds from decoded events, delta by delta.

    Raises AssertionError where the events contradict each other: a gap in the numbers, a delta for an item or part that is
    not open, a `done` that is missing or differs from its deltas, anything before the beginning or after the end.
    """
    response: dict[str, Any] = {}
    items: list[_Item] = []
    ended = False
    for number, event in enumerate(events):
        kind = event["type"].removeprefix("response.")
        assert event["sequence_number"] == number, f"expected number {number}: {event}"
        assert (number == 0) == (kind == "created"), f"another beginning: {event}"
        assert not ended, f"after the end: {event}"
        if "response" in event:
            assert number == 0 or response["id"] == event["response"]["id"], f"another response: {event}"
            response = event["response"]
            ended = response["status"] not in {"queued", "in_progress"}
            done = [item.fields for item in items if item.is_done]
            assert ended or response["output"] == done, f"other than its items: {event}"
        elif kind == "output_item.added":
            assert event["output_index"] == len(items), f"out of order: {event}"
            items.append(_Item(event["item"]))
        else:
            assert event["output_index"] < len(items), f"no such item: {event}"
            items[event["output_index"]].take(kind, event)
    assert ended, "the stream broke off"
    assert all(item.is_done for item in items), "an item was never closed"
    made = [item.fields for item in items]
    assert made == response["output"], f"{made} != {response['output']}"
    return response


_PARTS = {"content_part": "content", "reasoning_summary_part": "summary"}
"""Kind of part event → the item's list that the part belongs to."""

_PROGRESS = frozenset(
    f"{call}.{moment}"
    for call in "mcp_list_tools mcp_call web_search_call file_search_call code_interpreter_call image_generation_call".split()
    for moment in "in_progress searching interpreting generating completed failed".split()
) | {"compaction.compacting"}
"""Kinds of event that only report the progress of an item."""

_TEXTS = {
    "output_text": ("content", "output_text", "text"),
    "refusal": ("content", "refusal", "refusal"),
    "reasoning_text": ("content", "reasoning_text", "text"),
    "reasoning_summary_text": ("summary", "summary_text", "text"),
    "function_call_arguments": ("arguments", None, "arguments"),
    "custom_tool_call_input": ("input", None, "input"),
    "mcp_call_arguments": ("arguments", None, "arguments"),
    "code_interpreter_call_code": ("code", None, "code"),
}
"""Kind of delta → the item's key that it grows, the type of its part, the key of its whole text."""


class _Text:
    """A text that grows: that of a part, or a call's arguments."""

    def __init__(self, type: str | None) -> None:
        self.type, self.content, self.is_whole = type, "", False
        self.annotations: list[Any] = []


class _Item:
    """An item that a client folds."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.fields: dict[str, Any] = dict(fields)
        self.is_done = False
        self.commands: list[str] = []
        self.outputs: list[Any] = []
        self._texts: dict[tuple[str, int | None], _Text] = {}
        self._parts: dict[str, list[Any]] = {"content": [], "summary": []}

    def take(self, kind: str, event: Mapping[str, Any]) -> None:
        """One event of this item, other than its beginning."""
        assert not self.is_done, f"after the item's end: {event}"
        of, _, what = kind.rpartition(".")
        if kind == "output_item.done":
            self._end(event["item"])
            return
        if of == "shell_call_command":
            self._take_command(what, event)
            return
        assert event["item_id"] == self.fields["id"], f"another item's: {event}"
        if kind == "shell_call_output_content.done":
            self.outputs += event["output"]
        elif kind in _PROGRESS:
            assert kind.startswith(self.fields["type"]), f"another type's: {event}"
        elif kind == "output_text.annotation.added":
            self._take_annotation(event)
        elif of in _PARTS:
            self._take_part(_PARTS[of], what, event)
        else:
            assert of in _TEXTS, f"unknown: {event}"
            self._take_text(of, what, event)

    def _take_part(self, key: str, what: str, event: Mapping[str, Any]) -> None:
        part, where = event["part"], (key, _index(key, event))
        if what == "added":
            assert where[1] == len(self._parts[key]), f"out of order: {event}"
            assert where not in self._texts, f"twice: {event}"
            self._texts[where] = _Text(part["type"])
            return
        text = self._texts.get(where)
        assert text is not None, f"no such part: {event}"
        assert text.is_whole, f"its text is not done: {event}"
        content = part.get("text", part.get("refusal"))
        assert (part["type"], content) == (text.type, text.content), f"differs from its deltas: {event}"
        assert part.get("annotations", []) == text.annotations, f"differs from its annotations: {event}"
        self._parts[key].append(part)

    def _take_command(self, what: str, event: Mapping[str, Any]) -> None:
        index = event["command_index"]
        if what == "added":
            assert index == len(self.commands), f"out of order: {event}"
            self.commands.append("")
        elif what == "delta":
            self.commands[index] += event["delta"]
        else:
            assert event["command"] == self.commands[index], f"differs from its deltas: {event}"

    def _take_annotation(self, event: Mapping[str, Any]) -> None:
        text = self._texts.get(("content", event["content_index"]))
        assert text is not None, f"no such part: {event}"
        assert event["annotation_index"] == len(text.annotations), f"out of order: {event}"
        text.annotations.append(event["annotation"])

    def _take_text(self, of: str, what: str, event: Mapping[str, Any]) -> None:
        key, type_, whole = _TEXTS[of]
        where = (key, _index(key, event))
        if type_ is None:
            self._texts.setdefault(where, _Text(None))
        text = self._texts.get(where)
        assert text is not None, f"no such part: {event}"
        assert text.type == type_, f"another kind of part: {event}"
        assert not text.is_whole, f"after the text's end: {event}"
        if what == "delta":
            text.content += event["delta"]
        else:
            assert event[whole] == text.content, f"differs from its deltas: {event}"
            text.is_whole = True

    def _end(self, done: Mapping[str, Any]) -> None:
        begun = self.fields
        assert (done["id"], done["type"], done.get("call_id")) == (begun["id"], begun["type"], begun.get("call_id"))
        for key, parts in self._parts.items():
            assert done.get(key, []) == parts, f"{key} differs: {done} {parts}"
        for key in ("arguments", "input", "code"):
            text = self._texts.get((key, None))
            assert text is None or text.is_whole, f"{key} is not done: {done}"
            assert done.get(key) == (text.content if text else begun.get(key)), f"{key} differs: {done}"
        if done["type"] == "shell_call":
            assert done["action"]["commands"] == self.commands, f"commands differ: {done}"
        if done["type"] == "shell_call_output":
            assert done["output"] == self.outputs, f"outputs differ: {done}"
        self.fields, self.is_done = dict(done), True


def _index(key: str, event: Mapping[str, Any]) -> int | None:
    index: int | None = event.get("summary_index" if key == "summary" else "content_index")
    return index
