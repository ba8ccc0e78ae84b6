"""The upstream fails, stalls or never ends under a background run: the response ends as failed, with what was said."""

import time

import pytest

from tests.faults.client import Follower, begin, cancel
from tests.faults.cluster import frozen
from tests.faults.stream_oracle import rounds_of, text_of
from tests.upstream import answer, cut, finish, forever, gate, note, repeat, script, stall, text
from tests.waiting import until


def test_an_upstream_that_breaks_off_fails_the_response_and_keeps_its_part(cluster, check):
    response_id = begin(cluster.urls[0], script([repeat(5, text("w{i} ")), cut(reset=True)]))
    response = check(Follower(cluster.urls, response_id), status="failed")
    assert response["error"]["code"] == "server_error"
    assert rounds_of(text_of(response)) == list(range(5))
    assert response["output"][0]["status"] == "incomplete"


def test_an_upstream_that_stalls_fails_the_response(cluster, upstream, check):
    cluster.kill_workers()
    cluster.start_worker(REPRISE_UPSTREAM_IDLE_TIMEOUT_S="0.3")
    said = script([repeat(5, text("w{i} ")), stall()])
    response = check(Follower(cluster.urls, begin(cluster.urls[0], said)), status="failed")
    assert rounds_of(text_of(response)) == list(range(5))
    (asked,) = upstream.asked(said)
    assert asked.closed.wait(5)


def test_a_run_that_takes_too_long_fails(cluster, upstream, check):
    cluster.kill_workers()
    cluster.start_worker(REPRISE_RUN_DURATION_MAX_S="0.5")
    said = script([note("too long"), forever(text("w{i} "))])
    response = check(Follower(cluster.urls, begin(cluster.urls[0], said)), status="failed")
    assert "REPRISE_RUN_DURATION_MAX_S" in response["error"]["message"]
    rounds = rounds_of(text_of(response))
    assert rounds == list(range(len(rounds)))
    (asked,) = upstream.asked(said)
    assert asked.closed.wait(5)


@pytest.mark.parametrize(("limit", "most"), [("REPRISE_RUN_OUTPUT_BYTES_MAX", 20_000), ("REPRISE_RUN_EVENTS_MAX", 60)])
def test_a_run_that_says_too_much_fails(cluster, check, limit, most):
    cluster.kill_workers()
    cluster.start_worker(**{limit: str(most)})
    said = script([note(limit), forever(text("w{i} "))])
    response = check(Follower(cluster.urls, begin(cluster.urls[0], said)), status="failed")
    assert limit in response["error"]["message"]
    rounds = rounds_of(text_of(response))
    assert rounds == list(range(len(rounds)))


def test_a_long_request_is_no_output_of_its_run(cluster, check):
    """The first events repeat the request, and so does the last: what limits a run must not refuse what was accepted."""
    cluster.kill_workers()
    cluster.start_worker(REPRISE_RUN_OUTPUT_BYTES_MAX="20000")
    said = script([note("long"), *answer("Short.")])
    response_id = begin(cluster.urls[0], said, instructions="Be brief. " * 5_000)
    assert text_of(check(Follower(cluster.urls, response_id))) == "Short."


def test_nothing_personal_is_kept_of_an_ended_run(cluster, upstream, check):
    """The request and the caller's key leave the queue with the seal, even before the row itself goes."""
    said = script([repeat(5, text("w{i} ")), gate("secrets"), finish()])
    response_id = begin(cluster.urls[0], said, key="sk-of-the-caller")
    upstream.wait_reached("secrets", 20)
    row = cluster.run_of(response_id)
    assert "secrets" in row["request"]
    assert row["secrets"] is not None
    assert "sk-of-the-caller" not in row["secrets"]
    with frozen(cluster.servers.valkey()):  # the last event can't go out: the row stays, sealed
        upstream.open("secrets")
        row = until(lambda: sealed(cluster, response_id), "the row is sealed")
    assert (row["request"], row["secrets"]) == (None, None)
    check(Follower(cluster.urls, response_id))
    until(lambda: cluster.run_of(response_id) is None, "the row goes")


def sealed(cluster, response_id):
    row = cluster.run_of(response_id)
    return row if row["state"] == "sealed" else None


def test_a_cancelled_run_leaves_its_upstream(cluster, upstream, check):
    said = script([note("left"), forever(text("w{i} "))])
    response_id = begin(cluster.urls[0], said)
    follower = Follower(cluster.urls, response_id)
    follower.wait_events(10)
    begun = time.monotonic()
    assert cancel(cluster.urls[1], response_id)["status"] == "cancelled"
    (asked,) = upstream.asked(said)
    assert asked.closed.wait(5)
    print(f"FIGURE the upstream was let go after {(asked.closed_s - begun) * 1000:.0f} ms")
    response = check(follower, status="cancelled")
    rounds = rounds_of(text_of(response))
    assert rounds == list(range(len(rounds)))
