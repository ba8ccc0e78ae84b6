"""What is wrong with a request is said before any work: a status, a code, the parameter's path, a message."""

import json
import re
from collections.abc import Callable, Iterator, Mapping

import httpx
import msgspec
import openai
import pytest

from app.wire.decoding import NESTING_MAX
from tests.routes import handlers
from tests.servers import Served

USER = {"role": "user", "content": "x"}
TOOL = {"type": "function", "name": "a"}


def part(given: object) -> dict:
    """An input whose second item's first part is this."""
    return {"input": [USER, {"role": "user", "content": [given]}]}


class Made(msgspec.Struct):
    """The id of a reply that no ordinary JSON reader can read."""

    id: str


def refusal_of(reply: httpx.Response) -> dict:
    """The four keys of an error, on a reply that has all that every reply has."""
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-request-id"].startswith("req_")
    assert list(reply.json()) == ["error"]
    refused = reply.json()["error"]
    assert list(refused) == ["message", "type", "param", "code"]
    return refused


# -- The body of create -----------------------------------------------------------------------------------------------------

MISSING = "missing_required_parameter"
TYPE = "invalid_type"
VALUE = "invalid_value"
UNSUPPORTED = "unsupported_parameter"
UNKNOWN = "unknown_parameter"

BAD = [
    # model and input
    ({"model": None}, MISSING, "model", "Missing required parameter: 'model'."),
    ({"model": ""}, MISSING, "model", "Missing required parameter: 'model'."),
    ({"model": 7}, TYPE, "model", "expected a string or null, got an integer instead"),
    ({"model": "a\0b"}, VALUE, "model", "NUL"),
    ({"model": "m" * 513}, VALUE, "model", "at most 512 characters"),
    ({"input": None}, MISSING, "input", "Missing required parameter: 'input'."),
    ({"input": []}, "empty_array", "input", "no items"),
    ({"input": 7}, TYPE, "input", "expected a string or an array or null, got an integer instead"),
    ({"input": {"role": "user"}}, TYPE, "input", "got an object instead"),
    ({"input": "x" * 10_485_761}, VALUE, "input", "longer than 10485760 characters"),
    # items
    ({"input": ["x"]}, TYPE, "input[0]", "expected an object, got a string instead"),
    ({"input": [USER, None]}, TYPE, "input[1]", "expected an object, got null instead"),
    ({"input": [{}]}, MISSING, "input[0].role", ""),
    ({"input": [{"content": "x"}]}, MISSING, "input[0].role", ""),
    ({"input": [{"role": "user"}]}, MISSING, "input[0].content", ""),
    ({"input": [{"role": "king", "content": "x"}]}, VALUE, "input[0].role", "'king'"),
    ({"input": [{"role": "user", "content": 7}]}, TYPE, "input[0].content", "expected a string or an array"),
    ({"input": [{**USER, "status": "great"}]}, VALUE, "input[0].status", "'great'"),
    ({"input": [{**USER, "id": 7}]}, TYPE, "input[0].id", "expected a string"),
    ({"input": [{**USER, "id": "msg_\0"}]}, VALUE, "input[0].id", "NUL"),
    ({"input": [{**USER, "id": "m" * 513}]}, VALUE, "input[0].id", "at most 512 characters"),
    ({"input": [{**USER, "id": "msg/1"}]}, VALUE, "input[0].id", "may not contain '/'"),
    ({"input": [{**USER, "id": ".."}]}, VALUE, "input[0].id", "a part of URLs"),
    ({"input": [{**USER, "id": "a"}, {**USER, "id": "a"}]}, None, "input", "Duplicate item found with id a."),
    ({"input": [{"type": 7}]}, TYPE, "input[0].type", "expected a string"),
    ({"input": [{"type": []}]}, TYPE, "input[0].type", "expected a string"),
    ({"input": [USER, {"type": {}, "id": "x"}]}, TYPE, "input[1].type", "expected a string"),
    ({"input": [{"type": "mesage"}]}, UNSUPPORTED, "input[0].type", "Did you mean 'message'?"),
    ({"input": [{"type": "compaction"}]}, MISSING, "input[0].encrypted_content", ""),
    ({"input": [USER, {"type": "compaction", "encrypted_content": 7}]}, TYPE, "input[1].encrypted_content", "a string"),
    (
        {"input": [USER, {"type": "compaction", "encrypted_content": "forged"}]},
        "invalid_encrypted_content",
        "input[1].encrypted_content",
        "could not be verified",
    ),
    ({"context_management": {}}, TYPE, "context_management", "expected an array or null"),
    ({"context_management": [{"type": "editing"}]}, VALUE, "context_management[0].type", "'editing'"),
    (
        {"context_management": [{"type": "compaction", "compact_threshold": 999}]},
        VALUE,
        "context_management[0].compact_threshold",
        "1000",
    ),
    ({"context_management": [{"type": "compaction", "treshold": 1}]}, UNKNOWN, "context_management[0].treshold", ""),
    ({"context_management": [{}]}, MISSING, "context_management[0].type", ""),
    ({"input": [{"type": "compaction_trigger"}, USER]}, VALUE, "input[0]", "must be the last item"),
    ({"input": [{"type": "compaction_trigger"}]}, None, "input", "nothing to compact"),
    ({"input": [{"type": "input_text", "text": "x"}]}, UNSUPPORTED, "input[0].type", "'input_text'"),
    ({"input": [{"type": "item_reference"}]}, MISSING, "input[0].id", ""),
    ({"input": [{"type": "item_reference", "id": None}]}, MISSING, "input[0].id", ""),
    ({"input": [{"id": "msg_x"}]}, None, "input", "Item with id 'msg_x' not found."),
    ({"input": [{"type": "mcp_call", "id": 7}]}, TYPE, "input[0].id", "expected a string"),
    ({"input": [{"type": "reasoning", "summary": "x"}]}, TYPE, "input[0].summary", "expected an array"),
    (
        {"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]},
        MISSING,
        "input[0].call_id",
        "Missing required parameter: 'input[0].call_id'.",
    ),
    (
        {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": {}}]},
        TYPE,
        "input[0].arguments",
        "expected a string, got an object instead",
    ),
    ({"input": [{"type": "function_call_output", "output": "x"}]}, MISSING, "input[0].call_id", ""),
    (
        {"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]},
        None,
        "input",
        "No tool call found for function call output with call_id c.",
    ),
    (
        {"input": [USER, {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}]},
        None,
        "input",
        "No tool output found for function call c.",
    ),
    (
        {"input": [{"type": "custom_tool_call", "call_id": "c", "name": "f", "input": "x"}]},
        None,
        "input",
        "No tool output found for custom tool call c.",
    ),
    (
        {"input": [{"type": "function_call", "call_id": "c", "name": "", "arguments": ""}]},
        VALUE,
        "input[0].name",
        "empty",
    ),
    # parts
    (part({"type": "input_text", "text": 7}), TYPE, "input[1].content[0].text", "got an integer instead"),
    (part({"type": "input_text"}), MISSING, "input[1].content[0].text", ""),
    (part({"text": "x"}), MISSING, "input[1].content[0].type", ""),
    (part({"type": "video"}), VALUE, "input[1].content[0].type", "'video'"),
    (part("x"), TYPE, "input[1].content[0]", "expected an object, got a string instead"),
    (
        part({"type": "input_image", "image_url": {"url": "x"}}),
        TYPE,
        "input[1].content[0].image_url",
        "got an object instead",
    ),
    (part({"type": "input_image", "image_url": "x", "detail": "fine"}), VALUE, "input[1].content[0].detail", "'fine'"),
    # numbers and words
    ({"temperature": "hot"}, TYPE, "temperature", "expected a number or null, got a string instead"),
    ({"temperature": True}, TYPE, "temperature", "got a boolean instead"),
    ({"temperature": 2.1}, VALUE, "temperature", "2.0"),
    ({"temperature": -0.1}, VALUE, "temperature", "0.0"),
    ({"top_p": 1.1}, VALUE, "top_p", "1.0"),
    ({"top_logprobs": 21}, VALUE, "top_logprobs", "20"),
    ({"top_logprobs": 1.5}, TYPE, "top_logprobs", "expected an integer or null"),
    ({"max_output_tokens": 15}, VALUE, "max_output_tokens", "16"),
    ({"max_tool_calls": 0}, VALUE, "max_tool_calls", "1"),
    ({"frequency_penalty": 2.1}, VALUE, "frequency_penalty", "2.0"),
    ({"presence_penalty": -2.1}, VALUE, "presence_penalty", "-2.0"),
    ({"stream": "yes"}, TYPE, "stream", "expected a boolean or null"),
    ({"store": 1}, TYPE, "store", "expected a boolean or null"),
    ({"background": "yes"}, TYPE, "background", "expected a boolean or null"),
    ({"parallel_tool_calls": "yes"}, TYPE, "parallel_tool_calls", "expected a boolean or null"),
    ({"truncation": "some"}, VALUE, "truncation", "'some'"),
    ({"service_tier": "best"}, VALUE, "service_tier", "'best'"),
    ({"instructions": ["x"]}, TYPE, "instructions", "expected a string or null"),
    ({"include": "message.output_text.logprobs"}, TYPE, "include", "expected an array or null"),
    ({"include": ["everything"]}, VALUE, "include[0]", "Supported values are: 'code_interpreter_call.outputs',"),
    ({"safety_identifier": "x" * 129}, VALUE, "safety_identifier", "128"),
    ({"prompt_cache_options": {"mode": "x"}}, VALUE, "prompt_cache_options.mode", "'x'"),
    ({"reasoning": "low"}, TYPE, "reasoning", "expected an object or null"),
    ({"reasoning": {"effort": "huge"}}, VALUE, "reasoning.effort", "'huge'"),
    ({"reasoning": {"summary": "long"}}, VALUE, "reasoning.summary", "'long'"),
    (
        {"stream": True, "stream_options": {"include_obfuscation": "x"}},
        TYPE,
        "stream_options.include_obfuscation",
        "expected a boolean or null",
    ),
    # metadata
    ({"metadata": []}, TYPE, "metadata", "expected an object or null"),
    ({"metadata": {"a": 1}}, TYPE, "metadata.a", "expected a string, got an integer instead"),
    ({"metadata": {"a": "x" * 513}}, VALUE, "metadata.a", "512"),
    ({"metadata": {"a" * 65: "x"}}, VALUE, "metadata", "64"),
    ({"metadata": {str(number): "x" for number in range(17)}}, VALUE, "metadata", "16"),
    ({"metadata": {"a": "\0"}}, VALUE, "metadata", "NUL"),
    ({"metadata": {"\0": "a"}}, VALUE, "metadata", "NUL"),
    # text.format
    ({"text": "json"}, TYPE, "text", "expected an object or null"),
    ({"text": {"verbosity": "loud"}}, VALUE, "text.verbosity", "'loud'"),
    ({"text": {"format": "json"}}, TYPE, "text.format", "expected an object or null"),
    ({"text": {"format": {}}}, MISSING, "text.format.type", ""),
    ({"text": {"format": {"type": "xml"}}}, VALUE, "text.format.type", "'xml'"),
    ({"text": {"format": {"type": "json_schema", "schema": {}}}}, MISSING, "text.format.name", ""),
    ({"text": {"format": {"type": "json_schema", "name": "a"}}}, MISSING, "text.format.schema", ""),
    ({"text": {"format": {"type": "json_schema", "name": "a b", "schema": {}}}}, VALUE, "text.format.name", "a-zA-Z"),
    ({"text": {"format": {"type": "json_schema", "name": "a", "schema": []}}}, TYPE, "text.format.schema", ""),
    # tools
    ({"tools": {}}, TYPE, "tools", "expected an array or null"),
    ({"tools": [TOOL, 7]}, TYPE, "tools[1]", "expected an object"),
    ({"tools": [{}]}, MISSING, "tools[0].type", ""),
    ({"tools": [{"type": 7}]}, TYPE, "tools[0].type", "expected a string"),
    ({"tools": [{"type": "functoin"}]}, VALUE, "tools[0].type", "Supported values are: 'function', 'custom'"),
    ({"tools": [{"type": "function"}]}, MISSING, "tools[0].name", ""),
    ({"tools": [{"type": "function", "function": {"name": "a"}}]}, MISSING, "tools[0].name", ""),
    ({"tools": [{"type": "function", "name": "a b"}]}, VALUE, "tools[0].name", "a-zA-Z"),
    ({"tools": [{"type": "function", "name": ""}]}, VALUE, "tools[0].name", "1"),
    ({"tools": [{"type": "function", "name": "a" * 129}]}, VALUE, "tools[0].name", "128"),
    ({"tools": [{**TOOL, "parameters": "x"}]}, TYPE, "tools[0].parameters", "expected an object or null"),
    (
        {"tools": [{"type": "custom", "name": "a", "format": {"type": "grammar", "syntax": "bnf", "definition": "x"}}]},
        VALUE,
        "tools[0].format.syntax",
        "'bnf'",
    ),
    (
        {"tools": [{"type": "namespace", "name": "n", "tools": [TOOL, {"type": "function"}]}]},
        MISSING,
        "tools[0].tools[1].name",
        "",
    ),
    (
        {"input": [USER, {"type": "additional_tools", "tools": [TOOL, {"type": "functoin"}]}]},
        VALUE,
        "input[1].tools[1].type",
        "'functoin'",
    ),
    # tool_choice
    ({"tool_choice": "maybe"}, VALUE, "tool_choice", "'maybe'"),
    ({"tool_choice": 7}, TYPE, "tool_choice", "got an integer instead"),
    ({"tool_choice": {}}, MISSING, "tool_choice.type", ""),
    ({"tool_choice": {"type": "functon"}}, VALUE, "tool_choice.type", "Did you mean 'function'?"),
    ({"tool_choice": {"type": "function"}}, MISSING, "tool_choice.name", ""),
    ({"tool_choice": {"type": "allowed_tools"}}, MISSING, "tool_choice.tools", ""),
    ({"tool_choice": {"type": "allowed_tools", "tools": []}}, VALUE, "tool_choice.tools", "1"),
    (
        {"tool_choice": {"type": "allowed_tools", "mode": "none", "tools": [TOOL]}},
        VALUE,
        "tool_choice.mode",
        "'none'",
    ),
    # ids
    ({"previous_response_id": 7}, TYPE, "previous_response_id", "expected a string or null"),
    ({"previous_response_id": ""}, "previous_response_not_found", "previous_response_id", "not found"),
    (
        {"previous_response_id": "resp_x"},
        "previous_response_not_found",
        "previous_response_id",
        "Previous response with id 'resp_x' not found.",
    ),
    ({"previous_response_id": "resp_\0"}, "previous_response_not_found", "previous_response_id", "not found"),
    ({"previous_response_id": "x" * 9_999}, "previous_response_not_found", "previous_response_id", "not found"),
    # what the API does not know
    ({"system": "x"}, UNKNOWN, "system", "Unknown parameter: 'system'."),
    ({"messages": []}, UNKNOWN, "messages", "Unknown parameter: 'messages'."),
    ({"max_tokens": 5}, UNKNOWN, "max_tokens", "Unknown parameter: 'max_tokens'."),
]


def _named(given: object) -> str | None:
    return json.dumps(given)[:60] if isinstance(given, dict) else ""


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("given", "code", "param", "message"), BAD, ids=_named)
def test_what_is_wrong_in_a_body_is_named(http, given, code, param, message, stream):
    reply = http.post("/responses", json={"model": "m", "input": "x", "stream": stream, **given})
    refused = refusal_of(reply)
    assert message in refused.pop("message")
    assert (reply.status_code, refused) == (400, {"type": "invalid_request_error", "param": param, "code": code})


def test_stream_options_without_a_stream_are_refused(http):
    reply = http.post("/responses", json={"model": "m", "input": "x", "stream_options": {"include_obfuscation": False}})
    assert refusal_of(reply) == {
        "message": "'stream_options' is only allowed when 'stream' is true.",
        "type": "invalid_request_error",
        "param": "stream_options",
        "code": VALUE,
    }


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "it is empty"),
        (b"{", "truncated"),
        (b"[]", "expected an object, got an array instead"),
        (b"7", "expected an object, got an integer instead"),
        (b"null", "expected an object, got null instead"),
        (b"\xff\xfe", "We could not parse the JSON body of your request"),
        (b'{"model": "m", "input": "\xff"}', "We could not parse the JSON body of your request"),
        (b'{"model": "m", "input": "x"} {}', "We could not parse the JSON body of your request"),
        (b'{"model": "m", "input": "x", "temperature": NaN}', "We could not parse the JSON body of your request"),
        (b'{"model": "m", "input": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"model": "m", "input": "x", "client_metadata": {"a": "\xff"}}', "could not parse the JSON body"),
        (
            (
                b'{"model": "m", "input": [{"role": "assistant", "content": [{"type": "output_text", "text": "x",'
                b' "annotations": ["\xed\xa0\x80"]}]}]}'
            ),
            "could not parse the JSON body",
        ),
        (b'{"model": "m", "input": "x", "tools": [{"type": "function", "name": "f", "parameters": {"a": 1e400}}]}', ""),
        (b'{"model": "m", "input": "x", "temperature": ' + b"9" * 5_000 + b"}", ""),
    ],
    ids=lambda given: repr(given)[:40],
)
def test_what_is_no_json_object_is_refused(http, body, message):
    reply = http.post("/responses", content=body, headers={"content-type": "application/json"})
    assert (reply.status_code, refusal_of(reply)["type"]) == (400, "invalid_request_error")
    assert message in reply.json()["error"]["message"]


@pytest.mark.parametrize("depth", [100, 130, 900, 5_000])
def test_json_of_any_depth_is_taken_whole_or_refused(http, said, depth):
    """What is taken can also be stored and sent, on every version of Python."""
    parameters = b'{"a":' * depth + b"{}" + b"}" * depth
    tools = b'[{"type":"function","name":"f","parameters":%b}]' % parameters
    reply = http.post("/responses", content=b'{"model":"m","input":%b,"tools":%b}' % (json.dumps(said).encode(), tools))
    if depth > NESTING_MAX:
        assert reply.status_code == 400
        assert refusal_of(reply)["message"].startswith(
            "The JSON body of your request is nested too deeply: at most 128"
        )
        return
    assert reply.status_code == 200
    assert parameters in reply.content
    id = msgspec.json.decode(reply.content, type=Made).id
    assert http.get(f"/responses/{id}").content == reply.content


@pytest.mark.parametrize("depth", [1_000, 100_000])
def test_arguments_of_any_depth_are_text(http, said, heard, depth):
    """What the model is shown in their place is an object, as upstreams demand."""
    arguments = '{"a":' * depth + "1" + "}" * depth
    items = [
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": arguments},
        {"type": "function_call_output", "call_id": "c", "output": "x"},
        {"role": "user", "content": said},
    ]
    reply = http.post("/responses", json={"model": "m", "input": items})
    assert reply.status_code == 200
    [call] = heard()["messages"][0]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"not_json": arguments}
    listed = http.get(f"/responses/{reply.json()['id']}/input_items", params={"order": "asc"}).json()
    assert listed["data"][0]["arguments"] == arguments


def test_an_error_without_its_fields_is_shown_by_its_type(http, said, heard):
    failed = {
        "type": "mcp_call",
        "server_label": "box",
        "name": "f",
        "arguments": "{}",
        "error": {"type": "http_error"},
    }
    reply = http.post("/responses", json={"model": "m", "input": [failed, {"role": "user", "content": said}]})
    assert reply.status_code == 200
    assert heard()["messages"][1]["content"] == "Error: http_error"


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/json; charset=utf-8"])
def test_the_content_type_does_not_matter(http, said, content_type):
    body = json.dumps({"model": "m", "input": said}).encode()
    headers = {"content-type": content_type} if content_type else {}
    assert http.post("/responses", content=body, headers=headers).status_code == 200


def test_the_official_client_raises_its_own_error(client):
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="m", input="x", temperature=7)
    assert (refused.value.param, refused.value.code, refused.value.type) == (
        "temperature",
        "invalid_value",
        "invalid_request_error",
    )
    assert refused.value.request_id.startswith("req_")


# -- Characters that are trouble --------------------------------------------------------------------------------------------


def test_nul_characters_in_texts_survive(client, said, heard):
    made = client.responses.create(
        model="m",
        instructions="a\0b",
        input=[
            {"role": "user", "content": "c\0d"},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"x":"\\u0000"}'},
            {"type": "function_call_output", "call_id": "c", "output": "binary \0 output"},
            {"role": "user", "content": said},
        ],
    )
    contents = [message["content"] for message in heard()["messages"]]
    assert contents == ["a\0b", "c\0d", None, "binary \0 output", said]
    stored = client.responses.input_items.list(made.id, order="asc").data
    assert stored[0].content[0].text == "c\0d"
    assert stored[2].output == "binary \0 output"
    assert client.responses.retrieve(made.id).instructions == "a\0b"


def test_half_a_surrogate_pair_becomes_a_replacement_character(http, said, heard):
    """As in tool outputs that were cut in the middle of an emoji; whole pairs and escaped backslashes stay."""
    items = [
        '{"type":"function_call","call_id":"c","name":"f","arguments":"{}"}',
        r'{"type":"function_call_output","call_id":"c","output":"cut \ud83d, \uDE00, whole \ud83d\ude00, \\ud83d"}',
        json.dumps({"role": "user", "content": said}),
    ]
    body = f'{{"model":"m","input":[{",".join(items)}]}}'
    reply = http.post("/responses", content=body.encode())
    assert reply.status_code == 200
    expected = "cut \ufffd, \ufffd, whole 😀, \\ud83d"
    assert heard()["messages"][1]["content"] == expected
    listed = http.get(f"/responses/{reply.json()['id']}/input_items", params={"order": "asc"}).json()
    assert listed["data"][1]["output"] == expected


def test_a_half_pair_in_a_key_or_in_metadata_does_no_harm(http):
    body = rb'{"model":"m","input":"x \ud83d","metadata":{"a":"b\udc00"},"user":"\ud83d"}'
    made = http.post("/responses", content=body).json()
    assert http.get(f"/responses/{made['id']}").json() == made
    assert (made["metadata"], made["user"]) == ({"a": "b\ufffd"}, "\ufffd")


# -- Size -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(base_env: Mapping[str, str], new_database: Callable[[], str]) -> Iterator[httpx.Client]:
    """A server that takes little."""
    settings = {"REPRISE_BODY_BYTES_MAX": "4096", "REPRISE_INPUT_ITEMS_MAX": "3"}
    with (
        Served({**base_env, **settings, "DATABASE_URL": new_database()}) as served,
        httpx.Client(base_url=served.url, timeout=30) as made,
    ):
        yield made


def _sized(size: int) -> bytes:
    body = b'{"model":"m","input":"%b"}'
    return body % (b"x" * (size - len(body) + 2))


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_refused_and_one_at_it_is_taken(small, chunked):
    def sent(size: int) -> httpx.Response:
        body = _sized(size)
        assert len(body) == size
        return small.post("/responses", content=iter([body[:100], body[100:]]) if chunked else body)

    assert sent(4096).status_code == 200
    reply = sent(4097)
    refused = refusal_of(reply)
    assert "REPRISE_BODY_BYTES_MAX" in refused.pop("message")
    assert (reply.status_code, refused) == (
        413,
        {"type": "invalid_request_error", "param": None, "code": "request_too_large"},
    )


def test_more_items_than_the_limit_are_refused(small):
    assert small.post("/responses", json={"model": "m", "input": [USER] * 3}).status_code == 200
    refused = refusal_of(small.post("/responses", json={"model": "m", "input": [USER] * 4}))
    assert (refused["param"], refused["message"]) == ("input", "'input' has more than 3 items.")


# -- Paths, methods, queries ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/nothing", "/responses/x/y", "/responses/x/input_items/y", "/../etc/passwd"])
def test_an_unknown_path_is_a_404_in_the_apis_own_shape(http, path):
    reply = http.get(path)
    refused = refusal_of(reply)
    assert refused.pop("message").startswith("Invalid URL (GET /")
    assert (reply.status_code, refused) == (404, {"type": "invalid_request_error", "param": None, "code": None})


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/responses", {"GET", "POST", "OPTIONS"}),
        ("PATCH", "/responses/resp_x", {"GET", "DELETE", "OPTIONS"}),
        ("POST", "/models", {"GET", "OPTIONS"}),
        ("GET", "/responses/resp_x/cancel", {"POST", "OPTIONS"}),
    ],
)
def test_a_wrong_method_is_a_405_that_says_which_are_right(http, method, path, allowed):
    reply = http.request(method, path)
    assert refusal_of(reply) == {
        "message": f"Not allowed to {method} /v1{path}.",
        "type": "invalid_request_error",
        "param": None,
        "code": "method_not_allowed",
    }
    assert (reply.status_code, set(reply.headers["allow"].split(", "))) == (405, allowed)


@pytest.mark.parametrize("id", ["resp_x", "a%00b", "%F0%9F%98%80", "x" * 5_000, "'; drop table responses; --"])
@pytest.mark.parametrize(
    ("method", "below"), [("GET", ""), ("DELETE", ""), ("GET", "/input_items"), ("POST", "/cancel")]
)
def test_an_id_that_there_is_not_is_a_404(http, method, id, below):
    reply = http.request(method, f"/responses/{id}{below}")
    refused = refusal_of(reply)
    assert refused.pop("message").startswith("Response with id '")
    assert (reply.status_code, refused) == (404, {"type": "invalid_request_error", "param": None, "code": None})


@pytest.mark.parametrize(
    ("query", "code", "param"),
    [
        ("limit=0", VALUE, "limit"),
        ("limit=101", VALUE, "limit"),
        ("limit=-1", VALUE, "limit"),
        ("limit=many", TYPE, "limit"),
        ("limit=", TYPE, "limit"),
        ("limit=99999999999999999999", VALUE, "limit"),
        ("order=up", VALUE, "order"),
        ("after=a%00b", VALUE, "after"),
        ("nonsense=1", UNKNOWN, "nonsense"),
        ("limit=5&limit=6", VALUE, "limit"),
        ("order=null", VALUE, "order"),
    ],
)
@pytest.mark.parametrize("path", ["/responses", "/responses/{id}/input_items"])
def test_a_bad_query_of_a_list_is_named(http, client, path, query, code, param):
    made = client.responses.create(model="m", input="x")
    reply = http.get(f"{path.format(id=made.id)}?{query}")
    refused = refusal_of(reply)
    assert (reply.status_code, refused["code"], refused["param"]) == (400, code, param)


@pytest.mark.parametrize(
    ("query", "code", "param"),
    [
        ("status=fine", VALUE, "status"),
        ("status=null", VALUE, "status"),
        ("status=NULL", VALUE, "status"),
        ("status=completed&status=failed", VALUE, "status"),
        ("created_after=yesterday", TYPE, "created_after"),
        ("created_before=99999999999999999999", VALUE, "created_before"),
        ("model=%00", VALUE, "model"),
        ("metadata=x", TYPE, "metadata"),
        ("metadata=x&metadata[a]=b", TYPE, "metadata"),
        ("metadata[a]=b&metadata=x", TYPE, "metadata"),
        ("metadata[a]=b&metadata[a]=c", VALUE, "metadata"),
        ("metadata[a]=%00", VALUE, "metadata"),
        ("metadata[%00]=a", VALUE, "metadata"),
        ("include[]=message.output_text.logprobs", UNKNOWN, "include"),
    ],
)
def test_a_bad_filter_is_named(http, query, code, param):
    reply = http.get(f"/responses?{query}")
    refused = refusal_of(reply)
    assert (reply.status_code, refused["code"], refused["param"]) == (400, code, param)


@pytest.mark.parametrize(
    ("path", "query", "message"),
    [
        ("/responses", "aftr=x", "Unknown parameter: 'aftr'. Did you mean 'after'?"),
        ("/chat/completions", "metadta[a]=b", "Unknown parameter: 'metadta[a]'. Did you mean 'metadata'?"),
        ("/usage", "groupby=day", "Unknown parameter: 'groupby'. Did you mean 'group_by'?"),
        ("/agents", "mood=1", "Unknown parameter: 'mood'."),
    ],
)
def test_a_misspelt_name_in_a_query_is_refused_with_the_one_that_is_meant(http, path, query, message):
    assert refusal_of(http.get(f"{path}?{query}"))["message"] == message


@pytest.mark.parametrize(
    ("query", "code", "param"),
    [
        ("include[]=everything", VALUE, "include[0]"),
        ("include=everything", VALUE, "include[0]"),
        ("stream=maybe", TYPE, "stream"),
        ("starting_after=-1", VALUE, "starting_after"),
        ("starting_after=null", VALUE, "starting_after"),
        ("stream=true&starting_after=999999999999999999999999999999", VALUE, "starting_after"),
        ("nonsense=1", UNKNOWN, "nonsense"),
    ],
)
def test_a_bad_query_of_retrieve_is_named(http, client, query, code, param):
    made = client.responses.create(model="m", input="x")
    reply = http.get(f"/responses/{made.id}?{query}")
    refused = refusal_of(reply)
    assert (reply.status_code, refused["code"], refused["param"]) == (400, code, param)


def test_a_foreground_response_cannot_be_streamed_again_or_cancelled(http, client):
    made = client.responses.create(model="m", input="x")
    streamed = refusal_of(http.get(f"/responses/{made.id}?stream=true"))
    assert streamed["message"] == "This response cannot be streamed because it was not created with background=true."
    cancelled = refusal_of(http.post(f"/responses/{made.id}/cancel"))
    assert cancelled["message"] == "Cannot cancel a synchronous response."


def test_the_query_of_beta_features_is_ignored(http, said):
    assert http.post("/responses?beta=true", json={"model": "m", "input": said}).status_code == 200
    assert http.get("/responses?beta=true&limit=1").status_code == 200


ROUTES = [route.split(" ") for route in handlers()]


@pytest.mark.parametrize("path", sorted({path for _, path in ROUTES}))
def test_options_and_a_405_name_every_method_of_a_path(http, path):
    methods = {"OPTIONS", *(method for method, one in ROUTES if one == path)}
    url = f"{str(http.base_url).removesuffix('/v1/')}{re.sub(r'{.*?}', 'x', path)}"
    asked, refused = httpx.options(url), httpx.put(url)
    assert (asked.status_code, asked.text, refused.status_code) == (204, "", 405)
    assert asked.headers["allow"] == refused.headers["allow"] == ", ".join(sorted(methods))


# -- What every reply says --------------------------------------------------------------------------------------------------


def test_every_reply_says_its_request_and_how_long_it_took(http, client):
    made = client.responses.create(model="m", input="x")
    replies = [
        http.get(f"/responses/{made.id}"),
        http.get("/responses"),
        http.get("/models"),
        http.post("/responses", json={"model": "m", "input": "x"}),
        http.post("/responses", json={"model": "m", "input": "x", "stream": True}),
        http.post("/responses", json={}),
        http.get("/nothing"),
        http.delete(f"/responses/{made.id}"),
    ]
    assert made._request_id.startswith("req_")
    ids = [reply.headers["x-request-id"] for reply in replies]
    assert len(set(ids)) == len(replies)
    assert all(int(reply.headers["openai-processing-ms"]) >= 0 for reply in replies)
    assert {reply.headers["openai-version"] for reply in replies} == {"2020-10-01"}
