"""Items of a chat request → the messages that the client has sent."""

from collections.abc import Sequence
from typing import Any

from app.wire.chat import ChatMessage
from app.wire.items import (
    AnyItem,
    Content,
    CustomToolCall,
    CustomToolCallOutput,
    FunctionCall,
    FunctionCallOutput,
    InputAudio,
    InputFile,
    InputImage,
    Message,
    Reasoning,
    Refusal,
)


def sent_messages(items: Sequence[AnyItem]) -> list[ChatMessage]:
    """The messages that `domain/chat_request.py` has made these items of. Files are named by their ids."""
    made: list[ChatMessage] = []
    is_thought = is_open = False
    """Whether the last item is reasoning; whether the last message is an assistant's, and may have calls."""
    for item in items:
        is_thought, after_thought = isinstance(item, Reasoning), is_thought
        match item:
            case Reasoning():
                thought = "".join(part.text for part in item.content or ())
                made.append({"role": "assistant", "content": None, "reasoning_content": thought})
                is_open = True
            case Message(role="assistant"):
                if not after_thought:
                    made.append({"role": "assistant"})
                made[-1].update(_answer(item))
                is_open = True
            case Message():
                made.append({"role": item.role, "content": _content(item.content), **_name(item.name)})
                is_open = False
            case FunctionCall() | CustomToolCall():
                if not is_open:
                    made.append({"role": "assistant", "content": None})
                    is_open = True
                made[-1].setdefault("tool_calls", []).append(_call(item))
            case FunctionCallOutput() | CustomToolCallOutput():
                name = item.name if isinstance(item, FunctionCallOutput) else None
                made.append(
                    {"role": "tool", "tool_call_id": item.call_id, "content": _content(item.output), **_name(name)}
                )
                is_open = False
    return made


def _name(name: Any) -> dict[str, str]:
    return {"name": name} if name else {}


def _answer(message: Message) -> ChatMessage:
    parts = message.content if isinstance(message.content, list) else []
    refusals = [part.refusal for part in parts if isinstance(part, Refusal)]
    texts = [part for part in parts if not isinstance(part, Refusal)]
    content = _content(texts) if texts or not refusals else None
    refused = {"refusal": "\n".join(refusals)} if refusals else {}
    return {"content": content, **refused, **_name(message.name)}


def _call(call: FunctionCall | CustomToolCall) -> dict[str, Any]:
    if isinstance(call, CustomToolCall):
        return {"id": call.call_id, "type": "custom", "custom": {"name": call.name, "input": call.input}}
    return {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _content(content: str | Sequence[Content]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    parts = [_part(part) for part in content]
    return (
        "".join(part["text"] for part in parts) if len(parts) < 2 and all("text" in part for part in parts) else parts
    )


def _part(part: Content) -> dict[str, Any]:
    match part:
        case InputImage():
            return {"type": "image_url", "image_url": {"url": part.image_url, "detail": part.detail}}
        case InputAudio():
            return {"type": "input_audio", "input_audio": part.input_audio}
        case InputFile():
            file = {"file_data": part.file_data, "file_id": part.file_id, "filename": part.filename}
            return {"type": "file", "file": {key: value for key, value in file.items() if value}}
    return {"type": "text", "text": getattr(part, "text", "")}
