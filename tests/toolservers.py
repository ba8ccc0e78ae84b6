"""The reference tool servers as an operator runs them: programs, reached over HTTP or stdio with the official client."""

import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Self

import httpx2
from mcp import Client
from mcp.client.stdio import StdioServerParameters
from mcp.client.streamable_http import streamable_http_client

from tests.servers import ROOT, START_TIMEOUT_S


def program(name: str, *arguments: str) -> list[str]:
    """The command line of a tool server."""
    return [sys.executable, "-m", f"app.toolservers.{name}", *arguments]


def over_stdio(name: str, *arguments: str, **env: str) -> StdioServerParameters:
    """A tool server that a client starts for itself."""
    command, *rest = program(name, *arguments)
    return StdioServerParameters(command=command, args=rest, cwd=ROOT, env=env or None)


class OverHttp:
    """A tool server on a free port of loopback; a context manager. `url` is where it listens."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [*command, "--http", "127.0.0.1:0"],
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.token = (env or {}).get("TOOLSERVER_TOKEN", "")
        self.printed: list[str] = []
        self.url = ""
        self._announced = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._announced.wait(START_TIMEOUT_S) or not self.url:
            self.__exit__()
            raise RuntimeError("the tool server did not start:\n" + "".join(self.printed))

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        """A client with the server's token; without TLS, whose certificates take longer to load than a call."""
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        timeout = httpx2.Timeout(30, read=300)
        async with (
            httpx2.AsyncClient(headers=headers, timeout=timeout, verify=False) as http,
            Client(streamable_http_client(self.url, http_client=http)) as client,
        ):
            yield client

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout:
            for line in self.process.stdout:
                self.printed.append(line)
                if " listens on " in line:
                    self.url = line.split(" listens on ")[1].strip()
                    self._announced.set()
        self._announced.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(START_TIMEOUT_S)
        self._reader.join(START_TIMEOUT_S)
