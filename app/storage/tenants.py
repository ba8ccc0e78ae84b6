"""Tenants and their quotas, as the operator sets them."""

from msgspec import Struct
from sqlalchemy import text

from app.domain.rights import NAME_RULE, is_name
from app.errors import InvalidParameter, TenantNotFound
from app.settings import DEFAULT_TENANT
from app.storage import audit
from app.storage.audit import Entry
from app.storage.database import Query, Row, Tx, storable
from app.storage.keys import DEFAULT_LIMITS, encode_limits, limits_in
from app.storage.pages import Page
from app.wire.admin import OwnLimits
from app.wire.requests import Order

_LIMITS = Query(text("select limits from tenants where id = :tenant_id"), across_tenants="the row of the tenant itself")
_SET_LIMITS = Query(
    text("""
    insert into tenants (id, limits) values (:tenant_id, cast(:limits as jsonb))
    on conflict (id) do update set limits = excluded.limits returning xmax = 0 as is_new
    """)
)
_CHANGE_LIMITS = Query(
    text(
        "update tenants set limits = cast(:limits as jsonb) where id = :tenant_id and tenant is null returning false as is_new"
    ),
    across_tenants="the row of the tenant itself",
)
_CREATE = Query(
    text("""
    insert into tenants (id, limits) values (:tenant_id, cast(:limits as jsonb)) on conflict do nothing returning id
    """)
)
_COLUMNS = """
    tenant.id, tenant.created_at, tenant.limits, tenant.stored_bytes,
    (select count(*) from keys where tenant_id = tenant.id and revoked_at is null
        and (expires_at is null or expires_at > now())) as keys,
    (select count(*) from tenants one where one.tenant = tenant.id) as users
"""
_ALL = Query(
    text(f"select {_COLUMNS} from tenants tenant where tenant.tenant is null order by tenant.id"),
    across_tenants="the operator's own list",
)
_GET = Query(
    text(f"select {_COLUMNS} from tenants tenant where tenant.id = :tenant_id and tenant.tenant is null"),
    across_tenants="the row of the tenant itself",
)
_CURSOR = Query(
    text("select created_at, id from tenants where id = :tenant_id and tenant is null"),
    across_tenants="the row of the tenant itself",
)


def _list(order: Order, after: str) -> Query:
    """Tenants and their users are few beside what they own: they are sorted for each page, and those on the page counted."""
    return Query(
        text(f"""
    select {_COLUMNS} from (
        select * from tenants where tenant is null {after}
        order by created_at {order}, id {order} limit cast(:limit as bigint) + 1
    ) tenant order by tenant.created_at {order}, tenant.id {order}
    """),
        across_tenants="the operator's own list",
    )


_FIRST: dict[Order, Query] = {"asc": _list("asc", ""), "desc": _list("desc", "")}
_NEXT: dict[Order, Query] = {
    "asc": _list("asc", "and (created_at, id) > (:created_at, :after)"),
    "desc": _list("desc", "and (created_at, id) < (:created_at, :after)"),
}


class Tenant(Struct, frozen=True):
    """A tenant as the operator sees it."""

    id: str
    created_at: int
    keys: int
    """Those that are valid: neither revoked nor expired."""
    users: int
    stored_bytes: int | None
    """As last measured; None if it never was."""
    limits: OwnLimits


async def find_limits(tx: Tx, tenant: str) -> OwnLimits:
    """The quotas of a tenant, which may be unknown."""
    row = await tx.one(_LIMITS, tenant_id=tenant)
    return limits_in(row) if row else DEFAULT_LIMITS


async def set_limits(tx: Tx, tenant: str, limits: OwnLimits, *, create: bool) -> bool:
    """Replace the quotas of a tenant, which `create` makes if it is unknown; the default tenant is always known. Gives whether it is
    new. Raises InvalidParameter."""
    if not is_name(tenant):
        raise InvalidParameter(f"Invalid value for 'tenant': {NAME_RULE}.", param="tenant")
    query = _SET_LIMITS if create or tenant == DEFAULT_TENANT else _CHANGE_LIMITS
    row = await tx.one(query, tenant_id=tenant, limits=encode_limits(limits))
    if row is None:
        raise InvalidParameter(
            f"Invalid value for 'tenant': there is no tenant '{tenant}'; `--create` makes it.", param="tenant"
        )
    return bool(row["is_new"])


async def all_tenants(tx: Tx) -> list[Tenant]:
    """Every tenant, by name."""
    return [_tenant(row) for row in await tx.all(_ALL)]


async def list_tenants(tx: Tx, *, after: str | None, limit: int, order: Order) -> Page[Tenant]:
    """Up to `limit` tenants after the one of this name. Raises InvalidParameter for a cursor that is no tenant."""
    binds = {}
    if after is not None:
        cursor = await tx.one(_CURSOR, tenant_id=after) if storable(after) else None
        if cursor is None:
            raise InvalidParameter(f"There is no tenant '{after}'.", param="after")
        binds = {"created_at": cursor["created_at"], "after": cursor["id"]}
    rows = await tx.all((_NEXT if binds else _FIRST)[order], limit=limit, **binds)
    return Page([_tenant(row) for row in rows[:limit]], len(rows) > limit)


async def get_tenant(tx: Tx, tenant: str) -> Tenant:
    """A tenant. Raises TenantNotFound; a user of one is none."""
    row = await tx.one(_GET, tenant_id=tenant) if storable(tenant) else None
    if row is None:
        raise TenantNotFound(tenant)
    return _tenant(row)


async def create_tenant(tx: Tx, tenant: str, limits: OwnLimits, entry: Entry) -> Tenant:
    """Make a tenant, with the entry of the audit log. Needs a transaction. Raises InvalidParameter for a name that can't be, or is
    taken."""
    if not is_name(tenant):
        raise InvalidParameter(f"Invalid value for 'id': {NAME_RULE}.", param="id")
    is_new = await tx.one(_CREATE, tenant_id=tenant, limits=encode_limits(limits)) is not None
    if not is_new and not await audit.is_written(tx, tenant, entry):
        raise InvalidParameter(f"There is a tenant '{tenant}' already.", param="id", code="name_taken")
    await audit.write(tx, tenant, entry)
    return await get_tenant(tx, tenant)


async def update_tenant(tx: Tx, tenant: str, limits: OwnLimits, entry: Entry) -> Tenant:
    """Replace the quotas of a tenant, with the entry of the audit log. Needs a transaction. Raises TenantNotFound."""
    await get_tenant(tx, tenant)
    await tx.one(_CHANGE_LIMITS, tenant_id=tenant, limits=encode_limits(limits))
    await audit.write(tx, tenant, entry)
    return await get_tenant(tx, tenant)


def _tenant(row: Row) -> Tenant:
    return Tenant(
        row["id"],
        int(row["created_at"].timestamp()),
        row["keys"],
        row["users"],
        row["stored_bytes"],
        limits_in(row),
    )
