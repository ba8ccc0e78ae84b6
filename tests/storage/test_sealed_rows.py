"""What the secret key has sealed, over more rows than one page has."""

import asyncpg
import pytest

from app.domain.compaction import Compacted, seal_compacted
from app.domain.sealed import Seal
from app.domain.tool_credentials import Holder, Secret, seal_secret
from app.settings import load
from app.storage import agents, sealed_rows, tool_credentials
from app.storage.database import opened
from app.storage.sealed_rows import ROWS_AT_ONCE, Opened, Resealed

OLD, NEW = b"o" * 32, b"n" * 32
ROWS = 2 * ROWS_AT_ONCE + 1

CREDENTIAL = """
insert into tool_credentials (tenant_id, id, server, server_hash, user_name, key_id, name, sealed, has_authorization, header_names,
                              created_at, updated_at)
select $1, 'cred_' || lpad(number::text, 4, '0'), 'https://far.example', sha256(convert_to(number::text, 'UTF8')), '', '', '',
       $2, true, '{}', 0, 0
from generate_series($3::int, $4::int) number
"""
AGENT = """
insert into agents (tenant_id, id, name, created_at, updated_at, model, description, users, body, secrets, bytes)
select $1, 'agent_' || lpad(number::text, 4, '0'), 'name' || number, 0, 0, 'm', '', null, '{"model": "m"}', $2, 0
from generate_series($3::int, $4::int) number
"""
ITEM = "insert into items (tenant_id, thread_id, turn, position, id, body) values ($1, 'thread_1', 1, $2, $3, $4)"


@pytest.fixture
async def filled(url):
    """A database whose rows the new key has sealed, but for one of each kind."""
    connection = await asyncpg.connect(url)
    for key, first, last in ((NEW, 1, ROWS - 1), (OLD, ROWS, ROWS)):
        seal = Seal(key).of("acme")
        secret = seal_secret(seal, "https://far.example", Holder(), Secret(authorization="s3cret"))
        await connection.execute(CREDENTIAL, "acme", secret, first, last)
        await connection.execute(AGENT, "acme", seal.close("{}", "agent"), first, last)
        item = f'{{"type": "compaction", "id": "cmp_{last}", "encrypted_content": "%s"}}'
        await connection.execute(ITEM, "acme", last, f"cmp_{last}", item % seal_compacted(Compacted("So far."), seal))
        await connection.execute(ITEM, "acme", last + 2 * ROWS, f"cmp_{last}", item % "")  # a summary that broke off
        await connection.execute(ITEM, "acme", last + 4 * ROWS, f"msg_{last}", '{"type": "message"}')
    yield url
    await connection.close()


async def test_rows_that_no_key_opens_are_counted_and_others_sealed_anew(filled):
    settings = load({"DATABASE_URL": filled})
    async with opened(settings) as database:
        for most, found in ((ROWS_AT_ONCE, Opened(ROWS_AT_ONCE, 0)), (10 * ROWS, Opened(ROWS, 1))):
            assert await tool_credentials.try_all(database, Seal(NEW), most=most) == found
        assert await sealed_rows.try_compactions(database, Seal(NEW), most=10) == Opened(2, 1)
        assert await sealed_rows.try_compactions(database, Seal(NEW, OLD), most=10) == Opened(2, 0)
        assert (await sealed_rows.try_compactions(database, Seal(NEW, OLD), most=1)).rows <= 1
        assert len([agent async for agent in agents.every(database)]) == ROWS
        for reseal in (tool_credentials.reseal_all, agents.reseal_all):
            assert await reseal(database, Seal(NEW)) == Resealed(ROWS - 1, 1)
            assert await reseal(database, Seal(NEW, OLD)) == Resealed(ROWS, 0)
            assert await reseal(database, Seal(NEW)) == Resealed(ROWS, 0)
        assert await tool_credentials.try_all(database, Seal(NEW), most=10 * ROWS) == Opened(ROWS, 0)
