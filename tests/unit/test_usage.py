"""Prices, what runs spend, and reports: exact sums, bounded numbers, tables that harm nobody."""

from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw
from msgspec.structs import replace

from app.domain.prices import Prices, amount
from app.domain.run_limits import cap, lower, reached, refuse_higher
from app.domain.spending import NOTHING_SPENT, Spent, spend, tool_calls
from app.domain.usage_report import as_csv, as_table, cursor, place_of
from app.errors import InvalidParameter
from app.storage.journal import _stored, read_spent
from app.wire.chat import ChatUsage, CompletionTokensDetails, PromptTokensDetails
from app.wire.run_limits import COST_MIN, RunLimits
from app.wire.usage import GroupUsage

PRICE = st.decimals(0, 10**9, places=6)
COUNT = st.integers(0, 2**53)


@given(PRICE, PRICE, PRICE | st.none(), COUNT, COUNT, COUNT)
def test_a_cost_is_exact(input: Decimal, output: Decimal, cached: Decimal | None, read: int, made: int, of_cache: int):
    used = ChatUsage(read, made, prompt_tokens_details=PromptTokensDetails(of_cache))
    prices = Prices(input, output, cached)
    assert list(prices.faults()) == []
    from_cache = min(of_cache, read)
    expected = (read - from_cache) * Fraction(input) + from_cache * Fraction(input if cached is None else cached)
    expected = (expected + made * Fraction(output)) / 10**6
    assert Fraction(prices.cost(used), 10**12) == expected == Fraction(amount(prices.cost(used)))


@pytest.mark.parametrize("price", ["-0.1", "NaN", "Infinity", "1000000000.1", "0.0000001", "1e30", "1e-99999"])
def test_what_is_no_price_is_a_fault(price: str):
    assert list(Prices(Decimal(1), Decimal(price)).faults()) == [
        "'prices.output' is no number from 0 to 1,000,000,000 with at most 6 decimals"
    ]


@pytest.mark.parametrize(
    ("cost", "shown"), [(0, "0"), (1, "0.000000000001"), (10**12, "1"), (15 * 10**11, "1.5"), (10**13, "10")]
)
def test_an_amount_has_no_zeros_at_its_end(cost: int, shown: str):
    assert amount(cost) == shown


def test_a_run_spends_what_its_turns_do_and_the_queue_keeps_it():
    prices = Prices(Decimal(1), Decimal("0.5"))
    spent = spend(NOTHING_SPENT, ChatUsage(10, 4), prices)
    spent = spend(spent, ChatUsage(1, 3, completion_tokens_details=CompletionTokensDetails(2)), None, is_limited=False)
    assert spend(spend(spent, None, prices), ChatUsage(), prices) is spent
    assert spent.usage
    assert (spent.usage.input_tokens, spent.usage.output_tokens, spent.usage.total_tokens) == (11, 7, 18)
    assert (spent.unlimited_output_tokens, spent.cost) == (3, 12 * 10**6)
    assert read_spent(_stored(spent)) == spent
    assert read_spent(_stored(NOTHING_SPENT)) == read_spent(None) == NOTHING_SPENT


def test_numbers_that_no_upstream_can_mean_are_bounded():
    spent = spend(NOTHING_SPENT, ChatUsage(-5, 2**80, None), Prices(Decimal(1), Decimal(1)))
    assert spent.usage
    assert (spent.usage.input_tokens, spent.usage.output_tokens) == (0, 2**53)


def test_calls_of_a_client_s_tools_are_not_this_server_s():
    items = [
        b'{"type":"mcp_call","id":"mcp_1","server_label":"box","name":"add","arguments":"{}"}',
        b'{"type":"function_call","id":"fc_1","call_id":"c","name":"f","arguments":"{}"}',
        b'{"type":"shell_call","id":"sh_1","call_id":"c","action":{"commands":["ls"]},"environment":{"type":"local"}}',
        b'{"type":"message","id":"msg_1","role":"assistant","status":"completed","content":[]}',
    ]
    assert tool_calls([Raw(item) for item in items]) == 1


# -- Reports ----------------------------------------------------------------------------------------------------------------


def row(**given: Any) -> GroupUsage:
    counted = dict.fromkeys(
        ("runs", "tool_calls", "input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens"), 1
    )
    return GroupUsage(id="x", **counted, cost="0.5", currency="EUR", **given)


def test_a_table_has_the_columns_that_its_rows_have_and_nothing_that_a_terminal_obeys():
    shown = as_table([row(model="a\x1b[2Jb", user=None), row(model="é", user="ada")])
    assert shown.splitlines() == [
        "model   user  runs  tool calls  input tokens  cached tokens  output tokens  reasoning tokens  cost  currency",
        "a\N{REPLACEMENT CHARACTER}[2Jb  -        1           1             1              1              1                 1   0.5  EUR",
        "é       ada      1           1             1              1              1                 1   0.5  EUR",
    ]


@pytest.mark.parametrize(
    "name", ["=1+1", "+1", "-1", "@SUM(A1)", "\tx", "\rx", "\n=1", " =1", "\N{FULLWIDTH EQUALS SIGN}1"]
)
def test_csv_has_no_formulas(name: str):
    assert as_csv([row(model=name)]).partition("\r\n")[2].strip('"').startswith("'")


@pytest.mark.parametrize("separator", [";", "\t", "\n", "|"])
def test_csv_has_no_formulas_for_who_separates_cells_in_another_way(separator: str):
    name = f"a{separator}=1{separator}-b-1"
    assert (
        as_csv([row(model=name)]).partition("\r\n")[2].lstrip('"').startswith(name.replace(separator, f"{separator}'"))
    )


def test_csv_has_names_without_formulas_as_they_are():
    assert as_csv([row(model="qwen3-8b;a=b@c")]).partition("\r\n")[2].startswith("qwen3-8b;a=b@c,")


@given(st.tuples(*[st.text()] * 5))
def test_a_cursor_is_read_again(place: tuple[str, ...]):
    assert place_of(cursor(place)) == place


@given(st.text())
def test_any_other_text_is_no_cursor(text: str):
    found = place_of(text)
    assert found is None or len(found) == 5


# -- Limits -----------------------------------------------------------------------------------------------------------------


LIMITS = st.builds(
    RunLimits,
    tokens=st.integers(1, 10**6) | st.none(),
    tool_calls=st.integers(1, 100) | st.none(),
    tool_seconds=st.floats(0.1, 1000) | st.none(),
    cost=st.floats(1e-6, 100) | st.none(),
)


@given(LIMITS, LIMITS)
def test_the_lower_limit_counts_and_a_higher_one_is_refused(asked: RunLimits, ceiling: RunLimits):
    found = lower(asked, ceiling)
    higher = []
    for name in RunLimits.__struct_fields__:
        one, most = getattr(asked, name), getattr(ceiling, name)
        given = [limit for limit in (one, most) if limit is not None]
        assert getattr(found, name) == min(given, default=None)
        higher += [f"run_limits.{name}"] if len(given) == 2 and one > most else []
    if higher:
        with pytest.raises(InvalidParameter) as caught:
            refuse_higher(asked, ceiling)
        assert caught.value.param in higher
    else:
        refuse_higher(asked, ceiling)


@given(LIMITS, st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**5), PRICE)
def test_a_turn_within_its_cap_stays_within_the_limits(
    limits: RunLimits, used: int, prompt: int, made: int, price: Decimal
):
    """If its prompt is what the turn before has read and made."""
    prices = Prices(price, price)
    spent = spend(NOTHING_SPENT, ChatUsage(used, 0), prices)
    before = ChatUsage(prompt, made)
    limit = cap(limits, spent, before, prices)
    if limit is None:
        assert limits.tokens is None and (limits.cost is None or not price)
        return
    after = spend(spent, ChatUsage(prompt + made, limit.tokens), prices)
    if limit.tokens:
        assert limits.tokens is None or after.tokens <= limits.tokens
        assert limits.cost is None or after.cost <= limits.cost * 10**12 * (1 + 1e-9)
    if limit.tokens == 0 or reached(limits, after):
        assert limit.reason in {"max_run_tokens", "max_run_cost"} or limits.tool_seconds is not None


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (RunLimits(tokens=15), "max_run_tokens"),
        (RunLimits(tokens=16), None),
        (RunLimits(cost=0.00002), "max_run_cost"),
        (RunLimits(cost=0.000021), None),
        (RunLimits(tool_seconds=1.5), "max_tool_seconds"),
        (RunLimits(tool_seconds=1.6), None),
        (RunLimits(), None),
    ],
)
def test_a_limit_is_reached_by_what_is_spent(limits: RunLimits, reason: str | None):
    spent = replace(spend(NOTHING_SPENT, ChatUsage(10, 5), Prices(Decimal(1), Decimal(2))), tool_s=1.5)
    assert reached(limits, spent) == reason
    assert read_spent(_stored(spent)) == spent
    assert read_spent(_stored(Spent(tool_s=2.5))) == Spent(tool_s=2.5)


def test_the_least_limit_of_cost_is_reached_by_the_least_cost():
    limits = RunLimits(cost=COST_MIN)
    assert reached(limits, NOTHING_SPENT) is None
    assert reached(limits, replace(NOTHING_SPENT, cost=1)) == "max_run_cost"
