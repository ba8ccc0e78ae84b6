"""The tool run_python, as an MCP server."""

import asyncio
import base64
import binascii
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import CallToolResult, ImageContent, TextContent, ToolAnnotations
from pydantic import BaseModel, Field

from app.toolservers.code_runs import CodeRun, CodeRunner
from app.toolservers.containers import ContainersFull
from app.toolservers.isolated_python import IsolationError

CONTAINER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{15,127}")
CODE_BYTES_MAX = 1024**2
FILES_SHOWN_MAX = 50


class GivenFile(BaseModel):
    """A file that the code finds in its working directory."""

    name: str = Field(description="Path relative to the working directory.")
    text: str | None = Field(None, description="Its content as text; either this or data.")
    data: str | None = Field(None, description="Its content in base64.")


class MadeFile(BaseModel):
    """A file that the run has made or changed."""

    name: str
    size: int = Field(description="Bytes.")
    mime_type: str
    text: str | None = Field(None, description="The content of a small text file.")


class Run(BaseModel):
    """How a run went."""

    stdout: str
    stderr: str
    exit_code: int = Field(description="0 is success; negative is the signal that ended it.")
    timed_out: bool
    files: list[MadeFile] = Field(description="Files that the run has made or changed.")


def tool_server(runner: CodeRunner) -> MCPServer[Any]:
    """The MCP server."""

    @asynccontextmanager
    async def sweeping(_: MCPServer[Any]) -> AsyncIterator[None]:
        task = asyncio.create_task(runner.containers.keep_swept())
        yield
        task.cancel()

    server: MCPServer[Any] = MCPServer("sandbox", lifespan=sweeping, log_level="WARNING")
    network = runner.python.network

    description = (
        "Run Python code and give what it printed and the files it made. "
        f"There is {'a' if network else 'no'} network. Variables are gone with the end of the call; "
        "files in the working directory stay for the next call of the same container."
    )
    hints = ToolAnnotations(read_only_hint=False, destructive_hint=False, open_world_hint=network)

    @server.tool(description=description, annotations=hints)
    async def run_python(
        code: Annotated[str, Field(description="Python code. The value of a last expression is printed.")],
        container: Annotated[
            str,
            Field(description="The container whose files to work on: 16 to 128 letters, digits, - and _. Empty: none."),
        ] = "",
        files: Annotated[list[GivenFile], Field(description="Files to put into the working directory first.")] = [],  # noqa: B006 a schema's default
    ) -> Annotated[CallToolResult, Run]:
        if len(code.encode(errors="replace")) > CODE_BYTES_MAX:
            raise ToolError(f"code is longer than {CODE_BYTES_MAX} bytes.")
        try:
            run = await runner.run(code, checked_container(container), checked_files(files))
        except UnicodeEncodeError as error:
            raise ToolError(f"code is not text: {error}") from error
        except (IsolationError, ContainersFull) as error:
            raise ToolError(f"The code could not be run: {error}") from error
        return call_result(run)

    return server


def checked_container(container: str) -> str:
    """A container's id, or an empty one. Raises ToolError."""
    if container and not CONTAINER.fullmatch(container):
        raise ToolError("container must have 16 to 128 letters, digits, - and _.")
    return container


def checked_files(files: Sequence[GivenFile]) -> dict[str, bytes]:
    """Contents by name. Raises ToolError."""
    checked: dict[str, bytes] = {}
    for file in files:
        parts = file.name.split("/")
        if (
            not all(parts)
            or {".", ".."} & {*parts}
            or "\0" in file.name
            or len(file.name.encode(errors="replace")) > 255
        ):
            raise ToolError(f"{file.name!r} is not a relative path without . and ..")
        if (file.text is None) == (file.data is None):
            raise ToolError(f"{file.name!r} needs either text or data.")
        try:
            checked[file.name] = base64.b64decode(file.data, validate=True) if file.data else (file.text or "").encode()
        except (binascii.Error, UnicodeEncodeError) as error:
            raise ToolError(f"{file.name!r} can't be read: {error}") from error
    return checked


def call_result(run: CodeRun) -> CallToolResult:
    """A run as text, images and structured content."""
    images = [
        ImageContent(data=base64.b64encode(file.image).decode(), mime_type=file.mime_type)
        for file in run.files
        if file.image is not None
    ]
    structured = Run.model_validate(run, from_attributes=True).model_dump()
    return CallToolResult(content=[TextContent(text=as_text(run)), *images], structured_content=structured)


def as_text(run: CodeRun) -> str:
    """A run as text for a model."""
    parts = [run.stdout, f"stderr:\n{run.stderr}" if run.stderr else ""]
    parts += [f"exit code {run.exit_code}"] * bool(run.exit_code)
    for file in run.files[:FILES_SHOWN_MAX]:
        parts.append(
            f"file {file.name} ({file.mime_type}, {file.size} bytes)" + (f":\n{file.text}" if file.text else "")
        )
    more = len(run.files) - FILES_SHOWN_MAX
    parts += [f"and {more} more files"] * (more > 0)
    return "\n".join(part.rstrip("\n") for part in parts if part) or "(no output)"
