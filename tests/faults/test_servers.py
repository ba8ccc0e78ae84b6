"""Postgres and Redis killed, frozen and emptied under running responses; API replicas killed under their clients."""

import time

import pytest

from tests.faults.client import Follower, begin, call, decoded, frames_of, get
from tests.faults.cluster import LEASE_S, frozen
from tests.faults.stream_oracle import checked_response, closed_as, rounds_of, text_of
from tests.upstream import finish, gate, repeat, script, text
from tests.waiting import until

GONE_S = 10.0
ROUNDS = 60
SLOW = repeat(ROUNDS, text("w{i} "), every_ms=20)


def started(cluster, name, *, workers=1, urls=None):
    """A run that talks on and on, then waits at the gate; a client that follows it."""
    cluster.ensure(workers=workers)
    said = script([SLOW, gate(name), text("end"), finish()])
    response_id = begin(cluster.urls[0], said)
    follower = Follower(urls or cluster.urls, response_id)
    follower.wait_events(10)
    return said, follower


def whole(response):
    """Its text is all there, once."""
    assert rounds_of(text_of(response)) == list(range(ROUNDS))
    assert text_of(response).endswith(" end")


# -- Replicas ---------------------------------------------------------------------------------------------------------------


def test_clients_of_a_killed_replica_resume_on_another(cluster, upstream, check):
    replica = cluster.replicas[0]
    _, follower = started(cluster, "replica", urls=[replica.url])
    others = [Follower([replica.url], follower.response_id) for _ in range(4)]
    for one in others:
        one.wait_events(5)
    cluster.kill(replica)
    for one in (follower, *others):
        one.urls[:] = [cluster.replicas[1].url]
    cluster.ensure(workers=1)
    upstream.open("replica")
    for one in (follower, *others):
        whole(check(one))
        assert one.cuts >= 1
    assert closed_as(follower.seen) == ["completed"]


# -- Postgres ---------------------------------------------------------------------------------------------------------------


def test_postgres_killed_and_restarted_in_mid_run(cluster, upstream, check):
    _, follower = started(cluster, "postgres")
    cluster.servers.kill_postgres()
    upstream.open("postgres")
    whole(check(follower))


@pytest.mark.parametrize("lease_share", [0.5, 2.5], ids=["shorter-than-the-lease", "longer-than-the-lease"])
def test_postgres_frozen_in_mid_run(cluster, upstream, check, lease_share):
    name = f"frozen{lease_share}"
    _, follower = started(cluster, name, workers=2)
    with frozen(cluster.servers.postgres()):
        time.sleep(lease_share * LEASE_S)
    upstream.open(name)
    whole(check(follower))
    if lease_share < 1:
        assert closed_as(follower.seen) == ["completed"]


def test_a_run_that_ends_while_postgres_is_frozen_ends_when_it_is_back(cluster, upstream, check):
    said, follower = started(cluster, "ending")
    follower.wait_events(ROUNDS)
    with frozen(cluster.servers.postgres()):
        upstream.open("ending")
        asked = upstream.asked(said)[0]
        assert asked.closed.wait(5)  # the upstream has said all
        assert b"response.completed" not in follower.frames[-1]
        time.sleep(LEASE_S)
    whole(check(follower))


def test_postgres_gone_for_many_leases(cluster, upstream, check):
    """No heartbeat: every owner falls silent, for anybody may have its lease. New responses are refused, not lost. As soon as
    Postgres is back whoever comes first goes on: the owner, or another with the turn made anew."""
    _, ending = started(cluster, "gone-end", workers=2)
    _, talking = started(cluster, "gone-talk", workers=2)
    begun = time.monotonic()
    with cluster.servers.without_postgres():
        upstream.open("gone-end")
        assert call(cluster.urls[0], "POST", "/responses", {"model": "m", "input": "x", "background": True})[0] == 503
        assert call(cluster.urls[1], "GET", f"/responses/{ending.response_id}")[0] == 503
        time.sleep(begun + GONE_S - time.monotonic())
        silent_since = max(ending.arrived[-1], talking.arrived[-1])
        assert silent_since < begun + LEASE_S
    back = time.monotonic()
    upstream.open("gone-talk")
    for follower in (ending, talking):
        whole(check(follower))
        assert closed_as(follower.seen) in (["completed"], ["incomplete", "completed"])
    resumed = min(at for at in (*ending.arrived, *talking.arrived) if at > silent_since)
    print(f"FIGURE Postgres gone for {GONE_S:g} s: the next event {resumed - back:.2f} s after it was back")


# -- Redis ------------------------------------------------------------------------------------------------------------------


def test_redis_killed_and_restarted_with_its_data(cluster, upstream, check):
    _, follower = started(cluster, "restart")
    cluster.servers.kill_valkey()
    cluster.servers.wait_valkey()
    upstream.open("restart")
    whole(check(follower))
    assert closed_as(follower.seen) == ["completed"]


def test_redis_killed_and_restarted_without_its_data(cluster, upstream, check):
    _, follower = started(cluster, "bare")
    with cluster.servers.without_valkey():
        cluster.servers.forget_valkey()
    upstream.open("bare")
    whole(check(follower))
    assert closed_as(follower.seen) == ["completed"]


def test_redis_emptied_while_the_worker_lives(cluster, upstream, check):
    _, follower = started(cluster, "emptied")
    cluster.servers.redis.flushall()
    late = Follower(cluster.urls, follower.response_id)
    until(lambda: len(late.frames) > ROUNDS, "a new reader gets it all")
    cluster.servers.redis.flushall()
    upstream.open("emptied")
    whole(check(follower))
    whole(check(late))
    assert closed_as(follower.seen) == ["completed"]


def test_an_entry_of_somebody_else_is_no_new_owner(cluster, upstream, check):
    """Its id is greater than all of ours, so that Redis takes nothing more behind it."""
    said, follower = started(cluster, "foreign")
    [key] = cluster.servers.redis.scan_iter(f"*{follower.response_id}*")
    cluster.servers.redis.xadd(key, {"hello": "there"})
    upstream.open("foreign")
    whole(check(follower))
    assert closed_as(follower.seen) == ["completed"]
    assert len(upstream.asked(said)) == 1


def test_redis_emptied_and_the_worker_killed_is_the_one_announced_jump(cluster, upstream, check):
    said, follower = started(cluster, "double", workers=2)
    owner = cluster.owner_of(follower.response_id)
    with frozen([owner.process.pid]):  # it may not repair what is emptied now
        cluster.servers.redis.flushall()
        cluster.kill(owner)
    until(lambda: len(upstream.asked(said)) == 2, "another has it")
    upstream.open("double")
    response = check(follower, jumps=1)
    whole(response)
    late = frames_of(cluster.urls[0], follower.response_id)
    assert closed_as([decoded(frame) for frame in late]) == ["completed"]
    assert frames_of(cluster.urls[1], follower.response_id, after=7) == late[2:]


def test_a_second_crash_after_the_jump_loses_nothing_more(cluster, upstream, check):
    said, follower = started(cluster, "triple", workers=2)
    owner = cluster.owner_of(follower.response_id)
    with frozen([owner.process.pid]):
        cluster.servers.redis.flushall()
        cluster.kill(owner)
    until(lambda: len(upstream.asked(said)) == 2, "another has it")
    follower.wait_events(len(follower.frames) + 10)
    cluster.kill_owner(follower.response_id)
    cluster.start_worker()
    upstream.open("triple")
    whole(check(follower, jumps=1))


def test_a_restarted_redis_and_a_killed_worker(cluster, upstream, check):
    """Whether the restart has lost the last events can't be known: they are given up, and that is said."""
    said, follower = started(cluster, "both", workers=2)
    owner = cluster.owner_of(follower.response_id)
    with frozen([owner.process.pid]):
        cluster.servers.kill_valkey()
        cluster.kill(owner)
    cluster.servers.wait_valkey()
    until(lambda: len(upstream.asked(said)) == 2, "another has it")
    upstream.open("both")
    whole(check(follower, jumps=1))


def test_redis_frozen_for_longer_than_a_lease(cluster, upstream, check):
    said, follower = started(cluster, "icy", workers=2)
    with frozen(cluster.servers.valkey()):
        time.sleep(2 * LEASE_S)
    upstream.open("icy")
    whole(check(follower))
    assert closed_as(follower.seen) == ["completed"]  # Redis is no reason to lose a lease
    assert len(upstream.asked(said)) == 1


def test_without_redis_runs_begin_end_and_are_followed(cluster, upstream, check):
    with frozen(cluster.servers.valkey()):
        begun = time.monotonic()
        _, follower = started_without_redis(cluster, "away")
        print(f"FIGURE acknowledged without Redis in {time.monotonic() - begun:.2f} s")
        upstream.open("away")
        seen = follower.join()
    assert checked_response(seen)["status"] == "completed"
    check(follower)


def started_without_redis(cluster, name):
    said = script([repeat(5, text("w{i} ")), gate(name), text("end"), finish()])
    response_id = begin(cluster.urls[0], said)
    return said, Follower(cluster.urls, response_id)


def test_a_redis_that_was_away_is_left_with_no_stream_for_ever(cluster, upstream, check):
    _, follower = started(cluster, "ttl")
    follower.wait_events(ROUNDS)
    with frozen(cluster.servers.valkey()):
        upstream.open("ttl")
        cluster.ended(follower.response_id)
    check(follower)
    assert get(cluster.urls[1], follower.response_id)["status"] == "completed"
    assert cluster.servers.redis.ttl(cluster.key(follower.response_id)) != -1


def test_redis_gone_for_ten_seconds(cluster, upstream, check):
    """Runs begin, go on and end without it, item by item for their readers; no lease is lost, no number jumps."""
    ending, ends = started(cluster, "lost-end", workers=2)
    talking, talks = started(cluster, "lost-talk", workers=2)
    begun = time.monotonic()
    with cluster.servers.without_valkey():
        upstream.open("lost-end")
        assert checked_response(ends.join())["status"] == "completed"
        beginning, begins = started_without_redis(cluster, "lost-begin")
        upstream.open("lost-begin")
        assert checked_response(begins.join())["status"] == "completed"
        print(f"FIGURE without Redis one run ended and another was made within {time.monotonic() - begun:.2f} s")
        time.sleep(begun + GONE_S - time.monotonic())
    back = time.monotonic()
    talks.wait_events(ROUNDS)
    print(
        f"FIGURE Redis gone for {GONE_S:g} s: its readers caught up {time.monotonic() - back:.2f} s after it was back"
    )
    upstream.open("lost-talk")
    for said, follower in ((ending, ends), (talking, talks), (beginning, begins)):
        check(follower)
        assert closed_as(follower.seen) == ["completed"]
        assert len(upstream.asked(said)) == 1
