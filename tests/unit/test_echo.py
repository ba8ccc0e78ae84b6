"""The demo model: what it says, what it calls, what it makes of a schema, and one stream over real HTTP."""

import functools
import json
import time
from typing import Any

import httpx
import jsonschema  # type: ignore[import-untyped]
import msgspec
import pytest

from app.echo import serve, server
from app.echo.replies import ChatRequest, Reply, reply_to
from app.echo.schema_examples import SchemaError, example
from app.echo.server import deltas

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "unit": {"enum": ["celsius", "fahrenheit"]},
                "days": {"type": "integer", "minimum": 1},
                "note": {"type": "string"},
            },
            "required": ["city", "unit", "days"],
        },
    },
}
TIME = {"type": "function", "function": {"name": "clock__get_time", "parameters": {"properties": {"zone": {}}}}}


def asked(*messages: str | dict[str, Any], **options: Any) -> Reply:
    """The reply to a conversation; a string is what the user says."""
    conversation = [{"role": "user", "content": one} if isinstance(one, str) else one for one in messages]
    return reply_to(msgspec.convert({"messages": conversation, **options}, ChatRequest))


def calls(reply: Reply) -> list[tuple[str, Any]]:
    """The calls with decoded arguments."""
    return [(name, json.loads(arguments)) for name, arguments in reply.calls]


def said(content: str) -> dict[str, Any]:
    """An answer of the model, earlier in the conversation."""
    return {"role": "assistant", "content": content}


def test_it_says_that_it_is_the_demo_and_quotes() -> None:
    """A first message is quoted back, text parts too, with the demo's introduction."""
    reply = asked({"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "image_url"}]})
    assert reply.text == (
        "This is Reprise's built-in demo model; it only repeats what it hears. "
        'You said: "Hello". Messages in this conversation: 1.'
    )


def test_it_remembers_the_conversation() -> None:
    """Earlier user messages are counted and repeated, cut to their beginning."""
    text = asked({"role": "system", "content": "x"}, "first", said("a"), "y" * 100, said("b"), "third").text
    assert "Messages in this conversation: 5." in text
    assert f'Earlier you said: "first", "{"y" * 59}…".' in text


@pytest.mark.parametrize(
    ("told", "question", "answer"),
    [
        ("Hi, my name is Ada Lovelace.", "What is my name?", "Your name is Ada Lovelace."),
        ("my name is Ada and my lucky number is 3.5.", "so what's my lucky number", "Your lucky number is 3.5."),
        ("My shoes are red", "what are my shoes?", "Your shoes are red."),
        ("my name is Ada", "what is my age?", "You have not told me your age."),
    ],
)
def test_it_remembers_what_my_thing_is(told: str, question: str, answer: str) -> None:
    """What a user message stated earlier answers a question about it."""
    assert asked(told, said("Noted."), question).text.startswith(answer)


def test_the_latest_statement_counts() -> None:
    """A value told again replaces the one before, and one message may tell and ask."""
    assert asked("my name is Ada", said("ok"), "my name is Bo. What is my name?").text.startswith("Your name is Bo.")


def test_a_mentioned_tool_is_called() -> None:
    """Required arguments are made from the words after the name, the mentioned enum value and number."""
    reply = asked("Please call get_weather for Oslo, 3 days in fahrenheit!", tools=[WEATHER, TIME])
    expected = {"city": "Oslo, 3 days in fahrenheit", "unit": "fahrenheit", "days": 3}
    assert calls(reply) == [("get_weather", expected)]
    assert reply.text == ""


def test_two_mentioned_tools_are_called_in_parallel() -> None:
    """Each gets the words that follow its name, unless only one call is allowed."""
    text = "get weather Oslo and get_time Paris."
    both = asked(text, tools=[WEATHER, TIME])
    assert calls(both)[0][1]["city"] == "Oslo"
    assert calls(both)[1] == ("clock__get_time", {"zone": "Paris"})
    assert len(asked(text, tools=[WEATHER, TIME], parallel_tool_calls=False).calls) == 1


@pytest.mark.parametrize(
    ("choice", "called"),
    [
        ("auto", []),
        (None, []),
        ("required", ["get_weather"]),
        ({"type": "function", "function": {"name": "clock__get_time"}}, ["clock__get_time"]),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": TIME["function"]}]},
            },
            ["clock__get_time"],
        ),
    ],
)
def test_the_tool_choice_is_obeyed(choice: Any, called: list[str]) -> None:
    """Without a mention a tool is called only where the choice demands it."""
    assert [name for name, _ in asked("hello", tools=[WEATHER, TIME], tool_choice=choice).calls] == called


def test_none_forbids_calls() -> None:
    """A mention does not count against tool_choice none."""
    assert asked("get_weather Oslo", tools=[WEATHER], tool_choice="none").calls == []


def test_tool_results_are_told() -> None:
    """After tool messages their contents are the answer, even if a call is required, so that no run loops."""
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
    reply = asked(
        "get_weather Oslo",
        {"role": "assistant", "tool_calls": [call, call | {"id": "c2"}]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "snow"}]},
        tools=[WEATHER],
        tool_choice="required",
    )
    assert reply.calls == []
    assert reply.text.startswith("The tools answered: rain; snow. ")


def test_the_response_format_is_obeyed() -> None:
    """A JSON schema gets an instance, json_object an object."""
    schema = {"type": "object", "properties": {"topic": {"type": "string"}}, "required": ["topic"]}
    form = {"type": "json_schema", "json_schema": {"name": "t", "schema": schema, "strict": True}}
    assert json.loads(asked("cats", response_format=form).text) == {"topic": "cats"}
    assert json.loads(asked("cats", response_format={"type": "json_object"}).text)["you_said"] == "cats"
    assert "You said" in asked("cats", response_format={"type": "text"}).text


NODE = {
    "type": "object",
    "properties": {
        "value": {"type": "integer"},
        "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
        "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
    },
    "required": ["value", "next", "children"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "minLength": 30, "maxLength": 40},
        {"type": "string", "maxLength": 3},
        {"type": "string", "format": "date-time"},
        {"type": "integer", "minimum": 10, "maximum": 12},
        {"type": "integer", "exclusiveMinimum": -3, "exclusiveMaximum": -1},
        {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
        {"type": "number", "multipleOf": 0.25, "minimum": 7.1},
        {"type": "integer", "multipleOf": 7, "maximum": -1},
        {"maximum": -5},
        {"type": "boolean"},
        {"type": "null"},
        {"type": ["null", "string"]},
        {"enum": [3, None]},
        {"const": {"a": 1}},
        {"type": "array", "items": {"type": "number"}, "minItems": 3},
        {"type": "array", "maxItems": 0},
        {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        {"oneOf": [{"$ref": "#/$defs/a"}, {"type": "null"}], "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"const": 1}}},
        {"allOf": [{"required": ["a"]}, {"properties": {"a": {"type": "boolean"}}}], "type": "object"},
        {"$ref": "#/$defs/node", "$defs": {"node": NODE}},
        {"type": "object", "properties": {"self": {"$ref": "#"}, "name": {"type": "string"}}},
        {"type": "object", "properties": {"a/b": {"$ref": "#/properties/c~1d"}, "c/d": {"type": "integer"}}},
        {"type": "object", "properties": {"n": {"type": "string"}}, "required": ["n", "undeclared"]},
        {},
    ],
)
def test_an_instance_satisfies_its_schema(schema: dict[str, Any]) -> None:
    """Whatever the text, the instance is valid."""
    for text in ("", "three words 42 here", "-0.5"):
        jsonschema.validate(example(schema, text), schema)


def test_a_schema_without_any_finite_instance() -> None:
    """Endless recursion is noticed."""
    assert example({"type": "object", "properties": {"x": {"$ref": "#"}}, "required": ["x"]}, "") is None


TWICE = {"type": "object", "required": ["a", "b"]}


def doubling(depth: int) -> dict[str, Any]:
    """A schema whose parts each refer twice to the next."""
    following = ({"$ref": f"#/$defs/{at + 1}"} for at in range(depth))
    parts = {str(at): TWICE | {"properties": {"a": one, "b": one}} for at, one in enumerate(following)}
    return {"$ref": "#/$defs/0", "$defs": parts | {str(depth): {"type": "integer"}}}


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        (doubling(40), "too large"),
        ({"type": "string", "minLength": 10**10}, "too large"),
        ({"type": "array", "minItems": 10**9}, "too large"),
        ({"type": "array", "items": {"const": "x" * 1000}, "minItems": 1000}, "too large"),
        ({"type": "array", "items": {"enum": ["x" * 1000]}, "minItems": 1000}, "too large"),
        ({"anyOf": [{"$ref": "#"}] * 10**6}, "too large"),
        ({"allOf": [{"properties": {str(at): {}}} for at in range(30_000)]}, "too large"),
        (functools.reduce(lambda inner, _: {"items": inner}, range(2000), {}), "nests"),
        ({"format": []}, "format"),
        ({"type": "number", "multipleOf": 0, "minimum": 1}, "multipleOf"),
        ({"type": "number", "multipleOf": 1e-300, "minimum": 1e300}, "not valid"),
        ({"minLength": "a"}, "minLength"),
        ({"enum": []}, "enum"),
        ({"allOf": [{"properties": []}]}, "properties"),
        ({"type": {}}, "type"),
    ],
    ids=range(15),
)
def test_a_schema_that_is_none_or_too_large_is_refused(schema: dict[str, Any], why: str) -> None:
    """Nothing of what it takes is done before."""
    begun = time.process_time()
    with pytest.raises(SchemaError, match=why):
        example(schema, "three words 42 here")
    assert time.process_time() - begun < 5


def test_deltas_join_to_the_reply() -> None:
    """Words and pieces of arguments are nothing but the reply in pieces."""
    reply = Reply("a b\n c ", [("f", '{"x":"y z"}'), ("g", "{}")])
    found = list(deltas(reply, ["c1", "c2"]))
    assert "".join(one.get("content") or "" for one in found) == reply.text
    arguments = {"c1": "", "c2": ""}
    for one in found:
        for call in one.get("tool_calls", ()):
            arguments[["c1", "c2"][call["index"]]] += call["function"]["arguments"]
    assert arguments == {"c1": '{"x":"y z"}', "c2": "{}"}


async def test_a_stream_over_http() -> None:
    """The served model lists itself, streams a reply with usage, and answers whole or with a 400."""
    echo = await serve()
    body = {"model": "echo", "messages": [{"role": "user", "content": "hi"}]}
    streamed = body | {"stream": True, "stream_options": {"include_usage": True}}
    try:
        async with httpx.AsyncClient(base_url=echo.base_url) as client:
            assert [model["id"] for model in (await client.get("/models")).json()["data"]] == ["echo"]
            async with client.stream("POST", "/chat/completions", json=streamed) as reply:
                lines = [line.removeprefix("data: ") async for line in reply.aiter_lines() if line]
            whole = (await client.post("/chat/completions", json=body)).json()
            bad = await client.post("/chat/completions", content=b"{")
            form = {"type": "json_schema", "json_schema": {"name": "t", "schema": {"minLength": "a"}}}
            unfilled = await client.post("/chat/completions", json=body | {"response_format": form})
    finally:
        await echo.close()
    assert lines.pop() == "[DONE]"
    *chunks, finish, usage = [json.loads(line) for line in lines]
    text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"]
    assert 'You said: "hi".' in text
    assert finish["choices"][0]["finish_reason"] == "stop"
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]
    for refused in (bad, unfilled):
        assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error")


async def test_it_stops_when_the_reader_leaves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With an hour between two words, closing has no reply to break off only if the reader's leave was noticed."""
    monkeypatch.setattr(server, "WORD_PAUSE_S", 3600)
    echo = await serve()
    body = {"model": "echo", "stream": True, "messages": [{"role": "user", "content": "hi"}]}
    async with (
        httpx.AsyncClient(base_url=echo.base_url) as client,
        client.stream("POST", "/chat/completions", json=body) as reply,
    ):
        lines = reply.aiter_lines()
        assert (await anext(lines)).startswith("data: ")
    await echo.close()
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []
