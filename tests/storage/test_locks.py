"""Statements that meet the rows of another transaction: what they wait for, and what they know then."""

import asyncio

import asyncpg
import pytest
from msgspec.structs import replace

from app.domain.lifecycle import Outcome, close_response, open_response
from app.errors import InvalidRequest
from app.storage.approvals import answer_requests
from app.storage.database import Tx
from app.storage.endings import end_background
from app.storage.usage import NO_CHARGE
from tests.unit.build import request

RUN = """
with response as (
    insert into responses (tenant_id, id, thread_id, turn, status, background, model, metadata, created_at, body)
    values ('t', $1, $1, 1, 'in_progress', true, 'm', '{}', 0, '{}')
)
insert into runs (tenant_id, response_id, state, due_at, lease, streamed, number_ceiling)
values ('t', $1, 'running', now(), 1, false, 0)
"""
WAITS = "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"


@pytest.fixture
async def connections(url):
    """Three connections to it."""
    opened = [await asyncpg.connect(url) for _ in range(3)]
    yield opened
    for connection in opened:
        await connection.close()


async def until_it_waits(task, looking):
    """Until Postgres says that somebody waits for a lock, which can only be the task."""
    while not await looking.fetchval(WAITS):
        assert not task.done()


async def test_a_seal_that_waits_for_its_earlier_attempt_knows_it(connections):
    first, second, looking = connections
    response = open_response(request(background=True), id="resp_1", created_at=0)
    response = close_response(replace(response, status="in_progress"), Outcome("completed"), usage=None, now=1)
    await first.execute(RUN, response.id)
    transaction = first.transaction()
    await transaction.start()
    assert await end_background(Tx(first), "t", response, 1, [], NO_CHARGE)
    again = asyncio.create_task(end_background(Tx(second), "t", response, 1, [], NO_CHARGE))
    await until_it_waits(again, looking)
    await transaction.commit()
    assert await again
    assert not await end_background(Tx(looking), "t", response, 2, [], NO_CHARGE)


async def test_two_who_answer_the_same_requests_do_not_wait_for_each_other_crosswise(connections):
    first, second, looking = connections
    transaction = first.transaction()
    await transaction.start()
    await answer_requests(Tx(first), "t", "r1", [("a", True)])
    waiting = asyncio.create_task(answer_requests(Tx(second), "t", "r2", [("b", True), ("a", True)]))
    await until_it_waits(waiting, looking)
    async with asyncio.timeout(10):  # "b" is free: whoever waits for "a" has not taken it
        await answer_requests(Tx(looking), "t", "r1", [("b", False)])
    await transaction.rollback()
    with pytest.raises(InvalidRequest, match="'b' has been answered already"):
        await waiting
