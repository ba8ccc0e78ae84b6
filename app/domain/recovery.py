"""What a run has said so far → how another owner goes on with it.

The item that was being said is closed as `incomplete` and left out of the response's output: that is the one shape of a
recovered stream that the official client's accumulator takes. Items that were done stay, and the model goes on from there; but
for reasoning behind which nothing was done: the turn that it belongs to is made anew, and brings its own. A call of ours that
had begun and has no end may have been made: it is not made again, but ends as failed, and stays.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Raw, Struct

from app.domain.tools.table import SERVER_TOOLS
from app.wire.events import (
    ArgumentsDone,
    CustomInputDone,
    Entry,
    Event,
    ItemDone,
    PartDone,
    ReasoningDone,
    RefusalDone,
    SummaryDone,
    SummaryPartDone,
    TextDone,
    progress,
)
from app.wire.items import decode_stored_item


class Recovered(Struct, frozen=True):
    """Where to go on."""

    next_number: int
    next_output_index: int
    done: list[Raw]
    """The items that were done."""
    closing: list[Event]
    """What closes the items that were not."""
    ending: list[Event]
    """Those of them that end calls."""
    output: list[Raw]
    """What the next attempt goes on from: items that were done, and the calls that end now."""
    call_ids: set[str]
    """Of every call, also of those that were left out."""


class _Item(Struct):
    type: str = "message"
    call_id: str | None = None


class _Said(Struct):
    """The fields of any event that matter here."""

    type: str
    sequence_number: int
    output_index: int | None = None
    content_index: int | None = None
    summary_index: int | None = None
    delta: str | None = None
    item: Raw = Raw()
    part: Raw = Raw()
    annotation: Raw = Raw()
    response: "_Snapshot | None" = None


class _Snapshot(Struct):
    output: list[Raw] = []


NO_PART = ("", 0)
"""Where the arguments of a call are said."""

_SAID = msgspec.json.Decoder(_Said)
_ITEM = msgspec.json.Decoder(_Item)
_OBJECT = msgspec.json.Decoder(dict[str, Any])


def recover(entries: Sequence[Entry]) -> Recovered:
    """`entries` are all events so far that are known, in order."""
    done: list[Raw] = []
    open_items: dict[int, _OpenItem] = {}
    call_ids: set[str] = set()
    number = output_index = -1
    for entry in entries:
        said = _SAID.decode(entry.body)
        number = said.sequence_number
        if said.output_index is not None:
            output_index = max(output_index, said.output_index)
        if said.response is not None:
            done, open_items = list(said.response.output), {}
        elif said.output_index is None:
            continue
        elif said.type == "response.output_item.added":
            open_items[said.output_index] = _OpenItem(said.output_index, _OBJECT.decode(said.item))
            if call_id := _ITEM.decode(said.item).call_id:
                call_ids.add(call_id)
        elif said.type == "response.output_item.done":
            done.append(said.item.copy())
            open_items.pop(said.output_index, None)
        elif said.output_index in open_items:
            open_items[said.output_index].take(said)
    closing = [(item, item.close()) for _, item in sorted(open_items.items())]
    ending = [event for item, events in closing if item.is_call for event in events]
    return Recovered(
        next_number=number + 1,
        next_output_index=output_index + 1,
        done=done,
        closing=[event for _, events in closing for event in events],
        ending=ending,
        output=_behind_which_something_was_done(
            [*done, *(event.item for event in ending if isinstance(event, ItemDone))]
        ),
        call_ids=call_ids,
    )


def _behind_which_something_was_done(items: list[Raw]) -> list[Raw]:
    """Without the reasoning at the end."""
    reasoning = itertools.takewhile(lambda item: _ITEM.decode(item).type == "reasoning", reversed(items))
    return items[: len(items) - len(list(reasoning))]


class _OpenItem:
    """An item that was added and not done."""

    def __init__(self, output_index: int, item: dict[str, Any]) -> None:
        self._item = item
        self._at: dict[str, Any] = {"output_index": output_index, "item_id": item["id"]}
        self._said: dict[tuple[str, int], list[str]] = {}
        """The deltas of each part, or of what has none."""
        self._parts: dict[tuple[str, int], dict[str, Any]] = {}
        self._done: set[tuple[str, int]] = set()

    @property
    def is_call(self) -> bool:
        """Whether it is a call of ours."""
        return self._item["type"] in SERVER_TOOLS

    def take(self, said: _Said) -> None:
        where = (
            ("summary", said.summary_index) if said.summary_index is not None else ("content", said.content_index or 0)
        )
        if said.type.endswith("part.added"):
            self._parts[where] = _OBJECT.decode(said.part)
        elif said.type.endswith("part.done"):
            self._parts[where] = _OBJECT.decode(said.part)
            self._done.add(where)
            self._said.pop(where, None)
        elif said.type.endswith("annotation.added"):
            self._parts[where]["annotations"].append(_OBJECT.decode(said.annotation))
        elif said.delta is not None:
            self._said.setdefault(where if where in self._parts else NO_PART, []).append(said.delta)

    @property
    def _text(self) -> str:
        return "".join(self._said.get(NO_PART, ()))

    def close(self) -> list[Event]:
        if self.is_call:
            return self._close_call()
        for where, part in self._parts.items():
            part["refusal" if part["type"] == "refusal" else "text"] += "".join(self._said.get(where, ()))
        events: list[Event] = []
        for where, part in self._parts.items():
            if where not in self._done:
                events += self._close_part(where, part)
        item = {**self._item, **({"status": "incomplete"} if "status" in self._item else {})}
        for name in ("content", "summary"):
            parts = [part for (kind, _), part in sorted(self._parts.items()) if kind == name]
            if parts or name in item:
                item[name] = parts
        match item["type"]:
            case "function_call":
                item["arguments"] = self._text
                events.append(ArgumentsDone(**self._at, name=item["name"], arguments=self._text))
            case "custom_tool_call":
                item["input"] = self._text
                events.append(CustomInputDone(**self._at, input=self._text))
            case "mcp_list_tools":
                item["error"] = "The run broke off before the server had answered."
                events += progress("mcp_list_tools", "failed", **self._at)
        return [*events, ItemDone(output_index=self._at["output_index"], item=Raw(msgspec.json.encode(item)))]

    def _close_call(self) -> list[Event]:
        tool = SERVER_TOOLS[self._item["type"]]
        streamed = {tool.streamed: self._text} if tool.streamed else {}
        item = decode_stored_item(msgspec.json.encode({**self._item, **streamed}))
        return tool.close_unknown(item, self._at["output_index"])

    def _close_part(self, where: tuple[str, int], part: dict[str, Any]) -> list[Event]:
        kind, index = where
        if kind == "summary":
            at = {**self._at, "summary_index": index}
            return [SummaryDone(**at, text=part["text"]), SummaryPartDone(**at, part=part)]
        at = {**self._at, "content_index": index}
        done: Event
        match part["type"]:
            case "refusal":
                done = RefusalDone(**at, refusal=part["refusal"])
            case "reasoning_text":
                done = ReasoningDone(**at, text=part["text"])
            case _:
                done = TextDone(**at, text=part["text"], logprobs=part.get("logprobs") or [])
        return [done, PartDone(**at, part=part)]
