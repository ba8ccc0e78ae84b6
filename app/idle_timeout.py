"""A timeout for each wait of a task that waits often, cheaper than `asyncio.timeout` around each."""

import asyncio
from types import TracebackType


class IdleTimeout:
    """A context manager around each wait of one task: raises TimeoutError from a wait that takes too long. Close it after the last.

    A timer for every wait would cost more than most waits. So the timer of one wait stays for the next ones, and when it
    fires it checks how long the current one has taken.
    """

    __slots__ = ("_begun", "_cancelling", "_expired", "_loop", "_task", "_timer", "_waits", "continues", "seconds")

    def __init__(self, seconds: float) -> None:
        """`seconds` is the limit of one wait."""
        self.seconds = seconds
        self.continues = False
        """Whether the next wait belongs to the previous one: then the limit is for both together."""
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        task = asyncio.current_task()
        assert task is not None
        self._task: asyncio.Task[object] = task
        self._waits = False
        self._expired = False

    def __enter__(self) -> None:
        self._waits = True
        self._cancelling = self._task.cancelling()
        if not self.continues:
            self._begun = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_at(self._begun + self.seconds, self._ring)

    def __exit__(
        self, type_: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._waits = False
        if self._expired:
            self._expired = False
            # A cancellation from elsewhere takes precedence.
            if self._task.uncancel() <= self._cancelling and isinstance(error, asyncio.CancelledError):
                raise TimeoutError from error

    def _ring(self) -> None:
        self._timer = None
        if not self._waits:
            return  # the next wait sets a new timer
        left_s = self._begun + self.seconds - self._loop.time()
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._ring)
        else:
            self._expired = True
            self._task.cancel()

    def close(self) -> None:
        """Cancel the timer; no wait follows."""
        if self._timer:
            self._timer.cancel()
