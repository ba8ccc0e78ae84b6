"""The leases of a process: heartbeats prolong them, and a process that can't prolong them fences itself.

An expired lease in Postgres proves nothing while no process could prolong one: during an outage, behind a lock, while all
processes stood still, after the database's clock has jumped. A process that has kept its own heartbeats on time for a whole
lease knows that the owner could have done the same.
"""

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

import structlog
from msgspec import Struct

from app.errors import DatabaseUnavailable
from app.ids import new_id
from app.runs.background import BackgroundRun
from app.settings import Settings
from app.storage import queue
from app.storage.database import Database
from app.storage.queue import Heartbeat, Owner
from app.storage.redisclient import break_off
from app.storage.redislog import RedisLogs

log = structlog.get_logger()

BEATS_PER_LEASE = 4

RETRIES_PER_LEASE = 12
"""A heartbeat that failed is repeated this often. With LATE this gives an owner time before another worker claims its runs."""

LATE = 0.5
"""The part of a lease after which the next heartbeat is late. A clock that differs by more has jumped."""

SELF_FENCE = 0.8
"""The part of a lease after which a process that can't prolong it stops by itself."""


class Sight(Struct, frozen=True):
    """By what a process may judge the leases of others at some moment."""

    horizon: datetime
    """The database's time by our clock, which no jump and no delay of a statement moves forward."""
    watched_s: float
    """For how long heartbeats have been on time and the database's clock steady."""


class Watch:
    """The heartbeats of this process; times are monotonic seconds, but for the database's own clock."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._begun_at = self._ended_at = self._steady_since = -math.inf
        self._clock: datetime | None = None

    def beaten(self, begun_at: float, ended_at: float, clock: datetime) -> None:
        """A heartbeat has succeeded; `clock` is the database's time in between."""
        passed_s = ended_at - self._ended_at
        if self._clock is None or max(passed_s, abs((clock - self._clock).total_seconds() - passed_s)) > self._late_s:
            self._steady_since = ended_at
        self._begun_at, self._ended_at, self._clock = begun_at, ended_at, clock

    @property
    def _late_s(self) -> float:
        return LATE * self._lease_s

    @property
    def lease_is_valid(self) -> bool:
        """Whether the leases of this process are valid for certain: its last heartbeat is young. If not, no event may be sent."""
        return time.monotonic() - self._begun_at < SELF_FENCE * self._lease_s

    @property
    def is_on_time(self) -> bool:
        """Whether the last heartbeat is young enough to judge other owners by it."""
        return time.monotonic() - self._ended_at < self._late_s

    def look(self) -> Sight | None:
        """What can be judged at this moment; None if the next heartbeat comes first. Whatever is waited for afterwards, a
        connection or an answer, proves nothing more. A heartbeat that waited long for a lock says nothing of runs of this
        process that began meanwhile: their leases may have expired."""
        now = time.monotonic()
        since_s = now - self._ended_at
        if self._clock is None or since_s >= self._late_s or not self.lease_is_valid:
            return None
        return Sight(self._clock + timedelta(seconds=since_s), now - self._steady_since)


class Leases:
    """Prolongs the leases of this process, and stops the runs whose lease is lost."""

    def __init__(self, settings: Settings, database: Database, logs: RedisLogs) -> None:
        """`database` has a connection that no request can keep busy."""
        self._database, self._logs = database, logs
        self.owner = Owner(new_id("worker"), settings.lease_s)
        self.watch = Watch(settings.lease_s)
        self._tasks: list[asyncio.Task[None]] = []

    def start(
        self,
        background: Callable[[], Sequence[BackgroundRun]],
        foreground: Callable[[], Sequence[Heartbeat]],
        recovered: Callable[[], None],
    ) -> None:
        """Start to prolong those of `background` and `foreground` runs; `recovered` is called after an outage."""
        self._background, self._foreground, self._recovered = background, foreground, recovered
        self._tasks = [asyncio.create_task(self._beat_forever()), asyncio.create_task(self._refresh_forever())]

    async def close(self) -> None:
        """Stop."""
        await break_off(self._tasks)

    async def _beat_forever(self) -> None:
        fails = False
        while True:
            try:
                await self._beat()
                fails = False
            except DatabaseUnavailable:
                # The runs continue, silently as soon as their leases may be invalid; the next heartbeat shows which are lost.
                if not fails:
                    log.warning("The database is unavailable; leases are not prolonged.", action="beat_failed")
                fails = True
            except Exception:
                log.exception("A heartbeat failed because of a bug.", action="beat_failed")
                fails = True
            await asyncio.sleep(self.owner.lease_s / (RETRIES_PER_LEASE if fails else BEATS_PER_LEASE))

    async def _beat(self) -> None:
        """One heartbeat, also without runs: it shows what other processes could have done."""
        background = self._background()
        heartbeats = [*(run.heartbeat for run in background), *self._foreground()]
        begun_at = time.monotonic()  # leases count from no earlier than this
        async with self._database.autocommit() as tx:
            standing, clock = await queue.beat(tx, heartbeats, self.owner.lease_s)
            was_on_time = self.watch.is_on_time
            self.watch.beaten(begun_at, time.monotonic(), clock)
            for run in background:
                if (run.claim.tenant_id, run.claim.response_id) not in standing:
                    run.stop()
            if not was_on_time:
                self._recovered()
            await queue.shorten(tx)

    async def _refresh_forever(self) -> None:
        """Apart from the heartbeat, which must not wait for a Redis that does not answer."""
        while True:
            await asyncio.sleep(self.owner.lease_s / BEATS_PER_LEASE)
            await self._logs.refresh([run.log for run in self._background() if run.log and not run.log.fenced])
