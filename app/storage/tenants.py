"""Tenants and their quotas, as the operator sets them."""

from msgspec import Struct
from sqlalchemy import text

from app.domain.rights import NAME_RULE, is_name
from app.errors import InvalidParameter
from app.settings import DEFAULT_TENANT
from app.storage.database import Query, Tx
from app.storage.keys import DEFAULT_LIMITS, encode_limits, limits_in
from app.wire.admin import OwnLimits

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
_ALL = Query(
    text("""
    select tenant.id, tenant.limits,
           (select count(*) from keys where tenant_id = tenant.id and revoked_at is null) as keys,
           (select count(*) from tenants one where one.tenant = tenant.id) as users
    from tenants tenant where tenant.tenant is null order by tenant.id
    """),
    across_tenants="the operator's own list",
)


class Tenant(Struct, frozen=True):
    """A tenant as the operator sees it."""

    id: str
    keys: int
    """Those that are not revoked."""
    users: int
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
    return [Tenant(row["id"], row["keys"], row["users"], limits_in(row)) for row in await tx.all(_ALL)]
