"""The programs of the catalog's tool servers, which runs share.

A program has one pair of pipes, hence one MCP session while it runs. Runs that share it also share its state between calls, so the
catalog defines who may: the runs of a tenant (`shared = "tenant"`, the default), all runs (`"all"`, for programs that are stateless,
or separate their state by arguments), or a single run (`"run"`). A run uses its program from its first call until the run ends. The
number of programs for each server is limited; an unused one is ended after a while, or when another needs its place. One that died is
replaced at the next call.
"""

import asyncio
import contextvars
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from msgspec.structs import replace

from app.outbound.toolserver import ToolServer, busy, closed
from app.settings import Settings


class Session(Protocol):
    """The MCP session with a program."""

    @property
    def over(self) -> bool:
        """Whether it takes no more requests."""

    def leave(self) -> asyncio.Task[None]:
        """End it; returns the task that does."""

    def when_ended(self, then: Callable[[], None]) -> None:
        """Call `then` after its end."""


S = TypeVar("S", bound=Session)


@dataclass(eq=False)
class _Place(Generic[S]):
    """A program, until it has exited."""

    server: ToolServer
    session: S
    runs: set[object] = field(default_factory=set)
    idle: asyncio.TimerHandle | None = None
    """Ends the program, unless a run uses it first."""


class Programs(Generic[S]):
    """The programs of this process; must be closed."""

    def __init__(self, settings: Settings) -> None:
        self._wait_s = settings.tool_connect_timeout_s
        self._idle_s = settings.tool_program_idle_s
        self._programs_max = settings.tool_programs_max
        self._places: dict[Hashable, _Place[S]] = {}
        self._changed = asyncio.Event()
        self._closed = False

    async def lend(self, server: ToolServer, run: object, tenant: str, start: Callable[[ToolServer], S]) -> S:
        """The session of a program for a run, until `release`; `start` starts a program. Raises ToolFailure."""
        server = replace(server, headers={}, authorization="")  # a client's headers are not for programs
        sharer = {"all": "", "tenant": tenant, "run": run}[server.shared]
        key = (server.key, sharer)
        try:
            async with asyncio.timeout(self._wait_s):
                while not self._closed:
                    place = self._places.get(key)
                    if place is None and self._has_room(server):
                        place = self._begin(key, server, start)
                    if place is not None and not place.session.over:
                        self._use(place, run)
                        return place.session
                    await self._changed.wait()
        except TimeoutError:
            raise busy(server, self._programs_max) from None
        raise closed(server)

    def release(self, run: object) -> None:
        """Release all programs of a run."""
        for place in self._places.values():
            if run in place.runs:
                place.runs.discard(run)
                if place.server.shared == "run":
                    place.session.leave()
                elif not place.runs:
                    place.idle = asyncio.get_running_loop().call_later(self._idle_s, place.session.leave)
        self._wake()

    async def close(self) -> None:
        """End every program."""
        self._closed = True
        self._wake()
        tasks = [place.session.leave() for place in self._places.values()]
        for place in self._places.values():
            _cancel_idle(place)
        if tasks:
            await asyncio.wait(tasks)

    def _has_room(self, server: ToolServer) -> bool:
        """Whether another program may be started; if not, end the one that is idle longest."""
        of_server = [place for place in self._places.values() if place.server.key == server.key]
        if len(of_server) < self._programs_max:
            return True
        idle = [place for place in of_server if place.idle and not place.session.over]
        if idle and not any(place.session.over for place in of_server):
            min(idle, key=lambda place: place.idle.when() if place.idle else 0.0).session.leave()
        return False

    def _begin(self, key: Hashable, server: ToolServer, start: Callable[[ToolServer], S]) -> _Place[S]:
        # An empty context: it outlives its first run, whose id must not be in its log.
        session = contextvars.Context().run(start, server)
        place = self._places[key] = _Place(server, session)

        def remove() -> None:
            _cancel_idle(place)
            del self._places[key]
            self._wake()

        session.when_ended(remove)
        return place

    def _use(self, place: _Place[S], run: object) -> None:
        place.runs.add(run)
        _cancel_idle(place)

    def _wake(self) -> None:
        """Make all waiting calls of `lend` check again."""
        self._changed.set()
        self._changed = asyncio.Event()


def _cancel_idle(place: "_Place[S]") -> None:
    """Stop its idle timer."""
    if place.idle is not None:
        place.idle.cancel()
        place.idle = None
