"""The filters of MCP servers' declarations: which of a server's tools they match."""

from collections.abc import Callable

from app.wire.tools import ListedTool, McpApproval, McpFilter, McpTool

Matches = Callable[[ListedTool], bool]


def matching(wanted: McpFilter) -> Matches:
    """Whether a filter matches a tool; an empty one, which is mistyped, matches none."""
    names = None if wanted.tool_names is None else frozenset(wanted.tool_names)
    read_only = wanted.read_only
    if names is None and read_only is None:
        return lambda tool: False
    return lambda tool: (names is None or tool.name in names) and read_only in {None, tool.read_only}


def is_by_read_only(server: McpTool) -> bool:
    """Whether a declaration depends on which of its tools a server calls read-only."""
    approval = server.require_approval
    filters = (server.allowed_tools, *((approval.always, approval.never) if isinstance(approval, McpApproval) else ()))
    return any(isinstance(one, McpFilter) and one.read_only is not None for one in filters)
