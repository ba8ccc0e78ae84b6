"""A scripted server in a thread and event loop of its own, in the process of the tests."""

import asyncio
import concurrent.futures
import threading
from abc import ABC, abstractmethod
from typing import Self


class Threaded(ABC):
    """A context manager that starts and stops, and starts again on the same port."""

    _loop: asyncio.AbstractEventLoop
    _stopping: asyncio.Event

    def __init__(self, port: int) -> None:
        """`port` 0: a free one, and that one from then on."""
        self.port = port
        self._thread: threading.Thread | None = None

    @abstractmethod
    async def serve(self, ready: concurrent.futures.Future[None]) -> None:
        """Listen in the running loop until `stop`, which sets `_stopping`; `ready` gets the result, or the error."""

    def start(self) -> Self:
        """Listen, on the same port as before if it ran before."""
        ready: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self.serve(ready)), daemon=True)
        self._thread.start()
        ready.result(timeout=10)
        return self

    def stop(self) -> None:
        """Break all connections and stop listening."""
        if self._thread is not None:
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join(timeout=10)
            self._thread = None

    def __enter__(self) -> Self:
        """Start."""
        return self.start()

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self.stop()
