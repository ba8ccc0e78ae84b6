"""Tools that the client runs: how the model sees them, how calls come back, what becomes of calls that may not be made."""

import json

import openai
import pytest

from tests.api.streams import events_of, types_of
from tests.upstream import answer, call, calling, finish, note, script, text

WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": True,
}
TIME = {"type": "function", "name": "get_time"}
SHELL = {"type": "custom", "name": "shell", "description": "Runs a command."}
NAMESPACE = {
    "type": "namespace",
    "name": "mcp__files",
    "description": "Files.",
    "tools": [{"type": "function", "name": "read", "parameters": {"type": "object", "properties": {}}}],
}
GRAMMAR = {"type": "grammar", "syntax": "lark", "definition": 'start: "yes" | "no"'}
WRAPPED = {
    "type": "object",
    "properties": {"input": {"type": "string", "description": "The tool's whole input, as free text."}},
    "required": ["input"],
    "additionalProperties": False,
}


def output_of(call, output):
    """What a client sends back for a call."""
    return {"type": f"{call.type}_output", "call_id": call.call_id, "output": output}


# -- Functions --------------------------------------------------------------------------------------------------------------


def test_two_parallel_calls_are_answered_and_the_model_sees_both_outputs(client, upstream):
    given = script(
        [
            call("get_weather", {"city": "Oslo"}, index=0, id="call_a"),
            call("get_weather", {"city": "Rome"}, index=1, id="call_b"),
            finish("tool_calls"),
        ],
        answer("Cold and warm."),
    )
    first = client.responses.create(model="m", input=given, tools=[WEATHER], parallel_tool_calls=True)
    assert first.status == "completed"
    assert [(one.type, one.call_id, one.name, json.loads(one.arguments), one.status) for one in first.output] == [
        ("function_call", "call_a", "get_weather", {"city": "Oslo"}, "completed"),
        ("function_call", "call_b", "get_weather", {"city": "Rome"}, "completed"),
    ]
    second = client.responses.create(
        model="m",
        previous_response_id=first.id,
        tools=[WEATHER],
        input=[output_of(first.output[1], "30 °C"), output_of(first.output[0], "-5 °C")],
    )
    assert second.output_text == "Cold and warm."
    asked_first, asked_then = upstream.asked(given)
    function = {key: WEATHER[key] for key in ("name", "description", "parameters", "strict")}
    assert asked_first.body["tools"] == [{"type": "function", "function": function}]
    assert asked_first.body["parallel_tool_calls"] is True
    assert asked_then.body["messages"][1:] == [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": id,
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": json.dumps({"city": city}, separators=(",", ":"))},
                }
                for id, city in (("call_a", "Oslo"), ("call_b", "Rome"))
            ],
        },
        {"role": "tool", "tool_call_id": "call_a", "content": "-5 °C"},
        {"role": "tool", "tool_call_id": "call_b", "content": "30 °C"},
    ]


def test_call_ids_are_unique_in_a_whole_chain(client, upstream):
    """Engines count calls anew in each completion, and clients tell them apart by id along the chain."""
    calling_again = [call("get_time", {}, id="call_0"), finish("tool_calls")]
    given = script(calling_again, calling_again, answer("Late."))
    first = client.responses.create(model="m", input=given, tools=[TIME])
    second = client.responses.create(
        model="m", previous_response_id=first.id, input=[output_of(first.output[0], "12")], tools=[TIME]
    )
    ids = [first.output[0].call_id, second.output[0].call_id]
    assert ids[0] == "call_0"
    assert ids[1].startswith("call_")
    assert len(set(ids)) == 2
    third = client.responses.create(
        model="m", previous_response_id=second.id, input=[output_of(second.output[0], "13")], tools=[TIME]
    )
    assert third.output_text == "Late."
    answered = [one for one in upstream.asked(given)[-1].body["messages"] if one["role"] == "tool"]
    assert [(one["tool_call_id"], one["content"]) for one in answered] == [(ids[0], "12"), (ids[1], "13")]


def test_what_the_model_says_before_its_call_stays_in_one_message_with_it(client, upstream):
    given = script([text("Let me see."), call("get_time", "{}", id="call_1"), finish("tool_calls")], answer("Noon."))
    first = client.responses.create(model="m", input=given, tools=[TIME])
    message, made = first.output
    assert (message.content[0].text, made.name) == ("Let me see.", "get_time")
    client.responses.create(model="m", previous_response_id=first.id, input=[output_of(made, "12:00")], tools=[TIME])
    spoken = upstream.asked(given)[1].body["messages"][1]
    assert spoken["content"] == "Let me see."
    assert [one["id"] for one in spoken["tool_calls"]] == ["call_1"]


def test_a_call_and_its_output_can_be_given_as_input(client, said, heard):
    """As clients that keep their own history do; also without ids and status."""
    client.responses.create(
        model="m",
        tools=[TIME],
        input=[
            {"role": "user", "content": "Time?"},
            {"type": "function_call", "call_id": "call_1", "name": "get_time", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "call_1", "output": "12:00"},
            {"role": "user", "content": said},
        ],
    )
    assert heard()["messages"][1:3] == [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "12:00"},
    ]


def test_a_call_without_arguments_has_an_empty_object(client):
    made = client.responses.create(
        model="m", input=script([call("get_time", id="call_1"), finish("tool_calls")]), tools=[TIME]
    )
    assert [(one.name, one.arguments) for one in made.output] == [("get_time", "{}")]


def test_an_output_may_be_parts_and_what_a_tool_message_cannot_carry_follows_it(client, said, heard):
    first = client.responses.create(
        model="m", input=script(calling("get_weather", {"city": "Oslo"}, id="call_1")), tools=[WEATHER]
    )
    image = {"type": "input_image", "image_url": "data:image/png;base64,AAAA", "detail": "low"}
    parts = [{"type": "input_text", "text": "See:"}, {"type": "input_text", "text": "this."}, image]
    made = client.responses.create(
        model="m",
        previous_response_id=first.id,
        input=[output_of(first.output[0], parts), {"role": "user", "content": said}],
    )
    assert heard()["messages"][2:] == [
        {
            "role": "tool",
            "tool_call_id": "call_1",
            "content": "See:\nthis.\n"
            "The output of tool call call_1 has 1 attachment(s); they follow in the next user message.",
        },
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Attachments of tool call call_1:"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}},
            ],
        },
        {"role": "user", "content": said},
    ]
    listed = client.responses.input_items.list(made.id, order="asc").data
    assert listed[2].to_dict()["output"] == parts


def test_text_parts_of_an_output_are_one_text(client, said, heard):
    client.responses.create(
        model="m",
        input=[
            {"role": "user", "content": "Time?"},
            {"type": "function_call", "call_id": "call_1", "name": "get_time", "arguments": "{}"},
            {
                "type": "function_call_output",
                "call_id": "call_1",
                "output": [{"type": "input_text", "text": "12"}, {"type": "input_text", "text": "00"}],
            },
            {"role": "user", "content": said},
        ],
    )
    assert heard()["messages"][2] == {"role": "tool", "tool_call_id": "call_1", "content": "12\n00"}


# -- tool_choice ------------------------------------------------------------------------------------------------------------

NAMED = {"type": "function", "function": {"name": "get_time"}}


@pytest.mark.parametrize(
    ("choice", "asked", "offered"),
    [
        (None, None, ["get_weather", "get_time"]),
        ("auto", None, ["get_weather", "get_time"]),
        ("none", "none", ["get_weather", "get_time"]),
        ("required", "required", ["get_weather", "get_time"]),
        ({"type": "function", "name": "get_time"}, NAMED, ["get_weather", "get_time"]),
        ({"type": "allowed_tools", "tools": [{"type": "function", "name": "get_time"}]}, None, ["get_time"]),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_time"}]},
            "required",
            ["get_time"],
        ),
    ],
    ids=str,
)
def test_tool_choice_in_every_form(client, said, heard, choice, asked, offered):
    made = client.responses.create(
        model="m", input=said, tools=[WEATHER, TIME], **({} if choice is None else {"tool_choice": choice})
    )
    assert heard().get("tool_choice") == asked
    assert [tool["function"]["name"] for tool in heard()["tools"]] == offered
    echoed = {"mode": "auto", **choice} if isinstance(choice, dict) and "tools" in choice else choice
    assert made.to_dict()["tool_choice"] == (echoed or "auto")


def test_a_named_custom_tool_is_asked_for_as_the_function_that_it_is_wrapped_in(client, said, heard):
    client.responses.create(model="m", input=said, tools=[TIME, SHELL], tool_choice={"type": "custom", "name": "shell"})
    assert heard()["tool_choice"] == {"type": "function", "function": {"name": "shell"}}


def test_parallel_tool_calls_is_not_sent_without_tools(client, said, heard):
    client.responses.create(model="m", input=said, parallel_tool_calls=True, tool_choice="auto")
    assert not {"parallel_tool_calls", "tool_choice", "tools"} & heard().keys()


REFUSED = {
    "an allowed_tools that leaves it out": {
        "tools": [WEATHER, TIME],
        "tool_choice": {"type": "allowed_tools", "tools": [{"type": "function", "name": "get_weather"}]},
    },
    "tool_choice none": {"tools": [WEATHER, TIME], "tool_choice": "none"},
    "another tool being demanded": {
        "tools": [WEATHER, TIME],
        "tool_choice": {"type": "function", "name": "get_weather"},
    },
    "nobody having declared it": {"tools": [WEATHER]},
    "there being no tools": {},
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_call_that_may_not_be_made_is_refused_and_the_model_is_told(client, upstream, why):
    given = script([note(why), *calling("get_time", {"zone": "CET"}, id="call_x")], answer("I may not know the time."))
    made = client.responses.create(model="m", input=given, **REFUSED[why])
    assert [one.type for one in made.output] == ["message"]
    assert made.output_text == "I may not know the time."
    _, told = upstream.asked(given)
    assert told.body["messages"][1:] == [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_x",
                    "type": "function",
                    "function": {"name": "get_time", "arguments": '{"zone":"CET"}'},
                }
            ],
        },
        {
            "role": "tool",
            "tool_call_id": "call_x",
            "content": "Error: There is no tool named 'get_time' that may be called now.",
        },
    ]


def test_what_the_model_said_before_a_refused_call_is_not_forgotten(client, upstream):
    given = script([text("Let me see."), *calling("get_time", id="call_x")], answer("I can't."))
    made = client.responses.create(model="m", input=given)
    assert [one.content[0].text for one in made.output] == ["Let me see.", "I can't."]
    _, told = upstream.asked(given)
    assert told.body["messages"][1]["content"] == "Let me see."


def test_a_refused_call_that_was_cut_short_ends_the_response(client, upstream):
    given = script([text("Hm."), call("get_time", '{"zone', id="call_x"), finish("length")])
    made = client.responses.create(model="m", input=given)
    assert (made.status, made.output_text) == ("incomplete", "Hm.")
    assert len(upstream.asked(given)) == 1


def test_a_model_that_never_stops_calling_what_it_may_not_is_stopped(client, upstream):
    given = script(*([note("never"), *calling("get_time", id=f"call_{turn}")] for turn in range(40)))
    made = client.responses.create(model="m", input=given)
    assert (made.status, made.incomplete_details.reason) == ("incomplete", "max_turns")
    assert len(upstream.asked(given)) == 32, "and an SDK does not ask again"


def test_usage_is_that_of_all_turns_together(client, upstream):
    given = script([note("usage"), *calling("get_time")], answer("No."))
    made = client.responses.create(model="m", input=given)
    first, then = (record.body["messages"] for record in upstream.asked(given))
    words = sum(len((message["content"] or "").split()) for message in [*first, *then])
    assert (made.usage.input_tokens, made.usage.total_tokens) == (words, words + made.usage.output_tokens)


def test_a_refused_call_is_no_event_of_the_stream(http):
    given = script([note("stream"), *calling("get_time", {"zone": "CET"})], answer("No."))
    events = events_of(http.post("/responses", json={"model": "m", "input": given, "stream": True}))
    assert types_of(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]


def test_a_call_that_may_be_made_is_handed_over_beside_one_that_may_not(client):
    given = script(
        [
            call("get_time", "{}", index=0, id="call_a"),
            call("get_weather", {"city": "Oslo"}, index=1, id="call_b"),
            finish("tool_calls"),
        ]
    )
    made = client.responses.create(model="m", input=given, tools=[WEATHER])
    assert [(one.type, one.call_id) for one in made.output] == [("function_call", "call_b")]


@pytest.mark.parametrize(
    ("choice", "param", "code"),
    [
        ("required", "tool_choice", "invalid_value"),
        ({"type": "function", "name": "get_time"}, "tool_choice", "invalid_value"),
        ({"type": "custom", "name": "get_time"}, "tool_choice", "invalid_value"),
        (
            {"type": "allowed_tools", "tools": [{"type": "function", "name": "get_time"}]},
            "tool_choice.tools[0]",
            "invalid_value",
        ),
        ({"type": "mcp", "server_label": "x"}, "tool_choice", "invalid_value"),
        ({"type": "file_search"}, "tool_choice", "unsupported_parameter"),
    ],
    ids=str,
)
def test_a_choice_of_what_is_not_there_is_refused(client, said, choice, param, code):
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="m", input=said, tool_choice=choice)
    assert (refused.value.param, refused.value.code) == (param, code)


# -- Custom tools -----------------------------------------------------------------------------------------------------------


def test_a_custom_tool_is_wrapped_as_a_function_and_called_with_plain_text(client, upstream):
    given = script(calling("shell", {"input": 'echo "hi"\n'}, id="call_s"), answer("Done."))
    first = client.responses.create(model="m", input=given, tools=[SHELL])
    [made] = first.to_dict()["output"]
    assert made.pop("id").startswith("ctc_")
    assert made == {
        "type": "custom_tool_call",
        "call_id": "call_s",
        "name": "shell",
        "input": 'echo "hi"\n',
        "status": "completed",
    }
    assert first.to_dict()["tools"] == [SHELL]
    client.responses.create(
        model="m", previous_response_id=first.id, input=[output_of(first.output[0], "hi")], tools=[SHELL]
    )
    asked_first, asked_then = upstream.asked(given)
    assert asked_first.body["tools"] == [
        {"type": "function", "function": {"name": "shell", "description": "Runs a command.", "parameters": WRAPPED}}
    ]
    said, answered = asked_then.body["messages"][1:]
    [asked] = said["tool_calls"]
    assert json.loads(asked["function"].pop("arguments")) == {"input": 'echo "hi"\n'}
    assert asked == {"id": "call_s", "type": "function", "function": {"name": "shell"}}
    assert answered == {"role": "tool", "tool_call_id": "call_s", "content": "hi"}


def test_a_custom_tool_called_without_its_wrapping_is_taken_at_its_word(client):
    made = client.responses.create(model="m", input=script(calling("shell", "ls -l")), tools=[SHELL])
    assert made.output[0].input == "ls -l"


def test_a_custom_call_streams_its_input(http):
    given = script([call("shell", '{"input":', id="call_s"), call(arguments=' "ls"}'), finish("tool_calls")])
    body = {"model": "m", "input": given, "tools": [SHELL], "stream": True}
    events = events_of(http.post("/responses", json=body))
    assert types_of(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "custom_tool_call_input.delta",
        "custom_tool_call_input.done",
        "output_item.done",
        "completed",
    ]
    added, said, done = events[2], events[3:-3], events[-3]
    assert (added["item"]["input"], added["item"]["status"]) == ("", "in_progress")
    assert "".join(event["delta"] for event in said) == done["input"] == "ls"
    assert events[-2]["item"] == {**added["item"], "input": "ls", "status": "completed"}


def test_a_grammar_is_described_where_the_upstream_cannot_be_made_to_follow_it(client, said, heard):
    """Codex declares one, whatever its model's name."""
    client.responses.create(model="m", input=said, tools=[{**SHELL, "format": GRAMMAR}])
    assert heard()["tools"][0]["function"]["description"].endswith(f"lark grammar:\n{GRAMMAR['definition']}")


def test_a_plain_text_format_is_no_grammar(client, said, heard):
    client.responses.create(model="m", input=said, tools=[{**SHELL, "format": {"type": "text"}}])
    assert heard()["tools"][0]["function"]["parameters"] == WRAPPED


# -- Namespaces and additional tools ----------------------------------------------------------------------------------------


def test_a_tool_of_a_namespace_is_called_back_with_its_namespace(client, upstream):
    given = script(calling("mcp__files__read", {"path": "a"}, id="call_n"), answer("Read."))
    first = client.responses.create(model="m", input=given, tools=[NAMESPACE])
    [made] = first.to_dict()["output"]
    assert (made["name"], made["namespace"]) == ("read", "mcp__files")
    second = client.responses.create(
        model="m", previous_response_id=first.id, input=[output_of(first.output[0], "text")], tools=[NAMESPACE]
    )
    assert second.output_text == "Read."
    asked_first, asked_then = upstream.asked(given)
    assert [tool["function"]["name"] for tool in asked_first.body["tools"]] == ["mcp__files__read"]
    assert asked_then.body["messages"][1]["tool_calls"][0]["function"]["name"] == "mcp__files__read"


def test_tools_whose_names_collide_get_names_of_their_own(client, upstream):
    flat = {"type": "function", "name": "mcp__files__read"}
    given = script(
        [
            call("mcp__files__read", "{}", index=0, id="call_a"),
            call("mcp__files__read_2", "{}", index=1, id="call_b"),
            finish("tool_calls"),
        ]
    )
    made = client.responses.create(model="m", input=given, tools=[flat, NAMESPACE])
    assert [(one.name, one.namespace) for one in made.output] == [("mcp__files__read", None), ("read", "mcp__files")]


def test_a_name_that_is_too_long_for_the_upstream_is_shortened_on_the_way_only(client, said, heard):
    long = {"type": "function", "name": "f" * 100}
    made = client.responses.create(model="m", input=said, tools=[long])
    [seen] = heard()["tools"]
    assert len(seen["function"]["name"]) <= 64
    assert made.tools[0].name == "f" * 100


def test_a_namespace_may_hold_custom_tools(client):
    tools = [{"type": "namespace", "name": "functions", "description": "", "tools": [SHELL]}]
    made = client.responses.create(
        model="m", input=script(calling("functions__shell", {"input": "ls"}, id="call_c")), tools=tools
    )
    [called] = made.to_dict()["output"]
    assert (called["type"], called["name"], called["namespace"], called["input"]) == (
        "custom_tool_call",
        "shell",
        "functions",
        "ls",
    )


def test_additional_tools_of_the_input_join_the_declared_ones(client, upstream):
    given = script(calling("functions__shell", {"input": "ls"}, id="call_c"), answer("Listed."))
    first = client.responses.create(
        model="m",
        input=[
            {
                "type": "additional_tools",
                "role": "developer",
                "tools": [{"type": "namespace", "name": "functions", "tools": [SHELL]}],
            },
            {"role": "user", "content": given},
        ],
    )
    [made] = first.output
    assert (made.type, made.input) == ("custom_tool_call", "ls")
    parts = [{"type": "input_text", "text": "a.txt"}]
    second = client.responses.create(model="m", previous_response_id=first.id, input=[output_of(made, parts)])
    assert second.output_text == "Listed."
    _, asked = upstream.asked(given)
    assert [tool["function"]["name"] for tool in asked.body["tools"]] == ["functions__shell"]
    assert asked.body["messages"][-1] == {"role": "tool", "tool_call_id": "call_c", "content": "a.txt"}


# -- Hosted tools -----------------------------------------------------------------------------------------------------------

LEFT_OUT = "x-reprise-left-out-tools"


@pytest.mark.parametrize("stream", [False, True])
def test_hosted_tools_are_left_out_and_the_reply_says_so(http, said, heard, stream):
    hosted = [
        {"type": "web_search", "external_web_access": True},
        {"type": "tool_search"},
        {"type": "image_generation"},
    ]
    body = {"model": "m", "input": said, "tools": [*hosted, TIME], "stream": stream}
    reply = http.post("/responses", json=body)
    assert reply.status_code == 200
    assert reply.headers[LEFT_OUT] == "web_search, tool_search, image_generation"
    assert [tool["function"]["name"] for tool in heard()["tools"]] == ["get_time"]
    made = events_of(reply)[-1]["response"] if stream else reply.json()
    assert [tool["type"] for tool in made["tools"]] == ["function"]


def test_a_reply_with_every_tool_has_no_such_header(http, said):
    assert LEFT_OUT not in http.post("/responses", json={"model": "m", "input": said, "tools": [TIME]}).headers


@pytest.mark.parametrize("type", ["web_search_preview", "image_generation", "code_interpreter"])
def test_a_hosted_tool_that_is_demanded_is_refused(client, said, type):
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="m", input=said, tools=[TIME, {"type": type}], tool_choice={"type": type})
    assert (refused.value.code, refused.value.param) == ("unsupported_parameter", "tool_choice")


# -- Names ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tools",
    [[TIME, TIME], [TIME, {"type": "custom", "name": "get_time"}], [NAMESPACE, NAMESPACE]],
    ids=["two functions", "a function and a custom tool", "two namespaces"],
)
def test_a_tool_name_may_not_come_twice(client, said, tools):
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="m", input=said, tools=tools)
    assert refused.value.param == "tools"
    assert "Duplicate tool name" in refused.value.message


def test_a_tool_name_may_not_come_twice_in_a_namespace(client, said):
    twice = {**NAMESPACE, "tools": NAMESPACE["tools"] * 2}
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="m", input=said, tools=[twice])
    assert refused.value.param == "tools"


def test_the_same_tool_name_may_come_in_two_namespaces(client, said, heard):
    other = {**NAMESPACE, "name": "mcp__others"}
    client.responses.create(model="m", input=said, tools=[NAMESPACE, other])
    assert [tool["function"]["name"] for tool in heard()["tools"]] == ["mcp__files__read", "mcp__others__read"]
