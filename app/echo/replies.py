"""The demo model, pure: one chat request → one reply."""

import re
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct

from app.echo.schema_examples import JsonSchema, example

EARLIER_MESSAGES_MAX = 20
EARLIER_CHARS_MAX = 60
PROMPT_CHARS_MAX = 500
RESULT_CHARS_MAX = 2_000
INTRODUCTION = "This is Reprise's built-in demo model; it only repeats what it hears."

# Lengths are bounded, so that no message keeps the loop busy.
STATEMENT = re.compile(
    r"\bmy ([\w -]{1,40}?) (is|are) ([^,;!?\n]{1,200}?)(?=\.(?:\s|$)|[,;!?\n]| and my |$)", re.IGNORECASE
)
QUESTION = re.compile(r"\bwhat(?: is| are|'s) my ([\w -]{1,40}?) ?(?:[?.!,;\n]|$)", re.IGNORECASE)
# Around the words that are meant for a tool.
MARKS = " \t\n\"'`.,:;!?"
LEADING = re.compile(
    rf"\A(?:[{MARKS}]|\b(?:a|and|call|for|of|please|run|the|then|to|tool|use|using|with)\b)+", re.IGNORECASE
)


class Part(Struct):
    """One content part; only text is used."""

    text: str | None = None


class Message(Struct):
    """One message of the conversation."""

    role: str
    content: str | list[Part] | None = None

    @property
    def text(self) -> str:
        """Its text parts, one a line."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content or () if part.text)


class Function(Struct):
    """A declared function."""

    name: str
    parameters: JsonSchema | None = None


class Tool(Struct):
    """A declared tool; only functions are called."""

    function: Function | None = None


class ChatRequest(Struct):
    """The fields of a Chat Completions request that the demo uses."""

    messages: list[Message]
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None

    @property
    def prompt(self) -> str:
        """The last user message."""
        return next((message.text for message in reversed(self.messages) if message.role == "user"), "")


class Reply(Struct):
    """The demo's reply: a text, or calls as (name, arguments)."""

    text: str = ""
    calls: list[tuple[str, str]] = []


def reply_to(request: ChatRequest) -> Reply:
    """Calls, an example of the requested schema, or a text. Raises SchemaError."""
    if functions := wanted_functions(request):
        names = [function.name for function in functions]
        return Reply(calls=[(one.name, arguments_for(one, names, request.prompt)) for one in functions])
    match request.response_format:
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            return Reply(as_json(example(schema, quoted(request.prompt, EARLIER_CHARS_MAX))))
        case {"type": "json_object"}:
            return Reply(as_json({"demo": INTRODUCTION, "you_said": quoted(request.prompt, PROMPT_CHARS_MAX)}))
    return Reply(reply_text(request.messages, request.prompt))


def reply_text(messages: Sequence[Message], prompt: str) -> str:
    """The results of tools, a remembered value, or the user's messages."""
    if results := tool_results(messages):
        return f"The tools answered: {'; '.join(results)}. {INTRODUCTION}"
    users = [message.text for message in messages if message.role == "user"]
    if question := QUESTION.search(prompt):
        return f"{recall(question[1], users)} {INTRODUCTION}"
    count = sum(message.role in ("user", "assistant") for message in messages)
    here = f'You said: "{quoted(prompt, PROMPT_CHARS_MAX)}". Messages in this conversation: {count}.'
    earlier = ", ".join(f'"{quoted(text, EARLIER_CHARS_MAX)}"' for text in users[:-1][-EARLIER_MESSAGES_MAX:])
    return f"{INTRODUCTION} {here}" + (f" Earlier you said: {earlier}." if earlier else "")


def tool_results(messages: Sequence[Message]) -> list[str]:
    """The tool messages at the end of the conversation."""
    results: list[str] = []
    for message in reversed(messages):
        if message.role != "tool":
            break
        results.insert(0, quoted(message.text, RESULT_CHARS_MAX))
    return results


def recall(thing: str, users: Sequence[str]) -> str:
    """The latest value that a user message gave to "my <thing>"."""
    stated = {match[1].lower(): f"{match[2]} {match[3]}" for text in users for match in STATEMENT.finditer(text)}
    known = stated.get(thing.lower())
    return f"Your {thing} {known}." if known else f"You have not told me your {thing}."


def wanted_functions(request: ChatRequest) -> list[Function]:
    """The functions to call now: the chosen or mentioned ones; none after tool messages, so that no run loops."""
    if not request.messages or request.messages[-1].role == "tool" or request.tool_choice == "none":
        return []
    functions, required = allowed_functions(request)
    wanted = [function for function in functions if mention(function.name).search(request.prompt)]
    if required and not wanted:
        wanted = functions[:1]
    return wanted[:1] if request.parallel_tool_calls is False else wanted


def allowed_functions(request: ChatRequest) -> tuple[list[Function], bool]:
    """The functions that `tool_choice` leaves, and whether one of them must be called."""
    functions = [tool.function for tool in request.tools or () if tool.function]
    match request.tool_choice:
        case {"function": {"name": name}}:
            return [function for function in functions if function.name == name], True
        case {"allowed_tools": {"mode": mode, "tools": list(tools)}}:
            names = [tool.get("function", {}).get("name") for tool in tools]
            return [function for function in functions if function.name in names], mode == "required"
    return functions, request.tool_choice == "required"


def arguments_for(function: Function, names: Sequence[str], prompt: str) -> str:
    """Arguments made of the words that follow the function's name, or else of all words but names of functions."""
    after = mention(function.name).split(prompt, maxsplit=1)[-1]
    around = prompt
    for name in names:
        after = mention(name).split(after, maxsplit=1)[0]
        around = mention(name).sub(" ", around)
    words = trimmed(after) or trimmed(around) or prompt
    return as_json(example(function.parameters or {"type": "object"}, quoted(words, PROMPT_CHARS_MAX)))


def trimmed(text: str) -> str:
    """The text without the words and marks at its ends that are not part of an argument."""
    return LEADING.sub("", text).rstrip(MARKS).removesuffix(" and").rstrip(MARKS)


def mention(name: str) -> re.Pattern[str]:
    """A pattern for a tool's name, also without a server's prefix, also with spaces for underscores."""
    words = re.split(r"[_-]+", name.rpartition("__")[2])
    return re.compile(rf"(?<!\w)(?:{re.escape(name)}|{'[ _-]'.join(map(re.escape, words))})(?!\w)", re.IGNORECASE)


def quoted(text: str, chars_max: int) -> str:
    """The text on one line, cut with an ellipsis."""
    line = " ".join(text.split())
    return line if len(line) <= chars_max else line[: chars_max - 1] + "…"


def as_json(value: object) -> str:
    """The value as JSON text."""
    return msgspec.json.encode(value).decode()
