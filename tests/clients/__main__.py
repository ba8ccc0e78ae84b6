"""`python -m tests.clients`: connects real clients as `reprise connect` says, and asks each "Hello"; fails where one gets no answer."""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from app.clients import CLIENTS, Client
from tests.servers import ROOT, Served

HOME = ROOT / ".clients"
TIMEOUT_S = 120
ANSWER = 'You said: "Hello".'
"""The demo model's."""


def main() -> None:
    """Run each client and print how it went; the exit status is 1 if one failed."""
    parser = argparse.ArgumentParser(description="Runs real clients.")
    parser.add_argument("--only", choices=sorted(CLIENTS), help="only this one")
    only = parser.parse_args().only
    failed = []
    with tempfile.TemporaryDirectory() as data, Served({"REPRISE_DATA_DIR": data}) as served:
        for name in [only] if only else CLIENTS:
            printed = run(CLIENTS[name], served.url)
            answered = ANSWER in printed
            print(f"{'ok  ' if answered else 'FAIL'} {name}", flush=True)
            if not answered:
                failed.append(name)
                print(printed, file=sys.stderr)
    sys.exit(1 if failed else 0)


def run(client: Client, url: str) -> str:
    """Everything that a client prints."""
    with tempfile.TemporaryDirectory(prefix="reprise-client-") as home:
        file = Path(home) / client.file.removeprefix("~/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(client.lines(url, "echo", "none") + "\n")
        (Path(home) / "node_modules").symlink_to(HOME / "node_modules")
        path = [HOME / "venv" / "bin", HOME / "node_modules" / ".bin", os.environ["PATH"]]
        try:
            done = subprocess.run(
                client.command("none"),
                shell=True,
                cwd=home,
                env={**os.environ, "HOME": home, "CODEX_HOME": f"{home}/.codex", "PATH": ":".join(map(str, path))},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as expired:
            return f"no end within {TIMEOUT_S} s\n{expired.stdout!r}"
        return done.stdout


if __name__ == "__main__":
    main()
