"""The event log of a foreground run: it is kept for one reader, which may be slower than the run."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import closing

from app.patience import Patience
from app.wire.events import Entry


class MemoryLog:
    """Entries wait for their reader, and are forgotten as they are read: a long stream does not grow in memory."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._grown: asyncio.Future[None] | None = None
        self._ended = False

    def append(self, entries: Sequence[Entry]) -> None:
        """Add entries and wake the reader; after a terminal one there are no more."""
        assert not self._ended
        self._entries += entries
        self._ended = bool(entries) and entries[-1].is_terminal
        self._wake()

    def abandon(self) -> None:
        """End the log without a terminal entry, for a run that ended before its first event."""
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        if self._grown and not self._grown.done():
            self._grown.set_result(None)

    async def read(self, *, silence_s: float) -> AsyncIterator[list[Entry]]:
        """All entries, in the batches that have gathered; ends with the log.

        After so much silence comes an empty batch, so that the reader can show that it is alive.
        """
        with closing(Patience(silence_s)) as patience:
            while True:
                batch, self._entries = self._entries, []
                if batch:
                    yield batch
                elif self._ended:
                    return
                else:
                    self._grown = asyncio.get_running_loop().create_future()
                    try:
                        with patience:
                            await self._grown
                    except TimeoutError:
                        yield []
