"""Usage through faults: a run counts once, whoever ends it, and however often that is tried."""

import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.faults.client import begin, call, cancel, get
from tests.faults.cluster import locked, wired
from tests.upstream import calling, finish, gate, note, script, text, usage
from tests.waiting import until

WAITS = "select from pg_locks where not granted and relation = 'usage_ledger'::regclass"
SAID = [text("whole"), finish(), usage(700, 11)]


def used(cluster, model):
    """What is counted for a model that a test has for itself: runs, input tokens, output tokens."""
    status, page = call(cluster.urls[0], "GET", f"/usage?model={model}")
    assert status == 200, page
    return [(row["runs"], row["input_tokens"], row["output_tokens"]) for row in page["data"]]


@pytest.fixture
def tapped(cluster):
    """A replica that makes background runs, too, and reaches Postgres through a proxy; and the proxy."""
    with wired(cluster) as (wire, url):
        replica = cluster.start_replica(DATABASE_URL=url, REPRISE_WORKERS_IN_API="true", REPRISE_POLL_S="60")
        yield replica, wire
        replica.kill()


def test_a_run_whose_worker_is_killed_between_the_model_s_end_and_the_commit_counts_once(cluster, upstream):
    cluster.ensure(workers=2)
    said = script([text("half "), gate("usage"), *SAID])
    response_id = begin(cluster.urls[0], said, model="killed")
    upstream.wait_reached("usage", 20)
    with locked(cluster.database_url, "usage_ledger"):
        owner = cluster.owner_of(response_id)
        upstream.open("usage")
        until(lambda: cluster.query(WAITS), "it waits to commit")
        cluster.kill(owner)
        until(lambda: len(upstream.asked(said)) == 2, "another makes the turn again")
    made = cluster.ended(response_id)
    assert used(cluster, "killed") == [(1, 700, 11)]
    assert (made["usage"]["input_tokens"], made["usage"]["output_tokens"]) == (700, 11)


def test_what_earlier_owners_have_used_counts(cluster, upstream, box):
    """The first turn is checkpointed, and not made again."""
    cluster.ensure(workers=2)
    said = script([*calling("add", {"a": 1, "b": 2}), usage(100, 5)], [text("half "), gate("second"), *SAID])
    tool = {"type": "mcp", "server_label": "box", "server_url": box.url("usage"), "require_approval": "never"}
    response_id = begin(cluster.urls[0], said, model="earlier", tools=[tool])
    upstream.wait_reached("second", 20)
    cluster.kill_owner(response_id)
    upstream.open("second")
    assert cluster.ended(response_id)["usage"]["input_tokens"] == 800
    assert used(cluster, "earlier") == [(1, 800, 16)]
    assert cluster.query("select tool_calls from usage_ledger where model = 'earlier'") == [{"tool_calls": 1}]


def test_what_earlier_owners_have_used_counts_towards_the_limits_of_the_run(cluster, upstream, box):
    cluster.ensure(workers=2)
    turn = [*calling("add", {"a": 1, "b": 2}), usage(100, 5)]
    said = script([note("limits"), *turn], [gate("limits"), *turn], calling("add", {"a": 1, "b": 2}))
    tool = {"type": "mcp", "server_label": "box", "server_url": box.url("limits"), "require_approval": "never"}
    response_id = begin(
        cluster.urls[0], said, model="limits", tools=[tool], run_limits={"tokens": 260, "tool_calls": 9}
    )
    upstream.wait_reached("limits", 20)
    cluster.kill_owner(response_id)
    upstream.open("limits")
    made = cluster.ended(response_id, status="incomplete")
    assert made["incomplete_details"] == {"reason": "max_run_tokens"}
    assert (made["usage"]["total_tokens"], len(upstream.asked(said))) == (210, 3)
    assert used(cluster, "limits") == [(1, 200, 10)]


def test_calls_that_earlier_owners_have_made_count_towards_the_limit(cluster, upstream, box):
    cluster.ensure(workers=2)
    said = script(
        [note("calls"), *calling("add", {"a": 1, "b": 2})],
        [gate("calls"), *calling("add", {"a": 3, "b": 4}, id="call_2")],
    )
    tool = {"type": "mcp", "server_label": "box", "server_url": box.url("calls"), "require_approval": "never"}
    response_id = begin(cluster.urls[0], said, model="calls", tools=[tool], run_limits={"tool_calls": 1})
    upstream.wait_reached("calls", 20)
    cluster.kill_owner(response_id)
    upstream.open("calls")
    made = cluster.ended(response_id, status="incomplete")
    assert made["incomplete_details"] == {"reason": "max_tool_calls"}
    assert len([call for call in box.calls("calls") if call["tool"] == "add"]) == 1


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("unstored", {"store": False}),
        ("stored", {}),
        ("streamed", {"stream": True}),
        ("unstored-stream", {"store": False, "stream": True}),
    ],
)
def test_a_run_whose_commit_was_not_answered_counts_once(cluster, tapped, name, body):
    replica, wire = tapped
    if name == "streamed":  # it is inserted first, and its end is another statement
        wire.lose_answer_of("update responses set status")
    else:
        wire.lose_answer_of("insert into usage_ledger")
    make(replica.url, script(SAID), model=name, **body)
    assert wire.lost == 1
    until(lambda: used(cluster, name), "it is counted")
    assert used(cluster, name) == [(1, 700, 11)]


def make(url, said, *, model, **more):
    """A foreground run, to its end."""
    reply = httpx.post(f"{url}/responses", json={"model": model, "input": said, **more}, timeout=30)
    assert reply.status_code == 200, reply.text
    if more.get("stream"):
        assert "response.completed" in reply.text


def test_a_background_run_whose_commit_was_not_answered_counts_once(cluster, tapped, upstream):
    replica, wire = tapped
    cluster.kill_workers()
    response_id = begin(replica.url, script([text("half "), gate("unheard"), *SAID]), model="background")
    upstream.wait_reached("unheard", 20)
    wire.lose_answer_of("COMMIT")
    upstream.open("unheard")
    cluster.ended(response_id)
    assert wire.lost == 1
    assert used(cluster, "background") == [(1, 700, 11)]
    until(lambda: not cluster.query("select from runs"), "its last event is sent")


def test_a_foreground_run_whose_process_died_counts_once(cluster, upstream):
    replica = cluster.start_replica()
    said = script([text("half "), gate("dead"), *SAID])
    with ThreadPoolExecutor() as pool:
        pool.submit(make, replica.url, said, model="dead", stream=True)
        upstream.wait_reached("dead", 20)
        until(lambda: cluster.query("select from runs where request is null"), "its row is inserted")
        cluster.kill(replica)
    upstream.open("dead")
    until(lambda: used(cluster, "dead"), "another process has ended it")
    assert used(cluster, "dead") == [(1, 0, 0)]


def test_a_run_that_is_cancelled_while_it_ends_counts_once(cluster, upstream):
    for number in range(10):
        said = script([note(f"close {number}"), text("half "), gate(f"counted{number}"), *SAID])
        response_id = begin(cluster.urls[0], said, model=f"race{number}")
        upstream.wait_reached(f"counted{number}", 20)
        upstream.open(f"counted{number}")
        time.sleep(number * 0.001)  # from before the end to behind it
        with ThreadPoolExecutor() as pool:
            list(pool.map(cancel, cluster.urls, [response_id] * 2))
        spent = get(cluster.urls[0], response_id)["usage"]
        assert used(cluster, f"race{number}") == [(1, 700, 11) if spent else (1, 0, 0)]


def test_a_run_that_is_not_stored_is_delivered_while_postgres_is_away_and_counted_later(cluster, upstream):
    said = script([text("half "), gate("away"), *SAID])
    with ThreadPoolExecutor() as pool:
        made = pool.submit(make, cluster.urls[0], said, model="away", store=False)
        upstream.wait_reached("away", 20)
        with cluster.servers.without_postgres():
            upstream.open("away")
            made.result(20)
    until(lambda: used(cluster, "away"), "it is counted")
    assert used(cluster, "away") == [(1, 700, 11)]
