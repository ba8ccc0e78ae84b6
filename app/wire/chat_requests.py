"""What clients ask for in Chat Completions: the body of `POST /v1/chat/completions`.

Unknown top-level keys are refused or passed on to the upstream, as in the body of `POST /v1/responses`; `domain/chat_request.py` makes
the create request of it.
"""

from collections.abc import Collection
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Raw, Struct, field

from app.errors import InvalidParameter, InvalidRequest, UnsupportedParameter
from app.wire.carried import PromptCacheBreakpoint
from app.wire.decoding import Json, check_text, decode, missing, unknown
from app.wire.items import CALL_ID_CHARS_MAX, Audio, Detail
from app.wire.keys import suggestion
from app.wire.requests import (
    HINTS,
    NOTHING,
    AgentVariables,
    Body,
    ConversationParam,
    Effort,
    JsonObjectFormat,
    Metadata,
    PromptCacheOptions,
    SchemaName,
    TextFormat,
    Verbosity,
    check_metadata,
    decode_keys,
    given,
    mend_surrogates,
    named_model,
)
from app.wire.run_limits import RunLimits
from app.wire.tools import FreeText, ToolName

# -- Messages ----------------------------------------------------------------------------------------------------------------


class Part(Struct, tag_field="type", kw_only=True, forbid_unknown_fields=True):
    """A content part of a message."""

    prompt_cache_breakpoint: PromptCacheBreakpoint | None = None


class TextPart(Part, tag="text"):
    text: str


class RefusalPart(Part, tag="refusal"):
    refusal: str


class ImageUrl(Struct, forbid_unknown_fields=True):
    url: str
    detail: Detail | None = None


class ImagePart(Part, tag="image_url"):
    image_url: ImageUrl


class AudioPart(Part, tag="input_audio"):
    input_audio: Audio


class FileOf(Struct, forbid_unknown_fields=True):
    file_data: str | None = None
    file_id: str | None = None
    filename: str | None = None


class FilePart(Part, tag="file"):
    file: FileOf


AnyPart = TextPart | RefusalPart | ImagePart | AudioPart | FilePart


class Named(Struct, forbid_unknown_fields=True):
    """A tool by its name."""

    name: Annotated[str, Meta(min_length=1)]


class CalledFunction(Struct, forbid_unknown_fields=True):
    """`parsed_arguments` is what the SDK's parsing adds; it has no effect."""

    name: Annotated[str, Meta(min_length=1)]
    arguments: str
    parsed_arguments: Any = None


class CalledCustomTool(Struct, forbid_unknown_fields=True):
    name: Annotated[str, Meta(min_length=1)]
    input: str


class ToolCall(Struct, forbid_unknown_fields=True, kw_only=True):
    """A call of an assistant's message. `index` is what a stream adds; it has no effect."""

    id: Annotated[str, Meta(min_length=1, max_length=CALL_ID_CHARS_MAX)]
    type: Literal["function", "custom"] = "function"
    function: CalledFunction | None = None
    custom: CalledCustomTool | None = None
    index: int | None = None


class ChatMessage(Struct, tag_field="role", kw_only=True, forbid_unknown_fields=True):
    """A message of a chat request."""

    name: str | None = None


class SystemMessage(ChatMessage, tag="system"):
    content: str | list[TextPart]


class DeveloperMessage(ChatMessage, tag="developer"):
    content: str | list[TextPart]


class UserMessage(ChatMessage, tag="user"):
    content: str | list[TextPart | ImagePart | AudioPart | FilePart]


class AssistantMessage(ChatMessage, tag="assistant"):
    """`reasoning_content`, or `reasoning`, is what the model thought before it; the last four have no effect: clients send back whole
    replies."""

    content: str | list[TextPart | RefusalPart] | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    annotations: Any = None
    parsed: Any = None
    audio: None = None
    function_call: None = None


class ToolMessage(ChatMessage, tag="tool"):
    content: str | list[TextPart | ImagePart | FilePart]
    tool_call_id: Annotated[str, Meta(min_length=1, max_length=CALL_ID_CHARS_MAX)]


AnyMessage = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage

# -- Tools -------------------------------------------------------------------------------------------------------------------


class Function(Struct, forbid_unknown_fields=True):
    name: ToolName
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


class ChatFunction(Struct, tag_field="type", tag="function", forbid_unknown_fields=True):
    """A function that the client runs."""

    function: Function


class GrammarOf(Struct, forbid_unknown_fields=True):
    syntax: Literal["lark", "regex"]
    definition: str


class ChatGrammar(Struct, tag_field="type", tag="grammar", forbid_unknown_fields=True):
    grammar: GrammarOf


class Custom(Struct, forbid_unknown_fields=True):
    name: ToolName
    description: str | None = None
    format: ChatGrammar | FreeText | None = None


class ChatCustomTool(Struct, tag_field="type", tag="custom", forbid_unknown_fields=True):
    """A tool whose input is one free text; the client runs it."""

    custom: Custom


class ChosenTools(Struct, forbid_unknown_fields=True):
    tools: list[Raw]
    mode: Literal["auto", "required"] = "auto"


class Declared(Struct):
    """The declaration of a tool: its type, and whether that has its object. The Responses API has no such objects."""

    type: str
    function: Raw = NOTHING
    custom: Raw = NOTHING


class Chosen(Struct):
    """A `tool_choice` that is an object: by the keys of Chat Completions, or by those of the Responses API for tools that are not the
    client's."""

    type: str
    function: Named | None = None
    custom: Named | None = None
    allowed_tools: ChosenTools | None = None


class ApproximateLocation(Struct, forbid_unknown_fields=True, omit_defaults=True):
    city: str | None = None
    country: str | None = None
    region: str | None = None
    timezone: str | None = None


class UserLocation(Struct, tag_field="type", tag="approximate", forbid_unknown_fields=True):
    approximate: ApproximateLocation


class WebSearchOptions(Struct, forbid_unknown_fields=True):
    """Declares the hosted web search."""

    search_context_size: Literal["low", "medium", "high"] | None = None
    user_location: UserLocation | None = None


# -- The body ----------------------------------------------------------------------------------------------------------------


class JsonSchema(Struct, kw_only=True, forbid_unknown_fields=True):
    name: SchemaName
    schema: Json = field(default_factory=dict)
    description: str | None = None
    strict: bool | None = None


class ChatSchemaFormat(Struct, tag_field="type", tag="json_schema", forbid_unknown_fields=True):
    json_schema: JsonSchema


class ChatStreamOptions(Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


TokenBias = Annotated[int, Meta(ge=-100, le=100)] | Annotated[float, Meta(ge=-100, le=100)]
"""Upstreams may take no `2.0` where a client has sent `2`."""


class ChatBody(Struct, kw_only=True):
    """The parameters of `POST /v1/chat/completions`, with the API's ranges; the last five are this server's own."""

    messages: list[AnyMessage] | None = None
    """The messages so far. They may be absent if something is continued."""
    model: str | None = None
    """A name of `/v1/models`, of a model or an agent."""
    stream: bool | None = None
    """Send chunks while the completion is made."""
    stream_options: ChatStreamOptions | None = None
    store: bool | None = None
    """Keep the completion, and the response that it is."""
    metadata: Metadata | None = None
    """Up to 16 pairs, which lists can be filtered by."""
    n: Annotated[int, Meta(ge=1)] | None = None
    """Only one choice is made: other numbers are refused."""
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    """The former name of `max_completion_tokens`."""
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    """Over all turns of the model, reasoning included."""
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    logit_bias: dict[str, TokenBias] | None = None
    logprobs: bool | None = None
    """Whether the log probability of each token is given."""
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    """How many rivals of each token are given, with `logprobs`."""
    tools: list[Raw] | None = None
    """What the model may call: functions of the client, tools of MCP servers, hosted tools."""
    tool_choice: Raw = NOTHING
    """Which tools the model may or must call."""
    parallel_tool_calls: bool | None = None
    """Whether one turn may make several calls."""
    web_search_options: WebSearchOptions | None = None
    response_format: TextFormat | JsonObjectFormat | ChatSchemaFormat | None = None
    """The format of the answer: text, or JSON of a schema."""
    reasoning_effort: Effort | None = None
    verbosity: Verbosity | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: PromptCacheOptions | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    safety_identifier: Annotated[str, Meta(max_length=128)] | None = None
    user: str | None = None
    prediction: Any = None
    modalities: list[Literal["text", "audio"]] | None = None
    """Replies are text: `audio` is refused."""
    audio: Raw = NOTHING
    functions: Raw = NOTHING
    function_call: Raw = NOTHING
    moderation: Raw = NOTHING
    previous_response_id: str | None = None
    """The response to continue: its whole context precedes the messages."""
    conversation: str | ConversationParam | None = None
    """The conversation to continue. Messages and answer are appended to it."""
    conversation_id: str | None = None
    """The same by the name that chat front ends use."""
    agent: AgentVariables | None = None
    run_limits: RunLimits | None = None


class ChatRequest(Struct, frozen=True):
    """A chat request, decoded and checked as far as the request alone allows."""

    body: ChatBody
    model: str
    messages: list[AnyMessage]
    extra: dict[str, Raw]
    """Parameters beyond the API that go to the upstream as they are."""
    size: int
    """Bytes of the body."""

    @property
    def conversation_id(self) -> str | None:
        """The conversation that it continues."""
        given = self.body.conversation if self.body.conversation is not None else self.body.conversation_id
        return given.id if isinstance(given, ConversationParam) else given

    @property
    def is_stateful(self) -> bool:
        """Whether it continues something."""
        return self.body.previous_response_id is not None or self.conversation_id is not None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        options = self.body.stream_options
        return bool(options and options.include_usage)


MOVED = {
    "input": "messages",
    "instructions": "messages",
    "text": "response_format",
    "reasoning": "reasoning_effort",
    "max_output_tokens": "max_completion_tokens",
    "include": "logprobs",
}
"""Parameters of the Responses API, and where Chat Completions has them."""


class UpdateCompletion(Struct, forbid_unknown_fields=True):
    """`POST /v1/chat/completions/{id}`."""

    metadata: Metadata | None


UPDATE = msgspec.json.Decoder(UpdateCompletion)
_BODY = msgspec.json.Decoder(ChatBody)
_KNOWN = frozenset(ChatBody.__struct_fields__)
_ELSEWHERE = frozenset(Body.__struct_fields__)


def decode_chat(raw: bytes, passed_on: Collection[str]) -> ChatRequest:
    """The body of `POST /v1/chat/completions`. `passed_on` names the parameters beyond the API that the catalog lets through.

    Raises InvalidRequest, with the parameter's path, for everything that is wrong whatever the state."""
    check_text(raw)
    raw = mend_surrogates(raw)
    keys = decode_keys(raw)
    extra = {key: value for key, value in keys.items() if key not in _KNOWN and key not in HINTS}
    for key in extra:
        if key in _ELSEWHERE and key not in MOVED:
            raise InvalidParameter(
                f"Unknown parameter: '{key}'. Only /v1/responses has it.", param=key, code="unknown_parameter"
            )
        if key in _ELSEWHERE or key not in passed_on:
            raise unknown(key, MOVED.get(key) or suggestion(ChatBody, "", key))
    body = decode(_BODY, raw)
    request = ChatRequest(body, named_model(body.model), body.messages or [], extra, len(raw))
    _refuse_unsupported(body)
    _refuse_contradictions(body)
    if body.messages is None and not request.is_stateful:
        raise missing("messages")
    if not request.messages and not request.is_stateful:
        raise InvalidParameter("Invalid 'messages': it holds no messages.", param="messages", code="empty_array")
    for index, message in enumerate(request.messages):
        if isinstance(message, AssistantMessage):
            _check_calls(message, f"messages[{index}].tool_calls")
    check_metadata(body.metadata or {})
    return request


def _check_calls(message: AssistantMessage, at: str) -> None:
    for index, call in enumerate(message.tool_calls or ()):
        if getattr(call, call.type) is None:
            raise missing(f"{at}[{index}].{call.type}")


def _refuse_unsupported(body: ChatBody) -> None:
    """Parameters of the API that this server does not offer; harmless values of them pass."""
    refused: dict[str, tuple[bool, str]] = {
        "n": (body.n not in {None, 1}, "only one choice is made"),
        "modalities": ("audio" in (body.modalities or ()), "replies are text"),
        "audio": (given(body.audio), "replies are text"),
        "functions": (given(body.functions), "use 'tools'"),
        "function_call": (given(body.function_call), "use 'tool_choice'"),
        "moderation": (given(body.moderation), "there is none"),
    }
    for name, (is_refused, why) in refused.items():
        if is_refused:
            raise UnsupportedParameter(
                f"Unsupported parameter: '{name}' is not supported by this server; {why}.", param=name
            )


def _refuse_contradictions(body: ChatBody) -> None:
    states = (body.previous_response_id, body.conversation, body.conversation_id)
    if sum(state is not None for state in states) > 1:
        raise InvalidParameter(
            "Mutually exclusive parameters: give 'previous_response_id' or one conversation, not both.",
            param="conversation_id" if body.conversation_id is not None else "conversation",
            code="mutually_exclusive_parameters",
        )
    if body.max_tokens and body.max_completion_tokens and body.max_tokens != body.max_completion_tokens:
        raise InvalidParameter(
            "Mutually exclusive parameters: 'max_tokens' is the former name of 'max_completion_tokens'.",
            param="max_tokens",
            code="mutually_exclusive_parameters",
        )
    if body.stream_options is not None and not body.stream:
        raise InvalidParameter("'stream_options' is only allowed when 'stream' is true.", param="stream_options")
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("'top_logprobs' is only allowed when 'logprobs' is true.", param="top_logprobs")
