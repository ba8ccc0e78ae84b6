"""Writing event logs to Redis: how the events of a background run leave the process that makes it.

A run's log is one stream. An entry holds all events of one flush as ready SSE frames; its id is `{epoch}-{last number + 1}`. Each
new owner adds the marker `{epoch}-0`; from then on Redis itself refuses what an older owner adds, since ids only grow. A stream
begins with a marker, whose token differs from that of one that was recreated after a loss.
Redis is transport only. What it loses is read from Postgres (storage/journal.py).
"""

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import redis.asyncio as redis
import structlog
from msgspec import Struct
from redis.exceptions import RedisError, ResponseError

from app.errors import Fenced
from app.settings import Settings
from app.storage.backlog import Backlog
from app.storage.notifications import Notification, Notifications
from app.storage.redisclient import RETRY_S, break_off, connect
from app.storage.redishub import Hub, Reader, batches_of
from app.telemetry import describe
from app.wire.events import Entry

log = structlog.get_logger()

FLUSH_SPACING_S = 0.002
"""Events that come closer together than this travel in one round trip, those of all runs together."""

ENTRY_BYTES_MAX = 256 * 1024
"""A flush that is larger becomes several entries."""

MARKERS_MAX = 16
"""Marker entries that may follow a stream's last events: one per owner."""

ID_TOO_SMALL = "equal or smaller"
"""How Redis refuses an id that is not greater than all others."""


class RedisLog:
    """The event log of one run, as its owner writes it."""

    def __init__(
        self,
        logs: "RedisLogs",
        response_id: str,
        epoch: int,
        sent: Sequence[Entry],
        *,
        token: str | None = None,
        recreate: bool = False,
    ) -> None:
        """`sent` are the checkpointed events of earlier owners: they are sent again if Redis has lost them. `token` is that of
        the stream; `recreate` if the stream in Redis cannot be trusted."""
        self.key = logs.key(response_id)
        self.epoch = epoch
        self.fenced = False
        self.ttl_s = logs.live_ttl_s
        self.dirty = True
        """Whether Redis may hold less, or more, than this process assumes."""
        self.complete_token: str | None = None
        """The token of the stream that was last seen to hold every event."""
        self._logs = logs
        self._entries: list[Entry] = list(sent)
        self._flushed = 0
        self._recreate = recreate
        self._token = token
        self._length = 0

    def append(self, entries: Sequence[Entry]) -> None:
        """Send entries with the next flush. Raises Fenced if another worker owns the run."""
        if self.fenced:
            raise Fenced
        self._entries += entries
        self._logs.schedule(self)

    async def flush(self) -> None:
        """Wait until Redis holds every event, or is unavailable. Raises Fenced."""
        await self._logs.flush(self)
        if self.fenced:
            raise Fenced

    @property
    def is_flushed(self) -> bool:
        """Whether Redis holds every event."""
        return self._flushed == len(self._entries) and not self.dirty

    def invalidate(self) -> None:
        """Redis may have lost events."""
        self.dirty = True

    def is_unchanged(self, redis_run: str, length: int) -> bool:
        """Whether this is still the same life of Redis, and the stream has as many entries as last seen."""
        return self._token is not None and self._token.startswith(redis_run) and length == self._length

    async def reconcile(self, client: redis.Redis) -> None:
        """Find out what Redis holds of this stream, and continue after it. Raises RedisError, Fenced."""
        state = await fence(client, self.key, self.epoch, self.ttl_s)
        is_newest = state.newest_epoch == self.epoch
        if state.is_foreign or (is_newest and (self._recreate or self._was_replaced(state.token))):
            await drop(client, self.key, self.epoch)
            state = await fence(client, self.key, self.epoch, self.ttl_s)
        if state.newest_epoch > self.epoch:
            self.fenced = True
            raise Fenced
        self._recreate = False
        self._token, self._length = state.token, state.length
        self._flushed = _index_after(self._entries, state.newest_number)
        self.dirty = False
        self._note_complete()

    def _was_replaced(self, token: str | None) -> bool:
        """Whether the stream's beginning is lost, or another process has recreated it."""
        return token is None or (self._token is not None and token.split("/")[1] != self._token.split("/")[1])

    def pending(self) -> list[tuple[str, dict[str, bytes], int]]:
        """What is to be added: (id, fields, how many events are flushed then)."""
        adds = []
        start, size = self._flushed, 0
        for at in range(self._flushed, len(self._entries) + 1):
            ends = at == len(self._entries)
            if at > start and (ends or size > ENTRY_BYTES_MAX or self._jumps(at)):
                chunk = self._entries[start:at]
                fields = {"e": b"".join(entry.frame for entry in chunk)}
                if self._jumps(start):
                    fields["j"] = str(self._entries[start - 1].sequence_number).encode()
                adds.append((f"{self.epoch}-{chunk[-1].sequence_number + 1}", fields, at))
                start, size = at, 0
            if not ends:
                size += len(self._entries[at].frame)
        return adds

    def _jumps(self, at: int) -> bool:
        """Whether the numbers between this event and the one before it were given up."""
        entries = self._entries
        return at > 0 and entries[at].sequence_number != entries[at - 1].sequence_number + 1

    def flushed(self, count: int) -> None:
        """The first `count` events are in Redis; one more entry holds the last of them."""
        self._flushed = max(self._flushed, count)
        self._length += 1
        self._note_complete()

    def _note_complete(self) -> None:
        if self.is_flushed:
            self.complete_token = self._token


class StreamState(Struct, frozen=True):
    """What Redis holds of one stream. `token` names the life of Redis and of the stream; None if its beginning is lost."""

    token: str | None
    newest_epoch: int
    newest_number: int
    length: int
    is_foreign: bool
    """Whether the last entry is none of ours: another program has written there, and nothing can be added after it."""


async def fence(client: redis.Redis, key: str, epoch: int, ttl_s: float) -> StreamState:
    """Make Redis refuse older owners of a stream, and return what it holds. A newer owner stays. Raises RedisError."""
    async with client.pipeline(transaction=False) as pipe:
        pipe.info("server")
        pipe.xadd(key, {"m": secrets.token_hex(8)}, id=f"{epoch}-0")
        pipe.pexpire(key, int(ttl_s * 1000))
        pipe.xrange(key, count=1)
        pipe.xrevrange(key, count=MARKERS_MAX)
        pipe.xlen(key)
        server, marked, _, first, newest, length = await pipe.execute(raise_on_error=False)
    if not (isinstance(marked, ResponseError) and ID_TOO_SMALL in str(marked)):
        _raise(marked)
    for reply in (server, first, newest, length):
        _raise(reply)
    marker = first[0][1].get(b"m")
    numbers = [_id(id)[1] for id, fields in newest if b"e" in fields]
    return StreamState(
        token=f"{server['run_id']}/{marker.decode()}" if marker else None,
        newest_epoch=_id(newest[0][0])[0],
        newest_number=numbers[0] - 1 if numbers else -1,
        length=length,
        is_foreign=_is_foreign(newest[0][1]),
    )


async def drop(client: redis.Redis, key: str, epoch: int) -> None:
    """Delete a stream, so that it can be recreated, unless it has a newer owner. Raises RedisError."""
    async with client.pipeline(transaction=True) as pipe:
        await pipe.watch(key)
        last: Any = await pipe.xrevrange(key, count=1)
        if last and _id(last[0][0])[0] > epoch and not _is_foreign(last[0][1]):
            return
        pipe.multi()  # type: ignore[no-untyped-call]
        pipe.delete(key)
        await pipe.execute()


def _is_foreign(fields: dict[bytes, bytes]) -> bool:
    return b"e" not in fields and b"m" not in fields


def _raise(reply: object) -> None:
    if isinstance(reply, Exception):
        raise reply


def _index_after(entries: Sequence[Entry], number: int) -> int:
    """The index of the first entry with a greater number."""
    return next((index for index, entry in enumerate(entries) if entry.sequence_number > number), len(entries))


def _id(raw: bytes) -> tuple[int, int]:
    epoch, _, number = raw.decode().partition("-")
    return int(epoch), int(number)


class RedisLogs:
    """All logs of this process: one connection writes them, another reads them for every reader (`hub`)."""

    def __init__(self, settings: Settings) -> None:
        self._prefix = settings.redis_prefix
        self.live_ttl_s = max(settings.event_ttl_s, 4 * settings.lease_s)
        """How long the stream of a living run stays without being refreshed."""
        self._ttl_s = settings.event_ttl_s
        self.client, self._blocking = connect(settings)
        self.hub = Hub(self.client, self._blocking)
        self._notifications = Notifications(self.client, f"{self._prefix}:control")
        self._unflushed: set[RedisLog] = set()
        self._scheduled = asyncio.Event()
        self._rounds = asyncio.Condition()
        self._down = False
        self._leases_are_valid: Callable[[], bool] = lambda: True
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, on_notification: Callable[[Notification], None], leases_are_valid: Callable[[], bool]) -> None:
        """Start to write, while the leases of this process are valid; to read; and to receive notifications."""
        self._leases_are_valid = leases_are_valid
        loops: list[Coroutine[Any, Any, None]] = [
            self._write_forever(),
            self.hub.read_forever(),
            self.hub.interrupt_forever(),
            self._notifications.receive_forever(on_notification),
            self._notifications.send_forever(),
        ]
        self._tasks = [asyncio.create_task(loop) for loop in loops]

    async def close(self) -> None:
        """Publish the last notifications, stop, and close every connection. Redis may be unavailable."""
        await self._notifications.send()
        await break_off(self._tasks)
        for client in (self._blocking, self.client):
            with contextlib.suppress(RedisError, OSError):  # TLS closes with an answer
                await client.aclose()

    def key(self, response_id: str) -> str:
        """The name of a response's stream."""
        return f"{self._prefix}:events:{response_id}"

    def notify(self, notification: Notification) -> None:
        """Notify every process."""
        self._notifications.notify(notification)

    def reading(
        self, response_id: str, after: int, backlog: Backlog, *, silence_s: float
    ) -> AbstractAsyncContextManager[Reader]:
        """A reader of one stream's events after a sequence number, for the task that opens it."""
        return self.hub.reading(self.key(response_id), after, backlog, silence_s)

    def schedule(self, run_log: RedisLog) -> None:
        """Flush this log with the next round."""
        self._unflushed.add(run_log)
        self._scheduled.set()

    async def flush(self, run_log: RedisLog) -> None:
        """Wait for the flush of every event that was appended so far; not while Redis is unavailable."""
        self.schedule(run_log)
        async with self._rounds:
            await self._rounds.wait_for(lambda: run_log.is_flushed or run_log.fenced or self._down)

    async def _write_forever(self) -> None:
        while True:
            await self._scheduled.wait()
            if self._leases_are_valid():
                await self._write_round()
            else:
                # Another worker may own our runs: nothing is sent until the next heartbeat succeeds.
                await asyncio.sleep(RETRY_S)

    async def _write_round(self) -> None:
        self._scheduled.clear()
        logs, self._unflushed = self._unflushed, set()
        try:
            await self._write({one for one in logs if not one.fenced})
            self._down = False
        except (RedisError, OSError) as error:
            if not self._down:
                log.warning(
                    "Redis is unavailable; runs continue without it.", action="redis_down", error=describe(error)
                )
            self._down = True
            for one in logs:
                one.invalidate()
                self.schedule(one)
        async with self._rounds:
            self._rounds.notify_all()
        await asyncio.sleep(RETRY_S if self._down else FLUSH_SPACING_S)

    async def _write(self, logs: set[RedisLog]) -> None:
        for result in await asyncio.gather(
            *(self._reconcile(one) for one in logs if one.dirty), return_exceptions=True
        ):
            _raise(result)
        adds = [(one, *add) for one in logs if not one.fenced for add in one.pending()]
        if not adds:
            return
        async with self.client.pipeline(transaction=False) as pipe:
            for one, id, fields, _ in adds:
                pipe.xadd(one.key, fields, id=id)  # type: ignore[arg-type]
            replies = await pipe.execute(raise_on_error=False)
        for (one, _, _, count), reply in zip(adds, replies, strict=True):
            if isinstance(reply, ResponseError) and ID_TOO_SMALL in str(reply):
                # Our own entry of a flush whose answer was lost, or another owner's: the next round reconciles.
                one.invalidate()
                self.schedule(one)
            else:
                _raise(reply)
                one.flushed(count)

    async def _reconcile(self, run_log: RedisLog) -> None:
        with contextlib.suppress(Fenced):
            await run_log.reconcile(self.client)

    async def refresh(self, logs: Sequence[RedisLog]) -> None:
        """Prolong the streams of living runs, however quiet, and check that Redis still holds each."""
        try:
            async with self.client.pipeline(transaction=False) as pipe:
                pipe.info("server")
                for one in logs:
                    pipe.pexpire(one.key, int(one.ttl_s * 1000))
                    pipe.xlen(one.key)
                server, *replies = await pipe.execute()
        except (RedisError, OSError):
            return  # the next round of writing logs it
        for one, length in zip(logs, replies[1::2], strict=True):
            if not one.is_unchanged(server["run_id"], length):
                one.invalidate()
                self.schedule(one)

    async def expire(self, run_log: RedisLog) -> None:
        """Let a stream expire: its run has ended, and Postgres holds every event."""
        run_log.fenced = True
        try:
            await self.client.pexpire(run_log.key, int(self._ttl_s * 1000))
        except (RedisError, OSError):
            log.warning("Redis is unavailable; a stream stays until its TTL.", action="expire_lost")

    async def take_over(self, response_id: str, epoch: int, token: str | None) -> tuple[str | None, list[Entry]]:
        """Fence off earlier owners of a stream. Returns its token, and its events if it still is the stream with the given
        token; otherwise a new token and none. Raises RedisError."""
        key = self.key(response_id)
        state = await fence(self.client, key, epoch, self.live_ttl_s)
        if token is None or state.token != token:
            if state.length > 1:
                await drop(self.client, key, epoch)
                state = await fence(self.client, key, epoch, self.live_ttl_s)
            return state.token, []
        entries: Any = await self.client.xrange(key)
        return token, [entry for batch in batches_of(entries) for entry in batch.entries]
