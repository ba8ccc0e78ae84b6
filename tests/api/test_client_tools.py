"""Shells, patches, computers and searches that the client runs: declared, called, answered, and read again by the model."""

import json

import openai
import pytest

from tests.api.streams import events_of
from tests.upstream import answer, call, calling, finish, note, script

F = {"type": "function", "name": "shell"}
SHOT = "data:image/png;base64,aGk="

TOOLS = {
    "shell": (
        {"type": "shell", "environment": {"type": "local"}},
        {"commands": ["ls", "pwd"]},
        {"output": [{"stdout": "a", "stderr": "", "outcome": {"type": "exit", "exit_code": 0}}]},
        '[{"stdout":"a","stderr":"","outcome":{"type":"exit","exit_code":0}}]',
    ),
    "local_shell": (
        {"type": "local_shell"},
        {"command": ["ls"]},
        {"output": '{"stdout":"a"}'},
        '{"stdout":"a"}',
    ),
    "apply_patch": (
        {"type": "apply_patch"},
        {"type": "create_file", "path": "a.txt", "diff": "+hi"},
        {"status": "failed", "output": "It exists."},
        "failed: It exists.",
    ),
    "computer": (
        {"type": "computer"},
        {"actions": [{"type": "screenshot"}]},
        {"output": {"type": "computer_screenshot", "image_url": SHOT}},
        None,
    ),
    "tool_search": (
        {"type": "tool_search", "execution": "client"},
        {"query": "time"},
        {"tools": [{"type": "function", "name": "get_time"}], "execution": "client", "status": "completed"},
        '[{"type":"function","name":"get_time"}]',
    ),
}
EVERY = pytest.mark.parametrize("kind", TOOLS)


def output_of(made, given):
    return {"type": f"{made.type.removesuffix('_call')}_call_output", "call_id": made.call_id, **given}


@EVERY
@pytest.mark.parametrize("held", ["chain", "history", "conversation"])
def test_a_call_comes_as_an_item_of_its_own_and_its_output_reaches_the_model(client, upstream, said, kind, held):
    declared, arguments, given, read = TOOLS[kind]
    asked = script([note(said), *calling(kind, arguments, id=f"call_{held}")], answer("Done."))
    begun = {"conversation": client.conversations.create().id} if held == "conversation" else {}
    first = client.responses.create(model="m", input=asked, tools=[declared], **begun)
    [made] = first.output
    assert (first.status, made.type, made.call_id, made.status) == (
        "completed",
        f"{kind}_call",
        f"call_{held}",
        "completed",
    )
    assert client.responses.retrieve(first.id).output == first.output
    output = output_of(made, given)
    if kind == "tool_search":
        output["type"] = "tool_search_output"
    if held == "history":
        begun, sent = {}, [{"role": "user", "content": asked}, made.to_dict(), output]
    else:
        begun, sent = begun or {"previous_response_id": first.id}, [output]
    second = client.responses.create(model="m", input=sent, tools=[declared], **begun)
    attached = f"Attachments of tool call {made.call_id}:"  # the last message of a user, which the upstream answers
    assert second.output_text == ("Done." if read else f"ok: {attached}")
    [one, two] = upstream.asked(asked) if read else [*upstream.asked(asked), *upstream.asked(attached)]
    assert [tool["function"]["name"] for tool in one.body["tools"]] == [kind]
    call_of, *answered = two.body["messages"][1:]
    function = call_of["tool_calls"][0]["function"]
    assert (function["name"], arguments.items() <= json.loads(function["arguments"]).items()) == (kind, True)
    assert (answered[0]["role"], answered[0]["tool_call_id"]) == ("tool", f"call_{held}")
    if read is None:
        assert "image_url" in str(answered[1]["content"]) and SHOT in str(answered[1]["content"])
    else:
        assert answered[0]["content"] == read
    names = [tool["function"]["name"] for tool in two.body["tools"]]
    assert names == ([kind, "get_time"] if kind == "tool_search" else [kind])
    listed = client.responses.input_items.list(second.id, order="asc").data
    assert [item.type for item in listed][1:] == [made.type, output["type"]]
    assert given.items() <= listed[-1].to_dict().items()


def test_a_shell_s_commands_are_streamed_and_a_function_of_its_name_stays_apart(http, upstream):
    asked = script(
        [
            call("shell", {"commands": ["ls", "pwd"]}, id="c1"),
            call("shell_2", {"x": 1}, index=1, id="c2"),
            finish("tool_calls"),
        ]
    )
    body = {"model": "m", "input": asked, "tools": [{"type": "shell"}, F], "stream": True}
    events = events_of(http.post("/responses", json=body))
    commands = [
        (one["type"].rpartition(".")[2], one["command_index"], one.get("command", one.get("delta")))
        for one in events
        if "shell_call_command" in one["type"]
    ]
    assert commands == [
        ("added", 0, ""),
        ("delta", 0, "ls"),
        ("done", 0, "ls"),
        ("added", 1, ""),
        ("delta", 1, "pwd"),
        ("done", 1, "pwd"),
    ]
    made = events[-1]["response"]["output"]
    assert [(one["type"], one.get("name")) for one in made] == [("shell_call", None), ("function_call", "shell")]
    assert made[0]["environment"] == {"type": "local"}
    assert [tool["type"] for tool in events[-1]["response"]["tools"]] == ["shell", "function"]


def test_the_model_reads_why_its_arguments_do_not_fit(client, upstream):
    asked = script(calling("apply_patch", {"type": "zap"}, id="c1"), answer("Then not."))
    made = client.responses.create(model="m", input=asked, tools=[{"type": "apply_patch"}])
    assert [item.type for item in made.output] == ["message"]
    _, second = upstream.asked(asked)
    assert second.body["messages"][-1] == {
        "role": "tool",
        "tool_call_id": "c1",
        "content": "Error: The arguments do not fit the tool: Invalid value 'zap' - at `$.type`",
    }


def test_a_choice_demands_the_tool(client, heard, said):
    client.responses.create(
        model="m", input=said, tools=[F, {"type": "local_shell"}], tool_choice={"type": "local_shell"}
    )
    assert heard()["tool_choice"] == {"type": "function", "function": {"name": "local_shell"}}


def test_a_compaction_stands_for_a_call_and_its_output(client, upstream, said):
    first = client.responses.create(
        model="m",
        input=script(calling("shell", {"commands": ["ls"]}, id="c1"), answer("Done.")),
        tools=[{"type": "shell"}],
    )
    output = output_of(first.output[0], TOOLS["shell"][2])
    compacted = client.responses.create(
        model="m",
        previous_response_id=first.id,
        input=[output, {"type": "compaction_trigger"}],
        tools=[{"type": "shell"}],
    )
    assert [item.type for item in compacted.output] == ["compaction"]
    client.responses.create(model="m", previous_response_id=compacted.id, input=said, tools=[{"type": "shell"}])
    [record] = upstream.asked(said)
    assert all("tool_calls" not in one and one["role"] != "tool" for one in record.body["messages"])


# -- Unknown types ----------------------------------------------------------------------------------------------------------

DREAM = {"type": "dream_call", "id": "dr_1", "call_id": "d1", "status": "done", "scene": {"sheep": [1, None]}}
WAKING = {"type": "dream_call_output", "id": "dro_1", "call_id": "d1", "output": "bleat"}
LEFT_OUT = "x-reprise-left-out-items"


@pytest.mark.parametrize("way", ["whole", "stream", "background"])
def test_items_of_unknown_types_are_kept_and_a_header_names_them(http, upstream, said, way):
    body = {"model": "m", "input": [DREAM, WAKING, {"role": "user", "content": said}]}
    reply = http.post("/responses", json={**body, "stream": way == "stream", "background": way == "background"})
    assert (reply.status_code, reply.headers[LEFT_OUT]) == (200, "dream_call, dream_call_output")
    id = events_of(reply)[0]["response"]["id"] if way == "stream" else reply.json()["id"]
    assert _listed(http, f"responses/{id}/input_items")[:2] == [DREAM, WAKING]
    if way == "whole":
        again = http.post("/responses", json={"model": "m", "input": f"{said} again", "previous_response_id": id})
        assert again.headers[LEFT_OUT] == "dream_call, dream_call_output"
        [record] = upstream.asked(f"{said} again")
        assert [one["role"] for one in record.body["messages"]] == ["user", "assistant", "user"]
        assert "sheep" not in str(record.body) and "bleat" not in str(record.body)


def _listed(http, path):
    return http.get(f"/{path}", params={"order": "asc"}).json()["data"]


def test_a_conversation_keeps_them(http, client, said):
    conversation = client.conversations.create().id
    assert http.post(f"/conversations/{conversation}/items", json={"items": [DREAM]}).status_code == 200
    reply = http.post("/responses", json={"model": "m", "input": said, "conversation": conversation})
    assert reply.headers[LEFT_OUT] == "dream_call"
    assert _listed(http, f"conversations/{conversation}/items")[0] == DREAM


@pytest.mark.parametrize("path", ["compact", "input_tokens"])
def test_a_compaction_and_a_count_name_them_too(http, said, path):
    given = {"model": "m", "input": [DREAM, {"role": "user", "content": said}]}
    tools = {"tools": [{"type": "dream"}]} if path == "input_tokens" else {}
    reply = http.post(f"/responses/{path}", json={**given, **tools})
    assert (reply.status_code, reply.headers[LEFT_OUT]) == (200, "dream_call"), reply.text
    assert reply.headers.get("x-reprise-left-out-tools") == ("dream" if tools else None)


def test_a_header_names_only_so_many_types(http, said):
    given = [{"type": f"dream{n}"} for n in range(40)]
    reply = http.post("/responses", json={"model": "m", "input": [*given, {"role": "user", "content": said}]})
    assert reply.headers[LEFT_OUT] == ", ".join([*(f"dream{n}" for n in range(16)), "..."])


def test_tools_of_unknown_types_are_left_out(http, heard, said):
    tools = [{"type": "dream", "depth": 3}, {"type": "programmatic_tool_calling"}, F]
    reply = http.post("/responses", json={"model": "m", "input": said, "tools": tools})
    assert (reply.status_code, reply.headers["x-reprise-left-out-tools"]) == (200, "dream, programmatic_tool_calling")
    assert [tool["function"]["name"] for tool in heard()["tools"]] == ["shell"]
    assert [tool["type"] for tool in reply.json()["tools"]] == ["function"]
    chosen = http.post(
        "/responses", json={"model": "m", "input": said, "tools": tools, "tool_choice": {"type": "dream"}}
    )
    assert (chosen.status_code, chosen.json()["error"]["param"]) == (400, "tool_choice.type")


@pytest.mark.parametrize(
    "tool", [{"type": "function", "name": "look", "parameters": {}}, {"type": "custom", "name": "look"}]
)
def test_a_call_that_the_official_client_has_dumped_is_taken_back(client, upstream, said, tool):
    asked = script([note(said), *calling("look", {"input": "x"})], answer("Done."))
    first = client.responses.create(model="m", input=asked, tools=[tool])
    [dumped] = [item.model_dump() for item in first.output]
    assert dumped["async_"] is None  # not the API's name
    output = {"type": f"{dumped['type']}_output", "call_id": dumped["call_id"], "output": "y"}
    sent = [{"role": "user", "content": asked}, dumped, output]
    made = client.responses.create(model="m", input=sent, tools=[tool])
    assert made.output_text == "Done."
    kept = client.conversations.create(items=sent)
    for items in (client.responses.input_items.list(made.id), client.conversations.items.list(kept.id)):
        assert all("async_" not in item.to_dict() for item in items)
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="m", input=[{**dumped, "async_": True}])
    assert refused.value.param == "input[0].async_"


@pytest.mark.parametrize("status", [{}, [], ["completed"], 1, None])
def test_a_call_whose_status_is_no_text_needs_an_output(http, status):
    call = {"type": "apply_patch_call", "call_id": "call_odd", "status": status}
    conversation = http.post("/conversations", json={"items": [call]}).json()["id"]
    for body in ({"input": [call]}, {"input": "And now?", "conversation": conversation}):
        reply = http.post("/responses", json={"model": "m", **body})
        assert reply.status_code == 400
        assert reply.json()["error"]["message"] == "No tool output found for apply patch call call_odd."
