"""Ids: a prefix that names the kind, 48 bits of time, 96 random bits.

The time comes first, so new rows land at the right edge of every index and ids sort by creation. The random bits make an
id unguessable, but not a capability: every lookup also takes the tenant.
"""

import itertools
import secrets
import time
from collections.abc import Callable

NewId = Callable[[str], str]
"""prefix → a new id; an argument of everything pure that makes items."""


def new_id(prefix: str) -> str:
    """A new id such as `resp_0192…` (prefix, `_`, 36 hex digits)."""
    return f"{prefix}_{time.time_ns() // 1_000_000:012x}{secrets.token_hex(12)}"


TIME_DIGITS = 12


def seconds_of(id: str) -> int | None:
    """When an id was made, in unix seconds; None if it is not an id of ours."""
    digits = id.partition("_")[2][:TIME_DIGITS]
    if len(digits) < TIME_DIGITS or not set(digits) <= set("0123456789abcdef"):
        return None
    return int(digits, 16) // 1000


ID_DIGITS = 36
NUMBER_DIGITS = 4


def siblings() -> NewId:
    """Ids for things that are made together, in their order: they differ in prefixes and last digits only."""
    stem = new_id("")[:-NUMBER_DIGITS]
    numbers = itertools.count()
    return lambda prefix: f"{prefix}{stem}{next(numbers):0{NUMBER_DIGITS}x}"


def are_siblings(one: str, other: str) -> bool:
    """Whether two ids are of things that were made together."""
    return bool(_stem(one)) and _stem(one) == _stem(other)


def place_among_siblings(id: str) -> str:
    """A sort key for ids of things that were made together."""
    return id.partition("_")[2][:ID_DIGITS]


def rest_of(id: str) -> str:
    """What follows the digits of an id, such as a signature."""
    return id.partition("_")[2][ID_DIGITS:]


def _stem(id: str) -> str:
    return place_among_siblings(id)[:-NUMBER_DIGITS]
