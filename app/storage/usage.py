"""What runs have used: a row in the ledger for each that has ended, written by the statement that ends it; after a while the rows of a day
are added up (`roll_up`). Reports add both, in one statement. Rows have ids, names and numbers only.

No row is common to the runs of a tenant while they end: each only inserts its own.
"""

from collections.abc import Collection
from datetime import date
from typing import Any

from msgspec import UNSET, Struct
from sqlalchemy import text

from app.domain.lifecycle import TERMINAL
from app.domain.prices import amount
from app.domain.spending import NOTHING_SPENT, Spent, tool_calls
from app.domain.usage_report import cursor
from app.offload import offload
from app.storage.database import Query, Row, Tx
from app.storage.pages import Page
from app.wire.requests import Order
from app.wire.resources import Response
from app.wire.usage import Group, GroupUsage

COUNTERS = ("run_count", "tool_calls", "input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens", "cost")
"""What is counted."""

GROUPS = ("day", "model", "key_id", "user_name", "currency")
"""What groups differ in."""

_COUNTERS, _GROUPS = ", ".join(COUNTERS), ", ".join(GROUPS)

_INTO_LEDGER = f"""
    insert into usage_ledger (tenant_id, id, user_name, model, key_id, currency, {_COUNTERS})
    select split_part(:tenant_id, chr(31), 1), :id, split_part(:tenant_id, chr(31), 2), :used_model,
           coalesce(cast(:key_id as text), ''), :currency,
           {", ".join(f"cast(:used_{name} as {'numeric' if name == 'cost' else 'bigint'})" for name in COUNTERS)}
"""
"""An owner is a tenant, or a tenant and its user, with this character between them (domain/rights.py)."""

OF_RESPONSE = f"{_INTO_LEDGER} from response where cast(:is_counted as boolean)"
"""A part of a statement that ends a `response`, or inserts one that has ended."""

_ALONE = Query(text(f"{_INTO_LEDGER} on conflict do nothing  -- by an earlier attempt"))


class Charge(Struct, frozen=True):
    """Whom a run is counted for, besides its owner, and what its response does not say of what it has used."""

    key_id: str | None
    currency: str
    spent: Spent = NOTHING_SPENT


NO_CHARGE = Charge(None, "")


async def binds(response: Response, charge: Charge) -> dict[str, Any]:
    """The binds of `OF_RESPONSE`, which counts one that has ended."""
    size = sum(memoryview(raw).nbytes for raw in response.output)
    return {
        "is_counted": response.status in TERMINAL and charge is not NO_CHARGE,
        **_binds(response.model, charge, runs=1, calls=await offload(size, tool_calls, response.output)),
    }


def _binds(model: str, charge: Charge, *, runs: int, calls: int) -> dict[str, Any]:
    usage = charge.spent.usage
    return {
        "key_id": charge.key_id,
        "currency": charge.currency,
        "used_model": model,
        "used_run_count": runs,
        "used_tool_calls": calls,
        "used_input_tokens": usage.input_tokens if usage else 0,
        "used_cached_tokens": usage.input_tokens_details.cached_tokens if usage else 0,
        "used_output_tokens": usage.output_tokens if usage else 0,
        "used_reasoning_tokens": usage.output_tokens_details.reasoning_tokens if usage else 0,
        "used_cost": charge.spent.cost,
    }


async def count_run(tx: Tx, tenant_id: str, response: Response, charge: Charge) -> None:
    """Count a run that is not stored; once, however often this is repeated until it is rolled up."""
    counted = await binds(response, charge)
    await tx.one(_ALONE, tenant_id=tenant_id, id=response.id, **counted)


async def count_request(tx: Tx, tenant_id: str, id: str, model: str, charge: Charge) -> None:
    """Count what was asked of an upstream apart from any run. `id` is its own."""
    await tx.one(_ALONE, tenant_id=tenant_id, id=id, **_binds(model, charge, runs=0, calls=0))


# -- Rolling up -------------------------------------------------------------------------------------------------------------

# What several processes take at once differs; and each adds to days in the same order, so none waits crosswise for another.
_ROLL_UP = Query(
    text(f"""
    with taken as (
        delete from usage_ledger where (tenant_id, id) in (
            select tenant_id, id from usage_ledger
            where ended_at < now() - cast(:after_s as float8) * interval '1 second'
            order by ended_at limit :limit for update skip locked
        )
        returning tenant_id, cast(ended_at at time zone 'UTC' as date) as day, user_name, model, key_id, currency, {_COUNTERS}
    ), added as (
        insert into usage_days (tenant_id, {_GROUPS}, {_COUNTERS})
        select tenant_id, {_GROUPS}, {", ".join(f"sum({name})" for name in COUNTERS)}
        from taken group by tenant_id, {_GROUPS} order by tenant_id, {_GROUPS}
        on conflict (tenant_id, {_GROUPS}) do update
        set {", ".join(f"{name} = usage_days.{name} + excluded.{name}" for name in COUNTERS)}
    )
    select count(*) as rows from taken
    """),
    across_tenants="days end for every tenant",
)


async def roll_up(tx: Tx, *, after_s: float, limit: int) -> int:
    """Add up to `limit` rows of the ledger that are older than so many seconds to their days. Returns how many there were."""
    row = await tx.one(_ROLL_UP, after_s=after_s, limit=limit)
    assert row
    return int(row["rows"])


# -- Reports ----------------------------------------------------------------------------------------------------------------


ROWS_MAX = 1_000_000
"""Of the operator's report."""


class Filter(Struct, kw_only=True, frozen=True):
    """Which usage to report; None for all, an empty text for what has no key or no user."""

    first_day: date
    last_day: date
    model: str | None = None
    key_id: str | None = None
    user: str | None = None


class Used(Struct, frozen=True, kw_only=True):
    """What a group of runs has used. Empty texts for what the groups do not differ in, or is not there."""

    tenant: str
    day: str
    model: str
    key_id: str
    user_name: str
    currency: str
    run_count: int
    tool_calls: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    reasoning_tokens: int
    cost: int

    def shown(self, groups: Collection[Group], *, with_tenant: bool = False) -> GroupUsage:
        """The same as it is shown, grouped by these."""
        return GroupUsage(
            id=cursor([self.day, self.model, self.key_id, self.user_name, self.currency]),
            tenant=self.tenant if with_tenant else UNSET,
            day=self.day if "day" in groups else UNSET,
            model=self.model if "model" in groups else UNSET,
            key_id=self.key_id or None if "key" in groups else UNSET,
            user=self.user_name or None if "user" in groups else UNSET,
            runs=self.run_count,
            tool_calls=self.tool_calls,
            input_tokens=self.input_tokens,
            cached_tokens=self.cached_tokens,
            output_tokens=self.output_tokens,
            reasoning_tokens=self.reasoning_tokens,
            cost=amount(self.cost),
            currency=self.currency,
        )


_BY: dict[str, str] = {
    "day": "case when :by_day then to_char(day, 'YYYY-MM-DD') else '' end",
    "model": "case when :by_model then model else '' end",
    "key_id": "case when :by_key then key_id else '' end",
    "user_name": "case when :by_user then user_name else '' end",
    "currency": "currency",
}

_MATCHES = """
    and model = coalesce(cast(:model as text), model) and key_id = coalesce(cast(:key_id as text), key_id)
    and user_name = coalesce(cast(:user as text), user_name)
"""


def _report(of: str, order: Order) -> str:
    """What is used by group, of the tenants that `of` names."""
    after = ">" if order == "asc" else "<"
    place = ", ".join(f"grouped.{name}" for name in GROUPS)
    return f"""
    select * from (
        select tenant_id as tenant, {", ".join(f"{sql} as {name}" for name, sql in _BY.items())},
               {", ".join(f"cast(sum({name}) as numeric) as {name}" for name in COUNTERS)}
        from (
            select tenant_id, {_GROUPS}, {_COUNTERS} from usage_days
            where {of} and day between :first_day and :last_day {_MATCHES}
            union all
            select tenant_id, cast(ended_at at time zone 'UTC' as date), model, key_id, user_name, currency, {_COUNTERS}
            from usage_ledger
            where {of} and cast(ended_at at time zone 'UTC' as date) between :first_day and :last_day {_MATCHES}
        ) one
        group by 1, 2, 3, 4, 5, 6
    ) grouped
    where not :is_continued or ({place}) {after} (:at_day, :at_model, :at_key_id, :at_user_name, :at_currency)
    order by tenant, {", ".join(f"{name} {order}" for name in GROUPS)} limit cast(:limit as bigint) + 1
    """


_OF_ONE: dict[Order, Query] = {
    order: Query(text(_report("tenant_id = :tenant_id", order))) for order in ("asc", "desc")
}
_OF_ALL = Query(
    text(_report("tenant_id = coalesce(cast(:tenant as text), tenant_id)", "asc")),
    across_tenants="the operator's own report",
)


async def report(
    tx: Tx,
    tenant: str,
    filter: Filter,
    groups: Collection[Group],
    *,
    after: tuple[str, ...] | None,
    limit: int,
    order: Order,
) -> Page[Used]:
    """Up to `limit` groups of a tenant's usage after that place, in the order of day, model, key, user."""
    rows = await tx.all(_OF_ONE[order], tenant_id=tenant, limit=limit, **_asked(filter, groups, after))
    return Page([_used(row) for row in rows[:limit]], len(rows) > limit)


async def report_all(tx: Tx, tenant: str | None, filter: Filter, groups: Collection[Group]) -> list[Used]:
    """The usage of one tenant, or of each."""
    rows = await tx.all(_OF_ALL, tenant=tenant, limit=ROWS_MAX, **_asked(filter, groups, None))
    return [_used(row) for row in rows]


def _asked(filter: Filter, groups: Collection[Group], after: tuple[str, ...] | None) -> dict[str, Any]:
    return {
        "first_day": filter.first_day,
        "last_day": filter.last_day,
        "model": filter.model,
        "key_id": filter.key_id,
        "user": filter.user,
        **{f"by_{group}": group in groups for group in ("day", "model", "key", "user")},
        "is_continued": after is not None,
        **dict(zip((f"at_{name}" for name in GROUPS), after or ("",) * len(GROUPS), strict=True)),
    }


def _used(row: Row) -> Used:
    return Used(**{name: row[name] for name in ("tenant", *GROUPS)} | {name: int(row[name]) for name in COUNTERS})
