"""Which requests real servers refuse, and which line of its script a request asks for."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from tests.upstream.script import Step, answer

# Every step holds exactly one of these keys; what else it holds are options of that step.
VERBS = frozenset(
    "text reasoning_content reasoning refusal size call delta chunk raw junk finish usage usage_in_finish error status "
    "stall gate cut done split coalesce repeat forever note endpoint".split()
)


class Refused(Exception):
    """A request that a real server refuses."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        """Keep what the OpenAI-shaped error body needs."""
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": code}}


def text_of(content: object) -> str:
    """The text of a message: a string, or its first text part."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return next((str(part.get("text")) for part in parts if isinstance(part, dict) and part.get("type") == "text"), "")


def asked_turn(messages: Sequence[Mapping[str, Any]]) -> tuple[str, int]:
    """The text of the last user message and the number of assistant messages after it."""
    turn = 0
    for message in reversed(messages):
        if message.get("role") == "user":
            return text_of(message.get("content")), turn
        turn += message.get("role") == "assistant"
    return "", turn


def steps_of(said: str, turn: int) -> list[Step]:
    """The steps that answer this turn of a script; of any other text, the words of "ok: <text>"."""
    turns = _parsed(said)
    if turns is None:
        return answer(f"ok: {said}")
    if turn >= len(turns):
        raise Refused(
            f"the script has {len(turns)} turns, turn {turn + 1} was asked for", "messages", "script_exhausted"
        )
    _check_steps(turns[turn])
    return turns[turn]


def _parsed(said: str) -> list[list[Step]] | None:
    """The lines of a script, or None if the text is no script."""
    lines = filter(str.strip, said.split("\n"))  # Not splitlines: JSON may hold U+2028 and its like as they are.
    try:
        return msgspec.json.decode(f"[{','.join(lines)}]", type=list[list[Step]]) or None
    except msgspec.DecodeError:
        return None


def _check_steps(steps: Sequence[Step]) -> None:
    """Refuse an unknown step, before anything is sent: it is a mistake of the test."""
    for step in steps:
        if len(VERBS & step.keys()) != 1:
            raise Refused(f"bad step in script: {step}", "messages", "bad_script")
        _check_steps(step.get("steps") or step.get("forever") or ())


ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
# Parameters of the Responses API that a translation must not let through.
FOREIGN = (
    "input instructions previous_response_id conversation max_output_tokens text include truncation background "
    "max_tool_calls prompt"
).split()


def check_request(body: object, *, no_usage_option: bool, no_content_parts: bool) -> dict[str, Any]:
    """The decoded body, if a real server would take it."""
    if not isinstance(body, dict):
        raise Refused("We could not parse the JSON body of your request.")
    if not isinstance(body.get("model"), str):
        raise Refused("you must provide a model parameter", "model")
    for name in FOREIGN:
        if name in body:
            raise Refused(f"Unrecognized request argument supplied: {name}", name, "unknown_parameter")
    _check_options(body, no_usage_option)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused("Invalid 'messages': expected a non-empty array.", "messages", "empty_array")
    for position, message in enumerate(messages):
        _check_message(message, f"messages.[{position}]", no_content_parts)
    _check_calls(messages)
    return body


def _check_options(body: dict[str, Any], no_usage_option: bool) -> None:
    """Refuse options that real servers refuse in this combination."""
    if body.get("stream_options") is not None:
        if no_usage_option:
            raise Refused("Unrecognized request argument supplied: stream_options", "stream_options")
        if not body.get("stream"):
            raise Refused("The 'stream_options' parameter is only allowed when 'stream' is enabled.", "stream_options")
    if body.get("tools") == []:
        raise Refused("Invalid 'tools': empty array. Expected an array with minimum length 1.", "tools", "empty_array")
    for name in ("tool_choice", "parallel_tool_calls"):
        if body.get(name) is not None and not body.get("tools"):
            raise Refused(f"'{name}' is only allowed when 'tools' are specified.", name)
    for position, tool in enumerate(body.get("tools") or ()):
        declared = tool.get(tool.get("type", "")) if isinstance(tool, dict) else None
        if not isinstance(declared, dict) or not re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", str(declared.get("name"))):
            raise Refused(f"Invalid tool or tool name: {tool}", f"tools[{position}].function.name", "invalid_value")
    if body.get("max_tokens") is not None and body.get("max_completion_tokens") is not None:
        raise Refused(
            "Setting 'max_tokens' and 'max_completion_tokens' at the same time is not supported.", "max_tokens"
        )


def _check_message(message: object, where: str, no_content_parts: bool) -> None:
    """Refuse a message whose role or content a real server does not know."""
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        role = message.get("role") if isinstance(message, dict) else message
        raise Refused(
            f"Invalid value: {role!r}. Supported values are: {sorted(ROLES)}.", f"{where}.role", "invalid_value"
        )
    content, calls = message.get("content"), message.get("tool_calls")
    if calls is not None and (message["role"] != "assistant" or not isinstance(calls, list) or not calls):
        raise Refused(f"Invalid '{where}.tool_calls'.", f"{where}.tool_calls", "invalid_value")
    for one in calls or ():
        _check_call(one, f"{where}.tool_calls")
    if content is None and message["role"] == "assistant" and (calls or message.get("refusal")):
        return
    if isinstance(content, list) and content and all(isinstance(part, dict) and "type" in part for part in content):
        if no_content_parts and all(part["type"] == "text" for part in content):
            raise Refused("Input should be a valid string", f"{where}.content", "string_type")
    elif not isinstance(content, str):
        raise Refused("Invalid value for 'content': expected a string or parts.", f"{where}.content", "invalid_type")


def _check_call(call: object, where: str) -> None:
    """Refuse a tool call of the history that is not of one of the two known forms."""
    kind = call.get("type") if isinstance(call, dict) else None
    body = call.get(kind) if isinstance(call, dict) and kind in ("function", "custom") else None
    wanted = "input" if kind == "custom" else "arguments"
    if not isinstance(call, dict) or not isinstance(body, dict) or not call.get("id") or not body.get("name"):
        raise Refused(f"Invalid tool call: {call}", where, "invalid_value")
    if not isinstance(body.get(wanted), str):
        raise Refused(f"Invalid type for '{where}.{wanted}': expected a string.", where, "invalid_type")


def _check_calls(messages: Sequence[Mapping[str, Any]]) -> None:
    """Refuse tool messages without their call and calls without their tool message, as real servers do."""
    open_ids: list[str] = []
    for position, message in enumerate(messages):
        if message["role"] == "tool":
            if message.get("tool_call_id") not in open_ids:
                raise Refused(
                    "Invalid parameter: messages with role 'tool' must be a response to a preceeding message with "
                    "'tool_calls'.",
                    f"messages.[{position}].role",
                )
            open_ids.remove(message["tool_call_id"])
            continue
        _check_answered(open_ids, position)
        open_ids = [one["id"] for one in message.get("tool_calls") or ()]
        if len(set(open_ids)) != len(open_ids):
            raise Refused("Duplicate tool call ids.", f"messages.[{position}].tool_calls", "invalid_value")
    _check_answered(open_ids, len(messages))


def _check_answered(open_ids: Sequence[str], position: int) -> None:
    """Refuse a history that continues while calls are open."""
    if open_ids:
        raise Refused(
            "An assistant message with 'tool_calls' must be followed by tool messages responding to each "
            f"'tool_call_id'. The following tool_call_ids did not have response messages: {', '.join(open_ids)}",
            f"messages.[{position}].role",
        )
