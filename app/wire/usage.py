"""Usage: what clients ask for, and what they get."""

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

Group = Literal["day", "model", "key", "user"]
"""What a report groups by."""


class GroupUsage(Struct, kw_only=True):
    """What a group of runs has used; `id` is the cursor of what follows. What the report does not group by is absent; a run without a
    key or a user has null. `cost` is an exact decimal number."""

    id: str
    object: Literal["usage"] = "usage"
    tenant: str | UnsetType = UNSET
    day: str | UnsetType = UNSET
    model: str | UnsetType = UNSET
    key_id: str | UnsetType | None = UNSET
    user: str | UnsetType | None = UNSET
    runs: int
    tool_calls: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    reasoning_tokens: int
    cost: str
    currency: str


COLUMNS = tuple(name for name in GroupUsage.__struct_fields__ if name not in {"id", "object"})
"""Of a table: those that are absent are left out."""

TEXTS = frozenset({"tenant", "day", "model", "key_id", "user", "currency"})
"""Columns that are no numbers."""
