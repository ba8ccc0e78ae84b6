"""Room for contexts: how many bytes of them a process holds at once. What does not fit waits for its turn.

A context is in memory as long as its run, several times over while it is read and sent. Without a bound a few long chains
together end the process, and every other run with it. Small contexts have room of their own, so that they never wait for
long ones, nor keep those from ever finding enough; among themselves they take turns. The tiniest never wait: of those there are
no more than runs. What is read for replies has room of its own in the same way, for as long as it takes to write the reply.
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
    """Bytes that are taken in the order of asking."""

    def __init__(self, bytes_max: int, *, waiting_max: int) -> None:
        self.bytes_max = self.free = bytes_max
        self._waiting_max = waiting_max
        self._waiting: dict[asyncio.Future[None], int] = {}

    def has(self, size: int) -> bool:
        """Whether so many bytes are free, and none wait for them."""
        return not self._waiting and size <= self.free

    async def take(self, size: int, *, wait_s: float | None) -> None:
        """Wait for so many bytes. Raises TooManyRequests if they are not free in time, or if too many wait already; not if
        `wait_s` is None: what is accepted waits in any case."""
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
                self.give(size)  # its turn came at the moment when it was given up
            else:
                self._waiting.pop(turn, None)
                self._serve()  # those after it may fit
            if isinstance(error, TimeoutError):
                raise _no_room() from None
            raise

    def give(self, size: int) -> None:
        """So many bytes are free again."""
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
    """What one context has taken."""

    def __init__(self, rooms: "Rooms") -> None:
        self._rooms = rooms
        self._queue: Queue | None = None
        self._taken = 0
        self.size = 0
        """Bytes of context that may be held."""

    async def read(
        self, read: Callable[[int], Awaitable[tuple[int, T | None]]], *, least: int = 0, wait_s: float | None
    ) -> T:
        """What `read` finds, when there is room for it. It gives how many bytes are needed, and reads only if they are no more
        than its argument, which is `least` or more; as a rule the first look is enough. Raises TooManyRequests."""
        if self.size < least or not self.size:
            await self.take(max(least, self._rooms.at_first()), wait_s=wait_s)
        while True:
            needed, found = await read(self.size)
            if found is not None:
                self.shrink(needed)
                return found
            await self.take(needed, wait_s=wait_s)

    async def take(self, size: int, *, wait_s: float | None) -> None:
        """Give up what is held, and wait for so many bytes. Raises TooManyRequests."""
        self.release()
        if size <= TINY_BYTES:
            self.size = size
            return
        queue = self._rooms.queue_for(size)
        taken = min(size, queue.bytes_max)  # what is larger than all there is comes alone
        await queue.take(taken, wait_s=wait_s)
        self._queue, self._taken, self.size = queue, taken, size

    def shrink(self, size: int) -> None:
        """Fewer bytes are needed than were taken."""
        if self._queue and size < self._taken:
            self._queue.give(self._taken - size)
            self._taken = self.size = size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Nothing is held any more."""
        if self._queue:
            self._queue.give(self._taken)
        self._queue, self._taken, self.size = None, 0, 0


class Rooms:
    """All room of one kind in this process."""

    def __init__(self, whole: int, *, waiting_max: int) -> None:
        """Of so many bytes; in each of the two parts no more than `waiting_max` wait."""
        self.small_max = whole // SMALL_PARTS
        self._small = Queue(whole // SMALL_SHARE, waiting_max=waiting_max)
        self._large = Queue(whole - whole // SMALL_SHARE, waiting_max=waiting_max)

    def at_first(self) -> int:
        """How much may be taken without a wait, for a context whose size is not known yet."""
        return self.small_max if self._small.has(self.small_max) else TINY_BYTES

    def queue_for(self, size: int) -> Queue:
        """Where a context of so many bytes waits."""
        return self._small if size <= self.small_max else self._large


def _no_room() -> TooManyRequests:
    return TooManyRequests(
        "Too many long contexts or replies are being worked on; please try again.",
        headers={"Retry-After": str(RETRY_AFTER_S)},
    )
