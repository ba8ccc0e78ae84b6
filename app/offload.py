"""Long computations run in a thread, so that the event loop continues.

The work on a request of tens of megabytes is linear but long. Python runs one thread at a time and switches between them every few
milliseconds, so other streams continue meanwhile; only a single call of a decoder is not interrupted.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

OFFLOAD_BYTES = 256 * 1024
"""Work on this much takes a few milliseconds; for less, a thread costs more than it saves."""

_THREADS = ThreadPoolExecutor(2, thread_name_prefix="offload")


async def offload(size: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Do pure work on so many bytes, in a thread if that takes long."""
    if size < OFFLOAD_BYTES:
        return work(*args, **kwargs)
    return await asyncio.get_running_loop().run_in_executor(_THREADS, lambda: work(*args, **kwargs))
