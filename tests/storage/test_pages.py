"""Events that Postgres keeps are read a page at a time, from any number on."""

import pytest
import zstandard

from app.domain.lifecycle import open_response
from app.storage import journal
from app.storage.database import Tx
from app.storage.journal import STORED_PAGE_BYTES
from app.wire.events import split_frames
from tests.unit.build import request

RESPONSE = open_response(request(), id="r", created_at=0)

ROWS = """
insert into responses (tenant_id, id, thread_id, turn, status, background, model, metadata, created_at, body)
values ('t', $1, $1, 1, $2, true, 'm', '{}', 0, '{}')
"""


def frame(number, size=100):
    data = b'{"type":"response.output_text.delta","sequence_number":%d,"delta":"%b"}' % (number, b"x" * size)
    return b"event: response.output_text.delta\ndata: %b\n\n" % data


def entries(numbers, size=100):
    return split_frames(b"".join(frame(number, size) for number in numbers))


async def kept(connection, id, after):
    found = await journal.read(Tx(connection), "t", id, after)
    assert found
    return [entry.sequence_number for entry in found.entries], found.archived


async def all_of(connection, id, after=-1):
    """Page after page."""
    pages = []
    while (page := await kept(connection, id, after))[0]:
        pages.append(page[0])
        after = page[0][-1]
    return pages


async def store(connection, id, table, pages):
    await connection.execute(ROWS, id, "completed" if table == "event_archive" else "in_progress")
    rows = [("t", id, number, frames) for number, frames in pages]
    await connection.executemany(
        f"insert into {table} (tenant_id, response_id, first_number, frames) values ($1, $2, $3, $4)", rows
    )


@pytest.mark.parametrize("table", ["event_archive", "event_journal"])
async def test_a_long_run_is_read_in_pages_from_any_number_on(connection, table):
    events = entries(range(100), STORED_PAGE_BYTES // 10)
    pages = journal.archive(events, RESPONSE) if table == "event_archive" else journal.paged(events)
    await store(connection, table, table, pages)
    found = await all_of(connection, table)
    assert [number for page in found for number in page] == list(range(100))
    assert 10 <= len(found) <= 15
    for after in range(-1, 100):
        numbers, archived = await kept(connection, table, after)
        assert numbers == [number for number in range(after + 1, 100) if number <= (numbers or [0])[-1]]
        assert archived == (table == "event_archive")
    assert [one.sequence_number for one in await journal.read_all(Tx(connection), "t", table)] == list(range(100))


async def test_numbers_that_were_given_up_are_skipped(connection):
    pages = [*journal.paged(entries(range(5))), *journal.paged(entries(range(1_000, 1_005)))]
    await store(connection, "gap", "event_journal", pages)
    for after in (4, 5, 500, 999):
        assert await kept(connection, "gap", after) == ([1_000, 1_001, 1_002, 1_003, 1_004], False)
    assert await kept(connection, "gap", 1_004) == ([], False)


async def test_an_archive_of_before_is_one_page(connection):
    whole = b"".join(frame(number) for number in range(50))
    await connection.execute(ROWS, "old", "completed")
    await connection.execute(
        "insert into event_archive (tenant_id, response_id, frames) values ('t', 'old', $1)", zstandard.compress(whole)
    )
    assert await all_of(connection, "old") == [list(range(50))]
    assert await kept(connection, "old", 30) == (list(range(31, 50)), True)


def test_a_large_event_is_a_page_of_its_own():
    many = [*entries([0, 1]), *entries([2], 3 * STORED_PAGE_BYTES), *entries([3])]
    assert [number for number, _ in journal.paged(many)] == [0, 2, 3]
    assert b"".join(frames for _, frames in journal.paged(many)) == b"".join(one.frame for one in many)
