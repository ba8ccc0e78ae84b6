"""A tool server behind `file_search`: full-text search in Postgres over files that the operator puts in.

    python -m app.toolservers.files [--database URL] [--http HOST:PORT]                     serve the tool search_files
    python -m app.toolservers.files add --tenant T --store NAME [--attribute year=2024] PATH...
    python -m app.toolservers.files list --tenant T --store NAME
    python -m app.toolservers.files remove --tenant T --store NAME FILE...

`store` is what the API calls a vector store id. Text, Markdown, HTML, CSV, JSON and source code are read; PDF and office files are
refused. Ranking is Postgres' own (`ts_rank`: words and their distance; it does not know how rare a word is), no embeddings.

The tool takes the tenant from its caller and believes it: the catalog must give it, never the model.
"""

import asyncio
import json
import math
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import asyncpg
import click
from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import CallToolResult, TextContent, ToolAnnotations
from pydantic import BaseModel, Field

from app.toolservers.index import BadFilter, Hit, Index, opened
from app.toolservers.serving import http_option, serve
from app.toolservers.texts import UnreadableFile

FILE_BYTES_MAX = 32 * 1024 * 1024
QUERIES_MAX = 16
RESULTS_MAX = 50
LOST = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError)


# -- the tool ---------------------------------------------------------------------------------------------------------------


class Result(BaseModel):
    """A piece of a file that was found."""

    file_id: str
    filename: str
    score: float = Field(description="Above 0 and below 1; comparable within one search.")
    text: str = Field(description="The headings above the piece, if any, and the piece.")
    attributes: dict[str, Any]


class Results(BaseModel):
    """What a search found, best first."""

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
        tenant: Annotated[str, Field(min_length=1, description="Whose stores they are; not for the model to choose.")],
        max_results: Annotated[int, Field(ge=1, le=RESULTS_MAX)] = 10,
        filters: Annotated[
            dict[str, Any] | None, Field(description='On attributes: {"type": "eq", "key": …, "value": …}, and, or.')
        ] = None,
    ) -> Annotated[CallToolResult, Results]:
        """Search files for words and give the pieces that fit best."""
        if any("\0" in name for name in (tenant, *stores)):
            raise ToolError("names have no null characters.")
        try:
            hits = await serving[-1].search(tenant, stores, queries, limit=max_results, filters=filters)
        except BadFilter as error:
            raise ToolError(str(error)) from error
        except LOST as error:
            raise ToolError("The files can't be searched now; please try again.") from error
        results = Results(results=[result(hit) for hit in hits])
        return CallToolResult(content=[TextContent(text=said(results))], structured_content=results.model_dump())

    return server


def result(hit: Hit) -> Result:
    """A hit as it travels."""
    text = f"{hit.heading}\n\n{hit.text}" if hit.heading else hit.text
    return Result(
        file_id=hit.file_id, filename=hit.filename, score=round(hit.score, 4), text=text, attributes=hit.attributes
    )


def said(results: Results) -> str:
    """Results as text for a model."""
    parts = [
        f"[{number}] {one.filename} ({one.file_id}, score {one.score})\n{one.text}"
        for number, one in enumerate(results.results, 1)
    ]
    return "\n\n".join(parts) or "Nothing was found."


# -- the program ------------------------------------------------------------------------------------------------------------

tenant_option = click.option("--tenant", required=True, help="Whose files they are.")
store_option = click.option("--store", required=True, help="Which store.")


@click.group(invoke_without_command=True)
@click.option("--database", envvar="DATABASE_URL", required=True, help="Postgres; or DATABASE_URL.")
@http_option
@click.pass_context
def main(context: click.Context, database: str, address: str | None) -> None:
    """Serve the tool search_files over MCP, on stdio or HTTP; or put files in and out."""
    context.obj = database
    if context.invoked_subcommand is None:
        using(database, nothing)  # says what is wrong with the database before a client is there
        serve(tool_server(database), address)


async def nothing(index: Index) -> None:
    """Only that it could be opened counts."""


def using(database: str, work: Callable[[Index], Awaitable[None]]) -> None:
    """Open the index for some work. Raises click.ClickException for a database that fails."""

    async def run() -> None:
        async with opened(database) as index:
            await work(index)

    try:
        asyncio.run(run())
    except (*LOST, ValueError) as error:
        raise click.ClickException(f"the database can't be used: {error}") from error


@main.command()
@tenant_option
@store_option
@click.option("--attribute", "attributes", multiple=True, metavar="KEY=VALUE", help="To filter by; may be repeated.")
@click.option("--language", default="english", show_default=True, help="A text search configuration of Postgres.")
@click.argument("paths", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.pass_obj
def add(
    database: str, tenant: str, store: str, attributes: tuple[str, ...], language: str, paths: tuple[Path, ...]
) -> None:
    """Put files and directories in; a file of the same name is replaced.

    A file of a directory is named by its path within it, without hidden ones; any other by its last name.
    """
    meant = dict(map(attribute, attributes))
    files: dict[str, Path] = {}
    for name, path in named(paths):
        if files.setdefault(name, path) != path:
            raise click.ClickException(f"{files[name]} and {path} would both be {name}: add the directory above them.")
    refused = 0

    async def put(index: Index) -> None:
        nonlocal refused
        for name, path in files.items():
            try:
                outcome, id = await index.add(tenant, store, name, content(path), language=language, attributes=meant)
            except UnreadableFile as error:
                refused += 1
                click.echo(f"{click.format_filename(path)} {error}", err=True)
            except asyncpg.UndefinedObjectError:
                raise click.ClickException(f"Postgres knows no language {language}.") from None
            else:
                click.echo(f"{outcome}\t{id}\t{name}")

    using(database, put)
    sys.exit(1 if refused else 0)


def attribute(given: str) -> tuple[str, Any]:
    """KEY=VALUE, where the value is JSON or a string. Raises click.BadParameter."""
    key, equals, value = given.partition("=")
    if not key or not equals:
        raise click.BadParameter(f"{given}: expected KEY=VALUE.", param_hint="--attribute")
    try:
        meant = json.loads(value)
    except ValueError:
        meant = value
    is_plain = isinstance(meant, str | int) or (isinstance(meant, float) and math.isfinite(meant))
    return key, meant if is_plain else value


def named(paths: tuple[Path, ...]) -> Iterator[tuple[str, Path]]:
    """The files that are meant, and the names that they get."""
    for path in paths:
        if not path.is_dir():
            yield path.name, path
            continue
        for folder, inner, files in os.walk(path):
            inner[:] = sorted(name for name in inner if not name.startswith("."))
            for name in sorted(files):
                found = Path(folder, name)
                if not name.startswith(".") and found.is_file():
                    yield found.relative_to(path).as_posix(), found


def content(path: Path) -> bytes:
    """The bytes of a file. Raises UnreadableFile."""
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise UnreadableFile(f"is larger than {FILE_BYTES_MAX // 1024**2} MiB")
        return path.read_bytes()
    except OSError as error:
        raise UnreadableFile(f"can't be read: {error.strerror}") from error


@main.command("list")
@tenant_option
@store_option
@click.pass_obj
def list_files(database: str, tenant: str, store: str) -> None:
    """Every file of a store: id, name, bytes, chunks, when it was added, attributes."""

    async def show(index: Index) -> None:
        for file in await index.files(tenant, store):
            added = file.added_at.isoformat(timespec="seconds")
            shown = json.dumps(file.attributes, ensure_ascii=False)
            click.echo("\t".join((file.id, file.filename, str(file.size), str(file.chunks), added, shown)))

    using(database, show)


@main.command()
@tenant_option
@store_option
@click.argument("names", nargs=-1, required=True, metavar="FILE...")
@click.pass_obj
def remove(database: str, tenant: str, store: str, names: tuple[str, ...]) -> None:
    """Remove files by name or id."""
    missing: list[str] = []

    async def take(index: Index) -> None:
        missing.extend([name for name in names if not await index.remove(tenant, store, name)])

    using(database, take)
    if missing:
        raise click.ClickException(f"there is no {', '.join(missing)} in {store}.")


if __name__ == "__main__":
    main()
