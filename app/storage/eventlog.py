"""Event logs: how the events of a run get from its only writer to its readers.

A foreground run has a `MemoryLog` for its one reader; a background run has a `RedisLog` (storage/redislog.py) for readers of any
process. What both promise is one protocol, and one suite of tests (tests/storage/test_eventlog.py).
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import closing
from typing import Protocol

from app.idle_timeout import IdleTimeout
from app.storage.backlog import PAGE_BYTES, Backlog, page_end, size_of
from app.wire.events import Entry


class EventLog(Protocol):
    """The events of one run, as its writer sees them.

    A reader gets every event after the number that it names, in the order of appending, up to the terminal event; it drops what it
    has seen, for it may get an event twice. While there are none it gets an empty batch after each silence. What it has not
    taken counts in its backlog, and is bounded: in memory the writer waits for room; from Redis, what does not fit is read
    again later.
    """

    def append(self, entries: Sequence[Entry]) -> None:
        """Send events to the readers, without waiting. Raises Fenced if another worker owns the run."""
        ...


class MemoryLog:
    """Entries wait for their reader, and are dropped as they are read. The writer looks at the backlog, and waits for room in
    it; once it is closed, the log keeps nothing."""

    def __init__(self, backlog: Backlog) -> None:
        self.backlog = backlog
        backlog.let_go = self._let_go
        self._entries: list[Entry] = []
        self._grown: asyncio.Future[None] | None = None
        self._ended = False

    def append(self, entries: Sequence[Entry]) -> None:
        """Add entries and wake the reader; after a terminal one there are no more."""
        assert not self._ended
        self._ended = bool(entries) and entries[-1].is_terminal
        if not self.backlog.closed:
            self._entries += entries
            self.backlog.add(size_of(entries))
            self._wake()

    def abandon(self) -> None:
        """End the log without a terminal entry, for a run that ended before its first event."""
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        if self._grown and not self._grown.done():
            self._grown.set_result(None)

    def _let_go(self) -> None:
        self._entries = []

    async def read(self, *, silence_s: float) -> AsyncIterator[list[Entry]]:
        """All entries, in the batches that have gathered, or in pages; ends with the log.

        After so much silence comes an empty batch, so that the reader can show that it is alive.
        """
        with closing(IdleTimeout(silence_s)) as patience:
            while True:
                if self._entries:
                    size = self.backlog.bytes
                    if size <= PAGE_BYTES:
                        batch, self._entries = self._entries, []
                    else:
                        batch, size = self._page()
                    yield batch
                    del batch  # the next one may be far away
                    self.backlog.take(size)
                elif self._ended:
                    return
                else:
                    self._grown = asyncio.get_running_loop().create_future()
                    try:
                        with patience:
                            await self._grown
                    except TimeoutError:
                        yield []

    def _page(self) -> tuple[list[Entry], int]:
        """The beginning of a long backlog, and its size."""
        count = page_end(self._entries)
        page, self._entries = self._entries[:count], self._entries[count:]
        return page, size_of(page)
