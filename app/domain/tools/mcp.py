"""The tools of MCP servers that a request declares."""

from msgspec import UNSET
from msgspec.structs import replace

from app.domain.hosted import HostedRoute
from app.domain.tools.answers import Answer, error_text
from app.domain.tools.server_tool import ModelCall, ServerTool, progress_of
from app.wire.events import Event, ItemAdded, McpArgumentsDelta, McpArgumentsDone
from app.wire.items import InputImage, McpCall


class Mcp(ServerTool[McpCall]):
    item_type = "mcp_call"
    id_prefix = "mcp"
    streamed = "arguments"

    def open(self, item: McpCall, output_index: int) -> list[Event]:
        return [
            ItemAdded(output_index=output_index, item=replace(item, arguments="")),
            *progress_of(item, output_index, "in_progress"),
            McpArgumentsDelta(item_id=item.id, output_index=output_index, delta=item.arguments),
            McpArgumentsDone(item_id=item.id, output_index=output_index, arguments=item.arguments),
        ]

    def done(self, item: McpCall, answer: Answer, route: HostedRoute | None) -> McpCall:
        if answer.error is not None:
            return replace(item, output=None, error=answer.error, status="failed", images=UNSET)
        images = [InputImage(image_url=url) for url in answer.image_urls]
        return replace(item, output=answer.text, error=None, status="completed", images=images or UNSET)

    def call(self, item: McpCall) -> ModelCall:
        return ModelCall(item.name, item.server_label, item.arguments)

    def result(self, item: McpCall) -> str:
        return (item.output or "") if item.error is None else f"Error: {error_text(item.error)}"
