"""Requests that the document shows. A test sends each of them to the demo model."""

from typing import Any

Examples = dict[str, Any]
"""Bodies, by what they show."""

_WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
_PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}

CREATE: Examples = {
    "A text": {"model": "echo", "input": "My name is Ada."},
    "A stream": {"model": "echo", "input": "Write a story.", "stream": True},
    "In the background": {
        "model": "echo",
        "input": "Write a long story.",
        "background": True,
        "metadata": {"for": "Ada"},
    },
    "A conversation with a function": {
        "model": "echo",
        "instructions": "Answer in one sentence.",
        "input": [
            {"role": "user", "content": "How is the weather in Paris?"},
            {"type": "function_call", "call_id": "call_1", "name": "get_weather", "arguments": '{"city": "Paris"}'},
            {"type": "function_call_output", "call_id": "call_1", "output": "Sunny, 21 degrees."},
        ],
        "tools": [_WEATHER],
        "tool_choice": "auto",
    },
    "JSON of a schema": {
        "model": "echo",
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "Ada is 36 years old."}]}],
        "text": {"format": {"type": "json_schema", "name": "person", "schema": _PERSON, "strict": True}},
    },
}
COUNT: Examples = {"A text": {"model": "echo", "input": "How long is this?"}}
COMPACT: Examples = {
    "A long context": {
        "model": "echo",
        "input": [
            {"role": "user", "content": "My name is Ada."},
            {"role": "assistant", "content": "Hello Ada!"},
            {"role": "user", "content": "I live in London."},
        ],
    }
}
CHAT: Examples = {
    "A chat": {"model": "echo", "messages": [{"role": "user", "content": "My name is Ada."}]},
    "A stream": {
        "model": "echo",
        "messages": [{"role": "user", "content": "Write a story."}],
        "stream": True,
        "stream_options": {"include_usage": True},
    },
    "A function": {
        "model": "echo",
        "messages": [
            {"role": "system", "content": "Answer in one sentence."},
            {"role": "user", "content": "How is the weather in Paris?"},
        ],
        "tools": [{"type": "function", "function": {key: value for key, value in _WEATHER.items() if key != "type"}}],
        "store": True,
    },
}
METADATA: Examples = {"Other metadata": {"metadata": {"topic": "weather"}}}
CONVERSATION: Examples = {
    "With a first item": {"items": [{"role": "user", "content": "My name is Ada."}], "metadata": {"topic": "names"}}
}
FORK: Examples = {"With metadata of its own": {"metadata": {"topic": "a second try"}}}
ITEMS: Examples = {
    "Two messages": {
        "items": [
            {"role": "user", "content": "I live in London."},
            {"role": "assistant", "content": "I see."},
        ]
    }
}
KEY: Examples = {
    "A user's key": {"name": "of Ada's notebook", "user": "ada", "scopes": ["responses.read"], "models": ["qwen*"]}
}
KEY_UPDATE: Examples = {
    "Limits": {"limits": {"requests_per_minute": 60, "concurrent_runs": 2, "stored_bytes": 1_000_000_000}}
}
ROTATE: Examples = {"With an hour for the change": {"overlap_s": 3600}}
TENANT: Examples = {"With limits": {"id": "acme", "limits": {"requests_per_minute": 600, "concurrent_runs": 50}}}
TENANT_UPDATE: Examples = {"Limits": {"limits": {"requests_per_minute": 1200, "stored_bytes": 50_000_000_000}}}
TENANT_KEY: Examples = {"The first administrator's key": {"name": "of acme's administrators", "scopes": ["admin"]}}
TOOL_CREDENTIAL: Examples = {
    "A bearer token": {"server_url": "https://tools.example/mcp", "authorization": "TOKEN-OF-ADA", "name": "Tools"},
    "A header": {"server_url": "https://tools.example/other", "headers": {"x-api-key": "KEY-OF-ADA"}},
}
TOOL_CREDENTIAL_UPDATE: Examples = {"Another token": {"authorization": "NEXT-TOKEN-OF-ADA"}}
AGENT: Examples = {
    "With a variable": {
        "name": "greeter",
        "model": "echo",
        "description": "Greets people.",
        "instructions": "Greet {{name}}.",
        "variables": {"name": "string"},
        "temperature": 0.3,
        "overrides": ["temperature"],
        "users": ["ada"],
    }
}
AGENT_UPDATE: Examples = {"For all users": {"users": None, "temperature": 0.5}}
