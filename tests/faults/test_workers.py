"""kill -9, SIGSTOP and SIGTERM of workers: another goes on, nothing is lost, nothing is said twice."""

import contextlib
import signal
import time

import pytest

from app.domain.compaction import Compacted, message_of
from app.settings import Settings
from app.setup import compaction_prompt
from app.wire.items import InputText, Message
from tests.faults.client import ENDED_S, Follower, begin, get
from tests.faults.cluster import frozen, locked
from tests.faults.stream_oracle import closed_as, rounds_of, text_of
from tests.upstream import answer, finish, gate, note, reasoning, repeat, script, text, usage
from tests.upstream import call as tool_call
from tests.waiting import until

PHASES = {
    "before-the-first-event": [],
    "mid-text": [repeat(20, text("w{i} "))],
    "mid-reasoning": [repeat(20, reasoning("r{i} "))],
    "mid-arguments": [tool_call("get_weather", '{"city": "', id="call_1")],
    "behind-a-whole-item": [repeat(5, reasoning("r{i} ")), repeat(20, text("w{i} "))],
}
ENDS = {"mid-arguments": [tool_call(arguments='Oslo"}'), finish("tool_calls")]}
TOOLS = [{"type": "function", "name": "get_weather", "parameters": {"type": "object"}}]
EVENTS = {"before-the-first-event": 3, "behind-a-whole-item": 16}
"""Until there are so many, the moment has not come; elsewhere an item is open with the fifth."""


@pytest.mark.parametrize("phase", PHASES)
def test_a_worker_killed_at_any_moment_is_replaced(cluster, upstream, check, phase):
    cluster.ensure(workers=2)
    said = script([*PHASES[phase], gate(phase), *ENDS.get(phase, [text("end"), finish()])])
    response_id = begin(cluster.urls[0], said, tools=TOOLS)
    follower = Follower(cluster.urls, response_id)
    upstream.wait_reached(phase, 20)
    follower.wait_events(EVENTS.get(phase, 5))
    owner = cluster.owner_of(response_id)
    killed = time.monotonic()
    cluster.kill(owner)
    upstream.open(phase)
    response = check(follower)
    resumed = next(at for at, event in zip(follower.arrived, follower.seen, strict=True) if at > killed)
    print(f"FIGURE recovery {phase} {resumed - killed:.2f} s")
    assert len(upstream.asked(said)) == 2
    match phase:
        case "mid-arguments":
            assert [item["arguments"] for item in response["output"]] == ['{"city": "Oslo"}']
        case "mid-text":
            assert rounds_of(text_of(response)) == list(range(20))
        case "behind-a-whole-item":  # its reasoning is made anew with the rest of the turn
            assert [item["type"] for item in response["output"]] == ["reasoning", "message"]
            assert rounds_of(text_of({"output": response["output"][1:]})) == list(range(20))
    if phase == "before-the-first-event":
        assert closed_as(follower.seen) == ["completed"]
    else:
        assert closed_as(follower.seen).count("incomplete") == 1
        assert all(item["status"] == "completed" for item in response["output"])


def test_a_queued_response_waits_for_any_worker(cluster, check):
    cluster.kill_workers()
    response_id = begin(cluster.urls[0], script(answer("Hello there")))
    follower = Follower(cluster.urls, response_id)
    follower.wait_for("response.queued")
    assert get(cluster.urls[1], response_id)["status"] == "queued"
    cluster.start_worker()
    assert text_of(check(follower)) == "Hello there"


def test_two_owners_killed_one_after_the_other(cluster, upstream, check):
    cluster.ensure(workers=2)
    said = script([repeat(10, text("w{i} ")), gate("twice"), text("end"), finish()])
    response_id = begin(cluster.urls[0], said)
    follower = Follower(cluster.urls, response_id)
    for attempt in (1, 2):
        until(lambda attempt=attempt: len(upstream.asked(said)) == attempt, "the upstream is asked again")
        until(lambda attempt=attempt: len(deltas(follower)) == 10 * attempt, "the text has come again")
        cluster.kill_owner(response_id)
        if attempt == 1:
            cluster.start_worker()
    upstream.open("twice")
    cluster.ensure(workers=1)
    response = check(follower)
    assert closed_as(follower.seen) == ["incomplete", "incomplete", "completed"]
    assert rounds_of(text_of(response)) == list(range(10))


def deltas(follower):
    return [frame for frame in list(follower.frames) if b"output_text.delta" in frame[:60]]


def test_a_run_that_kills_its_workers_fails_at_last(cluster, upstream, check):
    cluster.kill_workers()
    said = script([repeat(5, text("w{i} ")), gate("poison"), finish()])
    response_id = begin(cluster.urls[0], said)
    follower = Follower(cluster.urls, response_id)
    for attempt in (1, 2, 3):
        worker = cluster.start_worker(REPRISE_RUN_ATTEMPTS_MAX="2")
        if attempt < 3:
            until(lambda attempt=attempt: len(deltas(follower)) == 5 * attempt, "the text has come again")
            cluster.kill(worker)
    response = check(follower, status="failed")
    assert response["error"]["code"] == "server_error"
    assert rounds_of(text_of(response)) == list(range(5))
    assert len(upstream.asked(said)) == 2
    upstream.open("poison")


def test_a_worker_killed_between_the_commit_and_the_last_event(cluster, upstream, check):
    cluster.ensure(workers=2)
    said = script([repeat(5, text("w{i} ")), gate("commit"), text("end"), finish()])
    response_id = begin(cluster.urls[0], said)
    follower = Follower(cluster.urls, response_id)
    until(lambda: len(deltas(follower)) == 5, "the text has come")
    with frozen(cluster.servers.valkey()):
        owner = cluster.owner_of(response_id)
        upstream.open("commit")
        until(lambda: cluster.run_of(response_id)["state"] == "sealed", "the row is sealed")
        cluster.kill(owner)
    check(follower)
    until(lambda: cluster.run_of(response_id) is None, "another worker has done the rest")
    entries = cluster.servers.redis.xrange(cluster.key(response_id))
    assert b"".join(fields.get(b"e", b"") for _, fields in entries) == b"".join(f + b"\n\n" for f in follower.frames)
    assert cluster.servers.redis.ttl(cluster.key(response_id)) > 0
    assert len(upstream.asked(said)) == 1


def test_a_worker_killed_between_the_last_item_and_the_commit(cluster, upstream, check):
    """The turn is made anew: a model must not be asked to go on behind an answer that was complete."""
    cluster.ensure(workers=2)
    said = script([repeat(5, reasoning("r{i} ")), repeat(5, text("w{i} ")), gate("last"), text("end"), finish()])
    response_id = begin(cluster.urls[0], said)
    follower = Follower(cluster.urls, response_id)
    until(lambda: len(deltas(follower)) == 5, "the text has come")
    with locked(cluster.database_url, "event_archive"):  # where the commit ends up, and no item before it
        owner = cluster.owner_of(response_id)
        upstream.open("last")
        waiting = "select from pg_locks where not granted and relation = 'event_archive'::regclass"
        until(lambda: cluster.query(waiting), "it waits to commit")
        cluster.kill(owner)
        until(lambda: len(upstream.asked(said)) == 2, "another makes the turn anew")
    response = check(follower)
    assert closed_as(follower.seen) == ["completed", "incomplete", "completed", "completed"]
    assert [item["type"] for item in response["output"]] == ["reasoning", "message"]


def test_a_worker_killed_between_the_close_of_a_partial_and_its_next_attempt(cluster, upstream, check):
    """What was closed for the next attempt is no part of what that one goes on from, whoever makes it."""
    cluster.ensure(workers=2)
    said = script([repeat(5, text("w{i} ")), gate("closed"), text("end"), finish()])
    response_id = begin(cluster.urls[0], said)
    follower = Follower(cluster.urls, response_id)
    until(lambda: len(deltas(follower)) == 5, "the text has come")
    with locked(cluster.database_url, "responses"):  # which the next attempt begins with, and no item is written to
        cluster.kill_owner(response_id)
        waiting = "select from pg_locks where not granted and relation = 'responses'::regclass"
        until(lambda: cluster.query(waiting), "its successor has closed the partial item, and waits to begin")
        cluster.kill_workers()
    cluster.ensure(workers=1)
    upstream.open("closed")
    response = check(follower)
    assert closed_as(follower.seen) == ["incomplete", "completed"]
    assert [item["type"] for item in response["output"]] == ["message"]
    assert len(upstream.asked(said)) == 2


def test_nothing_of_a_zombie_is_visible(cluster, upstream, check):
    cluster.ensure(workers=2)
    said = script([repeat(10, text("w{i} ")), gate("zombie"), repeat(10, text("v{i} ")), gate("zombie2"), finish()])
    response_id = begin(cluster.urls[0], said)
    follower = Follower(cluster.urls, response_id)
    until(lambda: len(deltas(follower)) == 10, "the text has come")
    zombie = cluster.owner_of(response_id)
    with frozen([zombie.process.pid]):
        until(lambda: len(deltas(follower)) == 20, "another worker has taken over")
        assert cluster.owner_of(response_id) is not zombie
        upstream.open("zombie")
        until(lambda: len(deltas(follower)) == 30, "it goes on")
    first, second = upstream.asked(said)
    assert first.closed.wait(10)  # the zombie has noticed, and let go of its upstream
    assert not second.closed.is_set()
    upstream.open("zombie2")
    check(follower)
    assert closed_as(follower.seen) == ["incomplete", "completed"]
    assert any("run_fenced" in line for line in list(zombie.printed))


def test_a_zombie_is_silent_even_if_nobody_can_refuse_it(cluster, upstream, check):
    """Redis has lost the marker that keeps it out, and Postgres can't tell it: its own clock must."""
    cluster.ensure(workers=2)
    said = script([repeat(10, text("w{i} ")), gate("fence"), repeat(10, text("v{i} ")), gate("fence2"), finish()])
    response_id = begin(cluster.urls[0], said)
    follower = Follower(cluster.urls, response_id)
    until(lambda: len(deltas(follower)) == 10, "the text has come")
    zombie = cluster.owner_of(response_id)
    with frozen([zombie.process.pid]):
        until(lambda: len(deltas(follower)) == 20, "another worker has taken over")
        successor = cluster.owner_of(response_id)
        upstream.open("fence")
        until(lambda: len(deltas(follower)) == 30, "it goes on")
        frozen_servers = contextlib.ExitStack()
        frozen_servers.enter_context(frozen([successor.process.pid]))  # nor does the owner put its marker back
        frozen_servers.enter_context(frozen(cluster.servers.postgres()))
        cluster.servers.redis.flushall()
    with frozen_servers:
        ends = time.monotonic() + 0.5
        while time.monotonic() < ends:
            assert cluster.servers.redis.xrange(cluster.key(response_id)) == []
    upstream.open("fence2")
    check(follower)


def test_a_sigterm_lets_a_run_finish(cluster, upstream, check):
    said = script([repeat(5, text("w{i} ")), gate("grace"), text("end"), finish()])
    response_id = begin(cluster.urls[0], said)
    follower = Follower(cluster.urls, response_id)
    until(lambda: len(deltas(follower)) == 5, "the text has come")
    (worker,) = cluster.workers
    worker.process.send_signal(signal.SIGTERM)
    until(lambda: any("worker_draining" in line for line in list(worker.printed)), "it drains")
    later = begin(cluster.urls[0], script(answer("later"), [note("grace")]))
    upstream.open("grace")
    check(follower)
    assert worker.process.wait(20) == 0
    assert closed_as(follower.seen) == ["completed"]
    assert get(cluster.urls[0], later)["status"] == "queued"  # it has claimed no more
    cluster.start_worker()
    cluster.ended(later)


def test_a_sigterm_hands_a_long_run_over_at_once(cluster, upstream, check):
    cluster.kill_workers()
    first = cluster.start_worker(REPRISE_SHUTDOWN_GRACE_S="0.1", REPRISE_LEASE_S="60")
    said = script([repeat(5, text("w{i} ")), gate("over"), text("end"), finish()])
    response_id = begin(cluster.urls[0], said)
    follower = Follower(cluster.urls, response_id)
    until(lambda: len(deltas(follower)) == 5, "the text has come")
    cluster.start_worker()
    told_at = time.monotonic()
    first.process.send_signal(signal.SIGTERM)
    until(lambda: len(upstream.asked(said)) == 2, "another has it, long before the lease ends", 10)
    print(f"FIGURE handover {time.monotonic() - told_at:.2f} s")
    upstream.open("over")
    check(follower)
    assert first.process.wait(20) == 0
    assert closed_as(follower.seen) == ["incomplete", "completed"]


def test_a_run_is_handed_over_more_often_than_it_may_be_attempted(cluster, upstream, check):
    """Rolling deploys are no crashes: only owners that died are counted."""
    cluster.kill_workers()
    patience = {"REPRISE_RUN_ATTEMPTS_MAX": "1", "REPRISE_SHUTDOWN_GRACE_S": "0"}
    said = script([repeat(5, text("w{i} ")), gate("deploys"), text("end"), finish()])
    response_id = begin(cluster.urls[0], said)
    follower = Follower(cluster.urls, response_id)
    for deploy in (1, 2, 3):
        worker = cluster.start_worker(**patience)
        until(lambda deploy=deploy: len(deltas(follower)) == 5 * deploy, "the text has come again")
        assert worker.stop() == 0
    cluster.start_worker(**patience)
    until(lambda: len(upstream.asked(said)) == 4, "another has it")
    upstream.open("deploys")
    response = check(follower)
    assert rounds_of(text_of(response)) == list(range(5))
    assert closed_as(follower.seen) == ["incomplete"] * 3 + ["completed"]


def test_a_sigterm_hands_the_runs_of_a_serving_process_over(cluster, upstream, check):
    cluster.kill_workers()
    serving = cluster.start_replica(REPRISE_WORKERS_IN_API="true", REPRISE_SHUTDOWN_GRACE_S="0.5")
    said = script([repeat(5, text("w{i} ")), gate("serve"), text("end"), finish()])
    response_id = begin(serving.url, said)
    follower = Follower([serving.url], response_id)
    until(lambda: len(deltas(follower)) == 5, "the text has come")
    cluster.start_worker()
    serving.process.send_signal(signal.SIGTERM)
    follower.urls[:] = cluster.urls
    until(lambda: len(upstream.asked(said)) == 2, "a worker has it")
    upstream.open("serve")
    check(follower)
    assert serving.process.wait(20) in {0, -signal.SIGTERM}  # uvicorn passes the signal on when it is done


def test_two_workers_race_and_make_each_response_once(cluster, upstream):
    cluster.kill_workers()
    scripts = [script([note(f"race {number}"), *answer(f"answer {number}")]) for number in range(100)]
    ids = [begin(cluster.urls[number % 2], said, stream=False) for number, said in enumerate(scripts)]
    begun = time.monotonic()
    cluster.start_worker(REPRISE_WORKER_RUNS_MAX="7")
    cluster.start_worker(REPRISE_WORKER_RUNS_MAX="7")
    until(lambda: not cluster.query("select from responses where status in ('queued', 'in_progress')"), "all ended", 40)
    print(f"FIGURE race 100 runs in {time.monotonic() - begun:.2f} s")
    for number, (said, response_id) in enumerate(zip(scripts, ids, strict=True)):
        response = get(cluster.urls[0], response_id)
        assert (response["status"], text_of(response)) == ("completed", f"answer {number}")
        assert len(upstream.asked(said)) == 1


SUMS = """
[upstreams.only]
base_url = "{base}"

[[models]]
name = "sums"
routes = [{{ upstream = "only", model = "m" }}]
reasoning_summary = {{ model = "m" }}
"""


def test_a_worker_killed_while_it_waits_for_a_summary_of_reasoning_or_after_it_is_replaced(
    cluster, upstream, check, said, monkeypatch, tmp_path
):
    """The reasoning is closed; the next worker makes it, its summary and the answer anew. No summary's tokens are the answer's."""
    path = tmp_path / "catalog.toml"
    path.write_text(SUMS.format(base=upstream.base_url))
    cluster.kill_workers()
    cluster.start_worker(REPRISE_CATALOG=str(path))
    thought = f"thought of {said}"
    shortly = [text("In "), gate("mid-summary-of-reasoning"), text("short."), finish(), usage(10, 500)]
    monkeypatch.setitem(upstream.scripts, thought, script(shortly))
    asked = script([reasoning(thought), text("Ye"), gate("after-a-summary"), text("s."), finish(), usage(10, 5)])
    response_id = begin(cluster.urls[0], asked, model="sums", reasoning={"summary": "auto"}, max_output_tokens=100)
    follower = Follower(cluster.urls, response_id)
    upstream.wait_reached("mid-summary-of-reasoning", ENDED_S)
    follower.wait_for("response.reasoning_text.delta")
    cluster.kill_owner(response_id)
    cluster.start_worker(REPRISE_CATALOG=str(path))
    upstream.open("mid-summary-of-reasoning")
    follower.wait_for("response.output_text.delta")
    cluster.kill_owner(response_id)
    cluster.start_worker(REPRISE_CATALOG=str(path))
    upstream.open("after-a-summary")
    thinking, answered = check(follower)["output"]
    assert [part["text"] for part in thinking["summary"]] == ["In short."]
    assert (thinking["content"][0]["text"], answered["content"][0]["text"]) == (thought, "Yes.")
    assert closed_as(follower.seen) == ["incomplete", "completed", "incomplete", "completed", "completed"]
    assert (len(upstream.asked(asked)), len(upstream.asked(thought))) == (3, 3)
    assert upstream.asked(asked)[-1].body["max_tokens"] == 100


COMPACTING = {"context_management": [{"type": "compaction", "compact_threshold": 1000}]}
PROMPT = compaction_prompt(Settings())


def test_a_worker_killed_after_a_compaction_or_in_it_is_replaced(cluster, upstream, check, said, monkeypatch):
    """A whole compaction stands, whoever continues from it; one that was broken off is made again."""
    cluster.ensure(workers=2)
    before = len(upstream.asked(PROMPT))  # by tests of other files
    monkeypatch.setitem(
        upstream.scripts, PROMPT, script([text("The "), gate("mid-summary"), text("summary."), finish()])
    )
    after = (
        message_of(Compacted("The summary.", [Message(role="user", content=[InputText(text=said)])])).content[0].text
    )
    upstream.scripts[after] = script([text("The "), gate("after-compaction"), text("answer."), finish()])
    history = [{"role": "user", "content": "x" * 4000}, {"role": "assistant", "content": "y" * 400}]
    response_id = begin(cluster.urls[0], [*history, {"role": "user", "content": said}], **COMPACTING)
    follower = Follower(cluster.urls, response_id)
    upstream.wait_reached("mid-summary", ENDED_S)
    follower.wait_for("response.output_item.added")
    cluster.kill_owner(response_id)
    upstream.open("mid-summary")
    upstream.wait_reached("after-compaction", ENDED_S)
    cluster.ensure(workers=2)
    cluster.kill_owner(response_id)
    upstream.open("after-compaction")
    response = check(follower)
    assert [item["type"] for item in response["output"]] == ["compaction", "message"]
    assert text_of(response) == "The answer."
    assert (len(upstream.asked(PROMPT)) - before, len(upstream.asked(after))) == (2, 2)
    sealed = [
        event["item"]["encrypted_content"]
        for event in follower.seen
        if event["type"] == "response.output_item.done" and event["item"]["type"] == "compaction"
    ]
    assert [bool(content) for content in sealed] == [False, True]
