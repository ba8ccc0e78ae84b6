"""What could not be settled while Redis was silent, in a process that has much of it."""

import asyncio
import time
import uuid

import redis

from app.domain.quotas import Holder, Limits
from app.runs.quotas import SILENCE_S, Grant, Quotas
from app.settings import Settings
from app.storage.database import Database

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
        while time.monotonic() < silent_at + 1.5 + SILENCE_S:
            await asyncio.sleep(0.05)

        quotas.start()
        assert (await quotas.admit(TENANT, LIMITS, "resp_running")).grant
        [places] = quotas._store._keys(TENANT, None, "foreground")
        while len(quotas._unsettled) == ENDED:
            await asyncio.sleep(0.01)
        ends_at = valkey.zscore(places, "resp_running")
        while valkey.zscore(places, "resp_running") == ends_at:
            assert quotas._unsettled, "it was not prolonged before all was settled"
            await asyncio.sleep(0.01)
        while quotas._unsettled:
            await asyncio.sleep(0.05)
    await quotas.close()
