"""The scripted MCP server as a process of its own, for tests that kill: it may die itself, and its record outlives it."""

import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlencode

ROOT = Path(__file__).resolve().parent.parent.parent


class Toolprocess:
    """`python -m tests.toolserver` over HTTP; a context manager."""

    def __init__(self, record: Path) -> None:
        """`record` is the file of its calls."""
        self.record = record
        self.port = 0
        self.process: subprocess.Popen[str]
        self.start()

    def start(self) -> None:
        """Start it, or start it again: on the same port, with the same record."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.toolserver", "--port", str(self.port), "--record", str(self.record)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        with self.process.stdout:
            said = self.process.stdout.readline()
        assert said.startswith("http://"), f"the tool server did not start: {said}"
        self.port = int(said.rsplit(":", 1)[1])

    def kill(self) -> None:
        """Kill -9."""
        self.process.kill()
        self.process.wait()

    def url(self, name: str = "any", transport: str = "mcp", **options: object) -> str:
        """Where to find it, under a name of the test's, with options."""
        query = f"?{urlencode(options)}" if options else ""
        return f"http://127.0.0.1:{self.port}/{transport}/{name}{query}"

    def calls(self, name: str) -> list[dict[str, Any]]:
        """Every call that has ever arrived under a name, in their order."""
        lines = self.record.read_text().splitlines() if self.record.exists() else []
        return [call for call in map(json.loads, lines) if call["server"] == name]

    def wait_calls(self, name: str, count: int = 1, timeout_s: float = 20.0) -> None:
        """Wait until so many calls have arrived under a name."""
        deadline = time.monotonic() + timeout_s
        while len(self.calls(name)) < count:
            assert time.monotonic() < deadline, f"{len(self.calls(name))} of {count} calls under '{name}' have arrived"
            time.sleep(0.01)

    def wait_reached(self, gate: str, timeout_s: float = 20.0) -> None:
        """Wait until a call waits at a gate."""
        deadline = time.monotonic() + timeout_s
        while not self._ask("GET", f"/gates/{gate}")["reached"]:
            assert time.monotonic() < deadline, f"no call came to gate '{gate}'"
            time.sleep(0.01)

    def shut(self, gate: str) -> None:
        """Shut an open gate, at which no call has waited yet."""
        self._ask("DELETE", f"/gates/{gate}")

    def open(self, gate: str) -> None:
        """Open a gate for those who wait and those who will come."""
        self._ask("POST", f"/gates/{gate}")

    def open_sessions(self, name: str) -> int:
        """How many sessions under a name are open."""
        return sum(one["server"] == name and not one["closed"] for one in self._ask("GET", "/sessions"))

    def outcomes(self, name: str) -> list[str]:
        """What has become of the calls under a name, since the server was started."""
        return [call["outcome"] for call in self._ask("GET", "/calls") if call["server"] == name]

    def _ask(self, method: str, path: str) -> Any:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", method=method)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
