"""A tool server for `file_search`: full-text search in Postgres over files that the operator adds.

    python -m app.toolservers.files [--database URL] [--http HOST:PORT]                     serve the tool search_files
    python -m app.toolservers.files add --tenant T --store NAME [--attribute year=2024] PATH...
    python -m app.toolservers.files list --tenant T --store NAME
    python -m app.toolservers.files remove --tenant T --store NAME FILE...

`store` is the API's vector store id. Text, Markdown, HTML, CSV, JSON and source code are read; PDF and office files are
refused. Ranking is Postgres' `ts_rank` (words and their distance, not how rare they are); there are no embeddings.

The tool trusts the tenant in its arguments: the catalog must set it, never the model.
"""

import asyncio
import json
import math
import os
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import click

from app.toolservers.address import Address, http_option
from app.toolservers.index import LOST, Index, opened
from app.toolservers.texts import UnreadableFile

FILE_BYTES_MAX = 32 * 1024 * 1024


tenant_option = click.option("--tenant", required=True, help="The tenant of the files.")
store_option = click.option("--store", required=True, help="The vector store.")


@click.group(invoke_without_command=True)
@click.option("--database", envvar="DATABASE_URL", required=True, help="Postgres; or DATABASE_URL.")
@http_option
@click.pass_context
def main(context: click.Context, database: str, address: Address | None) -> None:
    """Serve the tool search_files over MCP, on stdio or HTTP; or manage its files."""
    context.obj = database
    if context.invoked_subcommand is None:
        from app.toolservers.search import tool_server  # takes a second, and other commands do not need it
        from app.toolservers.serving import serve

        using(database, nothing)  # fail before a client connects
        serve(tool_server(database), address)


async def nothing(index: Index) -> None:
    """Do nothing; opening the index is the test."""


def using(database: str, work: Callable[[Index], Awaitable[None]]) -> None:
    """Open the index and do the work. Raises click.ClickException if the database fails."""

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
    """Add files and directories; a file of the same name is replaced.

    A file in a directory is named by its path in it; any other by its last path component. Hidden files in a directory are skipped.
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
    """The files of the paths, with their names in the store."""
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
