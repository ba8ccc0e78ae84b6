"""Room for contexts: a bound in bytes, in turns, and nobody starves."""

import asyncio

import pytest

from app.errors import TooManyRequests
from app.rooms import TINY_BYTES, Room, Rooms

WHOLE = 64 * 1024 * 1024
SMALL = WHOLE // 256
LARGE = WHOLE // 4
"""Three of them fit."""


@pytest.fixture
async def rooms():
    return Rooms(WHOLE, waiting_max=10)


async def taken(rooms: Rooms, size: int) -> Room:
    room = Room(rooms)
    await room.take(size, wait_s=0)
    return room


@pytest.fixture
async def waits(rooms):
    """Begins to wait for so many bytes; what has not come to its turn by the end of the test is given up."""
    begun: list[asyncio.Task[None]] = []

    def begin(size: int) -> tuple[Room, "asyncio.Task[None]"]:
        room = Room(rooms)
        begun.append(asyncio.create_task(room.take(size, wait_s=60)))
        return room, begun[-1]

    yield begin
    for task in begun:
        task.cancel()
    await asyncio.gather(*begun, return_exceptions=True)


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_what_does_not_fit_waits_for_its_turn(rooms, waits):
    held = [await taken(rooms, LARGE) for _ in range(3)]
    waiting = [waits(LARGE) for _ in range(3)]
    await settled()
    assert [task.done() for _, task in waiting] == [False] * 3
    held[0].release()
    await settled()
    assert [task.done() for _, task in waiting] == [True, False, False]
    waiting[0][0].release()
    held[1].release()
    await settled()
    assert [task.done() for _, task in waiting] == [True] * 3


async def test_small_contexts_do_not_wait_for_large_ones(rooms, waits):
    for _ in range(3):
        await taken(rooms, LARGE)
    waits(LARGE)
    await settled()
    for _ in range(WHOLE // 4 // SMALL):
        await taken(rooms, SMALL)
    with pytest.raises(TooManyRequests):
        await taken(rooms, SMALL)


async def test_a_large_context_is_not_overtaken_for_ever(rooms, waits):
    held = [await taken(rooms, LARGE) for _ in range(3)]
    largest, turn = waits(3 * LARGE)
    await settled()
    _, behind = waits(SMALL + 1)
    for room in held:
        assert not turn.done()
        assert not behind.done()
        room.release()
        await settled()
    assert turn.done()
    assert not behind.done()
    largest.release()
    await settled()
    assert behind.done()


async def test_a_context_that_is_larger_than_all_room_comes_alone(rooms):
    room = await taken(rooms, 10 * WHOLE)
    with pytest.raises(TooManyRequests):
        await taken(rooms, LARGE)
    room.release()
    for _ in range(3):
        await taken(rooms, LARGE)


async def test_who_waits_too_long_is_refused_and_makes_way(rooms, waits):
    held = await taken(rooms, 2 * LARGE)
    with pytest.raises(TooManyRequests) as refused:
        await Room(rooms).take(2 * LARGE, wait_s=0.01)
    assert int(refused.value.headers["Retry-After"]) > 0
    _, given_up = waits(2 * LARGE)
    _, behind = waits(LARGE)
    await settled()
    assert not behind.done()
    given_up.cancel()
    await settled()
    assert behind.done()
    held.release()
    await taken(rooms, 2 * LARGE)


async def test_a_turn_that_comes_as_it_is_given_up_is_passed_on(rooms, waits):
    held = await taken(rooms, 3 * LARGE)
    _, given_up = waits(3 * LARGE)
    await settled()
    held.release()
    given_up.cancel()
    await settled()
    await taken(rooms, 3 * LARGE)


async def test_no_more_than_so_many_wait(rooms, waits):
    await taken(rooms, 3 * LARGE)
    for _ in range(10):
        waits(LARGE)
    await settled()
    with pytest.raises(TooManyRequests):
        await Room(rooms).take(LARGE, wait_s=60)


async def test_what_is_accepted_waits_however_many_wait(rooms, waits):
    held = await taken(rooms, 3 * LARGE)
    for _ in range(10):
        waits(SMALL + 1)
    await settled()
    accepted = asyncio.create_task(Room(rooms).take(LARGE, wait_s=None))
    await settled()
    assert not accepted.done()
    held.release()
    await accepted


async def test_what_was_taken_too_much_is_free_again(rooms):
    room = await taken(rooms, 3 * LARGE)
    room.shrink(LARGE)
    await taken(rooms, 2 * LARGE)
    room.release()
    room.release()
    await taken(rooms, LARGE)
    with pytest.raises(TooManyRequests):
        await taken(rooms, LARGE)


async def test_the_tiniest_never_wait(rooms):
    for _ in range(WHOLE // 4 // SMALL):
        await taken(rooms, SMALL)
    assert rooms.at_first() == TINY_BYTES
    assert (await taken(rooms, TINY_BYTES)).size == TINY_BYTES
    with pytest.raises(TooManyRequests):
        await taken(rooms, TINY_BYTES + 1)
