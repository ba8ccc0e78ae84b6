"""Compares the results of two runs of one script: equal but for ids, times and sealed text."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

ID = re.compile(r"^(resp|msg|rs|fc|fco|ctc|ctco|cmp|call|sh|lsh|apc|cu|tsc)_[0-9a-f]{36}$")
TIMES = frozenset({"created_at", "completed_at"})


class Same:
    """Ids become their prefix and the number of their first appearance."""

    def __init__(self) -> None:
        """Start without ids."""
        self._ids: dict[str, str] = {}

    def of(self, value: Any, key: str = "") -> Any:
        """The value with what differs between runs replaced."""
        if isinstance(value, dict):
            return {name: self.of(inner, name) for name, inner in value.items()}
        if isinstance(value, list):
            return [self.of(inner) for inner in value]
        if key == "encrypted_content":
            return f"sealed: {type(value).__name__}"
        if key in TIMES and value is not None:
            return "some time"
        if isinstance(value, str) and (found := ID.match(value)):
            return self._ids.setdefault(value, f"{found[1]} {len(self._ids)}")
        return value


def same(value: Any) -> Any:
    """A response that can be compared with that of another run."""
    return Same().of(value)


def comparable(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Events that can be compared with those of another run."""
    seen = Same()
    return [seen.of(event) for event in events]


def joined(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same without numbers, all deltas of a text as one where it begins: how many there are is the split's."""
    made: list[dict[str, Any]] = []
    begun: dict[tuple[Any, ...], dict[str, Any]] = {}
    for event in comparable(events):
        del event["sequence_number"]
        text = (event["type"], event.get("item_id"), event.get("content_index"), event.get("summary_index"))
        if event["type"].endswith(".delta") and text in begun:
            begun[text]["delta"] += event["delta"]
        else:
            begun[text] = event
            made.append(event)
    return made
