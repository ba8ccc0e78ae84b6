"""The composition root: settings → database, upstreams, runs, application."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from litestar.types import ASGIApp
from msgspec import Struct

from app import echo, migrate
from app.api import asgi
from app.api.bodies import Bodies
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
from app.setup import OTHER_KEY, open_seal
from app.storage import sealing, tenants
from app.storage.backlog import Backlogs
from app.storage.database import Database
from app.storage.redislog import RedisLogs

LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


WORKER_CONNECTION = "reprise worker"
"""The `application_name` of the heartbeat connection of a process that claims background runs."""


class Assembly(Struct, frozen=True):
    """A server that is built and does not listen yet."""

    settings: Settings
    catalog: Catalog
    app: ASGIApp
    keys_in_use: bool
    drain: Callable[[], None]
    """Claim no more runs: the process is about to shut down."""
    break_off: Callable[[], Awaitable[None]]
    """End the responses that are made here, and disconnect the readers of others."""


class Core(Struct, frozen=True):
    """Everything that makes responses, with or without the API."""

    database: Database
    tasks: Tasks
    background: Background
    guard: Guard
    programs: ToolPrograms
    worker: Worker
    backlogs: Backlogs


@asynccontextmanager
async def core(
    settings: Settings, catalog: Catalog, *, claims: bool
) -> AsyncIterator[tuple[Core, dict[str, Upstream]]]:
    """Everything below the API, closed at the end. Raises SettingsError."""
    seal = open_seal(settings)
    database = Database(settings)
    heartbeats = Database(
        msgspec.structs.replace(settings, database_pool_size=1),
        application_name=WORKER_CONNECTION if claims else "reprise",
    )
    upstreams = {name: Upstream(name, entry, settings) for name, entry in catalog.upstreams.items()}
    logs = RedisLogs(settings)
    tasks = Tasks(settings, database, catalog, upstreams, seal)
    guard = Guard.from_settings(settings)
    programs: ToolPrograms = Programs(settings)
    background = Background(settings, database, tasks, catalog, seal, guard, programs, logs)
    worker = Worker(settings, database, heartbeats, background, logs)
    try:
        if not await sealing.accept_key(database, seal.fingerprints):
            raise SettingsError(OTHER_KEY)
        yield Core(database, tasks, background, guard, programs, worker, Backlogs(settings)), upstreams
    finally:
        await programs.close()
        for upstream in upstreams.values():
            await upstream.close()
        await asyncio.gather(database.close(), heartbeats.close())


async def _find_dialects(upstreams: Mapping[str, Upstream]) -> None:
    await asyncio.gather(*(upstream.find_dialect(None) for upstream in upstreams.values()))


@asynccontextmanager
async def working(settings: Settings) -> AsyncIterator[Worker]:
    """A worker process without an API. Raises SettingsError."""
    async with _catalog(settings) as catalog, core(settings, catalog, claims=True) as (made, upstreams):
        await _find_dialects(upstreams)
        made.worker.start(list, claims=True)
        try:
            yield made.worker
        finally:
            await made.worker.close()


@asynccontextmanager
async def _catalog(settings: Settings) -> AsyncIterator[Catalog]:
    """The catalog; without a configured upstream it names the demo, which is served meanwhile."""
    demo = None if settings.catalog or settings.openai_base_url else await echo.serve()
    try:
        yield load_catalog(settings, os.environ, demo_url=demo.base_url if demo else "")
    finally:
        if demo:
            await demo.close()


@asynccontextmanager
async def assembled(settings: Settings) -> AsyncIterator[Assembly]:
    """Everything that a serving process needs, closed at the end. Raises SettingsError."""
    claims = settings.workers_in_api
    async with _catalog(settings) as catalog, core(settings, catalog, claims=claims) as (made, upstreams):
        worker = made.worker
        executor = Executor(settings, made.database, made.tasks, made.guard, made.programs, worker.owner, made.backlogs)

        @asynccontextmanager
        async def lifespan(_: Any) -> AsyncIterator[None]:
            await _find_dialects(upstreams)
            worker.start(lambda: executor.holds, claims=claims)
            try:
                yield
            finally:
                await executor.close()
                await worker.close()

        keys_in_use = await _check_openness(settings, made.database)
        bodies = Bodies(settings)
        app = asgi.build(
            settings=settings,
            database=made.database,
            catalog=catalog,
            upstreams=upstreams,
            executor=executor,
            background=made.background,
            worker=worker,
            backlogs=made.backlogs,
            bodies=bodies,
            outdated_schemas=frozenset(migrate.revisions()[1:]),
            lifespan=lifespan,
        )

        async def break_off() -> None:
            made.background.release()
            bodies.close()
            await executor.close()

        yield Assembly(settings, catalog, app, keys_in_use, worker.drain, break_off)


async def _check_openness(settings: Settings, database: Database) -> bool:
    """Whether there are keys. Without keys every client may call, so only this machine may reach the server."""
    async with database.autocommit() as tx:
        in_use = await tenants.keys_in_use(tx)
    if in_use and settings.upstream_auth == "caller":
        raise SettingsError(
            "REPRISE_UPSTREAM_AUTH=caller passes callers' keys to the upstream, but here callers have keys of this server."
        )
    if not in_use and settings.host not in LOOPBACK:
        raise SettingsError(
            f"REPRISE_HOST={settings.host} would let every client in, because there are no keys: "
            "make one with `reprise keys create`, or listen on 127.0.0.1."
        )
    return in_use
