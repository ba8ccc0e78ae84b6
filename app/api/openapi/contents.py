"""What the raw JSON in the Structs of the wire format holds, and the unions that are open to newer types."""

from collections.abc import Iterable, Sequence
from functools import reduce
from operator import or_
from typing import Any, Literal, get_args

from msgspec import Struct, UnsetType

from app.api.openapi.schemas import Direction, Field, Schema, Schemas, exactly, name_of, pointer, reference
from app.api.openapi.shapes import PARTIAL, UpdateAgent
from app.domain.agents import CreateAgent
from app.domain.prompt_templates import PromptMessage
from app.wire import (
    agents,
    carried,
    chat_requests,
    compactions,
    completions,
    conversations,
    events,
    hosted_tools,
    items,
    requests,
    resources,
    tools,
)

ITEMS = tuple(one for one in get_args(items.AnyItem) if one is not items.OpaqueItem)
NEVER_SENT = (items.ItemReference, items.CompactionTrigger)
TOOLS = tuple(one for one in get_args(tools.AnyTool) if one is not tools.HostedTool)

NAMES: dict[type[Struct], str] = {
    requests.Body: "CreateResponse",
    requests.ConversationParam: "ConversationReference",
    requests.TextFormat: "PlainTextFormat",
    chat_requests.ChatBody: "CreateChatCompletion",
    chat_requests.UserLocation: "ChatUserLocation",
    completions.Completion: "ChatCompletion",
    completions.Chunk: "ChatCompletionChunk",
    carried.CARRIED["shell_call"]: "ShellCall",
    tools.ShownMcpTool: "McpTool",
    **{struct: f"{struct.__name__}Tool" for struct in hosted_tools.DECLARATIONS.values()},
    hosted_tools.DECLARATIONS["computer"]: "OtherHostedTool",
}
"""Names of components, where a Struct's own is too short beside those of others."""

PADDING = "obfuscation"
"""The key of padding, which `api/sse.py` adds."""

_REFUSED = exactly({"enum": [None, [], {}], "description": "Not supported: any other value is refused."})


def _array(type_: Any, *others: Any) -> Any:
    return reduce(or_, others, list[type_])


def contents(direction: Direction) -> dict[Field, Any]:
    """The types of fields of raw JSON, and of tags that may be left out."""
    item, tool, choice = (reference(name, direction) for name in ("Item", "Tool", "ToolChoice"))
    texts = str | items.InputText | items.InputImage | items.InputFile
    shared: dict[Field, Any] = {
        (items.AdditionalTools, "tools"): _array(tool),
        (items.OutputText, "annotations"): _array(carried.Annotation),
        (items.OutputText, "logprobs"): _array(carried.Logprob, UnsetType, None),
        (requests.PromptReference, "variables"): dict[str, texts] | None,
        (requests.AgentVariables, "variables"): dict[str, texts] | None,
        (tools.NamedTool, "type"): Literal[tools.CHOOSABLE],
    }
    for struct, shapes in items.SHAPES.items():
        shared |= {(struct, key): shape | UnsetType | None for key, shape in shapes.items()}
    return shared | (_received(item, tool, choice) if direction == "received" else _sent(item, tool, choice))


def _received(item: Any, tool: Any, choice: Any) -> dict[Field, Any]:
    chat_tool, chat_choice, chat_name = (
        reference(name, "received") for name in ("ChatTool", "ChatToolChoice", "ChatToolName")
    )
    types: dict[type[Struct], list[str]] = {}
    for type_, struct in hosted_tools.DECLARATIONS.items():
        types.setdefault(struct, []).append(type_)
    some = exactly(
        {"type": "array", "maxItems": conversations.ITEMS_MAX, "items": pointer(name_of("Item", "received"))}
    )
    create = {
        "input": _array(item, str, None),
        "tools": _array(tool, None),
        "tool_choice": choice | None,
        "moderation": _REFUSED,
        "multi_agent": _REFUSED,
    }
    return {
        **{(struct, name): type_ for struct in (requests.Body, *PARTIAL) for name, type_ in create.items()},
        **{(struct, "tools"): _array(tool, None) for struct in (CreateAgent, UpdateAgent)},
        **{(struct, "tool_choice"): choice | None for struct in (CreateAgent, UpdateAgent)},
        **{(struct, "id"): str | None for struct in ITEMS if struct is not items.ItemReference},
        (items.Message, "type"): Literal["message"] | None,
        (items.ItemReference, "type"): Literal["item_reference"] | None,
        (conversations.CreateConversation, "items"): some | None,
        (conversations.CreateItems, "items"): some,
        (chat_requests.ChatBody, "tools"): _array(chat_tool, None),
        (chat_requests.ChatBody, "tool_choice"): chat_choice | None,
        (chat_requests.ChosenTools, "tools"): _array(chat_name),
        **{(chat_requests.ChatBody, name): _REFUSED for name in ("audio", "functions", "function_call", "moderation")},
        **{(struct, "type"): Literal[tuple(names)] for struct, names in types.items()},
    }


def _sent(item: Any, tool: Any, choice: Any) -> dict[Field, Any]:
    part, annotation, logprobs = items.Content, carried.Annotation, _array(carried.Logprob)
    summary = items.SummaryText
    return {
        (resources.Response, "output"): _array(item),
        (resources.Response, "tools"): _array(tool),
        (resources.Response, "tool_choice"): choice,
        (resources.TextEcho, "format"): requests.AnyFormat,
        (agents.Agent, "instructions"): str | list[PromptMessage] | None,
        (agents.Agent, "tools"): _array(tool),
        (agents.Agent, "tool_choice"): choice | None,
        (conversations.Conversation, "metadata"): dict[str, str],
        (compactions.CompactedResponse, "output"): _array(item),
        (completions.Logprobs, "content"): logprobs,
        (events.ItemAdded, "item"): item,
        (events.ItemDone, "item"): item,
        (events.PartAdded, "part"): part,
        (events.PartDone, "part"): part,
        (events.TextDelta, "logprobs"): logprobs,
        (events.TextDone, "logprobs"): logprobs,
        (events.SummaryPartAdded, "part"): summary,
        (events.SummaryPartDone, "part"): summary,
        (events.AnnotationAdded, "annotation"): annotation,
    }


# -- Unions ------------------------------------------------------------------------------------------------------------------


def compose(schemas: Schemas) -> None:
    """Add the unions that `contents` refers to."""
    for direction in ("received", "sent"):
        _compose_items(schemas, direction)
        _compose_tools(schemas, direction)
        _compose_choice(schemas, direction)
    _compose_chat(schemas)
    _compose_events(schemas)


def _compose_items(schemas: Schemas, direction: Direction) -> None:
    known = [struct for struct in ITEMS if direction == "received" or struct not in NEVER_SENT]
    names = [schemas.add(struct, direction) for struct in known]
    names += [
        schemas.add(struct, direction, tag=type_, name=_camel(type_)) for type_, struct in carried.CARRIED.items()
    ]
    types = [str(struct.__struct_config__.tag) for struct in ITEMS] + [*carried.CARRIED]
    more = "An item of a type that this version does not know: it is kept and listed as it came, and the model does not see it."
    names.append(_unknown(schemas, name_of("UnknownItem", direction), types, more))
    schemas.compose(name_of("Item", direction), _union(names))


def _compose_tools(schemas: Schemas, direction: Direction) -> None:
    structs = [tools.ShownMcpTool if one is tools.McpTool and direction == "sent" else one for one in TOOLS]
    names = [schemas.add(struct, direction) for struct in structs]
    names += [schemas.add(struct, "received") for struct in dict.fromkeys(hosted_tools.DECLARATIONS.values())]
    types = [*tools.TOOL_TYPES, *hosted_tools.DECLARATIONS]
    more = "A tool of a type that this version does not know: it is echoed, and the model does not see it."
    names.append(_unknown(schemas, name_of("UnknownTool", direction), sorted(types), more))
    schemas.compose(name_of("Tool", direction), _union(names))


def _compose_choice(schemas: Schemas, direction: Direction) -> None:
    modes = {"type": "string", "enum": [*get_args(tools.ToolMode)]}
    named = [schemas.add(struct, direction) for struct in (tools.AllowedTools, tools.NamedTool)]
    schemas.compose(name_of("ToolChoice", direction), {"oneOf": [modes, *map(pointer, named)]})


def _compose_chat(schemas: Schemas) -> None:
    own = [schemas.add(struct, "received") for struct in (chat_requests.ChatFunction, chat_requests.ChatCustomTool)]
    mcp = schemas.add(tools.McpTool, "received")
    hosted = [schemas.add(struct, "received") for struct in dict.fromkeys(hosted_tools.DECLARATIONS.values())]
    schemas.compose("ChatToolParam", _union([*own, mcp, *hosted, "UnknownToolParam"]))
    name = pointer(schemas.add(chat_requests.Named, "received"))
    chosen = [_object(type=kind, **{kind: name}) for kind in ("function", "custom")]
    others = sorted({*tools.CHOOSABLE} - {"function", "custom"})
    other = _object(type=others)
    other["properties"] |= {"name": {"type": "string"}, "server_label": {"type": "string"}}
    schemas.compose("ChatToolNameParam", {"oneOf": [*chosen, other]})
    allowed = _object(type="allowed_tools", allowed_tools=pointer(schemas.add(chat_requests.ChosenTools, "received")))
    modes = {"type": "string", "enum": [*get_args(tools.ToolMode)]}
    schemas.compose("ChatToolChoiceParam", {"oneOf": [modes, allowed, pointer("ChatToolNameParam")]})

    chunk = schemas.add(completions.Chunk, "sent", may_have=PADDING)
    schemas.compose("ChatStreamEvent", _union([chunk, schemas.add(resources.ErrorReply, "sent")]))


def _compose_events(schemas: Schemas) -> None:
    structs = [struct for struct in _below(events.Event) if str(struct.__struct_config__.tag).startswith("response.")]
    names = {}
    for struct in sorted(structs, key=lambda one: str(one.__struct_config__.tag)):
        tag = str(struct.__struct_config__.tag)
        may_have = PADDING if tag.endswith(".delta") else ""
        names[tag] = schemas.add(struct, "sent", name=_camel(tag.replace(".", "_")) + "Event", may_have=may_have)
    keepalive = _object(type="keepalive", sequence_number={"type": "integer"})
    keepalive["description"] = (
        "A sign of life, where the server is set to send such; it repeats the number of the last event."
    )
    schemas.compose("KeepaliveEvent", keepalive)
    names["keepalive"] = "KeepaliveEvent"
    schemas.compose("StreamEvent", _union([*names.values()], names))


def _below(struct: type[Struct]) -> Iterable[type[Struct]]:
    for one in struct.__subclasses__():
        yield one
        yield from _below(one)


def _union(names: Sequence[str], types: dict[str, str] | None = None) -> Schema:
    made: Schema = {"oneOf": [pointer(name) for name in names]}
    if types:
        mapping = {type_: pointer(name)["$ref"] for type_, name in types.items()}
        made["discriminator"] = {"propertyName": "type", "mapping": mapping}
    return made


def _unknown(schemas: Schemas, name: str, known: Sequence[str], description: str) -> str:
    type_ = {"type": "string", "not": {"enum": [*known]}}
    schemas.compose(name, {**_object(type=type_), "description": description})
    return name


def _object(**properties: Schema | str | Sequence[str]) -> Schema:
    """An object with these properties, all of them required; a string stands for itself."""
    made = {
        name: {"type": "string", "const": one}
        if isinstance(one, str)
        else one
        if isinstance(one, dict)
        else {"type": "string", "enum": [*one]}
        for name, one in properties.items()
    }
    return {"type": "object", "properties": made, "required": [*made]}


def _camel(type_: str) -> str:
    """`local_shell_call` → `LocalShellCall`."""
    return "".join(word.capitalize() for word in type_.split("_"))
