"""Alembic's environment: the tables of app.storage, over asyncpg, one process at a time, one transaction for each migration.

A migration that changes a table waits for those that use it, and all others would wait behind it: it gives up soon, and tries again.
"""

import asyncio
import time

from alembic import context
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from app.storage.tables import metadata
from app.storage.urls import unpooled_engine
from app.telemetry import log

ONE_AT_A_TIME = 7_236_201
"""The advisory lock that keeps replicas from migrating at once; any number that nobody else uses."""

LOCK_WAIT_S = 1.0
"""How long servers may be kept waiting by a migration that waits for a lock."""

LOCK_PAUSE_S = 2.0
"""How long they go on before it tries again."""

LOCKED = frozenset({"55P03", "40P01"})
"""What Postgres says of a lock that was not to be had: lock_not_available, deadlock_detected."""


def migrate(connection: Connection) -> None:
    # Until the connection closes: each migration commits.
    connection.execute(text(f"select pg_advisory_lock({ONE_AT_A_TIME})"))
    connection.execute(text(f"set lock_timeout = {int(LOCK_WAIT_S * 1000)}"))
    connection.commit()
    while not _migrated(connection):
        log.warning("A migration waits for a table that is in use; it tries again.", action="migration_waits")
        time.sleep(LOCK_PAUSE_S)


def _migrated(connection: Connection) -> bool:
    """Whether all were made; False if one of them could not get a lock. Those before it stay."""
    context.configure(
        connection=connection, target_metadata=metadata, compare_server_default=True, transaction_per_migration=True
    )
    try:
        with context.begin_transaction():
            context.run_migrations()
    except DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) not in LOCKED:
            raise
        connection.rollback()
        return False
    return True


async def main() -> None:
    engine = unpooled_engine(context.config.attributes["database_url"])
    async with engine.connect() as connection:
        await connection.run_sync(migrate)
        await connection.commit()
    await engine.dispose()


asyncio.run(main())
