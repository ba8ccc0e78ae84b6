"""Notifications between processes, over Redis pub/sub. Losing one costs time, never data: processes poll Postgres as well."""

import asyncio
from collections.abc import Callable

import redis.asyncio as redis
import structlog
from msgspec import Struct
from redis.exceptions import RedisError

from app.storage.redisclient import RETRY_S

log = structlog.get_logger()


class RunQueued(Struct, frozen=True):
    """A worker can claim a run."""


class CancelRequested(Struct, frozen=True):
    """The owner of this run should end it as cancelled."""

    response_id: str


class OwnerChanged(Struct, frozen=True):
    """This run has a new owner: the former one must stop."""

    response_id: str


Notification = RunQueued | CancelRequested | OwnerChanged

_RUN_QUEUED = "wake"
_CANCEL_REQUESTED = "cancel "


def encode(notification: Notification) -> str:
    """The message on the channel."""
    match notification:
        case RunQueued():
            return _RUN_QUEUED
        case CancelRequested(response_id):
            return _CANCEL_REQUESTED + response_id
        case OwnerChanged(response_id):
            return response_id


def decode(message: str) -> Notification:
    """The notification of a message."""
    if message == _RUN_QUEUED:
        return RunQueued()
    if message.startswith(_CANCEL_REQUESTED):
        return CancelRequested(message.removeprefix(_CANCEL_REQUESTED))
    return OwnerChanged(message)


class Notifications:
    """The channel of this deployment."""

    def __init__(self, client: redis.Redis, channel: str) -> None:
        self._client, self._channel = client, channel
        self._unsent: set[Notification] = set()
        self._added = asyncio.Event()
        self._receive: Callable[[Notification], None] = lambda _: None

    def notify(self, notification: Notification) -> None:
        """Notify every process, this one at once."""
        self._receive(notification)
        self._unsent.add(notification)
        self._added.set()

    async def send_forever(self) -> None:
        """Publish notifications as they are added."""
        while True:
            await self._added.wait()
            self._added.clear()
            await self.send()

    async def send(self) -> None:
        """Publish those that are waiting."""
        notifications, self._unsent = self._unsent, set()
        try:
            async with self._client.pipeline(transaction=False) as pipe:
                for notification in notifications:
                    pipe.publish(self._channel, encode(notification))
                await pipe.execute()
        except (RedisError, OSError):
            log.warning("Redis is unavailable; other processes are not notified.", action="notifications_lost")

    async def receive_forever(self, receive: Callable[[Notification], None]) -> None:
        """Call `receive` with every notification, of this process and of others."""
        self._receive = receive
        while True:
            try:
                async with self._client.pubsub() as channel:
                    await channel.subscribe(self._channel)
                    while True:
                        message = await channel.get_message(ignore_subscribe_messages=True, timeout=None)
                        if message is not None:
                            receive(decode(message["data"].decode()))
            except (RedisError, OSError):
                await asyncio.sleep(RETRY_S)
