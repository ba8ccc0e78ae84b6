"""The audit log: who has done what to which thing, never its content. An entry is written in the transaction of its action."""

from msgspec import Struct
from sqlalchemy import text

from app.domain.issuers import LABEL
from app.domain.rights import Rights
from app.errors import InvalidParameter
from app.ids import new_id, seconds_of
from app.storage.database import Query, Row, Tx
from app.storage.pages import Page, id_range
from app.wire.admin import Action, Actor
from app.wire.requests import Order


class Entry(Struct, frozen=True, kw_only=True):
    """One action. Attempts at one transaction share an entry, and it is written once."""

    id: str
    created_at: int
    actor: Actor
    key_id: str | None
    user: str
    action: Action
    target: str


_INSERT = Query(
    text("""
    insert into audit_log (tenant_id, id, created_at, actor, key_id, user_name, action, target)
    values (:tenant_id, :id, :created_at, :actor, :key_id, :user, :action, :target)
    on conflict do nothing  -- by an earlier attempt
    """)
)
_WRITTEN = Query(text("select id from audit_log where tenant_id = :tenant_id and id = :id"))


def _list(order: Order) -> Query:
    """Ids begin with the time, so they are in the order of the actions."""
    return Query(
        text(f"""
    select id, created_at, actor, key_id, user_name, action, target from audit_log
    where tenant_id = :tenant_id and id > :from_id and id < :to_id
      and action = coalesce(cast(:action as text), action)
    order by id {order} limit cast(:limit as bigint) + 1
    """)
    )


_LISTS: dict[Order, Query] = {"asc": _list("asc"), "desc": _list("desc")}

# Ids begin with their time, so what is old is the first part of a tenant's rows in the primary key; the tenants are found by one look
# into it for each. The bound is no id before 1970.
_DELETE_OLD = Query(
    text("""
    with recursive tenant as (
        (select tenant_id from audit_log order by tenant_id limit 1)
        union all
        select next.tenant_id from tenant cross join lateral (
            select tenant_id from audit_log where tenant_id > tenant.tenant_id order by tenant_id limit 1
        ) next
    ), bound as (
        select 'audit_' || lpad(to_hex(cast(
            1000 * greatest(0, extract(epoch from now()) - cast(:days as bigint) * 86400.0) as bigint
        )), 12, '0') as id
    ), deleted as (
        delete from audit_log where ctid = any(array(
            select entry.ctid from tenant cross join bound cross join lateral (
                select ctid from audit_log where tenant_id = tenant.tenant_id and id < bound.id
                order by id limit cast(:limit as bigint) for update skip locked
            ) entry
            limit cast(:limit as bigint)
        )) returning 1
    )
    select count(*) as rows from deleted
    """),
    across_tenants="entries of every tenant become old",
)


def entry(rights: Rights | None, action: Action, target: str, *, as_operator: bool = False) -> Entry:
    """What a caller does to the thing with this id, now; None for the operator on the command line. `as_operator` if it acts on any
    tenant, not on its own."""
    id = new_id("audit")
    key_id = rights.key_id if rights else None
    return Entry(
        id=id,
        created_at=seconds_of(id) or 0,
        actor="operator" if as_operator else _actor(rights),
        key_id=key_id,
        user=rights.user if rights else "",
        action=action,
        target=target,
    )


def _actor(rights: Rights | None) -> Actor:
    if rights is None:
        return "command_line"
    if rights.key_id is None:
        return "anonymous"
    return "jwt" if rights.key_id.startswith(LABEL) else "api_key"


async def write(tx: Tx, tenant: str, entry: Entry) -> None:
    """Write an entry into the log of a tenant."""
    await tx.one(
        _INSERT,
        tenant_id=tenant,
        id=entry.id,
        created_at=entry.created_at,
        actor=entry.actor,
        key_id=entry.key_id,
        user=entry.user,
        action=entry.action,
        target=entry.target,
    )


async def is_written(tx: Tx, tenant: str, entry: Entry) -> bool:
    """Whether an entry is in the log, and so its action done, by an earlier attempt."""
    return await tx.one(_WRITTEN, tenant_id=tenant, id=entry.id) is not None


async def delete_old(tx: Tx, *, days: int, limit: int) -> int:
    """Delete up to `limit` entries that are older than so many days. Returns how many there were."""
    row = await tx.one(_DELETE_OLD, days=days, limit=limit)
    assert row
    return int(row["rows"])


async def list_entries(
    tx: Tx, tenant: str, action: Action | None, *, after: str | None, limit: int, order: Order
) -> Page[Entry]:
    """Up to `limit` entries of a tenant after the cursor. Raises InvalidParameter for a cursor that is no entry's id."""
    between = id_range("audit_", after, order)
    if between is None:
        raise InvalidParameter(f"There is no entry with id '{after}'.", param="after")
    rows = await tx.all(_LISTS[order], tenant_id=tenant, action=action, limit=limit, **between)
    return Page([_entry(row) for row in rows[:limit]], len(rows) > limit)


def _entry(row: Row) -> Entry:
    return Entry(
        id=row["id"],
        created_at=row["created_at"],
        actor=row["actor"],
        key_id=row["key_id"],
        user=row["user_name"],
        action=row["action"],
        target=row["target"],
    )
