"""Whether the database is one that a server can work with."""

import asyncpg
from sqlalchemy import text

from app.errors import ServerUnavailable
from app.storage.database import Database, Query, Row, Tx

_AS_A_WHOLE = "asks about the database as a whole"

_STATE = Query(
    text("select version_num, current_setting('transaction_read_only') = 'on' as read_only from alembic_version"),
    across_tenants=_AS_A_WHOLE,
)
_SERVER = Query(
    text("""
    select current_setting('server_version') as version, current_setting('server_version_num')::int / 10000 as major,
        current_setting('transaction_read_only') = 'on' as read_only
    """),
    across_tenants=_AS_A_WHOLE,
)
_CONNECTED = Query(
    text("""
    select exists (
        select from pg_stat_activity where datname = current_database() and application_name = :application_name
    ) as connected
    """),
    across_tenants=_AS_A_WHOLE,
)


async def demand_ready(database: Database, outdated: frozenset[str]) -> None:
    """Raises DatabaseUnavailable if Postgres does not answer or takes no writes, and ServerUnavailable if its schema is an
    `outdated` one or gone. A newer schema is none of ours: replicas are replaced one after the other."""
    try:
        async with database.autocommit() as tx:
            state = await tx.one(_STATE)
            if state and state["read_only"]:
                # What a write would raise: this connection is given up, for another may lead to a server that takes writes.
                raise asyncpg.ReadOnlySQLTransactionError
    except asyncpg.UndefinedTableError:
        state = None
    if state is None or state["version_num"] in outdated:
        raise ServerUnavailable("The database's schema is older than this server.")


async def describe_server(tx: Tx) -> Row:
    """Postgres' `version`, its `major` number, and whether it is `read_only`."""
    row = await tx.one(_SERVER)
    assert row
    return row


async def is_connected(tx: Tx, application_name: str) -> bool:
    """Whether some process has a connection of this name to the database."""
    row = await tx.one(_CONNECTED, application_name=application_name)
    return bool(row and row["connected"])
