"""Claims on a queue in memory: what a worker takes, stops and hands back."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from app.errors import DatabaseUnavailable, OutcomeUnknown
from app.runs.claims import Claims
from app.runs.leases import Sight
from app.settings import Settings
from app.storage import queue
from app.storage.notifications import CancelRequested, Notification, OwnerChanged, RunQueued
from app.storage.queue import Claim, Owner

HORIZON = datetime(2026, 1, 1, tzinfo=UTC)


def row(response_id: str) -> dict[str, Any]:
    return {
        "tenant_id": "t",
        "response_id": response_id,
        "epoch": 1,
        "handed_over": 0,
        "state": "running",
        "request_bytes": 1,
        "context_bytes": 0,
        "response_bytes": 0,
        "secrets": None,
        "streamed": False,
        "number_ceiling": 0,
        "stream_token": None,
        "usage": None,
        "key_id": None,
        "reserved_tokens": None,
    }


class Postgres:
    """A queue of response ids; what is handed back, as (id, seconds, failed), and what is disowned but for these."""

    def __init__(self, *waiting: str) -> None:
        self.waiting = list(waiting)
        self.handed_back: list[tuple[str, float, bool]] = []
        self.disowned: list[list[str]] = []
        self.handing_back: Callable[[], None] = lambda: None
        self.fails: Exception | None = None
        self.looked = asyncio.Event()

    @asynccontextmanager
    async def begin(self) -> AsyncIterator["Postgres"]:
        if self.fails:
            error, self.fails = self.fails, None
            raise error
        yield self

    autocommit = begin

    async def all(self, query: Any, **binds: Any) -> list[dict[str, Any]]:
        if query is queue._DISOWN:
            self.disowned.append(binds["except_for"])
            return []
        self.looked.set()
        taken, self.waiting = self.waiting[: binds["limit"]], self.waiting[binds["limit"] :]
        return [row(id) for id in taken]

    async def one(self, query: Any, **binds: Any) -> None:
        assert query is queue._HAND_BACK
        self.handing_back()
        self.handed_back.append((binds["id"], binds["after_s"], binds["failed"]))


class Run:
    """A run that ends when the test says so."""

    def __init__(self, claim: Claim, make: Callable[[str], Awaitable[None]]) -> None:
        self.claim, self._make = claim, make
        self.task: asyncio.Task[None] | None = None
        self.log = None
        self.events: list[str] = []

    async def make(self) -> None:
        await self._make(self.claim.response_id)

    def cancel(self) -> None:
        self.events.append("cancel")

    def stop(self) -> None:
        self.events.append("stop")
        assert self.task
        self.task.cancel()


class Worker:
    """Claims, and everything around them in memory."""

    owner = Owner("worker_1", 30.0)

    def __init__(self, postgres: Postgres, make: Callable[[str], Awaitable[None]], **settings: Any) -> None:
        self.postgres, self.make = postgres, make
        self.made: dict[str, Run] = {}
        self.notified: list[Notification] = []
        self.sight: Sight | None = Sight(HORIZON, 60.0)
        self.watch = self
        self.judged = 0
        self.settings = msgspec.structs.replace(
            Settings(), **{"poll_s": 0.001, "worker_runs_max": 2, "shutdown_grace_s": 0.0, "lease_s": 30.0, **settings}
        )
        self.claims = Claims(self.settings, postgres, self, self, self)  # type: ignore[arg-type]

    def look(self) -> Sight | None:
        self.judged += 1
        return self.sight

    def claimed(self, claim: Claim) -> Run:
        run = self.made[claim.response_id] = Run(claim, self.make)
        return run

    def notify(self, notification: Notification) -> None:
        self.notified.append(notification)


async def forever(_: str) -> None:
    await asyncio.Event().wait()


async def looks(postgres: Postgres, times: int = 2) -> None:
    """Wait until the queue has been looked at so often."""
    for _ in range(times):
        postgres.looked.clear()
        await postgres.looked.wait()


async def until(condition: Callable[[], object]) -> None:
    """Wait until other tasks of this process bring a condition about."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.fixture
async def start() -> AsyncIterator[Callable[..., Worker]]:
    workers: list[Worker] = []

    def begin(
        postgres: Postgres, make: Callable[[str], Awaitable[None]] = forever, *, sight: Any = ..., **settings: Any
    ) -> Worker:
        worker = Worker(postgres, make, **settings)
        if sight is not ...:
            worker.sight = sight
        worker.claims.start()
        workers.append(worker)
        return worker

    yield begin
    for worker in workers:
        await worker.claims.close()


async def test_a_worker_takes_no_more_runs_than_it_may_make(start):
    ended = asyncio.Event()

    async def make(id: str) -> None:
        await (ended.wait() if id == "a" else forever(id))

    worker = start(Postgres("a", "b", "c"), make)
    await until(lambda: len(worker.made) == 2)
    assert (list(worker.made), worker.postgres.waiting) == (["a", "b"], ["c"])
    ended.set()
    await until(lambda: "c" in worker.made)
    assert {run.claim.response_id for run in worker.claims.runs()} == {"b", "c"}


async def test_without_heartbeats_on_time_nothing_is_claimed(start):
    worker = start(Postgres("a"), sight=None)
    with capture_logs() as logs:
        await until(lambda: worker.judged > 1)
    assert (worker.made, logs) == ({}, [])
    worker.sight = Sight(HORIZON, 60.0)
    await until(lambda: worker.made)


@pytest.mark.parametrize(
    ("error", "handed_back"),
    [(DatabaseUnavailable("gone"), ("a", 0.001, False)), (ValueError("ours"), ("a", 30.0, True))],
)
async def test_a_run_that_broke_off_is_handed_back(start, error: Exception, handed_back: tuple[str, float, bool]):
    async def make(id: str) -> None:
        if id == "a":
            raise error
        await forever(id)

    worker = start(Postgres("a", "b"), make)
    await until(lambda: worker.postgres.handed_back)
    assert worker.postgres.handed_back == [handed_back]
    assert [run.claim.response_id for run in worker.claims.runs()] == ["b"]


async def test_a_run_that_has_ended_is_not_handed_back(start):
    async def make(_: str) -> None: ...

    worker = start(Postgres("a"), make)
    await until(lambda: worker.made)
    await looks(worker.postgres)
    await worker.claims.close()
    assert worker.postgres.handed_back == []


async def test_a_claim_whose_answer_was_lost_is_disowned_but_for_what_runs(start):
    postgres = Postgres("a")
    worker = start(postgres)
    await until(lambda: worker.made)
    postgres.fails = OutcomeUnknown("lost")
    await until(lambda: postgres.disowned)
    await looks(postgres)
    assert postgres.disowned == [["a"]]


@pytest.mark.parametrize("error", [DatabaseUnavailable("gone"), ValueError("ours")])
async def test_claiming_continues_after_an_error(start, error: Exception):
    postgres = Postgres()
    postgres.fails = error
    worker = start(postgres)
    await looks(postgres)
    postgres.waiting.append("a")
    await until(lambda: worker.made)
    assert postgres.disowned == []


async def test_notifications_reach_the_run_that_they_name(start):
    worker = start(Postgres("a", "b"))
    await until(lambda: len(worker.made) == 2)
    for notification in (CancelRequested("a"), OwnerChanged("b"), CancelRequested("x"), OwnerChanged("x")):
        worker.claims.notified(notification)
    assert {id: run.events for id, run in worker.made.items()} == {"a": ["cancel"], "b": ["stop"]}
    await until(lambda: len(worker.claims.runs()) == 1)
    assert worker.postgres.handed_back == []  # another worker owns it


async def test_a_queued_run_is_claimed_at_once(start):
    postgres = Postgres()
    worker = start(postgres, poll_s=60.0)
    await postgres.looked.wait()
    postgres.waiting.append("a")
    worker.claims.notified(RunQueued())
    await until(lambda: worker.made)


async def test_a_run_that_is_claimed_again_stops_its_former_self(start):
    postgres = Postgres("a")
    worker = start(postgres)
    await until(lambda: worker.made)
    former = worker.made["a"]
    postgres.waiting.append("a")
    await until(lambda: worker.made["a"] is not former)
    assert former.events == ["stop"]
    await until(lambda: former.task and former.task.done())
    assert worker.claims.runs() == [worker.made["a"]]


async def test_a_worker_that_ends_hands_back_what_it_can_not_finish(start):
    worker = start(Postgres("a", "b", "c"))
    await until(lambda: len(worker.made) == 2)
    owned: list[int] = []  # their leases are prolonged until then
    worker.postgres.handing_back = lambda: owned.append(len(worker.claims.runs()))
    await worker.claims.close()
    assert owned == [2, 2]
    assert worker.claims.is_draining
    assert sorted(worker.postgres.handed_back) == [("a", 0.0, False), ("b", 0.0, False)]
    assert all(run.events == ["stop"] for run in worker.made.values())
    assert worker.notified == [RunQueued()]
    assert worker.postgres.waiting == ["c"]


async def test_a_worker_that_ends_waits_for_runs_within_the_grace_period(start):
    ended = asyncio.Event()
    worker = start(Postgres("a"), lambda _: ended.wait(), shutdown_grace_s=30.0)
    await until(lambda: worker.made)
    closing = asyncio.create_task(worker.claims.close())
    await until(lambda: worker.claims.is_draining)
    assert not closing.done()
    ended.set()
    await closing
    assert worker.postgres.handed_back == []
