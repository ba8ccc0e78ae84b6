"""Valid requests of every endpoint and every shape: what is broken later."""

import base64
from random import Random
from typing import Any
from urllib.parse import quote, urlencode

from msgspec import Struct

IMAGE = "data:image/png;base64," + base64.b64encode(b"\x89PNG").decode()
CLOSED = "http://[::1]:1/mcp"
"""An MCP server that does not exist; however its address is mutated, no name is looked up and no server is reached."""
ENDED = 20
"""How many ended responses are read."""


class Sent(Struct):
    """One request. `path` is escaped, without its query; a body that is None is absent."""

    method: str
    path: str
    query: list[tuple[str, str]] = []
    body: Any = None
    headers: dict[str, str] = {}

    @property
    def target(self) -> str:
        """The request line's."""
        return self.path + ("?" + urlencode(self.query, errors="surrogatepass") if self.query else "")


class Known(Struct):
    """Ids of what is there: responses with their input items, and those that may be deleted."""

    responses: list[str]
    items: list[str]
    background: list[str]
    doomed: list[str]


def _function(name: str = "look") -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"a": {"type": "string", "enum": ["x"]}}, "required": ["a"]}
    return {"type": "function", "name": name, "description": "d", "parameters": parameters, "strict": True}


def _text(text: str) -> dict[str, Any]:
    return {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}


def _history(mark: str) -> list[dict[str, Any]]:
    """An item of every type that a history may hold."""
    said = {"type": "output_text", "text": "y", "annotations": [{"type": "url_citation", "url": "u"}], "logprobs": []}
    failed = {"type": "mcp_tool_execution_error", "content": [{"type": "text", "text": "no"}]}
    return [
        {"role": "developer", "content": "be brief"},
        {"type": "message", "role": "assistant", "content": [said, {"type": "refusal", "refusal": "no"}]},
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [{"type": "summary_text", "text": "s"}],
            "encrypted_content": "",
        },
        {"type": "function_call", "call_id": "c1", "name": "look", "arguments": '{"a":"x"}', "status": "completed"},
        {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "o"}]},
        {"type": "custom_tool_call", "call_id": "c2", "name": "free", "input": "i"},
        {"type": "custom_tool_call_output", "call_id": "c2", "output": "o"},
        {"type": "mcp_list_tools", "server_label": "box", "tools": [{"name": "t", "input_schema": {"type": "object"}}]},
        {"type": "mcp_call", "server_label": "box", "name": "t", "arguments": "{}", "output": "o"},
        {"type": "mcp_call", "server_label": "box", "name": "t", "arguments": "{}", "error": failed},
        {"type": "mcp_approval_request", "id": "mcpr_1", "server_label": "box", "name": "t", "arguments": "{}"},
        {
            "type": "web_search_call",
            "action": {"type": "search", "query": "q"},
            "results": [{"url": "u", "title": "t"}],
        },
        {"type": "file_search_call", "queries": ["q"], "results": [{"file_id": "f", "filename": "n", "text": "t"}]},
        {"type": "code_interpreter_call", "code": "1", "container_id": "c", "outputs": [{"type": "logs", "logs": "1"}]},
        {"type": "image_generation_call", "result": "aGk=", "revised_prompt": "p"},
        {"type": "shell_call", "call_id": "c3", "action": {"commands": ["ls"]}, "status": "completed"},
        {"type": "shell_call_output", "call_id": "c3", "output": [{"stdout": "o"}]},
        {"type": "additional_tools", "tools": [_function("more")]},
        _text(mark),
    ]


def _body(random: Random, known: Known, mark: str) -> dict[str, Any]:
    """A create request, of one shape or another."""
    tools = [
        _function(),
        {"type": "custom", "name": "free", "format": {"type": "text"}},
        {"type": "namespace", "name": "ns", "tools": [_function("inner")]},
        {"type": "web_search", "filters": {"allowed_domains": ["a.example"]}},
        {"type": "code_interpreter", "container": {"type": "auto"}},
    ]
    server = {
        "type": "mcp",
        "server_label": "box",
        "server_url": CLOSED,
        "headers": {"x-a": "b"},
        "allowed_tools": ["t"],
        "require_approval": {"never": {"tool_names": ["t"]}, "always": {"read_only": True}},
    }
    picture = [{"type": "input_text", "text": mark}, {"type": "input_image", "image_url": IMAGE, "detail": "low"}]
    file = [{"type": "input_file", "file_data": "aGk=", "filename": "a.txt"}, {"type": "input_text", "text": mark}]
    schema = {"type": "json_schema", "name": "n", "schema": {"type": "object", "properties": {}}, "strict": True}
    shapes: list[dict[str, Any]] = [
        {"input": mark},
        {"input": mark, "instructions": "brief", "metadata": {"k": "v"}, "user": "u", "store": False},
        {"input": [{"role": "user", "content": mark}], "stream": True, "stream_options": {"include_obfuscation": True}},
        {"input": [{"role": "user", "content": picture}]},
        {"input": [{"role": "user", "content": file}]},
        {"input": _history(mark), "include": ["web_search_call.results", "reasoning.encrypted_content"]},
        {"input": _history(mark), "stream": True},
        {"input": _history(mark), "background": True},
        {"input": mark, "previous_response_id": random.choice(known.responses), "truncation": "auto"},
        {"input": [{"type": "item_reference", "id": random.choice(known.items)}, _text(mark)]},
        {"input": mark, "tools": tools[:3], "tool_choice": {"type": "function", "name": "look"}},
        {"input": mark, "tools": tools[:2], "tool_choice": "required", "parallel_tool_calls": False},
        {
            "input": mark,
            "tools": tools[:3],
            "tool_choice": {
                "type": "allowed_tools",
                "mode": "auto",
                "tools": [{"type": "function", "name": "look"}, {"type": "custom", "name": "free"}],
            },
        },
        {"input": mark, "tools": [_function(), server]},
        {"input": mark, "tools": tools, "max_tool_calls": 3},
        {"input": mark, "background": True, "stream": True},
        {"input": mark, "text": {"format": schema, "verbosity": "low"}},
        {"input": mark, "text": {"format": {"type": "json_object"}}, "reasoning": {"effort": "low", "summary": "auto"}},
        {
            "input": mark,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_logprobs": 2,
            "max_output_tokens": 100,
            "frequency_penalty": 0.1,
            "presence_penalty": -0.1,
            "include": ["message.output_text.logprobs"],
            "service_tier": "auto",
            "prompt_cache_key": "k",
            "prompt_cache_options": {"mode": "implicit"},
            "safety_identifier": "s",
            "client_metadata": {"a": ["b"]},
        },
    ]
    return {"model": "m", **random.choice(shapes)}


COUNTED = frozenset(
    "model input instructions previous_response_id tools tool_choice text reasoning truncation parallel_tool_calls".split()
)


def _count(random: Random, known: Known, mark: str) -> Sent:
    body = {key: value for key, value in _body(random, known, mark).items() if key in COUNTED}
    headers = {"content-type": "application/json"}
    return Sent("POST", "/v1/responses/input_tokens", body={**body, "personality": "friendly"}, headers=headers)


def valid(random: Random, known: Known, mark: str) -> Sent:
    """One valid request; most are creates."""
    ended, item = random.choice(known.responses), random.choice(known.items)
    background = random.choice(known.background)
    page = [("limit", "5"), ("order", "asc"), ("after", item), ("include[]", "web_search_call.results")]
    lists = [
        ("limit", "3"),
        ("order", "desc"),
        ("model", "m"),
        ("status", "completed"),
        ("metadata[k]", "v"),
        ("created_after", "1"),
        ("created_before", "4000000000"),
        ("after", ended),
    ]
    events = [("stream", "true"), ("starting_after", "1"), ("include_obfuscation", "false")]
    others = [
        Sent("GET", f"/v1/responses/{quote(ended)}", [("include[]", "code_interpreter_call.outputs")]),
        Sent("GET", f"/v1/responses/{quote(background)}", random.sample(events, random.randint(1, 3))),
        Sent(
            "GET", f"/v1/responses/{quote(known.responses[0])}/input_items", random.sample(page, random.randint(0, 4))
        ),
        Sent("GET", "/v1/responses", random.sample(lists, random.randint(0, 8))),
        Sent("POST", f"/v1/responses/{quote(background)}/cancel"),
        Sent("DELETE", f"/v1/responses/{quote(random.choice(known.doomed))}"),
        _count(random, known, mark),
        Sent("GET", "/v1/models"),
        Sent("GET", "/v1/models/scripted"),
    ]
    if random.random() < 0.3:
        return random.choice(others)
    return Sent("POST", "/v1/responses", body=_body(random, known, mark), headers={"content-type": "application/json"})
