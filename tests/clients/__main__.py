"""`python -m tests.clients`: connects real clients as `reprise connect` says, and asks each "Hello"; fails where one gets no answer.

Then come programs with the scripted upstream behind the server: the SDK for Node.js calls every endpoint (`openai_node.mjs`), and
clients of Chat Completions stream, call tools and continue conversations (`chat_*.py`, `librechat.mjs`).
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from app.clients import CLIENTS
from tests.clients import librechat_server, open_webui
from tests.servers import ROOT, Served
from tests.toolserver import Toolserver
from tests.upstream import Upstream

HOME = ROOT / ".clients"
LARGE = {"open-webui", "librechat"}
"""Only when they are named: `make open-webui` and `make librechat` install them."""
CHECKOUT = os.environ.get("LIBRECHAT")
"""LibreChat's repository, built; no package index has it."""
APART = {"llama-index", "librechat"}
"""They have an environment of their own."""
PROGRAMS = {
    "openai-node": "node --test openai_node.mjs",
    "langchain-chat": "python chat_langchain.py",
    "llama-index": "python chat_llama_index.py",
    "litellm": "python chat_litellm.py",
    "librechat": "node --test librechat.mjs",
}
TIMEOUT_S = 120
WITHOUT_DOWNLOADS = {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
ANSWER = 'You said: "Hello".'
"""The demo model's."""


def main() -> None:
    """Run each client and print how it went; the exit status is 1 if one failed."""
    parser = argparse.ArgumentParser(description="Runs real clients.")
    parser.add_argument("--only", choices=sorted(CLIENTS), help="only this one")
    only = parser.parse_args().only
    failed = []
    with tempfile.TemporaryDirectory() as data, Served({"REPRISE_DATA_DIR": data}) as served:
        names = [only] if only else [name for name in CLIENTS if name not in LARGE]
        for name in names:
            if name == "librechat" and not CHECKOUT:
                print("     librechat itself is not asked: LIBRECHAT names no checkout", flush=True)
                continue
            printed = run(name, served.url)
            if not passed(name, ANSWER in printed, printed):
                failed.append(name)
    for name in names:
        if name in PROGRAMS:
            status, printed = run_program(name)
            if not passed(f"{name}, {PROGRAMS[name].split()[-1]}", status == 0, printed):
                failed.append(PROGRAMS[name])
    sys.exit(1 if failed else 0)


def passed(name: str, is_ok: bool, printed: str) -> bool:
    """Print how it went; gives `is_ok`."""
    print(f"{'ok  ' if is_ok else 'FAIL'} {name}", flush=True)
    if not is_ok:
        print(printed, file=sys.stderr)
    return is_ok


def run(name: str, url: str) -> str:
    """Everything that a client prints."""
    client = CLIENTS[name]
    with tempfile.TemporaryDirectory(prefix="reprise-client-") as home:
        file = Path(home) / client.file.removeprefix("~/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(client.lines(url, "echo", "none") + "\n")
        if name == "librechat":
            return librechat_server.ask(Path(str(CHECKOUT)), file, "Hello")
        if name in LARGE:
            env = {**os.environ, "PATH": f"{HOME / name / 'bin'}:{os.environ['PATH']}"}
            return open_webui.ask(client.command("none"), Path(home), env, "Hello")
        return run_in(home, name, client.command("none"), {"CODEX_HOME": f"{home}/.codex"})[1]


def run_program(name: str) -> tuple[int, str]:
    """The exit status of a client's program, and what it prints."""
    with (
        tempfile.TemporaryDirectory(prefix="reprise-client-") as home,
        Upstream() as upstream,
        Toolserver() as toolserver,
        Served(
            {
                "REPRISE_DATA_DIR": f"{home}/data",
                "REPRISE_OUTBOUND_ALLOW": "127.0.0.1/32",
                "OPENAI_BASE_URL": upstream.base_url,
            }
        ) as served,
    ):
        for file in (PROGRAMS[name].split()[-1], "scripts.py"):
            shutil.copy(Path(__file__).parent / file, home)
        mcp_url = toolserver.url("mcp", "node")
        env = {"REPRISE_URL": served.url, "UPSTREAM_URL": upstream.base_url, "MCP_URL": mcp_url}
        return run_in(home, name, PROGRAMS[name], env)


def run_in(home: str, name: str, command: str, env: Mapping[str, str]) -> tuple[int, str]:
    """The exit status of a client's command in this directory, where it finds the client, and everything that it prints."""
    modules = HOME / name if name in APART else HOME
    (Path(home) / "node_modules").symlink_to(modules / "node_modules")
    path = [HOME / (name if name in APART else "venv") / "bin", HOME / "node_modules" / ".bin", os.environ["PATH"]]
    try:
        done = subprocess.run(
            command,
            shell=True,
            cwd=home,
            env={**os.environ, "HOME": home, **WITHOUT_DOWNLOADS, "PATH": ":".join(map(str, path)), **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as expired:
        return 1, f"no end within {TIMEOUT_S} s\n{expired.stdout!r}"
    return done.returncode, done.stdout


if __name__ == "__main__":
    main()
