"""Request bodies, bounded for all clients of a process together, from the first byte until the request is admitted.

A long body stays in memory until there is room for its context. Without a bound a few dozen slow clients with long bodies
take all memory. Short bodies do not count.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Self, TypeVar

import msgspec
from litestar import Request
from litestar.exceptions import InternalServerException

from app.api.connected import ClientDisconnected
from app.errors import ApiError, ServerUnavailable, TooManyRequests
from app.offload import offload
from app.settings import Settings
from app.wire.conversations import decode_request

S = TypeVar("S")
T = TypeVar("T")

UNCOUNTED_BYTES = 64 * 1024
"""Bytes of each body that do not count."""

RETRY_AFTER_S = 5


class Bodies:
    """The bodies of one process."""

    def __init__(self, settings: Settings) -> None:
        self._left = max(settings.bodies_bytes_max, settings.body_bytes_max)
        self._timeout_s = settings.body_timeout_s
        self._arriving: dict[Body, None] = {}

    def reading(self, request: Request[Any, Any, Any]) -> "Body":
        """The body of a request, counted by a context manager until the request is admitted."""
        return Body(self, request)

    async def decoded(self, request: Request[Any, Any, Any], decoder: msgspec.json.Decoder[S]) -> S:
        """A request's whole body, decoded. Raises as `Body.read` and `decode_request`."""
        with self.reading(request) as body:
            raw = await body.read()
            return await offload(len(raw), decode_request, decoder, raw)

    def begin(self, body: "Body") -> None:
        """The body begins to arrive."""
        self._arriving[body] = None

    def end(self, body: "Body") -> None:
        """The body is complete, or given up."""
        self._arriving.pop(body, None)

    def take(self, size: int, body: "Body") -> None:
        """Count `size` bytes more. Older bodies that take too long to arrive are given up for them. Raises TooManyRequests."""
        while self._left < size:
            eldest = next(iter(self._arriving))
            if eldest is body or eldest.age_s() < self._timeout_s:
                raise _too_many()
            eldest.give_up(_too_many())
        self._left -= size

    def give(self, size: int) -> None:
        """Count `size` bytes less."""
        self._left += size

    def close(self) -> None:
        """The server shuts down: give up bodies that are still arriving."""
        for body in list(self._arriving):
            body.give_up(ServerUnavailable("The server is shutting down."))


class Body:
    """One request's body."""

    def __init__(self, bodies: Bodies, request: Request[Any, Any, Any]) -> None:
        self._bodies, self._request = bodies, request
        self._loop = asyncio.get_running_loop()
        self._begun = self._loop.time()
        self._held = 0
        self._task: asyncio.Task[Any] | None = None
        self._refusal: ApiError | None = None

    def age_s(self) -> float:
        """How long it has been arriving."""
        return self._loop.time() - self._begun

    async def read(self) -> bytes:
        """The whole body. Raises TooManyRequests, ClientDisconnected, ServerUnavailable."""
        return await self.receive(self._whole)  # `request.body()` would keep it until the reply is done

    async def receive(self, take: Callable[[AsyncIterator[bytes]], Awaitable[T]]) -> T:
        """What `take` makes of the body's parts; it counts what it keeps by `hold`. Raises as `read`."""
        self._task = asyncio.current_task()
        self._bodies.begin(self)
        try:
            return await take(self._request.stream())
        except InternalServerException:  # what Litestar raises if the client disconnects
            raise ClientDisconnected("The client disconnected.") from None
        except asyncio.CancelledError:
            if not self._refusal or not self._task:
                raise
            self._task.uncancel()
            raise self._refusal from None
        finally:
            self._bodies.end(self)

    async def _whole(self, arriving: AsyncIterator[bytes]) -> bytes:
        parts, size = [], 0
        async for part in arriving:
            parts.append(part)
            size += len(part)
            self.hold(size)
        return b"".join(parts)

    def hold(self, size: int) -> None:
        """Count so many bytes of it as kept in memory. Raises TooManyRequests."""
        more = size - UNCOUNTED_BYTES - self._held
        if more > 0:
            self._bodies.take(more, self)
            self._held += more

    def give_up(self, refusal: ApiError) -> None:
        """Stop reading, and refuse the request."""
        self._release()
        self._refusal = refusal
        self._bodies.end(self)
        assert self._task
        self._task.cancel()

    def _release(self) -> None:
        self._bodies.give(self._held)
        self._held = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._release()


def _too_many() -> TooManyRequests:
    return TooManyRequests(
        "Too many long requests are arriving; please try again.", headers={"Retry-After": str(RETRY_AFTER_S)}
    )
