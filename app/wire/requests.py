"""What clients ask for: the body of `POST /v1/responses` and the query of the lists.

The body is decoded in two passes: first its top-level keys (unknown ones are refused or passed on to the upstream), then
the known ones as one Struct. Items, tools and `tool_choice` stay raw until their own decoders name the path of an error.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType
from msgspec.structs import asdict, replace

from app.errors import InvalidParameter, InvalidRequest, PromptNotFound, UnsupportedParameter
from app.wire.decoding import Json, check_text, decode, missing, unknown
from app.wire.items import (
    ID_CHARS_MAX,
    AnyItem,
    CompactionTrigger,
    InputText,
    Message,
    PromptedMessage,
    decode_item,
)
from app.wire.keys import suggestion
from app.wire.run_limits import RunLimits
from app.wire.tools import AnyTool, McpTool, ToolChoice, decode_tool_choice, decode_tools

NOTHING = Raw(b"null")
"""A raw field that is absent or null."""

INPUT_CHARS_MAX = 10_485_760
"""Characters of a string `input` (the API's own limit)."""

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Verbosity = Literal["low", "medium", "high"]
Include = Literal[
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
    "reasoning.encrypted_content",
    "message.output_text.logprobs",
    "compaction.summary",
]
Order = Literal["asc", "desc"]
Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)
]
SchemaName = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_-]+$")]


class TextFormat(Struct, tag_field="type", tag="text", forbid_unknown_fields=True):
    pass


class JsonObjectFormat(Struct, tag_field="type", tag="json_object", forbid_unknown_fields=True):
    pass


class JsonSchemaFormat(Struct, tag_field="type", tag="json_schema", kw_only=True, forbid_unknown_fields=True):
    name: SchemaName
    schema: Json
    description: str | None = None
    strict: bool | None = None


AnyFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat


class TextConfig(Struct, omit_defaults=True, forbid_unknown_fields=True):
    format: AnyFormat | None = None
    verbosity: Verbosity | None = None


Detail = Literal["auto", "concise", "detailed"]
"""How much a summary of reasoning says."""


class ReasoningConfig(Struct, forbid_unknown_fields=True):
    effort: Effort | None = None
    summary: Detail | None = None
    generate_summary: Detail | UnsetType | None = UNSET
    context: Literal["auto", "current_turn", "all_turns"] | UnsetType | None = UNSET
    mode: str | UnsetType | None = UNSET


class StreamOptions(Struct, forbid_unknown_fields=True):
    include_obfuscation: bool | None = None


class PromptCacheOptions(Struct, omit_defaults=True, forbid_unknown_fields=True):
    mode: Literal["implicit", "explicit"] | None = None
    ttl: Literal["30m", "12h"] | None = None
    prewarm: bool | None = None
    comparison_response_id: str | None = None


class Image(Struct, forbid_unknown_fields=True):
    context_compression: Literal["auto", "enabled", "disabled"] | None = None


class AccessPrograms(Struct, forbid_unknown_fields=True):
    cyber: str | None = None


class ConversationParam(Struct, forbid_unknown_fields=True):
    """A conversation, as its id or an object with it stands for it."""

    id: str


class ContextManagement(Struct, forbid_unknown_fields=True):
    type: Literal["compaction"]
    compact_threshold: Annotated[int, Meta(ge=1000)] | None = None


class PromptReference(Struct, omit_defaults=True, forbid_unknown_fields=True):
    """The operator's prompt that a request is made from, and the values of its variables."""

    id: str
    version: str | None = None
    variables: dict[str, Raw] | None = None


class AgentVariables(Struct, omit_defaults=True, forbid_unknown_fields=True):
    """The values of the variables of the agent that `model` names."""

    variables: dict[str, Raw] | None = None


class PromptParameters(Struct, kw_only=True):
    """The parameters that a prompt or an agent may set; what a request gives wins."""

    model: str | None = None
    """A name of `/v1/models`, of a model or an agent."""
    max_output_tokens: Annotated[int, Meta(ge=16)] | None = None
    """Over all turns of the model, reasoning included."""
    max_tool_calls: Annotated[int, Meta(ge=1)] | None = None
    """Over all calls that this server makes."""
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    """How many rivals of each token are given, where `include` asks for log probabilities."""
    parallel_tool_calls: bool | None = None
    """Whether one turn may make several calls."""
    tools: list[Raw] | None = None
    """What the model may call: functions of the client, tools of MCP servers, hosted tools."""
    tool_choice: Raw = NOTHING
    """Which tools the model may or must call."""
    text: TextConfig | None = None
    """The format of the answer: text, or JSON of a schema."""
    reasoning: ReasoningConfig | None = None
    truncation: Literal["auto", "disabled"] | None = None
    """`auto` leaves out the oldest turns if the context is too long for the model; otherwise that is a 400."""
    run_limits: RunLimits | None = None
    """Limits over all turns of the run; at the first that is met it ends as incomplete."""


class Body(PromptParameters, kw_only=True):
    """The parameters of `POST /v1/responses`, with the API's ranges."""

    input: Raw = NOTHING
    """A text, or items: messages, calls and their outputs. It may be absent if something is continued."""
    instructions: str | None = None
    """They stand before all items, and are not inherited by later responses."""
    previous_response_id: str | None = None
    """The response to continue: its whole context precedes the input."""
    conversation: str | ConversationParam | None = None
    """The conversation to continue. Input and output are appended to it."""
    prompt: PromptReference | None = None
    """A prompt of the operator's catalog."""
    agent: AgentVariables | None = None
    store: bool | None = None
    """`false` keeps nothing; the response can't be retrieved or continued then."""
    background: bool | None = None
    """Give the response at once and make it later: it survives crashes."""
    stream: bool | None = None
    """Send events while the response is made."""
    stream_options: StreamOptions | None = None
    include: list[Include] | None = None
    """What is left out unless it is named here."""
    metadata: Metadata | None = None
    """Up to 16 pairs, which lists can be filtered by."""
    context_management: list[ContextManagement] | None = None
    """Compact the context once it is over a threshold."""
    moderation: Raw = NOTHING
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast", "ultrafast"] | None = None
    """A hint, passed on where the model's server takes it."""
    prompt_cache_key: str | None = None
    """A hint."""
    prompt_cache_options: PromptCacheOptions | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    """A hint."""
    safety_identifier: Annotated[str, Meta(max_length=128)] | None = None
    """A hint: it is given back."""
    user: str | None = None
    """A hint: it is given back. Users of a tenant are those of its keys."""
    image: Image | None = None
    """A hint; `enabled` is refused."""
    access_programs: AccessPrograms | None = None
    """A hint; other programs than `standard` are refused."""
    multi_agent: Raw = NOTHING
    verbosity: Verbosity | None = None
    """A hint: `text.verbosity` counts."""


class CreateResponse(Struct, kw_only=True, frozen=True):
    """A create request, decoded and checked as far as the request alone allows."""

    body: Body
    model: str
    """The model that is asked: of an agent its own."""
    input: list[AnyItem]
    tools: list[AnyTool]
    tool_choice: ToolChoice
    extra: dict[str, Raw]
    """Parameters beyond the API that go to the upstream as they are."""
    agent: str = ""
    """The name of the agent that the request is for, in the place of a model."""
    items_add_tools: bool = True
    """Whether items may add tools: not to those of an agent that no request may set."""
    prompted: list[PromptedMessage] = []
    """The messages of the prompt, or of the agent."""
    size: int = 0
    """Bytes of the body, and of what the prompt or the agent adds."""
    is_chat: bool = False
    """Whether it was asked for as a chat completion."""

    @property
    def named(self) -> str:
        """What the request has named as its model, and the response names: a model or an agent."""
        return self.agent or self.model

    @property
    def instructions(self) -> str | list[PromptedMessage] | None:
        """What stands before all items: the request's own instructions, or the messages of its prompt or agent."""
        return self.body.instructions if self.body.instructions is not None else self.prompted or None

    @property
    def store(self) -> bool:
        """Whether the response is stored."""
        return self.body.store is not False

    @property
    def stream(self) -> bool:
        """Whether events are sent while the response is made."""
        return self.body.stream is True

    @property
    def background(self) -> bool:
        """Whether it is made without the client waiting."""
        return self.body.background is True

    @property
    def conversation_id(self) -> str | None:
        """The conversation that the response continues."""
        given = self.body.conversation
        return given.id if isinstance(given, ConversationParam) else given

    @property
    def include(self) -> frozenset[str]:
        """What the reply holds beyond the defaults."""
        return frozenset(self.body.include or ())

    @property
    def compacts(self) -> bool:
        """Whether the run makes a compaction item instead of an answer."""
        return bool(self.input) and isinstance(self.input[-1], CompactionTrigger)

    @property
    def asks_for_summary(self) -> bool:
        """Whether its reasoning is to be summarized."""
        reasoning = self.body.reasoning
        return bool(reasoning and (reasoning.summary or reasoning.generate_summary))

    @property
    def generate(self) -> bool:
        """False for a prewarm: the response is made without calling the model."""
        options = self.body.prompt_cache_options
        return not (options and options.prewarm)


HINTS = frozenset(
    {"client_metadata", "internal_chat_message_metadata_passthrough", "extra_headers", "extra_query", "timeout"}
)
"""Keys that real clients add and that mean nothing to a server; ignored."""

MOVED = {
    "messages": "input",
    "system": "instructions",
    "functions": "tools",
    "function_call": "tool_choice",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
    "logprobs": "include",
}
"""Parameters of Chat Completions, and where the Responses API has them."""

_KEYS = msgspec.json.Decoder(dict[str, Raw])
_BODY = msgspec.json.Decoder(Body)
_INPUT = msgspec.json.Decoder(str | list[Raw] | None)
_KNOWN = frozenset(Body.__struct_fields__)
COUNTED = frozenset(
    "model agent input instructions previous_response_id conversation tools tool_choice text reasoning truncation "
    "parallel_tool_calls personality".split()
)
"""The parameters of a count: those of a create that shape its prompt, and one of its own."""
_PERSONALITY = msgspec.json.Decoder(Annotated[str, Meta(max_length=64)] | None)
_ESCAPES = re.compile(
    rb"\\\\|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[dD][89a-fA-F][0-9a-fA-F]{2}"
)
_LONE_SURROGATE_CHARS = len(r"\ud83d")


FillIn = Callable[[Body], tuple[Body, list[PromptedMessage]]]
"""Gives a body what its prompt sets, and the prompt's messages. Raises PromptNotFound, InvalidRequest."""


def _no_prompts(body: Body) -> tuple[Body, list[PromptedMessage]]:
    assert body.prompt
    raise PromptNotFound(body.prompt.id)


def decode_create(raw: bytes, passed_on: Collection[str], fill_in: FillIn = _no_prompts) -> CreateResponse:
    """The body of `POST /v1/responses`.

    `passed_on` names the parameters beyond the API that the catalog lets through; `fill_in` has the prompts. Raises
    InvalidRequest, with the parameter's path, for everything that is wrong whatever the state; PromptNotFound.
    """
    return decode_request(raw, passed_on, _KNOWN, fill_in)


def decode_count(raw: bytes, passed_on: Collection[str]) -> CreateResponse:
    """The body of `POST /v1/responses/input_tokens`, as the create whose prompt is counted: one that stores nothing, as those only
    read their conversation. `personality` has no effect. Raises as `decode_create`."""
    request = decode_request(raw, passed_on, COUNTED)
    request.body.store = False
    return request


def decode_request(
    raw: bytes, passed_on: Collection[str], known: Collection[str], fill_in: FillIn = _no_prompts
) -> CreateResponse:
    """A body that has only the parameters `known`, as a create request. Raises as `decode_create`."""
    check_text(raw)
    raw = mend_surrogates(raw)
    keys = decode_keys(raw)
    extra = {key: value for key, value in keys.items() if key not in known and key not in HINTS}
    for key in extra:
        if key in _KNOWN or key not in passed_on:
            near = MOVED.get(key) or suggestion(Body, "", key)
            raise unknown(key, near if near and near.partition(".")[0] in known else None)
    if "personality" in known:
        decode(_PERSONALITY, keys.get("personality", NOTHING), "personality")
    body = decode(_BODY, raw)
    _refuse_unsupported(body)
    prompted: list[PromptedMessage] = []
    if body.prompt:
        body, prompted = fill_in(body)
    return CreateResponse(
        body=body,
        model=named_model(body.model),
        input=_decode_input(body),
        tools=decode_tools(body.tools or []),
        tool_choice=decode_tool_choice(body.tool_choice),
        extra=extra,
        prompted=prompted,
        size=len(raw) + (len(msgspec.json.encode(prompted)) if prompted else 0),
    )


class ToolSecrets(Struct, omit_defaults=True):
    """The secrets of a declared MCP server; its URL, too, may hold a key."""

    authorization: str | None = None
    headers: dict[str, str] | None = None
    server_url: str | None = None


_RAWS = msgspec.json.Decoder(list[Raw])


def as_stored(raw: bytes, request: CreateResponse) -> tuple[bytes, dict[str, ToolSecrets]]:
    """The body of a create request as it may be stored, and apart from it the secrets of its MCP servers, by label.

    It holds the parameters that its prompt or agent has set; their messages are those of the response. It has an `agent` if items may
    add tools to those of the agent.
    """
    secrets = secrets_of(request.tools)
    if not secrets and not request.body.prompt and not request.agent:
        return raw, {}
    keys = _KEYS.decode(mend_surrogates(raw)) | _prompted_keys(request)
    keys.pop("agent", None)  # its values stand in the messages
    if request.agent and request.items_add_tools:
        keys["agent"] = Raw(b"{}")
    if secrets:
        tools = without_secrets(request.tools, _RAWS.decode(keys["tools"]))
        keys["tools"] = Raw(msgspec.json.encode(tools))
    return msgspec.json.encode(keys), secrets


def secrets_of(tools: Sequence[AnyTool]) -> dict[str, ToolSecrets]:
    """The secrets of declared MCP servers, by label."""
    return {
        tool.server_label: ToolSecrets(tool.authorization, tool.headers, tool.server_url)
        for tool in tools
        if isinstance(tool, McpTool) and (tool.authorization or tool.headers or tool.server_url)
    }


def without_secrets(tools: Sequence[AnyTool], declared: Sequence[Raw]) -> list[Raw]:
    """Declarations without their secrets; `tools` are the same, decoded."""
    return [_stripped(raw) if isinstance(tool, McpTool) else raw for tool, raw in zip(tools, declared, strict=True)]


def _stripped(declared: Raw) -> Raw:
    fields = _KEYS.decode(declared)
    for name in ToolSecrets.__struct_fields__:
        fields.pop(name, None)
    return Raw(msgspec.json.encode(fields))


def _prompted_keys(request: CreateResponse) -> dict[str, Raw]:
    """The keys that a prompt or an agent may set, and the prompt without its variables."""
    body = request.body
    if not body.prompt and not request.agent:
        return {}
    values = {name: getattr(body, name) for name in PromptParameters.__struct_fields__}
    values["prompt"] = body.prompt and replace(body.prompt, variables=None)
    return {name: Raw(msgspec.json.encode(value)) for name, value in values.items() if value is not None}


def with_secrets(tools: Sequence[AnyTool], secrets: Mapping[str, ToolSecrets]) -> list[AnyTool]:
    """Tools with their secrets put back."""
    made: list[AnyTool] = []
    for tool in tools:
        if isinstance(tool, McpTool) and (held := secrets.get(tool.server_label)):
            made.append(replace(tool, **asdict(held)))
        else:
            made.append(tool)
    return made


def decode_keys(raw: bytes) -> dict[str, Raw]:
    """The top-level keys of a body. Raises InvalidRequest."""
    if not raw:
        raise InvalidRequest("We could not parse the JSON body of your request: it is empty.")
    return decode(_KEYS, raw)


def mend_surrogates(raw: bytes) -> bytes:
    r"""Escapes of half a surrogate pair (`\ud83d` alone), which tool outputs cut in the middle contain, become U+FFFD."""
    if b"\\ud" not in raw and b"\\uD" not in raw:
        return raw
    return _ESCAPES.sub(lambda found: rb"\ufffd" if len(found[0]) == _LONE_SURROGATE_CHARS else found[0], raw)


def is_model_name(name: str) -> bool:
    """Whether this can be a model's name."""
    return 0 < len(name) <= ID_CHARS_MAX and "\0" not in name


def named_model(name: str | None) -> str:
    """The model that a request names. Raises InvalidParameter."""
    if not name:
        raise missing("model")
    if not is_model_name(name):
        raise InvalidParameter(
            f"Invalid value for 'model': expected at most {ID_CHARS_MAX} characters, none of them NUL.", param="model"
        )
    return name


def _decode_input(body: Body) -> list[AnyItem]:
    given = decode(_INPUT, body.input, "input")
    continues = body.previous_response_id is not None or body.conversation is not None
    if given is None:
        if not continues and body.instructions is None and body.prompt is None:
            raise missing("input")
        return []
    if isinstance(given, str):
        if len(given) > INPUT_CHARS_MAX:
            raise InvalidParameter(f"'input' is longer than {INPUT_CHARS_MAX} characters.", param="input")
        return [Message(role="user", content=[InputText(text=given)])]
    if not given and not continues and not body.instructions and body.prompt is None:
        raise InvalidParameter("Invalid 'input': it holds no items.", param="input", code="empty_array")
    items = [decode_item(item, f"input[{index}]") for index, item in enumerate(given)]
    for index, item in enumerate(items[:-1]):
        if isinstance(item, CompactionTrigger):
            raise InvalidParameter(
                f"Invalid value for 'input[{index}]': a compaction trigger must be the last item of the input.",
                param=f"input[{index}]",
            )
    return items


def _refuse_unsupported(body: Body) -> None:
    """Parameters of the API that this server does not offer; harmless values of them pass."""
    refused: dict[str, bool] = {
        "moderation": given(body.moderation),
        "multi_agent": given(body.multi_agent),
        "image.context_compression": body.image is not None and body.image.context_compression == "enabled",
        "access_programs.cyber": body.access_programs is not None
        and body.access_programs.cyber not in {None, "standard"},
        "reasoning.mode": body.reasoning is not None and body.reasoning.mode not in {UNSET, None, "standard"},
    }
    for name, is_refused in refused.items():
        if is_refused:
            raise UnsupportedParameter(f"Unsupported parameter: '{name}' is not supported by this server.", param=name)
    if body.conversation is not None and body.previous_response_id is not None:
        raise InvalidParameter(
            "Mutually exclusive parameters: give 'previous_response_id' or 'conversation', not both.",
            param="conversation",
            code="mutually_exclusive_parameters",
        )
    if body.background and body.store is False:
        raise UnsupportedParameter("Background responses need 'store' to be true.", param="background")
    if body.stream_options is not None and not body.stream:
        raise InvalidParameter("'stream_options' is only allowed when 'stream' is true.", param="stream_options")
    check_metadata(body.metadata or {})


def check_metadata(metadata: Metadata) -> None:
    """Raises InvalidParameter for what Postgres can't hold."""
    for key, value in metadata.items():
        if "\0" in key + value:
            raise InvalidParameter("'metadata' may not contain NUL characters.", param="metadata")


def given(raw: Raw) -> bool:
    """Whether a raw parameter has a value."""
    return bytes(raw) not in {b"null", b"[]", b"{}"}
