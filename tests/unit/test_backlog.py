"""What clients leave unread: bounds, and who pays for them."""

import asyncio

import msgspec
import pytest

from app.settings import Settings
from app.storage.backlog import ENTRY_OVERHEAD_BYTES, PAGE_BYTES, Backlogs, pages_of, size_of
from app.storage.eventlog import MemoryLog
from app.wire.events import Entry

SETTINGS = Settings(stream_backlog_bytes_max=10_000, unread_bytes_max=40_000, stream_wait_s=0.05)


def entry(number, size=1_000, type="response.output_text.delta"):
    return Entry(number, type, b"x" * (size - ENTRY_OVERHEAD_BYTES))


def backlogs(**settings):
    return Backlogs(msgspec.structs.replace(SETTINGS, **settings))


class Client:
    """Somebody who can be disconnected."""

    def __init__(self, all_of_them, *, stale=False):
        self.backlog = all_of_them.open()
        self.backlog.disconnect = lambda: self.heard.append("disconnected")
        self.heard = []
        if stale:
            self.backlog.taken_at -= 60


@pytest.mark.parametrize("sizes", [[1], [PAGE_BYTES + 1], [PAGE_BYTES - 1, 2], [40_000] * 5, [10, 10**6, 10]])
def test_pages_are_small_unless_one_entry_is_large(sizes):
    entries = [entry(at, ENTRY_OVERHEAD_BYTES + size) for at, size in enumerate(sizes)]
    pages = [list(page) for page in pages_of(entries)]
    assert [one for page in pages for one in page] == entries
    assert all(len(page) == 1 or size_of(page) <= PAGE_BYTES for page in pages)
    assert list(pages_of([])) == []


async def test_a_log_counts_as_unread_until_the_next_page_is_asked_for():
    backlog = backlogs().open()
    log = MemoryLog(backlog)
    log.append([entry(0), entry(1)])
    assert backlog.bytes == 2_000
    reading = log.read(silence_s=60)
    assert [one.sequence_number for one in await anext(reading)] == [0, 1]
    log.append([entry(2)])
    assert backlog.bytes == 3_000
    assert [one.sequence_number for one in await anext(reading)] == [2]
    assert backlog.bytes == 1_000
    log.append([entry(3, type="response.completed")])
    assert [one.sequence_number for batch in [await anext(reading)] for one in batch] == [3]
    with pytest.raises(StopAsyncIteration):
        await anext(reading)
    assert backlog.bytes == 0


async def test_a_long_backlog_is_read_in_pages():
    log = MemoryLog(backlogs(unread_bytes_max=10**9).open())
    log.append([entry(at, 10_000) for at in range(100)])
    log.append([entry(100, type="response.completed")])
    batches = [batch async for batch in log.read(silence_s=60)]
    assert [one.sequence_number for batch in batches for one in batch] == list(range(101))
    assert max(map(size_of, batches)) <= PAGE_BYTES
    assert log.backlog.bytes == 0


async def test_a_run_waits_for_room_and_goes_on_when_its_client_reads():
    backlog = backlogs(stream_wait_s=60).open()
    log = MemoryLog(backlog)
    log.append([entry(at) for at in range(11)])
    assert backlog.is_full
    waiting = asyncio.create_task(backlog.room())
    reading = log.read(silence_s=60)
    await anext(reading)
    await asyncio.sleep(0)
    assert not waiting.done()
    following = asyncio.create_task(anext(reading))
    await waiting
    assert not backlog.is_full
    following.cancel()


async def test_a_client_that_makes_a_run_wait_for_too_long_is_disconnected():
    client = Client(backlogs())
    log = MemoryLog(client.backlog)
    log.append([entry(at) for at in range(11)])
    await client.backlog.room()
    assert client.heard == ["disconnected"]
    assert (client.backlog.closed, client.backlog.is_full) == (True, False)
    log.append([entry(11)])  # nobody reads it
    assert (client.backlog.bytes, log._entries) == (0, [])


async def test_a_closed_backlog_wakes_its_run():
    backlog = backlogs(stream_wait_s=60).open()
    backlog.add(10_001)
    waiting = asyncio.create_task(backlog.room())
    await asyncio.sleep(0)
    backlog.close()
    await waiting


async def test_something_always_fits():
    backlog = backlogs().open()
    assert backlog.fits(1_000_000)
    backlog.add(1)
    assert backlog.fits(9_999)
    assert not backlog.fits(10_000)


async def test_beyond_the_bound_of_all_the_stalest_are_disconnected_first():
    every = backlogs()
    old, older, fresh = Client(every, stale=True), Client(every, stale=True), Client(every)
    older.backlog.taken_at -= 60
    for client in (old, older, fresh):
        client.backlog.add(12_000)
    Client(every).backlog.add(4_001)
    assert (older.heard, old.heard, fresh.heard) == (["disconnected"], [], [])


async def test_what_can_be_read_again_is_let_go_before_anybody_is_disconnected():
    every = backlogs()
    lagging, other = Client(every, stale=True), Client(every, stale=True)
    lagging.backlog.rereads = True
    lagging.backlog.let_go = lambda: lagging.backlog.release(lagging.backlog.bytes)
    other.backlog.taken_at -= 60
    lagging.backlog.add(20_000)
    other.backlog.add(20_000)
    Client(every).backlog.add(1)
    assert (lagging.heard, other.heard, lagging.backlog.bytes) == ([], [], 0)


async def test_when_all_read_the_largest_is_disconnected():
    every = backlogs()
    small, large = Client(every), Client(every)
    small.backlog.add(1_000)
    large.backlog.add(39_001)
    assert (small.heard, large.heard) == ([], ["disconnected"])


async def test_what_is_closed_is_free_again():
    every = backlogs()
    for _ in range(100):
        client = Client(every)
        client.backlog.add(30_000)
        client.backlog.close()
        client.backlog.take(30_000)  # the reader had not heard of it
        assert client.heard == []
