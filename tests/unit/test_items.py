"""Items on the wire: what is taken, what is kept as it came, what is refused and with which path."""

import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from app.errors import InvalidParameter, InvalidRequest, UnsupportedParameter
from app.wire.carried import CARRIED
from app.wire.items import (
    AdditionalTools,
    FunctionCall,
    InputText,
    ItemReference,
    Message,
    OpaqueItem,
    Reasoning,
    decode_item,
    decode_stored_item,
    encode_item,
    type_of,
    with_id,
)
from app.wire.tools import FunctionTool
from tests.unit.build import item, plain_item

TEXT = {"type": "input_text", "text": "x"}


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "message", "id": "msg_1", "role": "user", "content": [TEXT]},
        {"type": "message", "id": "msg_1", "role": "user", "content": "x", "status": "completed"},
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "x", "annotations": [{"type": "file_path", "index": 1}]}],
            "status": "incomplete",
            "phase": "commentary",
        },
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "x", "annotations": [], "logprobs": [{"token": "x"}]}],
        },
        {"type": "message", "id": "msg_1", "role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {
            "type": "message",
            "id": "msg_1",
            "role": "user",
            "content": [
                {"type": "input_image", "image_url": "data:x", "detail": "original"},
                {"type": "input_file", "file_data": "data:x", "filename": "a.pdf"},
                {"type": "input_audio", "input_audio": {"data": "x", "format": "mp3"}},
            ],
        },
        {"type": "function_call", "id": "fc_1", "call_id": "c", "name": "f", "arguments": "{}", "namespace": "n"},
        {"type": "function_call_output", "id": "fco_1", "call_id": "c", "output": "x"},
        {"type": "function_call_output", "id": "fco_1", "call_id": "c", "output": [TEXT]},
        {"type": "custom_tool_call", "id": "ctc_1", "call_id": "c", "name": "f", "input": "x"},
        {"type": "custom_tool_call_output", "id": "ctco_1", "call_id": "c", "output": "x"},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [{"type": "summary_text", "text": "x"}],
            "content": [{"type": "reasoning_text", "text": "x"}],
            "encrypted_content": "x",
        },
        {
            "type": "mcp_call",
            "id": "mcp_1",
            "server_label": "s",
            "name": "f",
            "arguments": "{}",
            "output": None,
            "error": {"type": "mcp_tool_execution_error", "content": [{"type": "text", "text": "x"}]},
            "approval_request_id": None,
            "status": "failed",
        },
        {"type": "mcp_list_tools", "id": "mcpl_1", "server_label": "s", "tools": [{"name": "f", "input_schema": {}}]},
        {"type": "mcp_approval_request", "id": "mcpr_1", "server_label": "s", "name": "f", "arguments": "{}"},
        {"type": "mcp_approval_response", "id": "mcpa_1", "approval_request_id": "mcpr_1", "approve": True},
        {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "search", "query": "x"}},
        {"type": "file_search_call", "id": "fs_1", "status": "completed", "queries": ["x"], "results": None},
        {
            "type": "code_interpreter_call",
            "id": "ci_1",
            "status": "completed",
            "code": "1",
            "container_id": "c",
            "outputs": [],
        },
        {"type": "image_generation_call", "id": "ig_1", "status": "completed", "result": "aGk="},
        {"type": "shell_call_output", "id": "sh_1", "call_id": "c", "output": [{"stdout": "x"}]},
    ],
)
def test_an_item_comes_back_as_it_was_sent(fields: dict[str, Any]):
    assert plain_item(item(fields)) == fields
    assert type_of(item(fields)) == fields["type"]


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"role": "user", "content": "x"}, Message),
        ({"id": "msg_1", "role": "assistant", "content": []}, Message),
        ({"type": None, "role": "user", "content": "x"}, Message),
        ({"id": "msg_1"}, ItemReference),
        ({"type": None, "id": "msg_1"}, ItemReference),
        ({"type": "item_reference", "id": "msg_1"}, ItemReference),
        ({"type": "function_call", "call_id": "c", "name": "f", "arguments": ""}, FunctionCall),
        ({"type": "reasoning", "content": None, "encrypted_content": None, "status": None}, Reasoning),
        ({"type": "additional_tools", "role": "developer", "tools": []}, AdditionalTools),
        ({"type": "shell_call"}, OpaqueItem),
    ],
)
def test_the_kind_of_an_item_is_seen_with_and_without_a_type(fields: dict[str, Any], kind: type):
    assert isinstance(item(fields), kind)


@pytest.mark.parametrize("type", sorted(CARRIED))
def test_what_stands_at_the_keys_of_items_of_hosted_tools_is_carried_unread(type: str):
    fields = {"type": type, "id": "x_1", "caller": None, "created_by": [1, {"a": None}]}
    assert plain_item(item(fields)) == fields


def test_a_key_that_no_item_has_is_refused_with_its_path_and_the_nearest_one():
    with pytest.raises(InvalidRequest) as caught:
        item({"role": "user", "contents": "x", "content": [{"type": "input_image", "image_ulr": "x"}]})
    assert (caught.value.param, caught.value.code) == ("input[0].contents", "unknown_parameter")
    with pytest.raises(InvalidRequest, match=r"Did you mean 'input\[0\]\.content\[0\]\.image_url'\?"):
        item({"role": "user", "content": [{"type": "input_image", "image_ulr": "x"}]})


def test_a_stored_item_of_a_newer_version_is_read_without_what_is_unknown_here():
    stored = {"type": "message", "id": "msg_1", "role": "user", "shade": {"a": 1}}
    part = {"type": "input_text", "text": "x", "weight": 3}
    assert decode_stored_item(msgspec.json.encode({**stored, "content": [part]})) == Message(
        id="msg_1", role="user", content=[InputText(text="x")]
    )
    newer = {"type": "thought_transfer", "id": "tt_1", "payload": [1]}
    assert decode_stored_item(msgspec.json.encode(newer)) == OpaqueItem("tt_1", "thought_transfer", newer)


def took(decode: Callable[[bytes], object], type_: str) -> float:
    """The CPU time of decoding items of many types, or of one."""
    bodies = [msgspec.json.encode({"type": type_.format(n), "id": "x_1", "call_id": "c"}) for n in range(300)]
    begun = time.thread_time()
    for body in bodies:
        decode(body)
    return time.thread_time() - begun


def test_an_unknown_type_is_compared_with_the_known_ones_once_and_when_it_comes_only():
    known = took(decode_stored_item, "computer_call")
    assert took(decode_stored_item, "dream_{}") < 5 * known
    assert took(lambda body: decode_item(body, "input[0]"), "dream") < 5 * known


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"role": "user"}, "input[0].content", "missing_required_parameter"),
        ({"content": "x"}, "input[0].role", "missing_required_parameter"),
        ({}, "input[0].role", "missing_required_parameter"),
        ({"role": "robot", "content": "x"}, "input[0].role", "invalid_value"),
        ({"role": "user", "content": 1}, "input[0].content", "invalid_type"),
        ({"role": "user", "content": [TEXT, {"type": "nope"}]}, "input[0].content[1]", "invalid_value"),
        ({"role": "user", "content": [{"text": "x"}]}, "input[0].content[0].type", "missing_required_parameter"),
        ({"role": "user", "content": [{**TEXT, "text": None}]}, "input[0].content[0].text", "invalid_type"),
        ({"type": "function_call", "call_id": "c", "name": "f"}, "input[0].arguments", "missing_required_parameter"),
        (
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": {}},
            "input[0].arguments",
            "invalid_type",
        ),
        ({"type": "function_call_output", "output": "x"}, "input[0].call_id", "missing_required_parameter"),
        ({"type": "function_call_output", "call_id": "c"}, "input[0].output", "missing_required_parameter"),
        ({"type": "item_reference", "id": 1}, "input[0].id", "invalid_type"),
        ({"type": "mesage"}, "input[0].type", "unsupported_parameter"),
        ({"type": 1}, "input[0].type", "invalid_type"),
        (
            {"type": "additional_tools", "tools": [{"type": "function"}]},
            "input[0].tools[0].name",
            "missing_required_parameter",
        ),
    ],
)
def test_a_bad_item_is_refused_with_its_path(fields: dict[str, Any], param: str, code: str):
    with pytest.raises(InvalidRequest) as caught:
        item(fields)
    found = caught.value.param or ""
    assert (found.partition(".type")[0] if param == "input[0].content[1]" else found, caught.value.code) == (
        param,
        code,
    )


@pytest.mark.parametrize("raw", [b"1", b'"x"', b"[]", b"null"])
def test_what_is_no_object_is_no_item(raw: bytes):
    with pytest.raises(InvalidParameter) as caught:
        decode_item(raw, "input[3]")
    assert (caught.value.param, caught.value.code) == ("input[3]", "invalid_type")


@pytest.mark.parametrize(("name", "secret"), [("authorization", "sk"), ("headers", {"x-key": "sk"})])
def test_a_secret_of_a_tool_server_is_not_stored_in_an_item(name: str, secret: Any):
    server = {"type": "mcp", "server_label": "s", "server_url": "https://x/mcp", name: None}
    item({"type": "tool_search_output", "tools": [server]})
    with pytest.raises(UnsupportedParameter) as caught:
        item({"type": "tool_search_output", "tools": [{**server, name: secret}]})
    assert caught.value.param == f"input[0].tools[0].{name}"


def test_tools_of_an_item_are_decoded():
    given = {"type": "additional_tools", "role": "developer", "tools": [{"type": "function", "name": "f"}]}
    made = item(given)
    assert isinstance(made, AdditionalTools) and made.tools == [FunctionTool("f")]


@pytest.mark.parametrize(
    "fields",
    [
        {"role": "user", "content": "x"},
        {"type": "mcp_call", "server_label": "s", "name": "x", "arguments": "{}"},
        {"type": "shell_call", "id": None},
        {"type": "function_call_output", "id": None, "call_id": "c", "output": "x"},
    ],
)
def test_an_item_gets_an_id(fields: dict[str, Any]):
    named = with_id(item(fields), "x_1")
    assert named.id == "x_1"
    assert msgspec.json.decode(encode_item(named))["id"] == "x_1"
