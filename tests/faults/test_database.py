"""What a task that is broken off leaves behind in Postgres: nothing."""

import asyncio

import pytest
from sqlalchemy import text

from app.settings import Settings
from app.storage.database import Database, Query
from tests.faults.cluster import query
from tests.waiting import until


@pytest.mark.parametrize("again", [False, True], ids=["once", "twice"])
def test_a_transaction_that_is_broken_off_keeps_no_lock(cluster, again):
    async def break_off():
        database = Database(Settings(database_url=cluster.database_url, database_pool_size=1))
        lock, sleep = Query(text("select pg_advisory_xact_lock(:number)")), Query(text("select pg_sleep(1)"))
        locked = asyncio.Event()

        async def hold():
            async with database.begin() as tx:
                await tx.one(lock, number=77)
                locked.set()
                await tx.one(sleep)

        holding = asyncio.create_task(hold())
        await locked.wait()
        await asyncio.sleep(0.05)
        holding.cancel()
        if again:
            await asyncio.sleep(0)
            holding.cancel()
        await asyncio.gather(holding, return_exceptions=True)
        await asyncio.to_thread(until, is_free, "the lock is free", 5)
        async with asyncio.timeout(5), database.begin() as tx:  # and the pool's only connection is of use
            await tx.one(lock, number=77)
        await database.close()

    def is_free():
        return query(cluster.database_url, "select pg_try_advisory_xact_lock(77) as free")[0]["free"]

    asyncio.run(break_off())
