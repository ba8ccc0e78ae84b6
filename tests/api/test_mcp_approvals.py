"""Approvals: what waits for one, and that each request is answered once and its call made once, whoever forges what."""

import asyncio
import json

import openai
import pytest

from tests.api.streams import streamed, types_of
from tests.replay import replay
from tests.upstream import answer, call, calling, finish, note, script, text
from tests.waiting import fetch, until


def approval(request, approve=True, **fields):
    """The answer to an approval request, given as item or id."""
    id = request if isinstance(request, str) else request.id
    return {"type": "mcp_approval_response", "approval_request_id": id, "approve": approve, **fields}


@pytest.fixture
def tools(mcp):
    """One server, whose every tool needs approval."""
    return [mcp(require_approval="always", options={"tools": "echo,add,gate"})]


@pytest.fixture
def ask(client, name, tools):
    """Makes a response that asks for approval of these calls; gives the response, its requests, and its input."""

    def make(*calls, then=None, **options):
        steps = [call(tool, given, id=f"c{index}", index=index) for index, (tool, given) in enumerate(calls)]
        given = script([note(name), *steps, finish("tool_calls")], *(then or [answer("Then.")]))
        first = client.responses.create(model="m", input=given, **{"tools": tools, **options})
        assert first.status == "completed"
        return first, [item for item in first.output if item.type == "mcp_approval_request"], given

    return make


def resent(given, response, *more):
    """The whole history as input."""
    return [{"role": "user", "content": given}, *(item.to_dict() for item in response.output), *more]


def refused(client, match, **body):
    """The param of a 400."""
    with pytest.raises(openai.BadRequestError, match=match) as caught:
        client.responses.create(model="m", **body)
    return caught.value.param


# -- Which calls need one ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "asked"),
    [
        (None, ["echo", "add"]),
        ("always", ["echo", "add"]),
        ("never", []),
        ({"always": {"tool_names": ["echo"]}}, ["echo", "add"]),
        ({"never": {"tool_names": ["echo"]}}, ["add"]),
        ({"never": {"read_only": True}}, ["echo"]),
        ({"never": {"tool_names": ["echo", "add"]}, "always": {"tool_names": ["add"]}}, ["add"]),
    ],
)
def test_what_needs_approval(ask, mcp, toolserver, name, wanted, asked):
    _, requests, _ = ask(("echo", {"x": 1}), ("add", {"a": 1, "b": 2}), tools=[mcp(require_approval=wanted)])
    assert [request.name for request in requests] == asked
    assert [one.tool for one in toolserver.calls(name)] == [tool for tool in ["echo", "add"] if tool not in asked]


def test_an_approval_request_is_only_added_and_done(server, name, tools):
    given = script([note(name), text("May I?"), call("echo", {"x": 1}, id="c"), finish("tool_calls")])
    events, made = streamed(server, input=given, tools=tools)
    assert types_of(events)[-3:] == ["output_item.added", "output_item.done", "completed"]
    request = made["output"][-1]
    assert request == {
        "id": request["id"],
        "type": "mcp_approval_request",
        "server_label": "box",
        "name": "echo",
        "arguments": '{"x":1}',
    }
    assert request["id"].startswith("mcpr_")


# -- Answers ----------------------------------------------------------------------------------------------------------------


def test_approved_calls_are_made_before_the_first_turn(server, client, upstream, toolserver, name, tools, ask):
    first, requests, given = ask(("echo", {"x": 1}), ("add", {"a": 1, "b": 2}), ("echo", {"x": 3}))
    answers = [approval(requests[0]), approval(requests[1], False, reason="Not today."), approval(requests[2])]
    events, made = streamed(server, input=answers, tools=tools, previous_response_id=first.id)
    assert types_of(events)[2:4] == ["output_item.added", "mcp_call.in_progress"]
    called = made["output"][:-1]
    assert [(item["type"], item["approval_request_id"], item["output"]) for item in called] == [
        ("mcp_call", requests[0].id, '{"x": 1}'),
        ("mcp_call", requests[2].id, '{"x": 3}'),
    ]
    assert [(item["arguments"], item["name"]) for item in called] == [
        (requests[index].arguments, requests[index].name) for index in (0, 2)
    ]
    # The model sees one turn of three calls, and why one was not made.
    _, said, *results = upstream.asked(given)[1].body["messages"]
    assert [one["function"]["name"] for one in said["tool_calls"]] == ["echo", "add", "echo"]
    assert [message["tool_call_id"] for message in results] == [one["id"] for one in said["tool_calls"]]
    assert (results[0]["content"], results[2]["content"]) == ('{"x": 1}', '{"x": 3}')
    assert "did not approve" in results[1]["content"] and "Not today." in results[1]["content"]
    assert len(toolserver.calls(name)) == 2


def test_a_denial_reaches_the_model(server, client, upstream, toolserver, name, tools, ask):
    first, [request], given = ask(("echo", {"x": 1}))
    denial = approval(request, False, reason="Because.")
    _, made = streamed(server, input=[denial], tools=tools, previous_response_id=first.id)
    assert [item["type"] for item in made["output"]] == ["message"]
    assert "Because." in upstream.asked(given)[1].body["messages"][-1]["content"]
    # It may be said again, but not taken back.
    again = client.responses.create(model="m", input=[denial], tools=tools, previous_response_id=first.id)
    assert again.output_text == "Then."
    refused(client, "answered already", input=[approval(request)], tools=tools, previous_response_id=first.id)
    assert toolserver.calls(name) == []


def test_a_request_that_nobody_answers_was_not_made(client, upstream, toolserver, name, tools, ask):
    first, *_ = ask(("echo", {"x": 1}))
    client.responses.create(model="m", input=f"Never mind, {name}", tools=tools, previous_response_id=first.id)
    [record] = upstream.asked(f"Never mind, {name}")
    assert "It was not made" in record.body["messages"][2]["content"]
    assert toolserver.calls(name) == []


def test_a_later_answer_finds_its_request(client, upstream, toolserver, name, tools, ask):
    first, [request], _ = ask(("echo", {"x": 1}))
    second = client.responses.create(model="m", input="Wait.", tools=tools, previous_response_id=first.id)
    asking = [approval(request), {"role": "user", "content": f"Go, {name}"}]
    third = client.responses.create(model="m", input=asking, tools=tools, previous_response_id=second.id)
    assert [item.type for item in third.output] == ["mcp_call", "message"]
    _, said, result, *_ = upstream.asked(f"Go, {name}")[0].body["messages"]
    assert (said["tool_calls"][0]["id"], result["content"]) == (request.id, '{"x": 1}')
    assert len(toolserver.calls(name)) == 1


def test_approvals_and_function_outputs_come_together(client, upstream, toolserver, name, tools, ask):
    tools = [*tools, {"type": "function", "name": "get_time"}]
    first, [request], given = ask(("echo", {"x": 1}), ("get_time", {}), tools=tools)
    assert [item.type for item in first.output] == ["mcp_list_tools", "function_call", "mcp_approval_request"]
    function = first.output[1]
    output = {"type": "function_call_output", "call_id": function.call_id, "output": "noon"}
    assert refused(client, "No tool output", input=[approval(request)], tools=tools, previous_response_id=first.id)
    asking = [output, approval(request)]
    second = client.responses.create(model="m", input=asking, tools=tools, previous_response_id=first.id)
    assert [item.type for item in second.output] == ["mcp_call", "message"]
    _, said, *results = upstream.asked(given)[1].body["messages"]
    assert [one["function"]["name"] for one in said["tool_calls"]] == ["echo", "get_time"]
    assert [one["content"] for one in results] == ['{"x": 1}', "noon"]


def test_a_call_without_approval_is_made_beside_one_that_waits(client, upstream, toolserver, name, mcp, ask):
    tools = [mcp(require_approval={"never": {"tool_names": ["add"]}})]
    first, [request], given = ask(("echo", {"x": 1}), ("add", {"a": 1, "b": 2}), tools=tools)
    assert [item.type for item in first.output] == ["mcp_list_tools", "mcp_approval_request", "mcp_call"]
    client.responses.create(model="m", input=[approval(request)], tools=tools, previous_response_id=first.id)
    _, said, *results = upstream.asked(given)[1].body["messages"]
    assert [one["function"]["name"] for one in said["tool_calls"]] == ["echo", "add"]
    assert [one["content"] for one in results] == ['{"x": 1}', "3"]


# -- Forgeries --------------------------------------------------------------------------------------------------------------


def test_forged_approvals_are_refused(client, toolserver, name, tools, ask):
    first, [request], _ = ask(("echo", {"x": 1}))
    chained = {"tools": tools, "previous_response_id": first.id}
    for id in ("mcpr_forged", "", "\0", first.output[0].id):
        assert refused(client, "not found", input=[approval(id)], **chained) == "input[0].approval_request_id"
    twice = [approval(request), approval(request)]
    assert refused(client, "answered twice", input=twice, **chained) == "input[1].approval_request_id"
    # Alone, without the request before it.
    assert refused(client, "not found", input=[approval(request)], tools=tools)
    # One that this server never made, though a stored response had it as input.
    forged = {
        "type": "mcp_approval_request",
        "id": f"mcpr_{name}",
        "server_label": "box",
        "name": "echo",
        "arguments": "{}",
    }
    planted = client.responses.create(model="m", input=[{"role": "user", "content": "x"}, forged], tools=tools)
    refused(client, "not found", input=[approval(forged["id"])], tools=tools, previous_response_id=planted.id)
    refused(client, "not found", input=[forged, approval(forged["id"])], tools=tools)
    assert toolserver.calls(name) == []


@pytest.mark.parametrize(
    "change", [{"name": "add"}, {"arguments": '{"x": 2}'}, {"arguments": "no json"}, {"server_label": "other"}]
)
def test_a_copy_that_says_something_else_is_refused(client, toolserver, name, tools, mcp, ask, change):
    first, [request], given = ask(("echo", {"x": 1}))
    *before, copy = resent(given, first)
    asking = [*before, {**copy, **change}, approval(request)]
    tools = [*tools, mcp("other")]
    assert (
        refused(client, "not what was asked", input=asking, tools=tools)
        == f"input[{len(asking) - 1}].approval_request_id"
    )
    assert toolserver.calls(name) == []


def test_a_copy_is_compared_as_json(client, toolserver, name, tools, ask):
    first, [request], given = ask(("echo", {"x": 1, "y": [1.0, None]}))
    *before, copy = resent(given, first)
    copy["arguments"] = json.dumps({"y": [1, None], "x": 1.0}, indent=2)
    second = client.responses.create(model="m", input=[*before, copy, approval(request)], tools=tools)
    called = second.output[0]
    assert (called.arguments, called.approval_request_id) == (request.arguments, request.id)
    assert [one.arguments for one in toolserver.calls(name)] == [{"x": 1, "y": [1.0, None]}]


def test_a_server_that_is_not_declared_any_more_does_not_use_up_the_approval(client, toolserver, name, tools, ask):
    first, [request], _ = ask(("echo", {"x": 1}))
    assert refused(client, "not in 'tools'", input=[approval(request)], previous_response_id=first.id) == "tools"
    client.responses.create(model="m", input=[approval(request)], tools=tools, previous_response_id=first.id)
    assert len(toolserver.calls(name)) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"allowed_tools": ["add"]},
        {"options": {"tools": "add"}},
        {"options": {"status": 500}},
        {"options": {"auth": "t"}},
    ],
)
def test_an_approved_tool_that_is_gone_is_a_failed_call(client, upstream, toolserver, name, mcp, ask, change):
    first, [request], given = ask(("echo", {"x": 1}))
    # The list is not in the context: only what the client chose to resend is.
    asking = [item for item in resent(given, first, approval(request)) if item.get("type") != "mcp_list_tools"]
    second = client.responses.create(model="m", input=asking, tools=[mcp(**change)])
    called = next(item for item in second.output if item.type == "mcp_call")
    assert (called.status, called.approval_request_id) == ("failed", request.id)
    assert "no tool named 'echo'" in called.error.message
    assert "no tool named 'echo'" in upstream.asked(given)[1].body["messages"][-1]["content"]
    assert toolserver.calls(name) == []


# -- Once -------------------------------------------------------------------------------------------------------------------


async def test_of_two_branches_at_once_one_makes_the_call(async_client, toolserver, name, tools):
    given = script([note(name), *calling("echo", {"x": 1})], answer("Then."))
    first = await async_client.responses.create(model="m", input=given, tools=tools)
    body = {"model": "m", "input": [approval(first.output[-1])], "tools": tools, "previous_response_id": first.id}
    modes = [{}, {"store": False}, {"background": True}, {"stream": True}] * 2
    made = await asyncio.gather(
        *(async_client.responses.create(**body, **mode) for mode in modes), return_exceptions=True
    )
    lost = [error for error in made if isinstance(error, openai.BadRequestError)]
    assert len(lost) == len(modes) - 1, made
    assert all("answered already" in error.message for error in lost)
    [won] = [one for one in made if not isinstance(one, Exception)]
    if isinstance(won, openai.AsyncStream):
        async for _ in won:
            pass
    elif won.status == "queued":
        await asyncio.to_thread(until, lambda: len(toolserver.calls(name)) == 1)
    assert len(toolserver.calls(name)) == 1


@pytest.mark.parametrize("store", [True, False])
def test_a_resent_history_makes_nothing_again(client, toolserver, name, tools, ask, store):
    first, [request], given = ask(("echo", {"x": 1}))
    second = client.responses.create(
        model="m", input=[approval(request)], tools=tools, previous_response_id=first.id, store=store
    )
    history = resent(given, first, approval(request), *(item.to_dict() for item in second.output))
    third = client.responses.create(
        model="m", input=[*history, {"role": "user", "content": "And?"}], tools=tools, store=store
    )
    assert [item.type for item in third.output] == ["message"]
    chained = client.responses.create(model="m", input="And?", tools=tools, previous_response_id=first.id)
    assert [item.type for item in chained.output] == ["message"]
    assert len(toolserver.calls(name)) == 1


@pytest.mark.parametrize("mode", [{"store": False}, {"store": False, "stream": True}, {}, {"background": True}])
def test_what_an_unstored_response_asks_for_is_approved_once(client, toolserver, name, tools, ask, mode):
    first, [request], given = ask(("echo", {"x": 1.0}), store=False)
    *before, copy = resent(given, first)
    copy["arguments"] = json.dumps(json.loads(copy["arguments"]), indent=1)
    body = {"input": [*before, copy, approval(request)], "tools": tools}
    second = _made(client, client.responses.create(model="m", **body, **mode))
    assert [item.type for item in second.output] == ["mcp_call", "message"]
    assert second.output[0].approval_request_id == request.id
    for again in ({"store": False}, {}, {"background": True}):
        refused(client, "answered already", **body, **again)
    history = resent(given, first, approval(request), *(item.to_dict() for item in second.output))
    third = client.responses.create(
        model="m", input=[*history, {"role": "user", "content": "And?"}], tools=tools, store=False
    )
    assert [item.type for item in third.output] == ["message"]
    assert [one.arguments for one in toolserver.calls(name)] == [{"x": 1.0}]


def test_what_an_unstored_response_asks_for_can_be_approved_later_in_a_chain(client, toolserver, name, tools, ask):
    first, [request], given = ask(("echo", {"x": 1}), store=False)
    second = client.responses.create(
        model="m", input=[*resent(given, first), {"role": "user", "content": "Wait."}], tools=tools
    )
    third = client.responses.create(model="m", input=[approval(request)], tools=tools, previous_response_id=second.id)
    assert [item.type for item in third.output] == ["mcp_call", "message"]
    assert len(toolserver.calls(name)) == 1


def test_a_denial_of_what_an_unstored_response_asks_for_reaches_the_model(
    client, upstream, toolserver, name, tools, ask
):
    first, [request], given = ask(("echo", {"x": 1}), store=False)
    body = {"tools": tools, "store": False}
    client.responses.create(model="m", input=resent(given, first, approval(request, False, reason="Because.")), **body)
    assert "Because." in upstream.asked(given)[1].body["messages"][-1]["content"]
    refused(client, "answered already", input=resent(given, first, approval(request)), **body)
    assert toolserver.calls(name) == []


@pytest.mark.parametrize(
    "change",
    [
        {"name": "add"},
        {"arguments": '{"x": 2}'},
        {"server_label": "other"},
        {"id": "mcpr_" + "0" * 68},
    ],
)
def test_forged_approvals_of_unstored_responses_are_refused(client, toolserver, name, tools, mcp, ask, change):
    first, [request], given = ask(("echo", {"x": 1}), store=False)
    *before, copy = resent(given, first)
    copy |= change
    asking = [*before, copy, approval(copy["id"])]
    at = refused(client, "not found", input=asking, tools=[*tools, mcp("other")], store=False)
    assert at == f"input[{len(asking) - 1}].approval_request_id"
    # Alone, without the request.
    refused(client, "not found", input=[approval(request)], tools=tools, store=False)
    assert toolserver.calls(name) == []


def test_an_approved_call_that_was_broken_off_is_not_made_again(client, upstream, toolserver, name, tools, ask):
    first, [request], _ = ask(("gate", {"name": name}))
    begun = client.responses.create(
        model="m", input=[approval(request)], tools=tools, previous_response_id=first.id, stream=True
    )
    id = next(begun).response.id
    toolserver.wait_reached(name)
    begun.response.close()
    broken = until(lambda: _retrieved(client, id))
    assert (broken.status, broken.output[-1].status) == ("cancelled", "incomplete")
    refused(client, "answered already", input=[approval(request)], tools=tools, previous_response_id=first.id)
    client.responses.create(model="m", input=f"What now, {name}?", tools=tools, previous_response_id=id)
    _, _, result, *_ = upstream.asked(f"What now, {name}?")[0].body["messages"]
    assert "may have been carried out" in result["content"]
    assert len(toolserver.calls(name)) == 1


def _retrieved(client, id):
    try:
        return client.responses.retrieve(id)
    except openai.NotFoundError:
        return None


# -- In the background, and without a store ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_approvals_in_the_background(client, server, toolserver, name, tools, ask, stream):
    given = script([note(name), *calling("echo", {"x": 1})], answer("Then."))
    made = _ended(client, client.responses.create(model="m", input=given, tools=tools, background=True, stream=stream))
    assert (made.status, [item.type for item in made.output]) == (
        "completed",
        ["mcp_list_tools", "mcp_approval_request"],
    )
    request = made.output[-1]
    body = {"model": "m", "input": [approval(request)], "tools": tools, "previous_response_id": made.id}
    second = _ended(client, client.responses.create(**body, background=True, stream=stream))
    assert [item.type for item in second.output] == ["mcp_call", "message"]
    assert second.output[0].approval_request_id == request.id
    with pytest.raises(openai.BadRequestError, match="answered already"):
        client.responses.create(**body, background=True)
    assert len(toolserver.calls(name)) == 1


def _made(client, begun):
    """A response at its end, however it is made."""
    if isinstance(begun, openai.Stream):
        return list(begun)[-1].response
    return begun if begun.status == "completed" else _ended(client, begun)


def _ended(client, begun):
    """A background response at its end, followed by its stream or polled."""
    if isinstance(begun, openai.Stream):
        events = [event.to_dict() for event in begun]
        return client.responses.retrieve(replay(events)["id"])
    return until(lambda: (made := client.responses.retrieve(begun.id)).status not in {"queued", "in_progress"} and made)


def test_an_approval_that_is_not_stored_counts_all_the_same(client, server, toolserver, name, tools, ask):
    first, [request], _ = ask(("echo", {"x": 1}))
    body = {"input": [approval(request)], "tools": tools, "previous_response_id": first.id}
    second = client.responses.create(model="m", store=False, **body)
    assert [item.type for item in second.output] == ["mcp_call", "message"]
    refused(client, "answered already", **body)
    assert len(toolserver.calls(name)) == 1
    rows = fetch(server.database_url, "select approve from approvals where request_id = $1", request.id)
    assert [row["approve"] for row in rows] == [True]


@pytest.mark.parametrize(
    "choice",
    [
        "none",
        "required",
        {"type": "mcp", "server_label": "box", "name": "add"},
        {"type": "mcp", "server_label": "other"},
        {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "mcp", "server_label": "other"}]},
    ],
)
def test_an_approved_call_is_made_whatever_the_model_may_call(client, upstream, name, tools, mcp, ask, choice):
    tools = [*tools, mcp("other", options={"tools": "echo"})]
    first, [request], given = ask(("box__echo", {"x": 1}), tools=tools)
    second = client.responses.create(
        model="m", input=[approval(request)], tools=tools, tool_choice=choice, previous_response_id=first.id
    )
    assert (second.output[0].output, second.output_text) == ('{"x": 1}', "Then.")
    asked = upstream.asked(given)[1].body
    assert asked.get("tool_choice") == ("none" if choice == "none" else None)
    [said] = asked["messages"][1]["tool_calls"]
    assert said["function"]["name"] == "box__echo"


def test_a_refused_request_uses_up_nothing(client, toolserver, name, tools, ask):
    first, [request], _ = ask(("echo", {"x": 1}))
    body = {"input": [approval(request)], "tools": tools, "previous_response_id": first.id}
    refused(client, "temperature", **body, temperature=9)
    client.responses.create(model="m", **body)
    assert len(toolserver.calls(name)) == 1


def test_a_prewarm_uses_up_no_approval(client, toolserver, name, tools, ask):
    first, (request,), _ = ask(("echo", {"x": 1}))
    body = {"model": "m", "previous_response_id": first.id, "tools": tools, "input": [approval(request)]}
    warmed = client.responses.create(**body, extra_body={"prompt_cache_options": {"prewarm": True}})
    assert (warmed.status, warmed.output, toolserver.calls(name)) == ("completed", [], [])
    assert [item.type for item in client.responses.create(**body).output] == ["mcp_call", "message"]
    assert len(toolserver.calls(name)) == 1


def test_what_is_approved_is_called_whatever_becomes_of_other_servers(client, toolserver, name, tools, ask):
    first, (request,), _ = ask(("echo", {"x": 1}))
    gone = {"type": "mcp", "server_label": "gone", "server_url": "http://127.0.0.1:1"}
    body = {"model": "m", "previous_response_id": first.id, "input": [approval(request)]}
    with pytest.raises(openai.APIStatusError) as failed:
        client.responses.create(
            **body, tools=[*tools, gone], tool_choice={"type": "mcp", "server_label": "gone", "name": "x"}
        )
    assert failed.value.status_code == 424
    assert len(toolserver.calls(name)) == 1


@pytest.mark.parametrize("wanted", [{"never": {"tool_name": ["echo"]}}, {"nevr": {"tool_names": ["echo"]}}])
def test_a_mistyped_filter_is_refused(client, mcp, wanted):
    assert refused(client, "Unknown parameter", input="x", tools=[mcp(require_approval=wanted)]).startswith("tools[0]")
