"""Context → the messages of a chat request. One small function per kind of item.

A turn's reasoning, text and calls become one assistant message; the outputs of its calls follow at once, wherever they
stand in the context, because Chat Completions demands it.
"""

from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from msgspec import Struct, UnsetType

from app.domain import client_tools, hosted
from app.domain.chat_template import fitted, short_call_id, with_reasoning
from app.domain.client_tools import is_client_run
from app.domain.compaction import message_of, open_compacted
from app.domain.context import Context
from app.domain.dialect import WRAPPED_INPUT, Dialect
from app.domain.files import NO_FILES, Files, filled
from app.domain.sealed import Unseal
from app.domain.tool_transcript import answer_for_model, asked_of_model
from app.domain.toolbox import Toolbox
from app.domain.tools.server_tool import parse_arguments
from app.ids import are_siblings, place_among_siblings
from app.wire.chat import ChatMessage
from app.wire.items import (
    AnyItem,
    Compaction,
    Content,
    CustomToolCall,
    CustomToolCallOutput,
    FunctionCall,
    FunctionCallOutput,
    InputAudio,
    InputFile,
    InputImage,
    McpApprovalRequest,
    McpCall,
    McpListTools,
    Message,
    OpaqueItem,
    PromptedMessage,
    Reasoning,
    Refusal,
    ServerCallItem,
    call_id_of,
    is_unknown,
)

NO_JSON = "not_json"
"""The one argument of a call whose own arguments are not a JSON object: upstreams refuse a history with anything else."""


Recall = Literal["auto", "current_turn", "all_turns"]
"""Which reasoning goes back to the model: `reasoning.context`."""


def messages(
    context: Context, dialect: Dialect, unseal: Unseal, recall: Recall = "auto", *, files: Files = NO_FILES
) -> list[ChatMessage]:
    """Instructions and every item that the model sees, as chat messages, with the content of `files` in the place of their ids.

    With `auto` all reasoning goes back, because chat templates leave out what their models do not want; except reasoning in the
    content, which they may not recognize: it goes back in the turn where it was made.
    """
    made: list[ChatMessage] = []
    if context.instructions:
        made += _instructions(context.instructions, dialect, files)
    if recall == "auto":
        recall = "current_turn" if dialect.reasoning == "think" else "all_turns"
    recalled_from = _last_asked(context) if recall == "current_turn" else 0
    turn = _AssistantTurn(dialect, unseal, context, recalled_from, files)
    for position, stored in context.visible:
        item = filled(stored, files, dialect)
        match item:
            case Compaction() if compacted := open_compacted(item, unseal):
                made += turn.end()
                made.append(_message(filled(message_of(compacted), files, dialect), dialect))
            case Message(role="user" | "system" | "developer"):
                made += turn.end()
                made.append(_message(item, dialect))
            case Message() | Reasoning() | FunctionCall() | CustomToolCall() | McpApprovalRequest():
                made += turn.take(position, item)
            case _ if isinstance(item, ServerCallItem):
                made += turn.take(position, item)
            case _ if isinstance(item, McpListTools) or is_unknown(item):
                pass
            case OpaqueItem() if not item.type.endswith("_output"):
                made += turn.take(position, item)
            case _:
                turn.answered = True
    made += turn.end()
    return fitted(made, dialect)


def _last_asked(context: Context) -> int:
    """The position of the last user message, where the current turn began."""
    positions = range(len(context.items) - 1, -1, -1)
    return next((at for at in positions if getattr(context.items[at], "role", None) == "user"), 0)


class _Call(Struct):
    """A call of a turn: its item's id, the tool call of the chat message, the item that answers it."""

    id: str
    tool_call: dict[str, Any]
    answer: AnyItem


def _in_order(calls: list[_Call]) -> list[_Call]:
    """The calls of a turn in the model's order, by their ids: the items of those for the client stand before the others."""
    if all(are_siblings(call.id, calls[0].id) for call in calls):
        return sorted(calls, key=lambda call: place_among_siblings(call.id))
    return calls


class _AssistantTurn:
    """Gathers the items of one turn into one message, followed by the outputs of its calls."""

    def __init__(self, dialect: Dialect, unseal: Unseal, context: Context, recalled_from: int, files: Files) -> None:
        """Reasoning before the position `recalled_from` is left out."""
        self._dialect, self._unseal, self._context, self._files = dialect, unseal, context, files
        self._recalled_from = recalled_from
        self._asked: set[str | None] = set()
        """Ids of the approval requests so far."""
        self._reset()

    def _reset(self) -> None:
        self.answered = False
        """An output stands here: the model's next item begins another turn."""
        self._reasoning: list[str] = []
        self._content: list[Content] | None = None
        self._name: str | UnsetType | None = None
        self._calls: list[_Call] = []
        self._last_server_call = ""
        """Id of the turn's last call that a server has run."""

    def take(self, position: int, item: AnyItem) -> list[ChatMessage]:
        """Add one item; gives the messages of the turn before if this item begins another."""
        spoken = self._content is not None or bool(self._calls)
        begins = self.answered or (spoken and isinstance(item, Message | Reasoning)) or self._comes_later(item)
        ended = self.end() if begins else []
        match item:
            case Reasoning():
                if position >= self._recalled_from:
                    self._reasoning.append(_reasoning_text(item, self._unseal))
            case Message():
                self._content = item.content if isinstance(item.content, list) else []
                self._name = item.name
            case _:
                self._take_call(position, item)
        return ended

    def _comes_later(self, item: AnyItem) -> bool:
        """Whether a call is of a later turn than the server-run ones here: in their turn it would stand before
        them, or be parallel to them."""
        if not self._last_server_call or (isinstance(item, McpCall) and item.approval_request_id in self._asked):
            return False
        return not (isinstance(item, ServerCallItem) and are_siblings(item.id, self._last_server_call))

    def _take_call(self, position: int, item: AnyItem) -> None:
        answer = self._context.answers.get(position)
        if isinstance(item, McpCall) and item.approval_request_id in self._asked:
            self.answered = True  # its approval request stands for it
            return
        call = _call(item, self._context.toolbox, self._dialect)
        if call is None:
            return
        if isinstance(item, McpApprovalRequest):
            self._asked.add(item.id)
            answer = answer or item
        elif isinstance(item, ServerCallItem):
            answer = item
            self._last_server_call = item.id
        if answer is not None:
            if self._dialect.call_id_format == "nine_alphanumerics":
                call["id"] = short_call_id(call["id"])
            self._calls.append(_Call(item.id, call, filled(answer, self._files, self._dialect)))

    def end(self) -> list[ChatMessage]:
        """The turn's messages: the assistant's, then the outputs of its calls, then what tool messages can't carry."""
        content = _assistant_content(self._content, self._dialect)
        message: ChatMessage = {"role": "assistant", "content": content, **_name(self._name)}
        if self._dialect.refusals and (refusal := _refusal(self._content)):
            message["refusal"] = refusal
        reasoning = "\n".join(text for text in self._reasoning if text)
        calls = _in_order(self._calls)
        if calls:
            message["tool_calls"] = [call.tool_call for call in calls]
        if reasoning:
            message = with_reasoning(message, reasoning, self._dialect)
        made = [message] if self._content is not None or calls else []
        attached: list[ChatMessage] = []
        for call in calls:
            call_id = call.tool_call["id"]
            text, parts = _output(call.answer, call_id, self._dialect)
            name = call.answer.name if isinstance(call.answer, FunctionCallOutput) else None
            made.append({"role": "tool", "tool_call_id": call_id, "content": text, **_name(name)})
            if parts:
                attached.append({"role": "user", "content": parts})
        self._reset()
        return made + attached


def _instructions(given: str | Sequence[PromptedMessage], dialect: Dialect, files: Files) -> list[ChatMessage]:
    if isinstance(given, str):
        return [{"role": "developer" if dialect.developer_role else "system", "content": given}]
    return [_message(filled(one, files, dialect), dialect) for one in given]


def _message(item: Message | PromptedMessage, dialect: Dialect) -> ChatMessage:
    role = "system" if item.role == "developer" and not dialect.developer_role else item.role
    content = _content(item.content if isinstance(item.content, list) else [], dialect)
    return {"role": role, "content": content, **_name(getattr(item, "name", None))}


def _name(name: str | UnsetType | None) -> dict[str, str]:
    """The key that distinguishes participants of one role, where a client has given it."""
    return {"name": name} if name else {}


def _content(parts: Sequence[Content], dialect: Dialect) -> str | list[dict[str, Any]]:
    """A single text is a plain string, which every server takes; so are several where the upstream lacks parts."""
    texts = [text for part in parts if (text := _text_of(part)) is not None]
    if len(texts) == len(parts) and (len(texts) <= 1 or "content_parts" in dialect.lacks):
        return "\n".join(texts)
    return [_part(part) for part in parts]


def _text_of(part: Content) -> str | None:
    if isinstance(part, Refusal):
        return part.refusal
    return getattr(part, "text", None)


def _part(part: Content) -> dict[str, Any]:
    match part:
        case InputImage():
            return _image(part)
        case InputFile():
            return _file(part)
        case InputAudio():
            return {"type": "input_audio", "input_audio": part.input_audio}
    return {"type": "text", "text": _text_of(part)}


def _image(part: InputImage) -> dict[str, Any]:
    image = {"url": part.image_url}
    if part.detail in {"low", "high"}:
        image["detail"] = part.detail
    return {"type": "image_url", "image_url": image}


def _file(part: InputFile) -> dict[str, Any]:
    file = {"file_data": part.file_data}
    if part.filename:
        file["filename"] = part.filename
    return {"type": "file", "file": file}


def _assistant_content(parts: Sequence[Content] | None, dialect: Dialect) -> str | list[dict[str, Any]] | None:
    if parts is None:
        return None
    others = [part for part in parts if not (dialect.refusals and isinstance(part, Refusal))]
    if not others:
        return None if len(parts) else ""
    return _content(others, dialect)


def _refusal(parts: Sequence[Content] | None) -> str:
    return "\n".join(part.refusal for part in parts or () if isinstance(part, Refusal))


def _reasoning_text(item: Reasoning, unseal: Unseal) -> str:
    if item.content:
        return "".join(part.text for part in item.content)
    if item.encrypted_content and (text := unseal(item.encrypted_content, "seal")) is not None:
        return text
    return "\n".join(part.text for part in item.summary)


def _call(item: AnyItem, toolbox: Toolbox, dialect: Dialect) -> dict[str, Any] | None:
    match item:
        case FunctionCall():
            name = toolbox.model_name(item.name, item.namespace or None)
            return _function_call(item.call_id, name, item.arguments)
        case CustomToolCall():
            name = toolbox.model_name(item.name, item.namespace or None)
            if dialect.custom_tools == "native":
                return {"id": item.call_id, "type": "custom", "custom": {"name": name, "input": item.input}}
            return _function_call(item.call_id, name, msgspec.json.encode({WRAPPED_INPUT: item.input}).decode())
        case OpaqueItem():
            return _foreign_call(item, toolbox)
    asked = asked_of_model(item)
    if asked is None:
        return None
    return _function_call(item.id, toolbox.model_name(asked.name, asked.owner, qualified=False), asked.arguments)


_NO_ARGUMENTS = frozenset(
    {"id", "type", "call_id", "status", "environment", "created_by", "caller", "pending_safety_checks"}
)
_ARGUMENTS = {
    "shell_call": "action",
    "local_shell_call": "action",
    "apply_patch_call": "operation",
    "tool_search_call": "arguments",
}
"""Kinds whose arguments are one of their fields."""


def _foreign_call(item: OpaqueItem, toolbox: Toolbox) -> dict[str, Any]:
    """A call that is carried (a shell command, a patch): its own fields are the arguments."""
    arguments = {key: value for key, value in item.fields.items() if key not in _NO_ARGUMENTS}
    if field := _ARGUMENTS.get(item.type):
        arguments = arguments.get(field) or {}
    kind = item.type.removesuffix("_call")
    owner = client_tools.owner_of(kind) if is_client_run(item) else hosted.owner_of(kind)
    name = toolbox.model_name(kind, owner, qualified=False)
    return _function_call(call_id_of(item) or item.id, name, msgspec.json.encode(arguments).decode())


def _function_call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    if parse_arguments(arguments) is None:
        arguments = msgspec.json.encode({NO_JSON: arguments}).decode()
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments or "{}"}}


def _output(item: AnyItem, call_id: str, dialect: Dialect) -> tuple[str, list[dict[str, Any]]]:
    """A tool message's text, and the parts that it can't carry: those go into a user message after it."""
    match item:
        case FunctionCallOutput() | CustomToolCallOutput() if isinstance(item.output, str):
            return item.output, []
        case FunctionCallOutput() | CustomToolCallOutput():
            parts: Sequence[Any] = item.output
            texts = [text for part in parts if (text := _text_of(part)) is not None]
            return _with_attachments(texts, [part for part in parts if _text_of(part) is None], call_id)
        case McpCall(images=[*images]) if dialect.tool_images and "images" not in dialect.lacks:
            return _with_attachments([answer_for_model(item)], images, call_id)
        case OpaqueItem():
            return _carried_output(item), []
    return answer_for_model(item), []


def _carried_output(item: OpaqueItem) -> str:
    output = item.fields.get("tools" if item.type == "tool_search_output" else "output")
    if item.type == "apply_patch_call_output":
        status = str(item.fields.get("status"))
        return f"{status}: {output}" if output else status
    return output if isinstance(output, str) else msgspec.json.encode(output).decode()


def _with_attachments(texts: list[str], others: Sequence[Content], call_id: str) -> tuple[str, list[dict[str, Any]]]:
    if not others:
        return "\n".join(texts), []
    note = f"The output of tool call {call_id} has {len(others)} attachment(s); they follow in the next user message."
    heading = {"type": "text", "text": f"Attachments of tool call {call_id}:"}
    return "\n".join([*texts, note]), [heading, *map(_part, others)]
