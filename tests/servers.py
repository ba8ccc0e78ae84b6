"""The server under test: `reprise serve` in a process of its own, on a port and a data set of its own."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Self

import openai

from tests.forked import ROOT, ForkServer, Process

START_TIMEOUT_S = 180.0
COMMAND_TIMEOUT_S = 60.0


FORKS = ForkServer()
"""Forks servers, unless a test needs more than settings."""


def reprise(env: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """One command, run to its end; `env` are its settings. With a PYTHONPATH it is no fork, so that Python reads that first."""
    whole_env = {**_inherited(), **env}
    if "PYTHONPATH" not in env:
        return FORKS.run(whole_env, *arguments, timeout_s=COMMAND_TIMEOUT_S)
    return subprocess.run(
        [sys.executable, "-m", "app", *arguments],
        cwd=ROOT,
        env=whole_env,
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
        check=False,
    )


def _inherited() -> dict[str, str]:
    """The environment without settings of Reprise."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("REPRISE_", "OPENAI_"))}


class Served:
    """One server process; a context manager. `env` are its settings."""

    def __init__(
        self, env: Mapping[str, str], *, command: str = "serve", files_max: tuple[int, int] | None = None
    ) -> None:
        """With a PYTHONPATH it is no fork, so that Python reads that first; `files_max` are limits of open files."""
        self._env = {**_inherited(), "REPRISE_PORT": "0", **env}
        self._command, self._is_fork, self._files_max = command, "PYTHONPATH" not in env, files_max
        self.printed: list[str] = []
        self.start()

    def start(self) -> None:
        """Start it, or start it again, and wait until it listens."""
        listening = threading.Event()  # a new one: the reader of an earlier process may still set the old one
        self.url = ""
        self.process = self._started()
        self._reader = threading.Thread(target=self._read, args=(self.process, listening), daemon=True)
        self._reader.start()
        if not listening.wait(START_TIMEOUT_S) or not self.url:
            self.kill()
            raise RuntimeError("the server did not start:\n" + "".join(self.printed))

    def _started(self) -> Process | subprocess.Popen[str]:
        if self._is_fork:
            return FORKS.start(self._env, self._command, files_max=self._files_max)
        return subprocess.Popen(
            [sys.executable, "-m", "app", self._command],
            cwd=ROOT,
            env=self._env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def _read(self, process: Process | subprocess.Popen[str], listening: threading.Event) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                self.printed.append(line)
                if line.startswith("Reprise works as "):
                    self.url = line
                    listening.set()
                if line.startswith("Reprise listens on "):
                    self.url = line.removeprefix("Reprise listens on ").strip()
                    listening.set()
        listening.set()

    @property
    def env(self) -> Mapping[str, str]:
        """Its settings, for another process of the same deployment."""
        return self._env

    @property
    def database_url(self) -> str:
        """Where its data is, for tests that look at the rows."""
        return self._env["DATABASE_URL"]

    def client(self, api_key: str = "none", **options: object) -> openai.OpenAI:
        """The official client; it does not retry, so that a test sees every error."""
        return openai.OpenAI(base_url=self.url, api_key=api_key, max_retries=0, **options)  # type: ignore[arg-type]

    def async_client(self, api_key: str = "none", **options: object) -> openai.AsyncOpenAI:
        """The official client for concurrent tests."""
        return openai.AsyncOpenAI(base_url=self.url, api_key=api_key, max_retries=0, **options)  # type: ignore[arg-type]

    def stop(self) -> int:
        """SIGTERM; gives the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self._wait()

    def kill(self) -> int:
        """SIGKILL."""
        self.process.kill()
        return self._wait()

    def _wait(self) -> int:
        status = self.process.wait(START_TIMEOUT_S)
        self._reader.join(START_TIMEOUT_S)
        return status

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()
