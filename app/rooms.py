"""Room for contexts: how many bytes of them a process holds at once. A context that does not fit waits in a queue.

A context is in memory as long as its run, and takes several times its size while it is read and sent. Without a bound a few
long chains exhaust the memory of the process. Small contexts have room of their own, so that they neither wait for long ones
nor starve them; each queue is first in, first out. The tiniest never wait: there are no more of them than runs. Reads for
replies have room of their own in the same way, until the reply is written.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Self, TypeVar

from app.errors import TooManyRequests

T = TypeVar("T")

SMALL_SHARE = 4
"""One part in so many is for small contexts, the rest for the others."""

SMALL_PARTS = 256
"""A context is small up to one part of the whole in so many."""

TINY_BYTES = 64 * 1024
"""Up to so much a context does not count."""

RETRY_AFTER_S = 5


class Queue:
    """A semaphore of bytes, first in, first out."""

    def __init__(self, bytes_max: int, *, waiting_max: int) -> None:
        self.bytes_max = self.free = bytes_max
        self._waiting_max = waiting_max
        self._waiting: dict[asyncio.Future[None], int] = {}

    def has(self, size: int) -> bool:
        """Whether so many bytes are free, and none wait for them."""
        return not self._waiting and size <= self.free

    async def take(self, size: int, *, wait_s: float | None) -> None:
        """Wait for so many bytes. Raises TooManyRequests if they are not free in time, or if too many wait already; never if
        `wait_s` is None, which is for accepted runs."""
        if self.has(size):
            self.free -= size
            return
        if len(self._waiting) >= self._waiting_max and wait_s is not None:
            raise _no_room()
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[turn] = size
        try:
            async with asyncio.timeout(wait_s):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self.give(size)  # it got the bytes while it was cancelled
            else:
                self._waiting.pop(turn, None)
                self._serve()  # the next ones may fit
            if isinstance(error, TimeoutError):
                raise _no_room() from None
            raise

    def give(self, size: int) -> None:
        """Free so many bytes."""
        self.free += size
        self._serve()

    def _serve(self) -> None:
        while self._waiting:
            turn, size = next(iter(self._waiting.items()))
            if size > self.free and not turn.cancelled():
                return
            del self._waiting[turn]
            if not turn.cancelled():
                self.free -= size
                turn.set_result(None)


class Room:
    """The bytes that one context has taken."""

    def __init__(self, rooms: "Rooms") -> None:
        self._rooms = rooms
        self._queue: Queue | None = None
        self._taken = 0
        self.size = 0
        """Bytes of context that may be held."""

    async def read(
        self, read: Callable[[int], Awaitable[tuple[int, T | None]]], *, least: int = 0, wait_s: float | None
    ) -> T:
        """The result of `read`, once there is room for it. `read` returns how many bytes it needs, and a result only if they are
        no more than its argument, which is `least` or more; usually the first call is enough. Raises TooManyRequests."""
        if self.size < least or not self.size:
            await self.take(max(least, self._rooms.at_first()), wait_s=wait_s)
        while True:
            needed, found = await read(self.size)
            if found is not None:
                self.shrink(needed)
                return found
            await self.take(needed, wait_s=wait_s)

    async def take(self, size: int, *, wait_s: float | None) -> None:
        """Free what is taken, and wait for so many bytes. Raises TooManyRequests."""
        self.release()
        if size <= TINY_BYTES:
            self.size = size
            return
        queue = self._rooms.queue_for(size)
        taken = min(size, queue.bytes_max)  # a context larger than the whole takes all of it
        await queue.take(taken, wait_s=wait_s)
        self._queue, self._taken, self.size = queue, taken, size

    def shrink(self, size: int) -> None:
        """Free all but so many bytes."""
        if self._queue and size < self._taken:
            self._queue.give(self._taken - size)
            self._taken = self.size = size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Free what is taken."""
        if self._queue:
            self._queue.give(self._taken)
        self._queue, self._taken, self.size = None, 0, 0


class Rooms:
    """All room of one kind in this process."""

    def __init__(self, whole: int, *, waiting_max: int) -> None:
        """`whole` is its size in bytes; at most `waiting_max` contexts wait in each of the two queues."""
        self.small_max = whole // SMALL_PARTS
        self._small = Queue(whole // SMALL_SHARE, waiting_max=waiting_max)
        self._large = Queue(whole - whole // SMALL_SHARE, waiting_max=waiting_max)

    def at_first(self) -> int:
        """How many bytes a context of unknown size may take without a wait."""
        return self.small_max if self._small.has(self.small_max) else TINY_BYTES

    def queue_for(self, size: int) -> Queue:
        """The queue of a context of so many bytes."""
        return self._small if size <= self.small_max else self._large


def _no_room() -> TooManyRequests:
    return TooManyRequests(
        "Too many long contexts or replies are in progress; please try again.",
        headers={"Retry-After": str(RETRY_AFTER_S)},
    )
