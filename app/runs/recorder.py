"""The single writer of one response: number, fold, encode once, append.

The row commits before the terminal event is sent, and the items of a background run before readers see that they are done.
"""

import time
from collections.abc import Iterable, Sequence
from typing import Protocol

from msgspec.structs import replace

from app.domain.fold import Fold
from app.domain.prices import Prices
from app.domain.quotas import used_tokens
from app.domain.spending import NOTHING_SPENT, Spent, spend
from app.errors import Fenced, RunTooLong
from app.storage.eventlog import EventLog
from app.wire.chat import ChatUsage
from app.wire.events import SNAPSHOTS, TERMINAL, Created, Entry, Event, InProgress, ItemDone, encode_event
from app.wire.resources import Response


class Journal(Protocol):
    """Where the events of a background run survive their process and Redis."""

    async def checkpoint(self, entries: Sequence[Entry], spent: Spent) -> None:
        """Commit events, and what the run has used before. Raises Fenced."""
        ...


FIRST_EVENTS = 2
"""Events that only say that a foreground run has begun."""

ITEM_DONE = str(ItemDone.__struct_config__.tag)

TOO_MUCH = "The run made more output than REPRISE_RUN_OUTPUT_BYTES_MAX allows."


class Recorder:
    """Writes one response's events."""

    def __init__(
        self,
        response: Response,
        log: EventLog | None,
        *,
        bytes_max: int,
        events_max: int,
        next_number: int = 0,
        next_output_index: int = 0,
        spent: Spent = NOTHING_SPENT,
        recorded: Sequence[Entry] = (),
        pending: Sequence[Entry] = (),
        journal: Journal | None = None,
    ) -> None:
        """Without a `log` there are no readers. With a `journal`, `recorded` are the events of earlier owners, and `pending`
        those of them that are not checkpointed yet."""
        self._fold = Fold(response)
        self.upstream: str | None = None
        """The name of the upstream that answered last."""
        self.is_asking = False
        """Whether an upstream was sent the newest turn, or may have been by an earlier owner, and has not refused it."""
        self._begun = time.monotonic()
        self.spent = spent
        self.next_number = next_number
        self.next_output_index = next_output_index
        """The index of the next output item that this run makes."""
        self._entries: list[Entry] = list(recorded)
        self._log, self._journal = log, journal
        self._pending: list[Entry] = list(pending)
        self._deferred: list[Entry] = []
        self._stopped: Exception | None = None
        self.is_committing = False
        """Whether a checkpoint is under way: its outcome is unknown."""
        self.has_output = False
        """Whether a foreground run that is closed has recorded more than its first two events."""
        self._bytes_left, self._events_left = bytes_max, events_max
        self._upstream_bytes_left = bytes_max
        """What the upstream may still send, whatever comes of it."""
        for entry in recorded:
            self._count(entry)

    @property
    def response(self) -> Response:
        """The response as of the last event."""
        return self._fold.response

    @property
    def duration_s(self) -> float:
        """How long this process has worked on the response."""
        return time.monotonic() - self._begun

    async def begin(self) -> None:
        """Record the first events of a foreground run: created, in_progress."""
        await self.record([Created(response=self.response), InProgress(response=self.response)])

    async def record(self, events: Iterable[Event], *, checkpoint: bool = False, ends_turn: bool = False) -> None:
        """Record a batch. With `checkpoint` the whole batch commits before any of it is sent; the end of an item always does.

        A batch that `ends_turn` closes the items of a turn. Their ends wait for what comes next, usually the end of the run: so
        another worker, after a crash, finds the turn either unfinished, and repeats it, or followed by something.
        Raises RunTooLong for more events, or more bytes of them, than a run may make; Fenced if another worker owns the run.
        """
        if self._stopped:
            raise self._stopped
        batch, self._deferred = self._deferred, []
        if batch and not checkpoint:
            await self._checkpoint(batch)
            batch = []
        for event in events:
            self._fold.apply(event)
            batch.append(self._stamp(event))
            if self._journal and not ends_turn and not checkpoint and isinstance(event, ItemDone):
                self._send(batch[:-1])
                await self._checkpoint(batch[-1:])
                batch = []
        if self._journal and checkpoint and batch:
            await self._checkpoint(batch)
            batch = []
        if self._journal and ends_turn:
            end = next((at for at, entry in enumerate(batch) if entry.type == ITEM_DONE), len(batch))
            batch, self._deferred = batch[:end], batch[end:]
        self._send(batch)
        if self._bytes_left < 0:
            raise RunTooLong(TOO_MUCH)
        if self._events_left < 0:
            raise RunTooLong("The run made more events than REPRISE_RUN_EVENTS_MAX allows.")

    def spend(self, reported: ChatUsage | None, prices: Prices | None, *, is_limited: bool = True) -> None:
        """Add what an upstream has reported, at these prices, and whether `max_output_tokens` limits it."""
        self.spent = spend(self.spent, reported, prices, is_limited=is_limited)

    def spend_tool_time(self, seconds: float) -> None:
        """Add how long a call of a tool has taken."""
        self.spent = replace(self.spent, tool_s=self.spent.tool_s + seconds)

    def count_upstream(self, count: int) -> None:
        """Count bytes that the upstream has sent; they have the limit of a run's output. Raises RunTooLong."""
        self._upstream_bytes_left -= count
        if self._upstream_bytes_left < 0:
            raise RunTooLong(TOO_MUCH)

    def used_tokens(self, closed: Response, reserved: int) -> int:
        """What the ended response counts for in quotas, of which it has `reserved` so much."""
        was_asked = bool(self.is_asking or self.upstream or closed.output)
        return used_tokens(closed.status, closed.usage, was_asked=was_asked, reserved=reserved)

    def stop(self, why: Exception | None = None) -> None:
        """Record nothing more, because another worker continues. Every later attempt raises `why`, by default Fenced."""
        self._stopped = self._stopped or why or Fenced()

    def _stamp(self, event: Event) -> Entry:
        """Number an event, and encode it."""
        event.sequence_number = self.next_number
        self.next_number += 1
        entry = encode_event(event)
        self._count(entry)
        return entry

    def _count(self, entry: Entry) -> None:
        """Only what the run makes is limited, not the request that snapshots repeat."""
        if entry.type not in SNAPSHOTS:
            self._bytes_left -= len(entry.frame)
            self._events_left -= 1

    def _send(self, batch: list[Entry]) -> None:
        if not batch:
            return
        if self._journal:
            self._pending += batch
            self._entries += batch
        if self._log:
            self._log.append(batch)

    async def _checkpoint(self, entries: list[Entry]) -> None:
        """Commit these events and all before them, then send them."""
        assert self._journal
        self.is_committing = True
        try:
            await self._journal.checkpoint([*self._pending, *entries], self.spent)
        except BaseException as error:
            # Their numbers are taken, and they may be committed: nothing else may follow here.
            self.stop(error if isinstance(error, Exception) else None)
            raise
        finally:
            self.is_committing = False
        self._send(entries)
        self._pending = []

    def close(self, closed: Response) -> list[Entry]:
        """Number and encode the terminal event, without sending it. Returns every event of the response, to be committed with
        it. Raises Fenced."""
        if self._stopped:
            raise self._stopped
        self.has_output = self.next_number > FIRST_EVENTS
        self._deferred.append(self._stamp(TERMINAL[closed.status](response=closed)))
        return [*self._entries, *self._deferred]

    def finish(self, stored: Response, closed: Response) -> None:
        """Send the terminal event, which is committed: with `closed`, or with what another process has `stored`."""
        if stored is not closed:
            self._deferred.pop()
            self.next_number -= 1
            self._deferred.append(self._stamp(TERMINAL[stored.status](response=stored)))
        self._fold = Fold(stored)
        batch, self._deferred = self._deferred, []
        self._send(batch)
