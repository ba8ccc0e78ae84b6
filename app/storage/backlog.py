"""What clients have not taken yet of what they asked for: bounded for each of them, and for all of a process together.

A stream is asked for by its client, and filled by a run that may be faster. What lies between them is its backlog: it counts
as unread until the client's connection has taken it. A full one is no fault yet: what can be read again later is let go, and
what can't be makes its run wait (`room`). Beyond the bound of the process, clients are disconnected: those that have
taken nothing for a while, then those that hold the most.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence

from app.settings import Settings
from app.wire.events import Entry

PAGE_BYTES = 64 * 1024
"""What is handed to a connection at once."""

ENTRY_OVERHEAD_BYTES = 160
"""What an entry weighs in memory beside its frame."""

STALE_S = 1.0
"""A client that has taken nothing for so long is disconnected before one that reads."""

SPARE = 1 / 8
"""The part of the bound that is made free at once, so that room need not be made again for each event."""


def size_of(entries: Iterable[Entry]) -> int:
    """What entries weigh, in bytes."""
    size = 0
    for entry in entries:  # most often there is one: a `sum` costs several times as much
        size += len(entry.frame) + ENTRY_OVERHEAD_BYTES
    return size


def page_end(entries: Sequence[Entry], begin: int = 0, page_bytes: int = PAGE_BYTES) -> int:
    """Where the page ends that begins there: it holds at least one entry, however large."""
    size = 0
    for at in range(begin, len(entries)):
        size += len(entries[at].frame) + ENTRY_OVERHEAD_BYTES
        if size > page_bytes:
            return max(at, begin + 1)
    return len(entries)


def pages_of(entries: list[Entry], size: int, page_bytes: int = PAGE_BYTES) -> Iterable[list[Entry]]:
    """Entries that weigh so much, in pages."""
    return (entries,) if size <= page_bytes else _cut(entries, page_bytes)


def _cut(entries: list[Entry], page_bytes: int) -> Iterator[list[Entry]]:
    begin = 0
    while begin < len(entries):
        end = page_end(entries, begin, page_bytes)
        yield entries[begin:end]
        begin = end


def nothing() -> None:
    """Nothing to let go, and no client to disconnect."""


class Backlog:
    """What one client has not taken yet. Closed when the client disconnects.

    Only what is more than a page counts towards the bound of all: most clients take what comes at once.
    """

    __slots__ = (
        "_backlogs",
        "_counted_to",
        "_shrunk",
        "bytes",
        "closed",
        "counted",
        "disconnect",
        "let_go",
        "rereads",
        "taken_at",
    )

    def __init__(self, backlogs: "Backlogs") -> None:
        self._backlogs = backlogs
        self._counted_to = backlogs.uncounted_bytes
        self._shrunk: asyncio.Future[None] | None = None
        self.bytes = 0
        self.counted = 0
        """What counts towards the bound of all."""
        self.closed = False
        self.taken_at = 0.0
        """When a client that lags has taken something, or began to lag."""
        self.disconnect: Callable[[], object] = nothing
        """Ends the reply, as if the client had disconnected."""
        self.let_go: Callable[[], None] = nothing
        """Gives up what waits in memory."""
        self.rereads = False
        """Whether what was let go can be read again."""

    def add(self, size: int) -> None:
        """So much more waits for the client. It may be disconnected for it."""
        self.bytes += size
        if self.bytes > self._counted_to:
            if not self.counted:
                self.taken_at = self._backlogs.now()
            self._count(self.bytes)

    def take(self, size: int) -> None:
        """The client has taken so much."""
        self.bytes -= size
        if self.counted:
            self.taken_at = self._backlogs.now()
            self._shrink()

    def release(self, size: int) -> None:
        """So much does not wait any more."""
        self.bytes -= size
        if self.counted:
            self._shrink()

    def _shrink(self) -> None:
        self._count(self.bytes if self.bytes > self._backlogs.uncounted_bytes else 0)
        self._wake()

    def _count(self, size: int) -> None:
        if not self.closed:
            more, self.counted = size - self.counted, size
            self._counted_to = size + self._backlogs.uncounted_bytes
            self._backlogs.count(more)

    def fits(self, size: int, pieces: int = 1) -> bool:
        """Whether so much more may wait here, in so many pieces. One piece always may, however large."""
        return (pieces == 1 and not self.bytes) or self.bytes + size <= self._backlogs.each_bytes_max

    @property
    def is_full(self) -> bool:
        """Whether the client lags so much that nothing more should be made for it."""
        return self.bytes > self._backlogs.each_bytes_max

    async def room(self) -> None:
        """Wait until it is not full. A client that takes too little for too long is disconnected."""
        try:
            async with asyncio.timeout(self._backlogs.wait_s):
                while self.is_full:
                    self._shrunk = asyncio.get_running_loop().create_future()
                    await self._shrunk
        except TimeoutError:
            self.drop()

    def _wake(self) -> None:
        if self._shrunk and not self._shrunk.done():
            self._shrunk.set_result(None)

    def drop(self) -> None:
        """Disconnect the client."""
        self.close()
        self.disconnect()

    def close(self) -> None:
        """The client disconnected."""
        if not self.closed:
            self._count(0)
            self.closed = True
            self._backlogs.forget(self)
            self.let_go()
            self.bytes = 0
            self._wake()


class Backlogs:
    """Those of one process."""

    def __init__(self, settings: Settings) -> None:
        self.each_bytes_max = settings.stream_backlog_bytes_max
        self.uncounted_bytes = min(PAGE_BYTES, self.each_bytes_max)
        self.wait_s = settings.stream_wait_s
        self.now = asyncio.get_running_loop().time
        self._all_bytes_max = self._left = settings.unread_bytes_max
        self._open: set[Backlog] = set()

    def open(self) -> Backlog:
        """The backlog of one more client, who must close it."""
        backlog = Backlog(self)
        self._open.add(backlog)
        return backlog

    def count(self, more: int) -> None:
        """So much more waits for one of the clients, or less."""
        self._left -= more
        if self._left < 0 < more:
            self._make_room()

    def forget(self, backlog: Backlog) -> None:
        """This one is closed."""
        self._open.discard(backlog)

    def _make_room(self) -> None:
        """What never fits goes first. What can be read again is let go before another client is disconnected; in both, clients that
        take nothing come first."""
        enough = int(self._all_bytes_max * SPARE)
        stale_since = self.now() - STALE_S
        lagging = sorted((one for one in self._open if one.counted), key=lambda one: one.taken_at)
        self._relieve([one.drop for one in lagging if one.counted > self._all_bytes_max and not one.rereads], 0)
        stale = [one for one in lagging if one.taken_at < stale_since]
        self._relieve([one.let_go for one in stale if one.rereads], enough)
        self._relieve([one.let_go for one in lagging if one.rereads], 0)
        if self._left < 0:
            self._relieve([one.drop for one in stale], enough)
        while self._left < 0:
            max(self._open, key=lambda backlog: backlog.counted).drop()

    def _relieve(self, measures: Iterable[Callable[[], None]], wanted: int) -> None:
        for measure in measures:
            if self._left >= wanted:
                return
            measure()
