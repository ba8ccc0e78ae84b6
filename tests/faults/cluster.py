"""Real processes for faults: API replicas, workers, and a Postgres and a Valkey that no other test uses."""

import asyncio
import contextlib
import os
import random
import shutil
import signal
import time
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import asyncpg
import redis

from app import embedded, migrate
from tests import wire_proxy
from tests.faults.client import get
from tests.forked import IMPORT_FIRST
from tests.processes import children, runs
from tests.servers import Served
from tests.waiting import until
from tests.wire_proxy import WireProxy

LEASE_S = 1.5
POLL_S = 0.2

INSIDE = {IMPORT_FIRST: "tests.faults.inside"}
"""Settings of a process that is to be looked into, or lied to."""


HESITATES_S = 0.3
"""With FAULTS_SEED in the environment every fault comes up to so much later than its test asks for."""

_SEED = os.environ.get("FAULTS_SEED")
_CHANCE = random.Random(_SEED)


def hesitate() -> None:
    """Let the next fault come at another moment than in the last round."""
    if _SEED is not None:
        time.sleep(_CHANCE.uniform(0, HESITATES_S))


class Servers:
    """The embedded pair, as something that can be killed and frozen."""

    def __init__(self, data_dir: Path) -> None:
        self._running = embedded.start(data_dir, durable=False)
        self._home = data_dir.resolve() / "embedded"
        self.redis_url = self._running.redis_url
        self.redis = redis.Redis.from_url(self.redis_url)

    def close(self) -> None:
        """Give them back."""
        self.redis.close()
        self._running.close()

    def new_database(self) -> str:
        """An empty database with the tables; gives its URL."""
        name = f"faults_{uuid.uuid4().hex}"
        query(self._running.database_url, f"create database {name}")
        url = self._running.database_url.replace("@/postgres?", f"@/{name}?")
        migrate.upgrade(url)
        return url

    def postgres(self) -> list[int]:
        """The postmaster, and every process of it."""
        postmaster = int((self._home / "postgres" / "postmaster.pid").read_text().split()[0])
        return [postmaster, *children(postmaster)]

    def valkey(self) -> list[int]:
        """Valkey's process."""
        return [int((self._home / "valkey" / "valkey.pid").read_text())]

    def kill_postgres(self) -> None:
        """Kill -9 of the postmaster; its supervisor starts another."""
        hesitate()
        os.kill(self.postgres()[0], signal.SIGKILL)

    def kill_valkey(self) -> None:
        """Kill -9; its supervisor starts it again, with its append-only file."""
        hesitate()
        (pid,) = self.valkey()
        os.kill(pid, signal.SIGKILL)

    @contextlib.contextmanager
    def without_postgres(self) -> Iterator[None]:
        """Refuse connections for the duration of the block; then it recovers."""
        with frozen([self._supervisor]):
            running = self.postgres()
            self.kill_postgres()
            until(lambda: not any(map(runs, running)), "also those are gone that still served a connection")
            yield
        self.wait_postgres()

    @contextlib.contextmanager
    def read_only(self) -> Iterator[None]:
        """Postgres takes no writes for the duration of the block, as a standby."""
        self._set_read_only("on")
        try:
            yield
        finally:
            self._set_read_only("off")

    def _set_read_only(self, value: str) -> None:
        url = self._running.database_url
        query(url, f"alter system set default_transaction_read_only = {value}")
        query(url, "select pg_reload_conf()")
        until(
            lambda: query(url, "show default_transaction_read_only")[0]["default_transaction_read_only"] == value, value
        )

    @contextlib.contextmanager
    def without_valkey(self) -> Iterator[None]:
        """Refuse connections for the duration of the block; then it comes back with its append-only file."""
        with frozen([self._supervisor]):
            self.kill_valkey()
            yield
        self.wait_valkey()

    def forget_valkey(self) -> None:
        """Remove its data, while it is gone."""
        shutil.rmtree(self._home / "valkey" / "appendonlydir")

    @property
    def _supervisor(self) -> int:
        """Who would start them again at once."""
        return int((self._home / "supervisor").read_text())

    def wait_valkey(self) -> None:
        """Wait until it answers."""
        until(self._pings, "Valkey answers")

    def wait_postgres(self) -> None:
        """Wait until it answers."""
        until(self._selects, "Postgres answers")

    def _selects(self) -> bool:
        try:
            return bool(query(self._running.database_url, "select 1"))
        except (OSError, asyncpg.PostgresError):
            return False

    def _pings(self) -> bool:
        try:
            return bool(self.redis.ping())
        except redis.RedisError:
            return False


@contextlib.contextmanager
def frozen(pids: list[int]) -> Iterator[None]:
    """SIGSTOP for the duration of the block, for those that still run: backends of Postgres come and go."""
    hesitate()
    try:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def locked(url: str, table: str) -> Iterator[None]:
    """Lock a table against writes, but not against reads."""
    loop = asyncio.new_event_loop()
    connection = loop.run_until_complete(asyncpg.connect(url))
    try:
        loop.run_until_complete(connection.execute(f"begin; lock table {table} in share mode"))
        yield
    finally:
        loop.run_until_complete(connection.close())
        loop.close()


@contextlib.contextmanager
def wired(cluster: "Cluster") -> Iterator[tuple[WireProxy, str]]:
    """A proxy to the cluster's Postgres, and the URL of the database through it."""
    directory = parse_qs(urlsplit(cluster.database_url).query)["host"][0]
    with WireProxy(Path(directory) / ".s.PGSQL.5432", ".s.PGSQL.5432", wire_proxy.postgres) as wire:
        yield wire, cluster.database_url.replace(directory, str(wire.directory))


def query(url: str, statement: str, *arguments: Any) -> list[dict[str, Any]]:
    """The rows of a statement, over a connection of its own."""

    async def fetch() -> list[dict[str, Any]]:
        connection = await asyncpg.connect(url, timeout=10)
        try:
            return [dict(row) for row in await connection.fetch(statement, *arguments)]
        finally:
            await connection.close()

    return asyncio.run(fetch())


class Cluster:
    """Two API replicas that make nothing themselves, and as many workers as a test asks for."""

    def __init__(self, servers: Servers, env: Mapping[str, str], **more: str) -> None:
        """`more` are settings of every process."""
        self.servers = servers
        self.database_url = servers.new_database()
        self.prefix = f"faults-{uuid.uuid4().hex}"
        self._env = {
            **env,
            "DATABASE_URL": self.database_url,
            "REDIS_URL": servers.redis_url,
            "REPRISE_REDIS_PREFIX": self.prefix,
            "REPRISE_LEASE_S": str(LEASE_S),
            "REPRISE_POLL_S": str(POLL_S),
            "REPRISE_REDIS_TIMEOUT_S": "1",
            **more,
        }
        self.replicas: list[Served] = []
        self._workers: list[Served] = []
        self._odd: set[str] = set()
        self._dead: list[Served] = []

    # -- Processes --------------------------------------------------------------------------------------------------------

    @property
    def urls(self) -> list[str]:
        """Where the replicas listen."""
        return [replica.url for replica in self.replicas]

    def ensure(self, *, replicas: int = 2, workers: int = 1) -> None:
        """Let so many of each live, with the cluster's own settings."""
        self.replicas = [replica for replica in self.replicas if replica.process.poll() is None]
        for odd in [worker for worker in self.workers if worker.url in self._odd]:
            self.kill(odd)
        for superfluous in self.workers[workers:]:
            self.kill(superfluous)
        with ThreadPoolExecutor() as pool:  # a start takes a second, mostly of imports
            served = [pool.submit(self._start_replica) for _ in range(replicas - len(self.replicas))]
            for _ in range(workers - len(self.workers)):
                pool.submit(self.start_worker)
        self.replicas += [one.result() for one in served]

    @property
    def workers(self) -> list[Served]:
        """The workers that live."""
        return [worker for worker in self._workers if worker.process.poll() is None]

    def start_worker(self, **env: str) -> Served:
        """One more worker; one with settings of its own does not outlive its test."""
        worker = Served({**self._env, **env}, command="worker")
        self._workers.append(worker)
        if env:
            self._odd.add(worker.url)
        return worker

    def start_replica(self, **env: str) -> Served:
        """A replica with settings of its own; the caller ends it."""
        replica = self._start_replica(**env)
        self._dead.append(replica)
        return replica

    def _start_replica(self, **env: str) -> Served:
        return Served({**self._env, "REPRISE_WORKERS_IN_API": "false", **env})

    def kill(self, process: Served) -> None:
        """Kill -9."""
        hesitate()
        process.kill()
        self._dead.append(process)

    def kill_workers(self) -> None:
        """Kill -9 of every worker."""
        for worker in self.workers:
            self.kill(worker)

    def owner_of(self, response_id: str) -> Served:
        """The worker that makes a response now."""
        return until(lambda: self._owner(response_id), f"a worker has {response_id}")

    def _owner(self, response_id: str) -> Served | None:
        rows = self.query("select worker from runs where response_id = $1 and state = 'running'", response_id)
        names = {str(row["worker"]) for row in rows}
        return next((worker for worker in self.workers if worker.url.split()[-1] in names), None)

    def kill_owner(self, response_id: str) -> None:
        """Kill -9 of the worker that makes a response now."""
        self.kill(self.owner_of(response_id))

    def close(self) -> None:
        """Kill all that lives."""
        for process in (*self.replicas, *self._workers, *self._dead):
            if process.process.poll() is None:
                process.kill()

    @property
    def processes(self) -> list[Served]:
        """All that there were."""
        return list(dict.fromkeys((*self.replicas, *self._workers, *self._dead)))

    @property
    def printed(self) -> str:
        """The output of every process, for a failed test."""
        output = []
        for process in self.processes:
            output += [f"--- {process.url.strip()}\n", *process.printed[-40:]]
        return "".join(output)

    # -- State ------------------------------------------------------------------------------------------------------------

    def query(self, statement: str, *arguments: Any) -> list[dict[str, Any]]:
        """Rows of this cluster's database."""
        return query(self.database_url, statement, *arguments)

    def run_of(self, response_id: str) -> dict[str, Any] | None:
        """The row in the queue."""
        rows = self.query("select * from runs where response_id = $1", response_id)
        return rows[0] if rows else None

    def key(self, response_id: str) -> str:
        """The name of a response's stream in Redis."""
        return f"{self.prefix}:events:{response_id}"

    def ended(self, response_id: str, status: str | None = "completed") -> dict[str, Any]:
        """The response once it has ended, in that way."""

        def look() -> dict[str, Any] | None:
            response = get(self.urls[0], response_id)
            return response if response["status"] not in {"queued", "in_progress"} else None

        response = until(look, f"{response_id} has ended", 40)
        assert status in {None, response["status"]}, response
        return response

    def assert_nothing_is_left(self, timeout_s: float = 10) -> None:
        """No run, no journal, no stream without an end of its days."""
        self.servers.wait_valkey()  # a test may be over while it still reads its file
        until(lambda: not self.query("select from runs"), "every run is forgotten", timeout_s)
        assert self.query("select response_id from event_journal") == []
        assert self.query("select id from responses where status in ('queued', 'in_progress')") == []
        keys = list(self.servers.redis.scan_iter(f"{self.prefix}:*"))
        assert [key for key in keys if self.servers.redis.ttl(key) == -1] == [], "streams that never expire"
