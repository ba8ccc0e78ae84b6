"""Limits of one run: which one ends it, what stays, where they may stand, and what a request may not ask for."""

import time

import openai
import pytest

from app.settings import Settings
from app.setup import compaction_prompt
from tests.faults.client import call as http_call
from tests.servers import Served
from tests.upstream import answer, finish, gate, note, script, text, usage
from tests.upstream import call as tool_call
from tests.waiting import until

CATALOG = """
[upstreams.up]
base_url = "{base}"
dialect = "openai"
[upstreams.other]
base_url = "{base}"
dialect = "openai"

[[models]]
name = "priced"
routes = [{{ upstream = "up", model = "scripted" }}]
prices = {{ input = 1000, output = 2000 }}

[[models]]
name = "bounded"
routes = [{{ upstream = "up", model = "scripted" }}]
prices = {{ input = 0.001, output = 0.001 }}
run_limits = {{ tokens = 1000, tool_calls = 2, tool_seconds = 30, cost = 0.5 }}

[[models]]
name = "other@*"
routes = [{{ upstream = "other" }}]
prices = {{ input = 0.001, output = 0.001 }}
run_limits = {{ tokens = 1000 }}

[[models]]
name = "half"
routes = [{{ upstream = "up", model = "scripted", prices = {{ input = 1, output = 1 }} }}, {{ upstream = "up", model = "spare" }}]

[[models]]
name = "thinks"
routes = [{{ upstream = "up", model = "scripted" }}]
prices = {{ input = 1000, output = 2000 }}
reasoning_summary = {{ model = "up@scripted" }}

[agents.thrifty]
model = "priced"
run_limits = {{ tokens = 100 }}

[agents.free]
model = "up@scripted"
overrides = ["run_limits"]

[prompts.cheap.versions.1]
instructions = "Be brief."
run_limits = {{ cost = 0.5 }}
"""


PRICED = """
[upstreams.up]
base_url = "{base}"
dialect = "openai"

[[models]]
name = "priced"
routes = [{{ upstream = "up", model = "scripted" }}]
prices = {{ input = 1000, output = 2000 }}

[[models]]
name = "thinks"
routes = [{{ upstream = "up", model = "scripted", prices = {{ input = 1000, output = 2000 }} }}]
reasoning_summary = {{ model = "priced" }}

[agents.frugal]
model = "priced"
run_limits = {{ cost = 0.5 }}
"""


@pytest.fixture(scope="module")
def server(new_cataloged, upstream) -> Served:
    return new_cataloged(CATALOG.format(base=upstream.base_url), OPENAI_BASE_URL="")


@pytest.fixture(scope="module")
def client(server):
    with server.client() as made:
        yield made


def create(client, said, model="up@scripted", **options):
    limits = options.pop("run_limits", None)
    return client.responses.create(model=model, input=said, extra_body=limits and {"run_limits": limits}, **options)


def ended(made) -> tuple[str, str | None]:
    return made.status, made.incomplete_details and made.incomplete_details.reason


def add(id="call_1", index=0):
    return tool_call("add", {"a": 1, "b": 2}, id=id, index=index)


LOOP = [[add(), text("On it."), finish("tool_calls"), usage(50, 10)]] * 4
"""Turns that call a tool, which never end by themselves."""


def limits_asked(upstream, said) -> list[int | None]:
    """How long each turn might be."""
    return [record.body.get("max_completion_tokens") for record in upstream.asked(said)]


# -- Tokens and cost --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["plain", "streamed", "background", "not stored"])
def test_a_run_ends_once_its_tokens_are_used_up_and_keeps_what_was_said(client, upstream, mcp, said, how):
    asking = script(*[[note(f"{said} {how}"), *turn] for turn in LOOP])
    options = {
        "plain": {},
        "streamed": {"stream": True},
        "background": {"background": True},
        "not stored": {"store": False},
    }[how]
    made = create(client, asking, tools=[mcp(of=f"tokens{how}")], run_limits={"tokens": 150}, **options)
    if how == "streamed":
        made = list(made)[-1].response
    if how == "background":
        made = until(
            lambda: (found := client.responses.retrieve(made.id)).status not in {"queued", "in_progress"} and found
        )
    assert ended(made) == ("incomplete", "max_run_tokens")
    assert [item.type for item in made.output].count("message") == 2
    assert made.usage.total_tokens == 120
    assert limits_asked(upstream, asking) == [150, 30], "the second turn reads the first one's 60 tokens again"


def test_a_turn_that_is_cut_off_at_what_is_left_has_reached_the_limit_of_the_run(client, said):
    asking = script([note(said), text("half"), finish("length"), usage(5, 20)])
    assert ended(create(client, asking, run_limits={"tokens": 20})) == ("incomplete", "max_run_tokens")
    cut = create(client, asking, run_limits={"tokens": 2000}, max_output_tokens=20)
    assert ended(cut) == ("incomplete", "max_output_tokens")
    by_itself = create(client, asking, run_limits={"tokens": 2000})
    assert ended(by_itself) == ("incomplete", "max_output_tokens")
    assert by_itself.output_text == "half"


def test_a_run_within_its_limits_completes(client, upstream, mcp, said):
    asking = script(*[[note(said), *turn] for turn in LOOP[:1]], answer("Three."))
    limits = {"tokens": 10_000, "tool_calls": 1, "tool_seconds": 60, "cost": 1}
    made = create(client, asking, model="priced", tools=[mcp()], run_limits=limits)
    assert (ended(made), made.output_text) == (("completed", None), "On it.Three.")
    left = limits_asked(upstream, asking)
    assert left[0] == 500, "of 1 what 500 tokens cost"
    assert left[1] < left[0] - 35, "less what the first turn has cost, and the second reads again"


def test_a_run_ends_once_its_cost_is_reached(client, upstream, mcp, said):
    asking = script(*[[note(said), *turn] for turn in LOOP])
    made = create(client, asking, model="priced", tools=[mcp()], run_limits={"cost": 0.14})
    # A turn costs 50 * 0.001 + 10 * 0.002 = 0.07.
    assert ended(made) == ("incomplete", "max_run_cost")
    assert len(upstream.asked(asking)) == 2


# -- Tools ------------------------------------------------------------------------------------------------------------------


def test_calls_beyond_the_limit_are_not_made_and_end_the_run(client, upstream, toolserver, name, mcp, said):
    calls = [add(f"call_{at}", at) for at in range(3)]
    asking = script([note(said), text("On it."), *calls, finish("tool_calls")], answer("never asked for"))
    made = create(client, asking, tools=[mcp()], run_limits={"tool_calls": 2})
    assert ended(made) == ("incomplete", "max_tool_calls")
    assert made.output_text == "On it."
    assert [item.status for item in made.output if item.type == "mcp_call"] == ["completed"] * 2
    assert len(toolserver.calls(name, "add")) == 2
    assert len(upstream.asked(asking)) == 1
    goes_on = client.responses.create(model="up@scripted", input="Go on.", previous_response_id=made.id)
    assert goes_on.status == "completed"


def test_max_tool_calls_still_lets_the_model_answer(client, mcp, said):
    calls = [add(f"call_{at}", at) for at in range(3)]
    asking = script([note(said), *calls, finish("tool_calls")], answer("As far as I came."))
    made = create(client, asking, tools=[mcp()], max_tool_calls=2, run_limits={"tool_calls": 5})
    assert (ended(made), made.output_text) == (("completed", None), "As far as I came.")


def test_calls_that_take_longer_than_what_is_left_are_broken_off(client, upstream, toolserver, name, mcp, said):
    calls = [tool_call("gate", {"name": name}, id=f"call_{at}", index=at) for at in range(2)]
    asking = script([note(said), text("On it."), *calls, finish("tool_calls")], answer("never asked for"))
    begun_s = time.monotonic()
    made = create(client, asking, tools=[mcp()], run_limits={"tool_seconds": 1})
    assert ended(made) == ("incomplete", "max_tool_seconds")
    assert time.monotonic() - begun_s < 20
    failed = [item for item in made.output if item.type == "mcp_call"]
    assert [item.status for item in failed] == ["failed"] * 2
    assert all("after 0.5 s" in str(item.error) for item in failed)
    assert len(upstream.asked(asking)) == 1


def test_a_call_that_was_broken_off_for_others_of_its_turn_does_not_end_the_run(client, name, mcp, said):
    calls = [add("call_0", 0), tool_call("gate", {"name": name}, id="call_1", index=1)]
    asking = script([note(said), *calls, finish("tool_calls")], answer("One of them."))
    made = create(client, asking, tools=[mcp()], run_limits={"tool_seconds": 2})
    assert (ended(made), made.output_text) == (("completed", None), "One of them.")
    assert [item.status for item in made.output if item.type == "mcp_call"] == ["completed", "failed"]


# -- Where they stand -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "param"),
    [
        ({"tokens": 1001}, "run_limits.tokens"),
        ({"tool_calls": 3}, "run_limits.tool_calls"),
        ({"tool_seconds": 30.5}, "run_limits.tool_seconds"),
        ({"cost": 0.51}, "run_limits.cost"),
        ({"tokens": 0}, "run_limits.tokens"),
        ({"cost": -1}, "run_limits.cost"),
        ({"cost": 9e-13}, "run_limits.cost"),
        ({"cost": "cheap"}, "run_limits.cost"),
        ({"token": 5}, "run_limits.token"),
        ([], "run_limits"),
    ],
)
@pytest.mark.parametrize("path", ["/responses", "/chat/completions"])
def test_a_limit_above_the_model_s_or_unknown_is_refused_by_its_path(server, path, limits, param):
    said = {"input": "hi"} if path == "/responses" else {"messages": [{"role": "user", "content": "hi"}]}
    status, reply = http_call(server.url, "POST", path, {"model": "bounded", **said, "run_limits": limits})
    assert (status, reply["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("path", "given"),
    [
        ("/responses", {"model": "up@scripted"}),
        ("/responses", {"model": "up@scripted", "stream": True}),
        ("/responses", {"model": "up@scripted", "store": False}),
        ("/responses", {"model": "up@scripted", "background": True}),
        ("/responses", {"model": "half"}),
        ("/responses", {"model": "thinks", "reasoning": {"summary": "auto"}}),
        ("/responses", {"model": "free"}),
        ("/responses", {"model": "free", "background": True}),
        ("/responses", {"model": "up@scripted", "prompt": {"id": "cheap"}, "run_limits": None}),
        ("/chat/completions", {"model": "up@scripted"}),
        ("/chat/completions", {"model": "free", "stream": True}),
    ],
)
def test_a_limit_of_cost_is_refused_where_what_may_answer_has_no_prices(server, upstream, said, path, given):
    asking = {"input": said} if path == "/responses" else {"messages": [{"role": "user", "content": said}]}
    status, reply = http_call(server.url, "POST", path, {**asking, "run_limits": {"cost": 0.5}, **given})
    assert (status, reply["error"]["param"]) == (400, "run_limits.cost")
    assert upstream.asked(said) == []


@pytest.mark.parametrize(
    ("model", "given", "expected"),
    [
        ("priced", {"run_limits": {"cost": 0.5}}, "failed"),
        ("thinks", {"run_limits": {"cost": 0.5}, "reasoning": {"summary": "auto"}}, "failed"),
        ("frugal", {}, "failed"),
        ("priced", {"run_limits": {"tokens": 1_000}}, "completed"),
    ],
)
def test_a_run_is_not_continued_without_its_limit_of_cost_once_the_prices_are_gone(
    base_env, new_database, upstream, said, tmp_path, model, given, expected
):
    catalog = tmp_path / "catalog.toml"
    catalog.write_text(PRICED.format(base=upstream.base_url))
    env = {**base_env, "DATABASE_URL": new_database(), "OPENAI_BASE_URL": "", "REPRISE_CATALOG": str(catalog)}
    asking = script([text("half "), gate(said), text("whole"), finish(), usage(5, 10)])
    with Served({**env, "REPRISE_SHUTDOWN_GRACE_S": "0"}) as served, served.client() as client:
        made = client.responses.create(model=model, input=asking, background=True, extra_body=given)
        upstream.wait_reached(said, 20)
        assert served.stop() == 0  # the run is handed back
    lines = catalog.read_text().splitlines()
    catalog.write_text("\n".join(line for line in lines if not line.startswith(("prices", "run_limits"))))
    upstream.open(said)
    with Served(env) as served, served.client() as client:
        until(lambda: client.responses.retrieve(made.id).status not in {"queued", "in_progress"})
        response = client.responses.retrieve(made.id)
    assert response.status == expected
    assert len(upstream.asked(asking)) == (2 if expected == "completed" else 1)
    if expected == "failed":
        assert response.error.message == (
            "'run_limits.cost' can't be kept: a model that may answer has no prices in the catalog."
        )


def test_a_limit_of_cost_holds_where_all_that_answers_has_prices(client, said):
    asking = script([note(said), text("half"), finish("length"), usage(5, 10)])
    assert ended(create(client, asking, model="thinks", run_limits={"cost": 0.02})) == ("incomplete", "max_run_cost")
    prompted = client.responses.create(model="priced", input=said, prompt={"id": "cheap"})
    assert prompted.status == "completed"


def test_an_upstream_that_is_named_directly_has_the_prices_and_limits_of_an_entry_for_it_only(client, upstream, said):
    made = create(client, said, model="other@bounded", run_limits={"cost": 0.5})
    assert (made.status, made.model) == ("completed", "other@bounded")
    [asked] = upstream.asked(said)
    assert asked.body["model"] == "bounded"
    assert limits_asked(upstream, said) == [1000]
    # The entry `bounded` is not for `up@bounded`.
    create(client, f"{said} without", model="up@bounded")
    assert limits_asked(upstream, f"{said} without") == [None]
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, said, model="up@bounded", run_limits={"cost": 0.4})
    assert caught.value.param == "run_limits.cost"


def test_the_catalog_s_limits_hold_without_any_in_the_request(client, upstream, mcp, said):
    asking = script([note(said), *[add(f"call_{at}", at) for at in range(3)], finish("tool_calls")])
    made = create(client, asking, model="bounded", tools=[mcp()], run_limits={"tokens": 900})
    assert ended(made) == ("incomplete", "max_tool_calls")
    assert limits_asked(upstream, asking) == [900]


def test_an_agent_has_limits_that_its_requests_do_not_change(client, server, upstream, said):
    made = create(client, script([note(said), text("half"), finish("length"), usage(5, 100)]), model="thrifty")
    assert ended(made) == ("incomplete", "max_run_tokens")
    status, reply = http_call(
        server.url, "POST", "/responses", {"model": "thrifty", "input": "hi", "run_limits": {"tokens": 1000}}
    )
    assert (status, reply["error"]["param"]) == (400, "run_limits.tokens")


def test_a_chat_completion_has_limits(client, mcp, said):
    asking = script([note(said), text("On it."), *[add(f"call_{at}", at) for at in range(2)], finish("tool_calls")])
    made = client.chat.completions.create(
        model="up@scripted",
        messages=[{"role": "user", "content": asking}],
        tools=[mcp()],
        extra_body={"run_limits": {"tool_calls": 1}},
    )
    assert (made.choices[0].finish_reason, made.choices[0].message.content) == ("length", "On it.")


# -- Compactions ------------------------------------------------------------------------------------------------------------


PROMPT = compaction_prompt(Settings())


@pytest.fixture
def context(upstream, said):
    """A context whose summary is cut off."""
    upstream.scripts[PROMPT] = script([text("half"), finish("length"), usage(5, 1000)])
    yield [{"role": "user", "content": said}, {"role": "assistant", "content": "Yes."}]
    upstream.scripts.pop(PROMPT)


def summary_limits(upstream, said) -> list[int | None]:
    """How long each summary of a context might be."""
    asked = [record.body for record in upstream.asked(PROMPT)]
    return [body.get("max_completion_tokens") for body in asked if body["messages"][0]["content"] == said]


@pytest.mark.parametrize("limits", [{"tokens": 100}, {"cost": 0.0000001}])
def test_the_summary_of_a_compaction_may_be_no_longer_than_what_is_left(client, upstream, said, context, limits):
    trigger = {"type": "compaction_trigger"}
    made = create(client, [*context, trigger], model="bounded", run_limits=limits, max_output_tokens=20)
    assert ended(made) == ("incomplete", f"max_run_{next(iter(limits))}")
    assert summary_limits(upstream, said) == [100]


def test_a_compaction_on_demand_that_its_agent_s_limits_cut_off_is_not_to_be_repeated(client, upstream, said, context):
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.compact(model="thrifty", input=context)
    assert caught.value.code == "max_run_tokens"
    assert summary_limits(upstream, said) == [100]


def test_a_context_that_is_compacted_on_the_way_is_within_the_limits(client, upstream, said, context):
    asked = {"role": "user", "content": "word " * 900}
    management = [{"type": "compaction", "compact_threshold": 1000}]
    made = create(client, [*context, asked], model="bounded", context_management=management)
    assert ended(made) == ("incomplete", "max_run_tokens")
    assert summary_limits(upstream, said) == [1000]


# -- Approvals --------------------------------------------------------------------------------------------------------------


def test_more_approved_calls_than_the_limit_are_refused_before_an_approval_is_used(client, mcp, said):
    calls = [add(f"call_{at}", at) for at in range(2)]
    tool = mcp(require_approval="always")
    asked = create(client, script([note(said), *calls, finish("tool_calls")], answer("Done.")), tools=[tool])
    requests = [item.id for item in asked.output if item.type == "mcp_approval_request"]
    assert len(requests) == 2
    approvals = [{"type": "mcp_approval_response", "approval_request_id": id, "approve": True} for id in requests]
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, approvals, previous_response_id=asked.id, tools=[tool], run_limits={"tool_calls": 1})
    assert caught.value.param == "run_limits.tool_calls"
    made = create(client, approvals, previous_response_id=asked.id, tools=[tool], run_limits={"tool_calls": 2})
    assert [item.status for item in made.output if item.type == "mcp_call"] == ["completed"] * 2
