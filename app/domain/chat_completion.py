"""Response → chat completion, and events → chunks: the same choice, whole or in pieces.

The choice holds what all turns of the run have made for the client: texts of several messages stand below each other, and so does
reasoning. Calls that this server makes are not in it, but in the stored response.
"""

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import UNSET, Raw, Struct

from app.wire import events
from app.wire.chat import CompletionTokensDetails, PromptTokensDetails
from app.wire.completions import (
    CalledCustomTool,
    CalledFunction,
    Chunk,
    ChunkChoice,
    Completion,
    CompletionChoice,
    CompletionMessage,
    CompletionUsage,
    Delta,
    FinishReason,
    Logprobs,
    ToolCall,
)
from app.wire.events import Entry
from app.wire.items import (
    CustomToolCall,
    FunctionCall,
    Message,
    OutputText,
    Reasoning,
    Refusal,
    decode_stored_item,
)
from app.wire.resources import ErrorBody, Response, Usage

PREFIX = "chatcmpl-"
RESPONSE_PREFIX = "resp_"
BETWEEN = "\n\n"
"""Between the texts of two messages."""

_ERROR_TYPES = {
    "rate_limit_exceeded": "requests",
    "insufficient_quota": "requests",
    "invalid_prompt": "invalid_request_error",
    "context_length_exceeded": "invalid_request_error",
}
"""Code of a failed response → the type of an error, where that is not `server_error`."""


def completion_id(response_id: str) -> str:
    """The id of the completion that a response is."""
    return PREFIX + response_id.removeprefix(RESPONSE_PREFIX)


def response_id(completion_id: str) -> str:
    """The id of the response that a completion is; an id that is no completion's stays."""
    is_ours = completion_id.startswith(PREFIX)
    return RESPONSE_PREFIX + completion_id.removeprefix(PREFIX) if is_ours else completion_id


def error_of(response: Response) -> ErrorBody | None:
    """Why there is no completion: the response has failed, or was cancelled."""
    if error := response.error:
        return ErrorBody(error.message, _ERROR_TYPES.get(error.code, "server_error"), None, error.code)
    if response.status == "cancelled":
        return ErrorBody("The completion was cancelled.", "server_error", None, "cancelled")
    return None


def _finish_reason(response: Response, *, has_calls: bool) -> FinishReason:
    if response.status == "completed":
        return "tool_calls" if has_calls else "stop"
    details = response.incomplete_details
    return "content_filter" if details and details.reason == "content_filter" else "length"


def _usage(usage: Usage | None) -> CompletionUsage | None:
    if usage is None:
        return None
    read = usage.input_tokens_details
    return CompletionUsage(
        usage.input_tokens,
        usage.output_tokens,
        usage.total_tokens,
        PromptTokensDetails(read.cached_tokens, read.cache_write_tokens),
        CompletionTokensDetails(usage.output_tokens_details.reasoning_tokens),
    )


class Joined(Struct):
    """A text that several items have made."""

    item: Any = None
    """The last of them."""
    chars: int = 0

    def take(self, item: Any, text: str) -> str:
        """The next piece of the text, from this item."""
        piece = BETWEEN + text if self.chars and item != self.item else text
        if text:
            self.item = item
            self.chars += len(piece)
            return piece
        return ""


class _Citations:
    """The addresses that a text cites. Where they stand in its parts becomes where they stand in the text."""

    def __init__(self) -> None:
        self.found: list[Any] = []
        self._starts: dict[Any, int] = {}

    def begin(self, part: Any, at: int) -> None:
        """A part of the text begins here."""
        self._starts.setdefault(part, at)

    def take(self, part: Any, annotation: Any) -> None:
        """An annotation of a part; Chat Completions has none but addresses."""
        if annotation.get("type") != "url_citation":
            return
        start = self._starts.get(part, 0)
        cited = {
            "url": annotation.get("url"),
            "title": annotation.get("title"),
            "start_index": start + annotation.get("start_index", 0),
            "end_index": start + annotation.get("end_index", 0),
        }
        self.found.append({"type": "url_citation", "url_citation": cited})


# -- Whole -------------------------------------------------------------------------------------------------------------------

_ANNOTATION = msgspec.json.Decoder(dict[str, Any])


def completion(response: Response) -> Completion:
    """The completion that a completed or incomplete response is."""
    whole = _Whole()
    for number, raw in enumerate(response.output):
        whole.take(number, decode_stored_item(raw))
    return Completion(
        id=completion_id(response.id),
        created=response.created_at,
        model=response.model,
        choices=[
            CompletionChoice(
                message=whole.message(),
                logprobs=Logprobs(whole.logprobs) if whole.logprobs else None,
                finish_reason=_finish_reason(response, has_calls=bool(whole.calls)),
            )
        ],
        service_tier=response.service_tier,
        usage=_usage(response.usage),
        metadata=response.metadata if response.store else UNSET,
        response_id=response.id if response.store else UNSET,
    )


class _Whole:
    """The message of all output items."""

    def __init__(self) -> None:
        self.logprobs: list[Raw] = []
        self.calls: list[ToolCall] = []
        self._texts: dict[str, list[str]] = {"content": [], "refusal": [], "reasoning": []}
        self._joined = {kind: Joined() for kind in self._texts}
        self._citations = _Citations()

    def take(self, number: int, item: Any) -> None:
        """The next output item."""
        match item:
            case Reasoning():
                for thought in item.content or ():
                    self._add("reasoning", number, thought.text)
            case Message(content=list(parts)):
                for index, part in enumerate(parts):
                    self._take_part(number, index, part)
            case FunctionCall():
                function = CalledFunction(item.arguments, item.name)
                self.calls.append(ToolCall(id=item.call_id, type="function", function=function))
            case CustomToolCall():
                self.calls.append(
                    ToolCall(id=item.call_id, type="custom", custom=CalledCustomTool(item.input, item.name))
                )

    def _take_part(self, number: int, index: int, part: Any) -> None:
        if isinstance(part, Refusal):
            self._add("refusal", number, part.refusal)
        elif isinstance(part, OutputText):
            self._add("content", number, part.text)
            self.logprobs += part.logprobs or ()
            self._citations.begin((number, index), self._joined["content"].chars - len(part.text))
            for raw in part.annotations:
                self._citations.take((number, index), _ANNOTATION.decode(raw))

    def _add(self, kind: str, number: int, text: str) -> None:
        self._texts[kind].append(self._joined[kind].take(number, text))

    def message(self) -> CompletionMessage:
        """All of it."""
        texts = {kind: "".join(pieces) or None for kind, pieces in self._texts.items()}
        return CompletionMessage(
            content=texts["content"],
            refusal=texts["refusal"],
            reasoning_content=texts["reasoning"] or UNSET,
            tool_calls=self.calls or UNSET,
            annotations=self._citations.found,
        )


# -- In pieces ---------------------------------------------------------------------------------------------------------------

_READ: Sequence[type[events.Event]] = (
    events.Created,
    events.ItemAdded,
    events.TextDelta,
    events.RefusalDelta,
    events.ReasoningDelta,
    events.ArgumentsDelta,
    events.CustomInputDelta,
    events.AnnotationAdded,
    *dict.fromkeys(events.TERMINAL.values()),
)
_DECODERS: dict[str, msgspec.json.Decoder[Any]] = {
    str(event.__struct_config__.tag): msgspec.json.Decoder(event) for event in _READ
}
"""Events of other types add nothing to a completion."""


class Chunks:
    """The chunks of one stream, event by event."""

    def __init__(self, *, include_usage: bool) -> None:
        self._include_usage = include_usage
        self._head: dict[str, Any] = {}
        self._response_id: Any = UNSET
        self._content, self._refusal, self._reasoning = Joined(), Joined(), Joined()
        self._citations = _Citations()
        self._calls: dict[str, int] = {}
        """Item of a call → its place."""

    def take(self, entry: Entry) -> Sequence[Chunk | ErrorBody]:
        """What the next event adds; an error ends the stream."""
        decoder = _DECODERS.get(entry.type)
        if decoder is None:
            return ()
        event = decoder.decode(entry.body)
        match event:
            case events.Created():
                return [self._begin(event.response)]
            case events.ItemAdded():
                return self._item(event.item)
            case events.AnnotationAdded():
                self._citations.take((event.output_index, event.content_index), event.annotation)
                return ()
            case events.Lifecycle():
                return self._end(event.response)
        return [self._delta(event)]

    def idle(self) -> Chunk:
        """A chunk that adds nothing."""
        return self._chunk(Delta())

    def _begin(self, response: Response) -> Chunk:
        self._head = {
            "id": completion_id(response.id),
            "created": response.created_at,
            "model": response.model,
            "service_tier": response.service_tier,
            "usage": None if self._include_usage else UNSET,
        }
        self._response_id = response.id if response.store else UNSET
        return self._chunk(Delta(role="assistant", content=None), response_id=self._response_id)

    def _delta(self, event: Any) -> Chunk:
        match event:
            case events.TextDelta():
                return self._text(event)
            case events.RefusalDelta():
                return self._chunk(Delta(refusal=self._refusal.take(event.output_index, event.delta)))
            case events.ReasoningDelta():
                return self._chunk(Delta(reasoning_content=self._reasoning.take(event.output_index, event.delta)))
            case events.ArgumentsDelta():
                return self._call(ToolCall(function=CalledFunction(event.delta)), event.item_id)
        return self._call(ToolCall(custom=CalledCustomTool(event.delta)), event.item_id)

    def _text(self, event: events.TextDelta) -> Chunk:
        piece = self._content.take(event.output_index, event.delta)
        self._citations.begin((event.output_index, event.content_index), self._content.chars - len(event.delta))
        return self._chunk(Delta(content=piece), logprobs=Logprobs(event.logprobs) if event.logprobs else None)

    def _item(self, item: dict[str, Any]) -> list[Chunk]:
        if item["type"] not in {"function_call", "custom_tool_call"}:
            return []
        self._calls[item["id"]] = len(self._calls)
        call = ToolCall(id=item["call_id"])
        if item["type"] == "function_call":
            call.type, call.function = "function", CalledFunction("", item["name"])
        else:
            call.type, call.custom = "custom", CalledCustomTool("", item["name"])
        return [self._call(call, item["id"])]

    def _call(self, call: ToolCall, item_id: str) -> Chunk:
        call.index = self._calls[item_id]
        return self._chunk(Delta(tool_calls=[call]))

    def _end(self, response: Response) -> list[Chunk | ErrorBody]:
        if error := error_of(response):
            return [error]
        made: list[Chunk | ErrorBody] = []
        if self._citations.found:  # all at once: the SDK adds up no lists without an index
            made.append(self._chunk(Delta(annotations=self._citations.found)))
        reason = _finish_reason(response, has_calls=bool(self._calls))
        made.append(self._chunk(Delta(), finish_reason=reason, response_id=self._response_id))
        if self._include_usage and response.usage:
            made.append(Chunk(**{**self._head, "choices": [], "usage": _usage(response.usage)}))
        return made

    def _chunk(
        self,
        delta: Delta,
        *,
        logprobs: Logprobs | None = None,
        finish_reason: FinishReason | None = None,
        response_id: Any = UNSET,
    ) -> Chunk:
        choice = ChunkChoice(delta=delta, logprobs=logprobs, finish_reason=finish_reason)
        return Chunk(**self._head, choices=[choice], response_id=response_id)
