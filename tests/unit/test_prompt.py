"""Context → chat request: each kind of item, each dialect, exact messages."""

from typing import Any

import msgspec
import pytest

from app.domain.dialect import HOSTED, PRESETS, Dialect
from app.domain.messages import messages
from app.domain.prompt import chat_request
from app.errors import UnsupportedParameter
from app.ids import siblings
from tests.unit.build import assistant, call, context, function, output, plain, request, user

PLAIN = Dialect()


def unseal(sealed: str, purpose: str = "seal") -> str | None:
    """Opens what this test sealed."""
    return sealed.removeprefix("sealed ") if sealed.startswith("sealed ") else None


def said(*items: dict[str, Any], dialect: Dialect = PLAIN, **body: Any) -> list[dict[str, Any]]:
    """The messages of a context of these items."""
    made: list[dict[str, Any]] = plain(messages(context(*items, **body), dialect, unseal))
    return made


def asked(*items: dict[str, Any], dialect: Dialect = PLAIN, **body: Any) -> dict[str, Any]:
    """The whole chat request."""
    items = items or (user("hi"),)
    raw = chat_request(
        request(input=list(items), **body),
        context(*items, **body),
        model="up",
        dialect=dialect,
        unseal=unseal,
        output_tokens_max=body.get("max_output_tokens"),
    )
    made: dict[str, Any] = msgspec.json.decode(raw)
    return made


def tool_call(id: str, name: str = "f", arguments: str = "{}") -> dict[str, Any]:
    """A call as a chat message holds it."""
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def tool(id: str, content: str = "done") -> dict[str, Any]:
    """A tool message."""
    return {"role": "tool", "tool_call_id": id, "content": content}


def turn(*calls: dict[str, Any], content: Any = None, **more: Any) -> dict[str, Any]:
    """An assistant message with calls."""
    return {"role": "assistant", "content": content, **more, "tool_calls": list(calls)}


# -- Messages ---------------------------------------------------------------------------------------------------------------

IMAGE = {"type": "input_image", "image_url": "https://x/y.png"}


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (user("hi"), {"role": "user", "content": "hi"}),
        ({"role": "user", "content": [{"type": "input_text", "text": "hi"}]}, {"role": "user", "content": "hi"}),
        (
            {"role": "user", "content": [{"type": "input_text", "text": one} for one in "ab"]},
            {"role": "user", "content": [{"type": "text", "text": one} for one in "ab"]},
        ),
        ({"role": "user", "content": []}, {"role": "user", "content": ""}),
        ({"role": "system", "content": "be brief"}, {"role": "system", "content": "be brief"}),
        ({"role": "developer", "content": "be brief"}, {"role": "system", "content": "be brief"}),
        (
            {"role": "user", "content": [IMAGE]},
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x/y.png"}}]},
        ),
        (
            {"role": "user", "content": [{"type": "input_text", "text": "see"}, {**IMAGE, "detail": "low"}]},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "see"},
                    {"type": "image_url", "image_url": {"url": "https://x/y.png", "detail": "low"}},
                ],
            },
        ),
        (
            {"role": "user", "content": [{**IMAGE, "detail": "auto"}]},
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x/y.png"}}]},
        ),
        (
            {"role": "user", "content": [{"type": "input_file", "file_data": "data:x", "filename": "a.pdf"}]},
            {
                "role": "user",
                "content": [{"type": "file", "file": {"file_data": "data:x", "filename": "a.pdf"}}],
            },
        ),
        (
            {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "x", "format": "wav"}}]},
            {
                "role": "user",
                "content": [{"type": "input_audio", "input_audio": {"data": "x", "format": "wav"}}],
            },
        ),
        (assistant("hello"), {"role": "assistant", "content": "hello"}),
        ({"role": "assistant", "content": "hello"}, {"role": "assistant", "content": "hello"}),
        ({"role": "assistant", "content": ""}, {"role": "assistant", "content": ""}),
        (
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
            {"role": "assistant", "content": "no"},
        ),
    ],
)
def test_a_message_becomes_a_message(item: dict[str, Any], message: dict[str, Any]):
    assert said(item) == [message]


@pytest.mark.parametrize(
    ("part", "named"),
    [
        ({"type": "input_image"}, "file_id"),
        ({"type": "input_file"}, "file_data"),
        ({"type": "input_audio"}, "audio_url"),
    ],
)
def test_what_can_t_be_carried_is_refused(part: dict[str, Any], named: str):
    with pytest.raises(UnsupportedParameter, match=named) as caught:
        said({"role": "user", "content": [part]})
    assert caught.value.param == "input"


def test_instructions_come_first():
    assert said(user("hi"), instructions="be brief")[0] == {"role": "system", "content": "be brief"}
    assert said(user("hi"), instructions="be brief", dialect=HOSTED)[0]["role"] == "developer"


def test_the_hosted_dialect_keeps_refusals_and_the_developer():
    refusal = {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}
    assert said({"role": "developer", "content": "x"}, refusal, dialect=HOSTED) == [
        {"role": "developer", "content": "x"},
        {"role": "assistant", "content": None, "refusal": "no"},
    ]


def test_several_texts_are_one_string_where_parts_are_lacking():
    parts = {"role": "user", "content": [{"type": "input_text", "text": one} for one in "ab"]}
    dialect = Dialect(lacks=frozenset({"content_parts"}))
    assert said(parts, dialect=dialect) == [{"role": "user", "content": "a\nb"}]


def test_later_system_messages_are_merged_or_become_the_user_s():
    dialect = Dialect(lacks=frozenset({"later_system_messages"}))
    items = [{"role": "system", "content": "a"}, {"role": "developer", "content": "b"}, user("hi"), assistant("yes")]
    assert said(*items, {"role": "system", "content": "c"}, instructions="first", dialect=dialect) == [
        {"role": "system", "content": "first\n\na\n\nb"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "c"},
    ]
    assert said(user("hi"), dialect=dialect) == [{"role": "user", "content": "hi"}]


# -- Turns ------------------------------------------------------------------------------------------------------------------


def test_a_call_and_its_output_are_two_messages():
    assert said(user("hi"), call("c1", arguments='{"a":1}'), output("c1", "one")) == [
        {"role": "user", "content": "hi"},
        turn(tool_call("c1", arguments='{"a":1}')),
        tool("c1", "one"),
    ]


def test_empty_arguments_are_an_empty_object():
    assert said(call("c1", arguments=""), output("c1"))[0] == turn(tool_call("c1", arguments="{}"))


def test_parallel_calls_are_one_turn():
    assert said(call("c1"), call("c2", "g"), output("c2", "two"), output("c1", "one")) == [
        turn(tool_call("c1"), tool_call("c2", "g")),
        tool("c1", "one"),
        tool("c2", "two"),
    ]


def test_calls_after_outputs_are_another_turn():
    assert said(call("c1"), output("c1", "one"), call("c2"), output("c2", "two")) == [
        turn(tool_call("c1")),
        tool("c1", "one"),
        turn(tool_call("c2")),
        tool("c2", "two"),
    ]


def test_text_and_calls_of_one_turn_are_one_message():
    assert said(assistant("let me look"), call("c1"), output("c1"), assistant("found")) == [
        turn(tool_call("c1"), content="let me look"),
        tool("c1"),
        {"role": "assistant", "content": "found"},
    ]


def test_text_after_a_call_stands_behind_the_call_s_output():
    assert said(call("c1"), assistant("meanwhile"), output("c1")) == [
        turn(tool_call("c1")),
        tool("c1"),
        {"role": "assistant", "content": "meanwhile"},
    ]


def test_a_user_message_between_call_and_output_follows_the_output():
    assert said(call("c1"), user("wait"), output("c1"), assistant("done")) == [
        turn(tool_call("c1")),
        tool("c1"),
        {"role": "user", "content": "wait"},
        {"role": "assistant", "content": "done"},
    ]


def test_a_call_id_that_comes_again_is_answered_in_order():
    assert said(call("c1", "f"), output("c1", "one"), user("again"), call("c1", "g"), output("c1", "two")) == [
        turn(tool_call("c1", "f")),
        tool("c1", "one"),
        {"role": "user", "content": "again"},
        turn(tool_call("c1", "g")),
        tool("c1", "two"),
    ]


def test_a_cut_off_call_is_not_said():
    assert said(user("hi"), call("c1", arguments='{"a', status="incomplete"), user("again")) == [
        {"role": "user", "content": "hi"},
        {"role": "user", "content": "again"},
    ]


def test_two_answers_are_two_messages():
    assert said(assistant("a"), assistant("b")) == [
        {"role": "assistant", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]


def test_a_namespace_is_part_of_the_name():
    assert said(call("c1", "find", namespace="crm"), output("c1"))[0] == turn(tool_call("c1", "crm__find"))


# -- Outputs ----------------------------------------------------------------------------------------------------------------


def test_several_texts_of_an_output_are_one():
    parts = [{"type": "input_text", "text": one} for one in ("a", "b")]
    assert said(call("c1"), output("c1", parts))[1] == tool("c1", "a\nb")


def test_images_of_an_output_follow_in_a_user_message_behind_all_outputs():
    shown = [{"type": "input_text", "text": "see"}, IMAGE]
    first, one, two, attached, last = said(call("c1"), call("c2"), output("c1", shown), output("c2"), assistant("ok"))
    assert first == turn(tool_call("c1"), tool_call("c2"))
    assert (one["role"], one["content"].split("\n")[0]) == ("tool", "see")
    assert "1 attachment" in one["content"]
    assert two == tool("c2")
    assert attached["role"] == "user" and "c1" in attached["content"][0]["text"]
    assert attached["content"][1] == {"type": "image_url", "image_url": {"url": "https://x/y.png"}}
    assert last == {"role": "assistant", "content": "ok"}


# -- Custom tools -----------------------------------------------------------------------------------------------------------

CUSTOM = {"type": "custom_tool_call", "call_id": "c1", "name": "run", "input": 'ls "x"'}
CUSTOM_OUTPUT = {"type": "custom_tool_call_output", "call_id": "c1", "output": "x"}


def test_a_custom_call_is_wrapped_or_native():
    wrapped = turn(tool_call("c1", "run", '{"input":"ls \\"x\\""}'))
    assert said(CUSTOM, CUSTOM_OUTPUT) == [wrapped, tool("c1", "x")]
    native = {"id": "c1", "type": "custom", "custom": {"name": "run", "input": 'ls "x"'}}
    assert said(CUSTOM, CUSTOM_OUTPUT, dialect=HOSTED) == [turn(native), tool("c1", "x")]


def custom(**more: Any) -> dict[str, Any]:
    """A custom tool's declaration."""
    return {"type": "custom", "name": "run", "description": "Runs.", **more}


GRAMMAR = {"type": "grammar", "syntax": "lark", "definition": "start: WORD"}


def test_a_custom_tool_is_wrapped_as_a_function():
    (made,) = asked(tools=[custom()])["tools"]
    assert made["function"]["name"] == "run" and made["function"]["description"] == "Runs."
    assert made["function"]["parameters"]["required"] == ["input"]
    assert made["function"]["parameters"]["properties"]["input"]["type"] == "string"


def test_a_grammar_is_refused_described_or_passed_on():
    with pytest.raises(UnsupportedParameter, match="'run'") as caught:
        asked(tools=[custom(format=GRAMMAR)], dialect=Dialect(custom_tools="function"))
    assert caught.value.param == "tools"
    (made,) = asked(tools=[custom(format=GRAMMAR)])["tools"]
    assert made["function"]["description"].endswith("lark grammar:\nstart: WORD")
    (made,) = asked(tools=[custom(format=GRAMMAR)], dialect=HOSTED)["tools"]
    assert made["custom"]["format"] == {
        "type": "grammar",
        "grammar": {"syntax": "lark", "definition": "start: WORD"},
    }


# -- Reasoning --------------------------------------------------------------------------------------------------------------


def reasoning(**fields: Any) -> dict[str, Any]:
    """A reasoning item."""
    return {"type": "reasoning", "id": "rs_1", "summary": [], **fields}


@pytest.mark.parametrize(
    ("item", "text"),
    [
        (reasoning(content=[{"type": "reasoning_text", "text": one} for one in "ab"]), "ab"),
        (reasoning(encrypted_content="sealed hm"), "hm"),
        (
            reasoning(
                encrypted_content="another server's",
                summary=[{"type": "summary_text", "text": "short"}],
            ),
            "short",
        ),
        (
            reasoning(
                content=[{"type": "reasoning_text", "text": "raw"}],
                encrypted_content="sealed x",
                summary=[{"type": "summary_text", "text": "short"}],
            ),
            "raw",
        ),
    ],
)
def test_reasoning_goes_back_where_the_upstream_takes_it(item: dict[str, Any], text: str):
    dialect = Dialect(reasoning="reasoning_content")
    assert said(assistant("yes"), chain=[item], dialect=dialect) == [
        {"role": "assistant", "content": "yes", "reasoning_content": text}
    ]
    assert said(output("c1"), chain=[item, call("c1")], dialect=Dialect(reasoning="reasoning"))[0] == turn(
        tool_call("c1"), reasoning=text
    )
    assert said(assistant("yes"), chain=[item]) == [{"role": "assistant", "content": "yes"}]


THOUGHT_OF = {text: {"type": "reasoning_text", "text": text} for text in ("a", "b", "hm")}


def test_reasoning_goes_back_in_the_content_as_tags_or_as_a_part():
    items = [reasoning(content=[THOUGHT_OF["hm"]]), assistant("yes")]
    assert said(*items, dialect=Dialect(reasoning="think")) == [
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"}
    ]
    assert said(*items, dialect=Dialect(reasoning="parts")) == [
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
                {"type": "text", "text": "yes"},
            ],
        }
    ]


@pytest.mark.parametrize(
    ("form", "given", "recalled"),
    [
        ("reasoning", None, ["a", "b"]),
        ("reasoning", {"context": "auto"}, ["a", "b"]),
        ("reasoning", {"context": "all_turns"}, ["a", "b"]),
        ("reasoning", {"context": "current_turn"}, ["b"]),
        ("think", None, ["b"]),
        ("think", {"context": "all_turns"}, ["a", "b"]),
        ("none", {"context": "all_turns"}, []),
        ("same", {"context": "all_turns"}, []),
    ],
)
def test_the_reasoning_of_earlier_turns_goes_back_as_the_request_says(form: Any, given: Any, recalled: list[str]):
    body = asked(
        user("hi"),
        reasoning(content=[THOUGHT_OF["a"]]),
        assistant("yes"),
        user("and?"),
        reasoning(id="rs_2", content=[THOUGHT_OF["b"]]),
        call("c1"),
        output("c1"),
        dialect=Dialect(reasoning=form),
        reasoning=given,
    )
    thoughts = [message.get("reasoning") or message["content"] or "" for message in body["messages"]]
    assert [one for one in ("a", "b") if any(one == text or f"\n{one}\n" in text for text in thoughts)] == recalled


def test_reasoning_that_nothing_followed_is_not_said():
    assert said(user("again"), chain=[reasoning(encrypted_content="sealed hm")]) == [
        {"role": "user", "content": "again"}
    ]


def test_reasoning_begins_another_turn():
    dialect = Dialect(reasoning="reasoning")
    first, second = reasoning(encrypted_content="sealed a"), reasoning(id="rs_2", encrypted_content="sealed b")
    assert said(assistant("two"), chain=[first, assistant("one"), second], dialect=dialect) == [
        {"role": "assistant", "content": "one", "reasoning": "a"},
        {"role": "assistant", "content": "two", "reasoning": "b"},
    ]


# -- Items of other servers -------------------------------------------------------------------------------------------------


def test_an_mcp_call_is_a_call_with_its_output():
    item = {
        "type": "mcp_call",
        "id": "mcp_1",
        "server_label": "s",
        "name": "roll",
        "arguments": '{"d":6}',
        "output": "4",
    }
    assert said(user("roll"), item, assistant("4!")) == [
        {"role": "user", "content": "roll"},
        turn(tool_call("mcp_1", "roll", '{"d":6}')),
        tool("mcp_1", "4"),
        {"role": "assistant", "content": "4!"},
    ]


def test_a_failed_mcp_call_tells_its_error():
    item = {"type": "mcp_call", "id": "mcp_1", "server_label": "s", "name": "roll", "arguments": "", "error": "no dice"}
    assert said(item)[1] == tool("mcp_1", "Error: no dice")


def test_calls_that_were_made_at_once_stand_in_the_order_of_the_model():
    ids = siblings()
    first, second, third = (ids(prefix) for prefix in ("mcp", "fc", "mcp"))
    server = {"type": "mcp_call", "server_label": "s", "name": "roll", "arguments": "{}", "output": "4"}
    items = [call("c1", id=second), {**server, "id": first}, {**server, "id": third}, output("c1")]
    assert said(*items)[0] == turn(tool_call(first, "roll"), tool_call("c1"), tool_call(third, "roll"))
    assert [one["tool_call_id"] for one in said(*items)[1:]] == [first, "c1", third]


def test_images_of_an_mcp_call_go_to_models_that_see_them():
    item = {
        "type": "mcp_call",
        "id": "mcp_1",
        "server_label": "s",
        "name": "draw",
        "arguments": "{}",
        "output": "[image/png, 1 bytes]",
        "images": [IMAGE],
    }
    assert said(item) == [turn(tool_call("mcp_1", "draw")), tool("mcp_1", "[image/png, 1 bytes]")]
    _, answered, attached = said(item, dialect=Dialect(tool_images=True))
    assert answered["content"].startswith("[image/png, 1 bytes]\n")
    assert attached == {
        "role": "user",
        "content": [
            {"type": "text", "text": "Attachments of tool call mcp_1:"},
            {"type": "image_url", "image_url": {"url": IMAGE["image_url"]}},
        ],
    }


@pytest.mark.parametrize("tie", [{"id": "c1"}, {"call_id": "c1"}])
def test_a_local_shell_call_has_its_output(tie: dict[str, str]):
    action = {"type": "exec", "command": ["ls"], "env": {}}
    shell = {"type": "local_shell_call", "id": "lsh_1", "call_id": "c1", "status": "completed", "action": action}
    assert said(shell, {"type": "local_shell_call_output", "output": "x", **tie}) == [
        turn(tool_call("c1", "local_shell", '{"type":"exec","command":["ls"],"env":{}}')),
        tool("c1", "x"),
    ]


@pytest.mark.parametrize("tie", [{"call_id": "c1"}, {"call_id": None}, {}])
def test_a_tool_search_is_a_call_and_what_it_found(tie: dict[str, Any]):
    search = {"type": "tool_search_call", "id": "ts_1", "execution": "server", "arguments": {"q": "time"}, **tie}
    found = {"type": "tool_search_output", "id": "ts_2", "tools": [function("get_time")], **tie}
    id = tie.get("call_id") or "ts_1"
    assert said(user("hi"), search, found, assistant("yes"))[1:] == [
        turn(tool_call(id, "tool_search", '{"q":"time"}')),
        tool(id, '[{"type":"function","name":"get_time"}]'),
        {"role": "assistant", "content": "yes"},
    ]


def test_an_output_that_names_no_call_is_left_alone():
    assert said(user("hi"), {"type": "tool_search_output", "tools": []}) == said(user("hi"))


def test_a_shell_call_is_a_call_of_its_kind():
    shell = {"type": "shell_call", "id": "sh_1", "call_id": "c1", "status": "completed", "action": {"commands": ["ls"]}}
    answer = {"type": "shell_call_output", "call_id": "c1", "output": [{"stdout": "x"}]}
    assert said(shell, answer) == [
        turn(tool_call("c1", "shell", '{"commands":["ls"]}')),
        tool("c1", '[{"stdout":"x"}]'),
    ]


def test_an_unanswered_call_of_another_server_is_not_said():
    environment = {"type": "container_reference", "container_id": "c"}
    shell = {"type": "shell_call", "id": "sh_1", "call_id": "c1", "action": {}, "environment": environment}
    assert said(user("hi"), shell) == [{"role": "user", "content": "hi"}]


def test_what_no_chat_message_can_say_is_left_out():
    listed = {"type": "mcp_list_tools", "id": "mcpl_1", "server_label": "s", "tools": []}
    searched = {"type": "web_search_call", "id": "ws_1", "status": "completed"}
    assert said(user("hi"), listed, searched, assistant("yes")) == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
    ]


# -- Parameters -------------------------------------------------------------------------------------------------------------


def test_a_plain_request_has_nothing_beside():
    assert asked() == {
        "model": "up",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


PARAMETERS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"temperature": 0}, {"temperature": 0}),
    ({"top_p": 0.5}, {"top_p": 0.5}),
    ({"frequency_penalty": 1, "presence_penalty": -1}, {"frequency_penalty": 1, "presence_penalty": -1}),
    ({"max_output_tokens": 20}, {"max_tokens": 20}),
    ({"reasoning": {"effort": "high"}}, {"reasoning_effort": "high"}),
    ({"reasoning": {"summary": "auto"}}, {}),
    ({"top_logprobs": 3}, {"logprobs": True, "top_logprobs": 3}),
    ({"top_logprobs": 0}, {}),
    ({"include": ["message.output_text.logprobs"]}, {"logprobs": True, "top_logprobs": 0}),
    ({"text": {"verbosity": "low"}}, {}),
    ({"text": {"format": {"type": "text"}}}, {}),
    ({"text": {"format": {"type": "json_object"}}}, {"response_format": {"type": "json_object"}}),
    (
        {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True},
            }
        },
    ),
    ({"top_k": 5}, {"top_k": 5}),
    ({"parallel_tool_calls": False}, {}),
]


@pytest.mark.parametrize(("body", "expected"), PARAMETERS)
def test_a_parameter_is_passed_on(body: dict[str, Any], expected: dict[str, Any]):
    assert {key: value for key, value in asked(**body).items() if key not in asked()} == expected


def test_the_hosted_dialect_has_its_own_names():
    made = asked(max_output_tokens=20, text={"verbosity": "low"}, dialect=HOSTED)
    assert (made["max_completion_tokens"], made["verbosity"]) == (20, "low")
    assert "max_tokens" not in made


def test_parameters_about_caches_callers_and_tiers_go_to_upstreams_that_take_them():
    given = {"prompt_cache_key": "a", "safety_identifier": "b", "user": "c", "service_tier": "flex"}
    assert not asked(**given).keys() & given.keys()
    assert asked(**given, dialect=HOSTED).items() >= given.items()
    assert asked(**given, dialect=Dialect(takes=frozenset({"user"}))).keys() & given.keys() == {"user"}


@pytest.mark.parametrize(
    ("lack", "body", "key"),
    [
        ("stream_options", {}, "stream_options"),
        ("reasoning_effort", {"reasoning": {"effort": "low"}}, "reasoning_effort"),
        ("parallel_tool_calls", {"parallel_tool_calls": False, "tools": [function("f")]}, "parallel_tool_calls"),
    ],
)
def test_an_option_that_is_lacking_is_left_out(lack: Any, body: dict[str, Any], key: str):
    assert key in asked(**body)
    assert key not in asked(**body, dialect=Dialect(lacks=frozenset({lack})))


SCHEMA = {"type": "json_schema", "name": "n", "schema": {}}


def test_where_no_tool_can_be_named_it_is_the_only_one_that_is_declared():
    body = {"tools": [function("f"), function("g")], "tool_choice": {"type": "function", "name": "g"}}
    made = asked(**body, dialect=Dialect(lacks=frozenset({"tool_choice_named"})))
    assert [tool["function"]["name"] for tool in made["tools"]] == ["g"]
    assert made["tool_choice"] == "required"


def test_where_no_choice_is_heard_and_none_may_be_called_none_is_declared():
    body = {"tools": [function("f")], "tool_choice": "none"}
    assert "tools" in asked(**body)
    assert not {"tools", "tool_choice"} & asked(**body, dialect=PRESETS["ollama"]).keys()


@pytest.mark.parametrize(
    ("lack", "body", "param"),
    [
        ("json_schema", {"text": {"format": SCHEMA}}, "text.format"),
        ("json_object", {"text": {"format": {"type": "json_object"}}}, "text.format"),
        ("tool_choice_required", {"tools": [function("f")], "tool_choice": "required"}, "tool_choice"),
        (
            "tool_choice_required",
            {"tools": [function("f")], "tool_choice": {"type": "function", "name": "f"}},
            "tool_choice",
        ),
    ],
)
def test_what_can_t_be_left_out_is_refused_where_it_is_lacking(lack: Any, body: dict[str, Any], param: str):
    asked(**body)
    with pytest.raises(UnsupportedParameter) as caught:
        asked(**body, dialect=Dialect(lacks=frozenset({lack})))
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("auto", None),
        ("none", "none"),
        ("required", "required"),
        ({"type": "function", "name": "f"}, {"type": "function", "function": {"name": "f"}}),
        ({"type": "custom", "name": "run"}, {"type": "function", "function": {"name": "run"}}),
        ({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "f"}]}, "required"),
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]}, None),
    ],
)
def test_a_tool_choice_is_asked_for(choice: Any, expected: Any):
    assert asked(tools=[function("f"), custom()], tool_choice=choice).get("tool_choice") == expected


def test_tools_that_are_not_allowed_stay_declared_where_the_upstream_can_be_told_so():
    tools = [function("f"), function("g"), custom()]
    allowed = [{"type": "function", "name": "g"}, {"type": "custom", "name": "run"}]
    for mode in ("auto", "required"):
        choice = {"type": "allowed_tools", "mode": mode, "tools": allowed}
        made = asked(tools=tools, tool_choice=choice, dialect=HOSTED)
        assert made["tools"] == asked(tools=tools, dialect=HOSTED)["tools"]
        assert made["tool_choice"] == {
            "type": "allowed_tools",
            "allowed_tools": {
                "mode": mode,
                "tools": [
                    {"type": "function", "function": {"name": "g"}},
                    {"type": "custom", "custom": {"name": "run"}},
                ],
            },
        }
        assert len(asked(tools=tools, tool_choice=choice)["tools"]) == 2


def test_a_native_custom_tool_is_chosen_as_such():
    made = asked(tools=[custom()], tool_choice={"type": "custom", "name": "run"}, dialect=HOSTED)
    assert made["tool_choice"] == {"type": "custom", "custom": {"name": "run"}}


def test_a_function_is_declared_with_what_it_has():
    (made,) = asked(tools=[function("f", description="F.", parameters={"type": "object"}, strict=True)])["tools"]
    assert made == {
        "type": "function",
        "function": {"name": "f", "description": "F.", "parameters": {"type": "object"}, "strict": True},
    }
    bare = {"name": "f", "parameters": {"type": "object", "properties": {}}}
    assert asked(tools=[function("f", strict=None)])["tools"] == [{"type": "function", "function": bare}]
    loose = asked(tools=[function("f", strict=True)], dialect=Dialect(lacks=frozenset({"strict"})))
    assert loose["tools"] == [{"type": "function", "function": bare}]


# -- Calls that a server has run --------------------------------------------------------------------------------------------


def mcp_call(id: str, arguments: str = "{}", **more: Any) -> dict[str, Any]:
    """A server-run call."""
    fields = {"server_label": "box", "name": "f", "output": f"of {id}", "status": "completed", **more}
    return {"type": "mcp_call", "id": id, "arguments": arguments, **fields}


FIRST, TOGETHER, LATER = (f"mcp_{stem * 32}000{number}" for stem, number in (("a", 0), ("a", 1), ("b", 0)))


def test_calls_that_were_made_at_once_are_one_turn_and_others_are_not():
    made = said(user("x"), mcp_call(FIRST), mcp_call(TOGETHER), mcp_call(LATER))
    assert made[1:] == [
        turn(tool_call(FIRST), tool_call(TOGETHER)),
        tool(FIRST, f"of {FIRST}"),
        tool(TOGETHER, f"of {TOGETHER}"),
        turn(tool_call(LATER)),
        tool(LATER, f"of {LATER}"),
    ]


def test_the_client_s_calls_stand_before_those_of_their_turn():
    made = said(user("x"), mcp_call(FIRST), call("c"), mcp_call(LATER), output("c"))
    assert made[1:] == [
        turn(tool_call(FIRST)),
        tool(FIRST, f"of {FIRST}"),
        turn(tool_call("c"), tool_call(LATER)),
        tool("c"),
        tool(LATER, f"of {LATER}"),
    ]


def test_an_approved_call_stands_where_it_was_asked_for():
    asked_for = {"type": "mcp_approval_request", "id": "mcpr_1", "server_label": "box", "name": "f", "arguments": "{}"}
    answer = {"type": "mcp_approval_response", "approval_request_id": "mcpr_1", "approve": True}
    made = said(
        user("x"),
        asked_for,
        mcp_call(FIRST),
        chain=[],
    )
    assert made[1] == turn(tool_call("mcpr_1"), tool_call(FIRST))
    made = said(
        user("y"),
        chain=[
            user("x") | {"id": "msg_1"},
            asked_for,
            mcp_call(FIRST),
            answer,
            mcp_call(LATER, approval_request_id="mcpr_1"),
        ],
    )
    assert made[1:] == [
        turn(tool_call("mcpr_1"), tool_call(FIRST)),
        tool("mcpr_1", f"of {LATER}"),
        tool(FIRST, f"of {FIRST}"),
        user("y"),
    ]


@pytest.mark.parametrize("arguments", ['{"x": ', "[1]", "text"])
def test_arguments_that_are_no_json_object_are_told_in_one(arguments: str):
    for made in (said(user("x"), mcp_call(FIRST, arguments)), said(call("c", arguments=arguments), output("c"))):
        [one] = next(message["tool_calls"] for message in made if message.get("tool_calls"))
        assert msgspec.json.decode(one["function"]["arguments"]) == {"not_json": arguments}
