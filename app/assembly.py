"""The one place that builds things: settings → database, upstreams, executor, application."""

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from litestar.types import ASGIApp
from msgspec import Struct

from app import echo, embedded
from app.api import asgi
from app.domain.sealed import KEY_BYTES, Seal, parse_key
from app.outbound.catalog import Catalog
from app.outbound.catalog_file import load_catalog
from app.outbound.guard import Guard
from app.outbound.mcp import ToolPrograms
from app.outbound.programs import Programs
from app.outbound.upstream import Upstream
from app.runs.background import Background
from app.runs.executor import Executor
from app.runs.task import Tasks
from app.runs.worker import Worker
from app.settings import Settings, SettingsError
from app.storage import tenants
from app.storage.backlog import Backlogs
from app.storage.database import Database
from app.storage.redislog import RedisLogs

LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


def with_servers(settings: Settings) -> Settings:
    """The settings with the addresses of servers: where none are given, embedded ones are started, and live as long as this
    process. Raises EmbeddedError."""
    if settings.database_url and settings.redis_url:
        return settings
    servers = embedded.start(settings.data_path, durable=settings.durable)
    return msgspec.structs.replace(
        settings,
        database_url=settings.database_url or servers.database_url,
        redis_url=settings.redis_url or servers.redis_url,
    )


def open_seal(settings: Settings) -> Seal:
    """The server's key: REPRISE_SECRET_KEY, or one that is made once in the data directory. Raises SettingsError."""
    try:
        if settings.secret_key:
            return Seal(parse_key(settings.secret_key))
        return Seal(_kept_key(settings))
    except ValueError as error:
        raise SettingsError(f"REPRISE_SECRET_KEY is not valid: {error}.") from None


def _kept_key(settings: Settings) -> bytes:
    path = settings.data_path / "secret.key"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path.read_bytes()
    with os.fdopen(file, "wb") as opened:
        key = secrets.token_bytes(KEY_BYTES)
        opened.write(key)
    return key


class Assembly(Struct, frozen=True):
    """A server that is built and not yet listening."""

    settings: Settings
    catalog: Catalog
    app: ASGIApp
    drain: Callable[[], None]
    """Take on nothing more: the end is near."""
    break_off: Callable[[], Awaitable[None]]
    """Responses that are still made here end, and readers of others go elsewhere."""


class Core(Struct, frozen=True):
    """What makes responses, with or without an API around it."""

    database: Database
    tasks: Tasks
    background: Background
    guard: Guard
    programs: ToolPrograms
    worker: Worker
    backlogs: Backlogs


@asynccontextmanager
async def core(settings: Settings, catalog: Catalog) -> AsyncIterator[tuple[Core, dict[str, Upstream]]]:
    """Everything below the API, and its orderly end. Raises SettingsError."""
    seal = open_seal(settings)
    database = Database(settings)
    heartbeats = Database(msgspec.structs.replace(settings, database_pool_size=1))
    upstreams = {name: Upstream(name, entry, settings) for name, entry in catalog.upstreams.items()}
    logs = RedisLogs(settings)
    tasks = Tasks(settings, database, catalog, upstreams, seal)
    guard = Guard.from_settings(settings)
    programs: ToolPrograms = Programs(settings)
    background = Background(settings, database, tasks, catalog, seal, guard, programs, logs)
    worker = Worker(settings, database, heartbeats, background, logs)
    try:
        yield Core(database, tasks, background, guard, programs, worker, Backlogs(settings)), upstreams
    finally:
        await programs.close()
        for upstream in upstreams.values():
            await upstream.close()
        await asyncio.gather(database.close(), heartbeats.close())


@asynccontextmanager
async def working(settings: Settings) -> AsyncIterator[Worker]:
    """A worker process without an API. Raises SettingsError."""
    async with _catalog(settings) as catalog, core(settings, catalog) as (made, _):
        made.worker.start(list, claims=True)
        try:
            yield made.worker
        finally:
            await made.worker.close()


@asynccontextmanager
async def _catalog(settings: Settings) -> AsyncIterator[Catalog]:
    """The catalog; with nothing configured, the demo is served as long as it is used."""
    demo = None if settings.catalog or settings.openai_base_url else await echo.serve()
    try:
        yield load_catalog(settings, os.environ, demo_url=demo.base_url if demo else "")
    finally:
        if demo:
            await demo.close()


@asynccontextmanager
async def assembled(settings: Settings) -> AsyncIterator[Assembly]:
    """Everything a serving process needs, and its orderly end. Raises SettingsError."""
    async with _catalog(settings) as catalog, core(settings, catalog) as (made, upstreams):
        worker = made.worker
        executor = Executor(settings, made.database, made.tasks, made.guard, made.programs, worker.owner, made.backlogs)

        @asynccontextmanager
        async def lifespan(_: Any) -> AsyncIterator[None]:
            worker.start(lambda: executor.holds, claims=settings.workers_in_api)
            try:
                yield
            finally:
                await executor.close()
                await worker.close()

        await _check_openness(settings, made.database)
        app = asgi.build(
            settings=settings,
            database=made.database,
            catalog=catalog,
            upstreams=upstreams,
            executor=executor,
            background=made.background,
            worker=worker,
            backlogs=made.backlogs,
            lifespan=lifespan,
        )

        async def break_off() -> None:
            made.background.release()
            await executor.close()

        yield Assembly(settings, catalog, app, worker.drain, break_off)


async def _check_openness(settings: Settings, database: Database) -> None:
    """Without keys anybody may call; then only this machine may reach us."""
    async with database.autocommit() as tx:
        in_use = await tenants.keys_in_use(tx)
    if in_use and settings.upstream_auth == "caller":
        raise SettingsError(
            "REPRISE_UPSTREAM_AUTH=caller passes callers' keys to the upstream, but here callers have keys of this server."
        )
    if not in_use and settings.host not in LOOPBACK:
        raise SettingsError(
            f"REPRISE_HOST={settings.host} would let anybody in, because there are no keys: "
            "make one with `reprise keys create`, or listen on 127.0.0.1."
        )
