"""Our connections to Redis, and the hints that processes give each other over it."""

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

import redis.asyncio as redis
import structlog
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisGone
from redis.exceptions import RedisError

from app.settings import Settings
from app.storage.addresses import redis_address

log = structlog.get_logger()

RETRY_S = 0.1
"""Between attempts while Redis is away."""

CONNECTIONS_MAX = 16
"""Of one process, beside the two that wait for events and hints."""

BLOCK_MS = 5_000
"""How long one read waits; only a bound, since a new reader interrupts it."""


def connect(settings: Settings) -> tuple[redis.Redis, redis.Redis]:
    """A client for everything, and one whose single connection may block. A lost connection is tried once more at once; what
    is not answered in time is not."""
    address = redis_address(settings.redis_url)
    options: dict[str, Any] = {"socket_connect_timeout": settings.redis_timeout_s, "health_check_interval": 0}
    pool: redis.BlockingConnectionPool = redis.BlockingConnectionPool.from_url(
        address,
        max_connections=CONNECTIONS_MAX,
        timeout=settings.redis_timeout_s,
        socket_timeout=settings.redis_timeout_s,
        retry=Retry(NoBackoff(), 1, supported_errors=(RedisGone,)),
        **options,
    )
    blocking = redis.from_url(
        address,
        single_connection_client=True,
        socket_timeout=BLOCK_MS / 1000 + settings.redis_timeout_s,
        retry=Retry(NoBackoff(), 0),
        **options,
    )
    return redis.Redis(connection_pool=pool), blocking


async def break_off(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancel tasks until they have ended: redis-py swallows a cancellation that comes while it connects."""
    every = list(tasks)
    while left := [task for task in every if not task.done()]:
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=RETRY_S)
    await asyncio.gather(*every, return_exceptions=True)  # so that nobody misses what they ended with


class Hints:
    """What processes tell each other. Losing a hint costs time, no truth."""

    def __init__(self, client: redis.Redis, channel: str) -> None:
        self._client, self._channel = client, channel
        self._unsent: set[str] = set()
        self._added = asyncio.Event()
        self._heard: Callable[[str], None] = lambda _: None

    def tell(self, hint: str) -> None:
        """A hint to every process, this one included: `wake`, `cancel ID`, or the id of a response that changed hands."""
        self._heard(hint)
        self._unsent.add(hint)
        self._added.set()

    async def send_for_ever(self) -> None:
        """Pass hints on as they come."""
        while True:
            await self._added.wait()
            self._added.clear()
            await self.send()

    async def send(self) -> None:
        """Pass on what has gathered."""
        hints, self._unsent = self._unsent, set()
        try:
            async with self._client.pipeline(transaction=False) as pipe:
                for hint in hints:
                    pipe.publish(self._channel, hint)
                await pipe.execute()
        except (RedisError, OSError):
            log.warning("Redis is unavailable; other processes are not told.", action="hints_lost")

    async def listen_for_ever(self, heard: Callable[[str], None]) -> None:
        """`heard` gets every hint, of this process and of others."""
        self._heard = heard
        while True:
            try:
                async with self._client.pubsub() as channel:
                    await channel.subscribe(self._channel)
                    while True:
                        message = await channel.get_message(ignore_subscribe_messages=True, timeout=None)
                        if message is not None:
                            heard(message["data"].decode())
            except (RedisError, OSError):
                await asyncio.sleep(RETRY_S)
