"""How much one request may declare."""

from collections.abc import Iterator, Sequence

from app.errors import InvalidParameter
from app.wire.items import McpListTools, tools_added_by
from app.wire.requests import CreateResponse
from app.wire.tools import AnyTool, McpApproval, McpFilter, McpTool, NamespaceTool


def check(request: CreateResponse, *, tools_max: int, names_max: int, listed_max: int) -> None:
    """Raises InvalidParameter, with the path of what is too long: all tools together, the names of one filter, or the list
    of one MCP server's tools."""
    declared = 0
    for at, tools in _declarations(request):
        declared += sum(len(tool.tools) if isinstance(tool, NamespaceTool) else 1 for tool in tools)
        if declared > tools_max:
            raise InvalidParameter(
                f"More than {tools_max} tools are declared.", param=at, code="array_above_max_length"
            )
        for path, names in _filters(tools, at):
            _check_length(names, path, names_max)
    for index, item in enumerate(request.input):
        if isinstance(item, McpListTools):
            _check_length(item.tools, f"input[{index}].tools", listed_max)


def _check_length(given: Sequence[object], at: str, most: int) -> None:
    if len(given) > most:
        raise InvalidParameter(f"'{at}' has more than {most} elements.", param=at, code="array_above_max_length")


def _declarations(request: CreateResponse) -> Iterator[tuple[str, Sequence[AnyTool]]]:
    yield "tools", request.tools
    for index, item in enumerate(request.input):
        if added := tools_added_by(item):
            yield f"input[{index}].tools", added


def _filters(tools: Sequence[AnyTool], at: str) -> Iterator[tuple[str, list[str]]]:
    """The lists of names of every MCP server, with their paths."""
    for index, tool in enumerate(tools):
        if not isinstance(tool, McpTool):
            continue
        path = f"{at}[{index}]"
        if isinstance(tool.allowed_tools, list):
            yield f"{path}.allowed_tools", tool.allowed_tools
        filters = {"allowed_tools": tool.allowed_tools}
        if isinstance(tool.require_approval, McpApproval):
            filters["require_approval.always"] = tool.require_approval.always
            filters["require_approval.never"] = tool.require_approval.never
        for name, filter in filters.items():
            if isinstance(filter, McpFilter) and filter.tool_names is not None:
                yield f"{path}.{name}.tool_names", filter.tool_names
