"""Reading the event logs in Redis: one blocked connection hears every stream for every reader of this process.

A reader that comes late, or is too slow, fetches what it has missed itself, a page at a time.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import redis.asyncio as redis
from msgspec import Struct
from redis.exceptions import RedisError

from app.idle_timeout import IdleTimeout
from app.storage.backlog import ENTRY_OVERHEAD_BYTES, Backlog, size_of
from app.storage.redisclient import BLOCK_MS, RETRY_S
from app.wire.events import Entry, split_frames

PAGE_ENTRIES = 64
"""Entries of one page of a replay, at most."""

FIRST_PAGE_ENTRIES = 8
"""Of a replay whose entries may be large; then as many as fit, and not more than twice as many as the page before."""

FETCHED_BYTES_MAX = 256 * 1024
"""What is kept of a page, beside one entry."""

FETCHES_MAX = 4
"""Readers that fetch what they have missed at once; the others wait for their turn."""

UNBLOCK_PAUSE_S = 0.002
"""Before a blocked read is interrupted again, which was just about to block."""


class Batch(Struct, frozen=True):
    """One entry of a stream: consecutive events. After a `jump` the numbers between that one and the first were given up."""

    entries: list[Entry]
    jump: int | None
    size: int
    """What it weighs, in bytes."""


def batches_of(entries: "list[tuple[bytes, dict[bytes, bytes]]]") -> list[Batch]:
    """Entries of a stream as Redis gives them, without its markers."""
    return [_batch(fields) for _, fields in entries if b"e" in fields]


def _batch(fields: dict[bytes, bytes]) -> Batch:
    entries = split_frames(fields[b"e"])
    size = len(fields[b"e"]) + ENTRY_OVERHEAD_BYTES * len(entries)
    return Batch(entries, int(fields[b"j"]) if b"j" in fields else None, size)


class Hub:
    """Every reader of this process."""

    def __init__(self, client: redis.Redis, blocking: redis.Redis) -> None:
        """`blocking` is the client whose only connection may wait."""
        self.client, self._blocking = client, blocking
        self.fetches = asyncio.Semaphore(FETCHES_MAX)
        self._readers: dict[str, set[Reader]] = {}
        self._positions: dict[str, str] = {}
        """Stream → the id of its last entry that was heard; empty for one that was not yet looked at."""
        self._unblock = asyncio.Event()
        self._filled = asyncio.Event()
        self._blocking_id: int | None = None

    @asynccontextmanager
    async def reading(self, key: str, after: int, backlog: Backlog, silence_s: float) -> AsyncIterator["Reader"]:
        """A reader of one stream's events after a sequence number, for the task that opens it."""
        patience = IdleTimeout(silence_s)
        reader = Reader(self, key, after, patience, backlog)
        try:
            yield reader
        finally:
            patience.close()
            readers = self._readers.get(key, set())
            readers.discard(reader)
            if not readers:
                self._readers.pop(key, None)
                self._positions.pop(key, None)

    def hear(self, reader: "Reader", key: str) -> None:
        """From now on it is offered what comes."""
        self._readers.setdefault(key, set()).add(reader)
        if key not in self._positions:
            self._positions[key] = ""
            self._unblock.set()
            self._filled.set()

    async def interrupt_forever(self) -> None:
        """New streams: the blocked read shall look at its streams again."""
        while True:
            await self._unblock.wait()
            self._unblock.clear()
            while self._blocking_id is not None and not all(self._positions.values()):
                with contextlib.suppress(RedisError, OSError):
                    await self.client.client_unblock(self._blocking_id)
                await asyncio.sleep(UNBLOCK_PAUSE_S)

    async def read_forever(self) -> None:
        """Hear every stream that has a reader."""
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
        while not self._positions:
            self._filled.clear()
            await self._filled.wait()
        for key in [key for key, position in self._positions.items() if not position]:
            last: Any = await self._blocking.xrevrange(key, count=1)
            if key in self._positions:
                self._positions[key] = last[0][0].decode() if last else "0-0"
                for reader in self._readers.get(key, ()):
                    reader.lag()  # what came before this position is the reader's own to fetch
        streams: dict[Any, Any] = dict(self._positions)
        if not streams:
            return  # every reader has left meanwhile
        for raw_key, entries in await self._xread(streams):
            key = raw_key.decode()
            if key in self._positions:
                self._positions[key] = entries[-1][0].decode()
            batches = batches_of(entries)
            size = batches[0].size if len(batches) == 1 else sum(batch.size for batch in batches)
            for reader in self._readers.get(key, ()):
                reader.offer(batches, size)

    async def _xread(self, streams: dict[Any, Any]) -> list[tuple[bytes, list[tuple[bytes, dict[bytes, bytes]]]]]:
        reply: Any = await self._blocking.xread(streams, block=BLOCK_MS)
        if not reply:
            return []
        if isinstance(reply, dict):  # RESP3: {key: [[entries…]]}
            return [(key, [entry for group in groups for entry in group]) for key, groups in reply.items()]
        return [(key, entries) for key, entries in reply]


class Reader:
    """One follower of one stream; slow ones don't hold up the others. What does not fit into the client's backlog
    is read again when the client is ready."""

    __slots__ = (
        "_backlog",
        "_count",
        "_hears",
        "_hub",
        "_key",
        "_lagging",
        "_live",
        "_live_bytes",
        "_patience",
        "_position",
        "_woken",
        "given",
    )

    def __init__(self, hub: Hub, key: str, after: int, patience: IdleTimeout, backlog: Backlog) -> None:
        self._hub, self._key, self._patience, self._backlog = hub, key, patience, backlog
        self._position = f"1-{after + 1}"
        self._count = FIRST_PAGE_ENTRIES
        self._live: list[Batch] = []
        self._live_bytes = 0
        self._lagging = True
        self._hears = False
        self.given = 0
        """What the client has been given last, in bytes: it has taken that when more is asked for."""
        backlog.let_go, backlog.rereads = self.lag, True
        self._woken: asyncio.Future[None] | None = None

    def offer(self, batches: list[Batch], size: int) -> None:
        """Entries that have just come, and what they weigh."""
        if self._lagging:
            return
        if self._backlog.fits(size, len(batches)):
            self._live += batches
            self._live_bytes += size
            self._backlog.add(size)
            self._wake()
        else:
            self.lag()

    def lag(self) -> None:
        """It has missed entries, and shall fetch them itself."""
        self._live = []
        self._backlog.release(self._live_bytes)
        self._live_bytes = 0
        self._lagging = True
        self._wake()

    def hand_out(self, entries: list[Entry]) -> list[Entry]:
        """The client is given these, which come from elsewhere."""
        self._backlog.take(self.given)
        self.given = size_of(entries)
        self._backlog.add(self.given)
        return entries

    def _wake(self) -> None:
        if self._woken and not self._woken.done():
            self._woken.set_result(None)

    def rewind(self, after: int) -> None:
        """Fetch again what follows a sequence number."""
        self._position = f"1-{after + 1}"
        self.lag()

    async def next(self) -> list[Batch]:
        """The batches that have come, a page of them if it lags; none if patience ends first. Raises RedisError."""
        self._backlog.take(self.given)
        self.given = 0
        if not self._hears:  # a replay of a run that has ended never asks
            self._hears = True
            self._hub.hear(self, self._key)
        begun = asyncio.get_running_loop().time()
        while True:
            if self._lagging:
                # Bounded by Redis' own timeout; ours would be swallowed (see `break_off`).
                batches = await self._fetch()
            else:
                batches, self._live = self._live, []
                self.given, self._live_bytes = self._live_bytes, 0
            if batches:
                return batches
            if asyncio.get_running_loop().time() - begun >= self._patience.seconds:
                return []  # it was woken, again and again, for nothing
            if self._live or self._lagging:
                continue  # they came, or were missed, while it fetched
            self._woken = asyncio.get_running_loop().create_future()
            try:
                with self._patience:
                    await self._woken
            except TimeoutError:
                return []

    async def _fetch(self) -> list[Batch]:
        """What it has missed, a page at most."""
        try:
            async with self._hub.fetches:
                self._lagging = False  # first: what comes from now on is offered, or twice seen
                page: Any = await self._hub.client.xrange(self._key, min=f"({self._position}", count=self._count)
        except BaseException:
            self._lagging = True
            raise
        is_last = len(page) < self._count
        kept = page[: _fitting(page)]
        if kept:
            self._position = kept[-1][0].decode()
        if not is_last or len(kept) < len(page):
            self._count = min(PAGE_ENTRIES, 2 * len(kept))
            self.lag()
        batches = batches_of(kept)
        self.given = sum(batch.size for batch in batches)
        self._backlog.add(self.given)
        return batches


def _fitting(entries: "list[tuple[bytes, dict[bytes, bytes]]]") -> int:
    """How many of a page's entries are kept: one at least."""
    size = 0
    for count, (_, fields) in enumerate(entries):
        size += len(fields.get(b"e", b""))
        if size > FETCHED_BYTES_MAX:
            return max(count, 1)
    return len(entries)
