"""LiteLLM's SDK over Chat Completions, against a server whose upstream is the scripted one: `make clients` runs it."""

from typing import Any

import litellm
from pydantic import BaseModel
from scripts import ADA, THOUGHT, URL, WEATHER

TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


class Person(BaseModel):
    """What structured output asks for."""

    name: str


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def ask(messages: list[Any], **options: Any) -> Any:
    options = {"api_base": URL, "api_key": "none", "num_retries": 0, **options}
    return litellm.completion(model="openai/scripted", messages=messages, **options)


def text_of(messages: list[Any], **options: Any) -> str:
    return ask(messages, **options).choices[0].message.content


def streamed(messages: list[Any], **options: Any) -> Any:
    chunks = list(ask(messages, stream=True, **options))
    return litellm.stream_chunk_builder(chunks, messages=messages)


def answers() -> None:
    turns = [{"role": "system", "content": "Be kind."}, user("a"), {"role": "assistant", "content": "b"}, user("c")]
    assert text_of(turns) == "ok: c"
    options = {"temperature": 0.1, "top_p": 0.3, "seed": 1, "stop": ["z"], "max_tokens": 20, "user": "u"}
    assert text_of([user("hi")], **options) == "ok: hi"
    assert text_of([user(ADA)], response_format=Person) == '{"name": "Ada"}'


def streams() -> None:
    whole = streamed([user("Hello there")], stream_options={"include_usage": True})
    assert whole.choices[0].message.content == "ok: Hello there"
    assert whole.usage.completion_tokens == 3


def calls_tools() -> None:
    for asked in (ask, streamed):
        turns: list[Any] = [user(WEATHER)]
        turns.append(asked(turns, tools=[TOOL]).choices[0].message)
        assert [one.function.arguments for one in turns[-1].tool_calls] == ['{"city": "Oslo"}']
        turns += [{"role": "tool", "tool_call_id": one.id, "content": "sun"} for one in turns[-1].tool_calls]
        assert asked(turns, tools=[TOOL]).choices[0].message.content == "It is sunny."


def thinks() -> None:
    """Its own messages, with the reasoning, are sent back as they came."""
    turns = [user(THOUGHT)]
    turns.append(ask(turns).choices[0].message)
    assert (turns[-1].content, turns[-1].reasoning_content) == ("Yes.", "Hm.")
    assert text_of([*turns, user("And?")]) == "ok: And?"


def refuses() -> None:
    assert "'n' is not supported" in str(refusal())


def refusal() -> litellm.BadRequestError:
    try:
        ask([user("hi")], n=2)
    except litellm.BadRequestError as error:
        return error
    raise AssertionError


for check in (answers, streams, calls_tools, thinks, refuses):
    check()
