"""Tool declarations and tool_choice."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from app.errors import InvalidParameter
from app.wire.decoding import Json, decode

ToolName = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[a-zA-Z0-9_-]+$")]


class FunctionTool(Struct, tag_field="type", tag="function"):
    """A function that the client runs. Null keys are echoed, as strict clients demand them."""

    name: ToolName
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


class Grammar(Struct, tag_field="type", tag="grammar"):
    syntax: Literal["lark", "regex"]
    definition: str


class FreeText(Struct, tag_field="type", tag="text"):
    pass


class CustomTool(Struct, tag_field="type", tag="custom", omit_defaults=True):
    """A tool whose input is one free text, perhaps under a grammar; the client runs it."""

    name: ToolName
    description: str | UnsetType | None = UNSET
    format: Grammar | FreeText | UnsetType | None = UNSET


class NamespaceTool(Struct, tag_field="type", tag="namespace"):
    """Functions and custom tools under one name; calls come back with `namespace` set."""

    name: ToolName
    tools: list[FunctionTool | CustomTool]
    description: str | None = None


class HostedTool(Struct):
    """A tool that the hosted API runs itself; `fields` is its whole declaration."""

    type: str
    fields: Json


AnyTool = FunctionTool | CustomTool | NamespaceTool | HostedTool

HOSTED = frozenset(
    "web_search web_search_2025_08_26 web_search_preview web_search_preview_2025_03_11 file_search code_interpreter "
    "image_generation tool_search programmatic_tool_calling mcp computer computer_use_preview local_shell shell "
    "apply_patch".split()
)
"""Types of `HostedTool` that the API knows."""


class _Peek(Struct):
    type: str


_PEEK = msgspec.json.Decoder(_Peek)
_DECODERS: dict[str, msgspec.json.Decoder[Any]] = {
    "function": msgspec.json.Decoder(FunctionTool),
    "custom": msgspec.json.Decoder(CustomTool),
    "namespace": msgspec.json.Decoder(NamespaceTool),
}
_HOSTED = msgspec.json.Decoder(Json)


def decode_tools(raws: list[Raw], at: str = "tools") -> list[AnyTool]:
    """The `tools` array. Raises InvalidParameter with the path of the tool that is wrong."""
    return [_decode_tool(raw, f"{at}[{index}]") for index, raw in enumerate(raws)]


def _decode_tool(raw: Raw, at: str) -> AnyTool:
    type_ = decode(_PEEK, raw, at).type
    if decoder := _DECODERS.get(type_):
        tool: AnyTool = decode(decoder, raw, at)
        return tool
    if type_ in HOSTED:
        return HostedTool(type_, decode(_HOSTED, raw, at))
    known = ", ".join(f"'{name}'" for name in [*_DECODERS, *sorted(HOSTED)])
    raise InvalidParameter(f"Invalid value: '{type_}'. Supported values are: {known}.", param=f"{at}.type")


def encode_tools(tools: list[AnyTool]) -> list[Any]:
    """The echo of `tools`: defaults filled in, hosted ones as declared."""
    return [tool.fields if isinstance(tool, HostedTool) else tool for tool in tools]


class NamedTool(Struct, kw_only=True, omit_defaults=True):
    """`{"type": "function", "name": …}` and its like, alone or inside `allowed_tools`."""

    type: str
    name: str | UnsetType | None = UNSET
    server_label: str | UnsetType | None = UNSET


class AllowedTools(Struct, tag_field="type", tag="allowed_tools", kw_only=True):
    """Only these tools may be called; `mode` required asks for at least one call."""

    tools: Annotated[list[NamedTool], Meta(min_length=1, max_length=128)]
    mode: Literal["auto", "required"] = "auto"


ToolMode = Literal["none", "auto", "required"]
ToolChoice = ToolMode | NamedTool | AllowedTools

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
    if isinstance(choice, NamedTool) and choice.type in {"function", "custom"} and not choice.name:
        raise InvalidParameter(
            f"Missing required parameter: '{at}.name'.", param=f"{at}.name", code="missing_required_parameter"
        )
    return choice
