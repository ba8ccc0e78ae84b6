"""MCP tools: listing, calls, approvals, limits; through the official client, with a scripted MCP server."""

import json

import openai
import pytest

from tests.api.streams import told, types_of
from tests.upstream import answer, call, calling, finish, script, text, usage


def test_tools_are_listed_called_and_their_results_read(client, upstream, toolserver, name, mcp):
    given = script([*calling("add", {"a": 1, "b": 2}), usage(10, 2)], [*answer("It is 3."), usage(20, 3)])
    tools = [mcp(server_description="Sums.", allowed_tools=["add", "echo"])]
    first = client.responses.create(model="m", input=given, tools=tools)
    assert (first.status, first.output_text) == ("completed", "It is 3.")
    listed, called, message = first.output
    assert (listed.type, listed.server_label, [tool.name for tool in listed.tools]) == (
        "mcp_list_tools",
        "box",
        ["echo", "add"],
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
    assert all(session.closed.is_set() for session in toolserver.sessions(name))


def test_the_events_of_a_call_are_those_of_the_hosted_api(server, mcp):
    given = script([text("Let me see."), call("echo", {"x": 1}, id="c"), finish("tool_calls")], answer("Done."))
    events, made = told(server, input=given, tools=[mcp(allowed_tools=["echo"])])
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
