"""Chat request → create request: its messages as items, its tools and parameters under their names in the Responses API.

`domain/messages.py` makes the same messages of the items again, so that an upstream gets them as the client has sent them.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from msgspec import UNSET, Raw

from app.domain.client_tools import client_tool_of
from app.errors import ApiError, UnsupportedParameter
from app.wire.chat_requests import (
    AnyMessage,
    AnyPart,
    AssistantMessage,
    AudioPart,
    ChatBody,
    ChatCustomTool,
    ChatFunction,
    ChatGrammar,
    ChatRequest,
    ChatSchemaFormat,
    Chosen,
    Declared,
    FilePart,
    ImagePart,
    RefusalPart,
    TextPart,
    ToolCall,
    ToolMessage,
    WebSearchOptions,
)
from app.wire.decoding import decode, missing
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
    InputText,
    Message,
    OutputText,
    Reasoning,
    ReasoningText,
    Refusal,
)
from app.wire.requests import (
    NOTHING,
    AnyFormat,
    Body,
    CreateResponse,
    JsonSchemaFormat,
    ReasoningConfig,
    StreamOptions,
    TextConfig,
)
from app.wire.tools import (
    AnyTool,
    CustomTool,
    FreeText,
    FunctionTool,
    Grammar,
    HostedTool,
    McpTool,
    NamespaceTool,
    ToolChoice,
    decode_tool,
    decode_tool_choice,
)

NAMES = {
    "input": "messages",
    "text.format": "response_format",
    "text.verbosity": "verbosity",
    "reasoning.effort": "reasoning_effort",
    "max_output_tokens": "max_completion_tokens",
}
"""Parameters of the Responses API that errors name, and their names in Chat Completions."""

ALLOWED = "tool_choice.allowed_tools"
"""Where Chat Completions have what stands in `tool_choice` otherwise."""

_SAME = (
    "temperature top_p frequency_penalty presence_penalty top_logprobs parallel_tool_calls stream metadata service_tier "
    "prompt_cache_key prompt_cache_options prompt_cache_retention safety_identifier user previous_response_id agent run_limits"
).split()
"""Parameters that both APIs have under one name."""

_TO_UPSTREAM = ("stop", "seed", "logit_bias")
"""Those that the Responses API does not have: they go to the upstream as they are."""

_ITEM = re.compile(r"input\[(?P<index>\d+)\](?P<rest>.*)", re.DOTALL)


def create_request(chat: ChatRequest) -> CreateResponse:
    """The create request that makes a chat completion. Raises InvalidRequest for tools that Chat Completions can't carry."""
    body = chat.body
    extra = {
        name: Raw(msgspec.json.encode(value)) for name in _TO_UPSTREAM if (value := getattr(body, name)) is not None
    }
    return CreateResponse(
        body=Body(
            **{name: getattr(body, name) for name in _SAME},
            model=chat.model,
            tools=body.tools,
            tool_choice=body.tool_choice,
            conversation=chat.conversation_id,
            # Without state nothing stays, unless the client asks for it.
            store=chat.is_stateful if body.store is None else body.store,
            max_output_tokens=body.max_completion_tokens or body.max_tokens,
            include=["message.output_text.logprobs"] if body.logprobs else None,
            text=_text(body),
            reasoning=ReasoningConfig(effort=body.reasoning_effort) if body.reasoning_effort else None,
            stream_options=StreamOptions(body.stream_options.include_obfuscation) if body.stream_options else None,
        ),
        model=chat.model,
        input=[item for _, item in _items(chat.messages)],
        tools=_tools(body),
        tool_choice=_choice(body.tool_choice),
        extra=extra | chat.extra,
        size=chat.size,
        is_chat=True,
    )


def renamed(error: ApiError, chat: ChatRequest) -> ApiError:
    """An error of the create request as one of its chat request."""
    if error.param is None:
        return error
    named = NAMES.get(error.param, error.param)
    if named == "conversation" and chat.body.conversation_id is not None:
        named = "conversation_id"
    if named == "max_completion_tokens" and chat.body.max_completion_tokens is None:
        named = "max_tokens"
    if found := _ITEM.fullmatch(error.param):
        named = "messages" + _place(chat.messages, int(found["index"]), found["rest"])
    if error.param.startswith("tool_choice.tools"):
        named = ALLOWED + error.param.removeprefix("tool_choice")
    searching = f"tools[{len(chat.body.tools or ())}]"  # where the create request has `web_search_options`
    if error.param.startswith(searching):
        named = "web_search_options" + error.param.removeprefix(searching).removesuffix(".type")
    error.message = error.message.replace(f"'{error.param}'", f"'{named}'")
    error.param = named
    return error


_PART_KEYS = {"file_id": "file.file_id", "file_data": "file.file_data", "image_url": "image_url.url"}
"""The key of a part's content → where Chat Completions have it."""


def _place(messages: Sequence[AnyMessage], index: int, rest: str) -> str:
    """Where in the messages the item of this number comes from."""
    place = next((place for at, (place, _) in enumerate(_items(messages)) if at == index), None)
    if place is None:
        return ""
    path, dot, key = rest.replace(".output", ".content", 1).rpartition(".")
    return f"[{place}]{path}{dot}{_PART_KEYS.get(key, key)}"


# -- Messages ----------------------------------------------------------------------------------------------------------------


def _items(messages: Sequence[AnyMessage]) -> Iterator[tuple[int, AnyItem]]:
    """The items of messages, each with the number of its message."""
    custom: set[str] = set()
    before: AnyMessage | None = None
    for number, message in enumerate(messages):
        match message:
            case AssistantMessage():
                custom.update(call.id for call in message.tool_calls or () if call.type == "custom")
                items = _assistant(message, follows=isinstance(before, AssistantMessage))
            case ToolMessage():
                items = [_output(message, is_custom=message.tool_call_id in custom)]
            case _:
                role: Any = message.__struct_config__.tag
                items = [Message(role=role, content=_content(message.content), name=message.name or UNSET)]
        yield from ((number, item) for item in items)
        before = message


def _assistant(message: AssistantMessage, *, follows: bool) -> list[AnyItem]:
    """Reasoning, text and calls of one message. Calls alone would become part of a message that they follow: then an empty text keeps
    them apart."""
    items: list[AnyItem] = []
    if reasoning := message.reasoning_content or message.reasoning:
        items.append(Reasoning(content=[ReasoningText(text=reasoning)]))
    parts: list[Content] = []
    if isinstance(message.content, str):
        parts.append(OutputText(text=message.content))
    else:
        parts += [_part(part, OutputText) for part in message.content or ()]
    if message.refusal:
        parts.append(Refusal(refusal=message.refusal))
    if parts or not message.tool_calls or (follows and not reasoning):
        items.append(Message(role="assistant", content=parts, name=message.name or UNSET))
    return [*items, *map(_call, message.tool_calls or ())]


def _call(call: ToolCall) -> AnyItem:
    if call.custom and call.type == "custom":
        return CustomToolCall(call_id=call.id, name=call.custom.name, input=call.custom.input)
    assert call.function
    return FunctionCall(call_id=call.id, name=call.function.name, arguments=call.function.arguments)


def _output(message: ToolMessage, *, is_custom: bool) -> AnyItem:
    output = _content(message.content)
    if is_custom:
        return CustomToolCallOutput(call_id=message.tool_call_id, output=output)
    return FunctionCallOutput(call_id=message.tool_call_id, output=output, name=message.name or UNSET)


def _content(content: str | Sequence[AnyPart]) -> str | list[Content]:
    return content if isinstance(content, str) else [_part(part, InputText) for part in content]


def _part(part: AnyPart, text: type[InputText] | type[OutputText]) -> Content:
    match part:
        case TextPart():
            return text(text=part.text)
        case RefusalPart():
            return Refusal(refusal=part.refusal)
        case ImagePart(image_url=image):
            return InputImage(image_url=image.url, detail=image.detail or "auto")
        case AudioPart():
            return InputAudio(input_audio=part.input_audio)
        case FilePart(file=file):
            return InputFile(
                file_data=file.file_data or UNSET, file_id=file.file_id or UNSET, filename=file.filename or UNSET
            )


# -- Tools and parameters ----------------------------------------------------------------------------------------------------

_DECLARED = msgspec.json.Decoder(Declared)
_CHOSEN = msgspec.json.Decoder(Chosen)
_FUNCTION = msgspec.json.Decoder(ChatFunction)
_CUSTOM = msgspec.json.Decoder(ChatCustomTool)


def _tools(body: ChatBody) -> list[AnyTool]:
    tools = [_tool(raw, f"tools[{index}]") for index, raw in enumerate(body.tools or ())]
    return tools if body.web_search_options is None else [*tools, _web_search(body.web_search_options)]


def _tool(raw: Raw, at: str) -> AnyTool:
    declared = decode(_DECLARED, raw, at)
    type_ = declared.type
    if type_ in {"function", "custom"} and getattr(declared, type_) == NOTHING:
        raise missing(f"{at}.{type_}")
    if type_ == "function":
        function = decode(_FUNCTION, raw, at).function
        return FunctionTool(function.name, function.description, function.parameters, function.strict)
    if type_ == "custom":
        custom = decode(_CUSTOM, raw, at).custom
        return CustomTool(custom.name, custom.description or UNSET, _format(custom.format))
    tool = decode_tool(raw, at)
    refuse_uncarried(tool, at)
    return tool


def is_carried(tool: AnyTool) -> bool:
    """Whether Chat Completions can carry the calls of a tool, or this server makes them."""
    return not (isinstance(tool, NamespaceTool) or (isinstance(tool, HostedTool) and client_tool_of(tool)))


def refuse_uncarried(tool: AnyTool, at: str) -> None:
    """Raises UnsupportedParameter for a tool whose calls Chat Completions can't carry."""
    if not is_carried(tool):
        type_ = tool.type if isinstance(tool, HostedTool) else "namespace"
        raise UnsupportedParameter(
            f"Tools of type '{type_}' that the client runs are not supported in Chat Completions.", param=f"{at}.type"
        )
    if isinstance(tool, McpTool) and tool.require_approval != "never":
        raise UnsupportedParameter(
            "Chat Completions has no approvals: 'require_approval' must be 'never'.", param=f"{at}.require_approval"
        )


def _format(format: ChatGrammar | FreeText | None) -> Any:
    if isinstance(format, ChatGrammar):
        return Grammar(format.grammar.syntax, format.grammar.definition)
    return format or UNSET


def _web_search(options: WebSearchOptions) -> AnyTool:
    fields: dict[str, Any] = {"type": "web_search"}
    if options.search_context_size:
        fields["search_context_size"] = options.search_context_size
    if options.user_location:
        near = msgspec.to_builtins(options.user_location.approximate)
        fields["user_location"] = {"type": "approximate", **near}
    return HostedTool("web_search", fields)


def _choice(raw: Raw) -> ToolChoice:
    """`tool_choice` as the Responses API has it: what is nested is flat there."""
    if not bytes(raw).startswith(b"{"):
        return decode_tool_choice(raw)
    chosen = decode(_CHOSEN, raw, "tool_choice")
    if chosen.type != "allowed_tools":
        return decode_tool_choice(_flat(raw, chosen, "tool_choice"))
    if chosen.allowed_tools is None:
        raise missing("tool_choice.allowed_tools")
    at = f"{ALLOWED}.tools"
    tools = [
        _flat(one, decode(_CHOSEN, one, f"{at}[{index}]"), f"{at}[{index}]")
        for index, one in enumerate(chosen.allowed_tools.tools)
    ]
    flat = {"type": "allowed_tools", "mode": chosen.allowed_tools.mode, "tools": tools}
    return decode_tool_choice(Raw(msgspec.json.encode(flat)), ALLOWED)


def _flat(raw: Raw, chosen: Chosen, at: str) -> Raw:
    if chosen.type not in {"function", "custom"}:
        return raw
    named = chosen.function if chosen.type == "function" else chosen.custom
    if named is None:
        raise missing(f"{at}.{chosen.type}")
    return Raw(msgspec.json.encode({"type": chosen.type, "name": named.name}))


def _text(body: ChatBody) -> TextConfig | None:
    if body.response_format is None and body.verbosity is None:
        return None
    return TextConfig(format=_response_format(body), verbosity=body.verbosity)


def _response_format(body: ChatBody) -> AnyFormat | None:
    if not isinstance(body.response_format, ChatSchemaFormat):
        return body.response_format
    schema = body.response_format.json_schema
    return JsonSchemaFormat(
        name=schema.name, schema=schema.schema, description=schema.description, strict=schema.strict
    )
