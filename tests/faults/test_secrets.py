"""Whatever goes wrong, no log quotes what a client, a model or a tool has said; and keys, tokens and headers are in no row, and
nowhere in Redis, in no form.

A fault is one line of a table; each is provoked as a whole reply, a stream, in the background with and without a stream, and as a chat
completion with and without a stream.
"""

import contextlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from msgspec import Struct

from tests.faults.cluster import Cluster
from tests.faults.test_upstream_faults import FAILURES, LIMITS, REFUSALS, free_port
from tests.planted import free_of
from tests.upstream import Step, Upstream, answer, calling, error, note, script, status, text
from tests.waiting import dumped, remembered, until

CONFIDENTIAL = {
    "the caller's key": "caller-k3y-5f1d",
    "the upstream's key": "upstream-k3y-77aa",
    "a header of the upstream": "upstream-h3ader-19c2",
    "a token of a tool server": "mcp-t0ken-c0ffee",
    "a header of a tool server": "mcp-h3ader-beef01",
    "a key in a URL": "mcp-qu3ry-4dead5",
    "a token of the operator's tool server": "operator-t0ken-8ba1",
    "a header of the operator's tool server": "operator-h3ader-61fe",
}
"""In no log, row, or key or value of Redis."""

PRIVATE = {
    "a prompt": "prompt-of-ada-0451",
    "instructions": "instructions-of-ada-1729",
    "metadata": "metadata-of-ada-3141",
    "arguments of a tool": "arguments-of-ada-2718",
    "output of a tool": "output-of-ada-1618",
    "an answer": "answer-of-ada-1414",
}
"""In no log."""

KEY, UPSTREAM_KEY, UPSTREAM_HEADER, TOKEN, HEADER, IN_URL, OPERATORS_TOKEN, OPERATORS_HEADER = CONFIDENTIAL.values()
PROMPT, INSTRUCTIONS, METADATA, ARGUMENT, OUTPUT, ANSWER = PRIVATE.values()

LISTED = "echo,raw,refuse,status,cut,gone,gate"
AT_ONCE = 12
MODES: dict[str, dict[str, bool]] = {
    "whole": {},
    "stream": {"stream": True},
    "background": {"background": True},
    "background stream": {"background": True, "stream": True},
    "chat": {},
    "chat stream": {"stream": True},
}
MODES_OF = {"configured": list(MODES), "caller": ["whole", "background stream", "chat stream"]}
"""How each fault is provoked, by whose keys the upstream hears."""
ENDED = {"completed", "failed", "incomplete", "cancelled"}


class Fault(Struct):
    """What goes wrong: the upstream's turns, the tool server's options, the fields of the request that are odd."""

    turns: list[list[Step]]
    options: dict[str, Any] = {}
    fields: dict[str, Any] = {}


def tool(name: str, /, **given: Any) -> Fault:
    """A call of this tool, whose arguments nobody else should read."""
    return Fault([calling(name, {"private": ARGUMENT, **given}), answer(ANSWER)])


def body(**fields: Any) -> Fault:
    """A body that is refused."""
    return Fault([answer(ANSWER)], fields=fields)


ECHO = "{plain:authorization} {base64:authorization} {plain:x-key} {base64:x-key} {url:x-key}"
SAID = {"content": [{"type": "text", "text": f"{OUTPUT} {ECHO}"}], "structuredContent": {ECHO: [OUTPUT, {"x": ECHO}]}}

FAULTS = {
    **{f"the upstream: {name}": Fault([case.turn]) for name, case in REFUSALS.items()},
    **{f"the stream: {name}": Fault([case.turn]) for name, case in FAILURES.items()},
    "the upstream echoes, 400": Fault([[status(400, {"error": {"message": f"{PROMPT} {{key}}", "code": "{key}"}})]]),
    "the upstream echoes, 429": Fault([[status(429, {"error": {"message": f"{PROMPT} {{key}}"}})]]),
    "the upstream echoes, 500": Fault([[status(500, {"error": {"message": f"{PROMPT} {{key}}"}})]]),
    "the upstream echoes, a page": Fault([[status(503, f"<html>{PROMPT} {{key}}")]]),
    "the upstream echoes in its stream": Fault([[text(ANSWER), error(f"{PROMPT} {{key}}", code="{key}")]]),
    "no upstream": Fault([[]], fields={"model": "dead@m"}),
    "an upstream that refuses the key": Fault([[]], fields={"model": "locked@m"}),
    "no such model": Fault(
        [[status(404, {"error": {"message": f"no model {PROMPT}@m", "code": "model_not_found"}})]],
        fields={"model": f"{PROMPT}@m"},
    ),
    "tools: an answer": tool("echo"),
    "tools: an upstream that fails after a call": Fault([calling("echo", {"x": ARGUMENT}), [status(500)]]),
    "tools: an echo": tool("raw", result=SAID),
    "tools: an echo that failed": tool("raw", result={**SAID, "isError": True}),
    "tools: an error": tool("refuse", message=f"{OUTPUT} {ECHO}"),
    "tools: a status": tool("status", status=500),
    "tools: a cut": tool("cut"),
    "tools: no such tool": Fault([calling(f"no_{ARGUMENT}", {}), answer(ANSWER)]),
    "tools: no arguments": Fault([calling("echo", f'{{"x": "{ARGUMENT}'), answer(ANSWER)]),
    "tools: no result": tool("raw", result={"content": OUTPUT, "isError": OUTPUT, "resultType": OUTPUT}),
    "tools: a session forgotten": tool("gone"),
    "tools: a server that fails": Fault([answer(ANSWER)], options={"status": 500}),
    "tools: a server that lies": Fault([answer(ANSWER)], options={"lies": 1}),
    "tools: a refused token": Fault([answer(ANSWER)], options={"auth": "another"}),
    "tools: the operator's": tool("say", content=SAID["content"], more=SAID),
    "a body: another type": body(instructions=[INSTRUCTIONS], metadata=METADATA),
    "a body: an unknown parameter": body(**{f"x-{PROMPT}": PROMPT}),
    "a body: an unknown item": body(input=[{"type": PROMPT, "text": PROMPT}]),
    "a body: an unknown tool": body(tools=[{"type": PROMPT}]),
    "a body: a token of another type": body(tools=[{"type": "mcp", "server_label": "x", "authorization": [TOKEN]}]),
    "a body: a header that can't be": body(
        tools=[
            {"type": "mcp", "server_label": "operators", "headers": {"x": f"{HEADER}\n"}, "require_approval": "never"}
        ]
    ),
    "a body: an unknown parent": body(previous_response_id=PROMPT),
}


class Client:
    """Provokes faults on one cluster, and does not mind what becomes of a request, as long as something does."""

    def __init__(self, cluster: Cluster, box: Any, keys: str) -> None:
        self.cluster, self.box, self.modes = cluster, box, MODES_OF[keys]
        self._http = httpx.Client(base_url=cluster.urls[0], headers={"authorization": f"Bearer {KEY}"}, timeout=60)

    def body(self, name: str, fault: Fault, mode: str) -> dict[str, Any]:
        """A request with a secret in every place that there is for one."""
        box = {
            "type": "mcp",
            "server_label": "box",
            "server_url": self.box.url("secrets", key=IN_URL, **{"echo": 1, "tools": LISTED, **fault.options}),
            "authorization": TOKEN,
            "headers": {"x-key": HEADER},
            "require_approval": "never",
        }
        operators = {"type": "mcp", "server_label": "operators", "require_approval": "never"}
        dead = {**box, "server_label": "dead", "server_url": f"http://127.0.0.1:{free_port()}/mcp?key={IN_URL}"}
        tools = [box, operators, dead] if name.startswith("tools") else []
        asked = script([note(f"{PROMPT} {name} {mode}"), *fault.turns[0]], *fault.turns[1:])
        if mode.startswith("chat"):
            messages = [{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": asked}]
            chat = {"model": "m", "messages": messages, "metadata": {"of": METADATA}, "store": True}
            return {**chat, **({"tools": tools} if tools else {}), **MODES[mode], **fault.fields}
        return {
            "model": "m",
            "input": asked,
            "instructions": INSTRUCTIONS,
            "metadata": {"of": METADATA},
            "tools": tools,
            **MODES[mode],
            **fault.fields,
        }

    def provoke(self, name: str, fault: Fault, mode: str) -> None:
        """Send a request, and wait until its response has ended."""
        reply = self._http.post(path_of(mode), json=self.body(name, fault, mode))
        if mode == "background" and reply.status_code == 200:
            self.ended(reply.json()["id"])

    def queue(self, name: str, fault: Fault) -> str:
        """Begin a background response; gives its id."""
        return self._http.post("/responses", json=self.body(name, fault, "background")).json()["id"]

    def ended(self, id: str) -> dict[str, Any]:
        """A response once it has ended."""
        return until(lambda: self._look(id), f"{id} has ended", 60)

    def _look(self, id: str) -> dict[str, Any] | None:
        found = self._http.get(f"/responses/{id}")
        return found.json() if found.status_code == 200 and found.json()["status"] in ENDED else None

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def send(self, content: bytes, path: str = "/responses") -> int:
        """Bytes, which may be no request."""
        return self._http.post(path, content=content).status_code


def path_of(mode: str) -> str:
    """Where a mode's requests go."""
    return "/chat/completions" if mode.startswith("chat") else "/responses"


@pytest.fixture(scope="module")
def locked() -> Iterator[Upstream]:
    """An upstream that does not know our key."""
    with Upstream(api_key="another") as running:
        yield running


@pytest.fixture(params=["configured", "caller"])
def client(request, own_servers, fault_env, upstream, box, locked, tmp_path) -> Iterator[Client]:
    """A cluster with secrets in its catalog, which logs all it can, where the operator or callers bring the upstream's keys."""
    catalog = tmp_path / "catalog.toml"
    catalog.write_text(f"""
        default = "scripted"
        [upstreams.scripted]
        base_url = "{upstream.base_url}"
        key = "{UPSTREAM_KEY}"
        headers = {{ "x-upstream" = "{UPSTREAM_HEADER}" }}
        [upstreams.dead]
        base_url = "http://127.0.0.1:{free_port()}/v1"
        key = "{UPSTREAM_KEY}"
        [upstreams.locked]
        base_url = "{locked.base_url}"
        key = "{UPSTREAM_KEY}"
        [tool_servers.operators]
        url = "{box.url("secrets", echo=1, tools="say")}"
        authorization = "{OPERATORS_TOKEN}"
        headers = {{ "x-key" = "{OPERATORS_HEADER}" }}
    """)
    env = {
        **LIMITS,
        "REPRISE_CATALOG": str(catalog),
        "REPRISE_LOG_LEVEL": "debug",
        "REPRISE_UPSTREAM_AUTH": request.param,
        "REPRISE_EVENT_TTL_S": "600",
        "REPRISE_UPSTREAM_ANSWER_TIMEOUT_S": "5",
        "REPRISE_RUN_DURATION_MAX_S": "15",
    }
    cluster = Cluster(
        own_servers, {name: value for name, value in fault_env.items() if name != "OPENAI_BASE_URL"}, **env
    )
    try:
        cluster.ensure(replicas=1, workers=1)
        with contextlib.closing(Client(cluster, box, request.param)) as made:
            yield made
    finally:
        cluster.close()


@pytest.mark.timeout(400)
def test_secrets_are_in_no_log_no_row_and_not_in_redis_whatever_goes_wrong(client, own_servers):
    cluster = client.cluster
    with ThreadPoolExecutor(AT_ONCE) as pool:
        done = [
            pool.submit(client.provoke, name, fault, mode) for name, fault in FAULTS.items() for mode in client.modes
        ]
    for one in done:
        one.result()
    assert client.send(f'{{"input": "{PROMPT}'.encode()) == 400
    assert client.send(f'{{"model": "m", "input": "{PROMPT}", "store": "{PROMPT}"}}'.encode()) == 400
    with waiting(client, "killed") as id:
        cluster.kill_owner(id)
        cluster.ensure(replicas=1, workers=1)
    for name, outage in {"postgres": own_servers.without_postgres, "redis": own_servers.without_valkey}.items():
        with waiting(client, name), outage():
            for mode in MODES:
                body = json.dumps(client.body(name, Fault([answer(ANSWER)]), mode)).encode()
                assert client.send(body, path_of(mode)) in {200, 503}
    searched(client, own_servers)


@contextlib.contextmanager
def waiting(client: Client, name: str) -> Iterator[str]:
    """A stream and a background run, both in mid-call; gives the latter's id, and lets them end."""
    box, gates = client.box, {mode: f"{client.cluster.prefix}-{name}-{mode}" for mode in ("stream", "background")}
    faults = {mode: tool("gate", name=gate) for mode, gate in gates.items()}
    with ThreadPoolExecutor() as pool:
        streamed = pool.submit(client.provoke, f"tools {name}", faults["stream"], "stream")
        id = client.queue(f"tools {name}", faults["background"])
        for gate in gates.values():
            box.wait_reached(gate)
        free_of(CONFIDENTIAL, dumped(client.cluster.database_url), "the rows of a running response")
        yield id
        for gate in gates.values():
            box.open(gate)
        client.ended(id)
        streamed.result()


def searched(client: Client, own_servers: Any) -> None:
    """Look for every secret in all that there is, and make sure that there was something to be found."""
    cluster = client.cluster
    rows, held = dumped(cluster.database_url), remembered(own_servers.redis_url, cluster.prefix)
    cluster.close()
    said = "".join(line for process in cluster.processes for line in process.printed)
    for where, found in {
        "the log": said,
        "the log of the embedded servers": (own_servers._home / "log").read_text(errors="replace"),
    }.items():
        free_of(CONFIDENTIAL | PRIVATE, found, where)
    free_of(CONFIDENTIAL, rows, "the rows")
    free_of(CONFIDENTIAL, held, "Redis")
    for action in ("request_failed", "retry", "tool_call_failed", "tools_unlisted", "redis_down", "run_ended"):
        assert f'"action": "{action}"' in said, f"nothing has been logged of {action}"
    for private in PRIVATE.values():
        assert private in rows, f"{private} was never there"
    assert PROMPT in held
