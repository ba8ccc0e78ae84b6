"""Following a run: its events for one reader, from memory, Redis or Postgres. The reader does not see which."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

from msgspec import Struct
from redis.exceptions import RedisError

from app.errors import ResponseNotFound, ServerError
from app.runs.foreground import ForegroundRun
from app.settings import Settings
from app.storage import journal
from app.storage.backlog import Backlog, Backlogs, pages_of
from app.storage.database import Database
from app.storage.journal import StoredEvents
from app.storage.redishub import Batch, Reader
from app.storage.redislog import RedisLogs
from app.wire.events import Entry

GAP_PAUSE_S = 0.05
"""Before a reader looks again for events that are missing everywhere: their writer is sending them once more."""


class Followed(Struct, frozen=True):
    """The events of one response, for one reader."""

    batches: AsyncIterator[Sequence[Entry]]
    """To the terminal event; an empty batch after each silence."""
    backlog: Backlog
    """What the reader has not taken yet."""
    disconnected: Callable[[], None]
    """What the end of the reader means for the run."""
    after: int = -1
    """The number of the event before the first."""
    response_id: str | None = None
    """Of a stored response that was made for this reader."""


class Following:
    """Follows any run, of this process or of another."""

    def __init__(self, settings: Settings, database: Database, logs: RedisLogs, backlogs: Backlogs) -> None:
        self._poll_s, self._silence_s = settings.poll_s, settings.keepalive_s
        self._database, self._logs, self._backlogs = database, logs, backlogs
        self._looks: dict[tuple[str, int], asyncio.Future[StoredEvents]] = {}
        self._is_released = False

    def follow(self, run: ForegroundRun) -> Followed:
        """The events of a foreground stream, from memory, once."""
        assert run.log
        response_id = run.response.id if run.response.store else None
        batches = run.log.read(silence_s=self._silence_s)
        return Followed(batches, run.log.backlog, run.reader_disconnected, response_id=response_id)

    def follow_stored(
        self,
        tenant_id: str,
        response_id: str,
        entries: list[Entry],
        *,
        is_archived: bool = False,
        after: int = -1,
        is_new: bool = False,
    ) -> Followed:
        """The events of a background response after a number, beginning with these from Postgres; then what Redis holds, and what
        comes. The run continues without its readers."""
        backlog = self._backlogs.open()
        batches = self._batches(tenant_id, response_id, after, entries, is_archived, backlog)
        return Followed(batches, backlog, _ignore_disconnect, after, response_id if is_new else None)

    async def stored(self, tenant_id: str, response_id: str, after: int) -> StoredEvents:
        """A page of a response's events after a number, from Postgres. Raises ResponseNotFound."""
        async with self._database.autocommit() as tx:
            events = await journal.read(tx, tenant_id, response_id, after)
        if events is None:
            raise ResponseNotFound(response_id)
        return events

    def release(self) -> None:
        """Break off the streams of background responses, so that their readers resume at another replica."""
        self._is_released = True

    def _check_released(self) -> None:
        if self._is_released:
            raise ServerError("The server is shutting down.")

    async def _batches(
        self, tenant_id: str, response_id: str, after: int, fresh: list[Entry], ended: bool, backlog: Backlog
    ) -> AsyncIterator[Sequence[Entry]]:
        """Numbers are trusted, not transport: what does not follow the last number is read from Postgres, and so is a stream that
        is silent or unavailable. A slow reader costs no more than its backlog and a page: what does not fit is read again."""
        cursor, silent_s = after, 0.0
        begins = _last(fresh, after)
        async with self._logs.reading(response_id, begins, backlog, silence_s=self._poll_s) as reader:
            fresh = reader.hand_out(fresh)
            while fresh or not ended:
                if fresh:
                    cursor, silent_s, ends = fresh[-1].sequence_number, 0.0, fresh[-1].is_terminal
                    for page in pages_of(fresh, reader.given):
                        yield page
                    fresh = page = []  # the next events may be far away
                    if ends:
                        return
                self._check_released()
                if ended:
                    fresh, ended = await self._look_again(reader, tenant_id, response_id, cursor)
                    continue
                received = await self._next(reader)
                fresh, gap = _contiguous(received, cursor)
                if fresh or (received and not gap):
                    if gap:
                        reader.rewind(fresh[-1].sequence_number)
                    continue
                fresh, ended = await self._look_again(reader, tenant_id, response_id, cursor)
                if gap:
                    await asyncio.sleep(0 if fresh else GAP_PAUSE_S)
                    reader.rewind(_last(fresh, cursor))
                    continue
                silent_s += self._poll_s
                if silent_s >= self._silence_s:
                    silent_s = 0.0
                    yield []

    async def _next(self, reader: Reader) -> list[Batch]:
        try:
            return await reader.next()
        except (RedisError, OSError):
            await asyncio.sleep(self._poll_s)  # Redis is unavailable: Postgres is asked, no faster than this
            return []

    async def _look_again(
        self, reader: Reader, tenant_id: str, response_id: str, cursor: int
    ) -> tuple[list[Entry], bool]:
        """A page of the events after the cursor from Postgres, and whether the archive is complete; none while it is unavailable.
        Readers at one place share an answer for a moment."""
        place = (response_id, cursor)
        look = self._looks.get(place)
        if look is None:
            look = self._looks[place] = asyncio.ensure_future(self.stored(tenant_id, response_id, cursor))
            asyncio.get_running_loop().call_later(self._poll_s / 2, self._looks.pop, place, None)
        try:
            events = await asyncio.shield(look)
        except ServerError:
            return [], False
        return reader.hand_out(events.entries), events.archived


def _ignore_disconnect() -> None:
    """A background run continues without its readers."""


def _last(entries: Sequence[Entry], otherwise: int) -> int:
    return entries[-1].sequence_number if entries else otherwise


def _contiguous(batches: Sequence[Batch], cursor: int) -> tuple[list[Entry], bool]:
    """The events after the cursor as far as they are consecutive, and whether some are missing after them."""
    fresh: list[Entry] = []
    for batch in batches:
        for entry in batch.entries:
            if entry.sequence_number <= cursor:
                continue
            jumps = batch.jump is not None and entry is batch.entries[0] and cursor >= batch.jump
            if entry.sequence_number != cursor + 1 and not jumps:
                return fresh, True
            fresh.append(entry)
            cursor = entry.sequence_number
    return fresh, False
