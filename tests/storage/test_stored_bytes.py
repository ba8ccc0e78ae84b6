"""What a tenant, or a user of it, has stored, measured page by page, is what Postgres says of all its rows."""

import asyncio

import asyncpg
import pytest

from app.domain.rights import owner_of
from app.settings import Settings
from app.storage import stored_bytes
from app.storage.database import Database

ADA = owner_of("acme", "ada")

FILL = f"insert into tenants (id, tenant) values ('acme', null), ('{ADA}', 'acme'), ('other', null);"

ROWS = f"""
insert into responses (tenant_id, id, thread_id, turn, status, background, model, metadata, created_at, body)
select owner, 'resp_' || i, 'thread_' || i, 1, 'completed', false, 'm', '{{"a": "b"}}', 0,
       json_build_object('text', repeat(md5(i::text), i))
from generate_series(1, 50) i, unnest(array['acme', '{ADA}', 'other']) owner;
insert into items (tenant_id, thread_id, turn, position, id, body)
select tenant_id, thread_id, turn, position, 'msg_' || position, json_build_object('text', repeat(md5(id), 100))
from responses, generate_series(0, 4) position;
insert into parts (tenant_id, hash, body) select tenant_id, sha256(id::bytea), repeat(id, 1000) from responses;
insert into event_archive (tenant_id, response_id, first_number, frames)
select tenant_id, id, number, sha256(id::bytea) from responses, generate_series(0, 2) number;
insert into files (tenant_id, id, created_at, filename, bytes, written_at)
select tenant_id, id, 0, '', 10, now() from responses;
insert into conversations (tenant_id, id, created_at, metadata, thread_id, turn)
select tenant_id, 'conv_' || id, 0, json_build_object('a', repeat(id, 20)), thread_id, 0 from responses;
"""

SUM = f"""
select sum(size)::bigint from (
    select tenant_id, pg_column_size(body) + pg_column_size(metadata) as size from responses
    union all select tenant_id, pg_column_size(body) from items
    union all select tenant_id, pg_column_size(body) from parts
    union all select tenant_id, pg_column_size(frames) from event_archive
    union all select tenant_id, bytes from files
    union all select tenant_id, pg_column_size(metadata) from conversations
) every where tenant_id in ('acme', '{ADA}')
"""


@pytest.fixture
def fresh(new_database):
    return new_database()


@pytest.mark.parametrize("page_rows", [7, 50, 20_000])
async def test_all_rows_of_a_tenant_and_its_users_are_measured_by_one_process_at_a_time(fresh, page_rows):
    connection, turns = await asyncpg.connect(fresh), asyncio.Lock()
    await connection.execute(FILL + ROWS)
    database = Database(Settings(database_url=fresh))
    try:
        async with database.autocommit() as tx:
            assert await stored_bytes.read(tx, "acme", age_s=60) == stored_bytes.Measured(None, is_due=True)
        await stored_bytes.measure(database, "acme", age_s=60, turns=turns, page_rows=page_rows)
        expected = await connection.fetchval(SUM)
        async with database.autocommit() as tx:
            assert await stored_bytes.read(tx, "acme", age_s=60) == stored_bytes.Measured(expected, is_due=False)
        await connection.execute("delete from files")
        await stored_bytes.measure(database, "acme", age_s=60, turns=turns)  # as another process would
        assert await connection.fetchval("select stored_bytes from tenants where id = 'acme'") == expected
        await connection.execute("update tenants set measured_at = now() - interval '61 s'")
        await stored_bytes.measure(database, "acme", age_s=60, turns=turns, page_rows=page_rows)
        assert await connection.fetchval("select stored_bytes from tenants where id = 'acme'") == expected - 1_000
    finally:
        await database.close()
        await connection.close()


async def test_a_user_is_measured_alone_and_known_as_one_of_its_tenant(fresh):
    """The row of the user may be missing."""
    connection, turns = await asyncpg.connect(fresh), asyncio.Lock()
    await connection.execute(FILL + ROWS)
    await connection.execute(f"delete from tenants where id = '{ADA}'")
    database = Database(Settings(database_url=fresh))
    try:
        async with database.autocommit() as tx:
            assert await stored_bytes.read(tx, ADA, age_s=60) == stored_bytes.Measured(None, is_due=True)
        await stored_bytes.measure(database, ADA, age_s=60, turns=turns)
        async with database.autocommit() as tx:
            of_ada = await stored_bytes.read(tx, ADA, age_s=60)
            assert await stored_bytes.read(tx, "acme", age_s=60) == stored_bytes.Measured(None, is_due=True)
        assert of_ada == stored_bytes.Measured(await connection.fetchval(SUM.replace("'acme', ", "")), is_due=False)
        await stored_bytes.measure(database, "acme", age_s=60, turns=turns)
        rows = await connection.fetch("select id, tenant, stored_bytes from tenants order by id")
        assert [(row["id"], row["tenant"]) for row in rows] == [("acme", None), (ADA, "acme"), ("other", None)]
        sizes = [row["stored_bytes"] for row in rows]
        assert sizes == [await connection.fetchval(SUM), of_ada.bytes, None], "the tenant's has its users' data"
    finally:
        await database.close()
        await connection.close()


async def test_however_many_are_measured_at_once_they_take_one_connection(fresh, waits):
    connection, locking, turns = await asyncpg.connect(fresh), await asyncpg.connect(fresh), asyncio.Lock()
    await connection.execute(FILL + ROWS)
    database = Database(Settings(database_url=fresh, database_pool_size=2))
    users = [owner_of("acme", f"user {number}") for number in range(20)]
    try:
        async with locking.transaction():
            await locking.execute("lock table responses in access exclusive mode")
            tasks = [
                asyncio.create_task(stored_bytes.measure(database, owner, age_s=60, turns=turns)) for owner in users
            ]
            await waits(connection, tasks[0])
            async with database.autocommit() as tx, asyncio.timeout(5):
                assert (await stored_bytes.read(tx, users[-1], age_s=60)).bytes is None
            waiting = (
                "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
            )
            assert await connection.fetchval(waiting) == 1
        await asyncio.gather(*tasks)
        assert await connection.fetchval("select count(*) from tenants where stored_bytes = 0") == 20
    finally:
        await database.close()
        await connection.close()
        await locking.close()
