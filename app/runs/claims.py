"""Claims: how a process gets its share of the queue, takes over from dead processes, and hands back what it can't finish."""

import asyncio
import time

import structlog
from msgspec import Struct

from app.errors import DatabaseUnavailable, OutcomeUnknown
from app.runs.background import FENCED, BackgroundRun, BackgroundRuns
from app.runs.leases import Leases
from app.settings import Settings
from app.storage import queue
from app.storage.database import Database
from app.storage.notifications import CancelRequested, Notification, OwnerChanged, RunQueued
from app.storage.queue import Claim
from app.storage.redisclient import break_off
from app.storage.redislog import RedisLogs

log = structlog.get_logger()

HAND_BACK_S = 1.5
"""How long handing back may take; after that the leases expire by themselves."""


class GivenUp(Struct, frozen=True):
    """A run that broke off here, and that any worker may continue."""

    claim: Claim
    failed: bool
    """By a mistake of ours, which may happen again; without Postgres that is no attempt."""


class Claims:
    """The background runs of this process."""

    def __init__(
        self, settings: Settings, database: Database, leases: Leases, background: BackgroundRuns, logs: RedisLogs
    ) -> None:
        self._settings, self._database, self._logs = settings, database, logs
        self._leases, self._background = leases, background
        self._runs: dict[str, BackgroundRun] = {}
        self._given_up: list[GivenUp] = []
        self._claims_lost = False
        """Whether this process may own runs by a claim whose answer was lost."""
        self._wake = asyncio.Event()
        self._is_handing_back = False
        self._claiming: asyncio.Task[None] | None = None
        self._grace_ends_at: float | None = None

    def start(self) -> None:
        """Start to claim."""
        self._claiming = asyncio.create_task(self._claim_forever())

    def runs(self) -> list[BackgroundRun]:
        """Those that are being made here."""
        return list(self._runs.values())

    @property
    def is_draining(self) -> bool:
        """Whether this process is about to end."""
        return self._grace_ends_at is not None

    def drain(self) -> None:
        """Claim no more; the grace period begins."""
        if self._grace_ends_at is None:
            self._grace_ends_at = time.monotonic() + self._settings.shutdown_grace_s
            self.wake()
            log.info("This process takes on no more runs.", action="worker_draining", runs=len(self._runs))

    async def close(self) -> None:
        """Runs may finish within the grace period; the others are handed back."""
        self.drain()
        assert self._grace_ends_at is not None
        if self._claiming:  # what it claims at this moment is to be finished or handed back, too
            await asyncio.wait({self._claiming}, timeout=HAND_BACK_S)
        running = [run.task for run in self._runs.values() if run.task]
        if running:
            await asyncio.wait(running, timeout=max(0.0, self._grace_ends_at - time.monotonic()))
        self._is_handing_back = True
        await self._hand_back()
        if self._claiming:
            await break_off([self._claiming])

    async def _hand_back(self) -> None:
        runs = self.runs()
        given_up = [*(GivenUp(run.claim, failed=False) for run in runs), *self._given_up]
        if not (given_up or self._claims_lost):
            return
        for run in runs:
            run.stop()
        await break_off(run.task for run in runs if run.task)
        try:
            async with asyncio.timeout(HAND_BACK_S), self._database.autocommit() as tx:
                for one in given_up:
                    await queue.hand_back(tx, one.claim, failed=one.failed)
                if self._claims_lost:
                    await queue.disown(tx, self._leases.owner.worker, except_for=[])
        except (DatabaseUnavailable, TimeoutError):
            log.warning("The database is unavailable; leases expire by themselves.", action="hand_over_failed")
        self._logs.notify(RunQueued())

    def wake(self) -> None:
        """Look at the queue now."""
        self._wake.set()

    def notified(self, notification: Notification) -> None:
        """Act on a notification of some process."""
        match notification:
            case RunQueued():
                self.wake()
            case CancelRequested(response_id):
                if run := self._runs.get(response_id):
                    run.cancel()
            case OwnerChanged(response_id):
                if run := self._runs.get(response_id):
                    run.stop()

    # -- Claiming ---------------------------------------------------------------------------------------------------------

    async def _claim_forever(self) -> None:
        while not self.is_draining:
            self._wake.clear()
            try:
                claimed = await self._claim()
            except OutcomeUnknown:
                claimed, self._claims_lost = 0, True
            except DatabaseUnavailable:
                claimed = 0
            except Exception:
                log.exception("Claiming failed because of a bug.", action="claim_failed")
                claimed = 0
            if claimed == 0:
                try:
                    async with asyncio.timeout(self._settings.poll_s):
                        await self._wake.wait()
                except TimeoutError:
                    pass

    async def _claim(self) -> int:
        sight = self._leases.watch.look()
        if sight is None:
            return 0
        await self._clear_up()
        free = self._settings.worker_runs_max - len(self._runs)
        if free <= 0:
            return 0
        async with self._database.begin() as tx:
            claims = await queue.claim(
                tx, self._leases.owner, limit=free, horizon=sight.horizon, watched_s=sight.watched_s
            )
        for claim in claims:
            if former := self._runs.get(claim.response_id):
                former.stop()  # this process was frozen for longer than its own lease
            self._start(self._background.claimed(claim))
        return len(claims)

    async def _clear_up(self) -> None:
        """Hand back what this process owns in Postgres and does not make, so that it neither waits for a lease nor counts as an
        attempt."""
        if self._given_up:
            async with self._database.autocommit() as tx:
                while self._given_up:
                    one = self._given_up[0]  # others are appended meanwhile
                    after_s = self._settings.lease_s if one.failed else self._settings.poll_s
                    await queue.hand_back(tx, one.claim, after_s=after_s, failed=one.failed)
                    self._given_up.remove(one)
        if self._claims_lost:
            async with self._database.autocommit() as tx:
                await queue.disown(tx, self._leases.owner.worker, except_for=list(self._runs))
            self._claims_lost = False

    def _start(self, run: BackgroundRun) -> None:
        self._runs[run.claim.response_id] = run
        run.task = asyncio.create_task(self._make(run), name=run.claim.response_id)
        # Not by the task itself: one that is cancelled before its first step runs nothing of its own.
        run.task.add_done_callback(lambda _: self._ended(run))

    def _ended(self, run: BackgroundRun) -> None:
        if self._is_handing_back:
            return  # it stays ours until it is handed back
        if run.log:
            run.log.fenced = True
        if self._runs.get(run.claim.response_id) is run:
            del self._runs[run.claim.response_id]
        self.wake()

    async def _make(self, run: BackgroundRun) -> None:
        try:
            await run.make()
        except asyncio.CancelledError:
            if not self._is_handing_back:
                log.info(FENCED, action="run_fenced", epoch=run.claim.epoch, response_id=run.claim.response_id)
            raise
        except DatabaseUnavailable:
            log.warning("The database is unavailable; a run is given up.", action="run_given_up")
            self._given_up.append(GivenUp(run.claim, failed=False))
        except Exception:
            log.exception("A run failed because of a bug.", action="run_failed")
            self._given_up.append(GivenUp(run.claim, failed=True))
