"""What clients leave unread: bounds, and who pays for them."""

import asyncio

import msgspec
import pytest

from app.api.sse import EventFrames, EventStream
from app.errors import TooMuchUnread
from app.runs.following import Followed
from app.settings import Settings
from app.storage.backlog import ENTRY_OVERHEAD_BYTES, PAGE_BYTES, Backlogs, pages_of, size_of
from app.storage.eventlog import MemoryLog
from app.wire.events import Entry
from app.wire.redaction import Redaction

SETTINGS = Settings(stream_backlog_bytes_max=1_000_000, unread_bytes_max=4_000_000, stream_wait_s=0.05)


def entry(number, size=100_000, type="response.output_text.delta"):
    return Entry(number, type, b"x" * (size - ENTRY_OVERHEAD_BYTES))


def backlogs(**settings):
    return Backlogs(msgspec.structs.replace(SETTINGS, **settings))


class Client:
    """Somebody who can be disconnected, and has taken nothing of `unread` bytes for a while."""

    def __init__(self, all_of_them, unread=0, *, idle_s=0):
        self.heard = []
        self.backlog = all_of_them.open()
        self.backlog.disconnect = lambda: self.heard.append("disconnected")
        self.backlog.add(unread)
        self.backlog.taken_at -= idle_s


@pytest.mark.parametrize("sizes", [[1], [PAGE_BYTES + 1], [PAGE_BYTES - 1, 2], [40_000] * 5, [10, 10**6, 10]])
def test_pages_are_small_unless_one_entry_is_large(sizes):
    entries = [entry(at, ENTRY_OVERHEAD_BYTES + size) for at, size in enumerate(sizes)]
    pages = [list(page) for page in pages_of(entries, size_of(entries))]
    assert [one for page in pages for one in page] == entries
    assert all(len(page) == 1 or size_of(page) <= PAGE_BYTES for page in pages)


async def test_a_log_counts_as_unread_until_the_next_page_is_asked_for():
    backlog = backlogs().open()
    log = MemoryLog(backlog)
    log.append([entry(0, 1_000), entry(1, 1_000)])
    assert backlog.bytes == 2_000
    reading = log.read(silence_s=60)
    assert [one.sequence_number for one in await anext(reading)] == [0, 1]
    log.append([entry(2, 1_000)])
    assert backlog.bytes == 3_000
    assert [one.sequence_number for one in await anext(reading)] == [2]
    assert backlog.bytes == 1_000
    log.append([entry(3, 1_000, type="response.completed")])
    assert [one.sequence_number for one in await anext(reading)] == [3]
    with pytest.raises(StopAsyncIteration):
        await anext(reading)
    assert backlog.bytes == 0


async def test_a_long_backlog_is_read_in_pages():
    log = MemoryLog(backlogs(unread_bytes_max=10**9).open())
    log.append([entry(at, 10_000) for at in range(100)])
    log.append([entry(100, 10_000, type="response.completed")])
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
    client = Client(backlogs(unread_bytes_max=10**9))
    log = MemoryLog(client.backlog)
    log.append([entry(at) for at in range(11)])
    await client.backlog.room()
    assert client.heard == ["disconnected"]
    assert (client.backlog.closed, client.backlog.is_full) == (True, False)
    log.append([entry(11)])  # nobody reads it
    assert (client.backlog.bytes, log._entries) == (0, [])


async def test_a_closed_backlog_wakes_its_run():
    backlog = backlogs(stream_wait_s=60).open()
    backlog.add(1_000_001)
    waiting = asyncio.create_task(backlog.room())
    await asyncio.sleep(0)
    backlog.close()
    await waiting


async def test_something_always_fits():
    backlog = backlogs().open()
    assert backlog.fits(10_000_000)
    backlog.add(1)
    assert backlog.fits(999_999)
    assert not backlog.fits(1_000_000)


async def test_beyond_the_bound_of_all_the_stalest_are_disconnected_first():
    every = backlogs()
    old, older, fresh = (Client(every, 1_200_000, idle_s=idle_s) for idle_s in (60, 120, 0))
    new = Client(every, 400_001)
    assert [client.heard for client in (old, older, fresh, new)] == [[], ["disconnected"], [], []]


async def test_what_never_fits_disconnects_nobody_else():
    every = backlogs()
    stale, huge = Client(every, 1_000_000, idle_s=60), Client(every, 4_000_001)
    assert (stale.heard, huge.heard) == ([], ["disconnected"])


async def test_what_can_be_read_again_is_let_go_before_anybody_is_disconnected():
    every = backlogs()
    lagging, other = Client(every, 2_000_000, idle_s=60), Client(every, 1_900_000, idle_s=120)
    lagging.backlog.rereads = True
    lagging.backlog.let_go = lambda: lagging.backlog.release(2_000_000)
    new = Client(every, 100_001)
    assert (lagging.heard, other.heard, new.heard, lagging.backlog.bytes) == ([], [], [], 0)


async def test_also_clients_that_read_read_again_before_anybody_is_disconnected():
    """A single event may be so large that all who hear it at once are beyond the bound."""
    every = backlogs()
    clients = [Client(every) for _ in range(5)]
    for client in clients:
        client.backlog.rereads = True
        client.backlog.let_go = lambda backlog=client.backlog: backlog.release(backlog.bytes)
    for client in clients:
        client.backlog.add(1_000_000)
    assert [client.heard for client in clients] == [[]] * 5
    assert sum(client.backlog.bytes for client in clients) <= 4_000_000


async def test_when_all_read_the_largest_is_disconnected():
    every = backlogs()
    small, large = Client(every, 100_000), Client(every, 3_900_001)
    assert (small.heard, large.heard) == ([], ["disconnected"])


async def test_idle_clients_do_not_count_as_stale():
    every = backlogs()
    idle = Client(every, idle_s=3_600)
    idle.backlog.add(100_000)
    large = Client(every, 3_900_001)
    assert (idle.heard, large.backlog.closed) == ([], True)


async def test_what_is_closed_is_free_again():
    every = backlogs()
    for _ in range(100):
        client = Client(every, 3_000_000)
        client.backlog.close()
        client.backlog.take(3_000_000)  # the reader had not heard of it
        assert client.heard == []


async def test_a_stream_whose_client_was_disconnected_before_it_began_is_refused():
    gone = []
    backlog = backlogs().open()
    log = MemoryLog(backlog)
    followed = Followed(log.read(silence_s=60), backlog, lambda: gone.append(1), response_id="resp_1")
    reply = EventStream(followed, EventFrames(Redaction(()), obfuscate=False, keepalive_events=False, after=-1), {})
    backlog.drop()
    with pytest.raises(TooMuchUnread, match="retrieve 'resp_1' later"):
        await reply.to_asgi_response()({}, None, None)
    assert gone
