"""Bringing the schema to this version, and telling whether it is."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import asyncpg
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from app.settings import SettingsError
from app.storage.addresses import unpooled_engine

MIGRATIONS = Path(__file__).resolve().parent.parent / "migrations"


def config(database_url: str) -> Config:
    """Alembic's configuration for a database."""
    made = Config()
    made.set_main_option("script_location", str(MIGRATIONS))
    made.attributes["database_url"] = database_url
    return made


def upgrade(database_url: str, revision: str = "head") -> None:
    """Bring the schema to a revision; several processes may try at once. Must be called outside a running loop.

    Raises SettingsError if the database can't be reached.
    """
    with _reached():
        command.upgrade(config(database_url), revision)


async def is_current(database_url: str) -> bool:
    """Whether the schema is that of this version. Raises SettingsError if the database can't be reached."""
    head = ScriptDirectory(str(MIGRATIONS)).get_current_head()
    engine = unpooled_engine(database_url)
    try:
        with _reached():
            async with engine.connect() as connection:
                return await connection.run_sync(_revision) == head
    finally:
        await engine.dispose()


@contextmanager
def _reached() -> Iterator[None]:
    try:
        yield
    except (OSError, DBAPIError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        why = str(getattr(error, "orig", None) or error).partition("\n")[0]
        raise SettingsError(f"the database can't be used: {why}.") from error


def _revision(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()
