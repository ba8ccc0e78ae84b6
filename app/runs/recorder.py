"""The single writer of one response: stamp, fold, encode once, append. The row is committed before the terminal entry, and the
items of a background run before their readers hear that they are done."""

import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Protocol

from app.domain.fold import Fold
from app.errors import Fenced, RunTooLong
from app.wire.events import SNAPSHOTS, TERMINAL, Created, Entry, Event, InProgress, ItemDone, encode_event
from app.wire.resources import Response, Usage


class Log(Protocol):
    """Where entries go: memory for a foreground run, Redis for a background one."""

    def append(self, entries: Sequence[Entry]) -> None:
        """Entries for the readers."""
        ...


FIRST_EVENTS = 2
"""Events that say only that a foreground run has begun."""

ITEM_DONE = str(ItemDone.__struct_config__.tag)

TOO_MUCH = "The run made more output than REPRISE_RUN_OUTPUT_BYTES_MAX allows."

Keep = Callable[[Sequence[Entry]], Awaitable[None]]
"""Commits entries to the journal."""


class Recorder:
    """Writes one response's events."""

    def __init__(
        self,
        response: Response,
        log: Log | None,
        *,
        bytes_max: int,
        events_max: int,
        next_number: int = 0,
        usage: Usage | None = None,
        said: Sequence[Entry] = (),
        unkept: Sequence[Entry] = (),
        keep: Keep | None = None,
    ) -> None:
        """Without a log nobody follows. With `keep` every item is journalled before it is done for readers; `said` is then
        what earlier owners have recorded, and `unkept` the end of it that is in no journal."""
        self._fold = Fold(response)
        self.upstream: str | None = None
        """The name of the upstream that has answered last."""
        self._begun = time.monotonic()
        self.usage = usage
        """What the finished turns took, those of earlier owners included; None as long as no upstream has said so."""
        self.next_number = next_number
        self._entries: list[Entry] = list(said)
        self._log, self._keep = log, keep
        self._unkept: list[Entry] = list(unkept)
        self._held: list[Entry] = []
        self._stopped: Exception | None = None
        self.is_committing = False
        """Whether it waits for the journal: then nobody knows yet what is kept."""
        self._bytes_left, self._events_left = bytes_max, events_max
        self._unheard_bytes = bytes_max
        """How much more the upstream may send, whatever comes of it."""
        for entry in said:
            self._count(entry)

    @property
    def response(self) -> Response:
        """What the events so far say."""
        return self._fold.response

    @property
    def duration_s(self) -> float:
        """How long this process has worked on the response."""
        return time.monotonic() - self._begun

    @property
    def has_output(self) -> bool:
        """Whether a foreground run has made more than its first two events."""
        return self.next_number > FIRST_EVENTS

    async def begin(self) -> None:
        """The first events of a foreground run: created, in_progress."""
        await self.record([Created(response=self.response), InProgress(response=self.response)])

    async def record(self, events: Iterable[Event], *, keep: bool = False, ending: bool = False) -> None:
        """Record a batch. With `keep` the whole batch is journalled at once before any of it is sent, with all that was held;
        the end of an item always is.

        A turn is `ending` with these: the ends of its open items then wait for what comes next, as a rule the end of the run.
        So whoever goes on after a crash finds the turn either unfinished, and makes it anew, or followed by something.
        Raises RunTooLong once the run has made more events, or more bytes of them, than it may make, Fenced if somebody else owns the response.
        """
        if self._stopped:
            raise self._stopped
        batch, self._held = self._held, []
        if batch and not keep:
            await self._commit(batch)
            batch = []
        for event in events:
            self._fold.apply(event)
            batch.append(self.stamp(event))
            if self._keep and not ending and not keep and isinstance(event, ItemDone):
                self._send(batch[:-1])
                await self._commit(batch[-1:])
                batch = []
        if self._keep and keep and batch:
            await self._commit(batch)
            batch = []
        if self._keep and ending:
            end = next((at for at, entry in enumerate(batch) if entry.type == ITEM_DONE), len(batch))
            batch, self._held = batch[:end], batch[end:]
        self._send(batch)
        if self._bytes_left < 0:
            raise RunTooLong(TOO_MUCH)
        if self._events_left < 0:
            raise RunTooLong("The run made more events than REPRISE_RUN_EVENTS_MAX allows.")

    def hear(self, count: int) -> None:
        """Count bytes that the upstream has sent: it may send as much as a run may say. Raises RunTooLong."""
        self._unheard_bytes -= count
        if self._unheard_bytes < 0:
            raise RunTooLong(TOO_MUCH)

    def stop(self, why: Exception | None = None) -> None:
        """Record nothing any more: somebody else goes on. Whoever tries all the same meets `why`, as a rule Fenced."""
        self._stopped = self._stopped or why or Fenced()

    def stamp(self, event: Event) -> Entry:
        """Give the event its number, and encode it."""
        event.sequence_number = self.next_number
        self.next_number += 1
        entry = encode_event(event)
        self._count(entry)
        return entry

    def _count(self, entry: Entry) -> None:
        """Only what the run makes is limited: a request may be as long as it likes."""
        if entry.type not in SNAPSHOTS:
            self._bytes_left -= len(entry.frame)
            self._events_left -= 1

    def _send(self, batch: list[Entry]) -> None:
        if not batch:
            return
        if self._keep:
            self._unkept += batch
            self._entries += batch
        if self._log:
            self._log.append(batch)

    async def _commit(self, entries: list[Entry]) -> None:
        """These, and all before them, are journalled before a reader hears of them."""
        assert self._keep
        self.is_committing = True
        try:
            await self._keep([*self._unkept, *entries])
        except BaseException as error:
            # Their numbers are given, and they may be committed: nothing else may follow from here.
            self.stop(error if isinstance(error, Exception) else None)
            raise
        finally:
            self.is_committing = False
        self._send(entries)
        self._unkept = []

    async def finish(
        self, closed: Response, commit: Callable[[Response, Sequence[Entry]], Awaitable[Response]]
    ) -> Response:
        """End the response. `commit` stores it with all entries, the last one included, and gives what is stored in truth;
        only then the last event is sent. Raises Fenced if somebody else goes on."""
        if self._stopped:
            raise self._stopped
        number = self.next_number
        entry = self._last(closed, number)
        stored = await commit(closed, [*self._entries, *self._held, entry])
        if stored is not closed:
            entry = self._last(stored, number)
        self._fold = Fold(stored)
        self._send([*self._held, entry])
        return stored

    def _last(self, response: Response, number: int) -> Entry:
        self.next_number = number
        return self.stamp(TERMINAL[response.status](response=response))
