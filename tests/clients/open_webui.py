"""Asks Open WebUI's own API, as its page does, once it serves."""

import json
import os
import signal
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

import httpx

from tests.waiting import until

TIMEOUT_S = 180
"""It imports for half a minute."""


def ask(command: str, home: Path, env: Mapping[str, str], question: str) -> str:
    """Start it in this directory, ask, and end it. Gives its answer, or what it has printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {"DATA_DIR": str(home), "WEBUI_AUTH": "False", "WEBUI_SECRET_KEY": "test", "HF_HUB_OFFLINE": "1"}
    log = home / "log"
    with log.open("wb") as printed:
        served = subprocess.Popen(
            f"exec {command} --host 127.0.0.1 --port {port}",
            shell=True,
            cwd=home,
            env={**env, **own},
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
            until(lambda: served.poll() is not None or serves(http), "it serves or has ended", TIMEOUT_S)
            token = http.post("/api/v1/auths/signin", json={"email": "", "password": ""}).json()["token"]
            [model] = http.get("/api/models", headers={"authorization": f"Bearer {token}"}).json()["data"]
            body = {"model": model["id"], "messages": [{"role": "user", "content": question}], "stream": True}
            return joined(
                http.post("/api/chat/completions", json=body, headers={"authorization": f"Bearer {token}"}).text
            )
    except (httpx.HTTPError, AssertionError) as error:
        return f"{error!r}\n{log.read_text(errors='replace')}"
    finally:
        os.killpg(served.pid, signal.SIGKILL)
        served.wait()


def joined(stream: str) -> str:
    """The text of a streamed answer."""
    chunks = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


def serves(http: httpx.Client, path: str = "/health") -> bool:
    """Whether it answers there, and well."""
    try:
        return http.get(path).is_success
    except httpx.TransportError:
        return False
