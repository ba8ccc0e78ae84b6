"""Limits of one run, as requests, prompts, agents and the catalog state them."""

from typing import Annotated

from msgspec import Meta, Struct

COUNT_MAX = 2**53
AMOUNT_MAX = 1_000_000_000
COST_MIN = 1e-12
"""The unit of costs: what is less would be none."""


class RunLimits(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What a run may use over all its turns; None for no limit. `tokens` are those of input and output; `cost` is in the catalog's
    currency."""

    tokens: Annotated[int, Meta(ge=1, le=COUNT_MAX)] | None = None
    tool_calls: Annotated[int, Meta(ge=1, le=COUNT_MAX)] | None = None
    tool_seconds: Annotated[float, Meta(gt=0, le=AMOUNT_MAX)] | None = None
    cost: Annotated[float, Meta(ge=COST_MIN, le=AMOUNT_MAX)] | None = None
