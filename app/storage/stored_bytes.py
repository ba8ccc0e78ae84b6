"""What a tenant, or one user of it, has stored: measured in the background by reading the rows, page by page, where there is a limit.

Nothing is counted when rows are written, so a create costs no more, and no row is one that all creates of a tenant change. The sizes are
those that Postgres has on disk, compressed: to know them it reads no long values.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from msgspec import Struct
from sqlalchemy import text

from app.domain.rights import tenant_of, user_of
from app.storage.database import Database, Query, Tx

PAGE_ROWS = 20_000
"""Rows that one statement reads: some milliseconds."""

REST = 20
"""Measuring takes at most one part in so many of a connection's time."""

_READ = Query(
    text("""
    select stored_bytes,
           measured_at is null or measured_at < now() - cast(:age_s as float8) * interval '1 second' as is_due
    from tenants where id = :tenant_id
    """),
    across_tenants="the row of the owner itself",
)
_BEGIN = Query(
    text("""
    insert into tenants (id, tenant, measured_at) values (:tenant_id, :tenant, now())
    on conflict (id) do update set measured_at = now()
    where tenants.measured_at is null
       or tenants.measured_at < now() - cast(:age_s as float8) * interval '1 second'
    returning id
    """)
)
_END = Query(
    text("""
    update tenants set stored_bytes = :bytes, measured_at = now() + cast(:rest_s as float8) * interval '1 second'
    where id = :tenant_id
    """),
    across_tenants="the row of the owner itself",
)
_USERS = Query(
    text("select id from tenants where tenant = :tenant"), across_tenants="the limit is that of a tenant with its users"
)


class _Pages(Struct, frozen=True):
    """How the rows of a table are read: in the order of the primary key, from before its first value."""

    query: Query
    first: Mapping[str, Any]


def _pages(table: str, size: str, **first: Any) -> _Pages:
    names, binds = ", ".join(first), ", ".join(f":after_{name}" for name in first)
    backwards = ", ".join(f"{name} desc" for name in first)
    last = ", ".join(f"(select {name} from page order by {backwards} limit 1) as {name}" for name in first)
    return _Pages(
        Query(
            text(f"""
            with page as (
                select {names}, {size} as size from {table}
                where tenant_id = :tenant_id and ({names}) > ({binds}) order by {names} limit :page_rows
            )
            select cast(coalesce(sum(size), 0) as bigint) as bytes, count(*) as rows, {last} from page
            """)
        ),
        first,
    )


_TABLES = (
    _pages("responses", "pg_column_size(body) + pg_column_size(metadata)", id=""),
    _pages("items", "pg_column_size(body)", thread_id="", turn=-1, position=-1),
    _pages("parts", "pg_column_size(body)", hash=b""),
    _pages("event_archive", "pg_column_size(frames)", response_id="", first_number=-1),
    _pages("files", "bytes", id=""),
    _pages("conversations", "pg_column_size(metadata)", id=""),
)


class Measured(Struct, frozen=True):
    """What is known of an owner."""

    bytes: int | None
    """None if it was never measured."""
    is_due: bool


async def read(tx: Tx, owner: str, *, age_s: float) -> Measured:
    """What was measured last, and whether that is so old that it is to be measured again."""
    row = await tx.one(_READ, tenant_id=owner, age_s=age_s)
    return Measured(row["stored_bytes"], row["is_due"]) if row else Measured(None, is_due=True)


async def measure(
    database: Database, owner: str, *, age_s: float, turns: asyncio.Lock, page_rows: int = PAGE_ROWS
) -> None:
    """Measure what an owner has stored, a tenant with its users, unless another process does. Those that share `turns` take one
    connection together, and none between two pages. Raises DatabaseUnavailable."""
    connection = _Connection(database, turns)
    tenant = tenant_of(owner) if user_of(owner) else None
    async with connection.turn() as tx:
        if await tx.one(_BEGIN, tenant_id=owner, tenant=tenant, age_s=age_s) is None:
            return
        users = [] if tenant else [row["id"] for row in await tx.all(_USERS, tenant=owner)]
    total = 0
    for one in (owner, *users):
        for pages in _TABLES:
            total += await _size(connection, one, pages, page_rows)
    async with connection.turn() as tx:
        rest_s = max(0.0, REST * connection.used_s - age_s)
        await tx.one(_END, tenant_id=owner, bytes=total, rest_s=rest_s)


class _Connection:
    """A connection for one measurement, which has it for a statement and gives it to others that wait for their turn."""

    def __init__(self, database: Database, turns: asyncio.Lock) -> None:
        self._database, self._turns = database, turns
        self.used_s = 0.0

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[Tx]:
        """The connection, from here to the end of the block."""
        async with self._turns, self._database.autocommit() as tx:
            begun = time.monotonic()
            try:
                yield tx
            finally:
                self.used_s += time.monotonic() - begun


async def _size(connection: _Connection, owner: str, pages: _Pages, page_rows: int) -> int:
    total, after = 0, dict(pages.first)
    while True:
        async with connection.turn() as tx:
            binds = {f"after_{name}": value for name, value in after.items()}
            row = await tx.one(pages.query, tenant_id=owner, page_rows=page_rows, **binds)
        assert row
        total += int(row["bytes"])
        if row["rows"] < page_rows:
            return total
        after = {name: row[name] for name in pages.first}
