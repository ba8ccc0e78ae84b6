"""Everything that takes part, as processes of its own, and what the kernel says of them."""

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import redis.asyncio as redis

from app import embedded, migrate
from tests.processes import children
from tests.servers import ROOT, Served
from tests.toolserver import Toolprocess

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Target:
    """Something that answers: where, and how one asks it."""

    name: str
    port: int
    path: str
    pids: tuple[int, ...]

    @property
    def is_upstream(self) -> bool:
        """Whether it speaks Chat Completions."""
        return self.name == "upstream"


@dataclass
class Spent:
    """What a stretch of time has cost, in seconds."""

    wall_s: float = 0.0
    server_s: float = 0.0
    postgres_s: float = 0.0
    redis_s: float = 0.0


@dataclass(frozen=True)
class Stage:
    """Who takes part. `server` is one process as `serve` starts it; `replica` and `worker` are a deployment of their own,
    in which API processes make no background runs."""

    upstream: Target
    floor: Target
    libraries: Target
    server: Target
    second: Target
    """One more process on the data of `server`."""
    replica: Target
    worker: int
    home: Path
    database_url: str
    redis_url: str
    fresh: Callable[[], AbstractContextManager[Target]]
    """Starts one more API process beside `replica`, whose memory is still unused."""
    fresh_libraries: Callable[[], AbstractContextManager[Target]]
    """Likewise."""
    tools_url: str
    """An MCP server, with a tool `echo`."""

    @property
    def targets(self) -> tuple[Target, ...]:
        """Those that are compared."""
        return self.upstream, self.floor, self.libraries, self.server

    @asynccontextmanager
    async def spending(self, *pids: int) -> AsyncIterator[Spent]:
        """What the block costs: these processes, Postgres and Redis."""
        groups = (pids, self._postgres(), self._redis())
        spent = Spent()
        before, begun = [_cpu_s(group) for group in groups], time.monotonic()
        yield spent
        spent.wall_s = time.monotonic() - begun
        after = [_cpu_s(group) for group in (pids, self._postgres(), self._redis())]
        spent.server_s, spent.postgres_s, spent.redis_s = (
            late - early for early, late in zip(before, after, strict=True)
        )

    def _postgres(self) -> tuple[int, ...]:
        postmaster = int((self.home / "embedded" / "postgres" / "postmaster.pid").read_text().split()[0])
        return (postmaster, *children(postmaster))

    def _redis(self) -> tuple[int, ...]:
        return (int((self.home / "embedded" / "valkey" / "valkey.pid").read_text()),)

    async def rows(self, sql: str, *arguments: object) -> list[asyncpg.Record]:
        """What `server` has stored."""
        connection = await asyncpg.connect(self.database_url)
        try:
            return await connection.fetch(sql, *arguments)
        finally:
            await connection.close()

    async def redis_connections(self) -> int:
        """How many clients Redis has."""
        async with redis.Redis.from_url(self.redis_url) as client:
            return int((await client.info("clients"))["connected_clients"])


def rss_kb(pid: int) -> int:
    """A process's memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES // 1024


def _cpu_s(pids: tuple[int, ...]) -> float:
    """User and system time together."""
    ticks = 0
    for pid in pids:
        with contextlib.suppress(OSError):  # a backend may have ended by itself
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(int(field) for field in fields[11:13])
    return ticks * TICK_S


@contextmanager
def set_up(home: Path) -> Iterator[Stage]:
    """Start everything, with data in `home`; end it with the block."""
    with contextlib.ExitStack() as stack:
        servers = stack.enter_context(embedded.start(home))
        upstream, upstream_pid = stack.enter_context(_module("tests.bench.upstream", 0))
        floor, floor_pid = stack.enter_context(_module("tests.bench.floor", 0, upstream))
        libraries = stack.enter_context(_libraries(upstream))
        common = {
            "REDIS_URL": servers.redis_url,
            "REPRISE_DATA_DIR": str(home),
            "OPENAI_BASE_URL": f"http://127.0.0.1:{upstream}/v1",
            "REPRISE_OUTBOUND_ALLOW": "127.0.0.1/32",
        }
        one = {**common, "DATABASE_URL": _new_database(servers, "one"), "REPRISE_REDIS_PREFIX": "one"}
        two = {**common, "DATABASE_URL": _new_database(servers, "two"), "REPRISE_REDIS_PREFIX": "two"}
        no_workers = {"REPRISE_WORKERS_IN_API": "false"}
        server = stack.enter_context(Served(one))
        second = stack.enter_context(Served({**one, **no_workers}))
        replica = stack.enter_context(Served({**two, **no_workers}))
        worker = stack.enter_context(Served(two, command="worker"))
        toolserver = stack.enter_context(Toolprocess(home / "calls"))
        yield Stage(
            upstream=Target("upstream", upstream, "/v1/chat/completions", (upstream_pid,)),
            floor=Target("floor", floor, "/v1/responses", (floor_pid,)),
            libraries=libraries,
            server=_target("server", server),
            second=_target("second", second),
            replica=_target("replica", replica),
            worker=worker.process.pid,
            home=home,
            database_url=one["DATABASE_URL"],
            redis_url=servers.redis_url,
            fresh=lambda: _fresh({**two, **no_workers}),
            fresh_libraries=lambda: _libraries(upstream),
            tools_url=toolserver.url(),
        )


@contextmanager
def _fresh(env: Mapping[str, str]) -> Iterator[Target]:
    with Served(env) as served:
        yield _target("fresh", served)


@contextmanager
def _libraries(upstream: int) -> Iterator[Target]:
    with _module("tests.bench.libraries", 0, upstream) as (port, pid):
        yield Target("libraries", port, "/v1/responses", (pid,))


def _target(name: str, served: Served) -> Target:
    port = int(served.url.rpartition(":")[2].partition("/")[0])
    return Target(name, port, "/v1/responses", (served.process.pid,))


@contextmanager
def _module(name: str, *arguments: int) -> Iterator[tuple[int, int]]:
    """A server of ours: its port and its pid."""
    command = [sys.executable, "-m", name, *map(str, arguments)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline()), process.pid
        finally:
            process.kill()


def _new_database(servers: embedded.Embedded, name: str) -> str:
    async def create() -> None:
        connection = await asyncpg.connect(servers.database_url)
        try:
            await connection.execute(f"create database {name}")
        finally:
            await connection.close()

    asyncio.run(create())
    url = servers.database_url.replace("@/postgres?", f"@/{name}?")
    migrate.upgrade(url)
    return url
