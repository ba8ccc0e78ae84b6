"""A database of each module's own, and connections to it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import asyncpg
import pytest


@pytest.fixture(scope="module")
def url(new_database: Callable[[], str]) -> str:
    """A database without rows."""
    return new_database()


@pytest.fixture
async def connection(url: str) -> AsyncIterator[Any]:
    """A connection to it."""
    opened = await asyncpg.connect(url)
    yield opened
    await opened.close()


@pytest.fixture
async def another(url: str) -> AsyncIterator[Any]:
    """Another connection to it."""
    opened = await asyncpg.connect(url)
    yield opened
    await opened.close()


Waits = Callable[[Any, "asyncio.Task[Any]"], Awaitable[None]]


@pytest.fixture
def waits() -> Waits:
    """Looks, over a connection, until Postgres says that a task waits for a lock."""

    async def look(connection: Any, task: "asyncio.Task[Any]") -> None:
        sql = "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
        while not await connection.fetchval(sql):
            assert not task.done()

    return look
