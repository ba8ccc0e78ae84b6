"""Alembic's environment: the tables of app.storage, over asyncpg, one migration at a time."""

import asyncio

from alembic import context
from sqlalchemy import Connection, text

from app.storage.tables import metadata
from app.storage.urls import unpooled_engine

ONE_AT_A_TIME = 7_236_201
"""The advisory lock that keeps replicas from migrating at once; any number that nobody else uses."""


def migrate(connection: Connection) -> None:
    context.configure(connection=connection, target_metadata=metadata, compare_server_default=True)
    with context.begin_transaction():
        # Until the connection closes: a migration may commit in between.
        connection.execute(text(f"select pg_advisory_lock({ONE_AT_A_TIME})"))
        context.run_migrations()


async def main() -> None:
    engine = unpooled_engine(context.config.attributes["database_url"])
    async with engine.connect() as connection:
        await connection.run_sync(migrate)
        await connection.commit()
    await engine.dispose()


asyncio.run(main())
