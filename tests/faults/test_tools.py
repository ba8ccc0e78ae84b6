"""Runs that call tools, and whatever dies under them: a call is sent once at most, and its outcome is told to everybody alike."""

import signal
from collections.abc import Iterator

import pytest

from app.domain.tools.answers import error_text, unknown_outcome
from tests.faults.client import Follower, begin, call, cancel
from tests.faults.cluster import frozen, locked
from tests.faults.stream_oracle import text_of
from tests.upstream import answer, calling, cut, finish, gate, note, script, text, usage
from tests.upstream import call as tool_call
from tests.waiting import until

KEY = "reprise/idempotencyKey"
UNKNOWN = error_text(unknown_outcome().error)
GET_TIME = {"type": "function", "name": "get_time", "parameters": {"type": "object"}}

WAITING = """
select from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock' and query like '%event_journal%'
"""


@pytest.fixture
def perform(cluster, upstream, box, check):
    """Begins a run under a name of its own."""

    def perform(name, *turns, **options):
        return Performance(cluster, upstream, box, check, name, *turns, **options)

    perform.box = box
    return perform


class Performance:
    """A background run with the tools of one server. Its name is that of the tool server, and of every gate."""

    def __init__(
        self, cluster, upstream, box, check, name, *turns, tools=None, options=None, more=(), stream=True, **fields
    ):
        """`options` are the tool server's, `tools` the fields of its declaration, `fields` the request's; `more` are other
        tools."""
        self.cluster, self.upstream, self.box, self._check = cluster, upstream, box, check
        self.name = name
        self.said = script([note(name), *turns[0]], *turns[1:])
        self.tools = [self.declare(options, **(tools or {})), *more]
        self.id = begin(cluster.urls[0], self.said, tools=self.tools, stream=stream, **fields)
        self.follower = Follower(cluster.urls, self.id) if stream else None

    def declare(self, options=None, label="box", name=None, **fields):
        """The tool server, as a tool."""
        url = self.box.url(name or self.name, **(options or {}))
        return {"type": "mcp", "server_label": label, "server_url": url, "require_approval": "never", **fields}

    def goes_on(self, *items, tools=None):
        """The same with another response behind this one."""
        input = [{"type": "mcp_approval_response", **item} if "approve" in item else item for item in items]
        tools = tools or self.tools
        self.id = begin(self.cluster.urls[0], input, tools=tools, previous_response_id=self.id)
        self.follower = Follower(self.cluster.urls, self.id)

    def approve(self, *requests, **more):
        """Go on with these requests approved."""
        self.goes_on(*({"approval_request_id": request["id"], "approve": True} for request in requests), **more)

    def wait_calls(self, count=1):
        """Until so many calls have come to the tool server."""
        self.box.wait_calls(self.name, count)

    def ended(self, status="completed", **options):
        """The response once it has ended, with all that must hold of it and of what the tool server was sent."""
        if self.follower:
            response = self._check(self.follower, status=status, **options)
        else:
            response = self.cluster.ended(self.id, status)
        sent = self.box.calls(self.name)
        once = [(one["tool"], str(one["arguments"])) for one in sent]
        assert len(set(once)) == len(once), f"a call was sent twice: {once}"
        ids = {item["id"] for item in calls_of(response)}
        stored = {one["meta"][KEY] for one in sent} & ids
        for item in calls_of(response):
            assert item["id"] in stored or item["status"] == "failed", f"a result of nothing: {item}"
        for item in calls_of(response) if self.follower else ():
            assert self.ends_of(item) == [item["status"]], f"its end was not told once: {item}"
        return response

    def ends_of(self, item):
        """How the client was told that a call ended."""
        ends = [event for event in self.follower.seen if event.get("item_id") == item["id"]]
        ends = [event["type"].removeprefix("response.mcp_call.") for event in ends]
        return [end for end in ends if end in {"completed", "failed"}]

    @property
    def read(self):
        """The results that the model has read, by the last request that it got."""
        messages = self.upstream.asked(self.said)[-1].body["messages"]
        return [message["content"] for message in messages if message["role"] == "tool"]

    def assert_sessions_left(self, count):
        """So many sessions were left open, because who held them was killed."""
        until(lambda: self.box.open_sessions(self.name) == count, f"{count} sessions of {self.name} are open", 5)


def calls_of(response):
    return [item for item in response["output"] if item["type"] == "mcp_call"]


def types_of(response):
    return [item["type"] for item in response["output"]]


def is_unknown(item):
    return (item["status"], item["output"], item["error"]["message"]) == ("failed", None, UNKNOWN)


def echoed(item):
    return (item["status"], item["error"]) == ("completed", None) and item["output"]


# -- Kill -9 of the worker, at every moment of a call -----------------------------------------------------------------------
#
# Each scene brings a run to a moment and yields; its worker is killed; then the scene says what has become of the run. All
# runs are killed at once, since what takes the time is the end of a lease.


def while_listing(perform) -> Iterator[None]:
    run = perform(
        "listing", calling("echo", {"x": 1}), answer("Done."), options={"listing": "listing", "tools": "echo"}
    )
    run.box.wait_reached("listing")
    run.follower.wait_for("response.mcp_list_tools.in_progress")
    yield
    run.box.open("listing")
    response = run.ended()
    assert types_of(response) == ["mcp_list_tools", "mcp_call", "message"]
    assert len(closed_as_of(run, "mcp_list_tools")) == 2
    assert echoed(*calls_of(response))
    assert len(run.box.calls("listing")) == 1
    run.assert_sessions_left(1)


def closed_as_of(run, type):
    items = [event["item"] for event in run.follower.seen if event["type"] == "response.output_item.done"]
    return [item.get("status") for item in items if item["type"] == type]


def in_mid_call(perform) -> Iterator[None]:
    run = perform("mid", [text("Let me see."), *calling("gate", {"name": "mid"})], answer("I can't tell."))
    run.wait_calls()
    yield
    response = run.ended()
    assert types_of(response) == ["mcp_list_tools", "message", "mcp_call", "message"]
    (item,) = calls_of(response)
    assert is_unknown(item)
    assert run.read == [f"Error: {UNKNOWN}"]
    assert len(run.box.calls("mid")) == 1
    assert run.upstream.asked(run.said)[-1].turn == 1
    run.assert_sessions_left(1)


def with_one_of_two_calls_done(perform) -> Iterator[None]:
    both = [
        tool_call("echo", {"x": 1}, id="a"),
        tool_call("gate", {"name": "two"}, index=1, id="b"),
        finish("tool_calls"),
    ]
    run = perform("two", both, answer("One of two."))
    run.wait_calls(2)
    run.follower.wait_for("response.mcp_call.completed")
    yield
    response = run.ended()
    done, lost = calls_of(response)
    assert echoed(done)
    assert is_unknown(lost)
    assert run.read == [done["output"], f"Error: {UNKNOWN}"]
    assert len(run.box.calls("two")) == 2
    run.assert_sessions_left(1)


def with_results_that_nobody_was_told(perform) -> Iterator[None]:
    """The later of two calls is back, but results are told in the order of the calls: so it is as unknown as the other."""
    both = [
        tool_call("gate", {"name": "late"}, id="a"),
        tool_call("echo", {"x": 1}, index=1, id="b"),
        finish("tool_calls"),
    ]
    run = perform("late", both, answer("Neither."))
    until(lambda: run.box.outcomes("late")[-1:] == ["answered"], "the later call is back")
    yield
    response = run.ended()
    assert all(map(is_unknown, calls_of(response)))
    assert len(run.box.calls("late")) == 2
    run.assert_sessions_left(1)


def behind_the_results(perform) -> Iterator[None]:
    first = [*calling("echo", {"x": 1}), usage(100, 20)]
    run = perform("behind", first, [gate("behind"), *answer("All there."), usage(7, 3)])
    run.upstream.wait_reached("behind", 20)
    yield
    run.upstream.open("behind")
    response = run.ended()
    assert echoed(*calls_of(response))
    assert run.read == [calls_of(response)[0]["output"]]
    assert text_of(response) == "All there."
    assert (response["usage"]["input_tokens"], response["usage"]["output_tokens"]) == (107, 23)
    assert [one.turn for one in run.upstream.asked(run.said)] == [0, 1, 1]
    run.assert_sessions_left(1)


def with_all_tokens_spent(perform) -> Iterator[None]:
    first = [*calling("gate", {"name": "spent"}), usage(100, 20)]
    run = perform("spent", first, answer("never"), max_output_tokens=20)
    run.wait_calls()
    yield
    response = run.ended("incomplete")
    assert response["incomplete_details"]["reason"] == "max_output_tokens"
    assert response["usage"]["output_tokens"] == 20
    assert is_unknown(*calls_of(response))
    assert len(run.upstream.asked(run.said)) == 1
    run.assert_sessions_left(1)


def in_the_next_turn(perform) -> Iterator[None]:
    run = perform("next", calling("echo", {"x": 1}), [text("half "), gate("next"), text("whole"), finish()])
    run.follower.wait_for("response.output_text.delta")
    yield
    run.upstream.open("next")
    response = run.ended()
    assert echoed(*calls_of(response))
    assert text_of(response) == "half whole"
    assert closed_as_of(run, "message") == ["incomplete", "completed"]
    assert [one.turn for one in run.upstream.asked(run.said)] == [0, 1, 1]
    run.assert_sessions_left(1)


def with_a_function_call_of_the_same_turn(perform) -> Iterator[None]:
    both = [
        tool_call("gate", {"name": "handed"}, id="a"),
        tool_call("get_time", {}, index=1, id="b"),
        finish("tool_calls"),
    ]
    run = perform("handed", both, answer("It is noon."), more=[GET_TIME])
    run.wait_calls()
    yield
    response = run.ended()
    (function,) = [item for item in response["output"] if item["type"] == "function_call"]
    assert is_unknown(*calls_of(response))
    assert len(run.upstream.asked(run.said)) == 1  # the client's answer comes first
    run.goes_on({"type": "function_call_output", "call_id": function["call_id"], "output": "noon"})
    assert text_of(run.ended()) == "It is noon."
    assert sorted(run.read) == [f"Error: {UNKNOWN}", "noon"]
    assert len(run.box.calls("handed")) == 1
    run.assert_sessions_left(1)


def with_a_request_for_approval_of_the_same_turn(perform) -> Iterator[None]:
    both = [
        tool_call("gate", {"name": "asked"}, id="a"),
        tool_call("echo", {"x": 1}, index=1, id="b"),
        finish("tool_calls"),
    ]
    free = {"require_approval": {"never": {"tool_names": ["gate"]}}}
    run = perform("asked", both, answer("One of two."), tools=free)
    run.wait_calls()
    yield
    response = run.ended()
    (request,) = [item for item in response["output"] if item["type"] == "mcp_approval_request"]
    (lost,) = calls_of(response)
    assert is_unknown(lost)
    run.approve(request)
    (made,) = calls_of(run.ended())
    assert echoed(made)
    assert made["approval_request_id"] == request["id"]
    assert sorted(run.read) == sorted([f"Error: {UNKNOWN}", made["output"]])
    assert [one["tool"] for one in run.box.calls("asked")] == ["gate", "echo"]
    assert_used_up(run, request)
    run.assert_sessions_left(1)


def in_mid_call_of_what_was_approved(perform) -> Iterator[None]:
    run, requests = asked(perform, "approved", [("echo", {"x": 1}), ("gate", {"name": "approved"})], "One of two.")
    run.approve(*requests)
    run.wait_calls(2)
    run.follower.wait_for("response.mcp_call.completed")
    yield
    response = run.ended()
    done, lost = calls_of(response)
    assert echoed(done)
    assert is_unknown(lost)
    assert [done["approval_request_id"], lost["approval_request_id"]] == [request["id"] for request in requests]
    assert run.read == [done["output"], f"Error: {UNKNOWN}"]
    assert len(run.box.calls("approved")) == 2
    for request in requests:
        assert_used_up(run, request)
    run.assert_sessions_left(1)


def before_what_was_approved_was_sent(perform) -> Iterator[None]:
    """That it would be sent was kept; so nobody can know that it was not."""
    perform.box.open("unsent")
    run, (request,) = asked(perform, "unsent", [("echo", {"x": 1})], "I can't tell.", options={"greeting": "unsent"})
    run.box.shut("unsent")
    run.approve(request)
    run.box.wait_reached("unsent")
    run.follower.wait_for("response.mcp_call.in_progress")
    yield
    run.box.open("unsent")
    response = run.ended()
    assert is_unknown(*calls_of(response))
    assert run.box.calls("unsent") == []
    assert_used_up(run, request)


def before_what_was_approved_was_begun(perform) -> Iterator[None]:
    run, (request,) = asked(perform, "unbegun", [("echo", {"x": 1})], "Done.")
    other = run.declare({"listing": "unbegun", "tools": "add"}, label="other", name="unbegun-other")
    run.approve(request, tools=[*run.tools, other])
    run.box.wait_reached("unbegun")
    run.follower.wait_for("response.mcp_list_tools.in_progress")
    yield
    run.box.open("unbegun")
    response = run.ended()
    assert types_of(response) == ["mcp_list_tools", "mcp_call", "message"]
    assert echoed(*calls_of(response))
    assert len(run.box.calls("unbegun")) == 1
    assert_used_up(run, request)
    run.assert_sessions_left(0)


def asked(perform, name, calls, last, options=None):
    """A run that has ended with requests for these calls; `options` are the tool server's."""
    steps = [
        tool_call(tool, arguments, index=index, id=f"call_{index}") for index, (tool, arguments) in enumerate(calls)
    ]
    run = perform(
        name, [*steps, finish("tool_calls")], answer(last), tools={"require_approval": "always"}, options=options
    )
    return run, [item for item in run.ended()["output"] if item["type"] == "mcp_approval_request"]


def assert_used_up(run, request):
    """The request that was answered can't be answered again, from wherever."""
    again = {"type": "mcp_approval_response", "approval_request_id": request["id"], "approve": True}
    sent = len(run.box.calls(run.name))
    with_copy = [{name: request[name] for name in ("type", "id", "server_label", "name", "arguments")}, again]
    for input in [again], with_copy:
        body = {"model": "m", "input": input, "tools": run.tools, "background": True}
        for previous in {"previous_response_id": run.id}, {}:
            status, refused = call(run.cluster.urls[0], "POST", "/responses", {**body, **previous})
            assert status == 400, refused
    assert len(run.box.calls(run.name)) == sent


def with_secrets(perform) -> Iterator[None]:
    token, other = "a-token-that-nobody-may-find", "nor-what-is-in-a-header"
    run = perform(
        "secret",
        calling("gate", {"name": "secret"}),
        [text("Another."), *calling("echo", {"x": 1}, id="call_2")],
        [gate("secret"), *answer("Done.")],
        tools={"authorization": token, "headers": {"x-team": other}},
    )
    run.wait_calls()
    assert run.cluster.run_of(run.id)["secrets"]
    assert_nowhere(run, token, other)
    yield
    run.upstream.wait_reached("secret", 20)
    for sent in run.box.calls("secret"):  # the new owner has them too
        assert (sent["headers"]["authorization"], sent["headers"]["x-team"]) == (f"Bearer {token}", other)
    assert_nowhere(run, token, other)
    run.upstream.open("secret")
    assert is_unknown(calls_of(run.ended())[0])
    until(lambda: not run.cluster.run_of(run.id), "the run is forgotten")
    assert_nowhere(run, token, other)


def assert_nowhere(run, *secrets):
    """No table, no stream, no event and no line of a log holds them in plain."""
    cluster = run.cluster
    found = [cluster.printed, *(frame.decode() for frame in run.follower.frames)]
    for row in cluster.query("select table_name from information_schema.tables where table_schema = 'public'"):
        found += [
            line["line"] for line in cluster.query(f"select row_to_json(t)::text as line from {row['table_name']} t")
        ]
    for key in cluster.servers.redis.scan_iter(f"{cluster.prefix}:events:*"):
        found += [str(cluster.servers.redis.xrange(key))]
    for secret in secrets:
        for spelt in secret, secret.encode().hex():  # as the journal's bytes are given
            assert [one for one in found if spelt in one] == []


def not_streamed(perform) -> Iterator[None]:
    run = perform("quiet", calling("gate", {"name": "quiet"}), answer("I can't tell."), stream=False)
    run.wait_calls()
    yield
    response = run.ended()
    assert is_unknown(*calls_of(response))
    assert text_of(response) == "I can't tell."
    assert run.read == [f"Error: {UNKNOWN}"]
    run.assert_sessions_left(1)


SCENES = [
    while_listing,
    in_mid_call,
    with_one_of_two_calls_done,
    with_results_that_nobody_was_told,
    behind_the_results,
    with_all_tokens_spent,
    in_the_next_turn,
    with_a_function_call_of_the_same_turn,
    with_a_request_for_approval_of_the_same_turn,
    in_mid_call_of_what_was_approved,
    before_what_was_approved_was_sent,
    before_what_was_approved_was_begun,
    with_secrets,
    not_streamed,
]


def test_a_worker_killed_at_any_moment_of_a_call(cluster, perform, subtests):
    scenes = {scene.__name__: scene(perform) for scene in SCENES}
    for scene in scenes.values():
        next(scene)
    cluster.kill_workers()
    cluster.start_worker()
    for name, scene in scenes.items():
        with subtests.test(name):
            assert next(scene, "over") == "over"


# -- Other faults in mid-call -----------------------------------------------------------------------------------------------


def test_two_workers_killed_one_after_the_other_in_mid_call(cluster, perform):
    again = [text("Another."), *calling("gate", {"name": "twice", "x": 2}, id="call_2")]
    run = perform("twice", calling("gate", {"name": "twice", "x": 1}), again, answer("Neither."))
    for count in 1, 2:
        run.wait_calls(count)
        cluster.kill_owner(run.id)
        cluster.start_worker()
    response = run.ended()
    assert all(map(is_unknown, calls_of(response)))
    assert run.read == [f"Error: {UNKNOWN}"] * 2
    assert len(run.box.calls("twice")) == 2
    run.assert_sessions_left(2)


def test_a_worker_frozen_for_longer_than_its_lease_in_mid_call(cluster, perform):
    """It comes back to a result that nobody waits for any more."""
    cluster.ensure(workers=2)
    run = perform("frozen", calling("gate", {"name": "frozen"}), [gate("frozen"), *answer("I can't tell.")])
    run.wait_calls()
    owner = cluster.owner_of(run.id)
    with frozen([owner.process.pid]):
        run.follower.wait_for("response.mcp_call.failed")
        run.upstream.wait_reached("frozen", 20)
        run.box.open("frozen")
        until(lambda: run.box.outcomes("frozen") == ["answered"], "the result is on its way")
    until(lambda: any("run_fenced" in line for line in list(owner.printed)), "it has noticed")
    run.upstream.open("frozen")
    response = run.ended()
    assert is_unknown(*calls_of(response))
    assert run.read == [f"Error: {UNKNOWN}"]
    assert len(run.box.calls("frozen")) == 1
    run.assert_sessions_left(0)


def test_a_result_that_is_not_kept_is_told_to_nobody(cluster, perform):
    """Not even half of it: the next owner does not know it."""
    cluster.ensure(workers=2)
    run = perform("unkept", calling("gate", {"name": "unkept"}), answer("I can't tell."))
    run.wait_calls()
    with locked(cluster.database_url, "event_journal"):
        run.box.open("unkept")
        until(lambda: cluster.query(WAITING), "its worker wants to keep it")
        cluster.kill_owner(run.id)
    assert is_unknown(*calls_of(run.ended()))
    assert len(run.box.calls("unkept")) == 1
    run.assert_sessions_left(1)


@pytest.mark.parametrize("grace_s", [0.1, 20], ids=["too-short", "long-enough"])
def test_a_sigterm_in_mid_call(cluster, perform, grace_s):
    (second,) = cluster.workers
    first = cluster.start_worker(REPRISE_SHUTDOWN_GRACE_S=str(grace_s), REPRISE_LEASE_S="60")
    name = f"term{grace_s:g}"
    with frozen([second.process.pid]):  # the run shall be the first one's
        run = perform(name, calling("gate", {"name": name}), answer("Done."))
        run.wait_calls()
    first.process.send_signal(signal.SIGTERM)
    if grace_s < 1:
        run.follower.wait_for("response.mcp_call.failed")
    else:
        until(lambda: any("worker_draining" in line for line in list(first.printed)), "it drains")
        run.box.open(name)
    (item,) = calls_of(run.ended())
    assert is_unknown(item) if grace_s < 1 else item["output"] == "through"
    assert len(run.box.calls(name)) == 1
    assert first.process.wait(20) == 0
    run.assert_sessions_left(0)


def test_a_cancel_in_mid_call(cluster, perform):
    run = perform("cancelled", calling("gate", {"name": "cancelled"}), answer("never"))
    run.wait_calls()
    cancelled = cancel(cluster.urls[0], run.id)
    assert run.ended("cancelled") == cancelled
    assert is_unknown(*calls_of(cancelled))
    until(lambda: run.box.outcomes("cancelled") == ["left"], "the tool server hears of it")
    assert len(run.upstream.asked(run.said)) == 1
    run.assert_sessions_left(0)


@pytest.mark.parametrize("fault", ["postgres-killed", "redis-emptied", "redis-killed", "both"])
def test_a_call_outlives_the_servers(cluster, perform, fault):
    run = perform(fault, calling("gate", {"name": fault}), answer("Done."))
    run.wait_calls()
    if fault in {"postgres-killed", "both"}:
        cluster.servers.kill_postgres()
    if fault == "redis-emptied":
        cluster.servers.redis.flushall()
    if fault in {"redis-killed", "both"}:
        cluster.servers.kill_valkey()
    run.box.open(fault)
    (item,) = calls_of(run.ended())
    assert (item["status"], item["output"]) == ("completed", "through")
    assert run.read == ["through"]
    assert len(run.box.calls(fault)) == 1
    run.assert_sessions_left(0)


def test_redis_emptied_and_the_worker_killed_in_mid_call(cluster, perform):
    cluster.ensure(workers=2)
    run = perform("double-fault", calling("gate", {"name": "double-fault"}), answer("I can't tell."))
    run.wait_calls()
    owner = cluster.owner_of(run.id)
    with frozen([owner.process.pid]):  # it may not repair what is emptied now
        cluster.servers.redis.flushall()
        cluster.kill(owner)
    response = run.ended(jumps=1)
    assert is_unknown(*calls_of(response))
    assert run.read == [f"Error: {UNKNOWN}"]
    assert len(run.box.calls("double-fault")) == 1
    run.assert_sessions_left(1)


def test_the_tool_server_killed_in_mid_call(perform):
    run = perform("dead", calling("gate", {"name": "dead"}), answer("It has died."))
    run.wait_calls()
    run.box.kill()
    (item,) = calls_of(run.ended())
    assert (item["status"], item["error"]["type"], item["error"]["code"]) == ("failed", "http_error", 502)
    assert run.read == [f"Error: {item['error']['message']}"]
    assert len(run.box.calls("dead")) == 1


def test_the_tool_server_killed_between_two_calls_and_restarted(perform):
    """The session is gone, which one call finds out; the next has a new one."""
    run = perform(
        "reborn",
        [text("One."), *calling("echo", {"x": 1})],
        [gate("reborn"), text("Two."), *calling("echo", {"x": 2})],
        [text("Three."), *calling("echo", {"x": 3})],
        answer("Done."),
    )
    run.upstream.wait_reached("reborn", 20)
    run.box.kill()
    run.box.start()
    run.upstream.open("reborn")
    first, second, third = calls_of(run.ended())
    assert echoed(first)
    assert second["status"] == "failed"
    assert echoed(third)
    assert [one["arguments"]["x"] for one in run.box.calls("reborn")] == [1, 3]
    run.assert_sessions_left(0)


def test_the_upstream_cut_behind_a_call(perform):
    run = perform("cut", calling("echo", {"x": 1}), [text("half"), cut()])
    response = run.ended("failed")
    assert echoed(*calls_of(response))
    assert len(run.box.calls("cut")) == 1
    run.assert_sessions_left(0)
