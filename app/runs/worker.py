"""The worker of a process: claims queued runs, prolongs every lease, takes over from dead processes, drains."""

import asyncio
import time
from collections.abc import Callable, Sequence

import structlog

from app.errors import DatabaseUnavailable
from app.ids import new_id
from app.runs.background import Background, Work
from app.settings import Settings
from app.storage import queue
from app.storage.database import Database
from app.storage.queue import Claimant, Hold, Owner
from app.storage.redislog import RedisLogs

log = structlog.get_logger()

BEATS_PER_LEASE = 3
SELF_FENCE = 0.8
"""The part of a lease after which a process that can't prolong it stops by itself."""


class Worker:
    """One process's right to write, and its share of the queue."""

    def __init__(self, settings: Settings, database: Database, background: Background, logs: RedisLogs) -> None:
        self._settings, self._database, self._background, self._logs = settings, database, background, logs
        self.owner = Owner(new_id("worker"), settings.lease_s)
        self._works: dict[str, Work] = {}
        self._wake = asyncio.Event()
        self._life: str | None = None
        self._draining = False
        self._others: Callable[[], Sequence[Hold]] = list
        self._beaten_at = time.monotonic()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, others: Callable[[], Sequence[Hold]], *, claims: bool) -> None:
        """Begin to beat, for our runs and `others`, and to claim."""
        self._others = others
        self._logs.start(self._told)
        self._tasks = [asyncio.create_task(self._beat_for_ever())]
        if claims:
            self._tasks.append(asyncio.create_task(self._claim_for_ever()))

    @property
    def claimant(self) -> Claimant:
        """As whom we claim."""
        return Claimant(self.owner.worker, self.owner.lease_s, self._life)

    async def close(self) -> None:
        """Claim no more; runs may finish within the grace period, the others are handed over."""
        self._draining = True
        self._wake.set()
        running = [work.task for work in self._works.values() if work.task]
        if running:
            await asyncio.wait(running, timeout=self._settings.shutdown_grace_s)
        await self._hand_over()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._logs.close()

    async def _hand_over(self) -> None:
        works = list(self._works.values())
        if not works:
            return
        for work in works:
            work.stop()
        await asyncio.gather(*(work.task for work in works if work.task), return_exceptions=True)
        try:
            async with self._database.autocommit() as tx:
                for work in works:
                    await queue.hand_back(tx, work.claim.tenant_id, work.claim.response_id, work.claim.lease)
        except DatabaseUnavailable:
            log.warning("The database is unavailable; leases run out by themselves.", action="hand_over_failed")
        await self._logs.tell("wake")

    def _told(self, message: str) -> None:
        """A hint from some process: there is work, or one of our runs has another owner."""
        if message == "wake":
            self._wake.set()
        elif work := self._works.get(message):
            work.stop()

    # -- Claiming ---------------------------------------------------------------------------------------------------------

    async def _claim_for_ever(self) -> None:
        while not self._draining:
            self._wake.clear()
            try:
                claimed = await self._claim()
            except DatabaseUnavailable:
                claimed = 0
            if claimed == 0:
                try:
                    async with asyncio.timeout(self._settings.poll_s):
                        await self._wake.wait()
                except TimeoutError:
                    pass

    async def _claim(self) -> int:
        free = self._settings.worker_runs_max - len(self._works)
        if free <= 0 or self._draining:
            return 0
        if self._life is None:
            self._life = await self._logs.life()
        async with self._database.autocommit() as tx:
            claims = await queue.claim(tx, self.claimant, limit=free)
        for claim in claims:
            work = Work(claim)
            self._works[claim.response_id] = work
            work.task = asyncio.create_task(self._work(work), name=claim.response_id)
        return len(claims)

    async def _work(self, work: Work) -> None:
        try:
            await self._background.execute(work)
        except asyncio.CancelledError:
            if self._draining:
                raise  # it stays ours until it is handed over
        except DatabaseUnavailable:
            log.warning("The database is unavailable; a run is given up until its lease ends.", action="run_given_up")
        except Exception:
            log.exception("A run failed by our own mistake.", action="run_failed")
        if self._works.get(work.claim.response_id) is work:
            del self._works[work.claim.response_id]
        self._wake.set()

    # -- Beating ----------------------------------------------------------------------------------------------------------

    async def _beat_for_ever(self) -> None:
        while True:
            try:
                await self._beat()
                self._beaten_at = time.monotonic()
            except DatabaseUnavailable:
                log.warning("The database is unavailable; leases are not prolonged.", action="beat_failed")
                if time.monotonic() - self._beaten_at > SELF_FENCE * self.owner.lease_s:
                    for work in list(self._works.values()):
                        work.stop()
            await asyncio.sleep(self.owner.lease_s / BEATS_PER_LEASE)

    async def _beat(self) -> None:
        self._life = await self._logs.life()
        works = list(self._works.values())
        holds = [*(work.hold for work in works), *self._others()]
        if holds:
            async with self._database.autocommit() as tx:
                standing = await queue.beat(tx, holds, self.owner.lease_s, self._life)
            for work in works:
                if (work.claim.tenant_id, work.claim.response_id) not in standing:
                    work.stop()
        logs = [work.log for work in works if work.log and not work.log.fenced]
        if logs:
            await self._logs.refresh(logs)
