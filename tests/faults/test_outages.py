"""Outages that are longer than a lease: no owner has died, so nothing is taken from anyone, and nothing is counted as an attempt."""

import contextlib
import threading
import time
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from app.assembly import WORKER_CONNECTION
from tests import wire_proxy
from tests.faults.client import Follower, begin, call, cancel, get, stream
from tests.faults.cluster import LEASE_S, Cluster, frozen, locked
from tests.faults.stream_oracle import checked_response, closed_as, rounds_of, text_of
from tests.upstream import answer, calling, finish, gate, note, repeat, script, text
from tests.waiting import until
from tests.wire_proxy import WireProxy

ROUNDS = 10
OUTAGE_S = 2.5 * LEASE_S
POOL_SIZE = 10
OVERDUE = f"select 1 from runs where due_at < now() + interval '{LEASE_S} s' * (1 - $1::float8)"
"""Runs whose last heartbeat is so much of a lease ago."""

UNAVAILABLE = {
    "message": "The database is unavailable; please try again.",
    "type": "server_error",
    "param": None,
    "code": None,
}


class Beside:
    """A call that goes on beside its test."""

    def __init__(self, call):
        self._result = []
        self._thread = threading.Thread(target=lambda: self._result.append(call()), daemon=True)
        self._thread.start()

    def join(self):
        self._thread.join(60)
        assert self._result, "not ended"
        return self._result[0]


def streamed(url, said):
    """Every event of a foreground stream."""
    status, events = stream(url, said)
    assert status == 200
    return events


@pytest.fixture
def serving(cluster):
    """Two replicas that also make background runs, and no other worker; what the second can't store it soon says."""
    cluster.kill_workers()
    replicas = [
        cluster.start_replica(REPRISE_WORKERS_IN_API="true", REPRISE_DATABASE_RETRY_S=retry_s)
        for retry_s in ("30", "1")
    ]
    yield replicas
    for replica in replicas:
        if replica.process.poll() is None:
            replica.kill()
    cluster.ensure()


@contextlib.contextmanager
def starved(cluster, serving):
    """Requests of one process wait for a lock, with every connection that it has for them; the other could claim its runs."""
    with locked(cluster.database_url, "responses"):
        body = {"model": "m", "input": script(answer("waited")), "background": True}
        waiting = [
            Beside(lambda: call(serving[0].url, "POST", "/responses", body, timeout_s=60)) for _ in range(POOL_SIZE + 2)
        ]
        yield
    for one in waiting:
        status, _ = one.join()
        assert status in {200, 503}


OUTAGES = {
    "postgres-gone": lambda cluster, _: cluster.servers.without_postgres(),
    "postgres-frozen": lambda cluster, _: frozen(cluster.servers.postgres()),
    "no-connection-left": starved,
    "runs-locked": lambda cluster, _: locked(cluster.database_url, "runs"),
    "everything-frozen": lambda cluster, serving: frozen(
        [*(one.process.pid for one in serving), *cluster.servers.postgres()]
    ),
    "replicas-frozen": lambda _, serving: frozen([one.process.pid for one in serving]),
    "read-only": lambda cluster, _: cluster.servers.read_only(),
}


@pytest.mark.parametrize("outage", OUTAGES)
def test_an_outage_longer_than_a_lease_takes_nothing_from_living_owners(cluster, serving, upstream, box, check, outage):
    talk = [repeat(ROUNDS, text("w{i} ")), gate(f"outage {outage}"), text("end"), finish()]
    parent = call(serving[0].url, "POST", "/responses", {"model": "m", "input": script(answer("parent"))})[1]["id"]
    scripts = {kind: script([note(f"{kind} {outage}"), *talk]) for kind in ("stream", "json")}
    with_call = script([note(outage), *calling("gate", {"name": outage})], [text("called"), finish()])
    tools = [
        {"type": "mcp", "server_label": "box", "server_url": box.url(outage), "require_approval": "never"},
    ]
    streams = [Beside(lambda one=one: streamed(one.url, scripts["stream"])) for one in serving]
    body = {"model": "m", "input": scripts["json"], "previous_response_id": parent}
    jsons = [Beside(lambda one=one: call(one.url, "POST", "/responses", body, timeout_s=60)) for one in serving]
    followers = [Follower(cluster.urls, begin(cluster.urls[0], with_call, tools=tools)) for _ in range(2)]
    box.wait_reached(outage)
    until(lambda: len(box.calls(outage)) == 2, "both calls are sent")
    until(lambda: len(cluster.query("select from runs")) == 6, "every run has its row")
    with OUTAGES[outage](cluster, serving):
        time.sleep(OUTAGE_S)
        if outage not in {"everything-frozen", "replicas-frozen"}:
            box.open(outage)
    begun = time.monotonic()
    until(lambda: time.monotonic() > begun + 1.2 * LEASE_S, "whoever would take something has done so")
    upstream.open(f"outage {outage}")
    box.open(outage)
    for one in streams:
        response = checked_response(one.join())
        assert response["status"] == "completed"
        assert rounds_of(text_of(response)) == list(range(ROUNDS))
        assert get(cluster.urls[0], response["id"]) == response
    for reply in jsons:
        status, response = reply.join()
        assert (status, response["status"]) == (200, "completed")
        assert get(cluster.urls[0], response["id"]) == response
    for follower in followers:
        response = check(follower)
        assert closed_as(follower.seen) == [None, "completed", "completed"]
    assert [len(upstream.asked(said)) for said in (*scripts.values(), with_call)] == [2, 2, 4]


def test_a_run_that_begins_while_a_heartbeat_waits_is_not_taken_for_abandoned(cluster, serving, upstream):
    """The process itself must not take it when the heartbeat that did not know of it is answered at last."""
    alone, other = serving
    other.kill()
    said = {name: script([note(name), text("half"), gate(name), finish()]) for name in ("before", "meanwhile")}
    before = Beside(lambda: streamed(alone.url, said["before"]))
    until(lambda: cluster.query("select 1 from runs"), "its row is there")
    heartbeats = cluster.query(f"select pid from pg_stat_activity where application_name = '{WORKER_CONNECTION}'")
    with frozen([one["pid"] for one in heartbeats]):
        until(lambda: cluster.query(OVERDUE, 0.5), "a heartbeat waits")
        meanwhile = Beside(lambda: streamed(alone.url, said["meanwhile"]))
        until(lambda: len(cluster.query(OVERDUE, 1.1)) == 2, "leases expire")
    until(lambda: not cluster.query(OVERDUE, 1.0), "leases are prolonged")
    for name, reply in (("before", before), ("meanwhile", meanwhile)):
        upstream.open(name)
        assert checked_response(reply.join())["status"] == "completed"


def test_a_reply_that_another_process_has_ended_as_failed_is_an_error(cluster, serving, upstream):
    frozen_one, other = serving
    parent = call(other.url, "POST", "/responses", {"model": "m", "input": script(answer("parent"))})[1]["id"]
    said = script([note("json"), text("half"), gate("json"), finish()])
    body = {"model": "m", "input": said, "previous_response_id": parent}
    waiting = Beside(lambda: call(frozen_one.url, "POST", "/responses", body, timeout_s=60))
    until(lambda: cluster.query("select from runs"), "its row is there")
    with frozen([frozen_one.process.pid]):
        until(lambda: not cluster.query("select from runs"), "the other process has ended it")
        upstream.open("json")
    status, reply = waiting.join()
    died = {**UNAVAILABLE, "message": "The server that made this response has died."}
    assert (status, reply) == (500, {"error": died})


# -- Not now ----------------------------------------------------------------------------------------------------------------

NOT_NOW = ["25006", "53100", "53200", "53400", "40001", "40P01", "55P03", "57014", "58030", "XX000"]


@contextlib.contextmanager
def refusing(cluster, state, *tables):
    """Postgres refuses every write to these tables with an SQLSTATE."""
    cluster.query(
        f"""create or replace function refuse() returns trigger language plpgsql
            as $$ begin raise exception 'not now' using errcode = '{state}'; end $$"""
    )
    for table in tables:
        cluster.query(
            f"create trigger refuse before insert or update or delete on {table} for each statement execute function refuse()"
        )
    try:
        yield
    finally:
        for table in tables:
            cluster.query(f"drop trigger refuse on {table}")


@pytest.mark.parametrize("state", NOT_NOW)
def test_what_postgres_refuses_for_now_is_done_later(cluster, serving, upstream, check, state):
    talk = [repeat(ROUNDS, text("w{i} ")), gate(f"state {state}"), text("end"), finish()]
    foreground, background = (script([note(f"{kind} {state}"), *talk]) for kind in ("front", "back"))
    streaming = Beside(lambda: streamed(serving[0].url, foreground))
    follower = Follower(cluster.urls, begin(cluster.urls[0], background))
    upstream.wait_reached(f"state {state}", 20)
    until(lambda: len(cluster.query("select from runs where state = 'running'")) == 2, "both are being made")
    with refusing(cluster, state, "responses", "event_journal"):
        upstream.open(f"state {state}")
        for more in ({}, {"stream": True}, {"background": True}):
            body = {"model": "m", "input": script([note(f"refused {state}"), *answer("x")]), **more}
            status, reply = call(serving[1].url, "POST", "/responses", body, timeout_s=60)
            assert (status, reply) == (503, {"error": UNAVAILABLE})
    response = checked_response(streaming.join())
    assert response["status"] == "completed"
    check(follower)
    assert closed_as(follower.seen) == ["completed"]
    assert [len(upstream.asked(said)) for said in (foreground, background)] == [1, 1]


def test_an_outage_counts_no_attempt_while_no_owner_has_died(cluster, upstream, check):
    """Its owner gives the run up again and again."""
    cluster.kill_workers()
    said = script([note("no attempt"), *answer("at last")])
    response_id = begin(cluster.urls[0], said)
    follower = Follower(cluster.urls, response_id)
    with refusing(cluster, "53100", "responses"):
        cluster.start_worker(REPRISE_RUN_ATTEMPTS_MAX="1")
        until(lambda: cluster.run_of(response_id)["handed_over"] >= 3, "it was given up three times")
    check(follower)


def test_a_run_that_meets_a_mistake_of_ours_each_time_ends(cluster, upstream):
    """Also with a single worker, which takes it again itself; the mistake is a constraint that no code knows of."""
    cluster.kill_workers()
    said = script([note("mistake"), *answer("never stored")])
    response_id = begin(cluster.urls[0], said)
    cluster.query("alter table responses add constraint mistake check (status <> 'completed') not valid")
    try:
        cluster.start_worker(REPRISE_RUN_ATTEMPTS_MAX="2")
        failed = cluster.ended(response_id, "failed")
    finally:
        cluster.query("alter table responses drop constraint mistake")
    assert failed["error"]["message"] == "The response could not be made: every attempt broke off."
    assert len(upstream.asked(said)) == 2


def test_read_only_postgres_is_an_outage(cluster, serving, upstream, check):
    """As after a failover, while the old primary is still asked."""
    said = script([note("read-only"), text("half "), gate("read-only"), text("said"), finish()])
    streaming = Beside(lambda: streamed(serving[0].url, said))
    upstream.wait_reached("read-only", 20)
    done = call(serving[0].url, "POST", "/responses", {"model": "m", "input": script(answer("done"))})[1]
    until(lambda: cluster.query("select from runs"), "its row is there")
    with cluster.servers.read_only():
        upstream.open("read-only")
        for more in ({}, {"stream": True}, {"background": True}):
            body = {"model": "m", "input": script([note("refused"), *answer("x")]), **more}
            status, reply = call(serving[1].url, "POST", "/responses", body, timeout_s=60)
            assert (status, reply) == (503, {"error": UNAVAILABLE})
        body = {"model": "m", "input": script(answer("made"))}
        unstored = httpx.post(f"{serving[1].url}/responses", json=body, timeout=60)
        assert (unstored.status_code, unstored.headers["x-should-retry"]) == (503, "false")
        assert get(serving[1].url, done["id"]) == done
        assert call(serving[1].url, "DELETE", f"/responses/{done['id']}")[0] == 503
    assert checked_response(streaming.join())["status"] == "completed"
    path = f"/responses/{unstored.headers['x-reprise-response-id']}"
    status, late = until(lambda: (found := call(serving[1].url, "GET", path))[0] == 200 and found, "it is stored late")
    assert (late["status"], late["error"]["message"]) == ("failed", UNAVAILABLE["message"])
    assert text_of(late) == "made"
    assert call(serving[1].url, "GET", f"{path}/input_items")[1]["data"]


# -- Rows that are left over ------------------------------------------------------------------------------------------------

LEFT = """insert into runs (tenant_id, response_id, state, due_at, lease_s, lease, worker, streamed, number_ceiling)
          values ('default', $1, $2, now() - interval '1 second', 1, 1, $3, false, 0)"""


def test_a_sealed_row_without_a_worker_is_cleared(cluster):
    cluster.query(LEFT, "resp_left", "sealed", None)
    until(lambda: not cluster.query("select from runs"), "it is gone")


def test_a_row_whose_last_statement_was_lost_is_cleared_by_its_own_process(cluster, upstream):
    cluster.ensure(workers=1)
    said = script([note("forgotten"), gate("forgotten"), *answer("done")])
    response_id = begin(cluster.urls[0], said, stream=False)
    upstream.wait_reached("forgotten", 20)
    cluster.query("""create function keep_it() returns trigger language plpgsql
                     as $$ begin raise exception 'not now' using errcode = '53100'; end $$""")
    cluster.query("create trigger keep_it before delete on runs for each row execute function keep_it()")
    upstream.open("forgotten")
    cluster.ended(response_id)
    until(lambda: any("run_given_up" in line for line in cluster.workers[0].printed), "the last statement has failed")
    cluster.query("drop trigger keep_it on runs")
    until(lambda: not cluster.query("select from runs"), "its own process, the only one, has cleared it")


def test_a_foreground_row_whose_client_left_while_it_was_inserted_does_not_stay(cluster, serving, upstream):
    """Nobody knows whether a statement that was broken off has been carried out."""
    said = script([note("left"), text("half"), gate("left"), finish()])
    serving[1].kill()
    with locked(cluster.database_url, "branches"), contextlib.suppress(TimeoutError):
        call(serving[0].url, "POST", "/responses", {"model": "m", "input": said, "stream": True}, timeout_s=1)
    upstream.open("left")
    until(lambda: not cluster.query("select from runs"), "nothing is left")


# -- Answers that are lost --------------------------------------------------------------------------------------------------


@pytest.fixture
def tapped(cluster):
    """A replica that reaches Postgres through a proxy, and the proxy."""
    directory = parse_qs(urlsplit(cluster.database_url).query)["host"][0]
    with WireProxy(Path(directory) / ".s.PGSQL.5432", ".s.PGSQL.5432", wire_proxy.postgres) as wire:
        url = cluster.database_url.replace(directory, str(wire.directory))
        replica = cluster.start_replica(DATABASE_URL=url)
        yield replica, wire
        replica.kill()


def test_a_background_create_whose_commit_was_not_answered_is_acknowledged(cluster, tapped, upstream):
    replica, wire = tapped
    said = script([note("unheard"), *answer("made once")])
    wire.lose_answer_of("COMMIT")
    response_id = begin(replica.url, said, stream=False)
    assert wire.lost == 1
    assert text_of(cluster.ended(response_id)) == "made once"
    assert len(upstream.asked(said)) == 1
    assert len(cluster.query("select from responses where body->>'id' = $1", response_id)) == 1


def test_a_stream_whose_row_was_not_acknowledged_goes_on(cluster, tapped):
    replica, wire = tapped
    wire.lose_answer_of("insert into responses")
    response = checked_response(streamed(replica.url, script([note("unheard"), *answer("as if nothing had been")])))
    assert wire.lost == 1
    assert get(cluster.urls[0], response["id"]) == response


def test_a_reply_whose_row_was_not_acknowledged_is_given(cluster, tapped):
    replica, wire = tapped
    wire.lose_answer_of("insert into responses")
    status, response = call(replica.url, "POST", "/responses", {"model": "m", "input": script(answer("whole"))})
    assert (status, wire.lost) == (200, 1)
    assert get(cluster.urls[0], response["id"]) == response


def test_a_delete_whose_commit_was_not_answered_is_acknowledged(cluster, tapped):
    replica, wire = tapped
    made = call(replica.url, "POST", "/responses", {"model": "m", "input": script(answer("x"))})[1]
    wire.lose_answer_of("COMMIT")
    status, reply = call(replica.url, "DELETE", f"/responses/{made['id']}")
    assert (status, wire.lost, reply["deleted"]) == (200, 1, True)
    assert call(cluster.urls[0], "GET", f"/responses/{made['id']}")[0] == 404


def test_a_cancel_whose_decision_was_not_answered_is_carried_out(cluster, tapped, upstream):
    replica, wire = tapped
    said = script([note("undecided"), text("half"), gate("undecided"), finish()])
    response_id = begin(replica.url, said)
    upstream.wait_reached("undecided", 20)
    wire.lose_answer_of("'cancelled'")
    begun = time.monotonic()
    assert cancel(replica.url, response_id)["status"] == "cancelled"
    assert wire.lost == 1
    assert time.monotonic() - begun < LEASE_S, "another process had to end it"


# -- The database's clock ---------------------------------------------------------------------------------------------------

CLOCK = """
create schema shifted;
create table shifted.clock (by interval not null);
insert into shifted.clock values ('0');
create function shifted.now() returns timestamptz stable language sql
    as 'select pg_catalog.now() + by from shifted.clock';
create function shifted.clock_timestamp() returns timestamptz volatile language sql
    as 'select pg_catalog.clock_timestamp() + by from shifted.clock';
"""


@pytest.fixture
def shiftable(own_servers, fault_env):
    """A cluster whose database has a clock that can be set."""
    cluster = Cluster(own_servers, fault_env)
    for statement in CLOCK.split(";\n"):
        if statement.strip():
            cluster.query(statement)
    name = urlsplit(cluster.database_url).path.strip("/")
    cluster.query(f"alter database {name} set search_path = shifted, pg_catalog, public")
    cluster.ensure(workers=2)
    yield cluster
    try:
        cluster.assert_nothing_is_left()
    finally:
        print(cluster.printed)
        cluster.close()


def set_clock(cluster, by):
    cluster.query("update shifted.clock set by = $1::text::interval", by)


def test_a_clock_set_back_by_an_hour_stops_nothing(shiftable, upstream):
    cluster = shiftable
    said = script([repeat(ROUNDS, text("w{i} ")), gate("back"), text("end"), finish()])
    follower = Follower(cluster.urls, begin(cluster.urls[0], said))
    upstream.wait_reached("back", 20)
    cluster.kill_owner(follower.response_id)
    cluster.kill_workers()
    waiting = begin(cluster.urls[0], script([note("waits"), *answer("waited")]), stream=False)
    set_clock(cluster, "-1 hour")
    later = begin(cluster.urls[0], script([note("later"), *answer("later")]), stream=False)
    cluster.ensure(workers=1)
    for response_id in (waiting, later):
        cluster.ended(response_id)
    upstream.open("back")
    begun = time.monotonic()
    response = checked_response(follower.join())
    assert rounds_of(text_of(response)) == list(range(ROUNDS))
    print(f"FIGURE a dead owner's run went on {time.monotonic() - begun:.2f} s after the clock was set back")


@pytest.mark.parametrize("by", ["1 hour", "-1 hour"])
def test_a_clock_that_jumps_takes_nothing_from_living_owners(shiftable, upstream, by):
    cluster = shiftable
    scripts = [
        script([note(f"{by} {n}"), repeat(ROUNDS, text("w{i} ")), gate(f"jump {by}"), finish()]) for n in range(4)
    ]
    followers = [Follower(cluster.urls, begin(cluster.urls[0], said)) for said in scripts]
    for follower in followers:
        follower.wait_events(ROUNDS)
    set_clock(cluster, by)
    begun = time.monotonic()
    until(lambda: time.monotonic() > begun + 2.5 * LEASE_S, "more than two leases have passed")
    upstream.open(f"jump {by}")
    for said, follower in zip(scripts, followers, strict=True):
        assert checked_response(follower.join())["status"] == "completed"
        assert closed_as(follower.seen) == ["completed"]
        assert len(upstream.asked(said)) == 1
