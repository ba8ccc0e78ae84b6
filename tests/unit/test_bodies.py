"""Room for arriving bodies, where it is full of others that have arrived."""

import asyncio

import pytest

from app.api.bodies import Bodies
from app.errors import TooManyRequests
from app.settings import load


class Arriving:
    """A request whose body comes in parts."""

    def __init__(self, *parts: bytes) -> None:
        self._parts = parts

    async def stream(self):
        """The parts, each after the loop has turned."""
        for part in self._parts:
            await asyncio.sleep(0)
            yield part


async def test_the_eldest_that_arrives_makes_no_room_for_itself():
    """What holds the room has arrived, and only waits for its turn."""
    limits = {"REPRISE_BODY_BYTES_MAX": "100000", "REPRISE_BODIES_BYTES_MAX": "100000"}
    bodies = Bodies(load({**limits, "REPRISE_BODY_TIMEOUT_S": "0.000001"}))
    with bodies.reading(Arriving(b"x" * 160_000)) as whole, bodies.reading(Arriving(b"x", b"x" * 100_000)) as late:
        assert len(await whole.read()) == 160_000
        with pytest.raises(TooManyRequests):
            await late.read()
        assert asyncio.current_task().cancelling() == 0
