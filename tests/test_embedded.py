"""The private servers of app/embedded.py, with real processes that are really killed."""

import asyncio
import contextlib
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import asyncpg
import pytest
import redis

from app import embedded
from tests.processes import children, command
from tests.waiting import until

ROOT = Path(embedded.__file__).parents[1]
CLIENT = """
import sys
from pathlib import Path
from app import embedded
servers = embedded.start(Path(sys.argv[1]), durable=False)
print(servers.database_url, servers.redis_url, flush=True)
sys.stdin.read()
"""


class Client:
    """Another process that holds a lease until its stdin is closed or it is killed."""

    def __init__(self, data_dir: Path) -> None:
        command = [sys.executable, "-c", CLIENT, str(data_dir)]
        self.process = subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def urls(self) -> tuple[str, str]:
        assert self.process.stdout is not None
        database_url, redis_url = self.process.stdout.readline().split()
        return database_url, redis_url

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def data_dir(tmp_path: Path) -> Iterator[Path]:
    """A data directory whose servers have stopped by the end of the test."""
    yield tmp_path / "data"
    until(lambda: not any(running(lock) for lock in (tmp_path / "data" / "embedded").glob("*.lock")))


def running(lock: Path) -> bool:
    """Whether a server holds its lock."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def query(database_url: str, *statements: str) -> object:
    """Run the statements on one connection; the value of the last."""

    async def run() -> object:
        connection = await asyncpg.connect(database_url)
        try:
            for statement in statements[:-1]:
                await connection.execute(statement)
            return await connection.fetchval(statements[-1])
        finally:
            await connection.close()

    return asyncio.run(run())


def identity(database_url: str, redis_url: str) -> tuple[object, object]:
    """What tells one run of the two servers from another."""
    with redis.Redis.from_url(redis_url) as valkey:
        return query(database_url, "SELECT pg_postmaster_start_time()"), valkey.info("server")["run_id"]


def valkey_run(servers: tuple[str, str]) -> object:
    """Which run of Valkey answers, if one does."""
    with contextlib.suppress(redis.ConnectionError), redis.Redis.from_url(servers[1]) as valkey:
        return valkey.info("server")["run_id"]
    return None


def listening(servers: tuple[str, str]) -> bool:
    """Whether one of the two servers still listens."""
    valkey = Path(servers[1].removeprefix("unix://"))
    return any(connects(path) for path in (valkey, valkey.with_name(".s.PGSQL.5432")))


def connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as peer:
        return peer.connect_ex(str(path)) == 0


def pids(data_dir: Path) -> dict[str, int]:
    home = data_dir / "embedded"
    files = {"supervisor": "supervisor", "postgres": "postgres/postmaster.pid", "valkey": "valkey/valkey.pid"}
    # A file that is being written again is empty for a moment.
    texts = {name: until(lambda file=file: (home / file).read_text().split()) for name, file in files.items()}
    return {name: int(words[0]) for name, words in texts.items()}


def test_data_survive_close_and_start(data_dir: Path) -> None:
    """What both servers were told in one run they still know in the next, and they are configured to remember."""
    with embedded.start(data_dir) as first:
        query(first.database_url, "CREATE TABLE kept (x int)", "INSERT INTO kept VALUES (7) RETURNING x")
        with redis.Redis.from_url(first.redis_url) as valkey:
            valkey.set("kept", "8")
            assert valkey.config_get("appendonly") == {"appendonly": "yes"}
            assert valkey.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        before = identity(first.database_url, first.redis_url)
    until(lambda: not listening((first.database_url, first.redis_url)))
    with embedded.start(data_dir) as second:
        assert query(second.database_url, "SELECT x FROM kept") == 7
        assert (
            query(second.database_url, "SELECT current_setting('synchronous_commit') || current_setting('fsync')")
            == "onon"
        )
        with redis.Redis.from_url(second.redis_url) as valkey:
            assert valkey.get("kept") == b"8"
        after = identity(second.database_url, second.redis_url)
    assert before[0] != after[0]
    assert before[1] != after[1]


def test_two_processes_share_one_pair(data_dir: Path) -> None:
    """A second process attaches to the running servers, and they outlive the first."""
    first = Client(data_dir)
    shared = identity(*first.urls())
    with embedded.start(data_dir) as mine:
        assert identity(mine.database_url, mine.redis_url) == shared
        first.kill()
        assert identity(mine.database_url, mine.redis_url) == shared


def test_servers_stop_when_their_only_client_is_killed(data_dir: Path) -> None:
    """Nobody has to say goodbye: the kernel gives the lease back."""
    client = Client(data_dir)
    servers = client.urls()
    assert listening(servers)
    client.kill()
    until(lambda: not listening(servers))


def test_servers_stop_when_their_directory_is_removed(tmp_path: Path) -> None:
    """Whoever throws the data away, be it under their feet, leaves no process behind."""
    client = Client(tmp_path / "data")
    client.urls()
    left = pids(tmp_path / "data")
    shutil.rmtree(tmp_path / "data")
    until(lambda: not any(map(alive, left.values())))
    client.kill()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_killed_servers_come_back_while_a_client_stays(data_dir: Path) -> None:
    """The supervisor starts what was killed, and a supervisor that was killed is replaced by one that adopts the servers."""
    with embedded.start(data_dir, durable=False) as first:
        before = identity(first.database_url, first.redis_url)
        os.kill(pids(data_dir)["supervisor"], signal.SIGKILL)
        with embedded.start(data_dir, durable=False):
            assert identity(first.database_url, first.redis_url) == before
        os.kill(pids(data_dir)["postgres"], signal.SIGKILL)
        os.kill(pids(data_dir)["valkey"], signal.SIGKILL)
        until(lambda: not listening((first.database_url, first.redis_url)))
        with embedded.start(data_dir, durable=False) as second:
            after = identity(second.database_url, second.redis_url)
    assert before[0] != after[0]
    assert before[1] != after[1]


def test_a_killed_supervisor_has_a_successor_at_once(data_dir: Path) -> None:
    """It keeps the servers alive, and stops them after the last client; also the successor's successor."""
    client = Client(data_dir)
    servers = client.urls()
    before = identity(*servers)
    supervisor_file = data_dir / "embedded" / "supervisor"
    for _ in range(3):
        killed = pids(data_dir)["supervisor"]
        os.kill(killed, signal.SIGKILL)
        until(lambda killed=killed: (supervisor_file.read_text() or f"{killed}\n") != f"{killed}\n")
        assert identity(*servers) == before
    os.kill(pids(data_dir)["valkey"], signal.SIGKILL)
    until(lambda: valkey_run(servers) not in {None, before[1]})
    assert identity(*servers)[0] == before[0]
    client.kill()
    until(lambda: not listening(servers))


def test_servers_stop_when_their_supervisor_and_their_only_client_are_killed(data_dir: Path) -> None:
    """Nothing is left running for the next start to find."""
    client = Client(data_dir)
    servers = client.urls()
    os.kill(pids(data_dir)["supervisor"], signal.SIGKILL)
    client.kill()
    until(lambda: not listening(servers))
    until(lambda: not running(data_dir / "embedded" / "supervisor"))


def test_a_killed_deputy_has_a_successor(data_dir: Path) -> None:
    """There is always one process more than needed."""
    client = Client(data_dir)
    servers = client.urls()
    supervisor = pids(data_dir)["supervisor"]
    [deputy] = deputies(supervisor)
    os.kill(deputy, signal.SIGKILL)
    until(lambda: any(successor != deputy for successor in deputies(supervisor)))
    os.kill(supervisor, signal.SIGKILL)
    client.kill()
    until(lambda: not listening(servers))


def deputies(supervisor: int) -> list[int]:
    """Children of a supervisor that are no servers."""
    return [pid for pid in children(supervisor) if "app.embedded" in command(pid)]


def test_recovers_when_everything_was_killed_and_its_pids_were_reused(data_dir: Path) -> None:
    """Committed rows and written keys are there again, whoever has the old pids and whatever sockets lie around."""
    client = Client(data_dir)
    database_url, redis_url = client.urls()
    query(database_url, "CREATE TABLE kept (x int)", "INSERT INTO kept VALUES (7) RETURNING x")
    with redis.Redis.from_url(redis_url) as valkey:
        valkey.set("kept", "8")
    for pid in pids(data_dir).values():
        os.kill(pid, signal.SIGKILL)
    client.kill()
    sockets = Path(parse_qs(urlsplit(database_url).query)["host"][0])
    for pid_file in (data_dir / "embedded" / "postgres" / "postmaster.pid", sockets / ".s.PGSQL.5432.lock"):
        pid_file.write_text("\n".join([str(os.getpid()), *pid_file.read_text().splitlines()[1:]]) + "\n")
    with embedded.start(data_dir, durable=False) as servers:
        assert query(servers.database_url, "SELECT x FROM kept") == 7
        with redis.Redis.from_url(servers.redis_url) as valkey:
            assert valkey.get("kept") == b"8"


def test_simultaneous_cold_starts_share_one_pair(data_dir: Path) -> None:
    """Eight processes that find nothing start one Postgres and one Valkey between them."""
    clients = [Client(data_dir) for _ in range(8)]
    try:
        assert len({identity(*client.urls()) for client in clients}) == 1
    finally:
        for client in clients:
            client.kill()


def test_only_the_servers_that_are_used_are_started(data_dir: Path) -> None:
    with embedded.start(data_dir, servers=frozenset({embedded.VALKEY}), durable=False) as first:
        assert not embedded.exists(data_dir, embedded.POSTGRES)
        with redis.Redis.from_url(first.redis_url) as client:
            valkey = client.info("server")["run_id"]
        with embedded.start(data_dir, servers=frozenset({embedded.POSTGRES}), durable=False) as second:
            assert query(second.database_url, "select 1") == 1
        # A killed supervisor's successor keeps what runs, used or not.
        os.kill(pids(data_dir)["supervisor"], signal.SIGKILL)
        postgres = pids(data_dir)["postgres"]
        with embedded.start(data_dir, durable=False) as third:
            assert identity(third.database_url, third.redis_url)[1] == valkey
        assert pids(data_dir)["postgres"] == postgres


def test_long_and_odd_paths_work(tmp_path: Path) -> None:
    """A path that no socket can have is fine for the data; the sockets then live elsewhere and are removed."""
    data_dir = tmp_path / "with space, comma & ümlaut" / ("long" * 25)
    with embedded.start(data_dir, durable=False) as servers:
        identity(servers.database_url, servers.redis_url)
        sockets = Path(servers.redis_url.removeprefix("unix://")).parent
        assert not sockets.is_relative_to(tmp_path)
        assert sockets.stat().st_mode & 0o777 == 0o700
    until(lambda: not sockets.exists())


def test_refuses_a_directory_that_is_not_ours(tmp_path: Path) -> None:
    """A link, which another user could have put where the private directory belongs, is not followed."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "embedded").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(embedded.EmbeddedError, match="not a directory of this user"):
        embedded.start(tmp_path)


def test_data_of_another_postgres_are_refused_in_one_line(tmp_path: Path) -> None:
    """The supervisor's reason for giving up reaches the caller, in place of a timeout."""
    (tmp_path / "embedded" / "postgres").mkdir(parents=True)
    (tmp_path / "embedded" / "postgres" / "PG_VERSION").write_text("9\n")
    with pytest.raises(embedded.EmbeddedError, match=r"is of Postgres 9, installed is .*18") as caught:
        embedded.start(tmp_path)
    assert "\n" not in str(caught.value)
