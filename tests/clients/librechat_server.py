"""Asks LibreChat's own API, as its page does: the server of a checkout that is built, with the MongoDB that MONGO_URI names."""

import json
import os
import socket
import subprocess
import uuid
from pathlib import Path
from typing import Any

import httpx

from tests.clients.open_webui import serves
from tests.waiting import until

TIMEOUT_S = 120
NO_PARENT = "00000000-0000-0000-0000-000000000000"
"""What the first message of a conversation names as the one before it."""
BROWSER = {
    "user-agent": "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/130.0 Safari/537.36"
}
"""Others are refused."""
OWN = {
    "NODE_ENV": "production",
    "ALLOW_EMAIL_LOGIN": "true",
    "ALLOW_REGISTRATION": "true",
    "ALLOW_UNVERIFIED_EMAIL_LOGIN": "true",
    "SEARCH": "false",
    "CREDS_KEY": "0" * 64,
    "CREDS_IV": "0" * 32,
    "JWT_SECRET": "0" * 64,
    "JWT_REFRESH_SECRET": "1" * 64,
}


def ask(checkout: Path, config: Path, question: str) -> str:
    """Start it with this librechat.yaml, ask as a new user, and end it. Gives its answer, or what it has printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = config.with_name("log")
    with log.open("wb") as printed:
        served = subprocess.Popen(
            ["node", "api/server/index.js"],
            cwd=checkout,
            env={**os.environ, **OWN, "CONFIG_PATH": str(config), "HOST": "127.0.0.1", "PORT": str(port)},
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=BROWSER, timeout=TIMEOUT_S) as http:
            until(lambda: served.poll() is not None or serves(http, "/readyz"), "it serves or has ended", TIMEOUT_S)
            return converse(http, question)
    except (httpx.HTTPError, AssertionError) as error:
        return f"{error!r}\n{log.read_text(errors='replace')}"
    finally:
        served.kill()
        served.wait()


def converse(http: httpx.Client, question: str) -> str:
    """The answer to the question; the conversation goes on, gets a title, and its last answer is stopped."""
    account = {"email": f"{uuid.uuid4()}@example.com", "password": "password of a test"}
    new = {"name": "Test", "confirm_password": account["password"], **account}
    http.post("/api/auth/register", json=new).raise_for_status()
    token = http.post("/api/auth/login", json=account).raise_for_status().json()["token"]
    http.headers["authorization"] = f"Bearer {token}"
    assert http.get("/api/models").json()["Reprise"] == ["echo"]

    first = say(http, question)
    assert http.get(f"/api/convos/gen_title/{first['conversationId']}").raise_for_status().json()["title"]
    named = say(http, "My name is Ada.", after=first)
    asked = say(http, "What is my name?", after=named)
    assert "Your name is Ada." in text_of(asked), asked
    stopped = say(http, "A long tale. " * 50, after=asked, stop=True)
    assert stopped["unfinished"], stopped
    kept = http.get(f"/api/messages/{first['conversationId']}").json()
    assert [text_of(message) for message in kept[1::2]] == [text_of(said) for said in (first, named, asked, stopped)]
    return text_of(first)


def say(http: httpx.Client, text: str, *, after: dict[str, Any] | None = None, stop: bool = False) -> dict[str, Any]:
    """The message that answers this one; with `stop` its first words."""
    body = {
        "endpoint": "Reprise",
        "endpointType": "custom",
        "model": "echo",
        "text": text,
        "sender": "User",
        "isCreatedByUser": True,
        "messageId": str(uuid.uuid4()),
        "parentMessageId": after["messageId"] if after else NO_PARENT,
        "conversationId": after and after["conversationId"],
    }
    stream = http.post("/api/agents/chat/Reprise", json=body).raise_for_status().json()["streamId"]
    with http.stream("GET", f"/api/agents/chat/stream/{stream}") as events:
        for line in events.iter_lines():
            event = json.loads(line[6:]) if line.startswith("data: ") else {}
            if stop and event.get("event") == "on_message_delta":
                stop = False
                http.post("/api/agents/chat/abort", json={"streamId": stream}).raise_for_status()
            if event.get("final"):
                answer: dict[str, Any] = event["responseMessage"]
                return answer
    raise AssertionError(f"no answer to {text!r}")


def text_of(message: dict[str, Any]) -> str:
    """Its text."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")
