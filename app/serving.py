"""Processes that serve the API or make background responses: their start, their output, and their shutdown."""

import asyncio
import contextlib
import gc
import math
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from types import FrameType

import click
import uvicorn

from app import assembly, http, migrate
from app.embedded import POSTGRES, VALKEY
from app.http.door import Door
from app.http.listener import accept_last, listen
from app.settings import Settings

COLLECTED_OBJECTS = 10_000
"""New objects between two garbage collections: as many as a few requests make. Few of them are in cycles."""

LAST_EVENTS_S = 5
"""How long clients may take to read the last events of responses that a shutdown ends."""


async def serve(settings: Settings, embedded: frozenset[str]) -> None:
    """Serve the API until a signal; `embedded` names the servers that run embedded. Raises SettingsError."""
    await migrate.demand(settings)
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


async def work(settings: Settings) -> None:
    """Make background responses until a signal. Raises SettingsError."""
    await migrate.demand(settings)
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with assembly.working(settings) as owner:
        _settle()
        click.echo(f"Reprise works as {owner.worker}")
        await stopped.wait()


def _settle() -> None:
    """Exempt the objects of the start from garbage collection, and collect less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECTED_OBJECTS, *gc.get_threshold()[1:])


class _Server(uvicorn.Server):
    """Reports when it listens, and shuts down cleanly: exit status 0, and each response has ended or goes to another worker."""

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
        # Responses that are not done in time end as failed, while their clients are still connected.
        ending = asyncio.create_task(self._end_responses())
        await self._listen_on()
        for listener in sockets or []:
            await accept_last(listener)
        self.config.timeout_graceful_shutdown = math.ceil(max(0.0, ends_at - time.monotonic()) + LAST_EVENTS_S)
        await super().shutdown(sockets)
        ending.cancel()
        await asyncio.gather(ending, return_exceptions=True)

    async def _listen_on(self) -> None:
        """Give a load balancer time to notice `/readyz`; not after Ctrl-C, which a person presses."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(self._delay_s, self._grace_s)):
                await self._interrupted.wait()

    async def _end_responses(self) -> None:
        await asyncio.sleep(self._grace_s)
        await self._break_off()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit and sig == signal.SIGINT:  # a second Ctrl-C: exit at once; like kill -9, that loses nothing
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        super().handle_exit(sig, frame)
        if sig == signal.SIGINT:
            self._loop.call_soon_threadsafe(self._interrupted.set)
        self._captured_signals.clear()  # else uvicorn would raise them again after its shutdown


def _welcome(built: assembly.Assembly, port: int, embedded: frozenset[str]) -> str:
    settings, catalog = built.settings, built.catalog
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{host}:{port}/v1"
    demo = not settings.catalog and not settings.openai_base_url
    upstreams = ", ".join(
        "echo, the built-in demo (set OPENAI_BASE_URL to call a real one)" if demo else f"{name} at {entry.address}"
        for name, entry in catalog.upstreams.items()
    )
    model = "echo" if demo else (catalog.model_names or ["MODEL"])[0]
    if built.keys_in_use:
        keys, header, api_key = "every request needs one", " -H 'authorization: Bearer YOUR_KEY'", "YOUR_KEY"
    else:
        keys, header, api_key = (
            "none: every process on this machine may call (`reprise keys create` ends that)",
            "",
            "none",
        )
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
    """The place of the data, and which servers are embedded."""
    if not embedded:
        return "the Postgres of DATABASE_URL"
    if POSTGRES not in embedded:
        return f"the Postgres of DATABASE_URL, with an embedded Valkey in {settings.data_path}"
    return f"{settings.data_path} (embedded Postgres{' and Valkey' if VALKEY in embedded else ''})"
