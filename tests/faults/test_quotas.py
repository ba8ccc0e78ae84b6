"""Quotas while Redis is gone or frozen, and when processes die with places and reservations."""

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import redis

from tests.faults.client import cancel, get
from tests.faults.cluster import LEASE_S, frozen, wired
from tests.servers import Served
from tests.upstream import finish, gate, script, text
from tests.waiting import until

REQUESTS = 30
LIMITS = {"REPRISE_TENANT_REQUESTS_PER_MINUTE": f"{REQUESTS}", "REPRISE_TENANT_CONCURRENT_RUNS": "3"}
TIMEOUT_S = 0.3
ASKED = {"model": "m", "input": "hi"}


@contextlib.contextmanager
def limited(cluster, **env: str) -> Iterator[Served]:
    """A replica whose tenant has limits, which are its own."""
    prefix = f"{cluster.prefix}-{time.monotonic_ns()}"
    more = {**LIMITS, "REPRISE_QUOTA_TIMEOUT_S": f"{TIMEOUT_S}", "REPRISE_REDIS_PREFIX": prefix, **env}
    served = cluster.start_replica(**more)
    try:
        yield served
    finally:
        if served.process.poll() is None:
            served.kill()


def post(served: Served, **more: object) -> httpx.Response:
    return httpx.post(f"{served.url}/responses", json={**ASKED, **more}, timeout=30)


def lines(served: Served, action: str) -> list[str]:
    return [line for line in served.printed if f'"action": "{action}"' in line]


@contextlib.contextmanager
def gone(servers) -> Iterator[None]:
    with servers.without_valkey():
        yield


@contextlib.contextmanager
def silent(servers) -> Iterator[None]:
    with frozen(servers.valkey()):
        yield


@pytest.mark.parametrize("outage", [gone, silent])
def test_without_redis_requests_are_let_through_and_the_log_says_so_once(cluster, outage):
    with limited(cluster) as served:
        until(lambda: post(served).status_code == 429)
        with outage(cluster.servers):
            # What is known to be refused is refused still, until it would have fitted.
            until(lambda: post(served).status_code == 200, timeout_s=60 / REQUESTS + 5)
            begun = time.monotonic()
            replies = [post(served) for _ in range(10)]
            took_s = time.monotonic() - begun
            assert [reply.status_code for reply in replies] == [200] * 10
            assert not any("x-ratelimit-limit-requests" in reply.headers for reply in replies)
            assert took_s < 5 * TIMEOUT_S + 3, "few requests wait for Redis"
            assert len(lines(served, "quotas_down")) == 1
        cluster.servers.wait_valkey()
        until(lambda: "x-ratelimit-limit-requests" in post(served).headers, timeout_s=30)
        assert (len(lines(served, "quotas_down")), len(lines(served, "quotas_up"))) == (1, 1)


@pytest.mark.parametrize("outage", [gone, silent])
def test_without_redis_requests_are_refused_if_the_operator_wants_that(cluster, outage):
    with limited(cluster, REPRISE_QUOTA_OUTAGE="refuse") as served:
        assert post(served).status_code == 200
        with outage(cluster.servers):
            for more in ({}, {"stream": True}, {"background": True}):
                reply = post(served, **more)
                assert (reply.status_code, reply.headers["retry-after"]) == (503, "1"), reply.text
                assert reply.json()["error"]["message"] == (
                    "The quotas can't be checked at the moment; please try again."
                )
            assert httpx.get(f"{served.url}/responses").status_code == 200
            assert len(lines(served, "quotas_down")) == 1
        cluster.servers.wait_valkey()
        until(lambda: post(served).status_code == 200, timeout_s=30)


def test_runs_that_end_while_redis_is_gone_free_their_places_after_a_lease(cluster, upstream, said):
    with limited(cluster, REPRISE_TENANT_REQUESTS_PER_MINUTE="0") as served, ThreadPoolExecutor() as pool:
        asked = script([gate(said), text("ok"), finish()])
        running = [pool.submit(post, served, input=asked) for _ in range(3)]
        until(lambda: len(upstream.asked(asked)) == 3)
        assert post(served).status_code == 429
        with cluster.servers.without_valkey():
            upstream.open(said)
            assert [one.result().status_code for one in running] == [200] * 3
        until(lambda: post(served).status_code == 200, timeout_s=LEASE_S + 20)
        assert [post(served).status_code for _ in range(10)] == [200] * 10


def test_a_background_run_has_its_place_whichever_workers_die_and_frees_it_when_it_ends(cluster, upstream, said):
    env = {"REPRISE_TENANT_REQUESTS_PER_MINUTE": "0", "REPRISE_TENANT_CONCURRENT_RUNS": "1"}
    env["REPRISE_TENANT_TOKENS_PER_MINUTE"] = "1000000"
    with limited(cluster, **env) as served:
        prefix = served.env["REPRISE_REDIS_PREFIX"]
        asked = script([text("so "), gate(said), finish()])
        first = cluster.start_worker(**env, REPRISE_REDIS_PREFIX=prefix)
        others = [worker for worker in cluster.workers if worker is not first]
        for worker in others:
            cluster.kill(worker)
        made = post(served, input=asked, background=True, max_output_tokens=900_000).json()
        upstream.wait_reached(said, 20)
        assert post(served).status_code == 429
        cluster.kill(first)
        second = cluster.start_worker(**env, REPRISE_REDIS_PREFIX=prefix)
        until(lambda: cluster.owner_of(made["id"]) is second, timeout_s=20)
        assert post(served).status_code == 429
        upstream.open(said)
        until(lambda: post(served).status_code == 200, timeout_s=20)
        left = int(post(served).headers["x-ratelimit-remaining-tokens"])
        assert left > 990_000, "what it had reserved is settled"
        cluster.kill(second)
    cluster.ensure()


def test_a_queued_run_that_is_cancelled_elsewhere_gives_back_what_it_has_taken(cluster):
    env = {"REPRISE_TENANT_TOKENS_PER_MINUTE": "1000000", "REPRISE_TENANT_CONCURRENT_RUNS": "1"}
    with limited(cluster, **env) as served:
        prefix = served.env["REPRISE_REDIS_PREFIX"]
        cluster.kill_workers()
        with limited(cluster, **env, REPRISE_REDIS_PREFIX=prefix) as other:
            made = post(served, background=True, max_output_tokens=900_000).json()
            assert post(other).status_code == 429
            assert cancel(other.url, made["id"])["status"] == "cancelled"
            reply = post(other)
            assert reply.status_code == 200
            assert int(reply.headers["x-ratelimit-remaining-tokens"]) > 990_000
    cluster.ensure()


ROOMY = {"REPRISE_TENANT_REQUESTS_PER_MINUTE": "0", "REPRISE_TENANT_TOKENS_PER_MINUTE": "1000000"}
"""A place is what such a tenant lacks; it takes a minute until its tokens are healed."""


def has_all_back(served: Served) -> bool:
    """Whether a run is let through, and nearly no tokens are taken."""
    reply = post(served)
    return reply.status_code == 200 and int(reply.headers.get("x-ratelimit-remaining-tokens", "0")) > 990_000


def test_background_runs_that_postgres_does_not_take_give_back_what_they_have_taken(cluster):
    env = {**ROOMY, "REPRISE_TENANT_CONCURRENT_RUNS": "2", "REPRISE_KEY_CACHE_S": "60"}
    with limited(cluster, **env) as served:
        assert post(served).status_code == 200
        with cluster.servers.without_postgres():
            replies = [post(served, background=True, max_output_tokens=200_000) for _ in range(4)]
            assert [reply.status_code for reply in replies] == [503] * 4
        assert has_all_back(served)
        assert [post(served, background=True).status_code for _ in range(2)] == [200] * 2


def test_a_background_run_of_which_nobody_knows_whether_it_is_stored_has_its_place_if_it_is(cluster):
    cluster.kill_workers()
    env = {**ROOMY, "REPRISE_TENANT_CONCURRENT_RUNS": "1", "REPRISE_DATABASE_RETRY_S": "0.001"}
    with wired(cluster) as (wire, url), limited(cluster, **env, DATABASE_URL=url) as served:
        assert post(served).status_code == 200
        wire.lose_answer_of("COMMIT")
        assert post(served, background=True).status_code == 503
        assert wire.lost == 1
        [run] = cluster.query("select response_id from runs")
        assert [post(served).status_code for _ in range(3)] == [429] * 3
        assert cancel(served.url, run["response_id"])["status"] == "cancelled"
        assert post(served).status_code == 200
    cluster.ensure()


def test_a_background_run_that_ends_while_redis_is_gone_gives_back_what_it_has_taken_once_redis_answers(
    cluster, upstream, said
):
    env = {**ROOMY, "REPRISE_TENANT_CONCURRENT_RUNS": "1", "REPRISE_WORKERS_IN_API": "true"}
    cluster.kill_workers()
    with limited(cluster, **env) as served:
        asked = script([text("so "), gate(said), finish()])
        made = post(served, input=asked, background=True, max_output_tokens=900_000).json()
        upstream.wait_reached(said, 20)
        with cluster.servers.without_valkey():
            upstream.open(said)
            until(lambda: get(served.url, made["id"])["status"] == "completed")
        until(lambda: has_all_back(served), timeout_s=20)
    cluster.ensure()


def test_what_a_frozen_redis_counts_when_it_awakes_is_given_back(cluster):
    lease_s = 20.0
    env = {**ROOMY, "REPRISE_TENANT_CONCURRENT_RUNS": "1", "REPRISE_LEASE_S": str(lease_s)}
    with limited(cluster, **env) as served:
        assert post(served).status_code == 200
        with frozen(cluster.servers.valkey()):
            assert post(served, max_output_tokens=900_000).status_code == 200
            assert lines(served, "quotas_down")
        until(lambda: has_all_back(served), timeout_s=lease_s / 2)


def test_a_background_run_whose_worker_dies_after_the_commit_gives_back_what_it_has_taken(cluster, upstream, said):
    cluster.kill_workers()
    env = {**ROOMY, "REPRISE_TENANT_CONCURRENT_RUNS": "1"}
    with limited(cluster, **env) as served:
        prefix = {"REPRISE_REDIS_PREFIX": served.env["REPRISE_REDIS_PREFIX"]}
        worker = cluster.start_worker(**prefix, REPRISE_QUOTA_TIMEOUT_S="60")
        asked = script([text("so "), gate(said), finish()])
        post(served, input=asked, background=True, max_output_tokens=900_000)
        upstream.wait_reached(said, 20)
        with frozen(cluster.servers.valkey()):
            upstream.open(said)
            until(lambda: cluster.query("select from runs where state = 'sealed'"))
            cluster.kill(worker)
        assert post(served).status_code == 429
        other = cluster.start_worker(**prefix)
        until(lambda: has_all_back(served), timeout_s=20)
        cluster.kill(other)
    cluster.ensure()


def test_a_redis_that_has_lost_its_data_begins_again(cluster):
    with limited(cluster) as served:
        assert post(served).headers["x-ratelimit-remaining-requests"] == f"{REQUESTS - 1}"
        with redis.Redis.from_url(cluster.servers.redis_url) as counted:
            for key in counted.scan_iter(f"{served.env['REPRISE_REDIS_PREFIX']}:quota:*"):
                counted.delete(key)
        assert post(served).headers["x-ratelimit-remaining-requests"] == f"{REQUESTS - 1}"
