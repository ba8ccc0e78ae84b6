"""The composition root: settings → database, upstreams, pipeline, application."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from litestar.types import ASGIApp
from msgspec import Struct

from app import echo, migrate
from app.api import asgi
from app.api.attempts import FailedAttempts
from app.api.auth import Auth
from app.api.bearer import BearerTokens
from app.api.bodies import Bodies
from app.api.services import Services
from app.domain.sealed import Seal
from app.outbound.catalog import Catalog
from app.outbound.catalog_file import load_catalog
from app.outbound.extraction import Extraction
from app.outbound.guard import Guard
from app.outbound.mcp import ToolPrograms
from app.outbound.programs import Programs
from app.outbound.tokens import TokenCounter
from app.outbound.upstream import Upstream
from app.rooms import Rooms
from app.runs.admission import Admission
from app.runs.agents import Agents
from app.runs.background import BackgroundRuns
from app.runs.cancellation import Cancellation
from app.runs.claims import Claims
from app.runs.counting import TokenCounts
from app.runs.files import FileReading
from app.runs.following import Following
from app.runs.foreground import ForegroundRuns
from app.runs.leases import Leases
from app.runs.maintenance import Maintenance
from app.runs.pipeline import Pipeline, Prompts
from app.runs.planning import Planner
from app.runs.quotas import Quotas
from app.runs.storage_quota import StorageQuota
from app.settings import Settings, SettingsError
from app.setup import OTHER_KEY, compaction_prompt, open_seal, reasoning_summary_prompt
from app.storage import key_fingerprint, keys
from app.storage.backlog import Backlogs
from app.storage.database import Database
from app.storage.queue import Heartbeat, Owner
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
    """Whether every request needs a key or a token."""
    drain: Callable[[], None]
    """Claim no more runs: the process is about to shut down."""
    break_off: Callable[[], Awaitable[None]]
    """End the responses that are made here, and disconnect the readers of others."""


class Core(Struct, frozen=True):
    """Everything that makes responses, with or without the API."""

    database: Database
    upstreams: Mapping[str, Upstream]
    agents: Agents
    planner: Planner
    counter: TokenCounter
    seal: Seal
    guard: Guard
    pipeline: Pipeline
    logs: RedisLogs
    quotas: Quotas
    background: BackgroundRuns
    leases: Leases
    claims: Claims
    maintenance: Maintenance

    async def start(self, foreground: Callable[[], Sequence[Heartbeat]], *, claims: bool) -> None:
        """Start Redis, heartbeats (also for `foreground` runs) and claims."""
        await asyncio.gather(*(upstream.find_dialect(None) for upstream in self.upstreams.values()))
        self.logs.start(self.claims.notified, lambda: self.leases.watch.lease_is_valid)
        self.quotas.start()
        self.leases.start(self.claims.runs, foreground, self.claims.wake)
        self.maintenance.start()
        if claims:
            self.claims.start()

    async def stop(self) -> None:
        """Let runs finish within the grace period, hand back the others, then stop in reverse order."""
        await self.claims.close()
        await self.maintenance.close()
        await self.quotas.close()
        await self.leases.close()
        await self.logs.close()


@asynccontextmanager
async def core(settings: Settings, catalog: Catalog, *, claims: bool) -> AsyncIterator[Core]:
    """Everything below the API, closed at the end. Raises SettingsError."""
    seal, prompts = open_seal(settings), Prompts(compaction_prompt(settings), reasoning_summary_prompt(settings))
    database = Database(settings)
    heartbeats = Database(
        msgspec.structs.replace(settings, database_pool_size=1),
        application_name=WORKER_CONNECTION if claims else "reprise",
    )
    upstreams = {name: Upstream(name, entry, settings) for name, entry in catalog.upstreams.items()}
    logs = RedisLogs(settings)
    guard = Guard.from_settings(settings)
    file_reading = FileReading(settings, database, guard, Extraction(settings))
    agents = Agents(settings, database, catalog, seal)
    planner = Planner(settings, database, catalog, upstreams, seal, file_reading, agents)
    programs: ToolPrograms = Programs(settings)
    counter = TokenCounter(settings)
    pipeline = Pipeline(settings, guard, programs, counter, prompts)
    leases = Leases(settings, heartbeats, logs)
    quotas = Quotas(settings, database)
    background = BackgroundRuns(database, planner, catalog, seal, pipeline, logs, quotas)
    try:
        if not await key_fingerprint.accept_key(database, seal.fingerprints):
            raise SettingsError(OTHER_KEY)
        yield Core(
            database=database,
            upstreams=upstreams,
            agents=agents,
            planner=planner,
            counter=counter,
            seal=seal,
            guard=guard,
            pipeline=pipeline,
            logs=logs,
            quotas=quotas,
            background=background,
            leases=leases,
            claims=Claims(settings, database, leases, background, logs),
            maintenance=Maintenance(settings, database),
        )
    finally:
        await programs.close()
        for upstream in upstreams.values():
            await upstream.close()
        await asyncio.gather(database.close(), heartbeats.close())


@asynccontextmanager
async def working(settings: Settings) -> AsyncIterator[Owner]:
    """A worker process without an API, and its name. Raises SettingsError."""
    async with _catalog(settings) as catalog, core(settings, catalog, claims=True) as made:
        await made.start(list, claims=True)
        try:
            yield made.leases.owner
        finally:
            await made.stop()


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
    async with _catalog(settings) as catalog, core(settings, catalog, claims=claims) as made:
        foreground = ForegroundRuns(settings, made.database, made.pipeline, made.leases.owner, made.quotas)
        services = _services(settings, catalog, made, foreground)

        @asynccontextmanager
        async def lifespan(_: Any) -> AsyncIterator[None]:
            await made.start(foreground.heartbeats, claims=claims)
            try:
                yield
            finally:
                await foreground.close()
                await services.storage_quota.close()
                await services.auth.close()
                await made.stop()

        async def break_off() -> None:
            services.following.release()
            services.bodies.close()
            await foreground.close()

        keys_in_use = await _check_openness(settings, catalog, made.database)
        yield Assembly(settings, catalog, asgi.build(services, lifespan), keys_in_use, made.claims.drain, break_off)


def _services(settings: Settings, catalog: Catalog, made: Core, foreground: ForegroundRuns) -> Services:
    backlogs = Backlogs(settings)
    storage_quota = StorageQuota(settings, made.database)
    return Services(
        settings=settings,
        database=made.database,
        seal=made.seal,
        catalog=catalog,
        agents=made.agents,
        upstreams=made.upstreams,
        admission=Admission(
            settings,
            made.database,
            made.planner,
            made.seal,
            foreground,
            made.logs,
            backlogs,
            made.quotas,
            storage_quota,
        ),
        storage_quota=storage_quota,
        counts=TokenCounts(settings, made.database, made.planner, made.counter, made.quotas),
        following=Following(settings, made.database, made.logs, backlogs),
        cancellation=Cancellation(settings, made.database, made.logs, made.background, made.leases.owner),
        claims=made.claims,
        backlogs=backlogs,
        bodies=Bodies(settings),
        reads=Rooms(settings.reads_bytes_max, waiting_max=settings.connections_max),
        outdated_schemas=frozenset(migrate.revisions()[1:]),
        auth=Auth(settings, made.database, BearerTokens(settings, made.database, catalog.issuers, made.guard)),
        attempts=FailedAttempts(settings),
    )


async def _check_openness(settings: Settings, catalog: Catalog, database: Database) -> bool:
    """Whether there are keys or issuers. Without them every client may call, so only this machine may reach the server."""
    async with database.autocommit() as tx:
        in_use = bool(catalog.issuers) or await keys.keys_in_use(tx)
    if in_use and settings.upstream_auth == "caller":
        raise SettingsError(
            "REPRISE_UPSTREAM_AUTH=caller passes callers' keys to the upstream, but here callers have keys of this server, "
            "or tokens of its issuers."
        )
    if not in_use and settings.host not in LOOPBACK:
        raise SettingsError(
            f"REPRISE_HOST={settings.host} would let every client in, because there are no keys: "
            "make one with `reprise keys create`, or listen on 127.0.0.1."
        )
    return in_use
