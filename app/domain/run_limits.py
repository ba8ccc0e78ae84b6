"""What is left of a run's limits: the reason for which it takes no more turns, and how long the output of the next may be."""

from collections.abc import Iterator
from decimal import Decimal

from msgspec import Struct

from app.domain.prices import COST_DECIMALS, Prices
from app.domain.spending import Spent
from app.errors import InvalidParameter
from app.wire.chat import ChatUsage
from app.wire.resources import Reason
from app.wire.run_limits import RunLimits

NO_LIMITS = RunLimits()

OF_RUN: frozenset[Reason] = frozenset({"max_run_tokens", "max_run_cost"})
"""The reasons for which a turn is cut off that would not be by `max_output_tokens`."""


class Cap(Struct, frozen=True):
    """The most tokens that a turn may put out, and the limit from which that follows."""

    tokens: int
    reason: Reason


def refuse_higher(asked: RunLimits | None, ceiling: RunLimits | None) -> None:
    """Raises InvalidParameter for more than the catalog allows."""
    for name, value, most in _both(asked or NO_LIMITS, ceiling or NO_LIMITS):
        if value is not None and most is not None and value > most:
            raise InvalidParameter(
                f"'run_limits.{name}' is {value:.12g}, and this model allows at most {most:.12g}.",
                param=f"run_limits.{name}",
            )


def refuse_approved(calls: int, limits: RunLimits) -> None:
    """Raises InvalidParameter for more approved calls than the run may make: an approval is used once."""
    if limits.tool_calls is not None and calls > limits.tool_calls:
        raise InvalidParameter(
            f"{calls} calls are approved, and 'run_limits.tool_calls' is {limits.tool_calls}.",
            param="run_limits.tool_calls",
        )


def lower(one: RunLimits | None, other: RunLimits | None) -> RunLimits:
    """The lower of each limit."""
    pairs = _both(one or NO_LIMITS, other or NO_LIMITS)
    given = {name: [limit for limit in limits if limit is not None] for name, *limits in pairs}
    return RunLimits(**{name: min(limits) for name, limits in given.items() if limits})  # type: ignore[arg-type]


def _both(one: RunLimits, other: RunLimits) -> Iterator[tuple[str, float | None, float | None]]:
    for name in RunLimits.__struct_fields__:
        yield name, getattr(one, name), getattr(other, name)


def reached(limits: RunLimits, spent: Spent) -> Reason | None:
    """Why a run that has used so much takes no further turn; None if it does."""
    if limits.tokens is not None and spent.tokens >= limits.tokens:
        return "max_run_tokens"
    if limits.cost is not None and spent.cost >= _cost(limits.cost):
        return "max_run_cost"
    if limits.tool_seconds is not None and spent.tool_s >= limits.tool_seconds:
        return "max_tool_seconds"
    return None


def cap(limits: RunLimits, spent: Spent, repeated: ChatUsage | None, prices: Prices | None) -> Cap | None:
    """What limits the output of the next turn; None if nothing does. It may be no token at all: then the turn is not to be made.

    `repeated` is the usage of the turn before, whose input and output the next one reads again.
    """
    prompt = (repeated.prompt_tokens or 0) + (repeated.completion_tokens or 0) if repeated else 0
    caps: list[Cap] = []
    if limits.tokens is not None:
        caps.append(Cap(max(limits.tokens - spent.tokens - prompt, 0), "max_run_tokens"))
    of_output = prices.cost(ChatUsage(0, 1)) if prices else 0
    if limits.cost is not None and prices and of_output:
        left = _cost(limits.cost) - spent.cost - prices.least_cost(prompt)
        caps.append(Cap(max(left // of_output, 0), "max_run_cost"))
    return min(caps, key=lambda one: one.tokens, default=None)


def _cost(amount: float) -> int:
    return int(Decimal(repr(amount)).scaleb(COST_DECIMALS))
