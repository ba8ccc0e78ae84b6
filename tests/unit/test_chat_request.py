"""Chat requests → create requests: the messages come back as they were sent, parameters get their other names."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from app.domain.chat_messages import sent_messages
from app.domain.chat_request import create_request, renamed
from app.domain.context import resolve
from app.domain.dialect import HOSTED, PRESETS, Dialect
from app.domain.lifecycle import open_response
from app.domain.prompt import chat_request
from app.errors import ApiError, InvalidRequest
from app.wire.chat_requests import decode_chat
from app.wire.requests import CreateResponse
from app.wire.resources import encode
from tests.unit.build import SEAL, counting

PASSED_ON = frozenset({"top_k"})
WHOLE = Dialect(developer_role=True, refusals=True, reasoning="reasoning_content")
FUNCTION = {"name": "f", "description": "Does f.", "parameters": {"type": "object", "properties": {}}, "strict": True}
TOOL = {"type": "function", "function": FUNCTION}
USER = {"role": "user", "content": "hi"}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
CUSTOM = {"id": "call_2", "type": "custom", "custom": {"name": "shell", "input": "ls"}}


def created(*given: Any, **body: Any) -> CreateResponse:
    """The create request of a chat request with these messages."""
    raw = msgspec.json.encode({"model": "m", "messages": list(given or [USER]), **body})
    return create_request(decode_chat(raw, PASSED_ON))


def asked(*given: Any, dialect: Dialect = WHOLE, **body: Any) -> dict[str, Any]:
    """The body that an upstream gets for it."""
    request = created(*given, **body)
    context = resolve(request, [], {}, counting(), seal=SEAL)
    most = request.body.max_output_tokens
    made = chat_request(request, context, model="m", dialect=dialect, unseal=SEAL.open, output_tokens_max=most)
    return {key: value for key, value in msgspec.json.decode(made).items() if key not in {"stream", "stream_options"}}


def refusal(*given: Any, **body: Any) -> tuple[str | None, str | None]:
    """The param and code of the 400."""
    with pytest.raises(ApiError) as refused:
        created(*given, **body)
    assert refused.value.status == 400
    return refused.value.param, refused.value.code


# -- Messages ----------------------------------------------------------------------------------------------------------------

TEXT = st.text(min_size=1, max_size=8)
NAME = st.one_of(st.none(), st.sampled_from(["ann", "bob"]))
TEXTS = st.lists(TEXT.map(lambda text: {"type": "text", "text": text}), min_size=2, max_size=3)
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA==", "detail": "low"}}
AUDIO = {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}}
FILE = {"type": "file", "file": {"file_data": "data:application/pdf;base64,AA==", "filename": "a.pdf"}}


def named(message: dict[str, Any], name: str | None) -> dict[str, Any]:
    return message if name is None else {**message, "name": name}


SYSTEM = st.builds(
    lambda role, content, name: named({"role": role, "content": content}, name),
    st.sampled_from(["system", "developer"]),
    st.one_of(TEXT, TEXTS),
    NAME,
)
ASKED = st.builds(
    lambda content, more, name: named({"role": "user", "content": [*content, *more] if more else content}, name),
    TEXTS,
    st.lists(st.sampled_from([IMAGE, AUDIO, FILE]), max_size=2),
    NAME,
)
ANSWERED = st.builds(
    lambda content, refused, thought, name: named(
        {"role": "assistant", "content": content or (None if refused else "")}
        | ({"refusal": refused} if refused else {})
        | ({"reasoning_content": thought} if thought else {}),
        name,
    ),
    st.one_of(st.none(), TEXT, TEXTS),
    st.one_of(st.none(), TEXT),
    st.one_of(st.none(), TEXT),
    NAME,
)


@st.composite
def calling(draw: st.DrawFn) -> list[dict[str, Any]]:
    """A message with calls, and the messages that answer them."""
    ids = [f"call_{draw(st.integers(0, 3))}_{number}" for number in range(draw(st.integers(1, 3)))]
    calls = [
        {"id": id, "type": "function", "function": {"name": draw(st.sampled_from("fg")), "arguments": '{"a": 1}'}}
        if draw(st.booleans())
        else {"id": id, "type": "custom", "custom": {"name": "shell", "input": draw(TEXT)}}
        for id in ids
    ]
    said = {"role": "assistant", "content": draw(st.one_of(st.none(), TEXT)), "tool_calls": calls}
    thought = draw(st.one_of(st.none(), TEXT))
    outputs = [{"role": "tool", "tool_call_id": id, "content": draw(TEXT)} for id in ids]
    return [said | ({"reasoning_content": thought} if thought else {}), *outputs]


CHAT = st.lists(st.one_of(*(one.map(lambda message: [message]) for one in (SYSTEM, ASKED, ANSWERED)), calling()))


def plain(message: dict[str, Any]) -> dict[str, Any]:
    """Beside calls, no text and an empty one are the same."""
    return {**message, "content": message["content"] or None} if "tool_calls" in message else message


@given(CHAT.map(lambda groups: [message for group in groups for message in group]).filter(bool))
def test_an_upstream_gets_the_messages_as_they_were_sent(sent):
    dialect = replace(WHOLE, custom_tools="native")
    assert [plain(one) for one in asked(*sent, dialect=dialect)["messages"]] == [plain(one) for one in sent]
    items = resolve(created(*sent), [], {}, counting(), seal=SEAL).input
    assert [plain(one) for one in msgspec.to_builtins(sent_messages(items))] == [plain(one) for one in sent]


def test_roles_stay_unless_the_upstream_is_known_to_lack_them():
    sent = [{"role": role, "content": role} for role in ("system", "developer", "user", "system")]
    for preset, kept in (("plain", True), ("vllm", True), ("openai", True), ("mistral", False), ("deepseek", False)):
        body = asked(*sent, dialect=PRESETS[preset].keeping_roles())
        roles = [one["role"] for one in body["messages"]]
        assert ("developer" in roles) is kept, preset


def test_a_part_alone_is_a_string_and_outputs_follow_the_order_of_their_calls():
    sent = [
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "tool_calls": [CALL, {**CALL, "id": "call_b"}]},
        {"role": "tool", "tool_call_id": "call_b", "content": [{"type": "text", "text": "two"}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "one", "name": "f"},
    ]
    assert asked(*sent)["messages"] == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [CALL, {**CALL, "id": "call_b"}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "one", "name": "f"},
        {"role": "tool", "tool_call_id": "call_b", "content": "two"},
    ]


def test_whole_replies_may_be_sent_back_with_what_sdks_add_to_them():
    function = {**CALL["function"], "parsed_arguments": {"a": 1}}
    reply = {
        "role": "assistant",
        "content": "Yes.",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "parsed": None,
        "reasoning": "hm",
        "tool_calls": [{**CALL, "index": 0, "function": function}],
    }
    sent = asked(USER, reply, {"role": "tool", "tool_call_id": "call_1", "content": ""})["messages"]
    assert sent[1] == {"role": "assistant", "content": "Yes.", "reasoning_content": "hm", "tool_calls": [CALL]}


@pytest.mark.parametrize(
    ("message", "param", "code"),
    [
        ({"role": "bot", "content": "x"}, "messages[0].role", "invalid_value"),
        ({"role": "function", "name": "f", "content": "x"}, "messages[0].role", "invalid_value"),
        ({"role": "user"}, "messages[0].content", "missing_required_parameter"),
        ({"role": "user", "content": None}, "messages[0].content", "invalid_type"),
        ({"role": "user", "content": "x", "mood": 1}, "messages[0].mood", "unknown_parameter"),
        ({"role": "user", "content": [{"type": "video"}]}, "messages[0].content[0].type", "invalid_value"),
        ({"role": "system", "content": [IMAGE]}, "messages[0].content[0].type", "invalid_value"),
        ({"role": "tool", "content": "x"}, "messages[0].tool_call_id", "missing_required_parameter"),
        (
            {"role": "assistant", "tool_calls": [{"id": "call_1", "type": "function"}]},
            "messages[0].tool_calls[0].function",
            "missing_required_parameter",
        ),
        ({"role": "assistant", "audio": {"id": "audio_1"}}, "messages[0].audio", "invalid_type"),
    ],
)
def test_a_message_that_is_wrong_is_named(message, param, code):
    assert refusal(message) == (param, code)


PICTURE = {"type": "image_url", "image_url": {"url": "https://a.example/a.png", "detail": "huge"}}


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        (
            {"messages": [USER, {"role": "assistant", "content": [IMAGE]}]},
            "messages[1].content[0].type",
            "Invalid value for '{}': 'image_url'. Supported values are: 'refusal', 'text'.",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "txt", "text": "x"}]}]},
            "messages[0].content[0].type",
            "Invalid value for '{}': 'txt'. Supported values are: 'file', 'image_url', 'input_audio', 'text'. Did you mean 'text'?",
        ),
        (
            {"messages": [{"role": "user", "content": [PICTURE]}]},
            "messages[0].content[0].image_url.detail",
            "Invalid value for '{}': 'huge'. Supported values are: 'auto', 'high', 'low', 'original'.",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "tool_cals": []}]},
            "messages[0].tool_cals",
            "Unknown parameter: '{}'.",
        ),
        ({"messages": [{"role": None}]}, "messages[0].role", "Invalid value for '{}': expected a string."),
        (
            {"metadata": {"a": "b", "c": 1}},
            "metadata.c",
            "Invalid type for '{}': expected a string, got an integer instead.",
        ),
        ({"metadata": {"a": "b" * 513}}, "metadata.a", "Invalid value for '{}': expected a string of length <= 512."),
        (
            {"metadata": {"a" * 65: ""}},
            "metadata",
            "Invalid value for '{}': a key is wrong: expected a string of length <= 64.",
        ),
        (
            {"metadata": {str(number): "" for number in range(17)}},
            "metadata",
            "Invalid value for '{}': expected an object of length <= 16.",
        ),
        ({"logit_bias": {"5": 0, "7": 101}}, "logit_bias.7", "Invalid value for '{}': expected an integer <= 100."),
        (
            {"logit_bias": {"5": "high"}},
            "logit_bias.5",
            "Invalid type for '{}': expected an integer or a number, got a string instead.",
        ),
        ({"temperature": 2.5}, "temperature", "Invalid value for '{}': expected a number <= 2.0."),
        (
            {"tools": [{"type": "function", "function": {}}]},
            "tools[0].function.name",
            "Missing required parameter: '{}'.",
        ),
        (
            {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": []}}},
            "tool_choice.allowed_tools.tools",
            "Invalid value for '{}': expected an array of length >= 1.",
        ),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": ""}}},
            "tool_choice.function.name",
            "Invalid value for '{}': expected a string of length >= 1.",
        ),
        ({"truncation": "auto"}, "truncation", "Unknown parameter: '{}'. Only /v1/responses has it."),
        ({"max_tool_calls": 1}, "max_tool_calls", "Unknown parameter: '{}'. Only /v1/responses has it."),
    ],
)
def test_a_refusal_says_what_may_stand_there_and_nothing_else(body, param, message):
    with pytest.raises(ApiError) as refused:
        created(**body)
    assert (refused.value.param, refused.value.message) == (param, message.format(param))


def test_errors_about_items_name_the_message_and_its_part():
    raw = msgspec.json.encode(
        {
            "model": "m",
            "messages": [USER, {"role": "assistant", "content": "x", "tool_calls": [CALL, CALL]}, {**USER}],
            "tools": [TOOL],
            "web_search_options": {},
        }
    )
    chat = decode_chat(raw, ())

    def as_chat(param: str) -> tuple[str | None, str]:
        error = renamed(InvalidRequest(f"Wrong '{param}'.", param=param), chat)
        return error.param, error.message

    assert as_chat("input") == ("messages", "Wrong 'messages'.")
    assert as_chat("text.format") == ("response_format", "Wrong 'response_format'.")
    assert as_chat("tools[0].name") == ("tools[0].name", "Wrong 'tools[0].name'.")
    near = "web_search_options.user_location"
    assert as_chat("tools[1].user_location") == (near, f"Wrong '{near}'.")
    assert as_chat("tools[1].type")[0] == "web_search_options"
    at = "messages[2].content[1].file.file_id"
    assert as_chat("input[4].content[1].file_id") == (at, f"Wrong '{at}'.")
    assert as_chat("input[4].content[1].image_url")[0] == "messages[2].content[1].image_url.url"
    assert as_chat("input[9]")[0] == "messages"


# -- Parameters --------------------------------------------------------------------------------------------------------------


def test_parameters_reach_the_upstream_and_are_echoed():
    schema = {"name": "s", "schema": {"type": "object"}, "strict": True}
    given = {
        "temperature": 0.5,
        "top_p": 0.9,
        "frequency_penalty": 1.0,
        "presence_penalty": -1.0,
        "max_completion_tokens": 5,
        "stop": ["a", "b"],
        "seed": 7,
        "logit_bias": {"1": -100.0},
        "logprobs": True,
        "top_logprobs": 2,
        "top_k": 3,
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "parallel_tool_calls": False,
        "response_format": {"type": "json_schema", "json_schema": schema},
        "reasoning_effort": "low",
        "verbosity": "high",
        "user": "u",
        "service_tier": "flex",
        "prompt_cache_key": "k",
        "safety_identifier": "s",
    }
    assert asked(dialect=HOSTED, **given) == {"model": "m", "messages": [USER], **given}
    echo = open_response(created(metadata={"a": "b"}, **given), id="resp_1", created_at=0)
    assert (echo.max_output_tokens, echo.metadata, echo.store) == (5, {"a": "b"}, False)
    assert encode(echo)


def test_a_bias_that_is_an_integer_stays_one():
    body = created(logit_bias={"1": 2, "3": -1.5})
    assert bytes(body.extra["logit_bias"]) == b'{"1":2,"3":-1.5}'


def test_without_state_nothing_stays_unless_the_client_asks_for_it():
    assert created().store is False
    assert created(store=True).store is True
    assert created(previous_response_id="resp_1").store is True
    assert created(previous_response_id="resp_1", store=False).store is False
    for state in ({"conversation": "conv_1"}, {"conversation": {"id": "conv_1"}}, {"conversation_id": "conv_1"}):
        request = created(**state)
        assert (request.store, request.conversation_id) == (True, "conv_1")


def test_the_former_name_of_the_limit_of_tokens():
    assert created(max_tokens=1).body.max_output_tokens == 1
    assert created(max_tokens=2, max_completion_tokens=2).body.max_output_tokens == 2
    assert refusal(max_tokens=1, max_completion_tokens=2)[0] == "max_tokens"


def test_custom_tools_and_choices():
    grammar = {"syntax": "lark", "definition": "start: x"}
    custom = {"type": "custom", "custom": {"name": "shell", "format": {"type": "grammar", "grammar": grammar}}}
    listed = [{"type": "custom", "custom": {"name": "shell"}}]
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": listed}}
    sent = asked(tools=[TOOL, custom], tool_choice=choice, dialect=HOSTED)
    assert sent["tool_choice"] == choice
    assert sent["tools"][1]["custom"]["format"] == custom["custom"]["format"]
    assert asked(tools=[TOOL], tool_choice="required")["tool_choice"] == "required"


def test_tools_that_the_server_runs_stand_beside_functions():
    mcp = {"type": "mcp", "server_label": "box", "server_url": "http://box.example", "require_approval": "never"}
    near = {"type": "approximate", "approximate": {"city": "Oslo"}}
    made = created(tools=[TOOL, mcp], web_search_options={"search_context_size": "low", "user_location": near})
    assert [tool.__class__.__name__ for tool in made.tools] == ["FunctionTool", "McpTool", "HostedTool"]
    assert made.tools[2].fields == {
        "type": "web_search",
        "search_context_size": "low",
        "user_location": {"type": "approximate", "city": "Oslo"},
    }


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"n": 2}, "n"),
        ({"n": 0}, "n"),
        ({"n": "two"}, "n"),
        ({"functions": [FUNCTION]}, "functions"),
        ({"function_call": "auto"}, "function_call"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "x", "format": "wav"}}, "audio"),
        ({"moderation": {"model": "x"}}, "moderation"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_output_tokens": 5}, "max_output_tokens"),
        ({"background": True}, "background"),
        ({"mood": 1}, "mood"),
        ({"stop": 1}, "stop"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"messages": []}, "messages"),
        ({"model": None}, "model"),
        ({"conversation": "conv_1", "previous_response_id": "resp_1"}, "conversation"),
        ({"conversation": "conv_1", "conversation_id": "conv_1"}, "conversation_id"),
        ({"tools": [{"type": "function", "name": "f"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": "f", "mood": 1}}]}, "tools[0].function.mood"),
        ({"tools": [{"type": "mcp", "server_label": "a", "server_url": "http://a"}]}, "tools[0].require_approval"),
        ({"tools": [{"type": "namespace", "name": "a", "tools": []}]}, "tools[0].type"),
        ({"tools": [{"type": "local_shell"}]}, "tools[0].type"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ],
)
def test_a_parameter_that_is_wrong_or_not_offered_is_named(body, param):
    assert refusal(**body)[0] == param


@pytest.mark.parametrize(
    ("name", "meant"),
    [("max_output_tokens", "max_completion_tokens"), ("input", "messages"), ("temprature", "temperature")],
)
def test_an_unknown_parameter_is_a_400_with_the_name_that_is_meant(name, meant):
    with pytest.raises(InvalidRequest, match=f"Did you mean '{meant}'") as refused:
        created(**{name: 1})
    assert (refused.value.param, refused.value.code) == (name, "unknown_parameter")


def test_nulls_and_harmless_values_pass():
    nulls = dict.fromkeys(
        "n stop seed tools tool_choice functions function_call audio moderation response_format stream_options logit_bias "
        "conversation_id metadata max_tokens user".split()
    )
    created(**nulls, modalities=["text"], prediction={"type": "content", "content": "x"})
    created(n=1, stream=True, stream_options={"include_usage": True, "include_obfuscation": False})
