"""Pages of lists: as many rows as were asked for, unless their bytes end the page before."""

from typing import Generic, TypeVar

from msgspec import Struct

T = TypeVar("T")

BYTES_MAX = 2**62
"""No bound."""


class Page(Struct, Generic[T], frozen=True):
    """Rows of a list, in its order."""

    rows: list[T]
    has_more: bool
    """Whether others follow."""


SHOWN = """
    shown as (
        select * from page
        where number between 1 and cast(:limit as bigint) and (number = 1 or bytes <= cast(:page_bytes as bigint))
    ), whole as (
        select coalesce(max(number), 0) as last, coalesce(max(bytes), 0) as bytes from shown
    )
"""
"""What is shown of a `page`, whose rows have a number, from 1 on, and the bytes of all up to themselves; at least one is."""
