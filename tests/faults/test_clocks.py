"""Machines that disagree about the time of day: leases are Postgres's clock, and every pause a monotonic one."""

import time

from tests.faults.client import Follower, begin, get
from tests.faults.cluster import INSIDE, LEASE_S
from tests.faults.stream_oracle import closed_as, rounds_of, text_of
from tests.upstream import finish, gate, repeat, script, text
from tests.waiting import until

HOUR_S = 3600


def shifted(seconds):
    """Settings of a process whose wall clock is wrong by so much."""
    return {**INSIDE, "WALL_CLOCK_SHIFT_S": str(seconds)}


def test_workers_an_hour_apart_neither_steal_nor_wait(cluster, upstream, check):
    cluster.kill_workers()
    replica = cluster.start_replica(**shifted(HOUR_S))
    early = cluster.start_worker(**shifted(-HOUR_S))
    said = script([repeat(5, text("w{i} ")), gate("hours"), text("end"), finish()])
    begun = time.time()
    response_id = begin(replica.url, said)
    follower = Follower([*cluster.urls, replica.url], response_id)
    follower.wait_events(8)
    assert get(replica.url, response_id)["created_at"] > begun + HOUR_S / 2, "the clock is not shifted"
    late = cluster.start_worker(**shifted(HOUR_S))
    watched = time.monotonic()
    until(lambda: time.monotonic() > watched + 2 * LEASE_S, "two leases have passed")
    assert cluster.owner_of(response_id) is early  # to the other's clock, its lease ended an hour ago
    assert len(upstream.asked(said)) == 1
    killed = time.monotonic()
    cluster.kill(early)
    assert until(lambda: cluster.owner_of(response_id) is late, "the other takes over", 3 * LEASE_S)
    print(f"FIGURE taken over across two hours of difference in {time.monotonic() - killed:.2f} s")
    upstream.open("hours")
    response = check(follower)
    assert rounds_of(text_of(response)) == list(range(5))
    assert closed_as(follower.seen) == ["incomplete", "completed"]
    assert response["completed_at"] > begun + HOUR_S / 2  # the late worker's clock: that one is shifted, too
    replica.kill()
