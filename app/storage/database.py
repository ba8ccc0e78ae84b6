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

from app.errors import DatabaseUnavailable, OutcomeUnknown
from app.settings import Settings
from app.storage.urls import connector

Row = Mapping[str, Any]
"""A row, by column name."""

_DIALECT = dialect.dialect()  # type: ignore[no-untyped-call]
_LOST = (
    OSError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    DBAPIError,
    dialect.AsyncAdapt_asyncpg_dbapi.Error,  # what opening a raw connection raises
    PoolTimeout,
)
"""What is raised on this side of the wire for a connection that is lost or can't be had."""

_NOT_NOW = (
    "08",  # connections
    "25006",  # read-only: a standby, or a primary that an operator has closed
    "25P03",  # idle in a transaction for too long
    "25P04",  # a transaction for too long
    "40",  # deadlocks, serialization
    "53",  # disk full, memory, connections
    "55P03",  # a lock was not available in time
    "57",  # an operator, a shutdown, a timeout of the server's own
    "58",  # input and output
    "XX000",  # what poolers and proxies say of a server that they have lost
)
"""How SQLSTATEs begin with which Postgres says "not now": the same statement may succeed later, perhaps on another connection."""

_CONNECTION_LOST = ("08", "40003", "57P", "XX000")
"""Those among them that come in the place of an answer; after the others nothing is stored."""


def _is_outage(error: BaseException) -> bool:
    """The one place that decides what is an outage, and what a mistake of ours."""
    if isinstance(error, asyncpg.PostgresError):
        return str(error.sqlstate).startswith(_NOT_NOW)
    is_mistake = isinstance(error, ValueError)  # arguments that asyncpg can't encode
    return isinstance(error, _LOST) and not is_mistake


def _unavailable(error: BaseException) -> DatabaseUnavailable:
    """What is raised for an outage in the middle of a statement."""
    stored_nothing = isinstance(error, asyncpg.PostgresError) and not str(error.sqlstate).startswith(_CONNECTION_LOST)
    return (DatabaseUnavailable if stored_nothing else OutcomeUnknown)(UNAVAILABLE)


CLOSE_S = 0.5
"""How long connections may take to close in peace."""

UNAVAILABLE = "The database is unavailable; please try again."


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

    def __init__(self, settings: Settings, *, application_name: str = "reprise") -> None:
        """`application_name` is what Postgres shows of the connections."""
        self._retry_s = settings.database_retry_s
        self.engine = _engine(settings, application_name)

    @asynccontextmanager
    async def autocommit(self) -> AsyncIterator[Tx]:
        """A connection without a transaction: each statement commits by itself. Raises DatabaseUnavailable, OutcomeUnknown."""
        try:
            pooled = await self.engine.raw_connection()
        except Exception as error:
            if not _is_outage(error):
                raise
            raise DatabaseUnavailable(UNAVAILABLE) from error
        driver: Any = pooled.driver_connection
        try:
            yield Tx(driver)
        except BaseException as error:
            is_outage = _is_outage(error)
            if is_outage or isinstance(error, asyncio.CancelledError):
                # Broken off in mid-statement, it may still be in a transaction, whose locks it would keep in the pool. And
                # after a failover another connection may lead to the server that takes writes.
                driver.terminate()
            if is_outage:
                raise _unavailable(error) from error
            raise
        finally:
            pooled.close()  # only goes back to the pool, which does not reset it: nothing to wait for

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[Tx]:
        """A transaction: committed at the end of the block, rolled back by an error. Raises DatabaseUnavailable, and
        OutcomeUnknown only if the answer to the commit is lost."""
        commits = False
        try:
            async with self.autocommit() as tx, tx.transaction():
                yield tx
                commits = True
        except OutcomeUnknown as error:
            if commits:
                raise
            raise DatabaseUnavailable(error.message) from error.__cause__

    def retrying(self, *, forever: bool = False) -> AsyncIterator[stamina.Attempt]:
        """Attempts at an idempotent write while Postgres is away, for at most REPRISE_DATABASE_RETRY_S, or forever."""
        return self._attempts(always=True, timeout_s=None if forever else self._retry_s)

    def settling(self) -> AsyncIterator[stamina.Attempt]:
        """Attempts at an idempotent write; it is repeated, for as long, only once its outcome is unknown."""
        return self._attempts(always=False, timeout_s=self._retry_s)

    def _attempts(self, *, always: bool, timeout_s: float | None) -> AsyncIterator[stamina.Attempt]:
        unknown = False

        def goes_on(error: Exception) -> bool:
            nonlocal unknown
            if not isinstance(error, DatabaseUnavailable):
                return False
            error.is_unknown = unknown = unknown or error.is_unknown
            return always or unknown

        return stamina.retry_context(
            on=goes_on, attempts=None, timeout=timeout_s, wait_initial=0.05, wait_max=1.0
        ).__aiter__()

    async def close(self) -> None:
        """Close every connection; Postgres may be away."""
        try:
            async with asyncio.timeout(CLOSE_S):
                await self.engine.dispose()
        except TimeoutError:
            await self.engine.dispose(close=False)


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[Database]:
    """A way to Postgres, for as long as a command needs it."""
    database = Database(settings)
    try:
        yield database
    finally:
        await database.close()


def _engine(settings: Settings, application_name: str) -> AsyncEngine:
    engine = create_async_engine(
        "postgresql+asyncpg://",
        async_creator=connector(
            settings.database_url, timeout_s=settings.database_timeout_s, application_name=application_name, jit="off"
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
