"""`reprise serve | worker | migrate | keys | rekey | doctor`."""

import asyncio
import contextlib
import gc
import math
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import FrameType
from typing import TypeVar

import click
import uvicorn

import app
from app import assembly, http, migrate
from app.doctor import examine
from app.embedded import POSTGRES, VALKEY, EmbeddedError
from app.errors import ApiError
from app.http.door import Door
from app.http.listener import accept_last, listen
from app.settings import Settings, SettingsError, load
from app.storage import sealing, tenants
from app.storage.database import Database
from app.telemetry import log_loop_fault, start_logging

T = TypeVar("T")

JUST_POSTGRES = frozenset({POSTGRES})

COLLECTED_OBJECTS = 10_000
"""New objects between two looks for garbage: as many as a few requests make. Little of it is in cycles."""

LAST_WORDS_S = 5
"""How long readers may take to hear the end of responses that were broken off by a shutdown."""


@click.version_option(app.__version__, message="reprise %(version)s")
@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    help="A persistent, stateful Responses API server in front of any Chat Completions upstream.",
)
def reprise() -> None:
    """The console script."""


def main() -> None:
    """Run the command line; what is wrong with the set-up is told in one line."""
    try:
        reprise.main(standalone_mode=True, prog_name="reprise")
    except (SettingsError, EmbeddedError, ApiError) as error:
        click.echo(f"reprise: {error}", err=True)
        sys.exit(1)


def _settings() -> Settings:
    settings = load(os.environ)
    start_logging(settings.log_level)
    return settings


def _run(main: Awaitable[T]) -> T:
    async def awaited() -> T:
        asyncio.get_running_loop().set_exception_handler(log_loop_fault)
        return await main

    if sys.platform == "win32":
        return asyncio.run(awaited())
    import uvloop

    return uvloop.run(awaited())


# -- serve ------------------------------------------------------------------------------------------------------------------


@reprise.command()
def serve() -> None:
    """Serve the API; without DATABASE_URL or REDIS_URL on embedded servers of its own."""
    settings = _settings()
    embedded = assembly.missing_servers(settings)
    settings = assembly.with_servers(settings, create_database=True)
    if POSTGRES in embedded:
        migrate.upgrade(settings.database_url)
    _run(_serve(settings, embedded))


async def _serve(settings: Settings, embedded: frozenset[str]) -> None:
    await _demand_schema(settings)
    async with assembly.assembled(settings) as built:
        door = Door(settings)
        door.fit_open_files()
        config = uvicorn.Config(built.app, lifespan="on", **http.options(door))
        listener = listen(settings)

        def listening() -> None:
            _settle()
            click.echo(_welcome(built, listener.getsockname()[1], embedded))

        server = _Server(config, door, listening, built.drain, built.break_off)
        await server.serve(sockets=[listener])


def _settle() -> None:
    """What is there by now stays: the garbage collector need not look at it again, nor come so often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECTED_OBJECTS, *gc.get_threshold()[1:])


async def _demand_schema(settings: Settings) -> None:
    if fault := await migrate.fault(settings.database_url):
        raise SettingsError(fault)


class _Server(uvicorn.Server):
    """Says when it listens, and ends in order: exit status 0, and every response has its end or another worker."""

    def __init__(
        self,
        config: uvicorn.Config,
        door: Door,
        listening: Callable[[], None],
        stopping: Callable[[], None],
        break_off: Callable[[], Awaitable[None]],
    ) -> None:
        super().__init__(config)
        self._door = door
        self._listening, self._stopping, self._break_off = listening, stopping, break_off
        self._loop, self._interrupted = asyncio.get_running_loop(), asyncio.Event()
        self._grace_s, self._delay_s = door.settings.shutdown_grace_s, door.settings.shutdown_delay_s

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            self._listening()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ends_at = time.monotonic() + self._grace_s
        self._stopping()
        self._door.close(self.server_state.connections)
        # Responses that are not done in time end as failed, and their readers are still there to hear it.
        ending = asyncio.create_task(self._end_responses())
        await self._listen_on()
        for listener in sockets or []:
            await accept_last(listener)
        self.config.timeout_graceful_shutdown = math.ceil(max(0.0, ends_at - time.monotonic()) + LAST_WORDS_S)
        await super().shutdown(sockets)
        ending.cancel()
        await asyncio.gather(ending, return_exceptions=True)

    async def _listen_on(self) -> None:
        """Give who balances the load time to see that this process is not ready; not after Ctrl-C, for that is a person."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(self._delay_s, self._grace_s)):
                await self._interrupted.wait()

    async def _end_responses(self) -> None:
        await asyncio.sleep(self._grace_s)
        await self._break_off()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit and sig == signal.SIGINT:  # Ctrl-C again: at once, as by kill -9, which nothing fears
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        super().handle_exit(sig, frame)
        if sig == signal.SIGINT:
            self._loop.call_soon_threadsafe(self._interrupted.set)
        self._captured_signals.clear()  # else uvicorn would die of them after its orderly end


def _welcome(built: assembly.Assembly, port: int, embedded: frozenset[str]) -> str:
    settings, catalog = built.settings, built.catalog
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{host}:{port}/v1"
    demo = not settings.catalog and not settings.openai_base_url
    upstreams = ", ".join(
        "echo, the built-in demo (set OPENAI_BASE_URL to call a real one)" if demo else f"{name} at {entry.base_url}"
        for name, entry in catalog.upstreams.items()
    )
    model = "echo" if demo else (catalog.model_names or ["MODEL"])[0]
    if built.keys_in_use:
        keys, header, api_key = "every request needs one", " -H 'authorization: Bearer YOUR_KEY'", "YOUR_KEY"
    else:
        keys, header, api_key = "none: anybody on this machine may call (`reprise keys create` ends that)", "", "none"
    return f"""
Reprise listens on {url}
  data      {_data(settings, embedded)}
  upstream  {upstreams}
  keys      {keys}

Try it:
  curl {url}/responses{header} -H 'content-type: application/json' -d '{{"model": "{model}", "input": "Hello!"}}'

  from openai import OpenAI
  client = OpenAI(base_url="{url}", api_key="{api_key}")
  first = client.responses.create(model="{model}", input="My name is Ada.")
  print(client.responses.create(model="{model}", input="What is my name?", previous_response_id=first.id).output_text)
"""


def _data(settings: Settings, embedded: frozenset[str]) -> str:
    """Where the data are, and which servers are embedded."""
    if not embedded:
        return "the Postgres of DATABASE_URL"
    if POSTGRES not in embedded:
        return f"the Postgres of DATABASE_URL, with an embedded Valkey in {settings.data_path}"
    return f"{settings.data_path} (embedded Postgres{' and Valkey' if VALKEY in embedded else ''})"


# -- worker, migrate --------------------------------------------------------------------------------------------------------


@reprise.command()
def worker() -> None:
    """Make background responses, and end what dead processes have left behind, without serving the API."""
    settings = assembly.with_servers(_settings())
    _run(_work(settings))


async def _work(settings: Settings) -> None:
    await _demand_schema(settings)
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with assembly.working(settings) as working:
        _settle()
        click.echo(f"Reprise works as {working.owner.worker}")
        await stopped.wait()


@reprise.command("migrate")
def migrate_command() -> None:
    """Bring the database's schema to this version."""
    migrate.upgrade(assembly.with_servers(_settings(), JUST_POSTGRES, create_database=True).database_url)
    click.echo("The schema is that of this version.")


@asynccontextmanager
async def _database(settings: Settings) -> AsyncIterator[Database]:
    database = Database(settings)
    try:
        yield database
    finally:
        await database.close()


# -- keys -------------------------------------------------------------------------------------------------------------------


@reprise.group()
def keys() -> None:
    """API keys. As soon as there is one, every request needs one."""


def _existing() -> Settings:
    """The settings with a database that is there and has the tables."""
    settings = assembly.with_servers(_settings(), JUST_POSTGRES)
    _run(_demand_schema(settings))
    return settings


@keys.command("create")
@click.option("--tenant", default=tenants.DEFAULT_TENANT, show_default=True, help="Whose data the key opens.")
@click.option("--name", default="", help="A note for yourself.")
def create_key(tenant: str, name: str) -> None:
    """Make a key and print it; it is shown this once."""
    settings = _existing()

    async def create() -> tuple[str, str]:
        async with _database(settings) as database, database.begin() as tx:
            await tenants.ensure_tenant(tx, tenant)
            return await tenants.create_key(tx, tenant, name)

    id, secret = _run(create())
    click.echo(secret)
    click.echo(f"{id} for tenant {tenant}; keep it: only its hash is stored.", err=True)


@keys.command("list")
def list_keys() -> None:
    """Every key: id, tenant, name, when it was made and revoked."""
    settings = _existing()

    async def listed() -> list[tenants.Key]:
        async with _database(settings) as database, database.autocommit() as tx:
            return await tenants.list_keys(tx)

    for key in _run(listed()):
        state = f"revoked {key.revoked}" if key.revoked else "valid"
        click.echo("\t".join((key.id, key.tenant_id, key.name or "-", key.created, state)))


@keys.command("revoke")
@click.argument("key_id")
def revoke_key(key_id: str) -> None:
    """Revoke a key by its id."""
    settings = _existing()

    async def revoke() -> bool:
        async with _database(settings) as database, database.autocommit() as tx:
            return await tenants.revoke_key(tx, key_id)

    if not _run(revoke()):
        raise SettingsError(f"there is no valid key {key_id}.")
    click.echo(f"{key_id} is revoked; servers notice within {settings.key_cache_s:g} s.")


@reprise.command()
def rekey() -> None:
    """Accept this set-up's secret key although the database knows another, which is lost with all that it has sealed."""
    settings = _existing()
    fingerprints = assembly.open_seal(settings).fingerprints

    async def accept() -> None:
        async with _database(settings) as database:
            await sealing.accept_key(database, fingerprints, anyway=True)

    _run(accept())
    click.echo("The database knows this secret key now.")


# -- doctor -----------------------------------------------------------------------------------------------------------------


@reprise.command()
def doctor() -> None:
    """Say what is wrong with this set-up; the exit status is 1 if anything is."""
    start_logging("error")
    sys.exit(0 if _run(_examine()) else 1)


async def _examine() -> bool:
    healthy = True
    async for finding in examine(os.environ):
        click.echo(f"{'ok  ' if finding.ok else 'BAD '} {finding.what}: {finding.said}")
        healthy = healthy and finding.ok
    return healthy
