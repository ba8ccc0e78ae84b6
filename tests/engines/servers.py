"""The engines as processes of their own, with the tiny model."""

import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.engines import MODEL
from tests.servers import ROOT

START_TIMEOUT_S = 180.0
SEED = "11"


@dataclass(frozen=True)
class Engine:
    """One that serves. `tokens` are the ids of tokens that requests bias: `end`, `thought`, `call`, `call_start`."""

    name: str
    version: str
    base_url: str
    tokens: dict[str, str]
    log: Path


@dataclass(frozen=True)
class Installed:
    """What `make engines` has installed in its folder."""

    home: Path

    @contextmanager
    def llama_server(self) -> Iterator[Engine]:
        """llama.cpp's own server."""
        command = [self._bin / "python", "-m", "tests.engines.llama"]
        build = self._version("xllamacpp").rpartition(".")[2]
        with self._started("llama-server", f"b{build}", lambda port: [*command, str(port), SEED]) as engine:
            yield engine

    @contextmanager
    def transformers_serve(self) -> Iterator[Engine]:
        """`transformers serve`."""
        command = [self._bin / "transformers", "serve", MODEL, "--device", "cpu", "--default-seed", SEED]
        version = self._version("transformers")
        with self._started("transformers serve", version, lambda port: [*command, "--port", str(port)]) as engine:
            yield engine

    @property
    def _bin(self) -> Path:
        return self.home / "venv" / "bin"

    def _version(self, package: str) -> str:
        ask = f"import importlib.metadata; print(importlib.metadata.version({package!r}))"
        asked = subprocess.run([self._bin / "python", "-c", ask], capture_output=True, text=True, check=True)
        return asked.stdout.strip()

    @contextmanager
    def _started(self, name: str, version: str, command: Callable[[int], list[str | Path]]) -> Iterator[Engine]:
        """The engine once it answers `/health`; it runs in the folder of the weights, and finds nothing on a hub."""
        port = _free_port()
        log = self.home / f"{name.replace(' ', '-')}.log"
        tokens = json.loads((self.home / "weights" / "tokens.json").read_text())
        added = {
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(self.home / "hub"),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        with (
            log.open("w") as written,
            subprocess.Popen(
                command(port),
                cwd=self.home / "weights",
                env={**os.environ, **added},
                stdout=written,
                stderr=subprocess.STDOUT,
            ) as process,
        ):
            try:
                _wait(process, f"http://127.0.0.1:{port}/health", log)
                yield Engine(name, version, f"http://127.0.0.1:{port}/v1", tokens, log)
            finally:
                process.kill()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"the engine did not start:\n{log.read_text()[-2000:]}")
