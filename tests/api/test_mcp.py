"""MCP tools: listing, calls, approvals, limits; through the official client, with a scripted MCP server."""

import contextlib
import json
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from tests.api.streams import streamed, types_of
from tests.replay import replay
from tests.servers import Served
from tests.toolserver.tools import TOOLS
from tests.upstream import answer, call, calling, error, finish, note, script, status, text, usage


def test_tools_are_listed_called_and_their_results_read(client, upstream, toolserver, name, mcp):
    given = script([*calling("add", {"a": 1, "b": 2}), usage(10, 2)], [*answer("It is 3."), usage(20, 3)])
    tools = [mcp(server_description="Sums.", allowed_tools=["add", "echo"])]
    first = client.responses.create(model="m", input=given, tools=tools)
    assert (first.status, first.output_text) == ("completed", "It is 3.")
    listed, called, message = first.output
    assert (listed.type, listed.server_label, [tool.name for tool in listed.tools]) == (
        "mcp_list_tools",
        "box",
        list(TOOLS),
    )
    assert listed.id.startswith("mcpl_") and called.id.startswith("mcp_")
    assert (called.type, called.server_label, called.name, json.loads(called.arguments), called.output) == (
        "mcp_call",
        "box",
        "add",
        {"a": 1, "b": 2},
        "3",
    )
    assert (called.status, called.error, called.approval_request_id, message.type) == (
        "completed",
        None,
        None,
        "message",
    )
    asked_first, asked_then = upstream.asked(given)
    assert [tool["function"]["name"] for tool in asked_first.body["tools"]] == ["echo", "add"]
    assert asked_then.body["messages"][1:] == [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": called.id, "type": "function", "function": {"name": "add", "arguments": called.arguments}}
            ],
        },
        {"role": "tool", "tool_call_id": called.id, "content": "3"},
    ]
    assert (first.usage.input_tokens, first.usage.output_tokens) == (30, 5)
    # The list is in the context now, and is not asked for again.
    second = client.responses.create(model="m", input="And now?", previous_response_id=first.id, tools=tools)
    assert [item.type for item in second.output] == ["message"]
    assert len(toolserver.sessions(name)) == 1
    assert all(session.closed.wait(5) for session in toolserver.sessions(name))


def test_the_events_of_a_call_are_those_of_the_hosted_api(server, mcp):
    given = script([text("Let me see."), call("echo", {"x": 1}, id="c"), finish("tool_calls")], answer("Done."))
    events, made = streamed(server, input=given, tools=[mcp(allowed_tools=["echo"])])
    assert types_of(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "mcp_list_tools.in_progress",
        "mcp_list_tools.completed",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "mcp_call.in_progress",
        "mcp_call_arguments.delta",
        "mcp_call_arguments.done",
        "mcp_call.completed",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert [item["type"] for item in made["output"]] == ["mcp_list_tools", "message", "mcp_call", "message"]


def test_a_call_waits_for_approval_and_is_made_once(client, upstream, toolserver, name, mcp):
    given = script(calling("echo", {"x": 1}, id="c"), answer("Echoed."))
    tools = [mcp(require_approval="always", allowed_tools=["echo"])]
    first = client.responses.create(model="m", input=given, tools=tools)
    assert first.status == "completed"
    request = first.output[-1]
    assert (request.type, request.name, request.server_label) == ("mcp_approval_request", "echo", "box")
    assert toolserver.calls(name) == []
    approval = {"type": "mcp_approval_response", "approval_request_id": request.id, "approve": True}
    second = client.responses.create(model="m", previous_response_id=first.id, tools=tools, input=[approval])
    called, message = second.output
    assert (called.type, called.approval_request_id, called.name, called.arguments, called.server_label) == (
        "mcp_call",
        request.id,
        request.name,
        request.arguments,
        request.server_label,
    )
    assert message.content[0].text == "Echoed."
    assert [one.arguments for one in toolserver.calls(name)] == [{"x": 1}]
    assert upstream.asked(given)[-1].body["messages"][-1]["content"] == called.output
    with pytest.raises(openai.BadRequestError, match="answered already"):
        client.responses.create(model="m", previous_response_id=first.id, tools=tools, input=[approval])
    assert len(toolserver.calls(name)) == 1


# -- What a call gives ------------------------------------------------------------------------------------------------------


def called(response):
    """The calls in a response's output."""
    return [item for item in response.output if item.type == "mcp_call"]


@pytest.mark.parametrize(
    ("tool", "arguments", "output"),
    [
        ("structured", {}, '{"sum":3,"of":[1,2]}'),
        ("image", {}, "[image/png, 16 bytes]"),
        ("say", {"content": []}, ""),
        ("say", {"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "a\nb"),
        ("say", {"content": [{"type": "resource", "resource": {"uri": "file:///a", "text": "said"}}]}, "said"),
        (
            "say",
            {
                "content": [
                    {"type": "resource", "resource": {"uri": "file:///a", "blob": "AAEC", "mimeType": "application/x"}}
                ]
            },
            "[resource file:///a, application/x, 3 bytes]",
        ),
        (
            "say",
            {"content": [{"type": "resource_link", "uri": "file:///a", "name": "a"}]},
            "[resource link file:///a, a]",
        ),
        ("raw", {"result": {"content": "nonsense"}}, ""),
        ("half", {}, "half a pair: \ufffd"),
        ("echo", "", "{}"),
        ("echo", {"text": "a\0b"}, '{"text": "a\\u0000b"}'),
    ],
)
def test_results_are_rendered_for_the_model(server, client, upstream, name, mcp, tool, arguments, output):
    given = script([note(name), *calling(tool, arguments)], answer("Done."))
    _, made = streamed(server, input=given, tools=[mcp()])
    item = made["output"][1]
    assert (item["status"], item["error"], item["output"]) == ("completed", None, output)
    assert upstream.asked(given)[1].body["messages"][-1]["content"] == output
    assert client.responses.retrieve(made["id"]).output[1].to_dict() == item


FAILURES = [
    ("fail", {"text": "it broke"}, "mcp_tool_execution_error", None, "it broke"),
    ("refuse", {"code": -32000, "message": "no way"}, "mcp_protocol_error", -32000, "no way"),
    ("status", {"status": 503}, "http_error", 503, "503"),
    ("cut", {}, "http_error", 502, "broke off"),
    ("endless", {}, "mcp_protocol_error", -32700, "longer than"),
    ("long", {"chars": 200_000}, "mcp_protocol_error", -32700, "longer than"),
    ("slow", {"ms": 5000}, "mcp_protocol_error", -32001, "did not answer within"),
    ("echo", "not json", "mcp_protocol_error", -32602, "not a JSON object"),
    ("echo", "[1]", "mcp_protocol_error", -32602, "not a JSON object"),
]


LOST_ON_ONE_STREAM = {
    "cut": ("mcp_protocol_error", -32000, "is over"),
    "endless": ("mcp_protocol_error", -32001, "did not answer within"),
    "long": ("mcp_protocol_error", -32000, ""),
}
"""Over HTTP+SSE all answers come on one stream: what breaks it breaks every call."""


@pytest.fixture(scope="module")
def impatient(base_env, new_database):
    """A server with small limits for the calls of tools."""
    env = {
        **base_env,
        "DATABASE_URL": new_database(),
        "REPRISE_TOOL_CALL_TIMEOUT_S": "2",
        "REPRISE_TOOL_ANSWER_BYTES_MAX": "100000",
        "REPRISE_TOOL_OUTPUT_BYTES_MAX": "1024",
        "REPRISE_TOOL_CALLS_AT_ONCE_MAX": "2",
        "REPRISE_TURNS_MAX": "4",
    }
    with Served(env) as running:
        yield running


@pytest.mark.parametrize("transport", ["mcp", "json", "sse"])
@pytest.mark.parametrize(("tool", "arguments", "kind", "code", "words"), FAILURES)
def test_a_call_that_fails_is_read_by_the_model_and_ends_nothing(
    impatient, upstream, toolserver, name, mcp, transport, tool, arguments, kind, code, words
):
    # The other call of the turn, and one of the next turn, are made all the same.
    given = script(
        [note(name), call(tool, arguments, id="a"), call("echo", {"x": 1}, id="b", index=1), finish("tool_calls")],
        calling("add", {"a": 1, "b": 2}, id="c"),
        answer("Sorry."),
    )
    events, made = streamed(impatient, input=given, tools=[mcp(transport=transport)])
    assert made["status"] == "completed"
    failed, echoed, added = (item for item in made["output"] if item["type"] == "mcp_call")
    breaks_all = transport == "sse" and tool in LOST_ON_ONE_STREAM
    if breaks_all:
        kind, code, words = LOST_ON_ONE_STREAM[tool]
    assert (failed["status"], failed["output"], failed["error"]["type"]) == ("failed", None, kind)
    assert failed["error"].get("code") == code
    assert words in json.dumps(failed["error"])
    if not breaks_all:
        assert types_of(events).count("mcp_call.failed") == 1
        assert (echoed["output"], added["output"]) == ('{"x": 1}', "3")
    read = next(
        message for message in upstream.asked(given)[1].body["messages"] if message.get("tool_call_id") == failed["id"]
    )
    assert read["content"].startswith("Error: ") and words in read["content"]
    if tool == "echo":
        assert [one.arguments for one in toolserver.calls(name, "echo")] == [{"x": 1}]
    for session in toolserver.sessions(name):
        assert session.closed.wait(5)


def test_what_the_model_meant_by_arguments_that_are_no_json_stays_readable(client, upstream, name, mcp):
    given = script([note(name), *calling("echo", '{"x": ')], answer("Sorry."))
    client.responses.create(model="m", input=given, tools=[mcp()])
    [said] = upstream.asked(given)[1].body["messages"][-2]["tool_calls"]
    assert json.loads(said["function"]["arguments"]) == {"not_json": '{"x": '}


def test_an_output_that_is_too_long_is_cut_with_a_note(impatient, name, mcp):
    given = script([note(name), *calling("long", {"chars": 2000})], answer("Long."))
    _, made = streamed(impatient, input=given, tools=[mcp()])
    assert made["output"][1]["output"] == "é" * 512 + "\n[cut off here: 4000 bytes in all, 1024 are shown]"


def test_calls_of_one_turn_are_made_at_once_but_no_more_than_allowed(impatient, toolserver, upstream, name, mcp):
    gates = [f"{name}{number}" for number in range(3)]
    given = script(
        [
            note(name),
            *(call("gate", {"name": gate}, id=f"c{index}", index=index) for index, gate in enumerate(gates)),
            finish("tool_calls"),
        ],
        answer("Through."),
    )
    with ThreadPoolExecutor() as pool:
        running = pool.submit(streamed, impatient, input=given, tools=[mcp()])
        toolserver.wait_reached(gates[0], 0.4)
        toolserver.wait_reached(gates[1], 0.4)
        assert not toolserver.script.gate(gates[2]).reached.is_set()
        assert len(toolserver.calls(name)) == 2
        toolserver.open(gates[1])
        toolserver.wait_reached(gates[2], 0.4)
        toolserver.open(gates[0])
        toolserver.open(gates[2])
        _, made = running.result()
    assert [item["output"] for item in made["output"][1:-1]] == ["through"] * 3
    assert [json.loads(item["arguments"])["name"] for item in made["output"][1:-1]] == gates
    assert len(toolserver.sessions(name)) == 1
    # To the model they are one turn.
    said, *_ = upstream.asked(given)[1].body["messages"][1:]
    assert len(said["tool_calls"]) == 3


# -- Turns ------------------------------------------------------------------------------------------------------------------


def roles(record):
    """The messages of a chat request, as far as turns are concerned."""
    return [
        [one["function"]["name"] for one in message["tool_calls"]] if message.get("tool_calls") else message["role"]
        for message in record.body["messages"]
    ]


def test_turns_stay_turns_in_what_the_model_reads(client, upstream, name, mcp):
    given = script(
        [note(name), *calling("echo", {"x": 1}, id="c")],
        [call("echo", {"x": 2}, id="c"), call("add", {"a": 1, "b": 2}, id="d", index=1), finish("tool_calls")],
        [text("Then."), call("echo", {"x": 3}, id="c"), finish("tool_calls")],
        answer("Done."),
    )
    tools = [mcp()]
    response = client.responses.create(model="m", input=given, tools=tools)
    turns = ["user", ["echo"], "tool", ["echo", "add"], "tool", "tool", ["echo"], "tool"]
    assert [roles(record) for record in upstream.asked(given)] == [turns[:1], turns[:3], turns[:6], turns]
    assert upstream.asked(given)[3].body["messages"][6]["content"] == "Then."
    # And so they do in a chain, and when the client resends everything.
    resent = [{"role": "user", "content": given}, *(item.to_dict() for item in response.output)]
    more = {"role": "user", "content": f"more of {name}"}
    client.responses.create(model="m", input=[*resent, more], tools=tools, store=False)
    client.responses.create(model="m", input=[more], tools=tools, previous_response_id=response.id)
    assert [roles(record) for record in upstream.asked(f"more of {name}")] == [[*turns, "assistant", "user"]] * 2


def test_text_calls_of_ours_and_of_the_client_in_one_turn(server, client, upstream, toolserver, name, mcp):
    given = script(
        [
            note(name),
            text("Both."),
            call("echo", {"x": 1}, id="a"),
            call("get_time", {"zone": "UTC"}, id="b", index=1),
            call("add", {"a": 1, "b": 2}, id="c", index=2),
            call("nothing", {}, id="d", index=3),
            finish("tool_calls"),
        ],
        answer("It is noon, and 3."),
    )
    tools = [mcp(), {"type": "function", "name": "get_time"}]
    _, made = streamed(server, input=given, tools=tools)
    assert [item["type"] for item in made["output"]] == [
        "mcp_list_tools",
        "message",
        "function_call",
        "mcp_call",
        "mcp_call",
    ]
    assert (made["status"], len(upstream.asked(given))) == ("completed", 1)
    output = {"type": "function_call_output", "call_id": "b", "output": "noon"}
    chained = client.responses.create(model="m", input=[output], tools=tools, previous_response_id=made["id"])
    assert chained.output_text == "It is noon, and 3."
    resent = [{"role": "user", "content": given}, *made["output"], output]
    again = client.responses.create(model="m", input=resent, tools=tools, store=False)
    assert again.output_text == "It is noon, and 3."
    for record in upstream.asked(given)[1:]:
        _, said, *results = record.body["messages"]
        assert said["content"] == "Both."
        # As the model made them, though the client's own comes first in the output.
        assert [one["function"]["name"] for one in said["tool_calls"]] == ["echo", "get_time", "add"]
        assert [one["content"] for one in results] == ['{"x": 1}', "noon", "3"]
    assert len(toolserver.calls(name)) == 2


def test_a_refused_call_stands_in_its_turn(client, upstream, name, mcp):
    given = script(
        [
            note(name),
            text("Both."),
            call("echo", {"x": 1}, id="a"),
            call("nothing", {}, id="b", index=1),
            call("echo", {"x": 2}, id="c", index=2),
            finish("tool_calls"),
        ],
        answer("Done."),
    )
    client.responses.create(model="m", input=given, tools=[mcp()])
    assert roles(upstream.asked(given)[1]) == ["user", ["echo", "nothing", "echo"], "tool", "tool", "tool"]


def test_a_later_turn_that_the_upstream_refuses_fails_the_response_with_what_was_done(server, client, name, mcp):
    refusal = {"error": {"message": "too much", "type": "invalid_request_error", "code": "too_much", "param": None}}
    given = script([note(name), *calling("echo", {"x": 1}), usage(10, 2)], [status(400, refusal)])
    _, made = streamed(server, input=given, tools=[mcp()])
    assert (made["status"], made["error"]["message"]) == ("failed", "too much")
    assert [item["type"] for item in made["output"]] == ["mcp_list_tools", "mcp_call"]
    assert (made["usage"]["input_tokens"], made["output"][1]["output"]) == (10, '{"x": 1}')
    assert client.responses.retrieve(made["id"]).to_dict() == made
    with pytest.raises(openai.BadRequestError, match="too much"):
        client.responses.create(model="m", input=given, tools=[mcp()])


def test_items_of_tools_are_listed_retrieved_and_deleted_like_others(client, name, mcp):
    given = script([note(name), *calling("echo", {"x": 1})], answer("Done."))
    first = client.responses.create(model="m", input=given, tools=[mcp()], include=["web_search_call.results"])
    assert client.responses.retrieve(first.id).output == first.output
    second = client.responses.create(model="m", input="more", previous_response_id=first.id, tools=[mcp()])
    listed = client.responses.input_items.list(second.id, order="asc", limit=2)
    assert [item.type for item in listed] == ["message", "mcp_list_tools", "mcp_call", "message", "message"]
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    third = client.responses.create(model="m", input="and more", previous_response_id=second.id, tools=[mcp()])
    assert [item.type for item in third.output] == ["message"]


# -- Limits -----------------------------------------------------------------------------------------------------------------


def test_beyond_max_tool_calls_the_model_is_told_to_stop(server, upstream, toolserver, name, mcp):
    given = script(
        [
            note(name),
            *(call("echo", {"x": number}, id=f"c{number}", index=number) for number in range(3)),
            finish("tool_calls"),
        ],
        calling("echo", {"x": 9}),
        answer("Enough."),
    )
    _, made = streamed(server, input=given, tools=[mcp()], max_tool_calls=2)
    assert [item["type"] for item in made["output"]] == ["mcp_list_tools", "mcp_call", "mcp_call", "message"]
    assert [one.arguments["x"] for one in toolserver.calls(name)] == [0, 1]
    assert made["max_tool_calls"] == 2
    for record in upstream.asked(given)[1:]:
        assert roles(record)[1] == ["echo", "echo", "echo"]
        assert sum("limit of tool calls" in str(message["content"]) for message in record.body["messages"]) >= 1


def test_a_create_that_fails_behind_a_call_is_not_sent_again(server, upstream, toolserver, name, mcp):
    """The SDK tries a 5xx twice more by itself: here that would make the same call three times."""
    given = script([note(name), *calling("add", {"a": 1, "b": 2})], [error("out of memory")])
    with server.client().with_options(max_retries=2) as client:
        with pytest.raises(openai.InternalServerError) as failed:
            client.responses.create(model="m", input=given, tools=[mcp()])
        assert failed.value.response.headers["x-should-retry"] == "false"
        stored = client.responses.retrieve(failed.value.response.headers["x-reprise-response-id"])
    assert (stored.status, [item.type for item in stored.output]) == ("failed", ["mcp_list_tools", "mcp_call"])
    assert len(toolserver.calls(name)) == 1


def test_a_reply_that_is_too_much_to_be_held_is_not_made_again(new_server, toolserver, name, mcp):
    server = new_server(REPRISE_UNREAD_BYTES_MAX="65536")
    given = script([note(name), *calling("long", {"chars": 60_000})], answer("Long."))
    with server.client().with_options(max_retries=2) as client:
        with pytest.raises(openai.InternalServerError) as failed:
            client.responses.create(model="m", input=given, tools=[mcp()])
        assert failed.value.status_code == 503
        assert failed.value.response.headers["x-should-retry"] == "false"
        made = failed.value.response.headers["x-reprise-response-id"]
        assert [item.type for item in client.responses.input_items.list(made)] == ["message"]
    assert len(toolserver.calls(name)) == 1


def test_turns_are_limited(impatient, upstream, toolserver, name, mcp):
    given = script(*([note(name), *calling("echo", {"x": number}), usage(1, 1)] for number in range(9)))
    _, made = streamed(impatient, input=given, tools=[mcp()], tool_choice="required")
    assert (made["status"], made["incomplete_details"]) == ("incomplete", {"reason": "max_turns"})
    assert len(upstream.asked(given)) == 4
    assert len(toolserver.calls(name)) == 3, "nobody would read what comes of the last turn's call"
    assert made["usage"]["total_tokens"] == 8
    assert all(session.closed.wait(5) for session in toolserver.sessions(name))


def test_max_output_tokens_is_a_budget_over_turns(server, upstream, toolserver, name, mcp):
    given = script(
        [note(name), *calling("echo", {"x": 1}), usage(10, 30)],
        [*calling("echo", {"x": 2}), usage(20, 50)],
        [*calling("echo", {"x": 3}), usage(20, 20)],
        answer("never"),
    )
    _, made = streamed(server, input=given, tools=[mcp()], max_output_tokens=100)
    assert [record.body["max_tokens"] for record in upstream.asked(given)] == [100, 70, 20]
    assert (made["status"], made["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert made["usage"]["output_tokens"] == 100 and made["usage"]["input_tokens"] == 50
    assert len(toolserver.calls(name)) == 3


def test_a_turn_that_is_cut_short_makes_no_calls(server, toolserver, name, mcp):
    given = script([note(name), call("echo", {"x": 1}, id="c"), finish("length")])
    _, made = streamed(server, input=given, tools=[mcp()])
    assert (made["status"], [item["type"] for item in made["output"]]) == ("incomplete", ["mcp_list_tools"])
    assert toolserver.calls(name) == []


@pytest.mark.parametrize("where", ["call", "list"])
def test_a_run_that_takes_too_long_ends_in_mid_call(new_server, upstream, toolserver, name, mcp, where):
    server = new_server(REPRISE_RUN_DURATION_MAX_S="0.5")
    options = {"silent": 1} if where == "list" else {}
    given = script([note(name), *calling("gate", {"name": name})])
    events, made = streamed(server, input=given, tools=[mcp(options=options)])
    assert (made["status"], "REPRISE_RUN_DURATION_MAX_S" in made["error"]["message"]) == ("failed", True)
    last = made["output"][-1]
    if where == "call":
        assert (last["type"], last["status"], last["output"]) == ("mcp_call", "incomplete", None)
    else:
        assert (last["type"], bool(last["error"])) == ("mcp_list_tools", True)
        assert types_of(events)[-3:] == ["mcp_list_tools.failed", "output_item.done", "failed"]
    with server.client() as client:
        # The chain goes on, and the model hears of what may have been done.
        more = client.responses.create(model="m", input=f"more {name}", previous_response_id=made["id"])
        assert more.output_text == f"ok: more {name}"
    read = [message["content"] for message in upstream.asked(f"more {name}")[0].body["messages"][1:-1]]
    assert ["may have been carried out" in str(content) for content in read] == (
        [False, True] if where == "call" else []
    )
    assert all(session.closed.wait(5) for session in toolserver.sessions(name) if session.greeted)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_in_mid_call_ends_the_call_and_the_session(server, client, toolserver, name, mcp, stream):
    given = script([note(name), *calling("gate", {"name": name})])
    body = {"model": "m", "input": given, "tools": [mcp()], "stream": stream}
    with httpx.Client() as leaving, ThreadPoolExecutor() as pool:
        running = pool.submit(_read, leaving, f"{server.url}/responses", body)
        toolserver.wait_reached(name)
        running.result()
    [one] = toolserver.calls(name)
    assert one.ended.wait(5) and one.outcome == "left"
    assert all(session.closed.wait(5) for session in toolserver.sessions(name))


def _read(leaving, url, body):
    """Read for a while, and go."""
    with (
        contextlib.suppress(httpx.ReadTimeout),
        leaving.stream("POST", url, json=body, timeout=httpx.Timeout(5, read=0.5)) as reply,
    ):
        reply.read()


@pytest.mark.parametrize("stream", [True, False])
def test_a_background_response_is_cancelled_in_mid_call(client, toolserver, name, mcp, stream):
    given = script([note(name), *calling("gate", {"name": name})])
    begun = client.responses.create(model="m", input=given, tools=[mcp()], background=True, stream=stream)
    events = []
    if stream:
        for event in begun:
            events.append(event.to_dict())
            if event.type == "response.mcp_call_arguments.done":
                break
    id = events[0]["response"]["id"] if stream else begun.id
    toolserver.wait_reached(name)
    cancelled = client.responses.cancel(id)
    listed, broken = cancelled.output
    assert (cancelled.status, listed.type, broken.status) == ("cancelled", "mcp_list_tools", "failed")
    assert "may have been carried out" in broken.error.message
    if stream:
        events += [event.to_dict() for event in begun]
        assert replay(events)["status"] == "cancelled"
    [one] = toolserver.calls(name)
    assert one.ended.wait(5) and one.outcome == "left"
    assert all(session.closed.wait(5) for session in toolserver.sessions(name))
    more = client.responses.create(model="m", input="more", previous_response_id=id, tools=[mcp()])
    assert more.output_text == "ok: more"


@pytest.mark.parametrize("background", [False, True])
def test_nobody_waits_for_a_goodbye(client, toolserver, name, mcp, background):
    given = script(calling("echo", {"x": 1}), [note(name), *answer("Done.")])
    begun = time.monotonic()
    made = client.responses.create(
        model="m", input=given, tools=[mcp(options={"goodbye": name})], background=background
    )
    while made.status in {"queued", "in_progress"}:
        made = client.responses.retrieve(made.id)
    assert (made.status, made.output_text) == ("completed", "Done.")
    toolserver.wait_reached(name)
    (session,) = [session for session in toolserver.sessions(name) if session.greeted]
    assert not session.closed.is_set(), f"after {time.monotonic() - begun:.1f} s"
    toolserver.open(name)
    assert session.closed.wait(5)
