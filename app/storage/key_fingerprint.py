"""The fingerprint of the secret key, so that no process seals with one that the others do not have."""

from collections.abc import Sequence

from sqlalchemy import text

from app.storage.database import Database, Query

_OF_ALL = "one key seals for all tenants"

_STORED = Query(text("select fingerprint from sealing"), across_tenants=_OF_ALL)
_STORE = Query(
    text("""
    insert into sealing (fingerprint) values (:fingerprint)
    on conflict (is_only) do update set fingerprint = excluded.fingerprint
    where sealing.fingerprint = any(cast(:known as text[])) or :anyway
    returning fingerprint
    """),
    across_tenants=_OF_ALL,
)


async def accept_key(database: Database, fingerprints: Sequence[str], *, anyway: bool = False) -> bool:
    """Store the first fingerprint, that of the key that seals, as the database's; False if the stored one is none of them.
    `anyway` forgets that. Raises DatabaseUnavailable."""
    async with database.autocommit() as tx:
        stored = await tx.one(_STORED)
        if stored and stored["fingerprint"] == fingerprints[0]:
            return True  # without a write, which a standby would refuse
        return bool(await tx.one(_STORE, fingerprint=fingerprints[0], known=list(fingerprints), anyway=anyway))


async def is_known(database: Database, fingerprints: Sequence[str]) -> bool:
    """Whether the stored fingerprint is one of these, or there is none yet. Raises DatabaseUnavailable."""
    async with database.autocommit() as tx:
        stored = await tx.one(_STORED)
    return stored is None or stored["fingerprint"] in fingerprints
