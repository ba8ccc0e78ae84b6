"""Tenants and their quotas, as the operator sets them."""

import msgspec
from msgspec import Struct
from sqlalchemy import text

from app.domain.rights import NAME_RULE, is_name
from app.errors import InvalidParameter
from app.settings import DEFAULT_TENANT
from app.storage.database import Query, Tx
from app.wire.admin import TenantLimits

_LIMITS = Query(text("select limits from tenants where id = :tenant_id"), across_tenants="the row of the tenant itself")
_SET_LIMITS = Query(
    text("""
    insert into tenants (id, limits) values (:tenant_id, cast(:limits as jsonb))
    on conflict (id) do update set limits = excluded.limits returning id
    """)
)
_CHANGE_LIMITS = Query(
    text("update tenants set limits = cast(:limits as jsonb) where id = :tenant_id and tenant is null returning id"),
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

_DECODER = msgspec.json.Decoder(TenantLimits)

DEFAULT_LIMITS = TenantLimits()


class Tenant(Struct, frozen=True):
    """A tenant as the operator sees it."""

    id: str
    keys: int
    """Those that are not revoked."""
    users: int
    limits: TenantLimits


async def find_limits(tx: Tx, tenant: str) -> TenantLimits:
    """The quotas of a tenant, which may be unknown."""
    row = await tx.one(_LIMITS, tenant_id=tenant)
    return _decoded(row["limits"]) if row else DEFAULT_LIMITS


async def set_limits(tx: Tx, tenant: str, limits: TenantLimits, *, create: bool) -> None:
    """Replace the quotas of a tenant, which `create` makes if it is unknown; the default tenant is always known. Raises
    InvalidParameter."""
    if not is_name(tenant):
        raise InvalidParameter(f"Invalid value for 'tenant': {NAME_RULE}.", param="tenant")
    query = _SET_LIMITS if create or tenant == DEFAULT_TENANT else _CHANGE_LIMITS
    if await tx.one(query, tenant_id=tenant, limits=msgspec.json.encode(limits).decode()) is None:
        raise InvalidParameter(
            f"Invalid value for 'tenant': there is no tenant '{tenant}'; `--create` makes it.", param="tenant"
        )


async def all_tenants(tx: Tx) -> list[Tenant]:
    """Every tenant, by name."""
    return [Tenant(row["id"], row["keys"], row["users"], _decoded(row["limits"])) for row in await tx.all(_ALL)]


def _decoded(limits: str | None) -> TenantLimits:
    return DEFAULT_LIMITS if limits is None else _DECODER.decode(limits)
