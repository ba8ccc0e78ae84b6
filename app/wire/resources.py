"""What clients get: the response object, pages, models.

The response's keys are those of the hosted API and of the open specification together; keys that must be present are
plain fields (null where allowed), keys that must be absent when unknown are `UNSET`.
"""

from typing import Any, Literal

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from app.wire.items import PromptedMessage
from app.wire.requests import (
    AccessPrograms,
    ConversationParam,
    Image,
    PromptCacheOptions,
    PromptReference,
    ReasoningConfig,
)

Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]


class InputTokensDetails(Struct):
    cached_tokens: int = 0
    cache_write_tokens: int = 0


class OutputTokensDetails(Struct):
    reasoning_tokens: int = 0


class Usage(Struct):
    """Tokens of all upstream turns of a run together, as far as the upstream has reported them."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


NO_USAGE = Usage(0, InputTokensDetails(), 0, OutputTokensDetails(), 0)


class ResponseError(Struct):
    code: str
    message: str


Reason = Literal[
    "max_output_tokens",
    "content_filter",
    "max_turns",
    "max_run_tokens",
    "max_run_cost",
    "max_tool_calls",
    "max_tool_seconds",
]
"""Why a response is incomplete. All but the first two are this server's own: the run reached REPRISE_TURNS_MAX, or a limit of its
`run_limits`."""


class IncompleteDetails(Struct):
    reason: Reason


class TextEcho(Struct):
    format: Any
    verbosity: str | UnsetType = UNSET


class Response(Struct, kw_only=True):
    """The response object."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status
    background: bool = False
    completed_at: int | None = None
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | list[PromptedMessage] | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    model: str
    output: list[Raw] = []  # so that an item is encoded once
    parallel_tool_calls: bool = True
    previous_response_id: str | None = None
    conversation: ConversationParam | None = None
    prompt: PromptReference | UnsetType = UNSET
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | UnsetType = UNSET
    prompt_cache_options: PromptCacheOptions | UnsetType = UNSET
    image: Image | UnsetType = UNSET
    access_programs: AccessPrograms | UnsetType = UNSET
    reasoning: ReasoningConfig
    safety_identifier: str | None = None
    service_tier: str = "default"
    store: bool = True
    temperature: float = 1.0
    text: TextEcho
    tool_choice: Any = "auto"
    tools: list[Any] = []
    top_logprobs: int = 0
    top_p: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    truncation: Literal["auto", "disabled"] = "disabled"
    usage: Usage | None = None
    user: str | None = None
    metadata: dict[str, str] = {}


class Page(Struct):
    """One page of a list; `last_id` is the cursor of the next."""

    data: list[Raw]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"


class Deleted(Struct):
    id: str
    object: str = "response"
    deleted: bool = True


class InputTokens(Struct):
    input_tokens: int
    object: Literal["response.input_tokens"] = "response.input_tokens"


class Model(Struct):
    """A model or an agent; the last four keys are this server's own."""

    id: str
    created: int = 0
    owned_by: str = "reprise"
    object: Literal["model"] = "model"
    name: str = ""
    description: str | None = None
    context_window: int | None = None
    """Tokens of its context, where that is known."""
    is_agent: bool = False


class Models(Struct):
    data: list[Model]
    object: Literal["list"] = "list"


class ErrorBody(Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(Struct):
    error: ErrorBody


encode = msgspec.json.Encoder().encode
"""Any of these → JSON."""
