"""The life cycle of a response: the table of statuses, opening one from a request, closing it.

    queued → in_progress → completed | incomplete | failed | cancelled

`completed_at` is set only on completed ones.
"""

from collections.abc import Collection
from typing import Any, Literal

from msgspec import UNSET, Struct
from msgspec.structs import replace

from app.errors import ApiError, UpstreamError
from app.wire.chat import ChatUsage
from app.wire.requests import (
    AnyFormat,
    ConversationParam,
    CreateResponse,
    Image,
    JsonSchemaFormat,
    ReasoningConfig,
    TextConfig,
    TextFormat,
)
from app.wire.resources import (
    IncompleteDetails,
    InputTokensDetails,
    OutputTokensDetails,
    Reason,
    Response,
    ResponseError,
    Status,
    TextEcho,
    Usage,
)
from app.wire.tools import AnyTool, HostedTool, encode_tools

NEXT: dict[Status, frozenset[Status]] = {
    "queued": frozenset({"in_progress", "failed", "cancelled"}),
    "in_progress": frozenset({"completed", "incomplete", "failed", "cancelled"}),
    "completed": frozenset(),
    "incomplete": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}
"""Status → what may follow it. Which statuses are in flight and which are terminal follows from this, in SQL too."""

TERMINAL: frozenset[Status] = frozenset(status for status, following in NEXT.items() if not following)
IN_FLIGHT: frozenset[Status] = frozenset(NEXT) - TERMINAL

APPENDED: frozenset[Status] = frozenset({"completed", "incomplete"})
"""How a response ends that becomes part of its conversation, or is a chat completion."""


class Outcome(Struct, frozen=True):
    """How a run ended, and why."""

    status: Literal["completed", "incomplete", "failed", "cancelled"]
    reason: Reason | None = None
    error: ApiError | None = None


_FINISHED: dict[str, Outcome] = {
    "length": Outcome("incomplete", reason="max_output_tokens"),
    "model_length": Outcome("incomplete", reason="max_output_tokens"),
    "content_filter": Outcome("incomplete", reason="content_filter"),
    "abort": Outcome("cancelled"),
} | dict.fromkeys(
    # The API's own, and those of older engines.
    ("stop", "tool_calls", "function_call", "eos_token", "stop_sequence", "end_turn", "tool_use"),
    Outcome("completed"),
)


def outcome_of(finish_reason: str | None) -> Outcome:
    """The outcome by an upstream's `finish_reason`: with an unknown one the answer may not be whole; without one, in a stream
    that ends properly, it is."""
    if finish_reason is None:
        return Outcome("completed")
    if finish_reason == "error":
        return Outcome("failed", error=UpstreamError("The upstream ended its answer with an error."))
    return _FINISHED.get(finish_reason, Outcome("incomplete"))


def open_response(request: CreateResponse, *, id: str, created_at: int, left_out: Collection[str] = ()) -> Response:
    """The response of a request at its start: every parameter echoed, or its default; except hosted tools of the types
    `left_out`, which the model does not see."""
    body = request.body
    text = body.text or TextConfig()
    given: dict[str, Any] = {
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_logprobs": body.top_logprobs,
        "frequency_penalty": body.frequency_penalty,
        "presence_penalty": body.presence_penalty,
        "parallel_tool_calls": body.parallel_tool_calls,
        "truncation": body.truncation,
        "metadata": body.metadata,
        "prompt": body.prompt,
        "prompt_cache_key": body.prompt_cache_key,
        "prompt_cache_retention": body.prompt_cache_retention,
        "prompt_cache_options": body.prompt_cache_options,
        "safety_identifier": body.safety_identifier,
        "user": body.user,
        "image": body.image and Image(context_compression="disabled"),  # what `auto` means here
        "access_programs": body.access_programs if body.access_programs and body.access_programs.cyber else None,
        "background": body.background,
    }
    return Response(
        id=id,
        created_at=created_at,
        status="queued" if body.background else "in_progress",
        model=request.named,
        instructions=request.instructions,
        previous_response_id=body.previous_response_id,
        conversation=ConversationParam(request.conversation_id) if request.conversation_id else None,
        store=request.store,
        reasoning=_reasoning_echo(body.reasoning),
        text=TextEcho(format=_format_echo(text.format), verbosity=text.verbosity or UNSET),
        tool_choice=request.tool_choice,
        tools=encode_tools([tool for tool in request.tools if not _is_hosted(tool, left_out)]),
        **{name: value for name, value in given.items() if value is not None},
    )


def _is_hosted(tool: AnyTool, types: Collection[str]) -> bool:
    return isinstance(tool, HostedTool) and tool.type in types


def _format_echo(given: AnyFormat | None) -> AnyFormat:
    if isinstance(given, JsonSchemaFormat) and given.strict is None:
        return replace(given, strict=False)
    return given or TextFormat()


def _reasoning_echo(given: ReasoningConfig | None) -> ReasoningConfig:
    if given is None:
        return ReasoningConfig()
    return replace(given, summary=given.summary or given.generate_summary or None, generate_summary=UNSET)


def close_response(response: Response, outcome: Outcome, *, usage: Usage | None, now: int) -> Response:
    """The ended response; its output is already set."""
    assert outcome.status in NEXT[response.status]
    error = outcome.error
    return replace(
        response,
        status=outcome.status,
        completed_at=now if outcome.status == "completed" else None,
        incomplete_details=IncompleteDetails(outcome.reason) if outcome.reason else None,
        error=ResponseError(code=error.event_code, message=error.message) if error else None,
        usage=usage,
    )


def add_usage(total: Usage | None, turn: ChatUsage | None) -> Usage | None:
    """The sum over turns of what the upstream has reported; None if it has reported nothing."""
    if turn is None or not turn.is_reported:
        return total
    total = total or Usage(0, InputTokensDetails(), 0, OutputTokensDetails(), 0)
    prompt, completion = turn.prompt_tokens or 0, turn.completion_tokens or 0
    read, made = turn.prompt_tokens_details, turn.completion_tokens_details
    return Usage(
        input_tokens=total.input_tokens + prompt,
        input_tokens_details=InputTokensDetails(
            cached_tokens=total.input_tokens_details.cached_tokens + _count(read and read.cached_tokens),
            cache_write_tokens=total.input_tokens_details.cache_write_tokens + _count(read and read.cache_write_tokens),
        ),
        output_tokens=total.output_tokens + completion,
        output_tokens_details=OutputTokensDetails(
            reasoning_tokens=total.output_tokens_details.reasoning_tokens + _count(made and made.reasoning_tokens)
        ),
        total_tokens=total.total_tokens + (turn.total_tokens or prompt + completion),
    )


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 0
