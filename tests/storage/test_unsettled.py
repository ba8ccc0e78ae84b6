"""What could not be settled while Redis was silent, in a process that has much of it."""

import asyncio
import time
import uuid

import redis

from app.domain.quotas import Holder, Limits
from app.runs.quotas import SILENCE_S, Grant, Quotas
from app.settings import Settings
from app.storage.database import Database
from tests.waiting import until

TENANT = Holder("acme", None)
LIMITS = [Limits(concurrent_runs=1)]
ENDED = 10_000
"""Runs, which take longer to settle than the half second between two beats."""


async def test_the_place_of_a_run_is_prolonged_while_much_is_settled(servers, url):
    settings = Settings(
        redis_url=servers.redis_url,
        redis_prefix=f"quotas-{uuid.uuid4().hex}",
        database_url=url,
        lease_s=2.0,
        quota_timeout_s=1.0,
    )
    quotas = Quotas(settings, Database(settings))
    with redis.Redis.from_url(servers.redis_url) as valkey:
        valkey.client_pause(1_500)
        silent_at = time.monotonic()
        for number in range(ENDED):
            await quotas.settle(Grant(Holder(f"other-{number}", "key_a"), f"resp_{number}", 1), 1)
        await asyncio.to_thread(until, lambda: time.monotonic() > silent_at + 1.5 + SILENCE_S)

        quotas.start()
        assert (await quotas.admit(TENANT, LIMITS, "resp_running")).grant
        [places] = quotas._store._keys(TENANT, None, "foreground")

        def ends_at() -> float:
            """When the place is lost."""
            return valkey.zscore(places, "resp_running")

        await asyncio.to_thread(until, lambda: len(quotas._unsettled) < ENDED)
        first = ends_at()
        await asyncio.to_thread(until, lambda: ends_at() > first or not quotas._unsettled)
        assert quotas._unsettled, "it was not prolonged before all was settled"
        await asyncio.to_thread(until, lambda: not quotas._unsettled, timeout_s=60)
    await quotas.close()
