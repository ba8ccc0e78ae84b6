"""Credentials for tool servers, sealed. Rows are the tenant's, also those that are for a user or a key of it.

`server` is a normalized URL, or the name of a server of the catalog, which has no colon; indexes hold its hash, since URLs are long.
"""

import hashlib
from collections.abc import Sequence

from msgspec import Struct
from sqlalchemy import text

from app.domain.sealed import Seal
from app.domain.tool_credentials import TENANT, Holder, open_secret, seal_secret
from app.errors import InvalidParameter, InvalidRequest, ToolCredentialExists, ToolCredentialNotFound
from app.storage.database import Database, Query, Row, Tx, storable
from app.storage.pages import Page, id_range
from app.storage.sealed_rows import Opened, Resealed, read_all, try_opening
from app.wire.requests import Order

_COLUMNS = "id, server, user_name, key_id, name, has_authorization, header_names, created_at, updated_at"

_SEEN = "(:sees_all or (user_name in ('', :user) and key_id in ('', :key_id)))"
"""Those of the tenant, of a user and of a key: what their runs may use."""

_LOCK = Query(text("select pg_advisory_xact_lock(hashtextextended('tool credentials of ' || :tenant_id, 0))"))

_KEY = Query(
    text("select from keys where tenant_id = :tenant_id and id = :key_id and revoked_at is null for share"),
)

_INSERT = Query(
    text("""
    insert into tool_credentials (tenant_id, id, server, server_hash, user_name, key_id, name, sealed, has_authorization,
                                  header_names, created_at, updated_at)
    values (:tenant_id, :id, :server, :server_hash, :user, :key_id, :name, :sealed, :has_authorization,
            cast(:header_names as text[]), :now, :now)
    on conflict do nothing returning id
    """)
)

_OTHER = Query(
    text("""
    select id from tool_credentials
    where tenant_id = :tenant_id and server_hash = :server_hash and user_name = :user and key_id = :key_id
    """)
)

_COUNT = Query(
    text("""
    select count(*) as all, count(*) filter (where user_name = :user and key_id = :key_id) as of_holder
    from tool_credentials where tenant_id = :tenant_id
    """)
)

# A join for each server: with all of them in one condition the first plans read all rows of the tenant.
_FIND = Query(
    text("""
    select found.server, found.user_name, found.key_id, found.sealed
    from unnest(cast(:server_hashes as bytea[])) as wanted (hash) cross join lateral (
        select server, user_name, key_id, sealed from tool_credentials
        where server_hash = wanted.hash and tenant_id = :tenant_id and user_name in ('', :user) and key_id in ('', :key_id)
        order by key_id desc, user_name desc limit 1
    ) found
    """)
)

_GET = Query(text(f"select {_COLUMNS} from tool_credentials where tenant_id = :tenant_id and id = :id and {_SEEN}"))

_UPDATE = Query(
    text(f"""
    update tool_credentials
    set name = coalesce(cast(:name as text), name), sealed = coalesce(cast(:sealed as text), sealed),
        has_authorization = coalesce(cast(:has_authorization as boolean), has_authorization),
        header_names = coalesce(cast(:header_names as text[]), header_names), updated_at = :now
    where tenant_id = :tenant_id and id = :id
    returning {_COLUMNS}
    """)
)

_DELETE = Query(text("delete from tool_credentials where tenant_id = :tenant_id and id = :id returning id"))

_SEALED = Query(
    text("""
    select tenant_id, id, server, user_name, key_id, sealed from tool_credentials
    where (tenant_id, id) > (:after_tenant, :after_id) order by tenant_id, id limit :limit
    """),
    across_tenants="the operator seals all of them with another key",
)

_RESEAL = Query(
    text("update tool_credentials set sealed = :sealed where tenant_id = :tenant_id and id = :id and sealed = :former")
)


def _list(order: Order) -> Query:
    """Ids begin with the time, so they are in the order of creation."""
    return Query(
        text(f"""
    select {_COLUMNS} from tool_credentials
    where tenant_id = :tenant_id and id > :from_id and id < :to_id and {_SEEN}
    order by id {order} limit cast(:limit as bigint) + 1
    """)
    )


_LISTS: dict[Order, Query] = {"asc": _list("asc"), "desc": _list("desc")}


class Limits(Struct, frozen=True):
    """How many credentials there may be."""

    of_tenant: int
    of_holder: int
    """Of one user, or one key."""


class Viewer(Struct, frozen=True):
    """Who asks: what is for this user or this key, and what is for all; or everything of the tenant."""

    tenant: str
    user: str
    key_id: str
    sees_all: bool


class Sealed(Struct, frozen=True):
    """A secret as it is stored."""

    sealed: str
    has_authorization: bool
    header_names: list[str]


class ToolCredential(Struct, frozen=True):
    """A credential without its secret. Times are unix seconds."""

    id: str
    server: str
    holder: Holder
    name: str
    has_authorization: bool
    header_names: list[str]
    created_at: int
    updated_at: int

    @property
    def is_of_url(self) -> bool:
        """Whether its server is a URL, and not a name of the catalog."""
        return "://" in self.server


class Found(Struct, frozen=True):
    """What is stored for a server."""

    server: str
    holder: Holder
    sealed: str


async def create(tx: Tx, tenant: str, made: ToolCredential, sealed: str, limits: Limits) -> None:
    """Store a new credential. Needs a transaction. Raises ToolCredentialExists, InvalidParameter for an unknown key, InvalidRequest
    beyond the limits."""
    holder = _binds(made.holder)
    server_hash = _hash(made.server)
    await tx.one(_LOCK, tenant_id=tenant)
    if made.holder.key_id and not await _lock_key(tx, tenant, made.holder.key_id):
        raise InvalidParameter("There is no valid key with the id in 'key_id'.", param="key_id")
    inserted = await tx.one(
        _INSERT,
        tenant_id=tenant,
        id=made.id,
        server=made.server,
        server_hash=server_hash,
        name=made.name,
        sealed=sealed,
        has_authorization=made.has_authorization,
        header_names=made.header_names,
        now=made.created_at,
        **holder,
    )
    if inserted is None:
        other = await tx.one(_OTHER, tenant_id=tenant, server_hash=server_hash, **holder)
        if other is None or other["id"] == made.id:  # by an earlier attempt; perhaps it is deleted already
            return
        raise ToolCredentialExists(other["id"], "server_url" if made.is_of_url else "server_label")
    count = await tx.one(_COUNT, tenant_id=tenant, **holder)
    assert count
    if count["all"] > limits.of_tenant:
        raise _too_many(limits.of_tenant, "REPRISE_TOOL_CREDENTIALS_TENANT_MAX")
    if made.holder != TENANT and count["of_holder"] > limits.of_holder:
        raise _too_many(limits.of_holder, "REPRISE_TOOL_CREDENTIALS_HOLDER_MAX")


async def _lock_key(tx: Tx, tenant: str, key_id: str) -> bool:
    """Whether there is such a key. It is not revoked meanwhile, which deletes its credentials."""
    return storable(key_id) and bool(await tx.all(_KEY, tenant_id=tenant, key_id=key_id))


def _too_many(most: int, setting: str) -> InvalidRequest:
    return InvalidRequest(
        f"There would be more than {most} tool credentials ({setting}); delete some first.",
        code="tool_credential_limit_exceeded",
    )


async def find(tx: Tx, tenant: str, user: str, key_id: str, servers: Sequence[str]) -> dict[str, Found]:
    """For each of these servers the credential that a run of this user and key gets: the key's, else the user's, else the tenant's."""
    rows = await tx.all(
        _FIND, tenant_id=tenant, user=user, key_id=key_id, server_hashes=[_hash(server) for server in servers]
    )
    return {row["server"]: _found(row) for row in rows}


async def find_one(tx: Tx, viewer: Viewer, credential_id: str) -> ToolCredential | None:
    """A credential that the viewer sees."""
    row = await tx.one(_GET, id=credential_id, **_seen(viewer)) if storable(credential_id) else None
    return _credential(row) if row else None


async def get(tx: Tx, viewer: Viewer, credential_id: str) -> ToolCredential:
    """Raises ToolCredentialNotFound."""
    found = await find_one(tx, viewer, credential_id)
    if found is None:
        raise ToolCredentialNotFound(credential_id)
    return found


async def list_all(tx: Tx, viewer: Viewer, *, after: str | None, limit: int, order: Order) -> Page[ToolCredential]:
    """Up to `limit` credentials after the cursor, which may be deleted. Raises InvalidParameter for a cursor that is no such id."""
    between = id_range("cred_", after, order)
    if between is None:
        raise InvalidParameter(f"There is no tool credential with id '{after}'.", param="after")
    rows = await tx.all(_LISTS[order], limit=limit, **_seen(viewer), **between)
    return Page([_credential(row) for row in rows[:limit]], len(rows) > limit)


async def update(
    tx: Tx, tenant: str, credential_id: str, *, name: str | None, secret: Sealed | None, now: int
) -> ToolCredential:
    """Change the name, and the secret as a whole, where they are given. Raises ToolCredentialNotFound."""
    row = await tx.one(
        _UPDATE,
        tenant_id=tenant,
        id=credential_id,
        name=name,
        sealed=secret and secret.sealed,
        has_authorization=secret and secret.has_authorization,
        header_names=secret and secret.header_names,
        now=now,
    )
    if row is None:
        raise ToolCredentialNotFound(credential_id)
    return _credential(row)


async def delete(tx: Tx, tenant: str, credential_id: str) -> None:
    """Delete a credential; runs that begin after that do not have it."""
    await tx.one(_DELETE, tenant_id=tenant, id=credential_id)


async def reseal_all(database: Database, seal: Seal) -> Resealed:
    """Seal the secrets of all tenants with the key that seals now; those that none of the keys opens stay as they are. Raises
    DatabaseUnavailable."""
    resealed = unopened = 0
    async for row in read_all(database, _SEALED):
        found, tenant_seal = _found(row), seal.of(row["tenant_id"])
        secret = open_secret(tenant_seal, found.server, found.holder, found.sealed)
        if secret is None:
            unopened += 1
            continue
        sealed = seal_secret(tenant_seal, found.server, found.holder, secret)
        async with database.autocommit() as tx:
            # One that is replaced meanwhile is sealed by a server, with the key that this has.
            await tx.one(_RESEAL, tenant_id=row["tenant_id"], id=row["id"], sealed=sealed, former=found.sealed)
        resealed += 1
    return Resealed(resealed, unopened)


async def try_all(database: Database, seal: Seal, *, most: int) -> Opened:
    """Open up to `most` credentials of all tenants. Raises DatabaseUnavailable."""

    def opens(row: Row) -> bool:
        found = _found(row)
        return open_secret(seal.of(row["tenant_id"]), found.server, found.holder, found.sealed) is not None

    return await try_opening(read_all(database, _SEALED), opens, most=most)


def _hash(server: str) -> bytes:
    return hashlib.sha256(server.encode()).digest()


def _binds(holder: Holder) -> dict[str, str]:
    return {"user": holder.user, "key_id": holder.key_id}


def _seen(viewer: Viewer) -> dict[str, object]:
    return {
        "tenant_id": viewer.tenant,
        "user": viewer.user,
        "key_id": viewer.key_id,
        "sees_all": viewer.sees_all,
    }


def _found(row: Row) -> Found:
    return Found(row["server"], Holder(row["user_name"], row["key_id"]), row["sealed"])


def _credential(row: Row) -> ToolCredential:
    return ToolCredential(
        id=row["id"],
        server=row["server"],
        holder=Holder(row["user_name"], row["key_id"]),
        name=row["name"],
        has_authorization=row["has_authorization"],
        header_names=row["header_names"],
        created_at=row["created_at"],
        updated_at=row["updated_at"],
    )
