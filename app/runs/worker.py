"""The worker of a process: claims queued runs, prolongs every lease, takes over from dead processes, drains."""

import asyncio
import time
from collections.abc import Callable, Sequence

import structlog
from msgspec import Struct

from app.errors import DatabaseUnavailable, OutcomeUnknown
from app.ids import new_id
from app.runs.background import CANCEL, FENCED, Background, Work
from app.runs.leases import BEATS_PER_LEASE, RETRIES_PER_LEASE, Watch
from app.settings import Settings
from app.storage import queue
from app.storage.database import Database
from app.storage.queue import Claim, Hold, Owner
from app.storage.redisclient import break_off
from app.storage.redislog import RedisLogs

log = structlog.get_logger()

HAND_OVER_S = 1.5
"""How long the handing over may take; after that the leases run out by themselves."""


class GivenUp(Struct, frozen=True):
    """A run that broke off here, and that any worker may go on with."""

    claim: Claim
    failed: bool
    """By a mistake of ours, which may happen again; without Postgres that is no attempt."""


class Worker:
    """One process's right to write, and its share of the queue."""

    def __init__(
        self, settings: Settings, database: Database, heartbeats: Database, background: Background, logs: RedisLogs
    ) -> None:
        """`heartbeats` has a connection that no request can keep busy."""
        self._settings, self._database, self._background, self._logs = settings, database, background, logs
        self._heartbeats = heartbeats
        self.owner = Owner(new_id("worker"), settings.lease_s)
        self._watch = Watch(settings.lease_s)
        self._works: dict[str, Work] = {}
        self._given_up: list[GivenUp] = []
        self._claims_lost = False
        """Whether we may own runs of which the answer of a claim was lost."""
        self._wake = asyncio.Event()
        self._handing_over = False
        self._others: Callable[[], Sequence[Hold]] = list
        self._tasks: list[asyncio.Task[None]] = []
        self._claiming: asyncio.Task[None] | None = None
        self._grace_ends_at: float | None = None

    def start(self, others: Callable[[], Sequence[Hold]], *, claims: bool) -> None:
        """Begin to beat, for our runs and `others`, and to claim."""
        self._others = others
        self._logs.start(self._told, lambda: self._watch.is_sure)
        self._tasks = [asyncio.create_task(self._beat_for_ever()), asyncio.create_task(self._refresh_for_ever())]
        if claims:
            self._claiming = asyncio.create_task(self._claim_for_ever())
            self._tasks.append(self._claiming)

    @property
    def draining(self) -> bool:
        """Whether this process is about to end."""
        return self._grace_ends_at is not None

    def drain(self) -> None:
        """Claim no more; the grace period begins."""
        if self._grace_ends_at is None:
            self._grace_ends_at = time.monotonic() + self._settings.shutdown_grace_s
            self._wake.set()
            log.info("This process takes on no more runs.", action="worker_draining", runs=len(self._works))

    async def close(self) -> None:
        """Runs may finish within the grace period, the others are handed over."""
        self.drain()
        assert self._grace_ends_at is not None
        if self._claiming:  # what it is about to claim is to be finished or handed over, too
            await asyncio.wait({self._claiming}, timeout=HAND_OVER_S)
        running = [work.task for work in self._works.values() if work.task]
        if running:
            await asyncio.wait(running, timeout=max(0.0, self._grace_ends_at - time.monotonic()))
        self._handing_over = True
        await self._hand_over()
        await break_off(self._tasks)
        await self._logs.close()

    async def _hand_over(self) -> None:
        works = list(self._works.values())
        given_up = [*(GivenUp(work.claim, failed=False) for work in works), *self._given_up]
        if not (given_up or self._claims_lost):
            return
        for work in works:
            work.stop()
        await break_off(work.task for work in works if work.task)
        try:
            async with asyncio.timeout(HAND_OVER_S), self._database.autocommit() as tx:
                for one in given_up:
                    await queue.hand_back(tx, one.claim, failed=one.failed)
                if self._claims_lost:
                    await queue.disown(tx, self.owner.worker, holding=[])
        except (DatabaseUnavailable, TimeoutError):
            log.warning("The database is unavailable; leases run out by themselves.", action="hand_over_failed")
        self._logs.tell("wake")

    def _told(self, message: str) -> None:
        """A hint from some process: there is work, one of our runs shall end, or has another owner."""
        if message == "wake":
            self._wake.set()
        elif message.startswith(CANCEL):
            if work := self._works.get(message.removeprefix(CANCEL)):
                work.cancel()
        elif work := self._works.get(message):
            work.stop()

    # -- Claiming ---------------------------------------------------------------------------------------------------------

    async def _claim_for_ever(self) -> None:
        while self._grace_ends_at is None:
            self._wake.clear()
            try:
                claimed = await self._claim()
            except OutcomeUnknown:
                claimed, self._claims_lost = 0, True
            except DatabaseUnavailable:
                claimed = 0
            except Exception:
                log.exception("Claiming failed by our own mistake.", action="claim_failed")
                claimed = 0
            if claimed == 0:
                try:
                    async with asyncio.timeout(self._settings.poll_s):
                        await self._wake.wait()
                except TimeoutError:
                    pass

    async def _claim(self) -> int:
        seen = self._watch.look()
        if seen is None:
            return 0
        await self._clear_up()
        free = self._settings.worker_runs_max - len(self._works)
        if free <= 0:
            return 0
        async with self._database.begin() as tx:
            claims = await queue.claim(tx, self.owner, limit=free, horizon=seen.horizon, watched_s=seen.watched_s)
        for claim in claims:
            if former := self._works.get(claim.response_id):
                former.stop()  # we were frozen for longer than our own lease
            self._begin(Work(claim))
        return len(claims)

    async def _clear_up(self) -> None:
        """Give back what is ours in Postgres and is not being made, so that it neither waits for a lease nor counts as an attempt."""
        if self._given_up:
            async with self._database.autocommit() as tx:
                while self._given_up:
                    one = self._given_up[0]  # others are put behind it meanwhile
                    after_s = self.owner.lease_s if one.failed else self._settings.poll_s
                    await queue.hand_back(tx, one.claim, after_s=after_s, failed=one.failed)
                    self._given_up.remove(one)
        if self._claims_lost:
            async with self._database.autocommit() as tx:
                await queue.disown(tx, self.owner.worker, holding=list(self._works))
            self._claims_lost = False

    def _begin(self, work: Work) -> None:
        self._works[work.claim.response_id] = work
        work.task = asyncio.create_task(self._work(work), name=work.claim.response_id)
        # Not by the task itself: one that is cancelled before its first step runs nothing of its own.
        work.task.add_done_callback(lambda _: self._ended(work))

    def _ended(self, work: Work) -> None:
        if self._handing_over:
            return  # it stays ours until it is handed over
        if work.log:
            work.log.fenced = True
        if self._works.get(work.claim.response_id) is work:
            del self._works[work.claim.response_id]
        self._wake.set()

    async def _work(self, work: Work) -> None:
        try:
            await self._background.execute(work)
        except asyncio.CancelledError:
            if not self._handing_over:
                log.info(FENCED, action="run_fenced", lease=work.claim.lease, response_id=work.claim.response_id)
            raise
        except DatabaseUnavailable:
            log.warning("The database is unavailable; a run is given up.", action="run_given_up")
            self._given_up.append(GivenUp(work.claim, failed=False))
        except Exception:
            log.exception("A run failed by our own mistake.", action="run_failed")
            self._given_up.append(GivenUp(work.claim, failed=True))

    # -- Beating ----------------------------------------------------------------------------------------------------------

    async def _beat_for_ever(self) -> None:
        fails = False
        while True:
            try:
                await self._beat()
                fails = False
            except DatabaseUnavailable:
                # The runs go on, and are silent as soon as we are not sure; if a lease is lost, the next heartbeat tells.
                if not fails:
                    log.warning("The database is unavailable; leases are not prolonged.", action="beat_failed")
                fails = True
            except Exception:
                log.exception("A heartbeat failed by our own mistake.", action="beat_failed")
                fails = True
            await asyncio.sleep(self.owner.lease_s / (RETRIES_PER_LEASE if fails else BEATS_PER_LEASE))

    async def _beat(self) -> None:
        """Prolong what is held; also with nothing to hold, for that is how we know what other processes can do."""
        works = list(self._works.values())
        holds = [*(work.hold for work in works), *self._others()]
        begun_at = time.monotonic()  # the lease counts from no earlier than this
        async with self._heartbeats.autocommit() as tx:
            standing, clock = await queue.beat(tx, holds, self.owner.lease_s)
            was_on_time = self._watch.is_on_time
            self._watch.beaten(begun_at, time.monotonic(), clock)
            for work in works:
                if (work.claim.tenant_id, work.claim.response_id) not in standing:
                    work.stop()
            if not was_on_time:
                self._wake.set()
            await queue.shorten(tx)

    async def _refresh_for_ever(self) -> None:
        """Apart from the heartbeat, which must not wait for a Redis that does not answer."""
        while True:
            await asyncio.sleep(self.owner.lease_s / BEATS_PER_LEASE)
            await self._logs.refresh([work.log for work in self._works.values() if work.log and not work.log.fenced])
