"""What the statements cost: rows read, counted by Postgres itself. A gross regression reads rows that it does not need."""

from typing import Any

import asyncpg
import msgspec
import pytest

from app.storage import completions, contexts, endings, journal, responses, threads
from app.storage.database import Tx
from app.storage.pages import BYTES_MAX
from app.storage.tables import OUTPUT_POSITION
from tests.storage.plans import looked_at, nodes

TURNS = 300
ITEMS_PER_TURN = 3
OTHER_THREADS = 60
UNBOUNDED = {"page_bytes": BYTES_MAX, "bytes_max": BYTES_MAX}
ITEM_BYTES = len('{"type": "message"}')

FILL = f"""
insert into responses (tenant_id, id, thread_id, turn, status, background, model, metadata, created_at, body, context_bytes)
select 't', 'resp_' || thread || '_' || turn, 'thread_' || thread, turn, 'completed', false, 'm', '{{}}', 0, '{{}}',
       turn * {ITEMS_PER_TURN * ITEM_BYTES}
from generate_series(0, {OTHER_THREADS}) thread, generate_series(1, {TURNS}) turn;
insert into items (tenant_id, thread_id, turn, position, id, body)
select tenant_id, thread_id, turn, position, id || '_' || position, '{{"type": "message"}}'
from responses, unnest(array[0, {OUTPUT_POSITION}, {OUTPUT_POSITION + 1}]) position;
insert into conversations (tenant_id, id, created_at, metadata, thread_id, turn)
values ('t', 'conv_0', 0, '{{}}', 'thread_0', {TURNS}), ('t', 'conv_1', 0, '{{}}', 'thread_1', 1);
analyze;
"""


@pytest.fixture(scope="module")
async def filled(url):
    """A database with many threads of one tenant."""
    connection = await asyncpg.connect(url)
    await connection.execute(FILL)
    yield connection
    await connection.close()


async def rows_read(connection: asyncpg.Connection, query: responses.Query, **binds: Any) -> int:
    """How many rows of `items` the statement looks at."""
    arguments = query.arguments({"tenant_id": "t", **binds})
    plan = await connection.fetchval(f"explain (analyze, format json) {query.sql}", *arguments)
    (root,) = msgspec.json.decode(plan)
    return sum(looked_at(node) for node in nodes(root["Plan"]) if node.get("Relation Name") == "items")


async def test_a_context_costs_only_its_own_rows(filled):
    read = await rows_read(filled, contexts._CHAIN, id=f"resp_0_{TURNS}", limit=10**6, bytes_max=10**9, in_flight=True)
    assert read == TURNS * ITEMS_PER_TURN


async def test_of_a_response_in_flight_nothing_is_read_that_could_not_be_continued(filled):
    changed = filled.transaction()
    await changed.start()
    await filled.execute(f"update responses set status = 'in_progress' where id = 'resp_0_{TURNS}'")
    for in_flight, read in ((True, TURNS * ITEMS_PER_TURN), (False, 0)):
        asked = {"id": f"resp_0_{TURNS}", "limit": 10**6, "bytes_max": 10**9, "in_flight": in_flight}
        assert await rows_read(filled, contexts._CHAIN, **asked) == read
    await changed.rollback()


async def test_a_context_that_is_too_long_costs_none_of_its_rows(filled):
    most = TURNS * ITEMS_PER_TURN * ITEM_BYTES - 1
    assert (
        await rows_read(filled, contexts._CHAIN, id=f"resp_0_{TURNS}", limit=10**6, bytes_max=most, in_flight=True) == 0
    )


async def test_a_context_that_was_never_counted_is_measured(filled):
    undone = filled.transaction()
    await undone.start()
    try:
        await filled.execute("update responses set context_bytes = null where thread_id = 'thread_0'")
        for bytes_max, items in ((0, None), (10**9, 7 * ITEMS_PER_TURN)):
            chain = await contexts.load_chain(Tx(filled), "t", "resp_0_7", items_max=10**6, bytes_max=bytes_max)
            assert chain.bytes == 7 * ITEMS_PER_TURN * ITEM_BYTES
            assert (chain.items and len(chain.items)) == items
    finally:
        await undone.rollback()


@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_a_page_costs_the_same_however_long_the_chain(filled, order):
    for turn in (1, TURNS):
        read = await rows_read(
            filled, contexts._INPUT_PAGES[order], id=f"resp_0_{turn}", after="", limit=20, **UNBOUNDED
        )
        assert read <= 20 + ITEMS_PER_TURN


@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_a_page_of_a_conversation_costs_the_same_however_long_it_is(filled, order):
    query = contexts._CONVERSATION_PAGES[order]
    for after in ("", f"resp_0_{TURNS // 2}_0"):
        assert await rows_read(filled, query, id="conv_0", after=after, limit=20, **UNBOUNDED) <= 20 + ITEMS_PER_TURN
    assert await rows_read(filled, query, id="conv_1", after="", limit=20, **UNBOUNDED) == ITEMS_PER_TURN


async def test_a_page_behind_a_cursor_costs_a_page(filled):
    cursor = f"resp_0_{TURNS // 2}_0"
    read = await rows_read(
        filled, contexts._INPUT_PAGES["desc"], id=f"resp_0_{TURNS}", after=cursor, limit=20, **UNBOUNDED
    )
    assert read <= 20 + ITEMS_PER_TURN


@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_a_page_of_items_ends_with_its_bytes(filled, order):
    async def page(page_bytes: int, bytes_max: int = BYTES_MAX, after: str | None = None) -> Any:
        id = f"resp_0_{TURNS}"
        asked = contexts.ItemPage(after=after, limit=20, order=order, page_bytes=page_bytes)
        return await contexts.list_input_items(Tx(filled), "t", id, asked, bytes_max)

    _, whole = await page(BYTES_MAX)
    assert len(whole.rows) == 20
    for page_bytes, most in ((1, 1), (10 * ITEM_BYTES, 10), (10 * ITEM_BYTES - 1, 9)):
        size, first = await page(page_bytes)
        assert (size, first.has_more) == (most * ITEM_BYTES, True)
        _, second = await page(page_bytes, after=first.rows[-1].id)
        assert [*first.rows, *second.rows] == whole.rows[: 2 * most]
    assert await page(10 * ITEM_BYTES, 10 * ITEM_BYTES - 1) == (10 * ITEM_BYTES, None)


async def test_a_response_costs_its_own_output(filled):
    assert await rows_read(filled, responses._GET, id=f"resp_0_{TURNS}", bytes_max=BYTES_MAX) == ITEMS_PER_TURN - 1


BY_ID = {
    "insert": responses._INSERT[False],
    "insert with parts": responses._INSERT[True],
    "finish": endings._END_FOREGROUND[False],
    "finish with parts": endings._END_FOREGROUND[True],
    "seal": endings._END_BACKGROUND[False],
    "seal with parts": endings._END_BACKGROUND[True],
    "begin": responses._BEGIN,
    "chain": contexts._CHAIN,
    "get": responses._GET,
    "page": contexts._INPUT_PAGES["desc"],
    "events": journal._READ,
    "tombstone": responses._TOMBSTONE,
    "purge": threads._PURGE,
    "forget": threads._FORGET,
    "conversation's chain": contexts._CONVERSATION_CHAIN,
    "conversation's page": contexts._CONVERSATION_PAGES["desc"],
    "withdraw": responses._WITHDRAW,
    "completion": completions._LOCK,
    "metadata": completions._UPDATE,
}


@pytest.fixture(scope="module")
def new_url(new_database):
    """Another empty database."""
    return new_database()


@pytest.fixture(scope="module")
async def unknown(new_url):
    """A database whose tables Postgres has not analyzed yet; a connection keeps the plans that it makes there."""
    connection = await asyncpg.connect(new_url)
    await connection.execute("set plan_cache_mode = force_generic_plan")
    yield connection
    await connection.close()


@pytest.mark.parametrize("name", BY_ID)
async def test_the_first_plans_look_for_a_response_by_its_id(unknown, name):
    """With two indexes by tenant, some of them read all responses of the tenant."""
    query = BY_ID[name]
    await unknown.execute(f'prepare "{name}" as {query.sql}')
    nothing = ", ".join("null" for _ in query.arguments({}))
    plan = await unknown.fetchval(f'explain (format json) execute "{name}" ({nothing})')
    (root,) = msgspec.json.decode(plan)
    scans = [
        node
        for node in nodes(root["Plan"])
        if node.get("Relation Name") in {"responses", "conversations", "removals", "branches"}
        and "Scan" in node["Node Type"]
    ]
    assert scans
    assert [node["Index Cond"] for node in scans if " AND " not in node["Index Cond"]] == []
