"""Pages of lists: as many rows as were asked for, unless their bytes end the page before."""

from typing import Generic, TypeVar

from msgspec import Struct

from app.ids import seconds_of
from app.storage.database import storable
from app.wire.requests import Order

T = TypeVar("T")

BYTES_MAX = 2**62
"""No bound."""


class Page(Struct, Generic[T], frozen=True):
    """Rows of a list, in its order."""

    rows: list[T]
    has_more: bool
    """Whether others follow."""


def id_range(prefix: str, after: str | None, order: Order) -> dict[str, str] | None:
    """The binds `from_id` and `to_id` that a page's ids are between: all with this prefix (`file_`), or those after the cursor, whose
    thing may be gone. Ids begin with the time, so they are in the order of creation. None for a cursor that is no such id."""
    if after is not None and not (after.startswith(prefix) and seconds_of(after) is not None and storable(after)):
        return None
    first, last = prefix, f"{prefix}g"  # what follows the prefix are hex digits
    if order == "desc":
        return {"from_id": first, "to_id": after or last}
    return {"from_id": after or first, "to_id": last}


SHOWN = """
    shown as (
        select * from page
        where number between 1 and cast(:limit as bigint) and (number = 1 or bytes <= cast(:page_bytes as bigint))
    ), whole as (
        select coalesce(max(number), 0) as last, coalesce(max(bytes), 0) as bytes from shown
    )
"""
"""What is shown of a `page`, whose rows have a number, from 1 on, and the bytes of all up to themselves; at least one is."""
