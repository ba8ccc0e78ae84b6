"""`python -m tests.faults.rolling [--requests 10000]`: servers are replaced one after the other under load; counts what fails.

Directly: the new process listens on the same port beside the old one. Through a proxy: on another port, and the proxy, which passes
on bytes and repeats nothing, asks `/readyz` where to connect to. Half of the clients keep their connection, the others make a new
one for each request; none tries again.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import httpx
import uvloop

from app import embedded, migrate
from tests.servers import Served
from tests.upstream import Upstream

CLIENTS = 16
ASK_READY_S = 0.05
CREATE = json.dumps({"model": "m", "input": "rolling"}).encode()
NOT_READY_S = 30.0


def port_of(served: Served) -> int:
    """Where it listens."""
    return int(served.url.split(":")[2].split("/")[0])


class Proxy:
    """Passes connections on to the newest server that says it is ready."""

    def __init__(self) -> None:
        self.backends: list[int] = []
        self._ready: int | None = None
        self._passing: set[asyncio.Task[None]] = set()

    async def start(self) -> int:
        """Gives its port."""
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0, backlog=1024)
        self._tasks = [asyncio.create_task(self._look())]
        self._server = server
        return server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        self._server.close()
        for task in (*self._tasks, *self._passing):
            task.cancel()
        await asyncio.gather(*self._tasks, *self._passing, return_exceptions=True)

    async def _look(self) -> None:
        async with httpx.AsyncClient(timeout=5) as client:
            while True:
                for port in reversed(self.backends):
                    with contextlib.suppress(httpx.HTTPError):
                        if (await client.get(f"http://127.0.0.1:{port}/readyz")).status_code == 200:
                            self._ready = port
                            break
                await asyncio.sleep(ASK_READY_S)

    async def wait_ready(self, port: int) -> None:
        """Until new connections go there."""
        async with asyncio.timeout(NOT_READY_S):
            while self._ready != port:
                await asyncio.sleep(ASK_READY_S)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._passing.add(task)
        task.add_done_callback(self._passing.discard)
        try:
            theirs, ours = await asyncio.open_connection("127.0.0.1", self._ready)
        except OSError:
            writer.transport.abort()
            return
        await asyncio.gather(_pass(reader, ours), _pass(theirs, writer))


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        writer.transport.abort()
    finally:
        writer.close()


async def _once(port: int, create: bool) -> int:
    """One request on a connection of its own; its status."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        line = (
            f"POST /v1/responses HTTP/1.1\r\ncontent-length: {len(CREATE)}"
            if create
            else "GET /v1/responses?limit=1 HTTP/1.1"
        )
        head = f"{line}\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode()
        writer.write(head + (CREATE if create else b""))
        reply = await reader.read()
        assert b"\r\n\r\n" in reply, f"the connection ended after {reply!r}"
        return int(reply.split()[1])
    finally:
        writer.close()


async def _load(
    port: int, numbers: "itertools.count[int]", requests: int, *, keeps: bool, found: "Counter[str]"
) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}/v1", timeout=60) as client:
        while (number := next(numbers)) < requests:
            create = number % 8 == 0
            try:
                if not keeps:
                    status = await _once(port, create)
                elif create:
                    status = (await client.post("/responses", content=CREATE)).status_code
                else:
                    status = (await client.get("/responses", params={"limit": 1})).status_code
                found[str(status)] += 1
            except (OSError, AssertionError, httpx.HTTPError) as error:
                found[f"{'kept' if keeps else 'new'} connection: {error!r}"] += 1


async def roll(
    start: Callable[[Mapping[str, str]], Served], *, requests: int, through_proxy: bool
) -> "tuple[Counter[str], int]":
    """Replies by status or error, and how often the server was replaced; at least once."""
    env = {"REPRISE_REUSE_PORT": "false" if through_proxy else "true"}
    server = await asyncio.to_thread(start, env)
    proxy = Proxy() if through_proxy else None
    if proxy:
        proxy.backends.append(port_of(server))
        port = await proxy.start()
        await proxy.wait_ready(port_of(server))
    else:
        port = port_of(server)
        env["REPRISE_PORT"] = str(port)
    found: Counter[str] = Counter()
    numbers = itertools.count()
    clients = [
        asyncio.create_task(_load(port, numbers, requests, keeps=at % 2 == 0, found=found)) for at in range(CLIENTS)
    ]
    replaced = 0
    while not replaced or not all(task.done() for task in clients):
        new = await asyncio.to_thread(start, env)
        if proxy:
            proxy.backends.append(port_of(new))
            await proxy.wait_ready(port_of(new))
        status = await asyncio.to_thread(server.stop)
        if status != 0:
            found[f"exit status {status}"] += 1
        if proxy:
            proxy.backends.remove(port_of(server))
        server, replaced = new, replaced + 1
    await asyncio.gather(*clients)
    if proxy:
        await proxy.close()
    await asyncio.to_thread(server.stop)
    return found, replaced


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=10_000)
    requests = parser.parse_args().requests
    with (
        tempfile.TemporaryDirectory() as home,
        embedded.start(Path(home), durable=False) as servers,
        Upstream() as upstream,
    ):
        migrate.upgrade(servers.database_url)
        env = {
            "DATABASE_URL": servers.database_url,
            "REDIS_URL": servers.redis_url,
            "OPENAI_BASE_URL": upstream.base_url,
            "REPRISE_DATA_DIR": home,
        }
        for through_proxy in (False, True):
            found, replaced = uvloop.run(
                roll(lambda more: Served({**env, **more}), requests=requests, through_proxy=through_proxy)
            )
            where = "through a proxy" if through_proxy else "directly"
            failed = sum(found.values()) - found["200"]
            print(f"{where}: {failed} failed of {sum(found.values())}, {replaced} restarts: {dict(found)}", flush=True)


if __name__ == "__main__":
    main()
