"""The other wire: Chat Completions chunks that we read, requests that we write.

Reading is lenient where dialects differ: fields that we do not use are not declared, those that we use may be null. A chunk
whose values have other types is read once more, by `wire/odd_chunks.py`.
"""

from typing import Any

import msgspec
from msgspec import Raw, Struct


class FunctionDelta(Struct):
    name: str | None = None
    arguments: str | dict[str, Any] | None = None  # a whole object in some dialects


class CustomDelta(Struct):
    name: str | None = None
    input: str | None = None


class CallDelta(Struct):
    index: int | None = None
    id: str | None = None
    function: FunctionDelta | None = None
    custom: CustomDelta | None = None


class Delta(Struct):
    content: str | None = None
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[CallDelta] | None = None
    annotations: list[Raw] | None = None
    thinking: str | None = None
    """Reasoning in parts of the content; read by `wire/odd_chunks.py` only."""


class TopLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int] | None = None


class Logprob(TopLogprob):
    top_logprobs: list[TopLogprob] | None = None


class Logprobs(Struct):
    content: list[Logprob] | None = None


class Choice(Struct):
    delta: Delta | None = None
    finish_reason: str | None = None
    logprobs: Logprobs | None = None


class Choices(Struct, array_like=True):
    """A list of which only the first is read, as one is asked for: what is not read takes no memory."""

    first: Choice | None = None


class PromptTokensDetails(Struct):
    cached_tokens: int | None = None
    cache_write_tokens: int | None = None


class CompletionTokensDetails(Struct):
    reasoning_tokens: int | None = None


class ChatUsage(Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    prompt_tokens_details: PromptTokensDetails | None = None
    completion_tokens_details: CompletionTokensDetails | None = None

    @property
    def is_reported(self) -> bool:
        """Whether anything was counted: some servers have a usage of nulls in every chunk."""
        return not self.prompt_tokens is self.completion_tokens is self.total_tokens is None


class Chunk(Struct):
    """One delta of an upstream's stream; `error` is an error object sent inside it."""

    choices: Choices | None = None
    usage: ChatUsage | None = None
    error: Raw = Raw()


class ModelEntry(Struct, frozen=True):
    """A model that an upstream lists; `created` in seconds since 1970."""

    id: str
    created: int = 0
    owned_by: str | None = None
    context_window: int | None = None
    """Tokens of its context."""


ChatMessage = dict[str, Any]
"""One message of a chat request."""

decode_chunk = msgspec.json.Decoder(Chunk).decode
