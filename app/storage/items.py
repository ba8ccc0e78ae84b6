"""Items as rows: their positions within a response, and their ids."""

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Raw, Struct

from app.storage.tables import OUTPUT_POSITION


class _HasId(Struct):
    id: str


_HAS_ID = msgspec.json.Decoder(_HasId)


def item_rows(input_items: Sequence[tuple[str, bytes]], output: Sequence[Raw]) -> dict[str, Any]:
    """The binds of a response's items: its input (id, JSON), then its output; and what they take in all."""
    rows = [(position, id, body) for position, (id, body) in enumerate(input_items)]
    rows += [(OUTPUT_POSITION + index, _HAS_ID.decode(raw).id, bytes(raw)) for index, raw in enumerate(output)]
    return {
        "positions": [position for position, _, _ in rows],
        "item_ids": [id for _, id, _ in rows],
        "bodies": [body.decode() for _, _, body in rows],
        "own_bytes": sum(len(body) for _, _, body in rows),
    }
