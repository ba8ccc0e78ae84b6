"""Keys, and the tenants and users that they are for. Only a secret's SHA-256 is stored: secrets are 256 random bits, so a fast hash is safe.

A key has one secret, and after a rotation for some time also those that it had before.
"""

import hashlib
import secrets
import time
from datetime import UTC, datetime

import msgspec
from msgspec import UNSET, Struct
from msgspec.structs import replace
from sqlalchemy import text

from app.domain.rights import NAME_RULE, ORDINARY, Rights, has_controls, is_name, owner_of
from app.errors import InvalidParameter, KeyNotFound
from app.ids import new_id, seconds_of
from app.settings import KEY_OVERLAP_S_MAX
from app.storage import audit
from app.storage.database import Query, Row, Tx, storable
from app.storage.pages import Page, id_range
from app.wire.admin import MODEL_CHARS_MAX, MODELS_MAX, NAME_CHARS_MAX, OwnLimits, Scope, UpdateKey
from app.wire.requests import Order

_KEY_PREFIX = "sk-reprise-"

_COLUMNS = "id, tenant_id, user_name, name, scopes, models, limits, created_at, expires_at, revoked_at"

_FIND = Query(
    text("""
    select id, tenant_id, user_name, scopes, models, limits, revoked_at is not null as is_revoked,
           cast(extract(epoch from expires_at - now()) as float8) as left_s
    from keys where hash = :hash
    union all
    select key.id, key.tenant_id, key.user_name, key.scopes, key.models, key.limits, key.revoked_at is not null,
           cast(extract(epoch from least(key.expires_at, retired.valid_until) - now()) as float8)
    from retired_secrets retired join keys key on key.tenant_id = retired.tenant_id and key.id = retired.key_id
    where retired.hash = :hash
    """),
    across_tenants="finds the tenant",
)
_ANY = Query(
    text("select exists (select from keys) as any_key"), across_tenants="finds out whether keys are in use at all"
)
_TENANT = Query(text("insert into tenants (id) values (:tenant_id) on conflict do nothing returning id"))
_USER = Query(
    text("insert into tenants (id, tenant) values (:tenant_id, :tenant) on conflict do nothing returning id"),
)
_OWNERS = Query(
    text("select id from tenants where id in (:tenant_id, :tenant)"),
    across_tenants="finds out whether an owner is known",
)
_INSERT = Query(
    text("""
    insert into keys (hash, id, tenant_id, user_name, name, scopes, models, limits, expires_at)
    values (:hash, :id, :tenant_id, :user, :name, cast(:scopes as text[]), cast(:models as text[]),
            cast(:limits as jsonb), to_timestamp(cast(:expires_at as float8)))
    on conflict do nothing  -- by an earlier attempt
    """)
)
_ALL = Query(text(f"select {_COLUMNS} from keys order by created_at, id"), across_tenants="the operator's own list")
_TENANT_OF = Query(
    text("select tenant_id from keys where id = :id"), across_tenants="the operator names a key by its id"
)
_GET = Query(text(f"select {_COLUMNS} from keys where tenant_id = :tenant_id and id = :id"))
_REVOKE = Query(
    text("""
    update keys set revoked_at = now() where tenant_id = :tenant_id and id = :id and revoked_at is null returning id
    """)
)
_FORGET_CREDENTIALS = Query(text("delete from tool_credentials where tenant_id = :tenant_id and key_id = :id"))
_ROTATE = Query(
    text(f"""
    with old as (
        select hash from keys
        where tenant_id = :tenant_id and id = :id and revoked_at is null and (expires_at is null or expires_at > now())
        for update
    ), retired as (
        insert into retired_secrets (hash, tenant_id, key_id, valid_until)
        select hash, :tenant_id, :id, now() + cast(:overlap_s as float8) * interval '1 second'
        from old where hash <> :hash  -- by an earlier attempt
    ), dropped as (
        delete from retired_secrets where tenant_id = :tenant_id and key_id = :id and valid_until <= now()
    ), shortened as (
        update retired_secrets set valid_until = now() + cast(:overlap_s as float8) * interval '1 second'
        where tenant_id = :tenant_id and key_id = :id and exists (select from old)
          and valid_until > now() + cast(:overlap_s as float8) * interval '1 second'
    )
    update keys set hash = :hash where tenant_id = :tenant_id and id = :id and exists (select from old)
    returning {_COLUMNS}
    """)
)
_UPDATE = Query(
    text(f"""
    update keys set name = :name, scopes = cast(:scopes as text[]), models = cast(:models as text[]),
                    limits = cast(:limits as jsonb)
    where tenant_id = :tenant_id and id = :id and revoked_at is null
    returning {_COLUMNS}
    """)
)
_LOCK = Query(
    text(f"""
    select {_COLUMNS} from keys where tenant_id = :tenant_id and id = :id and revoked_at is null for update
    """)
)


def _list(order: Order) -> Query:
    """Ids begin with the time, so they are in the order of creation."""
    return Query(
        text(f"""
    select {_COLUMNS} from keys where tenant_id = :tenant_id and id > :from_id and id < :to_id
    order by id {order} limit cast(:limit as bigint) + 1
    """)
    )


_LISTS: dict[Order, Query] = {"asc": _list("asc"), "desc": _list("desc")}

DEFAULT_LIMITS = OwnLimits()

_LIMITS = msgspec.json.Decoder(OwnLimits)


class Key(Struct, frozen=True, kw_only=True):
    """A key as its administrators see it. Times are unix seconds."""

    id: str
    tenant: str
    user: str = ""
    name: str = ""
    scopes: frozenset[Scope] = ORDINARY
    models: tuple[str, ...] | None = None
    limits: OwnLimits = DEFAULT_LIMITS
    created_at: int = 0
    expires_at: int | None = None
    revoked_at: int | None = None


class Proof(Struct, frozen=True):
    """What a secret proves."""

    rights: Rights
    is_revoked: bool
    left_s: float | None
    """How long it is valid, in seconds; None if it does not expire."""


def new_secret() -> str:
    """A new secret, which is shown once."""
    return _KEY_PREFIX + secrets.token_urlsafe(32)


def digest(secret: str) -> bytes:
    """What is stored of a secret."""
    return hashlib.sha256(secret.encode()).digest()


async def find_proof(tx: Tx, hash: bytes) -> Proof | None:
    """What the secret with this digest proves; None if it is unknown."""
    row = await tx.one(_FIND, hash=hash)
    if row is None:
        return None
    rights = Rights(
        row["tenant_id"], row["user_name"], frozenset(row["scopes"]), _models(row), row["id"], limits=limits_in(row)
    )
    return Proof(rights, row["is_revoked"], row["left_s"])


async def keys_in_use(tx: Tx) -> bool:
    """Whether a key was ever made; a revoked one counts, so revoking the last never opens the server."""
    row = await tx.one(_ANY)
    return row is not None and bool(row["any_key"])


async def create_key(tx: Tx, key: Key, secret: str, *, by: Rights | None) -> list[str]:
    """Store a new key, made by a caller or the operator, and its tenant and user if they are new: gives what is (`tenant`, `user`). Needs
    a transaction."""
    new = ["tenant"] if await _have_tenant(tx, key.tenant, by) else []
    if key.user and await tx.one(_USER, tenant_id=owner_of(key.tenant, key.user), tenant=key.tenant):
        new.append("user")
    await tx.one(
        _INSERT,
        hash=digest(secret),
        id=key.id,
        tenant_id=key.tenant,
        user=key.user,
        name=key.name,
        scopes=sorted(key.scopes),
        models=key.models,
        limits=encode_limits(key.limits),
        expires_at=key.expires_at,
    )
    return new


async def all_keys(tx: Tx) -> list[Key]:
    """The keys of all tenants, oldest first."""
    return [_key(row) for row in await tx.all(_ALL)]


async def have_owner(tx: Tx, rights: Rights, *, makes_tenant: bool) -> bool:
    """Whether the tenant of a caller exists, or now does; a new user of it is made. Needs a transaction."""
    tenant, owner = rights.tenant, rights.owner
    known = {row["id"] for row in await tx.all(_OWNERS, tenant_id=owner, tenant=tenant)}
    if tenant not in known:
        if not makes_tenant:
            return False
        await _have_tenant(tx, tenant, rights)
    if owner not in known:
        await tx.one(_USER, tenant_id=owner, tenant=tenant)
    return True


async def _have_tenant(tx: Tx, tenant: str, by: Rights | None) -> bool:
    """See that there is a tenant. Returns whether it is new."""
    if await tx.one(_TENANT, tenant_id=tenant) is None:
        return False
    await audit.write(tx, tenant, audit.entry(by, "tenant.created", tenant))
    return True


async def list_keys(tx: Tx, tenant: str, *, after: str | None, limit: int, order: Order) -> Page[Key]:
    """Up to `limit` keys of a tenant after the cursor. Raises InvalidParameter for a cursor that is no key's id."""
    between = id_range("key_", after, order)
    if between is None:
        raise InvalidParameter(f"There is no key with id '{after}'.", param="after")
    rows = await tx.all(_LISTS[order], tenant_id=tenant, limit=limit, **between)
    return Page([_key(row) for row in rows[:limit]], len(rows) > limit)


async def tenant_of_key(tx: Tx, key_id: str) -> str:
    """The tenant of a key. Raises KeyNotFound."""
    row = await tx.one(_TENANT_OF, id=key_id) if storable(key_id) else None
    if row is None:
        raise KeyNotFound(key_id)
    return str(row["tenant_id"])


async def get_key(tx: Tx, tenant: str, key_id: str) -> Key:
    """A key, which may be revoked. Raises KeyNotFound."""
    return _key(await _one(tx, _GET, tenant, key_id))


async def revoke_key(tx: Tx, tenant: str, key_id: str, *, again: bool = False) -> None:
    """Revoke a key with all its secrets, and delete its credentials for tool servers. Needs a transaction. `again` if an earlier attempt
    may have revoked it. Raises KeyNotFound for one that is not valid."""
    try:
        await _one(tx, _REVOKE, tenant, key_id)
    except KeyNotFound:
        if again:
            return
        raise
    # A statement of its own: it sees what was stored until the key was locked.
    await tx.one(_FORGET_CREDENTIALS, tenant_id=tenant, id=key_id)


async def update_key(tx: Tx, tenant: str, key_id: str, asked: UpdateKey) -> Key:
    """Change what is given of a key. Needs a transaction. Raises KeyNotFound for one that is revoked, InvalidParameter."""
    key = _key(await _one(tx, _LOCK, tenant, key_id))
    given = {name: value for name in asked.__struct_fields__ if (value := getattr(asked, name)) is not UNSET}
    if "scopes" in given:
        given["scopes"] = frozenset(given["scopes"])
    if given.get("models") is not None:
        given["models"] = tuple(given["models"])
    changed = replace(key, **given)
    _check(changed)
    row = await _one(
        tx,
        _UPDATE,
        tenant,
        key_id,
        name=changed.name,
        scopes=sorted(changed.scopes),
        models=changed.models,
        limits=encode_limits(changed.limits),
    )
    return _key(row)


async def rotate_key(tx: Tx, tenant: str, key_id: str, secret: str, *, overlap_s: float) -> Key:
    """Give a key a new secret; those that it had stay valid for at most `overlap_s`. Raises KeyNotFound for a key that is not
    valid, InvalidParameter."""
    if not 0 <= overlap_s <= KEY_OVERLAP_S_MAX:
        raise InvalidParameter(f"'overlap_s' must be from 0 to {KEY_OVERLAP_S_MAX}.", param="overlap_s")
    return _key(await _one(tx, _ROTATE, tenant, key_id, hash=digest(secret), overlap_s=overlap_s))


def new_key(
    tenant: str,
    *,
    user: str = "",
    name: str = "",
    scopes: frozenset[Scope] = ORDINARY,
    models: tuple[str, ...] | None = None,
    limits: OwnLimits = DEFAULT_LIMITS,
    expires_at: int | None = None,
) -> Key:
    """A key that is not stored yet. Raises InvalidParameter."""
    if expires_at is not None and expires_at <= time.time():
        raise InvalidParameter("'expires_at' is in the past.", param="expires_at")
    id = new_id("key")
    created_at = seconds_of(id) or 0
    key = Key(
        id=id,
        tenant=tenant,
        user=user,
        name=name,
        scopes=scopes,
        models=models,
        limits=limits,
        created_at=created_at,
        expires_at=expires_at,
    )
    _check(key)
    return key


def _check(key: Key) -> None:
    """Raises InvalidParameter for a key that can't be."""
    if not is_name(key.tenant):
        raise InvalidParameter(f"Invalid value for 'tenant': {NAME_RULE}.", param="tenant")
    if key.user and not is_name(key.user):
        raise InvalidParameter(f"Invalid value for 'user': {NAME_RULE}.", param="user")
    if len(key.name) > NAME_CHARS_MAX or has_controls(key.name):
        raise InvalidParameter(
            f"Invalid value for 'name': expected at most {NAME_CHARS_MAX} characters, none of them control characters.",
            param="name",
        )
    if key.user and "admin" in key.scopes:
        raise InvalidParameter("A key that is bound to a user can't have the scope 'admin'.", param="user")
    if "operator" in key.scopes and (key.user or key.models is not None):
        what, param = ("bound to a user", "user") if key.user else ("limited to models", "models")
        raise InvalidParameter(f"A key that is {what} can't have the scope 'operator'.", param=param)
    if any(has_controls(one) for one in key.models or ()):
        raise InvalidParameter("'models' may not contain control characters.", param="models")
    models = key.models or ()
    if len(models) > MODELS_MAX or not all(0 < len(one) <= MODEL_CHARS_MAX for one in models):
        raise InvalidParameter(
            f"Invalid value for 'models': expected at most {MODELS_MAX} names of 1 to {MODEL_CHARS_MAX} characters.",
            param="models",
        )


async def _one(tx: Tx, query: Query, tenant: str, key_id: str, **binds: object) -> Row:
    row = await tx.one(query, tenant_id=tenant, id=key_id, **binds) if storable(key_id) else None
    if row is None:
        raise KeyNotFound(key_id)
    return row


def _key(row: Row) -> Key:
    return Key(
        id=row["id"],
        tenant=row["tenant_id"],
        user=row["user_name"],
        name=row["name"],
        scopes=frozenset(row["scopes"]),
        models=_models(row),
        limits=limits_in(row),
        created_at=_seconds(row["created_at"]) or 0,
        expires_at=_seconds(row["expires_at"]),
        revoked_at=_seconds(row["revoked_at"]),
    )


def _models(row: Row) -> tuple[str, ...] | None:
    return None if row["models"] is None else tuple(row["models"])


def limits_in(row: Row) -> OwnLimits:
    """The quotas in a row of a key or a tenant."""
    return DEFAULT_LIMITS if row["limits"] is None else _LIMITS.decode(row["limits"])


def encode_limits(limits: OwnLimits) -> str | None:
    """Quotas as a row has them: those that are given, so that the version before reads what it knows."""
    given = {name: value for name in limits.__struct_fields__ if (value := getattr(limits, name)) is not None}
    return msgspec.json.encode(given).decode() if given else None


def _seconds(at: datetime | None) -> int | None:
    return None if at is None else int(at.astimezone(UTC).timestamp())
