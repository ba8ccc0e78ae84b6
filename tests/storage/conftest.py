"""A database of each module's own, and a connection to it."""

from collections.abc import AsyncIterator, Callable
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
