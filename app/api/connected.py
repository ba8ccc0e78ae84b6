"""Work that is cancelled when its client disconnects."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from litestar.types import Receive

from app.errors import ApiError

T = TypeVar("T")


class ClientDisconnected(ApiError):
    """The client disconnected before the reply."""

    status = 499


async def until_disconnect(receive: Receive) -> None:
    """Return when the client disconnects."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """The result of the work, which is cancelled when the client disconnects. Raises ClientDisconnected."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.create_task(until_disconnect(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnected("The client disconnected.")
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
