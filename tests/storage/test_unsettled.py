"""What could not be settled while Redis was silent, in a process that has much of it."""

import asyncio
import time
import uuid

import pytest
import redis

from app.domain.quotas import Holder, Limits
from app.errors import RateLimited
from app.runs.quotas import SILENCE_S, Grant, Quotas
from app.settings import Settings
from app.storage.database import Database

TENANT = Holder("acme", None)
LIMITS = [Limits(concurrent_runs=1)]
ENDED = 10_000
"""Runs, which take longer than a lease to settle."""


async def test_a_run_keeps_its_place_while_much_is_settled(servers, url):
    settings = Settings(
        redis_url=servers.redis_url,
        redis_prefix=f"quotas-{uuid.uuid4().hex}",
        database_url=url,
        lease_s=2.4,
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
    begun = time.monotonic()
    while quotas._unsettled:
        with pytest.raises(RateLimited):
            await quotas.admit(TENANT, LIMITS, "resp_more")
        assert time.monotonic() < begun + 60, f"{len(quotas._unsettled)} are left"
        await asyncio.sleep(0.02)
    assert time.monotonic() > begun + settings.lease_s, "too few to tell"
    await quotas.close()
