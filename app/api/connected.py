"""Work that is cancelled when its client disconnects."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from litestar.types import Receive

from app.errors import ApiError
from app.runs.foreground import ForegroundRun

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


async def run_while_connected(
    receive: Receive, start: Callable[[], Awaitable[ForegroundRun]], read: Callable[[ForegroundRun], Awaitable[T]]
) -> tuple[ForegroundRun, T]:
    """A run that is started for a client, and what the reply reads of it. A run whose client disconnects meanwhile has lost its
    reader. Raises ClientDisconnected."""
    started: list[ForegroundRun] = []

    async def begin() -> tuple[ForegroundRun, T]:
        run = await start()
        started.append(run)
        return run, await read(run)

    try:
        return await while_connected(receive, begin())
    except (ClientDisconnected, asyncio.CancelledError):
        for run in started:
            run.reader_disconnected()
        raise
