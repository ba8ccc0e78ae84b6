"""Old entries of the audit log: which are deleted, of whom, by how many at once, and what looking for them costs."""

import time

import asyncpg
import msgspec
import pytest

from app.storage import audit
from app.storage.database import Tx
from tests.storage.plans import looked_at, nodes

DAY_S = 86_400


@pytest.fixture
def fresh(new_database):
    return new_database()


@pytest.fixture
async def log(fresh):
    """A connection to a database whose log a test fills."""
    connection = await asyncpg.connect(fresh)
    yield connection
    await connection.close()


async def fill(log: asyncpg.Connection, tenant: str, *ages_s: float) -> None:
    """An entry of each age, by ids as they are made."""
    rows = []
    for number, age_s in enumerate(ages_s):
        at = time.time() - age_s
        id = f"audit_{int(at * 1000):012x}{number:024x}"
        rows.append((tenant, id, int(at), "command_line", "", "key.created", f"key_{number}"))
    columns = ["tenant_id", "id", "created_at", "actor", "user_name", "action", "target"]
    await log.copy_records_to_table("audit_log", records=rows, columns=columns)


async def left(log: asyncpg.Connection) -> dict[str, int]:
    return dict(await log.fetch("select tenant_id, count(*) from audit_log group by 1"))


async def test_of_every_tenant_what_is_older_is_deleted_and_nothing_else(log):
    await fill(log, "acme", 31 * DAY_S, 30 * DAY_S + 60, 30 * DAY_S - 60, 0)
    await fill(log, "new", 29 * DAY_S, 0)
    await fill(log, "old", 365 * DAY_S)
    assert await audit.delete_old(Tx(log), days=30, limit=100) == 3
    assert await left(log) == {"acme": 2, "new": 2}
    assert await audit.delete_old(Tx(log), days=30, limit=100) == 0


async def test_a_time_before_all_ids_deletes_nothing(log):
    await fill(log, "acme", time.time(), 0)
    assert await audit.delete_old(Tx(log), days=1_000_000, limit=100) == 0
    assert await left(log) == {"acme": 2}


async def test_so_many_are_deleted_at_once_the_oldest_of_a_tenant_first(log):
    await fill(log, "a", *(DAY_S * (10 + number) for number in range(7)))
    await fill(log, "b", *(DAY_S * (10 + number) for number in range(7)))
    found = []
    while deleted := await audit.delete_old(Tx(log), days=5, limit=4):
        found.append((deleted, await left(log)))
    assert found == [(4, {"a": 3, "b": 7}), (4, {"b": 6}), (4, {"b": 2}), (2, {})]


async def test_two_processes_delete_beside_each_other(log, fresh):
    await fill(log, "a", *(DAY_S * (10 + number) for number in range(8)))
    other = await asyncpg.connect(fresh)
    try:
        async with log.transaction():
            assert await audit.delete_old(Tx(log), days=5, limit=5) == 5
            assert await audit.delete_old(Tx(other), days=5, limit=5) == 3, "it waits for nobody"
    finally:
        await other.close()
    assert await left(log) == {}


async def rows_read(log: asyncpg.Connection, *, days: int, limit: int) -> int:
    """How many rows of the log a look for old entries reads, by Postgres' own count."""
    await log.execute("analyze")
    arguments = audit._DELETE_OLD.arguments({"days": days, "limit": limit})
    plan = await log.fetchval(f"explain (analyze, format json) {audit._DELETE_OLD.sql}", *arguments)
    (root,) = msgspec.json.decode(plan)
    scans = [node for node in nodes(root["Plan"]) if "Scan" in node["Node Type"]]
    return sum(looked_at(node) for node in scans if node.get("Relation Name") == "audit_log")


async def test_looking_costs_a_row_for_each_tenant_and_deleting_the_rows_that_are_deleted(log):
    for tenant in ("a", "b", "c"):
        await fill(log, tenant, *(2 * DAY_S for _ in range(5_000)), *range(5_000))
    assert await rows_read(log, days=3, limit=1_000) == 3
    read = await rows_read(log, days=1, limit=1_000)
    assert await left(log) == {"a": 9_000, "b": 10_000, "c": 10_000}
    assert 2_000 < read <= 2_003, "each is found and deleted"
