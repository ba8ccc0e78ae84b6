"""Waits end in time, others are left alone, and a cancellation by somebody else stays one."""

import asyncio
from contextlib import closing

import pytest

from app.idle_timeout import IdleTimeout

SHORT_S = 0.02


async def test_a_wait_that_takes_too_long_ends():
    with closing(IdleTimeout(SHORT_S)) as patience:
        with pytest.raises(TimeoutError), patience:
            await asyncio.Event().wait()
        assert asyncio.current_task().cancelling() == 0


async def test_it_ends_again_and_again():
    with closing(IdleTimeout(SHORT_S)) as patience:
        for _ in range(3):
            with pytest.raises(TimeoutError), patience:
                await asyncio.Event().wait()


async def test_waits_that_are_short_may_be_many():
    """Together they last longer than each of them may."""
    waits = 0
    with closing(IdleTimeout(0.2)) as patience:
        until = asyncio.get_running_loop().time() + 0.5
        while asyncio.get_running_loop().time() < until:
            with patience:
                await asyncio.sleep(0.001)
            waits += 1
    assert waits > 10


async def test_a_wait_is_measured_from_its_own_beginning():
    loop = asyncio.get_running_loop()
    with closing(IdleTimeout(0.1)) as patience:
        with patience:
            await asyncio.sleep(0.06)
        begun = loop.time()
        with pytest.raises(TimeoutError), patience:
            await asyncio.Event().wait()
        assert loop.time() - begun >= 0.09


async def test_between_the_waits_nothing_happens():
    with closing(IdleTimeout(SHORT_S)) as patience:
        with patience:
            pass
        await asyncio.sleep(3 * SHORT_S)
        with patience:
            await asyncio.sleep(0)


async def test_who_is_cancelled_by_another_stays_cancelled():
    async def wait() -> None:
        with closing(IdleTimeout(60)) as patience, patience:
            waiting.set()
            await asyncio.Event().wait()

    waiting = asyncio.Event()
    task = asyncio.create_task(wait())
    await waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
