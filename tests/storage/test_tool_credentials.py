"""What looking for credentials costs, counted by Postgres itself."""

import asyncpg
import msgspec
import pytest

from app.storage import tool_credentials
from tests.storage.plans import looked_at, nodes

FILL = """
insert into tool_credentials (tenant_id, id, server, server_hash, user_name, key_id, name, sealed, has_authorization, header_names,
                              created_at, updated_at)
select 't' || tenant, 'cred_' || server || '_' || holder, 'https://' || server, sha256(convert_to('https://' || server, 'UTF8')),
       case holder when 1 then 'ada' when 2 then 'bob' else '' end, case holder when 3 then 'key_1' else '' end, '', '', true, '{}', 0, 0
from generate_series(1, 5) tenant, generate_series(1, 1000) server, generate_series(0, 3) holder;
"""


@pytest.fixture
def own_url(new_database):
    """An empty database of the test's own."""
    return new_database()


@pytest.mark.parametrize("known", [True, False], ids=["analyzed", "not analyzed"])
async def test_the_credentials_of_a_run_are_found_by_their_servers(own_url, known):
    connection = await asyncpg.connect(own_url)
    try:
        await connection.execute("set plan_cache_mode = force_generic_plan")
        await connection.execute("alter table tool_credentials set (autovacuum_enabled = false)")
        await connection.execute(f"{FILL} {'analyze;' if known else ''}")
        query = tool_credentials._FIND
        await connection.execute(f"prepare find as {query.sql}")
        asked = {"tenant_id": "'t1'", "user": "'ada'", "key_id": "'key_1'"}
        hashes = ", ".join(f"'\\x{tool_credentials._hash(f'https://{number}').hex()}'" for number in (7, 70, 7000))
        binds = ", ".join(query.arguments({**asked, "server_hashes": f"array[{hashes}]::bytea[]"}))
        plan = await connection.fetchval(f"explain (analyze, format json) execute find ({binds})")
        (root,) = msgspec.json.decode(plan)
        rows = sum(looked_at(node) for node in nodes(root["Plan"]) if node.get("Relation Name") == "tool_credentials")
        assert rows == 2 * 3  # of two of the servers: the tenant's, ada's and the key's
    finally:
        await connection.close()
