"""Steps and scripts: the functions that build them, and the reading of a script out of a message."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

Step = dict[str, Any]


def script(*turns: Sequence[Step]) -> str:
    """The user message that makes the upstream answer its first, second, … turn with these steps."""
    return "\n".join(msgspec.json.encode(list(steps)).decode() for steps in turns)


def answer(content: str) -> list[Step]:
    """A whole turn: the text in words, finish stop."""
    return [*words(content), finish()]


def calling(name: str, arguments: Mapping[str, Any] | str | None = None, id: str = "call_1") -> list[Step]:
    """A whole turn: one function call and finish tool_calls."""
    return [call(name, arguments, id=id), finish("tool_calls")]


def words(content: str) -> list[Step]:
    """The text as one `text` step per word; joined they are the text again."""
    return [text(word) for word in re.findall(r"\s*\S+|\s+$", content)]


def text(content: str, **options: Any) -> Step:
    """One chunk of text; option `logprobs` goes beside the delta."""
    return {"text": content, **options}


def reasoning(content: str, field: str = "reasoning_content") -> Step:
    """One chunk of reasoning, in `reasoning_content` or in `reasoning` as other servers name it."""
    return {field: content}


def refusal(content: str) -> Step:
    """One chunk of a refusal."""
    return {"refusal": content}


def size(count: int) -> Step:
    """One chunk of text of that many bytes."""
    return {"size": count}


def call(
    name: str | None = None,
    arguments: Mapping[str, Any] | str | None = None,
    *,
    index: int | str | None = 0,
    id: str | int | None = None,
    custom: Mapping[str, Any] | None = None,
    **more: Any,
) -> Step:
    """One tool_calls delta; what is None is left out. The type is given with the name, as servers do."""
    if arguments is not None and not isinstance(arguments, str):
        arguments = msgspec.json.encode(arguments).decode()
    given = {"index": index, "id": id, "name": name, "arguments": arguments, "custom": custom}
    kind = {"type": "function"} if name is not None else {"type": "custom"} if custom and id else {}
    return {"call": {key: value for key, value in given.items() if value is not None} | kind | more}


def delta(**fields: Any) -> Step:
    """One chunk with exactly this delta."""
    return {"delta": fields}


def chunk(**fields: Any) -> Step:
    """Exactly this object as one `data:` line."""
    return {"chunk": fields}


def raw(content: str) -> Step:
    """Exactly this text on the wire, without `data:` and newlines."""
    return {"raw": content}


def junk(count: int) -> Step:
    """That many bytes that are neither SSE nor UTF-8, without a newline."""
    return {"junk": count}


def finish(reason: str = "stop") -> Step:
    """The chunk with the finish reason: stop, length, tool_calls or content_filter."""
    return {"finish": reason}


def usage(prompt: int, completion: int, **details: Any) -> Step:
    """A usage chunk with empty choices, asked for or not, instead of the computed one."""
    return {"usage": usage_of(prompt, completion) | details}


def no_usage() -> Step:
    """No usage, although the request asks for it."""
    return {"usage": None}


def usage_in_finish(prompt: int, completion: int, **details: Any) -> Step:
    """Usage inside the finish chunk that follows, and no usage chunk."""
    return {"usage_in_finish": usage_of(prompt, completion) | details}


def error(message: str = "scripted error", type: str = "server_error", code: str | int | None = None) -> Step:
    """An error object inside the stream; no usage is computed after it."""
    return {"error": {"message": message, "type": type, "param": None, "code": code}}


def status(
    code: int,
    body: Mapping[str, Any] | str | None = None,
    headers: Mapping[str, str] | None = None,
    times: int | None = None,
) -> Step:
    """This HTTP status instead of a stream; with `times` only the first so many times that this turn is asked for."""
    given = {"body": body, "headers": headers, "times": times}
    return {"status": code} | {key: value for key, value in given.items() if value is not None}


def stall(seconds: float | None = None) -> Step:
    """Silence for so long; None: until the peer goes."""
    return {"stall": seconds}


def gate(name: str) -> Step:
    """Silence until the test opens the gate of that name."""
    return {"gate": name}


def cut(*, reset: bool = False) -> Step:
    """The connection breaks without an end: closed (the peer sees a short body) or reset."""
    return {"cut": "reset" if reset else True}


def no_done() -> Step:
    """No final [DONE]."""
    return {"done": False}


def split(count: int | None) -> Step:
    """All that follows leaves in pieces of so many bytes, each its own write and HTTP chunk; None ends it.

    A piece is shorter only at the end of the reply and before a silence (stall, gate, pause of a loop).
    """
    return {"split": count}


def coalesce() -> Step:
    """All that follows leaves in one write, at the end."""
    return {"coalesce": True}


def repeat(count: int, *steps: Step, every_ms: float = 0) -> Step:
    """The steps so many times, with a pause before each round but the first."""
    return {"repeat": count, "steps": list(steps), "every_ms": every_ms}


def forever(*steps: Step, every_ms: float = 10) -> Step:
    """The steps until the peer goes."""
    return {"forever": list(steps), "every_ms": every_ms}


def note(content: str) -> Step:
    """Does nothing; makes two scripts different."""
    return {"note": content}


def endpoint(path: str, body: Any = None, *, code: int = 200, gate: str | None = None) -> Step:
    """What an endpoint that counts tokens answers, when it is asked for this turn: with a gate, once that is open. Nothing in a
    completion."""
    return {"endpoint": path, "code": code, "body": body, "waits_at": gate}


def usage_of(prompt: int, completion: int) -> dict[str, Any]:
    """A usage object."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
