"""The body of a create request: what is taken, what is refused and with which path, what is passed on."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from app.errors import TEXT_CHARS_MAX, InvalidRequest, UnsupportedParameter
from app.wire.items import InputText, Message
from app.wire.requests import INPUT_CHARS_MAX, Body, decode_count, decode_create, mend_surrogates
from app.wire.tools import AllowedTools, CustomTool, FunctionTool, HostedTool, NamedTool, NamespaceTool
from tests.unit.build import function, request

PASSED_ON = frozenset({"top_k"})

LONG = "x" * 100_000


def refused(**body: Any) -> InvalidRequest:
    """The error of a bad body."""
    with pytest.raises(InvalidRequest) as caught:
        request(**body)
    return caught.value


# -- Taken ------------------------------------------------------------------------------------------------------------------


def test_a_string_is_one_user_message():
    assert request(input="hi").input == [Message(role="user", content=[InputText(text="hi")])]


def test_items_are_decoded():
    assert request(input=[{"role": "user", "content": "hi"}]).input == [Message(role="user", content="hi")]


@pytest.mark.parametrize("rest", [{"previous_response_id": "resp_1"}, {"instructions": "be brief"}])
@pytest.mark.parametrize("input", [None, []])
def test_no_input_is_needed_where_something_else_is_said(rest: dict[str, Any], input: Any):
    assert request(input=input, **rest).input == []


@pytest.mark.parametrize(
    "body",
    [
        dict.fromkeys(
            "instructions previous_response_id conversation prompt store background stream stream_options include metadata max_output_tokens max_tool_calls temperature top_p frequency_penalty presence_penalty top_logprobs parallel_tool_calls tools tool_choice text reasoning truncation context_management moderation service_tier prompt_cache_key prompt_cache_options prompt_cache_retention safety_identifier user image access_programs multi_agent verbosity".split()
        ),
        {"background": False, "conversation": None, "moderation": {}, "context_management": []},
        {"reasoning": {"effort": "minimal", "summary": "auto", "context": "auto", "mode": "standard"}},
        {"access_programs": {"cyber": "standard"}, "image": {"context_compression": "disabled"}},
        {"client_metadata": {"a": 1}, "extra_headers": {}, "timeout": 3},
        {"stream": True, "stream_options": {"include_obfuscation": False}},
        {"metadata": {"k" * 64: "v" * 512} | {str(number): "" for number in range(15)}},
        {"include": ["reasoning.encrypted_content", "web_search_call.action.sources"]},
        {"text": {"format": {"type": "json_schema", "name": "a-b_c", "schema": {}, "strict": None}}},
    ],
)
def test_harmless_values_are_taken(body: dict[str, Any]):
    assert request(**body).extra == {}


def test_defaults_are_the_api_s():
    made = request()
    assert (made.store, made.stream, made.include, made.generate) == (True, False, frozenset(), True)
    assert (made.tools, made.tool_choice) == ([], "auto")
    assert request(prompt_cache_options={"prewarm": True}).generate is False
    assert request(store=False).store is False


def test_parameters_beyond_the_api_are_passed_on_as_they_are():
    made = decode_create(b'{"model":"m","input":"x","top_k":{"a": 1.50}}', PASSED_ON)
    assert {name: bytes(raw) for name, raw in made.extra.items()} == {"top_k": b'{"a": 1.50}'}


def test_tools_of_every_kind_are_decoded():
    tools = [
        function("f", strict=True),
        {"type": "custom", "name": "run"},
        {"type": "namespace", "name": "n", "tools": [function("g"), {"type": "custom", "name": "h"}]},
        {"type": "web_search", "search_context_size": "low"},
    ]
    assert request(tools=tools).tools == [
        FunctionTool("f", strict=True),
        CustomTool("run"),
        NamespaceTool("n", [FunctionTool("g"), CustomTool("h")]),
        HostedTool("web_search", tools[3]),
    ]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("none", "none"),
        ("required", "required"),
        ({"type": "function", "name": "f"}, NamedTool(type="function", name="f")),
        ({"type": "custom", "name": "f"}, NamedTool(type="custom", name="f")),
        ({"type": "mcp", "server_label": "s"}, NamedTool(type="mcp", server_label="s")),
        ({"type": "file_search"}, NamedTool(type="file_search")),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "f"}]},
            AllowedTools(tools=[NamedTool(type="function", name="f")], mode="required"),
        ),
    ],
)
def test_every_form_of_tool_choice_is_decoded(choice: Any, expected: Any):
    assert request(tool_choice=choice).tool_choice == expected


# -- Refused ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"model": None}, "model", "missing_required_parameter"),
        ({"model": ""}, "model", "missing_required_parameter"),
        ({"model": 1}, "model", "invalid_type"),
        ({"input": None}, "input", "missing_required_parameter"),
        ({"input": []}, "input", "empty_array"),
        ({"input": 1}, "input", "invalid_type"),
        ({"input": {"role": "user"}}, "input", "invalid_type"),
        ({"input": [1]}, "input[0]", "invalid_type"),
        (
            {"input": [{"role": "user", "content": "x"}, {"role": "user"}]},
            "input[1].content",
            "missing_required_parameter",
        ),
        ({"input": "x" * (INPUT_CHARS_MAX + 1)}, "input", "invalid_value"),
        ({"temperature": 2.1}, "temperature", "invalid_value"),
        ({"temperature": "1"}, "temperature", "invalid_type"),
        ({"top_p": -0.1}, "top_p", "invalid_value"),
        ({"frequency_penalty": 3}, "frequency_penalty", "invalid_value"),
        ({"presence_penalty": -3}, "presence_penalty", "invalid_value"),
        ({"top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"max_output_tokens": 15}, "max_output_tokens", "invalid_value"),
        ({"max_output_tokens": 16.5}, "max_output_tokens", "invalid_type"),
        ({"max_tool_calls": 0}, "max_tool_calls", "invalid_value"),
        ({"store": "yes"}, "store", "invalid_type"),
        ({"truncation": "some"}, "truncation", "invalid_value"),
        ({"service_tier": "best"}, "service_tier", "invalid_value"),
        ({"include": ["nope"]}, "include[0]", "invalid_value"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort", "invalid_value"),
        ({"text": {"verbosity": "some"}}, "text.verbosity", "invalid_value"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name", "missing_required_parameter"),
        (
            {"text": {"format": {"type": "json_schema", "name": "a b", "schema": {}}}},
            "text.format.name",
            "invalid_value",
        ),
        (
            {"text": {"format": {"type": "json_schema", "name": "a"}}},
            "text.format.schema",
            "missing_required_parameter",
        ),
        ({"metadata": {"k": 1}}, "metadata.k", "invalid_type"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k", "invalid_value"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata", "invalid_value"),
        ({"metadata": {"k": "\0"}}, "metadata", "invalid_value"),
        ({"stream_options": {}}, "stream_options", "invalid_value"),
        ({"tools": [function("f"), {"type": "function"}]}, "tools[1].name", "missing_required_parameter"),
        ({"tools": [function("a b")]}, "tools[0].name", "invalid_value"),
        ({"tools": [{"name": "f"}]}, "tools[0].type", "missing_required_parameter"),
        ({"tools": [{"type": "functoin"}]}, "tools[0].type", "invalid_value"),
        ({"tools": {}}, "tools", "invalid_type"),
        ({"tool_choice": "some"}, "tool_choice", "invalid_value"),
        ({"tool_choice": 1}, "tool_choice", "invalid_type"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.name", "missing_required_parameter"),
        ({"tool_choice": {"name": "f"}}, "tool_choice.type", "missing_required_parameter"),
        ({"tool_choice": {"type": "allowed_tools", "tools": []}}, "tool_choice.tools", "invalid_value"),
        ({"nope": 1}, "nope", "unknown_parameter"),
        ({"messages": []}, "messages", "unknown_parameter"),
    ],
)
def test_a_bad_parameter_is_refused_with_its_path(body: dict[str, Any], param: str, code: str):
    error = refused(**body)
    assert (error.param, error.code) == (param, code)
    assert error.status == 400 and error.message


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"background": True, "store": False}, "background"),
        ({"moderation": {"model": "x"}}, "moderation"),
        ({"multi_agent": {"enabled": True}}, "multi_agent"),
        ({"image": {"context_compression": "enabled"}}, "image.context_compression"),
        ({"access_programs": {"cyber": "daybreak_1"}}, "access_programs.cyber"),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
    ],
)
def test_what_this_server_does_not_offer_is_said_to_be_so(body: dict[str, Any], param: str):
    error = refused(**body)
    assert isinstance(error, UnsupportedParameter)
    assert (error.param, error.code) == (param, "unsupported_parameter")


@pytest.mark.parametrize(
    ("body", "begins", "ends"),
    [
        ({"truncation": LONG}, "Invalid value for 'truncation': 'xxx", "Supported values are: 'auto', 'disabled'."),
        ({LONG: 1}, "Unknown parameter: 'xxx", "xxx'."),
        ({"text": {LONG: 1}}, "Unknown parameter: 'text.xxx", "xxx'."),
        ({"tools": [{"type": LONG}]}, "Invalid value for 'tools[0].type': 'xxx", "'."),
        ({"input": [{"type": LONG}]}, "Items of type 'xxx", "xxx' are not supported by this server."),
        ({"input": [{"role": LONG, "content": "x"}]}, "Invalid value for 'input[0].role': 'xxx", "'user'."),
        ({"input": [{"role": "assistant", "content": "x", "phase": LONG}]}, "Invalid value for 'input[0].phase", "'."),
        ({"input": [{"role": "user", "content": "x", LONG: 1}]}, "Unknown parameter: 'input[0].xxx", "xxx'."),
    ],
    ids=range(8),
)
def test_a_refusal_quotes_only_so_much(body: dict[str, Any], begins: str, ends: str):
    error = refused(**body)
    assert error.message.startswith(begins) and error.message.endswith(ends)
    assert max(len(error.message), len(error.param or ""), len(str(error))) <= TEXT_CHARS_MAX


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"1", b"null", b'{"model": "\xff"}', b'{"model":"m"} x', b"\xef\xbb\xbf{}"]
)
def test_what_is_no_json_object_is_a_400(raw: bytes):
    with pytest.raises(InvalidRequest) as caught:
        decode_create(raw, ())
    assert caught.value.status == 400 and caught.value.message


# -- Half surrogates --------------------------------------------------------------------------------------------------------

ANY_TEXT = st.text(alphabet=st.characters() | st.sampled_from('\\ud8"/\ud83d\ude00\udfff\ud800n'))


@given(ANY_TEXT)
def test_escapes_of_half_a_pair_are_mended(text: str):
    """Python escapes lone surrogates as such; only those change, and the result always decodes."""
    mended = msgspec.json.decode(mend_surrogates(json.dumps(text).encode()), type=str)
    assert mended == text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]) | st.sampled_from('\\u"d8')), st.booleans())
def test_valid_text_is_left_untouched(text: str, ascii: bool):
    raw = json.dumps(text, ensure_ascii=ascii).encode()
    assert mend_surrogates(raw) == raw


@pytest.mark.parametrize(
    ("raw", "mended"),
    [
        (rb'"\ud83d"', rb'"\ufffd"'),
        (rb'"\uDE00"', rb'"\ufffd"'),
        (rb'"\ud83d\ude00"', rb'"\ud83d\ude00"'),
        (rb'"\ud83d\ud83d\ude00"', rb'"\ufffd\ud83d\ude00"'),
        (rb'"\ude00\ud83d"', rb'"\ufffd\ufffd"'),
        (rb'"\\ud83d"', rb'"\\ud83d"'),
        (rb'"\\\ud83d"', rb'"\\\ufffd"'),
        (rb'"\ud83dx"', rb'"\ufffdx"'),
        (rb'"\ud83d\n\ude00"', rb'"\ufffd\n\ufffd"'),
        (rb'"\ud7ff\ue000"', rb'"\ud7ff\ue000"'),
    ],
)
def test_only_halves_are_replaced(raw: bytes, mended: bytes):
    assert mend_surrogates(raw) == mended


def test_a_request_with_half_a_pair_is_taken():
    made = decode_create(rb'{"model":"m","input":"cut \ud83d"}', ())
    assert made.input == [Message(role="user", content=[InputText(text="cut �")])]


COUNTED = {
    "model", "input", "instructions", "previous_response_id", "conversation", "tools", "tool_choice", "text", "reasoning",
    "truncation", "parallel_tool_calls", "agent",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(set(Body.__struct_fields__) - COUNTED))
def test_a_count_takes_only_what_shapes_the_prompt(name: str):
    raw = json.dumps({"model": "m", "input": "hi", name: None}).encode()
    decode_create(raw, ())
    with pytest.raises(InvalidRequest) as caught:
        decode_count(raw, {name})
    assert (caught.value.code, caught.value.param) == ("unknown_parameter", name)


def test_a_count_is_decoded_as_the_create_that_it_counts():
    raw = json.dumps({"model": "m", "input": "hi", "instructions": "Be brief.", "top_k": 5}).encode()
    counted, created = decode_count(raw, PASSED_ON), decode_create(raw[:-1] + b', "store": false}', PASSED_ON)
    assert replace(counted, size=created.size) == created


def test_a_create_has_no_personality():
    assert refused(personality="friendly").code == "unknown_parameter"
