"""Clients: sequential requests, concurrent streams, and what they measure. Times are in milliseconds."""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

from tests.bench.http import Connection, request
from tests.bench.stage import Target

_encode = msgspec.json.Encoder().encode

DELTA = re.compile(rb'"(?:delta|content)":"(\d+) "')
"""A word of the upstream: the moment when it was sent."""
ID = re.compile(rb'"id":"(resp_\w+)"')
PROMPT = "Say something that is as long as I have asked for, and nothing else."


def create(target: Target, words: int, pace_ms: int, *, calls: int = 0, wait_ms: int = 0, **more: object) -> bytes:
    """A request that makes the upstream send so many words, after so many calls of a tool, or so long after its head."""
    model = f"bench-{words}x{pace_ms}" + (f"-{calls}calls" if calls else "") + (f"-{wait_ms}wait" if wait_ms else "")
    if target.is_upstream:
        body = {"model": model, "messages": [{"role": "user", "content": PROMPT}], **more}
    else:
        body = {"model": model, "input": PROMPT, **more}
    return request(target.path, _encode(body))


def quantile(values: Sequence[float], part: float) -> float:
    """The value that this part of all is not above."""
    return sorted(values)[min(len(values) - 1, int(len(values) * part))]


@dataclass
class Asked:
    """What clients saw who asked for whole replies."""

    wall_s: float = 0.0
    latencies: list[float] = field(default_factory=list)

    @property
    def per_s(self) -> float:
        """Replies per second."""
        return len(self.latencies) / self.wall_s


async def ask_for(seconds: float, clients: int, targets: Sequence[Target], requests: Iterator[bytes]) -> Asked:
    """So many clients, spread over the targets, each asks again as soon as it is answered."""
    asked = Asked()
    connections = [await Connection.open(targets[number % len(targets)].port) for number in range(clients)]
    begun = time.perf_counter()

    async def ask(connection: Connection) -> None:
        while (sent := time.perf_counter()) - begun < seconds:
            await connection.ask(next(requests))
            asked.latencies.append((time.perf_counter() - sent) * 1000)

    await asyncio.gather(*map(ask, connections))
    asked.wall_s = time.perf_counter() - begun
    for connection in connections:
        connection.close()
    return asked


class Heard:
    """What one client heard of a stream."""

    def __init__(self) -> None:
        self.deltas = 0
        self.response_id = ""
        self.begun = time.perf_counter()
        self.first_ms: float | None = None
        """Until the first delta."""
        self.any_ms: float | None = None
        """Until the first event."""
        self.whole_ms = 0.0
        self.late_ms: list[float] = []
        """How long each word was on its way."""
        self._rest = b""
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []

    def take(self, data: bytes) -> None:
        """Bytes of the stream."""
        now, now_ns = time.perf_counter(), time.monotonic_ns()
        data = self._rest + data
        ends = data.rfind(b"\n\n") + 2
        events, self._rest = data[:ends], data[ends:]
        said = DELTA.findall(events) if ends >= 2 else []
        if self.any_ms is None and ends >= 2:
            self.any_ms = (now - self.begun) * 1000
            if found := ID.search(events):
                self.response_id = found[1].decode()
        if said and self.first_ms is None:
            self.first_ms = (now - self.begun) * 1000
        # The last events repeat the text, but never as a single word.
        self.deltas += len(said)
        self.late_ms += [(now_ns - int(word)) / 1e6 for word in said]
        self._wake()

    def _wake(self) -> None:
        for deltas, future in self._waiting:
            if self.deltas >= deltas and not future.done():
                future.set_result(None)

    async def heard(self, deltas: int) -> None:
        """Wait for so many deltas."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((deltas, future))
        self._wake()
        await future


async def listen(port: int, sent: bytes, *, until: Callable[[Heard], Awaitable[None]] | None = None) -> Heard:
    """One stream, to its end, or `until` the client has heard enough."""
    connection = await Connection.open(port)
    heard = Heard()
    whole = connection.ask(sent, heard.take)
    try:
        if until:
            await until(heard)
        else:
            await whole
    finally:
        heard.whole_ms = (time.perf_counter() - heard.begun) * 1000
        connection.close()
    if until and not whole.done():
        whole.cancel()
    return heard


async def listen_together(
    requests: Iterable[tuple[int, bytes]], *, each: int = 1, spread_s: float = 0.0
) -> list[Heard]:
    """Concurrent clients, each with (port, request), which it sends so many times, one after the other.

    Their beginnings are spread over some seconds, since clients of a real server do not all begin at once.
    """
    asked = list(requests)

    async def follow(number: int, port: int, sent: bytes) -> list[Heard]:
        await asyncio.sleep(spread_s * number / len(asked))
        return [await listen(port, sent) for _ in range(each)]

    every = await asyncio.gather(*(follow(number, *one) for number, one in enumerate(asked)))
    return [heard for one in every for heard in one]


async def get(port: int, path: str) -> bytes:
    """One whole reply."""
    connection = await Connection.open(port)
    try:
        return await connection.ask(request(path))
    finally:
        connection.close()
