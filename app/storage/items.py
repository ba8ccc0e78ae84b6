"""Items as rows: their positions within a response, their ids, and their bodies."""

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Raw, Struct

from app.storage.parts import SharedParts, long_strings
from app.storage.tables import OUTPUT_POSITION

INSERT = """
    insert into items (tenant_id, thread_id, turn, position, id, body, part_hashes, bytes)
    select :tenant_id, place.thread_id, place.turn, new.position, new.id, new.body, new.part_hashes, new.bytes
    from {place} place, unnest(
        cast(:positions as int[]), cast(:item_ids as text[]), cast(:bodies as json[]), cast(:item_part_hashes as bytea[]),
        cast(:item_bytes as int[])
    ) as new (position, id, body, part_hashes, bytes)
"""
"""Inserts items at a `place`: a row with a thread and a turn, or none."""


class _HasId(Struct):
    id: str


_HAS_ID = msgspec.json.Decoder(_HasId)


def item_rows(input_items: Sequence[tuple[str, bytes]], output: Sequence[Raw], parts: SharedParts) -> dict[str, Any]:
    """The binds of a response's items: its input (id, JSON), then its output; and what they take in all."""
    rows = [(position, id, body) for position, (id, body) in enumerate(input_items)]
    rows += [(OUTPUT_POSITION + index, _HAS_ID.decode(raw).id, bytes(raw)) for index, raw in enumerate(output)]
    bodies = [parts.take(body, long_strings(body)) for _, _, body in rows]
    return {
        "positions": [position for position, _, _ in rows],
        "item_ids": [id for _, id, _ in rows],
        "bodies": [body.text for body in bodies],
        "item_part_hashes": [body.part_hashes for body in bodies],
        "item_bytes": [body.bytes for body in bodies],
        "own_bytes": sum(len(body) for _, _, body in rows),
    }
