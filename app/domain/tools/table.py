"""The table of the tools whose calls the server runs."""

from collections.abc import Mapping
from typing import Any

from app.domain.client_tools import is_client_run
from app.domain.hosted import Kind
from app.domain.tools.code_interpreter import CodeInterpreter
from app.domain.tools.file_search import FileSearch
from app.domain.tools.image_generation import ImageGeneration
from app.domain.tools.mcp import Mcp
from app.domain.tools.server_tool import Hosted, ServerTool
from app.domain.tools.shell import Shell
from app.domain.tools.web_search import WebSearch
from app.errors import UnsupportedParameter
from app.wire.items import AnyItem, type_of
from app.wire.tools import HostedTool

_HOSTED: tuple[Hosted[Any], ...] = (
    WebSearch(),
    FileSearch(),
    CodeInterpreter(),
    ImageGeneration(),
    Shell(),
)

HOSTED: Mapping[Kind, Hosted[Any]] = {tool.kind: tool for tool in _HOSTED}
KINDS: Mapping[str, Kind] = {type_: tool.kind for tool in _HOSTED for type_ in tool.types}
"""Declared type → kind: one tool has several names."""

SERVER_TOOLS: Mapping[str, ServerTool[Any]] = {tool.item_type: tool for tool in (Mcp(), *_HOSTED)}
"""Type of a call's item → its tool."""


def tool_of(item: AnyItem) -> ServerTool[Any] | None:
    """The tool of a call that the server runs; None for any other item."""
    return None if is_client_run(item) else SERVER_TOOLS.get(type_of(item))


def kind_of(tool: HostedTool) -> Kind | None:
    """The kind of a declared tool; None for one that only the client can run, as a shell without a container."""
    kind = KINDS.get(tool.type)
    return kind if kind and HOSTED[kind].is_server_run(tool.fields) else None


def missing_server(type_: str, param: str) -> UnsupportedParameter:
    """The 400 for a hosted tool without a tool server; it names what the operator has to configure."""
    kind = KINDS.get(type_, type_)
    return UnsupportedParameter(
        f"No server is configured for tools of type '{type_}': the catalog has no [hosted.{kind}].", param=param
    )
