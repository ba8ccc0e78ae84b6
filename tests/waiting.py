"""Reads the state of servers from outside, and waits for conditions."""

import asyncio
import itertools
import time
from collections.abc import Callable
from typing import Any, TypeVar

import asyncpg
import redis

from app.storage import journal
from app.storage.parts import dictionary

T = TypeVar("T")

ARCHIVED = f"""
select archive.frames, {dictionary("response").replace(":tenant_id", "response.tenant_id")}
from event_archive archive join responses response on response.tenant_id = archive.tenant_id and response.id = archive.response_id
"""

POLL_S = (0.01, 0.01, 0.01, 0.02, 0.03)
POLL_LATER_S = 0.05
"""A poll costs a connection or a request, so a condition that takes long is polled less often."""


def fetch(database_url: str, sql: str, *args: object) -> list[asyncpg.Record]:
    """The rows of one statement; must be called outside a running loop."""

    async def run() -> list[asyncpg.Record]:
        connection = await asyncpg.connect(database_url)
        try:
            return await connection.fetch(sql, *args)
        finally:
            await connection.close()

    return asyncio.run(run())


def count(database_url: str, table: str) -> int:
    """How many rows a table has."""
    return fetch(database_url, f"select count(*) from {table}")[0][0]


def dumped(database_url: str) -> str:
    """Every row of every table, as text."""
    tables = fetch(database_url, "select table_name from information_schema.tables where table_schema = 'public'")
    rows = [
        row[0]
        for (table,) in tables
        for row in fetch(database_url, f"select (to_jsonb(one) - 'frames')::text from \"{table}\" one")
    ]
    journalled = [row[0] for row in fetch(database_url, "select frames from event_journal")]
    archived = [journal.decompress(*row) for row in fetch(database_url, ARCHIVED)]
    return "\n".join([*rows, *(frames.decode() for frames in (*journalled, *archived))])


READ_BY_TYPE = {
    b"stream": "XRANGE {} - +",
    b"string": "GET {}",
    b"hash": "HGETALL {}",
    b"list": "LRANGE {} 0 -1",
    b"set": "SMEMBERS {}",
    b"zset": "ZRANGE {} 0 -1",
    b"none": "GET {}",  # it has expired since it was listed
}


def remembered(redis_url: str, prefix: str) -> str:
    """All keys of one server in Redis, with their values."""
    with redis.Redis.from_url(redis_url) as client:

        def held(key: bytes) -> bytes:
            read = [key if part == "{}" else part for part in READ_BY_TYPE[client.type(key)].split()]
            return b"%b %b %b" % (key, str(client.execute_command(*read)).encode(), client.dump(key) or b"")

        return b"\n".join(map(held, client.keys(f"{prefix}*"))).decode("latin-1")


def until(condition: Callable[[], T], what: str = "", timeout_s: float = 20.0) -> T:
    """Poll until the condition is true, and return its value. Raises AssertionError with `what` after the timeout.

    The state is that of another process, which sends no signal: hence the pause, between two polls and never instead of one.
    """
    deadline, pauses_s = time.monotonic() + timeout_s, itertools.chain(POLL_S, itertools.repeat(POLL_LATER_S))
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}; the last answer was {found!r}"
        time.sleep(next(pauses_s))
    return found


def settled(call: Callable[..., Any], *args: object, error: type[Exception], timeout_s: float = 15.0) -> Any:
    """The result of the call once it no longer raises `error`."""

    def attempt() -> list[Any]:
        try:
            return [call(*args)]
        except error:
            return []

    return until(attempt, timeout_s=timeout_s)[0]
