"""The limits of the queue, and the fair share between tenants."""

import time

import pytest

from app.storage import keys
from tests.faults.client import begin, call
from tests.faults.cluster import Cluster
from tests.upstream import answer, finish, gate, note, repeat, script, text
from tests.waiting import until


def add_tenant(cluster, name):
    """A tenant, whose key is `key-<name>`."""
    cluster.query("insert into tenants (id) values ($1)", name)
    key = (keys.digest(f"key-{name}"), f"key_{name}", name)
    cluster.query("insert into keys (hash, id, tenant_id, name) values ($1, $2, $3, '')", *key)


@pytest.fixture(scope="module")
def tenanted(own_servers, fault_env):
    """A cluster of its own with three tenants, and small limits."""
    cluster = Cluster(own_servers, fault_env, REPRISE_QUEUED_RUNS_TENANT_MAX="5", REPRISE_QUEUED_RUNS_MAX="8")
    for name in ("one", "two", "three"):
        add_tenant(cluster, name)
    cluster.ensure(replicas=1, workers=0)
    yield cluster
    cluster.close()


def post(cluster, key, said="hello"):
    body = {"model": "m", "input": said, "background": True}
    return call(cluster.replicas[0].url, "POST", "/responses", body, key=f"key-{key}")


def drained(cluster):
    return not cluster.query("select from runs")


def test_a_full_queue_refuses_with_429(tenanted):
    assert [post(tenanted, "one")[0] for _ in range(6)] == [200] * 5 + [429]  # the tenant's own share
    assert [post(tenanted, "two")[0] for _ in range(4)] == [200] * 3 + [429]  # all of it
    status, refused = post(tenanted, "three")
    assert (status, refused["error"]["code"]) == (429, "rate_limit_exceeded")
    tenanted.start_worker(REPRISE_WORKER_RUNS_MAX="2")
    until(lambda: drained(tenanted), "the queue is worked off")
    assert post(tenanted, "one")[0] == 200
    until(lambda: drained(tenanted), "the queue is worked off")
    tenanted.kill_workers()


def test_a_worker_makes_no_more_than_its_share_at_once(tenanted, upstream):
    said = [script([text("x"), gate("share"), note(str(number)), finish()]) for number in range(5)]
    for one in said:
        assert post(tenanted, "one", one)[0] == 200
    tenanted.start_worker(REPRISE_WORKER_RUNS_MAX="2")
    upstream.wait_reached("share", 20)
    until(lambda: sum(len(upstream.asked(one)) for one in said) == 2, "two are asked for")
    beats = tenanted.query("select max(due_at) as due_at from runs where state = 'running'")[0]["due_at"]
    until(lambda: tenanted.query("select from runs where state = 'running' and due_at > $1", beats), "it beats")
    assert sum(len(upstream.asked(one)) for one in said) == 2
    upstream.open("share")
    until(lambda: drained(tenanted), "the queue is worked off")
    tenanted.kill_workers()


def test_a_tenant_with_one_run_does_not_wait_behind_a_hundred(own_servers, fault_env, upstream):
    cluster = Cluster(own_servers, fault_env)
    try:
        for name in ("many", "few"):
            add_tenant(cluster, name)
        cluster.ensure(replicas=1, workers=0)
        url = cluster.replicas[0].url
        crowd = script([note("crowd"), repeat(3, text("w{i} "), every_ms=5), finish()])
        for _ in range(100):
            begin(url, crowd, key="key-many", stream=False)
        single = script([note("single"), *answer("first")])
        begin(url, single, key="key-few", stream=False)
        cluster.start_worker(REPRISE_WORKER_RUNS_MAX="4")
        begun = time.monotonic()
        until(lambda: upstream.asked(single), "the single run starts")
        before = len(upstream.asked(crowd))
        print(f"FIGURE {before} of 100 runs of another tenant came first ({time.monotonic() - begun:.2f} s)")
        assert before < 20
        until(lambda: drained(cluster), "the queue is worked off", 40)
        cluster.assert_nothing_is_left()
    finally:
        cluster.close()
