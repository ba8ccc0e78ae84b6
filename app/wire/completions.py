"""What clients of Chat Completions get: the completion, and the chunks of a stream.

`reasoning_content` and `response_id` are not in the hosted API.
"""

from typing import Any, Literal

from msgspec import UNSET, Raw, Struct, UnsetType

from app.wire.chat import CompletionTokensDetails, PromptTokensDetails

FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]


class CompletionUsage(Struct):
    """Tokens of all turns of the model together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class CalledFunction(Struct, omit_defaults=True):
    arguments: str
    name: str | UnsetType = UNSET


class CalledCustomTool(Struct, omit_defaults=True):
    input: str
    name: str | UnsetType = UNSET


class ToolCall(Struct, kw_only=True):
    """A call; `index` is its place, in chunks only, whose later pieces have no `id` and `type`."""

    index: int | UnsetType = UNSET
    id: str | UnsetType = UNSET
    type: Literal["function", "custom"] | UnsetType = UNSET
    function: CalledFunction | UnsetType = UNSET
    custom: CalledCustomTool | UnsetType = UNSET


class Logprobs(Struct):
    content: list[Raw]
    refusal: None = None


class Delta(Struct, kw_only=True):
    """What a chunk adds to the message."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    refusal: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET
    annotations: list[Any] | UnsetType = UNSET


class ChunkChoice(Struct, kw_only=True):
    index: int = 0
    delta: Delta
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None


class Chunk(Struct, kw_only=True):
    """A piece of a stream. `usage` is null in all but the last one, if that has it."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    service_tier: str
    usage: CompletionUsage | UnsetType | None = UNSET
    response_id: str | UnsetType = UNSET


class CompletionMessage(Struct, kw_only=True):
    role: Literal["assistant"] = "assistant"
    content: str | None = None
    refusal: str | None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET
    annotations: list[Any] = []


class CompletionChoice(Struct, kw_only=True):
    index: int = 0
    message: CompletionMessage
    logprobs: Logprobs | None
    finish_reason: FinishReason


class Completion(Struct, kw_only=True):
    """The completion. `response_id` names the stored response, `metadata` is of a stored completion."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    service_tier: str
    usage: CompletionUsage | None
    metadata: dict[str, str] | UnsetType = UNSET
    response_id: str | UnsetType = UNSET
