"""LlamaIndex's OpenAILike over Chat Completions, against a server whose upstream is the scripted one: `make clients` runs it."""

import asyncio

from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.core.workflow import Context
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel
from scripts import ADA, URL, WEATHER


class Person(BaseModel):
    """What structured output asks for."""

    name: str


def weather(city: str) -> str:
    """The weather in a city."""
    return f"sun in {city}"


TOOL = FunctionTool.from_defaults(weather)


def model(**options: object) -> OpenAILike:
    more = {"is_chat_model": True, "is_function_calling_model": True, "max_retries": 0, **options}
    return OpenAILike(model="scripted", api_base=URL, api_key="none", **more)


def user(content: str) -> ChatMessage:
    return ChatMessage(role="user", content=content)


def answers() -> None:
    assert model().complete("Hello").text == "ok: Hello"
    turns = [ChatMessage(role="system", content="Be kind."), user("a"), ChatMessage(role="assistant", content="b")]
    assert model().chat([*turns, user("c")]).message.content == "ok: c"


def streams() -> None:
    assert "".join(chunk.delta for chunk in model().stream_chat([user("Hello there")])) == "ok: Hello there"


def calls_tools() -> None:
    *_, streamed = model().stream_chat_with_tools([TOOL], user_msg=WEATHER, chat_history=[])
    for reply in (model().chat_with_tools([TOOL], user_msg=WEATHER, chat_history=[]), streamed):
        [called] = model().get_tool_calls_from_response(reply)
        assert (called.tool_name, called.tool_kwargs) == ("weather", {"city": "Oslo"})
        result = ChatMessage(role="tool", content="sun", additional_kwargs={"tool_call_id": called.tool_id})
        turns = [user(WEATHER), reply.message, result]
        assert model().chat_with_tools([TOOL], chat_history=turns).message.content == "It is sunny."


async def is_an_agent() -> None:
    """An agent streams, calls the tool, and remembers."""
    agent = FunctionAgent(tools=[TOOL], llm=model(), system_prompt="Be kind.")
    memory = Context(agent)
    assert str(await agent.run(WEATHER, ctx=memory)) == "It is sunny."
    assert str(await agent.run("And now?", ctx=memory)) == "ok: And now?"


def gives_structures() -> None:
    structured = model(should_use_structured_outputs=True).as_structured_llm(Person)
    assert structured.chat([user(ADA)]).raw == Person(name="Ada")


for check in (answers, streams, calls_tools, gives_structures):
    check()
asyncio.run(is_an_agent())
