"""The connections to Redis."""

import asyncio
from collections.abc import Iterable

import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisGone

from app.settings import Settings
from app.storage.urls import redis_address

RETRY_S = 0.1
"""Between attempts while Redis is away."""

CONNECTIONS_MAX = 16
"""Of one process, beside the two that wait for events and notifications."""

BLOCK_MS = 5_000
"""How long one read waits; only a bound, since a new reader interrupts it."""


def connect(settings: Settings) -> tuple[redis.Redis, redis.Redis]:
    """A client for everything, and one whose single connection may block."""
    blocking = redis.from_url(
        redis_address(settings.redis_url),
        single_connection_client=True,
        socket_timeout=BLOCK_MS / 1000 + settings.redis_timeout_s,
        retry=Retry(NoBackoff(), 0),
        socket_connect_timeout=settings.redis_timeout_s,
        health_check_interval=0,
    )
    return connect_pooled(settings, timeout_s=settings.redis_timeout_s), blocking


def connect_pooled(settings: Settings, *, timeout_s: float) -> redis.Redis:
    """A client with a pool of its own. A lost connection is tried once more at once; what is not answered in time is not."""
    pool: redis.BlockingConnectionPool = redis.BlockingConnectionPool.from_url(
        redis_address(settings.redis_url),
        max_connections=CONNECTIONS_MAX,
        timeout=timeout_s,
        socket_timeout=timeout_s,
        retry=Retry(NoBackoff(), 1, supported_errors=(RedisGone,)),
        socket_connect_timeout=timeout_s,
        health_check_interval=0,
    )
    return redis.Redis.from_pool(pool)


async def break_off(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancel tasks until they have ended: redis-py swallows a cancellation that comes while it connects."""
    every = list(tasks)
    while left := [task for task in every if not task.done()]:
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=RETRY_S)
    await asyncio.gather(*every, return_exceptions=True)  # so that their errors count as retrieved
