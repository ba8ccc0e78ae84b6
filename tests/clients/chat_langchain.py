"""LangChain's chat class over Chat Completions, against a server whose upstream is the scripted one: `make clients` runs it."""

import asyncio

from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, SystemMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from openai import BadRequestError
from pydantic import BaseModel
from scripts import ADA, PIXEL, URL, WEATHER


class Person(BaseModel):
    """What structured output asks for."""

    name: str


@tool
def weather(city: str) -> str:
    """The weather in a city."""
    return f"sun in {city}"


def model(**options: object) -> ChatOpenAI:
    return ChatOpenAI(model="scripted", base_url=URL, api_key="none", max_retries=0, **options)


def joined(chunks: list[AIMessageChunk]) -> AIMessageChunk:
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    return whole


def answers() -> None:
    turns = [SystemMessage("Be kind."), HumanMessage("a"), AIMessage("b"), HumanMessage("c")]
    assert model().invoke(turns).content == "ok: c"
    assert asyncio.run(model().ainvoke("Hello")).content == "ok: Hello"
    assert [one.content for one in model().batch(["a", "b"])] == ["ok: a", "ok: b"]
    seen = model().invoke(
        [HumanMessage([{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": PIXEL}}])]
    )
    assert seen.content == "ok: see"


def streams() -> None:
    chunks = list(model(stream_usage=True).stream("Hello there"))
    assert [chunk.content for chunk in chunks if chunk.content] == ["ok:", " Hello", " there"]
    whole = joined(chunks)
    assert whole.usage_metadata["output_tokens"] == 3
    assert whole.response_metadata["finish_reason"] == "stop"


def calls_tools() -> None:
    with_tools = model().bind_tools([weather])
    for ask in (with_tools.invoke, lambda turns: joined(list(with_tools.stream(turns)))):
        turns: list[BaseMessage] = [HumanMessage(WEATHER)]
        turns.append(ask(turns))
        assert [one["args"] for one in turns[-1].tool_calls] == [{"city": "Oslo"}]
        turns += [weather.invoke(one) for one in turns[-1].tool_calls]
        assert ask(turns).content == "It is sunny."


def gives_structures() -> None:
    for method in ("json_schema", "json_mode"):
        assert model().with_structured_output(Person, method=method).invoke(ADA) == Person(name="Ada")


def takes_options() -> None:
    options = {"temperature": 0.2, "top_p": 0.5, "seed": 3, "stop": ["x"], "max_tokens": 50, "reasoning_effort": "low"}
    assert model(**options, frequency_penalty=0.1, presence_penalty=0.1, n=1).invoke("hi").content == "ok: hi"
    assert refusal().param == "n"


def refusal() -> BadRequestError:
    try:
        model(n=2).invoke("hi")
    except BadRequestError as error:
        return error
    raise AssertionError


for check in (answers, streams, calls_tools, gives_structures, takes_options):
    check()
