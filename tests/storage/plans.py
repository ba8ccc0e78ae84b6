"""What Postgres says of a plan that it has carried out."""

from collections.abc import Iterator
from typing import Any


def nodes(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A plan's node, and every one below it."""
    yield node
    for below in node.get("Plans", []):
        yield from nodes(below)


def looked_at(node: dict[str, Any]) -> int:
    """The rows that a scan has read, also those that it has dropped."""
    dropped = node.get("Rows Removed by Filter", 0) + node.get("Rows Removed by Index Recheck", 0)
    return int((node["Actual Rows"] + dropped) * node["Actual Loops"])
