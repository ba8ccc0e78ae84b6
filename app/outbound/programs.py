"""The programs of the catalog's tool servers, which runs share.

A program speaks over one pair of pipes, hence has one MCP session for as long as it lives. Who shares it shares whatever it
remembers from call to call, so the catalog says who may: the runs of one tenant (`shared = "tenant"`, unless it says
otherwise), all runs (`"all"`, for programs that keep nothing between calls, or keep it apart by what they are called with), or
nobody (`"run"`). A run holds its program from its first call to its end. There are at most so many programs of each server;
one that nobody holds makes room, or ends when it has been idle for long. One that has died is started anew for the next call.
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
    """What a program is spoken to with."""

    @property
    def over(self) -> bool:
        """No use for another request."""

    def leave(self) -> asyncio.Task[None]:
        """End it; gives the task that does."""

    def when_ended(self, then: Callable[[], None]) -> None:
        """Call `then` when nothing of it is left."""


S = TypeVar("S", bound=Session)


@dataclass(eq=False)
class _Place(Generic[S]):
    """A program that runs, or has not quite ended."""

    server: ToolServer
    session: S
    runs: set[object] = field(default_factory=set)
    idle: asyncio.TimerHandle | None = None
    """Ends it, unless somebody comes first."""


class Programs(Generic[S]):
    """The programs of one process; `close` it."""

    def __init__(self, settings: Settings) -> None:
        self._wait_s = settings.tool_connect_timeout_s
        self._idle_s = settings.tool_program_idle_s
        self._programs_max = settings.tool_programs_max
        self._places: dict[Hashable, _Place[S]] = {}
        self._changed = asyncio.Event()
        self._closed = False

    async def lend(self, server: ToolServer, run: object, tenant: str, start: Callable[[ToolServer], S]) -> S:
        """The session of a program for a run, until `release`; `start` makes one. Raises ToolFailure."""
        server = replace(server, headers={}, authorization="")  # what a request brings along is not for programs
        sharer = {"all": "", "tenant": tenant, "run": run}[server.shared]
        key = (server.key, sharer)
        try:
            async with asyncio.timeout(self._wait_s):
                while not self._closed:
                    place = self._places.get(key)
                    if place is None and self._has_room(server):
                        place = self._begin(key, server, start)
                    if place is not None and not place.session.over:
                        self._hold(place, run)
                        return place.session
                    await self._changed.wait()
        except TimeoutError:
            raise busy(server, self._programs_max) from None
        raise closed(server)

    def release(self, run: object) -> None:
        """A run has ended."""
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
            _keep(place)
        if tasks:
            await asyncio.wait(tasks)

    def _has_room(self, server: ToolServer) -> bool:
        """Whether another program may be started; where not, the longest idle one is ended first."""
        of_server = [place for place in self._places.values() if place.server.key == server.key]
        if len(of_server) < self._programs_max:
            return True
        idle = [place for place in of_server if place.idle and not place.session.over]
        if idle and not any(place.session.over for place in of_server):
            min(idle, key=lambda place: place.idle.when() if place.idle else 0.0).session.leave()
        return False

    def _begin(self, key: Hashable, server: ToolServer, start: Callable[[ToolServer], S]) -> _Place[S]:
        # It outlives the run that happens to be first, whose name does not belong into its log.
        session = contextvars.Context().run(start, server)
        place = self._places[key] = _Place(server, session)

        def gone() -> None:
            _keep(place)
            del self._places[key]
            self._wake()

        session.when_ended(gone)
        return place

    def _hold(self, place: _Place[S], run: object) -> None:
        place.runs.add(run)
        _keep(place)

    def _wake(self) -> None:
        """Let those who wait look again."""
        self._changed.set()
        self._changed = asyncio.Event()


def _keep(place: "_Place[S]") -> None:
    """It is not idle, or no longer there."""
    if place.idle is not None:
        place.idle.cancel()
        place.idle = None
