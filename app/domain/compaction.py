"""Compaction: a summary stands for all of the context before it.

The items before a compaction item stay in the context, and the model does not see them. The item holds the summary, sealed, and with it
the user's last messages word for word: whatever a summary leaves out, the model knows what it was asked.
"""

from collections.abc import Sequence
from typing import TypeGuard

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from app.domain.sealed import TenantSeal, Unseal
from app.wire.items import (
    SEALED_CHARS_MAX,
    AdditionalTools,
    AnyItem,
    Compaction,
    CustomToolCall,
    FunctionCall,
    InputAudio,
    InputFile,
    InputImage,
    InputText,
    McpListTools,
    Message,
    Reasoning,
    encode_item,
    is_unknown,
    screenshot_of,
)
from app.wire.requests import CreateResponse
from app.wire.resources import Usage

HEADING = "The conversation so far was replaced by this summary of it:"
MESSAGES_HEADING = "The user's last messages before the summary, word for word:"

LEFT_OUT = "(What was attached here is too large to be kept.)"

MEDIA = (InputImage, InputFile, InputAudio)

COMPACTED_BYTES_MAX = SEALED_CHARS_MAX * 3 // 4 - 1024
"""Of what an item holds, so that its sealed form, in base64, is not too long."""

BYTES_PER_TOKEN = 4
"""Of JSON, where tokens are estimated."""

MEDIA_TOKENS = 1_000
"""What an image, a file or a sound is estimated at, whatever its size."""

MADE_BY_MODEL = (Message, Reasoning, FunctionCall, CustomToolCall)
"""Items of outputs whose tokens the upstream has counted."""


class Compacted(Struct, omit_defaults=True):
    """What a compaction item holds, sealed."""

    summary: str
    messages: list[Message] = []
    """The user's last messages."""


_COMPACTED = msgspec.json.Decoder(Compacted)


def fitting(summary: str, messages: list[Message]) -> Compacted:
    """A summary with the user's last messages, as far as an item may hold them: if they are too long, without their images, files and
    sounds; if they still are, none of them."""
    for kept in (messages, [_without_media(message) for message in messages]):
        compacted = Compacted(summary, kept)
        if len(msgspec.json.encode(compacted)) <= COMPACTED_BYTES_MAX:
            return compacted
    return Compacted(summary)


def _without_media(message: Message) -> Message:
    parts = message.content if isinstance(message.content, list) else []
    kept = [InputText(text=LEFT_OUT) if isinstance(part, MEDIA) else part for part in parts]
    return replace(message, content=kept)


def seal_compacted(compacted: Compacted, seal: TenantSeal) -> str:
    """The `encrypted_content` of a compaction item."""
    return seal.close(msgspec.json.encode(compacted).decode(), "compaction")


def open_compacted(item: Compaction, unseal: Unseal) -> Compacted | None:
    """What a compaction item holds; None if this server did not seal it for this tenant."""
    text = unseal(item.encrypted_content, "compaction")
    try:
        return None if text is None else _COMPACTED.decode(text)
    except msgspec.DecodeError:  # sealed by another version
        return None


def is_compaction(item: AnyItem) -> TypeGuard[Compaction]:
    """Whether an item stands for what precedes it. One whose summary was broken off does not."""
    return isinstance(item, Compaction) and bool(item.encrypted_content)


def newest_compaction(items: Sequence[AnyItem]) -> int:
    """The position of the newest compaction item; -1 if there is none."""
    return next((at for at in range(len(items) - 1, -1, -1) if is_compaction(items[at])), -1)


def is_instruction(item: AnyItem) -> bool:
    """Whether an item is a message that instructs the model: a compaction does not remove it."""
    return isinstance(item, Message) and item.role in {"system", "developer"}


def is_from_user(item: AnyItem) -> TypeGuard[Message]:
    """Whether an item is a message of the user."""
    return isinstance(item, Message) and item.role == "user"


def retained(items: Sequence[AnyItem]) -> list[AnyItem]:
    """The messages to the model among items, which a compacted window shows before its compaction item."""
    return [item for item in items if is_instruction(item) or is_from_user(item)]


def can_compact(items: Sequence[AnyItem]) -> bool:
    """Whether a summary would replace anything: after the newest compaction item there is more than messages to the model."""
    stays = (AdditionalTools, McpListTools, Compaction)
    after = items[newest_compaction(items) + 1 :]
    return any(not (is_instruction(item) or is_from_user(item) or isinstance(item, stays)) for item in after)


def last_messages(items: Sequence[AnyItem], unseal: Unseal) -> list[Message]:
    """The user's last message, and those directly before it; where none follows the newest compaction item, those that it holds."""
    found: list[Message] = []
    for item in reversed(items):
        if is_compaction(item):
            held = None if found else open_compacted(item, unseal)
            return held.messages if held else found[::-1]
        if is_from_user(item):
            found.append(item)
        elif found:
            break
    return found[::-1]


def message_of(compacted: Compacted) -> Message:
    """What the model reads in place of all that the summary stands for. It is a message of the user whatever the dialect: a
    summary repeats what tools and web pages contain, so it must not have the weight of instructions."""
    text = f"{HEADING}\n\n{compacted.summary}"
    parts = [part for message in compacted.messages if isinstance(message.content, list) for part in message.content]
    if parts:
        text += f"\n\n{MESSAGES_HEADING}"
    if all(isinstance(part, InputText) for part in parts):
        texts = [part.text for part in parts if isinstance(part, InputText)]
        return Message(role="user", content=[InputText(text="\n\n".join([text, *texts]))])
    return Message(role="user", content=[InputText(text=text), *parts])


def estimated_tokens(items: Sequence[AnyItem]) -> int:
    """The tokens of items that no upstream has counted yet: a token for each BYTES_PER_TOKEN of their JSON, and MEDIA_TOKENS for
    each image, file or sound."""
    size = media = 0
    for item in items:
        if is_unknown(item):
            continue
        parts = getattr(item, "content", None) or getattr(item, "output", None)
        found = [part for part in parts if isinstance(part, MEDIA)] if isinstance(parts, list) else []
        media += len(found)
        size += len(encode_item(item)) - sum(len(msgspec.json.encode(part)) for part in found)
        if screenshot := screenshot_of(item):
            media += 1
            size -= len(screenshot.image_url or "")
    return size // BYTES_PER_TOKEN + media * MEDIA_TOKENS


def context_tokens(request: CreateResponse, visible: Sequence[AnyItem]) -> int:
    """The estimated tokens of all that the model reads: what it sees of the context, instructions and declared tools."""
    given = request.instructions
    prompted = [Message(role=one.role, content=one.content) for one in given] if isinstance(given, list) else []
    declared = sum(len(bytes(tool)) for tool in request.body.tools or ())
    declared += len(given.encode()) if isinstance(given, str) else 0
    return estimated_tokens([*prompted, *visible]) + declared // BYTES_PER_TOKEN


def counted_tokens(usage: Usage | None, output: Sequence[AnyItem]) -> int | None:
    """The tokens of a response's context and output, by its usage; None where that says too little: a response of several turns
    has the sum of all, also with summaries of its reasoning."""
    took_one_turn = bool(output) and all(
        isinstance(item, MADE_BY_MODEL) and not _has_summary_of_a_model(item) for item in output
    )
    return usage.total_tokens or None if usage and took_one_turn else None


def _has_summary_of_a_model(item: AnyItem) -> bool:
    if not isinstance(item, Reasoning) or not item.summary or not item.content:
        return False
    return item.summary[0].text != item.content[0].text
