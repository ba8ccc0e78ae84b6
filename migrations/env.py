"""Alembic's environment: the tables of app.storage, over asyncpg, one process at a time, one transaction for each migration.

A migration that changes a table waits for those that use it, and all others would wait behind it: it gives up soon, and tries again.
"""

import asyncio

import stamina
from alembic import context
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from app.storage.tables import metadata
from app.storage.urls import unpooled_engine

ONE_AT_A_TIME = 7_236_201
"""The advisory lock that keeps replicas from migrating at once; any number that nobody else uses."""

LOCK_WAIT_S = 1.0
"""How long servers may be kept waiting by a migration that waits for a lock."""

LOCK_PAUSE_S = 2.0
"""How long they continue before it tries again."""

LOCKED = frozenset({"55P03", "40P01"})
"""What Postgres says of a lock that was not to be had: lock_not_available, deadlock_detected."""


def migrate(connection: Connection) -> None:
    # Until the connection closes: each migration commits.
    connection.execute(text(f"select pg_advisory_lock({ONE_AT_A_TIME})"))
    connection.execute(text(f"set lock_timeout = {int(LOCK_WAIT_S * 1000)}"))
    connection.commit()
    run_migrations(connection)


def _is_locked(error: Exception) -> bool:
    return isinstance(error, DBAPIError) and getattr(error.orig, "sqlstate", None) in LOCKED


@stamina.retry(
    on=_is_locked, attempts=None, timeout=None, wait_initial=LOCK_PAUSE_S, wait_max=LOCK_PAUSE_S, wait_jitter=0
)
def run_migrations(connection: Connection) -> None:
    """Those that are left. Each has a transaction of its own, so that those before one that waits stay."""
    context.configure(
        connection=connection, target_metadata=metadata, compare_server_default=True, transaction_per_migration=True
    )
    try:
        with context.begin_transaction():
            context.run_migrations()
    except BaseException:
        connection.rollback()
        raise


async def main() -> None:
    engine = unpooled_engine(context.config.attributes["database_url"])
    async with engine.connect() as connection:
        await connection.run_sync(migrate)
        await connection.commit()
    await engine.dispose()


asyncio.run(main())
