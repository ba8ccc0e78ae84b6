"""What the model reads of calls that the server ran: the function that it called, and what came of it.

All that it has read is in the items, so later turns, later responses and whoever goes on after a crash tell it the same.
"""

import msgspec
from msgspec import Struct

from app.domain.calls import BROKEN_OFF, error_text
from app.domain.hosted import SEEN, Kind, owner_of
from app.wire.decoding import Json
from app.wire.items import (
    AnyItem,
    CodeInterpreterCall,
    FileSearchCall,
    ImageGenerationCall,
    McpApprovalRequest,
    McpApprovalResponse,
    McpCall,
    ServerCallItem,
    WebSearchCall,
)


class Said(Struct, frozen=True):
    """A server-run call as the model made it: the tool, whose it is, the arguments."""

    name: str
    of: str
    arguments: str


def asked_of_model(item: AnyItem) -> Said | None:
    """The function that the model called; None where another server's history has lost what came of it."""
    match item:
        case McpCall() | McpApprovalRequest():
            return Said(item.name, item.server_label, item.arguments)
        case WebSearchCall(results=[*_]):
            return _said("web_search", {"query": (item.action or {}).get("query", "")})
        case FileSearchCall(results=[*_]):
            return _said("file_search", {"queries": item.queries})
        case CodeInterpreterCall(outputs=[*_]):
            return _said("code_interpreter", {"code": item.code or ""})
        case ImageGenerationCall():
            return _said("image_generation", {"prompt": item.revised_prompt or ""})
    return None


def _said(kind: Kind, given: Json) -> Said:
    return Said(SEEN[kind].name, owner_of(kind), msgspec.json.encode(given).decode())


def answer_for_model(item: AnyItem) -> str:
    """What came of a server-run call, or of a request for approval, as the model reads it."""
    if isinstance(item, ServerCallItem) and item.status in {"incomplete", "in_progress"}:
        return f"Error: {BROKEN_OFF}"
    match item:
        case McpCall():
            return (item.output or "") if item.error is None else f"Error: {error_text(item.error)}"
        case McpApprovalResponse(approve=True):
            return f"Error: {BROKEN_OFF}"
        case McpApprovalResponse():
            reason = f" The reason: {item.reason}" if item.reason else ""
            return f"Error: the user did not approve this call. It was not made.{reason}"
        case WebSearchCall() | FileSearchCall():
            return "\n\n".join(map(_result_text, item.results or ())) or "Nothing was found."
        case CodeInterpreterCall():
            return "\n".join(map(_output_text, item.outputs or ())) or "The program printed nothing."
        case ImageGenerationCall():
            return "The image was made and shown to the user." if item.result else "Error: no image was made."
    return "Error: nobody has answered whether this call may be made. It was not made."


def _result_text(result: Json) -> str:
    name = result.get("title") or result.get("filename")
    lines = [f"【{name}】" if "filename" in result else name, result.get("url"), result.get("text")]
    return "\n".join(str(line) for line in lines if line)


def _output_text(output: Json) -> str:
    return str(output.get("logs", "")) if output.get("type") == "logs" else "[An image, shown to the user.]"
