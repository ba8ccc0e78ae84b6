"""When a process may rely on its own leases, and judge those of others; its heartbeats, on a queue in memory."""

import asyncio
import heapq
import itertools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from app.errors import DatabaseUnavailable
from app.runs import leases
from app.runs.background import BackgroundRun
from app.runs.leases import Leases, Sight, Watch
from app.settings import Settings
from app.storage import queue
from app.storage.queue import Claim, Heartbeat
from app.storage.redislog import RedisLog

LEASE_S = 12.0
CLOCK = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def now(monkeypatch):
    """Sets the monotonic clock."""
    at = [1_000.0]
    monkeypatch.setattr(time, "monotonic", lambda: at[0])

    def set_to(seconds):
        at[0] = 1_000.0 + seconds

    return set_to


def beaten(watch, now, *times, ahead_s=0.0):
    """A heartbeat at each of these times, by a database's clock that is so much ahead."""
    for at in times:
        now(at)
        watch.beaten(time.monotonic() - 0.1, time.monotonic(), CLOCK + timedelta(seconds=at + ahead_s))


def test_without_a_heartbeat_nothing_lease_is_valid(now):
    watch = Watch(LEASE_S)
    assert not watch.lease_is_valid
    assert not watch.is_on_time
    assert watch.look() is None


def test_heartbeats_on_time_are_watched_time(now):
    watch = Watch(LEASE_S)
    beaten(watch, now, 0, 3, 6, 9, 12)
    assert watch.look().watched_s == 12
    assert watch.is_on_time
    now(17)
    assert watch.look().watched_s == 17
    now(18.1)
    assert not watch.is_on_time
    assert watch.look() is None
    assert watch.lease_is_valid
    now(12 + 0.8 * LEASE_S)
    assert not watch.lease_is_valid


def test_after_a_late_heartbeat_the_watch_begins_anew(now):
    watch = Watch(LEASE_S)
    beaten(watch, now, 0, 3, 6)
    beaten(watch, now, 12.1)
    assert watch.look().watched_s == 0
    assert watch.is_on_time


def test_a_heartbeat_that_took_longer_than_a_lease_judges_nothing(now):
    """It waited for a lock; leases of runs that began meanwhile have expired, though this process makes them."""
    watch = Watch(LEASE_S)
    beaten(watch, now, 0, 3, 6)
    now(30)
    watch.beaten(time.monotonic() - 24, time.monotonic(), CLOCK + timedelta(seconds=30))
    assert watch.look() is None
    beaten(watch, now, 33)
    assert watch.look()


@pytest.mark.parametrize("by", [3600.0, -3600.0, 6.5])
def test_after_a_jump_of_the_clock_the_watch_begins_anew(now, by):
    watch = Watch(LEASE_S)
    beaten(watch, now, 0, 3, 6)
    beaten(watch, now, 9, ahead_s=by)
    assert watch.look().watched_s == 0


def test_what_was_seen_does_not_grow_while_something_is_waited_for(now):
    """As a connection to a database that is frozen: it comes together with leases that nobody could prolong."""
    watch = Watch(LEASE_S)
    beaten(watch, now, 0, 3)
    now(5)
    seen = watch.look()
    now(30)
    assert (seen.horizon, seen.watched_s) == (CLOCK + timedelta(seconds=5), 5)


# -- The heartbeats of a process, on a clock and a database in memory ----------------------------------------------------------


class Clock:
    """Monotonic time that passes only when the test says so; whatever sleeps wakes in order."""

    def __init__(self) -> None:
        self.now = 0.0
        self._order = itertools.count()
        self._asleep: list[tuple[float, int, asyncio.Future[None]]] = []

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        awake = asyncio.get_running_loop().create_future()
        heapq.heappush(self._asleep, (self.now + seconds, next(self._order), awake))
        await awake

    async def pass_to(self, at: float) -> None:
        await yield_to_tasks()
        while self._asleep and self._asleep[0][0] <= at:
            self.now, _, awake = heapq.heappop(self._asleep)
            if not awake.done():
                awake.set_result(None)
            await yield_to_tasks()
        self.now = at


_SLEEP = asyncio.sleep


async def yield_to_tasks() -> None:
    """Let tasks run until all of them sleep: nothing in memory takes more than a few steps of the loop."""
    for _ in range(5):
        await _SLEEP(0)


class Postgres:
    """The newest epoch of each run, and when which heartbeats came."""

    def __init__(self, clock: Clock, **epochs: int) -> None:
        self.clock, self.epochs = clock, epochs
        self.beats: list[tuple[float, list[tuple[str, int]]]] = []
        self.binds: dict[str, Any] = {}
        self.shortened = 0
        self.fails: Exception | None = None
        self.answers = asyncio.Event()
        self.answers.set()

    @asynccontextmanager
    async def autocommit(self) -> AsyncIterator["Postgres"]:
        if isinstance(self.fails, DatabaseUnavailable):
            raise self.fails
        yield self

    async def all(self, query: Any, **binds: Any) -> list[dict[str, Any]]:
        if query is queue._SHORTEN:
            self.shortened += 1
            return []
        assert query is queue._BEAT
        if self.fails:
            raise self.fails
        sent = list(zip(binds["ids"], binds["epochs"], strict=True))
        self.beats.append((self.clock.now, sent))
        self.binds = binds
        await self.answers.wait()
        clock = CLOCK + timedelta(seconds=self.clock.now)
        standing = [
            (tenant, id)
            for tenant, (id, epoch) in zip(binds["tenants"], sent, strict=True)
            if self.epochs.get(id) == epoch
        ]
        return [{"clock": clock, "tenant_id": tenant, "response_id": id} for tenant, id in standing or [(None, None)]]


class Redis:
    """The streams that were refreshed, and when."""

    live_ttl_s = 60.0

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.refreshed: list[tuple[float, list[str]]] = []
        self.answers = asyncio.Event()
        self.answers.set()

    def key(self, response_id: str) -> str:
        return response_id

    async def refresh(self, logs: Sequence[RedisLog]) -> None:
        self.refreshed.append((self.clock.now, [one.key for one in logs]))
        await self.answers.wait()


class Process:
    """The leases of a process with background runs `a`, `b`, …, each of its own epoch."""

    def __init__(self, clock: Clock, *ids: str) -> None:
        self.postgres = Postgres(clock, **{id: epoch for epoch, id in enumerate(ids, 1)})
        self.redis = Redis(clock)
        self.recoveries: list[float] = []
        self.foreground: list[Heartbeat] = []
        settings = msgspec.structs.replace(Settings(), lease_s=LEASE_S)
        needs: Any = SimpleNamespace(pipeline=SimpleNamespace(settings=settings))
        self.runs = {id: BackgroundRun(needs, claim(id, epoch)) for id, epoch in self.postgres.epochs.items()}
        self.leases = Leases(settings, self.postgres, self.redis)  # type: ignore[arg-type]
        self.leases.start(
            lambda: list(self.runs.values()), lambda: self.foreground, lambda: self.recoveries.append(clock.now)
        )

    @property
    def beats_at(self) -> list[float]:
        return [at for at, _ in self.postgres.beats]

    @property
    def stopped(self) -> list[str]:
        return [id for id, run in self.runs.items() if run.is_stopped]


def claim(id: str, epoch: int) -> Claim:
    numbers = {"streamed": True, "number_ceiling": 7, "stream_token": None, "usage": None}
    nothing = {"key_id": None, "reserved_tokens": None}
    return Claim("t", id, epoch, 0, "running", 1, 0, 0, None, **numbers, **nothing)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """The time of `leases` alone: the loop has its own."""
    clock = Clock()
    monkeypatch.setattr(leases, "time", clock)
    monkeypatch.setattr(asyncio, "sleep", clock.sleep)
    return clock


@pytest.fixture
async def start(clock) -> AsyncIterator[Callable[..., Process]]:
    processes: list[Process] = []

    def begin(*ids: str) -> Process:
        processes.append(Process(clock, *ids))
        return processes[-1]

    yield begin
    for process in processes:
        await process.leases.close()


async def test_the_leases_of_all_runs_are_prolonged_by_one_statement_four_times_in_a_lease(clock, start):
    process = start("a", "b")
    process.foreground = [Heartbeat("u", "f", 1, 0)]
    await clock.pass_to(LEASE_S - 0.1)
    assert process.postgres.beats == [(at, [("a", 1), ("b", 2), ("f", 1)]) for at in (0.0, 3.0, 6.0, 9.0)]
    binds = process.postgres.binds
    assert (binds["tenants"], binds["lease_s"]) == (["t", "t", "u"], LEASE_S)
    assert binds["ceilings"] == [7 + queue.NUMBERS_AHEAD, 7 + queue.NUMBERS_AHEAD, 0]
    assert process.postgres.shortened == 4
    assert process.stopped == []  # nor does it matter that the foreground run's row is not inserted yet


async def test_a_process_without_runs_beats_too_so_that_it_can_judge_others(clock, start):
    process = start()
    await clock.pass_to(6.0)
    assert process.postgres.beats == [(at, []) for at in (0.0, 3.0, 6.0)]
    assert process.leases.watch.look() == Sight(CLOCK + timedelta(seconds=6), 6.0)


async def test_a_run_whose_lease_is_lost_is_stopped_and_its_log_fenced(clock, start):
    process = start("a", "b")
    for run in process.runs.values():
        run.log = RedisLog(process.redis, run.claim.response_id, run.claim.epoch, [])  # type: ignore[arg-type]
        run.task = asyncio.create_task(asyncio.Event().wait())  # type: ignore[arg-type]
    await clock.pass_to(1.0)
    process.postgres.epochs["a"] += 1  # another process has claimed it
    await clock.pass_to(2.9)
    assert process.stopped == []
    await clock.pass_to(3.0)
    assert process.stopped == ["a"]
    assert process.runs["a"].task.cancelled()
    assert process.runs["a"].log.fenced
    assert not process.runs["b"].task.done()
    assert not process.runs["b"].log.fenced
    process.runs["b"].task.cancel()


async def test_a_process_that_can_not_prolong_its_leases_fences_itself_before_they_expire(clock, start):
    process = start("a")
    await clock.pass_to(3.0)
    process.postgres.fails = DatabaseUnavailable("gone")
    with capture_logs() as logs:
        await clock.pass_to(3.0 + 0.8 * LEASE_S - 0.1)
        assert process.leases.watch.lease_is_valid
        await clock.pass_to(3.0 + 0.8 * LEASE_S)
        assert not process.leases.watch.lease_is_valid
    assert process.stopped == []  # it may be valid still: the next heartbeat shows it
    assert process.leases.watch.look() is None
    assert [(one["action"], one["log_level"]) for one in logs] == [("beat_failed", "warning")]


async def test_a_lease_counts_from_the_beginning_of_its_heartbeat(clock, start):
    process = start("a")
    await clock.pass_to(2.9)
    process.postgres.answers.clear()
    await clock.pass_to(8.0)  # Postgres may have prolonged it at any moment since 3.0
    process.postgres.fails = DatabaseUnavailable("gone")
    process.postgres.answers.set()
    await clock.pass_to(3.0 + 0.8 * LEASE_S - 0.1)
    assert process.leases.watch.lease_is_valid
    await clock.pass_to(3.0 + 0.8 * LEASE_S)
    assert not process.leases.watch.lease_is_valid


async def test_a_process_continues_when_its_leases_turn_out_to_be_valid(clock, start):
    process = start("a", "b")
    await clock.pass_to(3.0)
    process.postgres.fails = DatabaseUnavailable("gone")
    await clock.pass_to(40.0)
    assert not process.leases.watch.lease_is_valid
    process.postgres.fails = None
    process.postgres.epochs["b"] += 1  # a lease that another process could judge
    await clock.pass_to(41.0)
    assert process.leases.watch.lease_is_valid
    assert process.stopped == ["b"]
    assert process.recoveries == [0.0, 41.0]  # heartbeats on time are none


async def test_a_failed_heartbeat_is_repeated_sooner(clock, start):
    process = start("a")
    process.postgres.fails = DatabaseUnavailable("gone")
    await clock.pass_to(1.5)
    process.postgres.fails = None
    await clock.pass_to(10.0)
    assert process.beats_at == [2.0, 5.0, 8.0]


async def test_every_outage_is_logged_once(clock, start):
    process = start()
    with capture_logs() as logs:
        for outage in (5.0, 15.0):
            process.postgres.fails = DatabaseUnavailable("gone")
            await clock.pass_to(outage)
            process.postgres.fails = None
            await clock.pass_to(outage + 5.0)
    assert [one["action"] for one in logs] == ["beat_failed", "beat_failed"]


async def test_heartbeats_continue_after_a_mistake_of_ours(clock, start):
    process = start("a")
    process.postgres.fails = ValueError("ours")
    with capture_logs() as logs:
        await clock.pass_to(1.0)
        process.postgres.fails = None
        await clock.pass_to(2.0)
    assert {(one["action"], one["log_level"]) for one in logs} == {("beat_failed", "error")}
    assert process.beats_at == [2.0]
    assert process.leases.watch.lease_is_valid


async def test_streams_are_refreshed_apart_from_heartbeats(clock, start):
    """Those of runs that stream and are still ours. A Redis that does not answer holds no heartbeat up, nor the other way round."""
    process = start("a", "b", "c")
    for id in ("a", "b"):
        run = process.runs[id]
        run.log = RedisLog(process.redis, id, run.claim.epoch, [])  # type: ignore[arg-type]
    process.runs["b"].log.fenced = True
    process.postgres.answers.clear()
    await clock.pass_to(3.0)
    assert (process.beats_at, process.redis.refreshed) == ([0.0], [(3.0, ["a"])])
    process.postgres.answers.set()
    process.redis.answers.clear()
    await clock.pass_to(9.0)
    assert (process.beats_at, process.redis.refreshed) == ([0.0, 6.0, 9.0], [(3.0, ["a"]), (6.0, ["a"])])


async def test_after_closing_nothing_is_prolonged(clock, start):
    process = start("a")
    await clock.pass_to(3.0)
    await process.leases.close()
    await clock.pass_to(30.0)
    assert process.beats_at == [0.0, 3.0]
    assert process.redis.refreshed == [(3.0, [])]
    assert not process.leases.watch.lease_is_valid
