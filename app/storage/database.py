"""The way to Postgres: SQLAlchemy's pool, Core statements compiled once, asyncpg's own connection underneath.

A statement is a module-level `Query`. Compiled once and run on the driver's connection it costs about a quarter of the same
statement through a SQLAlchemy connection; nothing else of SQLAlchemy is bypassed. Every `Query` is listed in `QUERIES`,
so that a test can demand of each that it names the tenant.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import asyncpg
import stamina
from sqlalchemy import Executable, event
from sqlalchemy.dialects.postgresql import asyncpg as dialect
from sqlalchemy.exc import DBAPIError, DisconnectionError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from app.errors import DatabaseUnavailable
from app.settings import Settings
from app.storage.addresses import connector

Row = Mapping[str, Any]
"""A row, by column name."""

_DIALECT = dialect.dialect()  # type: ignore[no-untyped-call]
_LOST = (
    OSError,
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.TooManyConnectionsError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.DeadlockDetectedError,
    DBAPIError,
    dialect.AsyncAdapt_asyncpg_dbapi.Error,  # what opening a raw connection raises
    PoolTimeout,
)


class Query:
    """A Core or `text()` statement, compiled once; its binds are given by name."""

    def __init__(self, statement: Executable, *, across_tenants: str | None = None) -> None:
        """`across_tenants` is the reason why this statement may leave the tenant out."""
        compiled = statement.compile(dialect=_DIALECT)  # type: ignore[attr-defined]
        self.sql: str = compiled.string
        self.across_tenants = across_tenants
        self._order: Sequence[str] = tuple(compiled.positiontup or ())
        self._defaults: dict[str, Any] = dict(compiled.params)
        QUERIES.append(self)

    def arguments(self, given: dict[str, Any]) -> list[Any]:
        """The binds in the order of `$1, $2, …`."""
        values = {**self._defaults, **given}
        return [values[name] for name in self._order]


QUERIES: list[Query] = []


def storable(text: str) -> bool:
    """Whether Postgres can hold this text; an id that it can't hold is that of no row."""
    return "\0" not in text


class Tx:
    """One connection, in a transaction or for one statement; lives as short as can be."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection

    def transaction(self) -> AbstractAsyncContextManager[Any]:
        """From here to the end of the block, all or nothing."""
        transaction: AbstractAsyncContextManager[Any] = self._connection.transaction()
        return transaction

    async def all(self, query: Query, **binds: Any) -> list[Row]:
        """Every row."""
        rows: list[Row] = await self._connection.fetch(query.sql, *query.arguments(binds))
        return rows

    async def one(self, query: Query, **binds: Any) -> Row | None:
        """The first row, or None."""
        row: Row | None = await self._connection.fetchrow(query.sql, *query.arguments(binds))
        return row


class Database:
    """The pool. `begin()` for statements that must agree, `autocommit()` for a single one."""

    def __init__(self, settings: Settings) -> None:
        self._retry_s = settings.database_retry_s
        self.engine = _engine(settings)

    @asynccontextmanager
    async def autocommit(self) -> AsyncIterator[Tx]:
        """A connection without a transaction: each statement commits by itself. Raises DatabaseUnavailable."""
        try:
            pooled = await self.engine.raw_connection()
            driver: Any = pooled.driver_connection
            try:
                yield Tx(driver)
            except (asyncio.CancelledError, *_LOST):
                # Broken off in mid-statement, it may still be in a transaction, whose locks it would keep in the pool.
                driver.terminate()
                raise
            finally:
                pooled.close()  # only goes back to the pool, which does not reset it: nothing to wait for
        except _LOST as error:
            raise DatabaseUnavailable("The database is unavailable; please try again.") from error

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[Tx]:
        """A transaction: committed at the end of the block, rolled back by an error. Raises DatabaseUnavailable."""
        async with self.autocommit() as tx, tx.transaction():
            yield tx

    def retrying(self) -> AsyncIterator[stamina.Attempt]:
        """Attempts at an idempotent write while Postgres is away, for at most REPRISE_DATABASE_RETRY_S."""
        return stamina.retry_context(
            on=DatabaseUnavailable, attempts=None, timeout=self._retry_s, wait_initial=0.05, wait_max=1.0
        ).__aiter__()

    async def close(self) -> None:
        """Close every connection."""
        await self.engine.dispose()


def _engine(settings: Settings) -> AsyncEngine:
    engine = create_async_engine(
        "postgresql+asyncpg://",
        async_creator=connector(
            settings.database_url, timeout_s=settings.database_timeout_s, application_name="reprise", jit="off"
        ),
        isolation_level="AUTOCOMMIT",
        json_deserializer=str,  # JSON stays text: what reads it knows its type
        pool_size=settings.database_pool_size,
        max_overflow=0,
        pool_timeout=settings.database_timeout_s,
        pool_reset_on_return=None,
        pool_use_lifo=True,  # the same few connections: what they have prepared is at hand
    )

    @event.listens_for(engine.sync_engine, "checkout")
    def _replace_lost(connection: Any, _record: Any, _proxy: Any) -> None:
        # asyncpg notices a lost connection by itself: no ping is needed.
        if connection.driver_connection.is_closed():
            raise DisconnectionError

    return engine
