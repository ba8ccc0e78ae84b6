"""Many runs and many clients that come and go leave nothing behind: looked at from outside, but for the asyncio tasks."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from msgspec import Struct

from app.settings import Settings
from app.storage.redisclient import CONNECTIONS_MAX
from tests.faults.client import Follower, begin, cancel
from tests.faults.cluster import INSIDE
from tests.upstream import finish, note, repeat, script, text
from tests.waiting import until

RUNS = 60
"""Of one wave. The first one fills pools and caches."""

WAVES = 2


class Footprint(Struct, frozen=True):
    """What a replica and a worker hold."""

    tasks: int
    files: int
    """Without the connections to the upstream, which are kept open for a while."""
    redis_connections: int
    postgres_connections: int


def tasks_of(process):
    """Its asyncio tasks, in its own words."""
    told = len([line for line in process.printed if line.startswith("TASKS")])
    os.kill(process.process.pid, signal.SIGUSR1)
    lines = until(
        lambda: [line for line in list(process.printed) if line.startswith("TASKS")][told:], "it counts its tasks"
    )
    return int(lines[0].split()[1])


def footprint(cluster, upstream, *processes):
    activity = "select from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
    return Footprint(
        tasks=sum(tasks_of(one) for one in processes),
        files=sum(len(list(Path(f"/proc/{one.process.pid}/fd").iterdir())) for one in processes)
        - len(upstream.connections),
        redis_connections=len(cluster.servers.redis.client_list()),
        postgres_connections=len(cluster.query(activity)),
    )


def wave(cluster, url, number):
    """Runs whose clients leave at the first event; every second one comes back, and leaves again; every fifth is cancelled."""
    said = [
        script([note(f"wave {number}/{at}"), repeat(30, text("w{i} "), every_ms=3), finish()]) for at in range(RUNS)
    ]
    with ThreadPoolExecutor(16) as pool:
        ids = list(pool.map(lambda one: begin(url, one), said))
        followers = [Follower([url], id, drops=3, seed=at) for at, id in enumerate(ids[::2])]
        list(pool.map(lambda id: cancel(url, id), ids[::5]))
    for follower in followers:
        follower.join()
    for id in ids:
        cluster.ended(id, None)
    until(lambda: not cluster.query("select from runs"), "every run is forgotten")
    keys = [cluster.key(id) for id in ids]
    until(lambda: not cluster.servers.redis.exists(*keys), "their keys have gone from Redis")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_nothing_grows(cluster, upstream):
    cluster.kill_workers()
    worker = cluster.start_worker(**INSIDE, REPRISE_EVENT_TTL_S="0.3")
    replica = cluster.start_replica(**INSIDE, REPRISE_EVENT_TTL_S="0.3")
    wave(cluster, replica.url, 0)
    before = footprint(cluster, upstream, replica, worker)
    for number in range(1, WAVES):
        wave(cluster, replica.url, number)
    until(lambda: tasks_of(replica) + tasks_of(worker) <= before.tasks, "no task is left")
    after = footprint(cluster, upstream, replica, worker)
    print(f"FIGURE {RUNS * (WAVES - 1)} more runs: {before} -> {after}")
    pools = 2 * (CONNECTIONS_MAX + Settings().database_pool_size)  # they open connections as they are needed
    assert after.files - before.files <= pools < RUNS
    assert after.redis_connections - before.redis_connections <= 2 * CONNECTIONS_MAX
    assert after.postgres_connections - before.postgres_connections <= 2 * Settings().database_pool_size
    replica.kill()
