"""Rows of all tenants with what the secret key has sealed: read page by page, and whether a key that this process has opens them."""

from collections.abc import AsyncIterator, Callable

from msgspec import Struct
from sqlalchemy import text

from app.domain.compaction import is_compaction, open_compacted
from app.domain.sealed import Seal
from app.storage.database import Database, Query, Row
from app.wire.items import decode_stored_item

ROWS_AT_ONCE = 100

SAMPLED_MAX = 20_000
"""Items among which compaction items are looked for."""

_RUNS = Query(
    text("""
    select tenant_id, response_id as id, secrets from runs
    where (tenant_id, response_id) > (:after_tenant, :after_id) and secrets is not null
    order by tenant_id, response_id limit :limit
    """),
    across_tenants="the operator asks whether a key opens all of them",
)

_COMPACTIONS = Query(
    text(r"""
    select tenant_id, cast(body as text) as body from items
    tablesample system (least(100, cast(:rows as float8) * 100 / greatest(1, (
        select reltuples from pg_class where oid = cast('items' as regclass)))))
    where id like 'cmp\_%' and part_hashes is null limit :limit
    """),
    across_tenants="the operator asks whether a key opens a sample of them",
)


class Resealed(Struct, frozen=True):
    """How many rows are sealed with another key now, and how many no key opens."""

    resealed: int
    unopened: int


class Opened(Struct, frozen=True):
    """How many rows were looked at, and how many of them no key opens."""

    rows: int
    unopened: int


async def read_all(database: Database, query: Query) -> AsyncIterator[Row]:
    """What a query gives that orders rows by `tenant_id` and `id`, and takes where to begin. Raises DatabaseUnavailable."""
    after = ("", "")
    while True:
        async with database.autocommit() as tx:
            rows = await tx.all(query, after_tenant=after[0], after_id=after[1], limit=ROWS_AT_ONCE)
        for row in rows:
            yield row
        if len(rows) < ROWS_AT_ONCE:
            return
        after = (rows[-1]["tenant_id"], rows[-1]["id"])


async def try_opening(rows: AsyncIterator[Row], opens: Callable[[Row], bool], *, most: int) -> Opened:
    """Open up to `most` rows."""
    looked_at = unopened = 0
    async for row in rows:
        looked_at += 1
        unopened += not opens(row)
        if looked_at == most:
            break
    return Opened(looked_at, unopened)


async def try_runs(database: Database, seal: Seal, *, most: int) -> Opened:
    """Open the secrets of responses that are being made or queued. Raises DatabaseUnavailable."""
    return await try_opening(read_all(database, _RUNS), lambda row: seal.open(row["secrets"]) is not None, most=most)


async def try_compactions(database: Database, seal: Seal, *, most: int) -> Opened:
    """Open the compaction items among a sample of SAMPLED_MAX items. Raises DatabaseUnavailable."""
    async with database.autocommit() as tx:
        rows = await tx.all(_COMPACTIONS, rows=SAMPLED_MAX, limit=most)
    found = [(row["tenant_id"], decode_stored_item(row["body"].encode())) for row in rows]
    sealed = [(tenant, item) for tenant, item in found if is_compaction(item)]
    opened = [open_compacted(item, seal.of(tenant).open) for tenant, item in sealed]
    return Opened(len(opened), opened.count(None))
