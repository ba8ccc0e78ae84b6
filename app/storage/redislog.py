"""Event logs in Redis: how the events of a background run reach readers in any process.

A run's log is one stream. An entry holds all events of one flush as ready SSE frames; its id is `{lease}-{last number + 1}`,
lease first: a new owner adds the marker `{lease}-0`, and from then on Redis itself refuses everything that an older owner adds.
Redis is transport only. What it loses is read from Postgres (storage/journal.py).
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import redis.asyncio as redis
import structlog
from msgspec import Struct
from redis.exceptions import RedisError, ResponseError

from app.errors import Fenced
from app.settings import Settings
from app.wire.events import Entry, split_frames

log = structlog.get_logger()

FLUSH_SPACING_S = 0.002
"""Events that come closer together than this travel in one round trip, those of all runs together."""

RETRY_S = 0.1
"""Between attempts while Redis is away."""

ENTRY_BYTES_MAX = 256 * 1024
"""A flush that is larger becomes several entries."""

PAGE_ENTRIES = 200
"""Entries of one page of a replay."""

BACKLOG_MAX = 1_000
"""Entries that wait for one slow reader; beyond, it reads them from Redis again when it is ready."""

BLOCK_MS = 5_000
"""How long one read waits; only a bound, since a new reader interrupts it."""

MARKERS_MAX = 16
"""Marker entries that may stand before a stream's first events: one per owner."""


class Batch(Struct, frozen=True):
    """One entry of a stream: consecutive events. After a `jump` the numbers between that one and the first were given up."""

    entries: list[Entry]
    jump: int | None


class RunLog:
    """The log of one run, as its owner writes it."""

    def __init__(self, logs: "RedisLogs", response_id: str, lease: int, sent: Sequence[Entry]) -> None:
        """`sent` are the events that earlier owners sent and kept: they are sent again if Redis has lost them."""
        self.key = logs.key(response_id)
        self.lease = lease
        self.fenced = False
        self._logs = logs
        self._entries: list[Entry] = list(sent)
        self._jumps: dict[int, int] = {}
        self._flushed = 0
        self.unsure = True
        """Whether Redis may hold less or more than we think."""

    def append(self, entries: Sequence[Entry]) -> None:
        """Send entries with the next flush. Raises Fenced if somebody else owns the response."""
        if self.fenced:
            raise Fenced
        self._entries += entries
        self._logs.kick(self)

    def jumps(self, last: int, number: int) -> None:
        """The event with this number follows the one with number `last`; those in between were given up."""
        self._jumps[number] = last

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

    async def reconcile(self, client: redis.Redis) -> None:
        """Look what Redis holds of this stream, and begin anew behind it. Raises RedisError, Fenced."""
        await self._drop_if_beheaded(client)
        await fence(client, self.key, self.lease)
        newest: Any = await client.xrevrange(self.key, count=MARKERS_MAX)
        if _id(newest[0][0])[0] > self.lease:
            self.fenced = True
            raise Fenced
        numbers = [_id(id)[1] for id, fields in newest if b"e" in fields]
        self._flushed = _behind(self._entries, numbers[0] - 1) if numbers else 0
        self.unsure = False

    async def _drop_if_beheaded(self, client: redis.Redis) -> None:
        """A stream whose beginning is lost is made anew, unless it has got another owner."""
        async with client.pipeline(transaction=True) as pipe:
            await pipe.watch(self.key)
            last: Any = await pipe.xrevrange(self.key, count=1)
            begin: Any = await pipe.xrange(self.key, count=MARKERS_MAX)
            data = [_batch(fields) for _, fields in begin if b"e" in fields]
            whole = not data or data[0].entries[0].sequence_number <= self._entries[0].sequence_number
            if whole or _id(last[0][0])[0] > self.lease:
                return
            pipe.multi()  # type: ignore[no-untyped-call]
            pipe.delete(self.key)
            await pipe.execute()

    def pending(self) -> list[tuple[str, dict[str, bytes], int]]:
        """What is to be added: (id, fields, how many entries are flushed then)."""
        adds = []
        start, size = self._flushed, 0
        for at in range(self._flushed, len(self._entries) + 1):
            ends = at == len(self._entries)
            if at > start and (ends or size > ENTRY_BYTES_MAX or self._entries[at].sequence_number in self._jumps):
                chunk = self._entries[start:at]
                fields = {"e": b"".join(entry.frame for entry in chunk)}
                if chunk[0].sequence_number in self._jumps:
                    fields["j"] = str(self._jumps[chunk[0].sequence_number]).encode()
                adds.append((f"{self.lease}-{chunk[-1].sequence_number + 1}", fields, at))
                start, size = at, 0
            if not ends:
                size += len(self._entries[at].frame)
        return adds

    def flushed(self, count: int) -> None:
        """The first `count` entries are in Redis."""
        self._flushed = max(self._flushed, count)


async def fence(client: redis.Redis, key: str, lease: int) -> None:
    """From now on Redis refuses what older owners add. Raises RedisError."""
    try:
        await client.xadd(key, {"m": b""}, id=f"{lease}-0")
    except ResponseError:
        return  # it stands already, or a newer owner's does, which the next write will show


def _behind(entries: Sequence[Entry], number: int) -> int:
    """The index of the first entry with a greater number."""
    return next((index for index, entry in enumerate(entries) if entry.sequence_number > number), len(entries))


class RedisLogs:
    """All logs of this process: one connection writes them, one reads them for every reader."""

    def __init__(self, settings: Settings) -> None:
        self._prefix = settings.redis_prefix
        self._ttl_s = settings.event_ttl_s
        self._live_ttl_s = max(settings.event_ttl_s, 4 * settings.lease_s)
        options: dict[str, Any] = {"socket_connect_timeout": 5, "health_check_interval": 0}
        self.client: redis.Redis = redis.from_url(settings.redis_url, socket_timeout=5, **options)
        self._blocking: redis.Redis = redis.from_url(
            settings.redis_url, socket_timeout=None, single_connection_client=True, **options
        )
        self._dirty: set[RunLog] = set()
        self._kicked = asyncio.Event()
        self._rounds = asyncio.Condition()
        self._round = 0
        self._down = False
        self._readers: dict[str, set[Reader]] = {}
        self._positions: dict[str, str] = {}
        self._changed = asyncio.Event()
        self._blocking_id: int | None = None
        self._controls: Callable[[str], None] = lambda _: None
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, on_control: Callable[[str], None]) -> None:
        """Begin to write, to read and to listen: `on_control` gets every message of `tell`."""
        self._controls = on_control
        loops: list[Callable[[], Awaitable[None]]] = [self._write_for_ever, self._read_for_ever, self._listen_for_ever]
        self._tasks = [asyncio.create_task(loop()) for loop in loops]  # type: ignore[arg-type]

    async def close(self) -> None:
        """Stop; close both connections."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._blocking.aclose()
        await self.client.aclose()

    def key(self, response_id: str) -> str:
        """The name of a response's stream."""
        return f"{self._prefix}:events:{response_id}"

    async def life(self) -> str | None:
        """Which life of Redis this is; None while it is away. Another life may have lost everything."""
        try:
            return str((await self.client.info("server"))["run_id"])
        except (RedisError, OSError):
            return None

    # -- Control --------------------------------------------------------------------------------------------------------

    async def tell(self, message: str) -> None:
        """A hint to every process: `wake`, or the id of a response that changed hands. Losing it costs time, no truth."""
        self._controls(message)
        try:
            await self.client.publish(f"{self._prefix}:control", message)
        except (RedisError, OSError):
            log.warning("Redis is unavailable; other processes are not told.", action="control_lost")

    async def _listen_for_ever(self) -> None:
        while True:
            try:
                async with self.client.pubsub() as channel:
                    await channel.subscribe(f"{self._prefix}:control")
                    while True:
                        message = await channel.get_message(ignore_subscribe_messages=True, timeout=None)
                        if message is not None:
                            self._controls(message["data"].decode())
            except (RedisError, OSError):
                await asyncio.sleep(RETRY_S)

    # -- Writing --------------------------------------------------------------------------------------------------------

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
            self._kicked.clear()
            runs, self._dirty = self._dirty, set()
            try:
                await self._write(runs)
                self._down = False
            except (RedisError, OSError) as error:
                if not self._down:
                    log.warning("Redis is unavailable; runs go on without it.", action="redis_down", cause=repr(error))
                self._down = True
                for run in runs:
                    run.forget()
                    self.kick(run)
            async with self._rounds:
                self._rounds.notify_all()
            await asyncio.sleep(RETRY_S if self._down else FLUSH_SPACING_S)

    async def _write(self, runs: set[RunLog]) -> None:
        for run in runs:
            if run.unsure and not run.fenced:
                try:
                    await run.reconcile(self.client)
                except Fenced:
                    continue
        adds = [(run, *add) for run in runs if not run.fenced for add in run.pending()]
        if not adds:
            return
        async with self.client.pipeline(transaction=False) as pipe:
            for run, id, fields, _ in adds:
                pipe.xadd(run.key, fields, id=id)  # type: ignore[arg-type]
            replies = await pipe.execute(raise_on_error=False)
        for (run, _, _, count), reply in zip(adds, replies, strict=True):
            if isinstance(reply, ResponseError):
                # Our own entry of a flush whose answer was lost, or somebody else's: the next round looks.
                run.forget()
                self.kick(run)
            elif isinstance(reply, Exception):
                raise reply
            else:
                run.flushed(count)

    async def refresh(self, runs: Sequence[RunLog]) -> None:
        """Keep the streams of living runs, however quiet, and look whether Redis still holds all of them."""
        try:
            async with self.client.pipeline(transaction=False) as pipe:
                for run in runs:
                    pipe.pexpire(run.key, int(self._live_ttl_s * 1000))
                await pipe.execute()
        except (RedisError, OSError):
            log.warning("Redis is unavailable; runs go on without it.", action="redis_down")
        for run in runs:
            run.forget()
            self.kick(run)

    async def expire(self, run: RunLog) -> None:
        """The run has ended: its stream may go soon."""
        try:
            await self.client.pexpire(run.key, int(self._ttl_s * 1000))
        except (RedisError, OSError):
            log.warning("Redis is unavailable; a stream stays until its TTL.", action="expire_lost")

    async def fence(self, response_id: str, lease: int) -> None:
        """From now on Redis refuses what older owners add. Raises RedisError."""
        await fence(self.client, self.key(response_id), lease)
        await self.client.pexpire(self.key(response_id), int(self._live_ttl_s * 1000))

    async def read_all(self, response_id: str) -> list[Batch]:
        """Everything that Redis holds of a stream. Raises RedisError."""
        held: Any = await self.client.xrange(self.key(response_id))
        return [_batch(fields) for _, fields in held if b"e" in fields]

    # -- Reading --------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def reading(self, response_id: str, after: int) -> AsyncIterator["Reader"]:
        """A reader of one stream, from behind a sequence number on."""
        key = self.key(response_id)
        reader = Reader(self, key, after)
        readers = self._readers.setdefault(key, set())
        readers.add(reader)
        if key not in self._positions:
            self._positions[key] = ""
            self._changed.set()
            await self._interrupt()
        try:
            yield reader
        finally:
            readers.discard(reader)
            if not readers:
                self._readers.pop(key, None)
                self._positions.pop(key, None)

    async def _interrupt(self) -> None:
        """The blocked read shall look at its streams again."""
        if self._blocking_id is not None:
            try:
                await self.client.client_unblock(self._blocking_id)
            except (RedisError, OSError):
                return

    async def _read_for_ever(self) -> None:
        while True:
            try:
                self._blocking_id = int(await self._blocking.client_id())
                while True:
                    await self._read()
            except (RedisError, OSError):
                self._blocking_id = None
                for key in self._positions:
                    self._positions[key] = ""
                for readers in self._readers.values():
                    for reader in readers:
                        reader.lag()
                await asyncio.sleep(RETRY_S)

    async def _read(self) -> None:
        if not self._positions:
            self._changed.clear()
            await self._changed.wait()
        for key in [key for key, position in self._positions.items() if not position]:
            last: Any = await self._blocking.xrevrange(key, count=1)
            if key in self._positions:
                self._positions[key] = last[0][0].decode() if last else "0-0"
                for reader in self._readers.get(key, ()):
                    reader.lag()  # what came before this position is the reader's own to fetch
        streams: dict[Any, Any] = dict(self._positions)
        for raw_key, entries in await self._xread(streams):
            key = raw_key.decode()
            if key in self._positions:
                self._positions[key] = entries[-1][0].decode()
            batches = [_batch(fields) for _, fields in entries if b"e" in fields]
            for reader in self._readers.get(key, ()):
                reader.offer(batches)

    async def _xread(self, streams: dict[Any, Any]) -> list[tuple[bytes, list[tuple[bytes, dict[bytes, bytes]]]]]:
        reply: Any = await self._blocking.xread(streams, block=BLOCK_MS)
        if not reply:
            return []
        if isinstance(reply, dict):  # RESP3: {key: [[entries…]]}
            return [(key, [entry for group in groups for entry in group]) for key, groups in reply.items()]
        return [(key, entries) for key, entries in reply]


class Reader:
    """One follower of one stream; slow ones wait for nobody, and nobody for them."""

    def __init__(self, logs: RedisLogs, key: str, after: int) -> None:
        self._logs, self._key = logs, key
        self._position = f"1-{after + 1}"
        self._live: list[Batch] = []
        self._lagging = True
        self._woken = asyncio.Event()

    def offer(self, batches: list[Batch]) -> None:
        """Entries that have just come."""
        if len(self._live) + len(batches) > BACKLOG_MAX:
            self.lag()
        elif not self._lagging:
            self._live += batches
        self._woken.set()

    def lag(self) -> None:
        """It has missed entries, and shall fetch them itself."""
        self._live = []
        self._lagging = True
        self._woken.set()

    def rewind(self, after: int) -> None:
        """Fetch again from behind a sequence number."""
        self._position = f"1-{after + 1}"
        self.lag()

    async def next(self, silence_s: float) -> list[Batch]:
        """The batches that have come, a page of them if it lags; none after so much silence. Raises RedisError."""
        try:
            async with asyncio.timeout(silence_s):
                while True:
                    self._woken.clear()
                    batches = await self._fetch() if self._lagging else self._live
                    if batches:
                        break
                    await self._woken.wait()
        except TimeoutError:
            return []
        if batches is self._live:
            self._live = []
        return batches

    async def _fetch(self) -> list[Batch]:
        """What it has missed, a page at most."""
        self._lagging = False  # first: what comes from now on is offered, or twice seen
        try:
            page: Any = await self._logs.client.xrange(self._key, min=f"({self._position}", count=PAGE_ENTRIES)
        except BaseException:
            self._lagging = True
            raise
        if page:
            self._position = page[-1][0].decode()
        if len(page) == PAGE_ENTRIES:
            self.lag()
        return [_batch(fields) for _, fields in page if b"e" in fields]


def _id(raw: bytes) -> tuple[int, int]:
    lease, _, number = raw.decode().partition("-")
    return int(lease), int(number)


def _batch(fields: dict[bytes, bytes]) -> Batch:
    return Batch(split_frames(fields[b"e"]), int(fields[b"j"]) if b"j" in fields else None)
