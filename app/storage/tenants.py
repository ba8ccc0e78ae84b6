"""Tenants and their keys. Only a key's SHA-256 is stored: keys are 256 random bits, so a fast hash is safe."""

import hashlib
import secrets

from msgspec import Struct
from sqlalchemy import text

from app.ids import new_id
from app.storage.database import Query, Tx

_KEY_PREFIX = "sk-reprise-"

_BY_KEY = "finds the tenant"

_FIND = Query(
    text("select tenant_id from keys where hash = :hash and revoked_at is null"),
    across_tenants=_BY_KEY,
)
_ANY = Query(
    text("select exists (select from keys) as any_key"), across_tenants="finds out whether keys are in use at all"
)
_INSERT = Query(
    text("""
    with tenant as (insert into tenants (id) values (:tenant_id) on conflict do nothing)
    insert into keys (hash, id, tenant_id, name) values (:hash, :id, :tenant_id, :name) returning id
    """)
)
_TENANT = Query(text("insert into tenants (id) values (:tenant_id) on conflict do nothing returning id"))
_LIST = Query(
    text("select id, tenant_id, name, created_at, revoked_at from keys order by created_at, id"),
    across_tenants="the operator's own list",
)
_REVOKE = Query(
    text("update keys set revoked_at = now() where id = :id and revoked_at is null returning id"),
    across_tenants="the operator names a key by its id",
)


class Key(Struct, frozen=True):
    """A key as the operator sees it; the secret itself is shown once, when it is made."""

    id: str
    tenant_id: str
    name: str
    created: str
    revoked: str | None


def digest(key: str) -> bytes:
    """What is stored of a key."""
    return hashlib.sha256(key.encode()).digest()


async def find_tenant(tx: Tx, key: str) -> str | None:
    """The tenant that a key proves, or None."""
    row = await tx.one(_FIND, hash=digest(key))
    return str(row["tenant_id"]) if row else None


async def keys_in_use(tx: Tx) -> bool:
    """Whether a key was ever made; a revoked one counts, so revoking the last never opens the server."""
    row = await tx.one(_ANY)
    return row is not None and bool(row["any_key"])


async def ensure_tenant(tx: Tx, tenant_id: str) -> None:
    """Make the tenant if it is new."""
    await tx.one(_TENANT, tenant_id=tenant_id)


async def create_key(tx: Tx, tenant_id: str, name: str) -> tuple[str, str]:
    """A new key's id and secret; makes the tenant if it is new."""
    secret = _KEY_PREFIX + secrets.token_urlsafe(32)
    id = new_id("key")
    await tx.one(_INSERT, hash=digest(secret), id=id, tenant_id=tenant_id, name=name)
    return id, secret


async def list_keys(tx: Tx) -> list[Key]:
    """Every key, oldest first."""
    return [
        Key(
            id=row["id"],
            tenant_id=row["tenant_id"],
            name=row["name"],
            created=row["created_at"].isoformat(timespec="seconds"),
            revoked=row["revoked_at"].isoformat(timespec="seconds") if row["revoked_at"] else None,
        )
        for row in await tx.all(_LIST)
    ]


async def revoke_key(tx: Tx, key_id: str) -> bool:
    """False if there is no such key, or it is revoked already."""
    return await tx.one(_REVOKE, id=key_id) is not None
