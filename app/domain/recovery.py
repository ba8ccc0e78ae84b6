"""A run's events so far → how another owner continues it.

An open item is closed as `incomplete` (`in_progress` if its type has no such status) and left out of the response's output: the
official client's accumulator takes no other shape of a recovered stream. Done items stay, and the model continues from them; except
reasoning at the end, because its turn is made again and brings its own. A server-run call without an end may have been made: it is not made again, ends as failed, and
stays.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Raw, Struct

from app.domain.client_tools import CUT_OFF_STATUSES, is_client_call
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
    """Where to continue."""

    next_number: int
    next_output_index: int
    done: list[Raw]
    """The items that were done."""
    closing: list[Event]
    """The events that close the others."""
    ending: list[Event]
    """Those of them that end server-run calls."""
    output: list[Raw]
    """What the next attempt continues: the items that were done, and the calls that end now."""
    call_ids: set[str]
    """Of every call, those that are left out too."""


class _Item(Struct):
    type: str = "message"
    call_id: str | None = None


class _Event(Struct):
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
"""The place of a call's arguments, which have no part."""

_EVENT = msgspec.json.Decoder(_Event)
_ITEM = msgspec.json.Decoder(_Item)
_OBJECT = msgspec.json.Decoder(dict[str, Any])


def recover(entries: Sequence[Entry]) -> Recovered:
    """`entries` are all known events, in order."""
    done: list[Raw] = []
    open_items: dict[int, _OpenItem] = {}
    call_ids: set[str] = set()
    number = output_index = -1
    for entry in entries:
        event = _EVENT.decode(entry.body)
        number = event.sequence_number
        if event.output_index is not None:
            output_index = max(output_index, event.output_index)
        if event.response is not None:
            done, open_items = list(event.response.output), {}
        elif event.output_index is None:
            continue
        elif event.type == "response.output_item.added":
            open_items[event.output_index] = _OpenItem(event.output_index, _OBJECT.decode(event.item))
            if call_id := _ITEM.decode(event.item).call_id:
                call_ids.add(call_id)
        elif event.type == "response.output_item.done":
            done.append(event.item.copy())
            open_items.pop(event.output_index, None)
        elif event.output_index in open_items:
            open_items[event.output_index].take(event)
    closing = [(item, item.close()) for _, item in sorted(open_items.items())]
    ending = [event for item, events in closing if item.is_call for event in events]
    return Recovered(
        next_number=number + 1,
        next_output_index=output_index + 1,
        done=done,
        closing=[event for _, events in closing for event in events],
        ending=ending,
        output=_without_last_reasoning([*done, *(event.item for event in ending if isinstance(event, ItemDone))]),
        call_ids=call_ids,
    )


def _without_last_reasoning(items: list[Raw]) -> list[Raw]:
    """The items without the reasoning at their end."""
    reasoning = itertools.takewhile(lambda item: _ITEM.decode(item).type == "reasoning", reversed(items))
    return items[: len(items) - len(list(reasoning))]


class _OpenItem:
    """An item that is added and not done."""

    def __init__(self, output_index: int, item: dict[str, Any]) -> None:
        self._item = item
        self._at: dict[str, Any] = {"output_index": output_index, "item_id": item["id"]}
        self._deltas: dict[tuple[str, int], list[str]] = {}
        """The deltas of each part, or of what has none."""
        self._parts: dict[tuple[str, int], dict[str, Any]] = {}
        self._done: set[tuple[str, int]] = set()

    @property
    def is_call(self) -> bool:
        """Whether it is a server-run call."""
        return self._item["type"] in SERVER_TOOLS and not is_client_call(self._item["type"], self._item)

    def take(self, event: _Event) -> None:
        where = (
            ("summary", event.summary_index)
            if event.summary_index is not None
            else ("content", event.content_index or 0)
        )
        if event.type.endswith("part.added"):
            self._parts[where] = _OBJECT.decode(event.part)
        elif event.type.endswith("part.done"):
            self._parts[where] = _OBJECT.decode(event.part)
            self._done.add(where)
            self._deltas.pop(where, None)
        elif event.type.endswith("annotation.added"):
            self._parts[where]["annotations"].append(_OBJECT.decode(event.annotation))
        elif event.delta is not None:
            self._deltas.setdefault(where if where in self._parts else NO_PART, []).append(event.delta)

    @property
    def _text(self) -> str:
        return "".join(self._deltas.get(NO_PART, ()))

    def close(self) -> list[Event]:
        if self.is_call:
            return self._close_call()
        for where, part in self._parts.items():
            part["refusal" if part["type"] == "refusal" else "text"] += "".join(self._deltas.get(where, ()))
        events: list[Event] = []
        for where, part in self._parts.items():
            if where not in self._done:
                events += self._close_part(where, part)
        cut_off = CUT_OFF_STATUSES.get(self._item["type"], "incomplete")
        item = {**self._item, **({"status": cut_off} if "status" in self._item else {})}
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
