"""Secrets of every kind are planted in one house, whose stories use all of them; then each is looked for in every place.

A secret is a row of PLANTED, with the places where it belongs; a place is a line of `places`. A secret is in no other place, in no form.
"""

import json
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import httpx
import jwt
import openai
import pytest

from tests.planted import forms, free_of
from tests.servers import Served, reprise
from tests.toolserver import Toolserver
from tests.upstream import Upstream, answer, call, calling, error, finish, note, script, status, text
from tests.waiting import dumped, remembered, until

PREFIX = "planted"

PLACES = (
    "the log",
    "the rows",
    "Redis",
    "replies",
    "errors",
    "the reply that shows it once",
    "the command line",
    "the upstream",
    "the client's tool server",
    "the operator's tool server",
    "another tool server",
)

SIGNS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(PLACES, ("",)),
    "the log": tuple(
        f'"action": "{one}"'
        for one in ("authentication_failed", "tool_call_failed", "request_answered", "run_ended", "retry")
    ),
    "the rows": ("tool_credential.created", "resp_", "conv_", "***"),
    "Redis": ("response.completed", "***", "requests"),
    "replies": ("response.completed", "chat.completion.chunk", "tool_credential", "***"),
    "errors": ("invalid_api_key", "missing_api_key", "unknown_parameter"),
    "the command line": ("ok ", "Tool credentials"),
    "another tool server": ("tools/list",),
}
"""What shows that a place holds what was to be looked through."""

NOWHERE = frozenset[str]()
ONCE = frozenset({"the reply that shows it once"})
CLIENTS_TOOLS = frozenset({"the client's tool server"})
CONTENT = frozenset(PLACES) - {"the log", "the command line", "another tool server"}
"""What a request or an answer holds is in no log, and is sent to servers that have a part in it only."""

PLANTED: dict[str, frozenset[str]] = {
    # This server's own.
    "an administrator's key": frozenset({"the command line"}),
    "a key that is made by API": ONCE,
    "a key's former secret": ONCE,
    "a key's new secret": ONCE,
    "a revoked key": ONCE,
    "a key that is not known": NOWHERE,
    "a key in a query": NOWHERE,
    "a key in another header": NOWHERE,
    "a password of Basic authentication": NOWHERE,
    "a token": NOWHERE,
    "a token of another tenant": NOWHERE,
    "a token that is refused": NOWHERE,
    "the secret that signs tokens": NOWHERE,
    "the secret key": NOWHERE,
    "a former secret key": NOWHERE,
    "the password of the database": NOWHERE,
    # The operator's.
    "the upstream's key": frozenset({"the upstream"}),
    "a header of the upstream": frozenset({"the upstream"}),
    "a token of the operator's tool server": frozenset({"the operator's tool server"}),
    "a header of the operator's tool server": frozenset({"the operator's tool server"}),
    # A client's, of tool servers.
    "a token that a request brings": CLIENTS_TOOLS,
    "a header that a request brings": CLIENTS_TOOLS,
    "a key in the URL of a tool server": CLIENTS_TOOLS,
    "a stored token": CLIENTS_TOOLS,
    "a stored header": CLIENTS_TOOLS,
    "a stored header of plain words": CLIENTS_TOOLS,
    "a stored token that was replaced": CLIENTS_TOOLS,
    "a stored token that was deleted": NOWHERE,
    "a stored token that was refused": NOWHERE,
    "a stored token of another user": NOWHERE,
    "a stored token of another tenant": NOWHERE,
    "a token of an agent": CLIENTS_TOOLS,
    "a header of an agent": CLIENTS_TOOLS,
    "a header of plain words of an agent": CLIENTS_TOOLS,
    "a key in the URL of an agent's server": CLIENTS_TOOLS,
    "a token of an agent that was replaced": NOWHERE,
    "a token of an agent that is refused": NOWHERE,
    # Content.
    "a prompt": CONTENT,
    "an answer": CONTENT,
    "instructions": CONTENT,
    "metadata": CONTENT,
    "a prompt's variable": CONTENT,
    "a prompt's variable that is refused": NOWHERE,
    "arguments of a tool": CONTENT,
    "an item of a conversation": CONTENT,
    "a file": CONTENT,
    "the name of a file": CONTENT,
    "the name of a key": CONTENT | {"the command line"},
    "the name of a credential": CONTENT,
    "a user's identifier": CONTENT,
    "instructions of an agent": CONTENT,
    "an agent's variable": CONTENT,
}
"""Secret → the places where it belongs."""

ECHO = " ".join(
    f"{{{form}:{header}}}" for form in ("plain", "base64", "url") for header in ("authorization", "x-key", "x-words")
)
ECHO_TOKEN = "{token:authorization}"


class House:
    """A server and a worker that log all they can, with secrets everywhere."""

    def __init__(
        self, base_env: Mapping[str, str], database_url: str, upstream: Upstream, tools: Toolserver, catalog: Any
    ) -> None:
        self.upstream, self.tools = upstream, tools
        self.values: dict[str, str] = {}
        self.found: dict[str, list[str]] = {place: [] for place in PLACES}
        self._numbers = iter(range(1000))
        catalog.write_text(f"""
            [upstreams.up]
            base_url = "{upstream.base_url}"
            key = "{self.plant("the upstream's key")}"
            headers = {{ "x-upstream" = "{self.plant("a header of the upstream")}" }}
            [tool_servers.operators]
            url = "{tools.url("mcp", "planted-operators", echo=1, tools="raw")}"
            authorization = "{self.plant("a token of the operator's tool server")}"
            headers = {{ "x-key" = "{self.plant("a header of the operator's tool server")}" }}
            [prompts.greeting.versions.1]
            instructions = "Greet {{{{name}}}}."
            variables = {{ name = "string" }}
            [issuers.company]
            issuer = "company"
            audience = "reprise"
            algorithms = ["HS256"]
            secret_env = "TOKEN_SECRET"
            tenants = ["acme", "other"]
            claims = {{ tenant = "tenant", user = "sub" }}
        """)
        secret_keys = {
            name: f"{letter * 42}8=" for name, letter in (("the secret key", "S"), ("a former secret key", "F"))
        }
        self.values |= secret_keys
        self.values["the password of the database"] = "database-pa55word-3c1d"
        self.env = {
            **{name: value for name, value in base_env.items() if name != "OPENAI_BASE_URL"},
            "DATABASE_URL": database_url.replace("reprise@", f"reprise:{self.values['the password of the database']}@"),
            "REPRISE_CATALOG": str(catalog),
            "REPRISE_LOG_LEVEL": "debug",
            "REPRISE_REDIS_PREFIX": PREFIX,
            "REPRISE_EVENT_TTL_S": "600",
            "REPRISE_KEY_CACHE_S": "0",
            **dict.fromkeys(("REPRISE_TENANT_TOKENS_PER_MINUTE", "REPRISE_KEY_TOKENS_PER_MINUTE"), "1000000000"),
            **dict.fromkeys(("REPRISE_TENANT_REQUESTS_PER_MINUTE", "REPRISE_KEY_REQUESTS_PER_MINUTE"), "300"),
            **dict.fromkeys(("REPRISE_TENANT_CONCURRENT_RUNS", "REPRISE_KEY_CONCURRENT_RUNS"), "1000"),
            "REPRISE_SECRET_KEY": secret_keys["the secret key"],
            "REPRISE_OLD_SECRET_KEYS": secret_keys["a former secret key"],
            "TOKEN_SECRET": self.plant("the secret that signs tokens") * 2,
        }
        assert self.env["DATABASE_URL"] != database_url
        scopes = [f"--scope={scope}" for scope in ("admin", "responses.read", "responses.write")]
        self.plant("an administrator's key", self.run("keys", "create", "--tenant=acme", *scopes).strip())
        self.other = self.run("keys", "create", "--tenant=other", *scopes).strip()
        self.served = Served({**self.env, "REPRISE_WORKERS_IN_API": "false"})
        self.worker = Served(self.env, command="worker")

    def plant(self, what: str, value: str = "") -> str:
        """A new secret, or one that the server has made."""
        assert what in PLANTED
        self.values[what] = value or f"planted-{next(self._numbers):02}-{zlib.crc32(what.encode()):010}"
        return self.values[what]

    def run(self, *arguments: str) -> str:
        """A command, whose output is looked through."""
        done = reprise(self.env, *arguments)
        assert done.returncode == 0, done.stderr
        self.found["the command line"] += [done.stdout, done.stderr]
        return done.stdout

    def http(self, key: str, *, shows: bool = False) -> httpx.Client:
        """Raw HTTP with a key; every reply is looked through. `shows` if it shows a secret, once."""

        def keep(reply: httpx.Response) -> None:
            place = "errors" if reply.status_code >= 400 else "the reply that shows it once" if shows else "replies"
            self.found[place].append(f"{reply.headers}\n{reply.read().decode(errors='replace')}")

        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.served.url, headers=headers, timeout=60, event_hooks={"response": [keep]})

    def client(self, key: str) -> openai.OpenAI:
        """The official client, whose replies are looked through, too."""
        return openai.OpenAI(base_url=self.served.url, api_key=key, max_retries=0, http_client=self.http(""))

    def token(self, what: str, **claims: Any) -> str:
        """A token."""
        whole = {"iss": "company", "aud": "reprise", "iat": 1, "exp": 2, **claims}
        return self.plant(what, jwt.encode(whole, self.env["TOKEN_SECRET"], "HS256"))

    def close(self) -> None:
        """End, and collect what is left to be looked through."""
        self.served.stop()
        self.worker.stop()
        self.found["the log"] += [*self.served.printed, *self.worker.printed]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.served.__exit__()
        self.worker.__exit__()


@pytest.fixture(scope="module")
def house(
    base_env: Mapping[str, str], new_database: Callable[[], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[House]:
    """The house after all of its stories, with what is in its places."""
    catalog = tmp_path_factory.mktemp("planted") / "catalog.toml"
    with (
        Upstream() as upstream,
        Toolserver() as tools,
        House(base_env, new_database(), upstream, tools, catalog) as house,
    ):
        stories = (
            keys_are_made,
            callers_fail,
            credentials_are_stored,
            content_is_stored,
            agents_are_used,
            runs_are_made,
            runs_fail,
        )
        for tell in stories:
            tell(house)
            house.found["Redis"].append(remembered(base_env["REDIS_URL"], PREFIX))  # quotas heal in a moment
        with house.http(house.values["an administrator's key"]) as http:
            assert http.get("/usage", params={"group_by": "key"}).json()["data"]
        house.run("keys", "list")
        house.run("usage", "--by", "key", "--by", "user")
        house.run("tenants", "list")
        house.run("doctor")
        house.run("rekey")
        house.found["the rows"].append(dumped(house.env["DATABASE_URL"]))
        house.found["the upstream"] += [f"{one.headers}\n{one.raw.decode()}" for one in upstream.requests]
        servers = {
            "planted-box": "the client's",
            "planted-agent": "the client's",
            "planted-stored": "the client's",
            "planted-operators": "the operator's",
        }
        for one in tools.requests:
            place = f"{servers.get(one.server, 'another')} tool server"
            house.found[place].append(f"{one.headers}\n{one.options}\n{json.dumps(one.body)}")
        house.close()
        yield house


# -- Stories ----------------------------------------------------------------------------------------------------------------


def keys_are_made(house: House) -> None:
    admin = house.values["an administrator's key"]
    with house.http(admin, shows=True) as http:
        named = {"name": house.plant("the name of a key"), "user": "ada"}
        house.plant("a key that is made by API", http.post("/admin/keys", json=named).json()["value"])
        made = http.post("/admin/keys", json={}).json()
        house.plant("a key's former secret", made["value"])
        house.plant("a key's new secret", http.post(f"/admin/keys/{made['id']}/rotate").json()["value"])
        gone = http.post("/admin/keys", json={}).json()
        house.plant("a revoked key", gone["value"])
    with house.http(admin) as http:
        http.delete(f"/admin/keys/{gone['id']}")
        for path in ("/admin/keys", f"/admin/keys/{made['id']}", "/admin/audit"):
            assert http.get(path).status_code == 200
    for what in ("a key's former secret", "a key's new secret"):
        with house.http(house.values[what]) as http:
            assert http.get("/models").status_code == 200


def callers_fail(house: House) -> None:
    unknown = house.plant("a key that is not known", "sk-reprise-0123456789abcdefghijklmnopqrstuvwxyz")
    refused = house.token("a token that is refused", tenant="acme", sub="ada")
    for key in (unknown, house.values["a revoked key"], refused):
        with house.http(key) as http:
            assert http.post("/responses", json={"model": "m", "input": "hi"}).status_code == 401
            assert http.post("/chat/completions", json={}).status_code == 401
    with house.http("") as http:
        password = house.plant("a password of Basic authentication")
        assert http.get("/models", auth=("ada", password)).status_code == 401
        assert http.get("/models", headers={"x-api-key": house.plant("a key in another header")}).status_code == 401
        assert http.get("/models", params={"api_key": house.plant("a key in a query")}).status_code == 401
    with house.http(house.values["an administrator's key"]) as http:
        in_header = {"x-api-key": house.values["a key in another header"], "cookie": f"k={password}"}
        assert http.get("/models", headers=in_header).status_code == 200
        assert http.get("/files", params={"api_key": house.values["a key in a query"]}).status_code == 400
        assert http.get(f"/none/{'x' * 9}", params={"api_key": house.values["a key in a query"]}).status_code == 404


def credentials_are_stored(house: House) -> None:
    url = house.tools.url("mcp", "planted-stored")
    admin, ada = house.values["an administrator's key"], house.values["a key that is made by API"]
    with house.http(admin) as http:
        asked = {"server_url": url, "authorization": house.plant("a stored token of another user"), "user": "bob"}
        assert http.post("/tool_credentials", json=asked).status_code == 200
        wrong = house.plant("a stored token that was refused")
        for fields in (
            {"server_url": f"{url}?key={wrong}", "authorization": wrong},
            {"server_url": url, "authorization": f"a\n{wrong}"},
            {"server_url": url, "authorization": [wrong]},
            {"server_url": url, "headers": {"x y": wrong}},
            {"server_url": url, "headers": {"host": wrong}},
            {"server_label": "operators", "authorization": wrong},
            {"server_url": url, "authorization": wrong * 1000},
        ):
            assert http.post("/tool_credentials", json=fields).status_code == 400
    with house.http(house.other) as http:
        asked = {"server_url": url, "authorization": house.plant("a stored token of another tenant")}
        assert http.post("/tool_credentials", json=asked).status_code == 200
    with house.http(ada) as http:
        deleted = {
            "server_url": house.tools.url("mcp", "never"),
            "authorization": house.plant("a stored token that was deleted"),
        }
        made = http.post("/tool_credentials", json=deleted).json()
        assert http.delete(f"/tool_credentials/{made['id']}").status_code == 200
        asked = {
            "server_url": url,
            "authorization": house.plant("a stored token that was replaced"),
            "name": house.plant("the name of a credential"),
        }
        made = http.post("/tool_credentials", json=asked).json()
        box = {"type": "mcp", "server_label": "stored", "server_url": url, "require_approval": "never"}
        with house.client(ada) as client:
            client.responses.create(model="m", input=script(answer("Done.")), tools=[box])
        changed = {
            "authorization": house.plant("a stored token"),
            "headers": {
                "x-key": house.plant("a stored header"),
                "x-words": house.plant("a stored header of plain words", "seven plain old words"),
            },
        }
        assert http.post(f"/tool_credentials/{made['id']}", json=changed).status_code == 200
        for path in ("/tool_credentials", f"/tool_credentials/{made['id']}"):
            assert http.get(path).status_code == 200


def content_is_stored(house: House) -> None:
    with house.http(house.values["a key that is made by API"]) as http:
        file = {"file": (house.plant("the name of a file"), house.plant("a file").encode())}
        made = http.post("/files", files=file, data={"purpose": "user_data"}).json()
        for path in ("/files", f"/files/{made['id']}", f"/files/{made['id']}/content"):
            assert http.get(path).status_code == 200
        item = {"role": "user", "content": house.plant("an item of a conversation")}
        conversation = http.post("/conversations", json={"items": [item]}).json()["id"]
        wrong = {"items": [{**item, "type": house.values["an item of a conversation"]}]}
        assert http.post(f"/conversations/{conversation}/items", json=wrong).status_code in {200, 400}
        assert (
            http.post(f"/conversations/{conversation}/items", json={"items": [{**item, "role": "x"}]}).status_code
            == 400
        )


def agents_are_used(house: House) -> None:
    box = {
        "type": "mcp",
        "server_label": "box",
        "server_url": house.tools.url(
            "mcp", "planted-agent", echo=1, tools="raw", key=house.plant("a key in the URL of an agent's server")
        ),
        "authorization": house.plant("a token of an agent that was replaced"),
        "headers": {
            "x-key": house.plant("a header of an agent"),
            "x-words": house.plant("a header of plain words of an agent", "eight other plain words"),
        },
        "require_approval": "never",
    }
    agent = {
        "name": "handy",
        "model": "scripted",
        "instructions": f"{house.plant('instructions of an agent')} {{{{name}}}}",
        "variables": {"name": "string"},
        "tools": [box],
    }
    with house.http(house.values["an administrator's key"]) as http:
        made = http.post("/agents", json=agent).json()
        replaced = {"tools": [{**box, "authorization": house.plant("a token of an agent")}]}
        assert http.post(f"/agents/{made['id']}", json=replaced).status_code == 200
        refused = house.plant("a token of an agent that is refused")
        for fields in ({"authorization": [refused]}, {"server_url": f"ftp://{refused}"}, {"headers": refused}):
            wrong = {**agent, "name": "wrong", "tools": [{**box, **fields}]}
            assert http.post("/agents", json=wrong).status_code == 400
        for path in ("/agents", f"/agents/{made['id']}", "/models", "/models/handy"):
            assert http.get(path).status_code == 200
    ada = house.values["a key that is made by API"]
    values = {"agent": {"variables": {"name": house.plant("an agent's variable")}}}
    raw = {"result": {"content": [{"type": "text", "text": f"{ECHO} {ECHO_TOKEN}"}]}}
    given = script(calling("raw", raw), answer("Done."))
    with house.client(ada) as client, house.http(ada) as http:
        for mode in MODES:
            ended(http, client.responses.create(model="handy", input=given, extra_body=values, **mode))
        messages = [{"role": "user", "content": given}]
        for stream in (False, True):
            chat = {"model": "handy", "messages": messages, "stream": stream, **values}
            assert http.post("/chat/completions", json=chat).status_code == 200
        assert http.get("/agents/handy").status_code == 200


MODES: tuple[dict[str, Any], ...] = ({}, {"stream": True}, {"background": True}, {"background": True, "stream": True})


def runs_are_made(house: House) -> None:
    ada = house.values["a key that is made by API"]
    house.plant("a token that a request brings")
    house.plant("a header that a request brings")
    house.plant("a key in the URL of a tool server")
    for what in ("a prompt", "an answer", "instructions", "metadata", "arguments of a tool", "a user's identifier"):
        house.plant(what)
    house.plant("a prompt's variable")
    with house.client(ada) as client, house.http(ada) as http:
        for number, mode in enumerate(MODES):
            begun = client.responses.create(**asked(house, str(number)), **mode)
            ended(http, begun)
            greeting = {"id": "greeting", "variables": {"name": house.values["a prompt's variable"]}}
            begun = client.responses.create(model="m", input=script(answer("Hello.")), prompt=greeting, **mode)
            ended(http, begun)
        whole = asked(house, "chat")
        chat = {
            "model": "m",
            "messages": [
                {"role": "system", "content": whole["instructions"]},
                {"role": "user", "content": whole["input"]},
            ],
            **{name: whole[name] for name in ("tools", "metadata", "user")},
        }
        for stream in (False, True):
            assert http.post("/chat/completions", json={**chat, "store": True, "stream": stream}).status_code == 200
        listed = http.get("/chat/completions").json()["data"]
        assert len(listed) == 2
        for one in listed:
            for path in ("", "/messages"):
                assert http.get(f"/chat/completions/{one['id']}{path}").status_code == 200
        http.get("/responses")
        http.post("/responses/input_tokens", json={"model": "m", "input": "hi", "tools": whole["tools"]})
        http.post("/responses/compact", json={"model": "m", "input": whole["input"]})


def asked(house: House, note_of: str) -> dict[str, Any]:
    """A request with calls of three servers, each of which echoes what it was sent."""
    said = f"{ECHO} {ECHO_TOKEN}"
    result = {"content": [{"type": "text", "text": said}], "structuredContent": {said: [said]}}
    raw = {"result": result, "private": house.values["arguments of a tool"]}
    turn = [
        note(f"{house.values['a prompt']} {note_of}"),
        call("box__raw", raw, id="a"),
        call("stored__raw", raw, id="b", index=1),
        call("operators__raw", raw, id="c", index=2),
        call("box__raw", {"result": {**result, "isError": True}}, id="d", index=3),
        call("box__refuse", {"message": said}, id="e", index=4),
        call("stored__refuse", {"message": said}, id="f", index=5),
        call("stored__status", {"status": 500}, id="g", index=6),
        finish("tool_calls"),
    ]
    url = house.tools.url
    options = {"echo": 1, "tools": "raw,refuse,status"}
    box = {
        "server_label": "box",
        "server_url": url("mcp", "planted-box", key=house.values["a key in the URL of a tool server"], **options),
        "authorization": house.values["a token that a request brings"],
        "headers": {"x-key": house.values["a header that a request brings"]},
    }
    servers = [
        box,
        {"server_label": "stored", "server_url": url("mcp", "planted-stored", **options)},
        {"server_label": "operators"},
        {"server_label": "stranger", "server_url": url("mcp", "planted-stranger", tools="echo")},
    ]
    return {
        "model": "m",
        "input": script(turn, answer(house.values["an answer"])),
        "instructions": house.values["instructions"],
        "metadata": {"of": house.values["metadata"]},
        "user": house.values["a user's identifier"],
        "tools": [{"type": "mcp", "require_approval": "never", **one} for one in servers],
    }


def ended(http: httpx.Client, begun: Any) -> None:
    """Read a stream, or wait for the end of a response, and look at it in every way."""
    if isinstance(begun, openai.Stream):
        [*_, last] = begun
        begun = last.response
    id = begun.id
    until(lambda: http.get(f"/responses/{id}").json()["status"] == "completed")
    assert http.get(f"/responses/{id}/input_items").status_code == 200


def runs_fail(house: House) -> None:
    ada = house.values["a key that is made by API"]
    with house.http(ada) as http:
        prompt = {"id": "greeting", "variables": {"name": [house.plant("a prompt's variable that is refused")]}}
        assert http.post("/responses", json={"model": "m", "prompt": prompt}).status_code == 400
        quoting = "{key} is refused"
        for turn in (
            [status(400, {"error": {"message": quoting, "code": "{key}"}})],
            [status(401, {"error": {"message": quoting}})],
            [status(429, {"error": {"message": quoting}}, times=9)],
            [text("So"), error(quoting, code="{key}")],
        ):
            for stream in (False, True):
                given = script(turn)
                http.post("/responses", json={"model": "m", "input": given, "stream": stream})
                messages = [{"role": "user", "content": given}]
                http.post("/chat/completions", json={"model": "m", "messages": messages, "stream": stream})
            http.post("/responses", json={"model": "m", "input": given, "background": True})
        until(
            lambda: (
                {one["status"] for one in http.get("/responses?limit=100").json()["data"]} <= {"completed", "failed"}
            )
        )
        whole = asked(house, "refused")
        token, header = house.values["a token that a request brings"], house.values["a header that a request brings"]
        for fields in (
            {"authorization": [token]},
            {"headers": [header]},
            {"headers": {"x": f"{header}\n"}},
            {"server_url": f"ftp://{token}"},
            {"server_url": f"http://ada:{token}@127.0.0.1:1/{token}"},
            {"server_url": f"http://127.0.0.1:1/mcp?key={token}"},
        ):
            tools = [{**whole["tools"][0], **fields}]
            given = script(answer("Done."))
            for path, body in (
                ("/responses", {"input": given}),
                ("/chat/completions", {"messages": [{"role": "user", "content": given}]}),
            ):
                http.post(path, json={"model": "m", "tools": tools, **body})
    for what, tenant in (("a token", "acme"), ("a token of another tenant", "other")):
        now = int(time.time())
        with house.client(house.token(what, tenant=tenant, sub="ada", iat=now, exp=now + 600)) as client:
            client.responses.create(model="m", input=script(calling("none", {}), answer("Done.")))
            with pytest.raises(openai.NotFoundError):
                client.responses.retrieve("resp_none")


# -- The search -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
def test_no_secret_is_where_it_does_not_belong(house, place):
    elsewhere = {what: house.values[what] for what, right in PLANTED.items() if place not in right}
    found = "\n".join(house.found[place])
    assert all(sign in found for sign in SIGNS[place]), "what should be looked through is not all there"
    free_of(elsewhere, found, place)


@pytest.mark.parametrize("what", PLANTED)
def test_every_secret_is_planted(house, what):
    """One that belongs somewhere has been there: the search would have found it elsewhere."""
    value = house.values[what]
    everywhere = "\n".join(text for place in PLANTED[what] for text in house.found[place])
    assert not PLANTED[what] or any(form in everywhere for form in forms(value)), f"{what} was never used"
