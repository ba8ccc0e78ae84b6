"""What every event log promises, in memory and in Redis: one suite that both pass."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

import msgspec
import pytest

from app.domain.lifecycle import Outcome, close_response, open_response
from app.errors import Fenced
from app.settings import Settings
from app.storage.backlog import Backlogs
from app.storage.eventlog import EventLog, MemoryLog
from app.storage.redishub import FETCHED_BYTES_MAX
from app.storage.redislog import ENTRY_BYTES_MAX, RedisLog, RedisLogs
from app.wire.events import Completed, Entry, TextDelta, encode_event
from tests.unit.build import request

BOUND = 64 * 1024
BATCH = 16 * 1024
"""Of text in one appended event of the tests with slow readers."""
SILENCE_S = 0.05
PATIENCE_S = 20.0
"""For everything that is to come; more than any machine takes."""

RESPONSE = open_response(request(), id="resp_1", created_at=1)

Read = AsyncIterator[Sequence[Entry]]


def delta(number: int, text: str = "a") -> Entry:
    at: dict[str, Any] = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    return encode_event(TextDelta(**at, delta=text, logprobs=[], sequence_number=number))


def end(number: int) -> Entry:
    done = close_response(RESPONSE, Outcome("completed"), usage=None, now=2)
    return encode_event(Completed(response=done, sequence_number=number))


class Memory:
    """A log for one reader."""

    def __init__(self, backlogs: Backlogs) -> None:
        self.backlog = backlogs.open()
        self._log = MemoryLog(self.backlog)
        self.log: EventLog = self._log

    async def append(self, *entries: Entry) -> None:
        """As a run does: it waits for room."""
        self.log.append(entries)
        if self.backlog.is_full:
            await self.backlog.room()

    def read(self) -> Read:
        return self._log.read(silence_s=SILENCE_S)


class Redis:
    """A log for readers of any process; this one is in the same."""

    def __init__(self, logs: RedisLogs, backlogs: Backlogs) -> None:
        self.id = f"resp_{uuid.uuid4().hex}"
        self.logs, self.backlog = logs, backlogs.open()
        self.log: EventLog = RedisLog(logs, self.id, 1, [])

    async def append(self, *entries: Entry) -> None:
        """As a run does: it waits for nothing."""
        self.log.append(entries)
        await asyncio.sleep(0)

    async def read(self) -> Read:
        last = -1
        async with self.logs.reading(self.id, last, self.backlog, silence_s=SILENCE_S) as reader:
            while True:
                batches = await reader.next()
                entries = [entry for batch in batches for entry in batch.entries if entry.sequence_number > last]
                if batches and not entries:
                    continue  # every reader drops what it has seen
                last = entries[-1].sequence_number if entries else last
                yield entries
                if entries and entries[-1].is_terminal:
                    return


Log = Memory | Redis


@pytest.fixture
async def redis_logs(servers) -> AsyncIterator[RedisLogs]:
    """Every log of a process."""
    settings = Settings(redis_url=servers.redis_url, redis_prefix=f"test-{uuid.uuid4().hex}")
    logs = RedisLogs(settings)
    logs.start(lambda _: None, lambda: True)
    yield logs
    await logs.close()


@pytest.fixture
async def backlogs() -> Backlogs:
    """Small ones."""
    return Backlogs(msgspec.structs.replace(Settings(), stream_backlog_bytes_max=BOUND, stream_wait_s=60.0))


@pytest.fixture(params=["memory", "redis"])
async def log(request, redis_logs, backlogs) -> Log:
    """A log, and the backlog of its reader."""
    return Memory(backlogs) if request.param == "memory" else Redis(redis_logs, backlogs)


@asynccontextmanager
async def within(seconds: float = PATIENCE_S) -> AsyncIterator[None]:
    async with asyncio.timeout(seconds):
        yield


async def read_all(log: Log) -> list[int]:
    """The numbers of everything up to the terminal event."""
    async with within():
        return [entry.sequence_number async for batch in log.read() for entry in batch]


async def test_a_reader_that_comes_late_gets_everything(log: Log):
    await log.append(delta(0), delta(1))
    await log.append(delta(2), end(3))
    assert await read_all(log) == [0, 1, 2, 3]


async def test_a_reader_that_waits_gets_everything_as_it_comes(log: Log):
    got: list[int] = []
    async with within(), aclosing(log.read()) as batches:  # type: ignore[type-var]
        for entry in (delta(0), delta(1), end(2)):
            waiting = asyncio.ensure_future(next_entries(batches))
            await asyncio.sleep(0)
            await log.append(entry)
            got += await waiting
    assert got == [0, 1, 2]


async def next_entries(batches: Read) -> list[int]:
    """The numbers of the next batch that is not empty."""
    async for batch in batches:
        if batch:
            return [entry.sequence_number for entry in batch]
    return []


async def test_a_reader_that_comes_in_between_misses_nothing(log: Log):
    await log.append(delta(0), delta(1))
    reading = asyncio.ensure_future(read_all(log))
    for number in range(2, 50):
        await log.append(delta(number))
    await log.append(end(50))
    assert await reading == list(range(51))


async def test_silence_gives_empty_batches(log: Log):
    async with within(), aclosing(log.read()) as batches:  # type: ignore[type-var]
        assert await anext(batches) == []
        assert await anext(batches) == []
        await log.append(end(0))
        assert await next_entries(batches) == [0]


async def test_a_slow_reader_costs_no_more_than_its_backlog_and_loses_nothing(log: Log):
    """Many times its bound comes while it reads batch by batch."""
    count, most, got = 120, 0, []

    async def write() -> None:
        for number in range(count):
            await log.append(delta(number, "x" * BATCH))
        await log.append(end(count))

    async with within(), aclosing(log.read()) as batches:  # type: ignore[type-var]
        writing = asyncio.create_task(write())
        async for batch in batches:
            most = max(most, log.backlog.bytes)
            got += [entry.sequence_number for entry in batch]
            await asyncio.sleep(0.001)  # slower than its writer
        await writing
    assert got == list(range(count + 1))
    assert BATCH < most <= 2 * BOUND + FETCHED_BYTES_MAX + ENTRY_BYTES_MAX  # of a page from Redis beside its last entry
    assert log.backlog.bytes == 0 or isinstance(log, Redis)


async def test_a_reader_that_left_costs_nothing(log: Log):
    async with within(), aclosing(log.read()) as batches:  # type: ignore[type-var]
        await log.append(delta(0))
        assert await next_entries(batches) == [0]
    log.backlog.close()
    for number in range(1, 40):
        await log.append(delta(number, "x" * BATCH))
    assert log.backlog.bytes == 0


async def test_redis_refuses_a_writer_whose_run_another_worker_owns(redis_logs, backlogs):
    mine = Redis(redis_logs, backlogs)
    await mine.append(delta(0))
    await mine.log.flush()  # type: ignore[attr-defined]
    theirs = RedisLog(redis_logs, mine.id, 2, [delta(0)])
    theirs.append([delta(1)])
    await theirs.flush()
    mine.log.append([delta(1, "mine")])
    with pytest.raises(Fenced):
        await mine.log.flush()  # type: ignore[attr-defined]
    with pytest.raises(Fenced):
        mine.log.append([delta(2)])
    theirs.append([end(2)])
    got: list[bytes] = []
    async with within():
        async for batch in mine.read():
            got += [entry.body for entry in batch]
    assert not any(b"mine" in body for body in got)
    assert len(got) == 3
