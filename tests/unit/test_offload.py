"""Long work leaves the event loop; short work does not take the way to a thread."""

import asyncio
import threading
import time

import pytest

from app.offload import OFFLOAD_BYTES, offload

WORK_S = 0.2
TURNS_MIN = 5
"""Of a loop that gets a turn every few milliseconds of such work."""


def work() -> int:
    """Keeps Python busy; gives the thread that did it."""
    until = time.thread_time() + WORK_S
    while time.thread_time() < until:
        pass
    return threading.get_ident()


@pytest.mark.parametrize(("size", "elsewhere"), [(OFFLOAD_BYTES - 1, False), (OFFLOAD_BYTES, True)])
async def test_others_go_on_while_long_work_is_done(size: int, elsewhere: bool):
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    waiting = asyncio.create_task(others())
    await asyncio.sleep(0)
    before = turns
    worked_in = await offload(size, work)
    waiting.cancel()
    assert (worked_in != threading.get_ident()) == elsewhere
    assert turns - before >= TURNS_MIN if elsewhere else turns == before


async def test_an_error_comes_back_from_where_it_happened():
    def fail() -> None:
        raise ValueError("no")

    for size in (0, OFFLOAD_BYTES):
        with pytest.raises(ValueError, match="no"):
            await offload(size, fail)
