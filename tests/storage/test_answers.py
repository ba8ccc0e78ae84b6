"""Answers to approval requests are stored in one order, whatever order a client gives."""

import asyncio

import asyncpg
import pytest

from app.errors import InvalidRequest
from app.storage.approvals import answer_requests
from app.storage.database import Tx

WAITS = "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"


@pytest.fixture
def url(new_database):
    """An empty database."""
    return new_database()


@pytest.fixture
async def connections(url):
    """Three connections to it."""
    opened = [await asyncpg.connect(url) for _ in range(3)]
    yield opened
    for connection in opened:
        await connection.close()


async def test_two_who_answer_the_same_requests_do_not_wait_for_each_other_crosswise(connections):
    first, second, looking = connections
    transaction = first.transaction()
    await transaction.start()
    await answer_requests(Tx(first), "t", "r1", [("a", True)])
    waiting = asyncio.create_task(answer_requests(Tx(second), "t", "r2", [("b", True), ("a", True)]))
    while not await looking.fetchval(WAITS):
        assert not waiting.done()
    async with asyncio.timeout(10):  # "b" is free: whoever waits for "a" has not taken it
        await answer_requests(Tx(looking), "t", "r1", [("b", False)])
    await transaction.rollback()
    with pytest.raises(InvalidRequest, match="'b' has been answered already"):
        await waiting
