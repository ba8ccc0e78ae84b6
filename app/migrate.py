"""Migrates the database to the schema of this version, and checks that it has it."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import asyncpg
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from app.settings import Settings, SettingsError
from app.storage.urls import CONNECT_TIMEOUT_S, unpooled_engine

MIGRATIONS = Path(__file__).resolve().parent.parent / "migrations"


def config(database_url: str) -> Config:
    """Alembic's configuration for a database."""
    made = Config()
    made.set_main_option("script_location", str(MIGRATIONS))
    made.attributes["database_url"] = database_url
    return made


def upgrade(database_url: str, revision: str = "head") -> None:
    """Migrate to a revision; several processes may do it at once. Must be called outside a running loop.

    Raises SettingsError if the database can't be reached, or its schema is newer.
    """
    try:
        with _reached():
            command.upgrade(config(database_url), revision)
    except CommandError as error:
        raise SettingsError(asyncio.run(fault(database_url)) or f"the schema can't be changed: {error}.") from None


def downgrade(database_url: str, revision: str) -> None:
    """Go back to the schema of an earlier version, without what only later ones keep. Must be called outside a running loop.

    Raises SettingsError if the database can't be reached, or this version knows no such schema before its own.
    """
    own, *older = revisions()
    if revision not in older:
        raise SettingsError(
            f"there is no schema '{revision}' before this version's {own}; the one before is {older[0]}."
        )
    try:
        with _reached():
            command.downgrade(config(database_url), revision)
    except CommandError as error:
        raise SettingsError(f"the schema can't be changed: {error}.") from None


def revisions() -> list[str]:
    """Every schema that this version knows, its own first."""
    return [script.revision for script in ScriptDirectory(str(MIGRATIONS)).walk_revisions()]


async def fault(database_url: str, *, timeout_s: float = CONNECT_TIMEOUT_S) -> str | None:
    """What is wrong with the schema, in one line; None if it is that of this version.

    Raises SettingsError if the database can't be reached, or does not answer in time.
    """
    own, *older = revisions()
    engine = unpooled_engine(database_url)
    try:
        with _reached():
            async with asyncio.timeout(timeout_s), engine.connect() as connection:
                found = await connection.run_sync(_revision)
    finally:
        await engine.dispose()
    if found == own:
        return None
    if found is None:
        return "the database has no tables yet: run `reprise migrate`."
    if found in older:
        return f"the database's schema {found} is older than this version's {own}: run `reprise migrate`."
    return f"the database's schema {found} is newer than this version's {own}: run the version that made it, or a later one."


async def demand(settings: Settings) -> None:
    """Raises SettingsError unless the schema is that of this version."""
    if found := await fault(settings.database_url, timeout_s=settings.database_timeout_s):
        raise SettingsError(found)


@contextmanager
def _reached() -> Iterator[None]:
    try:
        yield
    except (OSError, DBAPIError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        why = str(getattr(error, "orig", None) or error).partition("\n")[0] or "it does not answer"
        raise SettingsError(f"the database can't be used: {why}.") from error


def _revision(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()
