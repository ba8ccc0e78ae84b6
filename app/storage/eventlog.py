"""The event log of one response: append-only entries, any number of readers."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import closing

from app.patience import Patience
from app.wire.events import Entry


class MemoryLog:
    """The log of a foreground run: it lives as long as the run and its readers."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._waiting: list[asyncio.Future[None]] = []
        self.ended = False

    def append(self, entries: Sequence[Entry]) -> None:
        """Add entries and wake the readers; after a terminal one there are no more."""
        assert not self.ended
        self._entries += entries
        self.ended = bool(entries) and entries[-1].is_terminal
        self._wake()

    def abandon(self) -> None:
        """End the log without a terminal entry, for a run that ended before its first event."""
        self.ended = True
        self._wake()

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for reader in waiting:
            if not reader.done():
                reader.set_result(None)

    async def read(self, after: int = -1, *, silence_s: float | None = None) -> AsyncIterator[list[Entry]]:
        """Entries with a greater sequence number, in the batches that have gathered; ends with the log.

        After so much silence comes an empty batch, so that the reader can show that it is alive.
        """
        at = after + 1  # entry number n has the sequence number n
        with closing(Patience(silence_s)) as patience:
            while True:
                batch = self._entries[at:]
                if batch:
                    at += len(batch)
                    yield batch
                elif self.ended:
                    return
                else:
                    grown: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                    self._waiting.append(grown)
                    try:
                        with patience:
                            await grown
                    except TimeoutError:
                        yield []
