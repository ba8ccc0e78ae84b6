"""A server that answers with any bytes of a test, as long as its client reads them."""

import asyncio
import concurrent.futures
import gzip
import json
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from tests.threaded import Threaded

PIECE = 65_536


@dataclass(eq=False)
class Visit:
    """One request, and the state of its answer."""

    head: str
    body: Any
    sent_bytes: int = 0
    closed_s: float = 0.0
    closed: threading.Event = field(default_factory=threading.Event)
    """The client has closed its connection, or the answer has ended."""


Answer = Callable[[Visit], Iterable[bytes | None]]
"""The bytes of an answer, its head included; None is silence until the client disconnects."""


def headed(*lines: str, status: str = "200 OK") -> bytes:
    """A head; the answer ends with its connection."""
    return "\r\n".join([f"HTTP/1.1 {status}", "connection: close", *lines, "", ""]).encode("latin-1")


EVENTS = headed("content-type: text/event-stream")
JSON = headed("content-type: application/json")

ZEROS = gzip.compress(bytes(2**26))
"""64 MB; each of the bombs has many of them, as gzip allows."""


class Rogue(Threaded):
    """Answers a request with the entry of `answers` for its model, or for the last word of its path if it has no model."""

    def __init__(self) -> None:
        super().__init__(0)
        self.answers: dict[str, Answer] = {}
        self.visits: list[Visit] = []
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def base_url(self) -> str:
        """As an upstream."""
        return f"http://127.0.0.1:{self.port}/v1"

    def asked(self, name: str) -> list[Visit]:
        """The requests under a name."""
        return [visit for visit in self.visits if self._name(visit) == name]

    @staticmethod
    def _name(visit: Visit) -> str:
        if isinstance(visit.body, dict) and "model" in visit.body:
            return str(visit.body["model"])
        return visit.head.split(" ")[1].rsplit("/", 1)[-1]

    async def serve(self, ready: concurrent.futures.Future[None]) -> None:
        """Listen in the running loop until `stop`."""
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._begin, "127.0.0.1", self.port, limit=2**27)
        self.port = server.sockets[0].getsockname()[1]
        ready.set_result(None)
        await self._stopping.wait()
        server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _begin(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._converse(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            lines = dict(line.lower().split(": ", 1) for line in head.rstrip().split("\r\n")[1:])
            body = await reader.readexactly(int(lines.get("content-length", "0")))
            visit = Visit(head, json.loads(body) if body else None)
            self.visits.append(visit)
            answering = asyncio.ensure_future(self._answer(visit, writer))
            leaving = asyncio.ensure_future(reader.read())
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            for task in (answering, leaving):
                task.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)
            visit.closed_s = time.monotonic()
            visit.closed.set()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.transport.abort() if writer.transport.get_write_buffer_size() else writer.close()

    async def _answer(self, visit: Visit, writer: asyncio.StreamWriter) -> None:
        for part in self.answers[self._name(visit)](visit):
            if part is None:
                await asyncio.Event().wait()
                continue
            writer.write(part)
            visit.sent_bytes += len(part)
            await writer.drain()
            await asyncio.sleep(0)
        writer.write_eof()
