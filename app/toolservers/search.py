"""The tool search_files, as an MCP server."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import CallToolResult, TextContent, ToolAnnotations
from pydantic import BaseModel, Field

from app.toolservers.index import LOST, BadFilter, Hit, Index, opened

QUERIES_MAX = 16
RESULTS_MAX = 50


class Result(BaseModel):
    """A chunk of a file."""

    file_id: str
    filename: str
    score: float = Field(description="Above 0 and below 1; comparable within one search.")
    text: str = Field(description="The headings above the chunk, if any, and the chunk.")
    attributes: dict[str, Any]


class Results(BaseModel):
    """The results of a search, best first."""

    results: list[Result]


def tool_server(database_url: str) -> MCPServer[Any]:
    """The MCP server."""
    serving: list[Index] = []

    @asynccontextmanager
    async def connected(_: MCPServer[Any]) -> AsyncIterator[None]:
        async with opened(database_url) as index:
            serving.append(index)
            yield

    server: MCPServer[Any] = MCPServer("files", lifespan=connected, log_level="WARNING")

    @server.tool(annotations=ToolAnnotations(read_only_hint=True, open_world_hint=False))
    async def search_files(
        queries: Annotated[
            list[str],
            Field(
                min_length=1, max_length=QUERIES_MAX, description='Words to find; "phrases", -exclusions and OR work.'
            ),
        ],
        stores: Annotated[list[str], Field(min_length=1, description="The stores to search.")],
        tenant: Annotated[
            str, Field(min_length=1, description="The tenant of the stores; must not be chosen by the model.")
        ],
        max_results: Annotated[int, Field(ge=1, le=RESULTS_MAX)] = 10,
        filters: Annotated[
            dict[str, Any] | None, Field(description='On attributes: {"type": "eq", "key": …, "value": …}, and, or.')
        ] = None,
    ) -> Annotated[CallToolResult, Results]:
        """Search files for words and return the chunks that match best."""
        if any("\0" in name for name in (tenant, *stores)):
            raise ToolError("names have no null characters.")
        try:
            hits = await serving[-1].search(tenant, stores, queries, limit=max_results, filters=filters)
        except BadFilter as error:
            raise ToolError(str(error)) from error
        except LOST as error:
            raise ToolError("The files can't be searched now; please try again.") from error
        results = Results(results=[result(hit) for hit in hits])
        return CallToolResult(content=[TextContent(text=as_text(results))], structured_content=results.model_dump())

    return server


def result(hit: Hit) -> Result:
    """A hit as a result of the tool."""
    text = f"{hit.heading}\n\n{hit.text}" if hit.heading else hit.text
    return Result(
        file_id=hit.file_id, filename=hit.filename, score=round(hit.score, 4), text=text, attributes=hit.attributes
    )


def as_text(results: Results) -> str:
    """Results as text for the model."""
    parts = [
        f"[{number}] {one.filename} ({one.file_id}, score {one.score})\n{one.text}"
        for number, one in enumerate(results.results, 1)
    ]
    return "\n\n".join(parts) or "Nothing was found."
