"""The single writer of one response: stamp, fold, encode once, append. The row is committed before the terminal entry."""

from collections.abc import Awaitable, Callable, Iterable

from app.domain.fold import apply
from app.errors import RunTooLong
from app.storage.eventlog import MemoryLog
from app.wire.events import TERMINAL, Created, Event, InProgress, encode_event
from app.wire.resources import Response


class Recorder:
    """Writes one response's events. `response` is always what its events so far say."""

    def __init__(self, response: Response, log: MemoryLog, *, bytes_max: int) -> None:
        self.response = response
        self._log = log
        self._bytes_left = bytes_max
        self._next = 0

    @property
    def begun(self) -> bool:
        """Whether anything was recorded."""
        return self._next > 0

    def begin(self) -> None:
        """The first events: created, in_progress."""
        self.record([Created(response=self.response), InProgress(response=self.response)])

    def record(self, events: Iterable[Event]) -> None:
        """Record a batch. Raises RunTooLong once the run's events have more bytes than it may make."""
        entries = []
        for event in events:
            event.sequence_number = self._next
            self._next += 1
            self.response = apply(self.response, event)
            entry = encode_event(event)
            self._bytes_left -= len(entry.frame)
            entries.append(entry)
        if entries:
            self._log.append(entries)
        if self._bytes_left < 0:
            raise RunTooLong("The run made more output than REPRISE_RUN_OUTPUT_BYTES_MAX allows.")

    async def finish(self, closed: Response, commit: Callable[[Response], Awaitable[Response]]) -> Response:
        """End the response: `commit` stores it and gives what is stored in truth; only then its last event is sent."""
        stored = await commit(closed)
        event = TERMINAL[stored.status](response=stored, sequence_number=self._next)
        self.response = stored
        self._log.append([encode_event(event)])
        return stored
