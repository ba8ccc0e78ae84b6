"""Writing the event logs in Redis: how the events of a background run leave the process that makes it.

A run's log is one stream. An entry holds all events of one flush as ready SSE frames; its id is `{lease}-{last number + 1}`,
lease first: a new owner adds the marker `{lease}-0`, and from then on Redis itself refuses everything that an older owner adds.
A stream begins with a marker. Its token tells a stream from one that was made anew after it was lost.
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
from app.storage.redisclient import RETRY_S, Hints, break_off, connect
from app.storage.redishub import Hub, Reader, batches_of
from app.telemetry import describe
from app.wire.events import Entry

log = structlog.get_logger()

FLUSH_SPACING_S = 0.002
"""Events that come closer together than this travel in one round trip, those of all runs together."""

ENTRY_BYTES_MAX = 256 * 1024
"""A flush that is larger becomes several entries."""

MARKERS_MAX = 16
"""Marker entries that may stand behind a stream's last events: one per owner."""

STANDS_ALREADY = "equal or smaller"
"""How Redis refuses an id that is not behind all others."""


class RunLog:
    """The log of one run, as its owner writes it."""

    def __init__(
        self,
        logs: "RedisLogs",
        response_id: str,
        lease: int,
        sent: Sequence[Entry],
        *,
        life: str | None = None,
        anew: bool = False,
    ) -> None:
        """`sent` are the events that earlier owners sent and kept: they are sent again if Redis has lost them. `life` is the
        stream's own; `anew` when what Redis holds of it is not to be trusted."""
        self.key = logs.key(response_id)
        self.lease = lease
        self.fenced = False
        self.ttl_s = logs.live_ttl_s
        self.unsure = True
        """Whether Redis may hold less or more than we think."""
        self.life: str | None = None
        """The life of the stream that was last seen to hold everything."""
        self._logs = logs
        self._entries: list[Entry] = list(sent)
        self._flushed = 0
        self._anew = anew
        self._found = life
        self._length = 0

    def append(self, entries: Sequence[Entry]) -> None:
        """Send entries with the next flush. Raises Fenced if somebody else owns the response."""
        if self.fenced:
            raise Fenced
        self._entries += entries
        self._logs.kick(self)

    async def flush(self) -> None:
        """Wait until everything is in Redis, or Redis is away. Raises Fenced."""
        await self._logs.flush(self)
        if self.fenced:
            raise Fenced

    @property
    def is_flushed(self) -> bool:
        """Whether Redis holds everything."""
        return self._flushed == len(self._entries) and not self.unsure

    def forget(self) -> None:
        """Redis may have lost what it held."""
        self.unsure = True

    def compare(self, redis_run: str, length: int) -> bool:
        """Whether Redis still is the one, and still holds as many entries, as we have last seen."""
        return self._found is not None and self._found.startswith(redis_run) and length == self._length

    async def reconcile(self, client: redis.Redis) -> None:
        """Look what Redis holds of this stream, and begin anew behind it. Raises RedisError, Fenced."""
        held = await hold(client, self.key, self.lease, self.ttl_s)
        if held.is_foreign or (held.newest_lease == self.lease and (self._anew or self._is_strange(held.life))):
            await drop(client, self.key, self.lease)
            held = await hold(client, self.key, self.lease, self.ttl_s)
        if held.newest_lease > self.lease:
            self.fenced = True
            raise Fenced
        self._anew = False
        self._found, self._length = held.life, held.length
        self._flushed = _behind(self._entries, held.newest_number)
        self.unsure = False
        self._note()

    def _is_strange(self, life: str | None) -> bool:
        """Whether the stream's beginning is lost, or has been made anew by somebody else."""
        return life is None or (self._found is not None and life.split("/")[1] != self._found.split("/")[1])

    def pending(self) -> list[tuple[str, dict[str, bytes], int]]:
        """What is to be added: (id, fields, how many entries are flushed then)."""
        adds = []
        start, size = self._flushed, 0
        for at in range(self._flushed, len(self._entries) + 1):
            ends = at == len(self._entries)
            if at > start and (ends or size > ENTRY_BYTES_MAX or self._jumps(at)):
                chunk = self._entries[start:at]
                fields = {"e": b"".join(entry.frame for entry in chunk)}
                if self._jumps(start):
                    fields["j"] = str(self._entries[start - 1].sequence_number).encode()
                adds.append((f"{self.lease}-{chunk[-1].sequence_number + 1}", fields, at))
                start, size = at, 0
            if not ends:
                size += len(self._entries[at].frame)
        return adds

    def _jumps(self, at: int) -> bool:
        """Whether the numbers between this entry and the one before it were given up."""
        entries = self._entries
        return at > 0 and entries[at].sequence_number != entries[at - 1].sequence_number + 1

    def flushed(self, count: int) -> None:
        """The first `count` entries are in Redis, the last of them since now."""
        self._flushed = max(self._flushed, count)
        self._length += 1
        self._note()

    def _note(self) -> None:
        if self.is_flushed:
            self.life = self._found


class Held(Struct, frozen=True):
    """What Redis holds of one stream. `life` tells this life of Redis and of the stream; None if its beginning is lost."""

    life: str | None
    newest_lease: int
    newest_number: int
    length: int
    is_foreign: bool
    """Whether the last entry is none of ours: somebody else has written there, and nothing can be added behind it."""


async def hold(client: redis.Redis, key: str, lease: int, ttl_s: float) -> Held:
    """Redis refuses older owners from now on; and what it holds. A newer owner stays. Raises RedisError."""
    async with client.pipeline(transaction=False) as pipe:
        pipe.info("server")
        pipe.xadd(key, {"m": secrets.token_hex(8)}, id=f"{lease}-0")
        pipe.pexpire(key, int(ttl_s * 1000))
        pipe.xrange(key, count=1)
        pipe.xrevrange(key, count=MARKERS_MAX)
        pipe.xlen(key)
        server, marked, _, first, newest, length = await pipe.execute(raise_on_error=False)
    if not (isinstance(marked, ResponseError) and STANDS_ALREADY in str(marked)):
        _raise(marked)
    for reply in (server, first, newest, length):
        _raise(reply)
    marker = first[0][1].get(b"m")
    numbers = [_id(id)[1] for id, fields in newest if b"e" in fields]
    return Held(
        life=f"{server['run_id']}/{marker.decode()}" if marker else None,
        newest_lease=_id(newest[0][0])[0],
        newest_number=numbers[0] - 1 if numbers else -1,
        length=length,
        is_foreign=_is_foreign(newest[0][1]),
    )


async def drop(client: redis.Redis, key: str, lease: int) -> None:
    """The stream shall be made anew, unless it has got a newer owner. Raises RedisError."""
    async with client.pipeline(transaction=True) as pipe:
        await pipe.watch(key)
        last: Any = await pipe.xrevrange(key, count=1)
        if last and _id(last[0][0])[0] > lease and not _is_foreign(last[0][1]):
            return
        pipe.multi()  # type: ignore[no-untyped-call]
        pipe.delete(key)
        await pipe.execute()


def _is_foreign(fields: dict[bytes, bytes]) -> bool:
    return b"e" not in fields and b"m" not in fields


def _raise(reply: object) -> None:
    if isinstance(reply, Exception):
        raise reply


def _behind(entries: Sequence[Entry], number: int) -> int:
    """The index of the first entry with a greater number."""
    return next((index for index, entry in enumerate(entries) if entry.sequence_number > number), len(entries))


def _id(raw: bytes) -> tuple[int, int]:
    lease, _, number = raw.decode().partition("-")
    return int(lease), int(number)


class RedisLogs:
    """All logs of this process: one connection writes them, another reads them for every reader (`hub`)."""

    def __init__(self, settings: Settings) -> None:
        self._prefix = settings.redis_prefix
        self.live_ttl_s = max(settings.event_ttl_s, 4 * settings.lease_s)
        """How long the stream of a living run stays without being refreshed."""
        self._ttl_s = settings.event_ttl_s
        self.client, self._blocking = connect(settings)
        self.hub = Hub(self.client, self._blocking)
        self._hints = Hints(self.client, f"{self._prefix}:control")
        self._dirty: set[RunLog] = set()
        self._kicked = asyncio.Event()
        self._rounds = asyncio.Condition()
        self._down = False
        self._may_write: Callable[[], bool] = lambda: True
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, on_hint: Callable[[str], None], may_write: Callable[[], bool]) -> None:
        """Begin to write, as long as we `may_write`; to read; and to listen: `on_hint` gets every hint of `tell`."""
        self._may_write = may_write
        loops: list[Coroutine[Any, Any, None]] = [
            self._write_for_ever(),
            self.hub.read_for_ever(),
            self.hub.interrupt_for_ever(),
            self._hints.listen_for_ever(on_hint),
            self._hints.send_for_ever(),
        ]
        self._tasks = [asyncio.create_task(loop) for loop in loops]

    async def close(self) -> None:
        """Pass the last hints on; stop; close every connection."""
        await self._hints.send()
        await break_off(self._tasks)
        await self._blocking.aclose()
        await self.client.aclose()

    def key(self, response_id: str) -> str:
        """The name of a response's stream."""
        return f"{self._prefix}:events:{response_id}"

    def tell(self, hint: str) -> None:
        """A hint to every process: `wake`, `cancel ID`, or the id of a response that changed hands."""
        self._hints.tell(hint)

    def reading(
        self, response_id: str, after: int, backlog: Backlog, *, silence_s: float
    ) -> AbstractAsyncContextManager[Reader]:
        """A reader of one stream, from behind a sequence number on, for the task that opens it."""
        return self.hub.reading(self.key(response_id), after, backlog, silence_s)

    def kick(self, run: RunLog) -> None:
        """This run has something to flush."""
        self._dirty.add(run)
        self._kicked.set()

    async def flush(self, run: RunLog) -> None:
        """Wait for the flush that holds all that the run has sent by now; not longer than Redis is there."""
        self.kick(run)
        async with self._rounds:
            await self._rounds.wait_for(lambda: run.is_flushed or run.fenced or self._down)

    async def _write_for_ever(self) -> None:
        while True:
            await self._kicked.wait()
            if self._may_write():
                await self._write_round()
            else:
                # We can't be sure that our leases still stand: the next heartbeat tells, until then nothing is said.
                await asyncio.sleep(RETRY_S)

    async def _write_round(self) -> None:
        self._kicked.clear()
        runs, self._dirty = self._dirty, set()
        try:
            await self._write({run for run in runs if not run.fenced})
            self._down = False
        except (RedisError, OSError) as error:
            if not self._down:
                log.warning("Redis is unavailable; runs go on without it.", action="redis_down", error=describe(error))
            self._down = True
            for run in runs:
                run.forget()
                self.kick(run)
        async with self._rounds:
            self._rounds.notify_all()
        await asyncio.sleep(RETRY_S if self._down else FLUSH_SPACING_S)

    async def _write(self, runs: set[RunLog]) -> None:
        for result in await asyncio.gather(
            *(self._reconcile(run) for run in runs if run.unsure), return_exceptions=True
        ):
            _raise(result)
        adds = [(run, *add) for run in runs if not run.fenced for add in run.pending()]
        if not adds:
            return
        async with self.client.pipeline(transaction=False) as pipe:
            for run, id, fields, _ in adds:
                pipe.xadd(run.key, fields, id=id)  # type: ignore[arg-type]
            replies = await pipe.execute(raise_on_error=False)
        for (run, _, _, count), reply in zip(adds, replies, strict=True):
            if isinstance(reply, ResponseError) and STANDS_ALREADY in str(reply):
                # Our own entry of a flush whose answer was lost, or somebody else's: the next round looks.
                run.forget()
                self.kick(run)
            else:
                _raise(reply)
                run.flushed(count)

    async def _reconcile(self, run: RunLog) -> None:
        with contextlib.suppress(Fenced):
            await run.reconcile(self.client)

    async def refresh(self, runs: Sequence[RunLog]) -> None:
        """Keep the streams of living runs, however quiet, and look whether Redis still holds all of them."""
        try:
            async with self.client.pipeline(transaction=False) as pipe:
                pipe.info("server")
                for run in runs:
                    pipe.pexpire(run.key, int(run.ttl_s * 1000))
                    pipe.xlen(run.key)
                server, *replies = await pipe.execute()
        except (RedisError, OSError):
            return  # the next round of writing says so
        for run, length in zip(runs, replies[1::2], strict=True):
            if not run.compare(server["run_id"], length):
                run.forget()
                self.kick(run)

    async def expire(self, run: RunLog) -> None:
        """The run has ended, and Postgres has all of it: its stream may go soon."""
        run.fenced = True
        try:
            await self.client.pexpire(run.key, int(self._ttl_s * 1000))
        except (RedisError, OSError):
            log.warning("Redis is unavailable; a stream stays until its TTL.", action="expire_lost")

    async def take(self, response_id: str, lease: int, life: str | None) -> tuple[str | None, list[Entry]]:
        """The stream is ours. Its life from now on, and the events in it, if it still is the stream of that former life;
        else a new one and none. Raises RedisError."""
        key = self.key(response_id)
        held = await hold(self.client, key, lease, self.live_ttl_s)
        if life is None or held.life != life:
            if held.length > 1:
                await drop(self.client, key, lease)
                held = await hold(self.client, key, lease, self.live_ttl_s)
            return held.life, []
        entries: Any = await self.client.xrange(key)
        return life, [entry for batch in batches_of(entries) for entry in batch.entries]
