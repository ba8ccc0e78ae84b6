"""Long work beside the event loop.

What a request of tens of megabytes takes is no more than it must be, but it is long: other streams go on meanwhile. Python runs
one thread at a time and changes between them every few milliseconds; only a single call of a decoder is not interrupted.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

ASIDE_BYTES = 256 * 1024
"""Work on so much takes a few milliseconds; on less, the way to a thread and back is not worth it."""

_THREADS = ThreadPoolExecutor(2, thread_name_prefix="aside")


async def aside(size: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Do pure work on so many bytes, in a thread if that takes long."""
    if size < ASIDE_BYTES:
        return work(*args, **kwargs)
    return await asyncio.get_running_loop().run_in_executor(_THREADS, lambda: work(*args, **kwargs))
