"""What the model reads of calls that the server ran: the function that it called, and the result.

All of it is in the items, so later turns, later responses and a run that another worker takes over read the same.
"""

from app.domain.tools.answers import BROKEN_OFF
from app.domain.tools.server_tool import ModelCall
from app.domain.tools.table import SERVER_TOOLS, tool_of
from app.wire.items import AnyItem, McpApprovalRequest, McpApprovalResponse, ServerCallItem, type_of


def asked_of_model(item: AnyItem) -> ModelCall | None:
    """The function that the model called; None where another server's history has lost its result."""
    if isinstance(item, McpApprovalRequest):
        return ModelCall(item.name, item.server_label, item.arguments)
    tool = tool_of(item)
    return tool.call(item) if tool else None


def answer_for_model(item: AnyItem) -> str:
    """The result of a server-run call, or of a request for approval, as the model reads it."""
    if isinstance(item, ServerCallItem):
        if item.status in {"incomplete", "in_progress"}:
            return f"Error: {BROKEN_OFF}"
        return SERVER_TOOLS[type_of(item)].result(item)
    match item:
        case McpApprovalResponse(approve=True):
            return f"Error: {BROKEN_OFF}"
        case McpApprovalResponse():
            reason = f" The reason: {item.reason}" if item.reason else ""
            return f"Error: the user did not approve this call. It was not made.{reason}"
    return "Error: this call still waits for approval. It was not made."
