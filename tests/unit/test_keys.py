"""Keys of the wire: none that the official SDK can send is refused, and a misspelt one is refused with the right one."""

import types
import typing
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import msgspec
import pydantic
import pytest
from msgspec import Struct
from openai.types import responses as sdk
from openai.types.responses import response_create_params, response_input_param, tool_param
from typing_extensions import is_typeddict

from app.errors import InvalidRequest
from app.wire import hosted_tools, items, requests, tools
from app.wire.keys import suggestion, without_unknown
from tests.unit.build import request

SENT = (
    response_input_param.ResponseInputItemParam,
    tool_param.ToolParam,
    response_create_params.ResponseCreateParamsBase,
)
ANSWERED = (sdk.ResponseItem, sdk.ResponseOutputItem)
"""Clients send back what they were given."""


def _literals(hint: Any) -> list[str]:
    if typing.get_origin(hint) is typing.Literal:
        return [str(value) for value in get_args(hint)]
    return [tag for argument in get_args(hint) for tag in _literals(argument)]


def _keys_of(hint: Any) -> dict[str, Any]:
    if is_typeddict(hint):
        return get_type_hints(hint)
    if isinstance(hint, type) and issubclass(hint, pydantic.BaseModel):
        return {field.alias or name: field.annotation for name, field in hint.model_fields.items()}
    return {}


def _objects(hint: Any, seen: set[int]) -> Iterator[tuple[str, set[str]]]:
    """Every object that a type of the SDK reaches: its tag, or the name of its type, and its keys on the wire."""
    if id(hint) in seen or getattr(hint, "__name__", "").startswith("ToolChoice"):  # it shares its tags with tools
        return
    seen.add(id(hint))
    keys = _keys_of(hint)
    for tag in _literals(keys.get("type")) or ([hint.__name__] if keys else []):
        yield tag, set(keys)
    for inner in [*keys.values(), *get_args(hint)]:
        yield from _objects(inner, seen)


def _known_to_the_sdk() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    seen: set[int] = set()
    for hint in (*SENT, *ANSWERED):
        for tag, keys in _objects(hint, seen):
            found.setdefault(tag, set()).update(keys)
    return found


KNOWN = _known_to_the_sdk()
STRUCTS = {
    str(struct.__struct_config__.tag or struct.__name__): struct
    for module in (items, tools, requests)
    for struct in vars(module).values()
    if isinstance(struct, type) and issubclass(struct, Struct) and struct.__struct_config__.forbid_unknown_fields
}


@pytest.mark.parametrize("name", sorted(KNOWN.keys() & STRUCTS.keys()))
def test_every_key_that_the_sdk_knows_is_taken(name: str):
    assert KNOWN[name] - {"type"} <= set(STRUCTS[name].__struct_encode_fields__)


def test_the_comparison_sees_items_parts_tools_and_options():
    assert {
        "message",
        "input_text",
        "function_call_output",
        "mcp",
        "function",
        "StreamOptions",
    } <= KNOWN.keys() & STRUCTS.keys()


def _samples(hint: Any) -> list[Any]:
    """Values of a type of the SDK, so that each key, each member of a union and each null stands in one of them."""
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return [get_args(hint)[0]]
    if origin is dict:
        return [{}]
    if is_typeddict(hint) or (isinstance(hint, type) and issubclass(hint, pydantic.BaseModel)):
        values = {key: _samples(inner) for key, inner in _keys_of(hint).items()}
        longest = max(map(len, values.values()))
        return [{key: given[index % len(given)] for key, given in values.items()} for index in range(longest)]
    if hint in PLAIN:
        return [PLAIN[hint]]
    inner = [sample for argument in get_args(hint) for sample in _samples(argument)]
    return inner if origin in {None, typing.Union, types.UnionType, typing.Annotated} else [inner]


PLAIN = {str: "x", int: 1, float: 0.5, bool: True, object: {}, type(None): None}
UNOFFERED = ["additional_tools"]
"""Types of items that hold a tool which is refused."""


def _items() -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for sample in (sample for hint in (SENT[0], *ANSWERED) for sample in _samples(hint)):
        found.setdefault(sample.get("type") or "message", []).append(sample)
    for output in found["function_call_output"]:  # every tool has a name here, and every call an id
        output["call_id"] = "x"
    for output in found["tool_search_output"]:
        output["tools"] = [
            {**tool, "authorization": None} if tool["type"] == "mcp" else tool for tool in output["tools"]
        ]
    return {type_: samples for type_, samples in found.items() if type_ not in UNOFFERED}


ITEMS = _items()


@pytest.mark.parametrize("type_", sorted(ITEMS))
def test_whatever_the_sdk_can_send_or_hand_back_as_an_item_is_taken(type_: str):
    for fields in ITEMS[type_]:
        items.decode_item(msgspec.json.encode(fields), "input[0]")


MISSPELT = [
    ({"text": {"verbosty": "low"}}, "text.verbosty", "text.verbosity"),
    (
        {"text": {"format": {"type": "json_schema", "name": "a", "schema": {}, "strickt": True}}},
        "text.format.strickt",
        "text.format.strict",
    ),
    ({"reasoning": {"efort": "low"}}, "reasoning.efort", "reasoning.effort"),
    ({"stream": True, "stream_options": {"include_usage": True}}, "stream_options.include_usage", None),
    (
        {"tools": [{"type": "mcp", "server_label": "a", "allowed_tolls": ["x"]}]},
        "tools[0].allowed_tolls",
        "tools[0].allowed_tools",
    ),
    (
        {"tools": [{"type": "mcp", "server_label": "a", "require_approval": {"nevr": {}}}]},
        "tools[0].require_approval.nevr",
        "tools[0].require_approval.never",
    ),
    ({"tools": [{"type": "function", "name": "f", "paramters": {}}]}, "tools[0].paramters", "tools[0].parameters"),
    ({"tool_choice": {"type": "function", "nmae": "f"}}, "tool_choice.nmae", "tool_choice.name"),
    ({"input": [{"role": "user", "contnet": "x"}]}, "input[0].contnet", "input[0].content"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_text", "txt": "x"}]}]},
        "input[0].content[0].txt",
        "input[0].content[0].text",
    ),
    ({"prompt_cache_options": {"tttl": "1h"}}, "prompt_cache_options.tttl", "prompt_cache_options.ttl"),
    ({"temprature": 1}, "temprature", "temperature"),
    ({"reasoning_effort": "low"}, "reasoning_effort", "reasoning.effort"),
    ({"response_format": {"type": "json_object"}}, "response_format", "text.format"),
    ({"max_tokens": 20}, "max_tokens", "max_output_tokens"),
    ({"zzz": 20}, "zzz", None),
]


PART = {"type": "input_text", "text": "x"}
SAID = {"type": "output_text", "text": "x"}
MISSPELT_INSIDE = [
    ({"type": "computer_call", "action": {"type": "click", "buton": "left"}}, "action.buton", "button"),
    ({"type": "computer_call", "actions": [{"path": [{"z": 1}]}]}, "actions[0].path[0].z", None),
    ({"type": "computer_call_output", "output": {"image_ulr": "x"}}, "output.image_ulr", "image_url"),
    ({"type": "web_search_call", "action": {"type": "search", "qery": "x"}}, "action.qery", "query"),
    ({"type": "file_search_call", "results": [{"filname": "x"}]}, "results[0].filname", "filename"),
    ({"type": "code_interpreter_call", "outputs": [{"type": "logs", "log": "x"}]}, "outputs[0].log", "logs"),
    ({"type": "image_generation_call", "error": {"mesage": "x"}}, "error.mesage", "message"),
    ({"type": "shell_call", "action": {"comands": ["ls"]}}, "action.comands", "commands"),
    ({"type": "shell_call_output", "output": [{"outcome": {"exit": 1}}]}, "output[0].outcome.exit", None),
    ({"type": "local_shell_call", "action": {"comand": ["ls"]}}, "action.comand", "command"),
    ({"type": "apply_patch_call", "operation": {"pth": "x"}}, "operation.pth", "path"),
    ({"type": "apply_patch_call", "caller": {"callr_id": "x"}}, "caller.callr_id", "caller_id"),
    ({"type": "tool_search_call", "argumets": {}}, "argumets", "arguments"),
    (
        {"type": "tool_search_output", "tools": [{"type": "function", "name": "f", "parmeters": {}}]},
        "tools[0].parmeters",
        "parameters",
    ),
    (
        {"role": "user", "content": [{**PART, "prompt_cache_breakpoint": {"mod": "explicit"}}]},
        "content[0].prompt_cache_breakpoint.mod",
        "mode",
    ),
    (
        {"role": "assistant", "content": [SAID, {**SAID, "annotations": [{"type": "url_citation", "titel": "x"}]}]},
        "content[1].annotations[0].titel",
        "title",
    ),
    (
        {"role": "assistant", "content": [{**SAID, "logprobs": [{"token": "x"}, {"byts": []}]}]},
        "content[0].logprobs[1].byts",
        "bytes",
    ),
]
MISSPELT += [
    ({"input": [item]}, f"input[0].{path}", meant and f"input[0].{path.rpartition('.')[0]}.{meant}".replace("..", "."))
    for item, path, meant in MISSPELT_INSIDE
]


@pytest.mark.parametrize(("body", "path", "meant"), MISSPELT, ids=[path for _, path, _ in MISSPELT])
def test_a_misspelt_key_is_refused_with_its_path_and_the_right_one(body: dict[str, Any], path: str, meant: str | None):
    with pytest.raises(InvalidRequest) as caught:
        request(**body)
    hint = f" Did you mean '{meant}'?" if meant else ""
    assert (caught.value.param, caught.value.code) == (path, "unknown_parameter")
    assert caught.value.message == f"Unknown parameter: '{path}'.{hint}"


def test_keys_that_are_known_and_not_acted_on_are_echoed():
    given = {"type": "function", "name": "f", "defer_loading": False, "async": True, "allowed_callers": ["direct"]}
    shown = tools.encode_tools(request(tools=[given]).tools)
    assert msgspec.to_builtins(shown[0]).items() >= given.items()


class _Inner(Struct):
    amount: int = 0


class _Outer(Struct):
    inner: _Inner | str | None = None
    many: list[_Inner] = []
    by_name: dict[str, _Inner] = {}
    free: dict[str, Any] = {}


def test_unknown_keys_are_left_out_at_every_depth_and_free_objects_stay_whole():
    given = {
        "inner": {"amount": 1, "b": 2},
        "many": [{"b": 1}],
        "by_name": {"x": {"amount": 1, "b": 1}},
        "free": {"b": {"b": 1}},
        "b": 1,
    }
    assert without_unknown(given, _Outer) == {
        "inner": {"amount": 1},
        "many": [{}],
        "by_name": {"x": {"amount": 1}},
        "free": {"b": {"b": 1}},
    }


@pytest.mark.parametrize(
    ("path", "name", "meant"), [("", "mnay", "many"), (".inner", "amonut", "amount"), (".free", "x", None)]
)
def test_a_suggestion_comes_from_the_object_that_the_path_leads_to(path: str, name: str, meant: str | None):
    assert suggestion(_Outer, path, name) == meant


DECLARED = [
    ({"type": "web_search", "serch_context_size": "low"}, "tools[0].serch_context_size", "unknown_parameter"),
    ({"type": "web_search", "search_context_size": "huge"}, "tools[0].search_context_size", "invalid_value"),
    ({"type": "web_search", "filters": {"allowed": []}}, "tools[0].filters.allowed", "unknown_parameter"),
    ({"type": "file_search"}, "tools[0].vector_store_ids", "missing_required_parameter"),
    (
        {"type": "file_search", "vector_store_ids": ["a"], "max_num_results": 51},
        "tools[0].max_num_results",
        "invalid_value",
    ),
    ({"type": "code_interpreter", "container": 7}, "tools[0].container", "invalid_type"),
    ({"type": "image_generation", "partial_images": 4}, "tools[0].partial_images", "invalid_value"),
    ({"type": "shell", "environment": {"type": "moon"}}, "tools[0].environment.type", "invalid_value"),
]


@pytest.mark.parametrize(("tool", "param", "code"), DECLARED, ids=[param for _, param, _ in DECLARED])
def test_declarations_of_hosted_tools_are_checked(tool: dict[str, Any], param: str, code: str):
    with pytest.raises(InvalidRequest) as caught:
        request(tools=[tool])
    assert (caught.value.param, caught.value.code) == (param, code)


def test_every_key_that_the_sdk_knows_of_a_hosted_tool_is_taken():
    for type_ in hosted_tools.HOSTED:
        known = {key.rstrip("_") for key in KNOWN[type_]}
        assert known <= set(hosted_tools.DECLARATIONS[type_].__struct_encode_fields__), type_


ODD = [
    ({"reasoning": {"context": "some"}}, "reasoning.context"),
    ({"prompt_cache_options": {"ttl": "1h"}}, "prompt_cache_options.ttl"),
    ({"image": {"context_compression": "much"}}, "image.context_compression"),
    ({"input": [{"type": "function_call", "call_id": "", "name": "f", "arguments": "{}"}]}, "input[0].call_id"),
    ({"input": [{"type": "function_call_output", "call_id": "x" * 65, "output": ""}]}, "input[0].call_id"),
]


@pytest.mark.parametrize(("body", "param"), ODD, ids=[param for _, param in ODD])
def test_values_that_the_api_does_not_have_are_refused(body: dict[str, Any], param: str):
    with pytest.raises(InvalidRequest) as caught:
        request(**body)
    assert (caught.value.param, caught.value.code) == (param, "invalid_value")


BESIDE = [
    ({"include": ["web_search_call.result"]}, "include[0]", "'web_search_call.results'"),
    ({"text": {"format": {"type": "json_shema"}}}, "text.format.type", "'json_schema'"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type", None),
    ({"reasoning": {"effort": "hihg"}}, "reasoning.effort", "'high'"),
    ({"tools": [{"type": "functon"}]}, "tools[0].type", "'function'"),
    ({"tools": [{"type": "web_serch"}]}, "tools[0].type", "'web_search'"),
    ({"tool_choice": "requird"}, "tool_choice", "'required'"),
    ({"tool_choice": {"type": "functon", "name": "f"}}, "tool_choice.type", "'function'"),
    (
        {"tool_choice": {"type": "allowed_tools", "tools": [{"type": "custm"}]}},
        "tool_choice.tools[0].type",
        "'custom'",
    ),
    ({"input": [{"role": "asistant", "content": "x"}]}, "input[0].role", "'assistant'"),
    ({"input": [{"role": "user", "content": [{"type": "input_txt"}]}]}, "input[0].content[0].type", "'input_text'"),
    ({"input": [{"role": "assistant", "content": "x", "phase": "comentary"}]}, "input[0].phase", "'commentary'"),
]


@pytest.mark.parametrize(("body", "param", "meant"), BESIDE, ids=[param for _, param, _ in BESIDE])
def test_a_value_beside_those_that_may_stand_is_refused_with_them_and_the_nearest(
    body: dict[str, Any], param: str, meant: str | None
):
    with pytest.raises(InvalidRequest) as caught:
        request(**body)
    message = caught.value.message
    assert (caught.value.param, caught.value.code) == (param, "invalid_value")
    assert message.startswith(f"Invalid value for '{param}': '") and ". Supported values are: '" in message
    assert message.partition(" Did you mean ")[2] == (f"{meant}?" if meant else "")


def test_an_item_of_an_unknown_type_is_refused_with_the_nearest_one():
    with pytest.raises(InvalidRequest, match=r"'mesage' are not supported .* Did you mean 'message'\?$"):
        request(input=[{"type": "mesage", "role": "user", "content": "x"}])


@pytest.mark.parametrize(
    "type_", ["function-call", "shell_calls", "input_text", "function", "web_search", "a b", "x" * 65, ""]
)
def test_an_item_whose_type_is_a_mistake_is_refused(type_: str):
    with pytest.raises(InvalidRequest) as caught:
        request(input=[{"type": type_, "text": "x"}])
    assert caught.value.param == "input[0].type"


@pytest.mark.parametrize("type_", ["dream_call", "program", "configuration_update", "com.example.note"])
def test_an_item_of_an_unknown_type_is_kept_as_it_came(type_: str):
    fields = {"type": type_, "id": "x_1", "call_id": 7, "status": None, "more": [{"a": None}]}
    [kept] = request(input=[fields]).input
    assert (items.encode_item(kept), items.is_unknown(kept)) == (msgspec.json.encode(fields), True)
