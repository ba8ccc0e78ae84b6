"""Chat messages → those that an upstream's chat template takes: many demand roles in turn, one system message, or one call at a
time."""

import hashlib
import re
import string
from typing import Any

from app.domain.dialect import Dialect
from app.domain.think import CLOSE, OPEN
from app.wire.chat import ChatMessage

CALL_ID_CHARS = 9
TAKEN_NOTE = "OK."
"""The assistant's message between the output of its call and a user message that follows directly."""

_ALPHANUMERICS = string.digits + string.ascii_letters


def fitted(made: list[ChatMessage], dialect: Dialect) -> list[ChatMessage]:
    """The messages in the form that the upstream takes."""
    if "parallel_calls_in_history" in dialect.lacks:
        made = _one_call_each(made)
    if "later_system_messages" in dialect.lacks:
        made = _merge_system(made)
    if "repeated_roles" in dialect.lacks:
        made = _merge_neighbours(made)
    return made


def with_reasoning(message: ChatMessage, reasoning: str, dialect: Dialect) -> ChatMessage:
    """An assistant's message with the reasoning before it, in the form that the upstream takes."""
    match dialect.reasoning:
        case "none" | "same":
            return message
        case "think":
            thought = f"{OPEN}\n{reasoning}\n{CLOSE}\n\n"
            return {**message, "content": _joined_content([thought, message["content"]], separator="")}
        case "parts":
            thinking = {"type": "thinking", "thinking": [{"type": "text", "text": reasoning}]}
            return {**message, "content": [thinking, *_parts(message["content"])]}
        case key:
            return {**message, key: reasoning}


def short_call_id(id: str) -> str:
    """An id of nine letters and digits, always the same for the same id."""
    if re.fullmatch(f"[a-zA-Z0-9]{{{CALL_ID_CHARS}}}", id):
        return id
    number = int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest())
    made = []
    for _ in range(CALL_ID_CHARS):
        number, digit = divmod(number, len(_ALPHANUMERICS))
        made.append(_ALPHANUMERICS[digit])
    return "".join(made)


def _one_call_each(made: list[ChatMessage]) -> list[ChatMessage]:
    """Parallel calls one after the other: each in a message of its own, followed by its output."""
    split: list[ChatMessage] = []
    at = 0
    while at < len(made):
        message = made[at]
        at += 1
        calls = message.get("tool_calls", ())
        if len(calls) < 2:
            split.append(message)
            continue
        outputs = made[at : at + len(calls)]  # in the order of their calls
        at += len(calls)
        for number, (call, output) in enumerate(zip(calls, outputs, strict=True)):
            alone = {"role": "assistant", "content": None} if number else message
            split += [{**alone, "tool_calls": [call]}, output]
    return split


def _merge_system(made: list[ChatMessage]) -> list[ChatMessage]:
    """For chat templates that take one system message, at the start only: later ones become part of the user messages before and
    after."""
    head: list[str] = []
    groups: list[list[ChatMessage]] = []
    holds_system = False
    for message in made:
        is_system, by_user = message["role"] == "system", message["role"] == "user"
        if is_system and not groups and (text := _text(message["content"])) is not None:
            head.append(text)
            continue
        follows_user = bool(groups) and groups[-1][-1]["role"] == "user"
        fitting = {**message, "role": "user"} if is_system else message
        if follows_user and (is_system or (by_user and holds_system)):
            groups[-1].append(fitting)
        else:
            groups.append([fitting])
        holds_system = is_system or (holds_system and follows_user and by_user)
    rest = [_joined(group) for group in groups]
    return [{"role": "system", "content": "\n\n".join(head)}, *rest] if head else rest


def _merge_neighbours(made: list[ChatMessage]) -> list[ChatMessage]:
    """For chat templates that demand roles in turn. They count neither calls nor their outputs: a user message after those,
    such as an output's attachments, would be the second in a row."""
    groups: list[list[ChatMessage]] = []
    for message in made:
        before = groups[-1][-1] if groups else None
        if before and before["role"] == "tool" and message["role"] == "user":
            groups.append([{"role": "assistant", "content": TAKEN_NOTE}])
        if before and before["role"] == message["role"] != "tool" and not before.get("tool_calls"):
            groups[-1].append(message)
        else:
            groups.append([message])
    return [_joined(group) for group in groups]


def _joined(group: list[ChatMessage]) -> ChatMessage:
    """Messages of one role as one."""
    first, *others = group
    if not others:
        return first
    joined = {**first, "content": _joined_content([message["content"] for message in group])}
    for key in ("reasoning", "reasoning_content", "refusal"):
        if texts := [message[key] for message in group if key in message]:
            joined[key] = "\n".join(texts)
    if calls := group[-1].get("tool_calls"):
        joined["tool_calls"] = calls
    return joined


def _joined_content(contents: list[Any], separator: str = "\n\n") -> Any:
    given = [content for content in contents if content]
    if all(isinstance(content, str) for content in given):
        return separator.join(given) or contents[0]
    return [part for content in given for part in _parts(content)]


def _parts(content: Any) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return list(content or ())


def _text(content: Any) -> str | None:
    """Content as one text; None if there is more in it than text."""
    if isinstance(content, str):
        return content
    texts = [part["text"] for part in content if part["type"] == "text"]
    return "\n".join(texts) if len(texts) == len(content) else None
