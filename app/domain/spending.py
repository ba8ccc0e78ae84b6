"""What a run has used so far: tokens, money, calls of tools."""

from collections.abc import Sequence

import msgspec
from msgspec import Raw, Struct
from msgspec.structs import replace

from app.domain.lifecycle import add_usage
from app.domain.prices import Prices
from app.domain.tools.table import SERVER_TOOLS, tool_of
from app.wire.chat import ChatUsage, CompletionTokensDetails, PromptTokensDetails
from app.wire.items import decode_stored_item
from app.wire.odd_chunks import COUNT_MAX
from app.wire.resources import Usage


class Spent(Struct, frozen=True, kw_only=True):
    """What is used, earlier owners of the run included."""

    usage: Usage | None = None
    """Of the finished turns and the summaries of reasoning; None while no upstream has reported any."""
    unlimited_output_tokens: int = 0
    """Of the output tokens, those that `max_output_tokens` does not limit: of compactions and summaries of reasoning."""
    cost: int = 0
    """By the prices that the catalog had when a turn was made."""
    tool_s: float = 0.0
    """How long calls of tools have taken, each by itself."""

    @property
    def tokens(self) -> int:
        """Of input and output."""
        return self.usage.input_tokens + self.usage.output_tokens if self.usage else 0


NOTHING_SPENT = Spent()


def spend(spent: Spent, reported: ChatUsage | None, prices: Prices | None, *, is_limited: bool = True) -> Spent:
    """The same with what an upstream has reported; `is_limited` if `max_output_tokens` limits it. Without prices it costs nothing."""
    if reported is None or not reported.is_reported:
        return spent
    reported = _bounded(reported)
    unlimited = 0 if is_limited else reported.completion_tokens or 0
    return replace(
        spent,
        usage=add_usage(spent.usage, reported),
        unlimited_output_tokens=spent.unlimited_output_tokens + unlimited,
        cost=spent.cost + (prices.cost(reported) if prices else 0),
    )


def _bounded(used: ChatUsage) -> ChatUsage:
    """The same without numbers that no upstream can mean: they are added up with those of others."""
    read, made = used.prompt_tokens_details, used.completion_tokens_details
    return ChatUsage(
        prompt_tokens=_count(used.prompt_tokens),
        completion_tokens=_count(used.completion_tokens),
        total_tokens=_count(used.total_tokens),
        prompt_tokens_details=read and PromptTokensDetails(_count(read.cached_tokens), _count(read.cache_write_tokens)),
        completion_tokens_details=made and CompletionTokensDetails(_count(made.reasoning_tokens)),
    )


def _count(value: int | None) -> int | None:
    return None if value is None else min(max(value, 0), COUNT_MAX)


class _Item(Struct):
    type: str = "message"


_ITEM = msgspec.json.Decoder(_Item)


def tool_calls(output: Sequence[Raw]) -> int:
    """How many of the items are calls that this server makes."""
    candidates = (item for item in output if _ITEM.decode(item).type in SERVER_TOOLS)
    return sum(tool_of(decode_stored_item(item)) is not None for item in candidates)
