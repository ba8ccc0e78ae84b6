"""The one place that builds things: settings → database, upstreams, executor, application."""

import asyncio
import contextlib
import os
import secrets
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
from litestar.types import ASGIApp
from msgspec import Struct

from app import echo, embedded, migrate
from app.api import asgi
from app.api.bodies import Bodies
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
from app.storage import sealing, tenants
from app.storage.backlog import Backlogs
from app.storage.database import Database
from app.storage.redislog import RedisLogs

OTHER_KEY = (
    "the secret key is not the one that this database knows: give every process the same REPRISE_SECRET_KEY, and former ones in "
    "REPRISE_OLD_SECRET_KEYS; if the key is lost, `reprise rekey` goes on without what it has sealed."
)

LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


WORKER_CONNECTION = "reprise worker"
"""What Postgres calls the heartbeat's connection of a process that claims background runs."""


def missing_servers(settings: Settings) -> frozenset[str]:
    """The servers that no address is given for: POSTGRES, VALKEY."""
    addresses = {embedded.POSTGRES: settings.database_url, embedded.VALKEY: settings.redis_url}
    return frozenset(server for server, address in addresses.items() if not address)


def with_servers(
    settings: Settings, servers: frozenset[str] = embedded.BOTH, *, create_database: bool = False
) -> Settings:
    """The settings with the addresses of `servers`: where none is given, an embedded one is started, and lives as long as this
    process. Raises EmbeddedError, and SettingsError if there is no database that may not be created."""
    missing = missing_servers(settings) & servers
    if not missing:
        return settings
    if embedded.POSTGRES in missing and not (create_database or has_embedded(settings, embedded.POSTGRES)):
        raise SettingsError(
            f"there is no database in {settings.data_path}: `reprise serve` makes one, or set DATABASE_URL."
        )
    started = embedded.start(settings.data_path, servers=missing, durable=settings.durable)
    return msgspec.structs.replace(
        settings,
        database_url=started.database_url if embedded.POSTGRES in missing else settings.database_url,
        redis_url=started.redis_url if embedded.VALKEY in missing else settings.redis_url,
    )


def has_embedded(settings: Settings, server: str) -> bool:
    """Whether the data directory holds data of an embedded server."""
    return embedded.exists(settings.data_path, server)


def open_seal(settings: Settings) -> Seal:
    """The server's key: REPRISE_SECRET_KEY, or one that is made once in the data directory; and the old ones that it still opens
    with. Raises SettingsError."""
    old = [
        _parsed("REPRISE_OLD_SECRET_KEYS", part) for part in map(str.strip, settings.old_secret_keys.split(",")) if part
    ]
    if settings.secret_key:
        return Seal(_parsed("REPRISE_SECRET_KEY", settings.secret_key), *old)
    path = secret_key_path(settings)
    try:
        return Seal(_kept_key(path), *old)
    except OSError as error:
        raise SettingsError(f"{path} can't be used: {error.strerror}; set REPRISE_SECRET_KEY.") from None
    except ValueError as error:
        raise SettingsError(f"{path} is not valid: {error}.") from None


def has_secret_key(settings: Settings) -> bool:
    """Whether a key is set, or one was made."""
    return bool(settings.secret_key) or os.path.lexists(secret_key_path(settings))


def secret_key_path(settings: Settings) -> Path:
    """Where the key is kept that is made."""
    return settings.data_path / "secret.key"


def _parsed(variable: str, key: str) -> bytes:
    try:
        return parse_key(key)
    except ValueError as error:
        raise SettingsError(f"{variable} is not valid: {error}.") from None


def _kept_key(path: Path) -> bytes:
    """The key in a file. It is made whole or not at all: of processes that make one at once, all take the first."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix="secret.key.") as made:  # mode 0600
            made.write(secrets.token_bytes(KEY_BYTES))
            made.flush()
            os.fsync(made.fileno())
            with contextlib.suppress(FileExistsError):
                os.link(made.name, path)
    return path.read_bytes()


class Assembly(Struct, frozen=True):
    """A server that is built and not yet listening."""

    settings: Settings
    catalog: Catalog
    app: ASGIApp
    keys_in_use: bool
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
async def core(
    settings: Settings, catalog: Catalog, *, claims: bool
) -> AsyncIterator[tuple[Core, dict[str, Upstream]]]:
    """Everything below the API, and its orderly end. Raises SettingsError."""
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
    """Whether there are keys. Without keys anybody may call; then only this machine may reach us."""
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
    return in_use
