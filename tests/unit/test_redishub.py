"""A reader of a stream, on a Redis in memory: what of the live entries it holds for its client."""

import asyncio
from typing import Any

import msgspec
import pytest

from app.domain.lifecycle import open_response
from app.settings import Settings
from app.storage.backlog import Backlogs
from app.storage.redishub import Batch, Hub
from app.wire.events import Created, encode_event
from tests.unit.build import request

BOUND = 64 * 1024


class Redis:
    """A stream that has nothing but what is offered live; it counts the times that it is read."""

    def __init__(self) -> None:
        self.reads = 0
        self.read = asyncio.Event()

    async def xrange(self, key: str, *, min: str, count: int) -> list[Any]:
        self.reads += 1
        self.read.set()
        return []


def batch(size: int) -> Batch:
    return Batch([encode_event(Created(response=open_response(request(), id="resp_1", created_at=1)))], None, size)


@pytest.mark.parametrize(
    ("sizes", "held"),
    [
        ([BOUND // 2, BOUND // 2], True),
        ([10 * BOUND], True),  # one is always held, or it could never be read
        ([BOUND // 2, BOUND], False),
        ([1000] * 100, False),
    ],
    ids=["what fits", "a large one", "two that do not fit", "many that do not fit"],
)
async def test_live_entries_are_held_if_they_fit_and_are_read_again_later_if_not(sizes: list[int], held: bool):
    redis = Redis()
    backlog = Backlogs(msgspec.structs.replace(Settings(), stream_backlog_bytes_max=BOUND)).open()
    hub = Hub(redis, None)  # type: ignore[arg-type]
    async with hub.reading("stream", -1, backlog, silence_s=60.0) as reader:
        waiting = asyncio.create_task(reader.next())
        await redis.read.wait()
        await asyncio.sleep(0)
        redis.read.clear()
        reader.offer([batch(size) for size in sizes], sum(sizes))
        assert backlog.bytes == (sum(sizes) if held else 0)
        if held:
            assert len(await waiting) == len(sizes)
        else:
            await redis.read.wait()
            waiting.cancel()
        assert redis.reads == (1 if held else 2)
