"""Items and their content parts: what contexts are made of.

An item is input and output at once, so one Struct serves both. `type` is absent on plain messages, and an object with an
`id` and no `role` is a reference; `decode_item` looks before it decodes. Item types that we do not read (a hosted tool's
call in a replayed history, or what a newer version of the API has) are `OpaqueItem`s: they are kept, stored and listed as they came,
those of known types once their keys are checked.

Optional fields are `UNSET`, never null, where strict clients reject a null.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeGuard, get_args

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType, field

from app.errors import InvalidParameter, InvalidRequest, UnsupportedParameter
from app.wire.carried import (
    CARRIED,
    Annotation,
    Caller,
    CodeOutput,
    FileSearchResult,
    ImageError,
    Logprob,
    PromptCacheBreakpoint,
    SvgUsage,
    WebSearchAction,
    check_keys,
)
from app.wire.decoding import Json, decode, did_you_mean, missing, not_among
from app.wire.hosted_tools import HOSTED
from app.wire.keys import may_be_newer, nearest, without_unknown
from app.wire.tools import (
    TOOL_TYPES,
    AnyTool,
    ListedTool,
    McpTool,
    check_declarations,
    client_tools_in,
    decode_tools,
    encode_tools,
)

Role = Literal["user", "assistant", "system", "developer"]
ItemStatus = Literal[
    "in_progress", "completed", "incomplete", "failed", "calling", "searching", "interpreting", "generating"
]
Detail = Literal["low", "high", "auto", "original"]
CALL_ID_CHARS_MAX = 64
"""The API takes no longer call ids."""
SEALED_CHARS_MAX = 10_485_760
"""The API's own limit of a compaction item's content."""
DUMPED_ASYNC = "async_"
"""What `model_dump()` of the official client calls `async`; it is null unless a call is asynchronous, and is not kept."""


class Part(Struct, tag_field="type", kw_only=True, forbid_unknown_fields=True):
    """A content part inside a message, a tool output or a reasoning item."""


class InputText(Part, tag="input_text"):
    text: str
    prompt_cache_breakpoint: PromptCacheBreakpoint | UnsetType | None = UNSET


class InputImage(Part, tag="input_image"):
    image_url: str | None = None
    file_id: str | UnsetType | None = UNSET
    detail: Detail | None = "auto"
    prompt_cache_breakpoint: PromptCacheBreakpoint | UnsetType | None = UNSET


class InputFile(Part, tag="input_file"):
    file_data: str | UnsetType | None = UNSET
    file_id: str | UnsetType | None = UNSET
    file_url: str | UnsetType | None = UNSET
    filename: str | UnsetType | None = UNSET
    detail: Detail | UnsetType | None = UNSET
    prompt_cache_breakpoint: PromptCacheBreakpoint | UnsetType | None = UNSET


class Audio(Struct, forbid_unknown_fields=True):
    data: str
    format: str


class InputAudio(Part, tag="input_audio"):
    """The hosted API has `input_audio` only."""

    input_audio: Audio | UnsetType = UNSET
    audio_url: str | UnsetType | None = UNSET
    file_id: str | UnsetType | None = UNSET


class OutputText(Part, tag="output_text"):
    text: str
    annotations: list[Raw] = []
    logprobs: list[Raw] | UnsetType | None = UNSET


class Refusal(Part, tag="refusal"):
    refusal: str


class ReasoningText(Part, tag="reasoning_text"):
    text: str


class SummaryText(Part, tag="summary_text"):
    text: str


class PlainText(Part, tag="text"):
    text: str


Content = (
    InputText | InputImage | InputFile | InputAudio | OutputText | Refusal | ReasoningText | SummaryText | PlainText
)


class Item(Struct, tag_field="type", kw_only=True, forbid_unknown_fields=True):
    """An element of contexts; `id` is empty only until the server gives one. The other key is carried for clients."""

    id: str = ""
    internal_chat_message_metadata_passthrough: Any = UNSET


class Message(Item, tag="message"):
    """`name` distinguishes participants of one role; of the hosted API only Chat Completions has this key."""

    role: Role
    content: list[Content] | str
    name: str | UnsetType | None = UNSET
    status: ItemStatus | UnsetType | None = UNSET
    phase: str | UnsetType | None = UNSET


class PromptedMessage(Struct, tag_field="type", tag="message"):
    """A message of a prompt, in the place of instructions. It is no item, so it has no id."""

    role: Role
    content: list[Content]


class FunctionCall(Item, tag="function_call"):
    call_id: str
    name: str
    arguments: str
    namespace: str | UnsetType | None = UNSET
    status: ItemStatus | UnsetType | None = UNSET
    asynchronous: bool | UnsetType | None = field(default=UNSET, name="async")
    dumped: UnsetType | None = field(default=UNSET, name=DUMPED_ASYNC)
    caller: Caller | UnsetType | None = UNSET
    created_by: str | UnsetType | None = UNSET


class FunctionCallOutput(Item, tag="function_call_output"):
    call_id: str
    output: str | list[Content]
    status: ItemStatus | UnsetType | None = UNSET
    name: str | UnsetType | None = UNSET
    namespace: str | UnsetType | None = UNSET
    caller: Caller | UnsetType | None = UNSET
    created_by: str | UnsetType | None = UNSET


class CustomToolCall(Item, tag="custom_tool_call"):
    call_id: str
    name: str
    input: str
    namespace: str | UnsetType | None = UNSET
    status: ItemStatus | UnsetType | None = UNSET
    asynchronous: bool | UnsetType | None = field(default=UNSET, name="async")
    dumped: UnsetType | None = field(default=UNSET, name=DUMPED_ASYNC)
    caller: Caller | UnsetType | None = UNSET
    created_by: str | UnsetType | None = UNSET


class CustomToolCallOutput(Item, tag="custom_tool_call_output"):
    call_id: str
    output: str | list[Content]
    status: ItemStatus | UnsetType | None = UNSET
    caller: Caller | UnsetType | None = UNSET
    created_by: str | UnsetType | None = UNSET


class Reasoning(Item, tag="reasoning"):
    summary: list[SummaryText] = []
    content: list[ReasoningText] | UnsetType | None = UNSET
    encrypted_content: str | UnsetType | None = UNSET
    status: ItemStatus | UnsetType | None = UNSET


class McpListTools(Item, tag="mcp_list_tools"):
    """The tools of an MCP server; while it is in the context they are not listed again."""

    server_label: str
    tools: list[ListedTool] = []
    error: str | UnsetType | None = UNSET


class McpApprovalRequest(Item, tag="mcp_approval_request"):
    """A call that waits for the client's approval."""

    server_label: str
    name: str
    arguments: str


class McpApprovalResponse(Item, tag="mcp_approval_response"):
    approval_request_id: str
    approve: bool
    reason: str | UnsetType | None = UNSET


class CallError(Struct, omit_defaults=True, forbid_unknown_fields=True):
    """Why a call failed: `http_error` and `mcp_protocol_error` have code and message, `mcp_tool_execution_error` content."""

    type: str
    code: int | UnsetType = UNSET
    message: str | UnsetType = UNSET
    content: Any = UNSET


class McpCall(Item, tag="mcp_call"):
    """A call of an MCP server's tool, with its output or error. Histories of older servers have a string as error. `images` are
    kept for models that see them; the hosted API does not have this key."""

    server_label: str
    name: str
    arguments: str
    output: str | None = None
    error: CallError | str | None = None
    approval_request_id: str | None = None
    status: ItemStatus | UnsetType | None = UNSET
    images: list[InputImage] | UnsetType | None = UNSET


class WebSearchCall(Item, tag="web_search_call"):
    """`results` are what the model read; readers see them, and the sources in `action`, where `include` asks for them."""

    status: ItemStatus = "completed"
    action: Json | UnsetType | None = UNSET
    results: list[Json] | UnsetType | None = UNSET


class FileSearchCall(Item, tag="file_search_call"):
    """`results` are what the model read; readers see them where `include` asks for them."""

    status: ItemStatus = "completed"
    queries: list[str] = []
    results: list[Json] | None = None


class CodeInterpreterCall(Item, tag="code_interpreter_call"):
    """`outputs` are what the model read; readers see them where `include` asks for them."""

    status: ItemStatus = "completed"
    code: str | None = None
    container_id: str = ""
    outputs: list[Json] | None = None


class ImageGenerationCall(Item, tag="image_generation_call"):
    """`result` is the image in base64."""

    status: ItemStatus = "completed"
    result: str | None = None
    output_format: str | UnsetType | None = UNSET
    quality: str | UnsetType | None = UNSET
    size: str | UnsetType | None = UNSET
    background: str | UnsetType | None = UNSET
    revised_prompt: str | UnsetType | None = UNSET
    action: str | UnsetType | None = UNSET
    svg_usage: Json | UnsetType | None = UNSET
    error: Json | UnsetType | None = UNSET


class ItemReference(Item, tag="item_reference"):
    """Stands for a stored item; never stored itself."""


class AdditionalTools(Item, tag="additional_tools"):
    """Tools that join the toolbox from this point of the context on."""

    role: str = "developer"
    tools: list[AnyTool] = []


class Compaction(Item, tag="compaction"):
    """Stands for all of the context before it. `encrypted_content` is the sealed summary; empty if that was broken off, and then
    the item stands for nothing. `summary` is for readers that ask for it; the hosted API does not have this key."""

    encrypted_content: Annotated[str, Meta(max_length=SEALED_CHARS_MAX)]
    summary: str | UnsetType | None = UNSET
    created_by: str | UnsetType | None = UNSET


class CompactionTrigger(Item, tag="compaction_trigger"):
    """The last item of an input: it asks for a compaction instead of an answer. Never stored itself."""


class OpaqueItem(Struct):
    """An item that we carry and do not read: `fields` is its whole object, `type` and `id` included."""

    id: str
    type: str
    fields: Json


AnyItem = (
    Message
    | FunctionCall
    | FunctionCallOutput
    | CustomToolCall
    | CustomToolCallOutput
    | Reasoning
    | McpListTools
    | McpApprovalRequest
    | McpApprovalResponse
    | McpCall
    | WebSearchCall
    | FileSearchCall
    | CodeInterpreterCall
    | ImageGenerationCall
    | ItemReference
    | AdditionalTools
    | Compaction
    | CompactionTrigger
    | OpaqueItem
)

ServerCallItem = McpCall | WebSearchCall | FileSearchCall | CodeInterpreterCall | ImageGenerationCall
"""Calls that the server runs; each carries its own result."""

PHASES = ("commentary", "final_answer")

ID_CHARS_MAX = 512
"""Longer ids do not fit into an index; those of other servers are some hundred characters long."""


class _Peek(Struct):
    type: Any = UNSET
    role: Any = None
    id: Any = UNSET


class _RawAdditionalTools(Struct, tag_field="type", tag="additional_tools", forbid_unknown_fields=True):
    id: str = ""
    role: str = "developer"
    tools: list[Raw] = []


_PEEK = msgspec.json.Decoder(_Peek)
_STRUCTS: tuple[type[Item], ...] = (
    Message,
    FunctionCall,
    FunctionCallOutput,
    CustomToolCall,
    CustomToolCallOutput,
    Reasoning,
    McpListTools,
    McpApprovalRequest,
    McpApprovalResponse,
    McpCall,
    WebSearchCall,
    FileSearchCall,
    CodeInterpreterCall,
    ImageGenerationCall,
    ItemReference,
    Compaction,
    CompactionTrigger,
)
# A tagged Struct decoded alone accepts a missing tag, which is what messages and references without `type` need.
_DECODERS: dict[str, msgspec.json.Decoder[Any]] = {
    str(struct.__struct_config__.tag): msgspec.json.Decoder(struct) for struct in _STRUCTS
}
_KNOWN = (*_DECODERS, "additional_tools", *CARRIED)
_ELSEWHERE = frozenset(
    {"image_url", *(str(part.__struct_config__.tag) for part in get_args(Content)), *TOOL_TYPES, *HOSTED}
)
"""Types of content parts and tools: an item of such a type is a mistake, and not one of a newer version."""

_OPAQUE = msgspec.json.Decoder(Json)
_ADDITIONAL_TOOLS = msgspec.json.Decoder(_RawAdditionalTools)


def decode_item(raw: bytes | Raw, at: str = "") -> AnyItem:
    """One item of an `input` array. Raises InvalidParameter with the path below `at`."""
    item = _decode_item(raw, at)
    _check_carried(item, at)
    if isinstance(item, FunctionCall | CustomToolCall | McpCall | McpApprovalRequest) and not item.name:
        raise InvalidParameter(f"Invalid value for '{at}.name': it is empty.", param=f"{at}.name")
    if not isinstance(item, ItemReference):
        _check_id(item.id, f"{at}.id")
    call_id = getattr(item, "call_id", None)
    if call_id is not None and not 0 < len(call_id) <= CALL_ID_CHARS_MAX:
        raise InvalidParameter(
            f"Invalid value for '{at}.call_id': expected 1 to {CALL_ID_CHARS_MAX} characters.", param=f"{at}.call_id"
        )
    if isinstance(item, Message) and item.phase and item.phase not in PHASES:
        raise not_among(f"{at}.phase", item.phase, PHASES)
    return item


def _check_id(id: str, path: str) -> None:
    """An id must have its place in URLs. Clients resend ids of other servers, so it may be of any form."""
    if len(id) > ID_CHARS_MAX or "\0" in id:
        raise InvalidParameter(
            f"Invalid value for '{path}': expected at most {ID_CHARS_MAX} characters, none of them NUL.", param=path
        )
    if "/" in id or id in {".", ".."}:
        raise InvalidParameter(
            f"Invalid value for '{path}': an id may not contain '/', or be '.' or '..', since it is a part of URLs.",
            param=path,
        )


SHAPES: Mapping[type[Item], Mapping[str, Any]] = {
    WebSearchCall: {"action": WebSearchAction},
    FileSearchCall: {"results": list[FileSearchResult]},
    CodeInterpreterCall: {"outputs": list[CodeOutput]},
    ImageGenerationCall: {"error": ImageError, "svg_usage": SvgUsage},
}
"""What is carried at the keys of items that are read."""

_OUTPUT_TEXT: Mapping[str, msgspec.json.Decoder[Any]] = {
    "annotations": msgspec.json.Decoder(Annotation),
    "logprobs": msgspec.json.Decoder(Logprob),
}


def _check_carried(item: AnyItem, at: str) -> None:
    """Raises InvalidParameter for an unknown key in what an item carries."""
    match item:
        case Message(content=list(parts)):
            for index, part in enumerate(parts):
                if isinstance(part, OutputText) and (part.annotations or part.logprobs):
                    _check_output_text(part, f"{at}.content[{index}]")
        case OpaqueItem(type="tool_search_output"):
            check_keys(item.fields, CARRIED[item.type], at)
            check_declarations(item.fields.get("tools") or (), f"{at}.tools")
        case OpaqueItem():
            if not is_unknown(item):
                check_keys(item.fields, CARRIED[item.type], at)
        case _:
            for key, shape in SHAPES.get(type(item), {}).items():
                if carried := getattr(item, key):
                    check_keys(carried, shape, f"{at}.{key}")


def _check_output_text(part: OutputText, at: str) -> None:
    for key, decoder in _OUTPUT_TEXT.items():
        for index, carried in enumerate(getattr(part, key) or ()):
            decode(decoder, carried, f"{at}.{key}[{index}]")


def decode_stored_item(raw: bytes | Raw) -> AnyItem:
    """An item that a server has stored, perhaps one of a newer version: keys that are unknown here are left out."""
    try:
        return _decode_item(raw, "", is_stored=True)
    except InvalidRequest:
        fields = _OPAQUE.decode(raw)
        if decoder := _DECODERS.get(str(fields.get("type", "message"))):
            return _decode_item(msgspec.json.encode(without_unknown(fields, decoder.type)), "")
        return OpaqueItem(id=str(fields.get("id") or ""), type=str(fields.get("type")), fields=fields)


def _decode_item(raw: bytes | Raw, at: str, *, is_stored: bool = False) -> AnyItem:
    """`is_stored` for what has been checked: any other type is an unknown one then, and no mistake."""
    peek = decode(_PEEK, raw, at)
    type_ = peek.type
    if not isinstance(peek.id, str | UnsetType | None):
        raise InvalidParameter(f"Invalid type for '{at}.id': expected a string.", param=f"{at}.id", code="invalid_type")
    if type_ == "item_reference" and not isinstance(peek.id, str):
        raise missing(f"{at}.id")
    if type_ is None or peek.id is None:
        raw = _without_nulls(raw)
    if type_ is None or type_ is UNSET:
        type_ = "item_reference" if peek.role is None and isinstance(peek.id, str) else "message"
    if not isinstance(type_, str):
        raise InvalidParameter(
            f"Invalid type for '{at}.type': expected a string.", param=f"{at}.type", code="invalid_type"
        )
    if decoder := _DECODERS.get(type_):
        item: AnyItem = decode(decoder, raw, at)
        return item
    if type_ == "additional_tools":
        tools = decode(_ADDITIONAL_TOOLS, raw, at)
        return AdditionalTools(id=tools.id, role=tools.role, tools=_added_tools(tools.tools, f"{at}.tools"))
    if is_stored or type_ in CARRIED or (type_ not in _ELSEWHERE and may_be_newer(type_, _KNOWN)):
        fields = decode(_OPAQUE, raw, at)
        return OpaqueItem(id=str(fields.get("id") or ""), type=type_, fields=fields)
    hint = did_you_mean(nearest(type_, _KNOWN))
    raise UnsupportedParameter(f"Items of type '{type_}' are not supported by this server.{hint}", param=f"{at}.type")


def _added_tools(raws: list[Raw], at: str) -> list[AnyTool]:
    """Items are stored as they are, and an MCP server's declaration may hold secrets."""
    tools = decode_tools(raws, at)
    for index, tool in enumerate(tools):
        if isinstance(tool, McpTool):
            raise UnsupportedParameter(
                "MCP servers can't be added by an item; declare them in 'tools'.", param=f"{at}[{index}].type"
            )
    return tools


def _without_nulls(raw: bytes | Raw) -> bytes:
    """References may have a null `type`, which a tagged Struct does not take, and any item that has no id yet a null `id`."""
    keys = msgspec.json.decode(raw, type=dict[str, Raw])
    return msgspec.json.encode(
        {key: value for key, value in keys.items() if key not in {"type", "id"} or bytes(value) != b"null"}
    )


def encode_item(item: AnyItem) -> bytes:
    """The item's JSON, as it is stored, listed and sent."""
    if isinstance(item, AdditionalTools):
        fields = msgspec.to_builtins(msgspec.structs.replace(item, tools=[]))
        return msgspec.json.encode({**fields, "tools": encode_tools(item.tools)})
    return msgspec.json.encode(item.fields if isinstance(item, OpaqueItem) else item)


def encode_items(items: Sequence[AnyItem]) -> list[tuple[str, bytes]]:
    """Each item's id and JSON."""
    return [(item.id, encode_item(item)) for item in items]


def type_of(item: AnyItem) -> str:
    """The item's `type`."""
    return item.type if isinstance(item, OpaqueItem) else str(item.__struct_config__.tag)


def is_unknown(item: AnyItem) -> TypeGuard[OpaqueItem]:
    """Whether an item is of a type that this version does not know: it is kept, and the model does not see it."""
    return isinstance(item, OpaqueItem) and item.type not in CARRIED


def call_id_of(item: AnyItem) -> str:
    """The `call_id` of a call or its output; empty for any other item."""
    call_id = item.fields.get("call_id") if isinstance(item, OpaqueItem) else getattr(item, "call_id", "")
    return call_id if isinstance(call_id, str) else ""


def tools_added_by(item: AnyItem) -> Sequence[AnyTool]:
    """The tools that may be called from an item on: those that it adds, or that the client's search has found."""
    if isinstance(item, AdditionalTools):
        return item.tools
    if isinstance(item, OpaqueItem) and item.type == "tool_search_output":
        return client_tools_in(item.fields.get("tools") or ())
    return ()


def screenshot_of(item: AnyItem) -> InputImage | None:
    """The image in the output of a computer call."""
    output = item.fields.get("output") if isinstance(item, OpaqueItem) else None
    url, file_id = (output.get("image_url"), output.get("file_id")) if isinstance(output, dict) else (None, None)
    if url and isinstance(url, str):
        return InputImage(image_url=url)
    return InputImage(file_id=file_id) if file_id and isinstance(file_id, str) else None


def with_id(item: AnyItem, id: str) -> AnyItem:
    """The same item with a server-given id."""
    if isinstance(item, OpaqueItem):
        return OpaqueItem(id=id, type=item.type, fields={**item.fields, "id": id})
    return msgspec.structs.replace(item, id=id)
