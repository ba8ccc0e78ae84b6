"""What tokens cost. A cost is a whole number of trillionths of the currency, so sums of costs are exact."""

from collections.abc import Iterator
from decimal import Decimal

from msgspec import Struct

from app.wire.chat import ChatUsage

COST_DECIMALS = 12
"""Decimals of the currency that a cost has."""

PRICE_DECIMALS = 6
PRICE_MAX = 10**9
TOKENS_PRICED = 10**6
"""A price is that of so many tokens."""


class Prices(Struct, frozen=True, forbid_unknown_fields=True):
    """Prices of a million tokens, in the catalog's currency. Tokens of reasoning are output; without `cached_input` cached tokens cost
    as much as others."""

    input: Decimal
    output: Decimal
    cached_input: Decimal | None = None

    def faults(self, at: str = "prices") -> Iterator[str]:
        """What is wrong with them; `at` is their path."""
        for name in self.__struct_fields__:
            price: Decimal | None = getattr(self, name)
            if price is not None and not _is_price(price):
                yield f"'{at}.{name}' is no number from 0 to {PRICE_MAX:,} with at most {PRICE_DECIMALS} decimals"

    def cost(self, used: ChatUsage) -> int:
        """What a turn costs that has used so much."""
        read, made = used.prompt_tokens or 0, used.completion_tokens or 0
        details = used.prompt_tokens_details
        cached = min((details and details.cached_tokens) or 0, read)
        cached_price = self.input if self.cached_input is None else self.cached_input
        return (read - cached) * _of_one(self.input) + cached * _of_one(cached_price) + made * _of_one(self.output)

    def least_cost(self, tokens: int) -> int:
        """What so many tokens of input cost at least: if they are cached."""
        return tokens * _of_one(min(self.input, self.input if self.cached_input is None else self.cached_input))


def _is_price(price: Decimal) -> bool:
    return price.is_finite() and 0 <= price <= PRICE_MAX and price == round(price, PRICE_DECIMALS)


def _of_one(price: Decimal) -> int:
    """The cost of one token."""
    return int(price.scaleb(COST_DECIMALS)) // TOKENS_PRICED


def amount(cost: int) -> str:
    """A cost as an amount of money, such as `0.00021`."""
    whole, part = divmod(cost, 10**COST_DECIMALS)
    return f"{whole}.{part:0{COST_DECIMALS}}".rstrip("0").rstrip(".")
