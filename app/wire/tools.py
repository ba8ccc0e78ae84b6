"""Tool declarations and tool_choice."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType, field

from app.errors import UnsupportedParameter
from app.wire.decoding import Json, decode, missing, not_among
from app.wire.hosted_tools import HOSTED, Caller, decode_declaration
from app.wire.keys import may_be_newer

ToolName = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[a-zA-Z0-9_-]+$")]
ServerLabel = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_-]+$")]

SERVER_URL_CHARS_MAX = 2048


class FunctionTool(Struct, tag_field="type", tag="function", forbid_unknown_fields=True):
    """A function that the client runs. Null keys are echoed, as strict clients demand them; the last four are only echoed."""

    name: ToolName
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None
    output_schema: Json | UnsetType | None = UNSET
    allowed_callers: list[Caller] | UnsetType | None = UNSET
    defer_loading: bool | UnsetType | None = UNSET
    asynchronous: bool | UnsetType | None = field(default=UNSET, name="async")


class Grammar(Struct, tag_field="type", tag="grammar", forbid_unknown_fields=True):
    syntax: Literal["lark", "regex"]
    definition: str


class FreeText(Struct, tag_field="type", tag="text", forbid_unknown_fields=True):
    pass


class CustomTool(Struct, tag_field="type", tag="custom", omit_defaults=True, forbid_unknown_fields=True):
    """A tool whose input is one free text, perhaps under a grammar; the client runs it. The last three are only echoed."""

    name: ToolName
    description: str | UnsetType | None = UNSET
    format: Grammar | FreeText | UnsetType | None = UNSET
    allowed_callers: list[Caller] | UnsetType | None = UNSET
    defer_loading: bool | UnsetType | None = UNSET
    asynchronous: bool | UnsetType | None = field(default=UNSET, name="async")


class NamespaceTool(Struct, tag_field="type", tag="namespace", forbid_unknown_fields=True):
    """Functions and custom tools under one name; calls come back with `namespace` set."""

    name: ToolName
    tools: list[FunctionTool | CustomTool]
    description: str | None = None


class McpFilter(Struct, omit_defaults=True, forbid_unknown_fields=True):
    """Tools of one MCP server: by name, by being read-only, or both; without either, none."""

    tool_names: list[str] | None = None
    read_only: bool | None = None


class McpApproval(Struct, omit_defaults=True, forbid_unknown_fields=True):
    """Which tools need approval; those that neither names do, and so do those that both name."""

    always: McpFilter | None = None
    never: McpFilter | None = None


class McpTool(Struct, tag_field="type", tag="mcp", kw_only=True, forbid_unknown_fields=True):
    """The tools of an MCP server that this server calls. `authorization` and `headers` are secret, and are not given back."""

    server_label: ServerLabel
    server_url: Annotated[str, Meta(max_length=SERVER_URL_CHARS_MAX)] | None = None
    server_description: str | None = None
    authorization: str | None = None
    headers: dict[str, str] | None = None
    allowed_tools: list[str] | McpFilter | None = None
    require_approval: Literal["always", "never"] | McpApproval | None = None
    connector_id: str | None = None
    tunnel_id: str | None = None
    defer_loading: bool | UnsetType | None = UNSET
    allowed_callers: list[Caller] | UnsetType | None = UNSET


class ListedTool(Struct, omit_defaults=True, forbid_unknown_fields=True):
    """A tool as an MCP server lists it."""

    name: str
    input_schema: Json = field(default_factory=lambda: {"type": "object", "properties": {}})
    description: str | UnsetType | None = UNSET
    annotations: Json | UnsetType | None = UNSET

    @property
    def read_only(self) -> bool:
        """Whether its server declares that it changes nothing."""
        return bool(self.annotations and (self.annotations.get("readOnlyHint") or self.annotations.get("read_only")))


class HostedTool(Struct):
    """A tool that the hosted API runs itself, or of a type that this version does not know; `fields` is its whole declaration."""

    type: str
    fields: Json


AnyTool = FunctionTool | CustomTool | NamespaceTool | McpTool | HostedTool

NAMED = frozenset({"function", "custom", "namespace"})
"""Types of tools whose `name` is required."""


class _Peek(Struct):
    type: str
    name: Any = None


_PEEK = msgspec.json.Decoder(_Peek)
_FIELDS = msgspec.json.Decoder(Json)
_DECODERS: dict[str, msgspec.json.Decoder[Any]] = {
    "function": msgspec.json.Decoder(FunctionTool),
    "custom": msgspec.json.Decoder(CustomTool),
    "namespace": msgspec.json.Decoder(NamespaceTool),
    "mcp": msgspec.json.Decoder(McpTool),
}


TOOL_TYPES = frozenset(_DECODERS)
"""Types of tools that are not hosted."""


def decode_tools(raws: list[Raw], at: str = "tools") -> list[AnyTool]:
    """The `tools` array. Raises InvalidParameter with the path of the tool that is wrong."""
    return [decode_tool(raw, f"{at}[{index}]") for index, raw in enumerate(raws)]


def decode_tool(raw: Raw, at: str) -> AnyTool:
    """One declaration. Raises InvalidParameter with the path of what is wrong."""
    tool = _decode_tool(raw, at)
    if isinstance(tool, McpTool):
        _refuse_elsewhere(tool, at)
    return tool


def check_declarations(tools: Sequence[Json], at: str) -> None:
    """Check declarations in an item, which is stored as it came: of tools that this server can't reach too, but without secrets.

    Raises InvalidParameter or UnsupportedParameter."""
    for index, given in enumerate(tools):
        tool = _decode_tool(Raw(msgspec.json.encode(given)), f"{at}[{index}]")
        for name in ("authorization", "headers"):
            if isinstance(tool, McpTool) and getattr(tool, name):
                raise UnsupportedParameter(
                    "Secrets of MCP servers can't stand in an item; declare them in 'tools'.",
                    param=f"{at}[{index}].{name}",
                )


def client_tools_in(given: Sequence[Json]) -> list[AnyTool]:
    """Those of checked declarations that name what the client runs."""
    tools = (_decode_tool(Raw(msgspec.json.encode(one)), "tools") for one in given if one.get("type") in NAMED)
    return list(tools)


def _decode_tool(raw: Raw, at: str) -> AnyTool:
    peek = decode(_PEEK, raw, at)
    type_ = peek.type
    if type_ in NAMED and peek.name is None:  # before its keys are read: Chat Completions has them all below `function`
        raise missing(f"{at}.name")
    if decoder := _DECODERS.get(type_):
        tool: AnyTool = decode(decoder, raw, at)
        return tool
    if type_ in HOSTED:
        return HostedTool(type_, decode_declaration(type_, raw, at))
    known = (*_DECODERS, *sorted(HOSTED))
    if may_be_newer(type_, known):
        return HostedTool(type_, decode(_FIELDS, raw, at))
    raise not_among(f"{at}.type", type_, known)


def _refuse_elsewhere(tool: McpTool, at: str) -> None:
    """Servers that only the hosted API can reach."""
    for name in ("connector_id", "tunnel_id"):
        if getattr(tool, name) is not None:
            raise UnsupportedParameter(
                f"'{at}.{name}' is not supported by this server; use 'server_url'.", param=f"{at}.{name}"
            )


def encode_tools(tools: list[AnyTool]) -> list[Any]:
    """The echo of `tools`: defaults filled in, hosted ones as declared, no secrets."""
    return [_shown_tool(tool) for tool in tools]


def _shown_tool(tool: AnyTool) -> Any:
    match tool:
        case HostedTool():
            return tool.fields
        case McpTool():
            return ShownMcpTool(
                server_label=tool.server_label,
                server_url=_shown_url(tool.server_url),
                server_description=tool.server_description,
                allowed_tools=tool.allowed_tools,
                require_approval=tool.require_approval or "always",
                defer_loading=tool.defer_loading,
                allowed_callers=tool.allowed_callers,
            )
    return tool


class ShownMcpTool(Struct, tag_field="type", tag="mcp", kw_only=True):
    """An MCP server as the hosted API echoes it: no authorization, the headers null."""

    server_label: str
    server_url: str | None
    server_description: str | None
    headers: None = None
    allowed_tools: Any
    require_approval: Any
    defer_loading: bool | UnsetType | None = UNSET
    allowed_callers: "list[Caller] | UnsetType | None" = UNSET


REDACTED = "<redacted>"


def _shown_url(url: str | None) -> str | None:
    """Paths and queries may hold keys: only the host is shown, as by the hosted API."""
    if not url:
        return None
    parts = urlsplit(url)
    at = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{at}/" + (REDACTED if parts.path.strip("/") or parts.query else "")


class NamedTool(Struct, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """`{"type": "function", "name": …}` and the like, alone or inside `allowed_tools`."""

    type: str
    name: str | UnsetType | None = UNSET
    server_label: str | UnsetType | None = UNSET


class AllowedTools(Struct, tag_field="type", tag="allowed_tools", kw_only=True, forbid_unknown_fields=True):
    """Only these tools may be called; `mode` required asks for at least one call."""

    tools: Annotated[list[NamedTool], Meta(min_length=1, max_length=128)]
    mode: Literal["auto", "required"] = "auto"


ToolMode = Literal["none", "auto", "required"]
ToolChoice = ToolMode | NamedTool | AllowedTools

CHOOSABLE = ("function", "custom", "mcp", *sorted(HOSTED | {"computer_use"}))
"""Types of tools that a choice may name."""

_CHOICES: dict[str, msgspec.json.Decoder[Any]] = {"allowed_tools": msgspec.json.Decoder(AllowedTools)}
_NAMED = msgspec.json.Decoder(NamedTool)
_MODE: msgspec.json.Decoder[ToolMode] = msgspec.json.Decoder(ToolMode)


def decode_tool_choice(raw: Raw, at: str = "tool_choice") -> ToolChoice:
    """`tool_choice` in every form; absent or null is `auto`. Raises InvalidParameter."""
    text = bytes(raw)
    if text == b"null":
        return "auto"
    if not text.startswith(b"{"):
        return decode(_MODE, text, at)
    choice: ToolChoice = decode(_CHOICES.get(decode(_PEEK, text, at).type, _NAMED), text, at)
    if isinstance(choice, NamedTool):
        _check_named(choice, at, ("allowed_tools", *CHOOSABLE))
        if choice.type in {"function", "custom"} and not choice.name:
            raise missing(f"{at}.name")
    if isinstance(choice, AllowedTools):
        for index, named in enumerate(choice.tools):
            _check_named(named, f"{at}.tools[{index}]", CHOOSABLE)
    return choice


def _check_named(named: NamedTool, at: str, known: Sequence[str]) -> None:
    if named.type not in known:
        raise not_among(f"{at}.type", named.type, known)
