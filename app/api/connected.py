"""Work on behalf of a client, for as long as the client is there."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from litestar.types import Receive

from app.errors import ApiError

T = TypeVar("T")


class ClientGone(ApiError):
    """Nobody reads this reply."""

    status = 499


async def until_disconnect(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """What the work gives; it is cancelled when the client leaves. Raises ClientGone."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.create_task(until_disconnect(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone("The client has gone.")
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
