"""Calls that the server runs, from the model's arguments to the end; and the lists of MCP servers' tools.

`app/domain/tools/` says how the calls of each tool look.
"""

from collections.abc import Sequence

from msgspec import UNSET
from msgspec.structs import replace

from app.domain.hosted import HostedRoute
from app.domain.toolbox import ByHost
from app.domain.tools.answers import Answer
from app.domain.tools.server_tool import OwnItem, item_done, parse_arguments, progress_of, with_status
from app.domain.tools.table import HOSTED, SERVER_TOOLS, tool_of
from app.ids import NewId
from app.wire.decoding import Json
from app.wire.events import Event, ItemAdded
from app.wire.items import AnyItem, McpApprovalRequest, McpCall, McpListTools, type_of
from app.wire.tools import ListedTool


class PendingCall:
    """A server-run call of the model: from its arguments to its end."""

    def __init__(
        self, item: OwnItem, arguments: str, by: ByHost | None = None, route: HostedRoute | None = None
    ) -> None:
        """`by` and `route` are those of a hosted tool."""
        self.item = item
        self.arguments = arguments
        self.by, self.route = by, route
        self.output_index = -1
        self._tool = SERVER_TOOLS[type_of(item)]

    @property
    def given(self) -> Json | None:
        """The arguments; None if they are not a JSON object."""
        return parse_arguments(self.arguments)

    @property
    def container(self) -> str:
        """Where it runs; empty for a call that needs no container."""
        return self._tool.container(self.item)

    def open(self, output_index: int) -> list[Event]:
        """The events before the call is sent: the item, whole but for its result."""
        self.output_index = output_index
        return self._tool.open(self.item, output_index)

    def close(self, answer: Answer) -> list[Event]:
        """The events of the call's end."""
        return self._tool.close(self.item, self.output_index, answer, self.route)

    def output(self, answer: Answer, output_index: int) -> list[Event]:
        """The events of an output that is an item of its own, after all calls of its turn; most calls have none."""
        return self._tool.output(self.item, output_index, answer, self.route)

    def cut_off(self) -> list[Event]:
        """The end of a call whose answer is not awaited, or that was never sent."""
        return [item_done(self.output_index, with_status(self.item, "incomplete"))]


def container_of(item: AnyItem) -> str:
    """The container that a call ran in; empty for any other item."""
    tool = tool_of(item)
    return tool.container(item) if tool else ""


def mcp_call(new_id: NewId, label: str, name: str, arguments: str, *, approval: str | None = None) -> PendingCall:
    """A call of an MCP server's tool."""
    item = McpCall(
        id=new_id("mcp"),
        server_label=label,
        name=name,
        arguments=arguments,
        approval_request_id=approval,
        status="in_progress",
    )
    return PendingCall(item, arguments)


def hosted_call(new_id: NewId, by: ByHost, route: HostedRoute, arguments: str, container: str) -> PendingCall:
    """A call of a hosted tool."""
    tool = HOSTED[by.kind]
    item = tool.item(new_id, tool.parse(arguments) or {}, arguments, container)
    return PendingCall(item, arguments, by, route)


def arguments_for(call: PendingCall, *, tenant: str, container: str) -> Json | None:
    """The arguments of the server's tool for a hosted call; None if the model's are not a JSON object."""
    assert call.route is not None
    assert call.by is not None
    tool = HOSTED[call.by.kind]
    given = tool.parse(call.arguments)
    if given is None:
        return None
    values = {**tool.values(given), **call.by.declaration, "tenant": tenant, "container": container}
    return call.route.fill(values, tool.parameters)


def approval_request(new_id: NewId, label: str, name: str, arguments: str, output_index: int) -> list[Event]:
    """A call that waits for the client's approval: only added and done."""
    item = McpApprovalRequest(id=new_id("mcpr"), server_label=label, name=name, arguments=arguments)
    return [ItemAdded(output_index=output_index, item=item), item_done(output_index, item)]


def open_list(new_id: NewId, label: str, output_index: int) -> tuple[McpListTools, list[Event]]:
    """The item of a listing of a server's tools, and the events that open it."""
    item = McpListTools(id=new_id("mcpl"), server_label=label, tools=[])
    return item, [ItemAdded(output_index=output_index, item=item), *progress_of(item, output_index, "in_progress")]


def close_list(
    item: McpListTools, output_index: int, tools: Sequence[ListedTool], error: str | None = None
) -> list[Event]:
    """The events that end a listing."""
    done = replace(item, tools=list(tools), error=error if error is not None else UNSET)
    stage = "completed" if error is None else "failed"
    return [*progress_of(item, output_index, stage), item_done(output_index, done)]
