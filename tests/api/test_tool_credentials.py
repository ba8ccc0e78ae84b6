"""Stored credentials of tool servers: who sets them, whose calls they are for, and where they never show."""

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from msgspec import Struct

from tests.api.streams import streamed
from tests.servers import Served, reprise
from tests.toolserver import Toolserver
from tests.upstream import answer, call, calling, finish, note, script
from tests.waiting import dumped, fetch, remembered, until

PREFIX = "credentials"


class House(Struct):
    """A server with two tenants: `acme` with an administrator, users and a key of none; `other` with an administrator."""

    served: Served
    toolserver: Toolserver
    keys: dict[str, str]
    ids: dict[str, str]

    def http(self, key: str) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.keys[key]}"}
        return httpx.Client(base_url=self.served.url, headers=headers, timeout=30)

    def post(self, key: str, path: str = "", **asked: Any) -> httpx.Response:
        with self.http(key) as http:
            return http.post(f"/tool_credentials{path}", json=asked)

    def store(self, key: str, **asked: Any) -> dict[str, Any]:
        """A new credential."""
        reply = self.post(key, **asked)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def update(self, key: str, credential: Mapping[str, Any], **asked: Any) -> httpx.Response:
        return self.post(key, f"/{credential['id']}", **asked)

    def delete(self, key: str, credential: Mapping[str, Any]) -> httpx.Response:
        with self.http(key) as http:
            return http.delete(f"/tool_credentials/{credential['id']}")

    def listed(self, key: str, **query: Any) -> list[str]:
        with self.http(key) as http:
            return [one["id"] for one in http.get("/tool_credentials", params=query).json()["data"]]

    def url(self, name: str) -> str:
        """A server's URL as a credential names it."""
        return self.toolserver.url("mcp", name)

    def heard(self, name: str) -> list[str | None]:
        """What the server was sent as authorization, with each of its calls."""
        return [one.headers.get("authorization") for one in self.toolserver.calls(name)]

    def ask(self, key: str, box: Mapping[str, Any], *turns: Any, **fields: Any) -> Any:
        """A response with a call of the server's `echo`, or other turns."""
        made = turns or (calling("echo", {"x": 1}), answer("Done."))
        given = script([note(f"{box['server_label']} {key}"), *made[0]], *made[1:])
        with self.served.client(api_key=self.keys[key]) as client:
            return client.responses.create(model="m", input=given, tools=[box], **fields)


@pytest.fixture(scope="module")
def house(
    base_env: Mapping[str, str],
    new_database: Callable[[], str],
    upstream,
    toolserver: Toolserver,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[House]:
    catalog = tmp_path_factory.mktemp("credentials") / "catalog.toml"
    catalog.write_text(f"""
        [upstreams.up]
        base_url = "{upstream.base_url}"
        [tool_servers.open]
        url = "{toolserver.url("mcp", "operators")}"
        headers = {{ "x-team" = "blue research" }}
        [tool_servers.closed]
        url = "{toolserver.url("mcp", "closed")}"
        authorization = "of-the-operator"
        [tool_servers.program]
        command = ["true"]
        [tool_servers.hosting]
        url = "{toolserver.url("mcp", "hosting")}"
        [hosted.web_search]
        server = "hosting"
        tool = "search"
    """)
    env = {name: value for name, value in base_env.items() if name != "OPENAI_BASE_URL"}
    env |= {
        "DATABASE_URL": new_database(),
        "REPRISE_CATALOG": str(catalog),
        "REPRISE_LOG_LEVEL": "debug",
        "REPRISE_REDIS_PREFIX": PREFIX,
        "REPRISE_EVENT_TTL_S": "600",
        "REPRISE_KEY_CACHE_S": "0.2",
        "REPRISE_TOOL_CREDENTIAL_BYTES_MAX": "200",
    }
    scopes = tuple(f"--scope={scope}" for scope in ("admin", "responses.read", "responses.write"))
    keys, ids = {}, {}
    for name, options in {
        "admin": ("--tenant=acme", *scopes),
        "admin only": ("--tenant=acme", "--scope=admin"),
        "ada": ("--tenant=acme", "--user=ada"),
        "ada too": ("--tenant=acme", "--user=ada"),
        "bob": ("--tenant=acme", "--user=bob"),
        "plain": ("--tenant=acme",),
        "plain too": ("--tenant=acme",),
        "reader": ("--tenant=acme", "--user=ada", "--scope=responses.read"),
        "other": ("--tenant=other", *scopes),
    }.items():
        made = reprise(env, "keys", "create", *options)
        keys[name], ids[name] = made.stdout.strip(), made.stderr.split()[0]
    with Served(env) as served:
        yield House(served, toolserver, keys, ids)


def error_of(reply: httpx.Response) -> tuple[int, str | None, str | None]:
    error = reply.json()["error"]
    return reply.status_code, error["code"], error["param"]


# -- What is stored ---------------------------------------------------------------------------------------------------------


def test_a_credential_is_stored_and_shown_without_its_secret(house, name):
    secret = f"{name}-s3cret"
    with house.http("admin") as http:
        asked = {
            "server_url": house.url(name),
            "authorization": secret,
            "headers": {"x-key": f"{secret}-2"},
            "name": "Box",
        }
        reply = http.post("/tool_credentials", json=asked)
        made = reply.json()
        assert made == {
            "id": made["id"],
            "object": "tool_credential",
            "name": "Box",
            "server_url": house.url(name),
            "server_label": None,
            "user": None,
            "key_id": None,
            "has_authorization": True,
            "header_names": ["x-key"],
            "created_at": made["created_at"],
            "updated_at": made["created_at"],
        }
        assert made["id"].startswith("cred_")
        found = http.get(f"/tool_credentials/{made['id']}")
        assert found.json() == made
        listed = http.get("/tool_credentials")
        assert listed.json()["data"][0] == made
        renamed = http.post(f"/tool_credentials/{made['id']}", json={"name": "Chest"})
        assert renamed.json() == {**made, "name": "Chest", "updated_at": renamed.json()["updated_at"]}
        rotated = http.post(f"/tool_credentials/{made['id']}", json={"headers": {"x-other": f"{secret}-3"}})
        assert rotated.json() == {
            **renamed.json(),
            "has_authorization": False,
            "header_names": ["x-other"],
            "updated_at": rotated.json()["updated_at"],
        }
        gone = http.delete(f"/tool_credentials/{made['id']}")
        assert gone.json() == {"id": made["id"], "object": "tool_credential.deleted", "deleted": True}
        assert http.get(f"/tool_credentials/{made['id']}").status_code == 404
        assert http.delete(f"/tool_credentials/{made['id']}").status_code == 404
        assert http.post(f"/tool_credentials/{made['id']}", json={"name": "x"}).status_code == 404
        log = [one for one in http.get("/admin/audit").json()["data"] if one["target"] == made["id"]]
        whole = http.get("/admin/audit").text
    assert [one["type"].removeprefix("tool_credential.") for one in log] == [
        "deleted",
        "updated",
        "updated",
        "created",
    ]
    for text in (*(one.text for one in (reply, found, listed, renamed, rotated, gone)), whole):
        assert secret not in text
    assert secret not in dumped(house.served.database_url)
    assert secret not in "".join(house.served.printed)


@pytest.mark.parametrize(
    ("asked", "param", "code"),
    [
        ({}, "server_url", "invalid_value"),
        ({"server_url": "http://x.example/", "server_label": "open"}, "server_url", "invalid_value"),
        ({"server_url": "ftp://x.example/"}, "server_url", "invalid_value"),
        ({"server_url": "https://"}, "server_url", "invalid_value"),
        ({"server_url": "https://x.example/?key=s3cret-value"}, "server_url", "invalid_value"),
        ({"server_url": "https://x.example/?"}, "server_url", "invalid_value"),
        ({"server_url": "https://x.example/#s3cret-value"}, "server_url", "invalid_value"),
        ({"server_url": "https://ada:s3cret-value@x.example/"}, "server_url", "invalid_value"),
        ({"server_url": "https://x.example/" + "a" * 2048}, "server_url", "invalid_value"),
        ({"server_label": "unknown"}, "server_label", "invalid_value"),
        ({"server_label": "program"}, "server_label", "invalid_value"),
        ({"server_label": "hosting"}, "server_label", "invalid_value"),
        ({"server_label": "closed"}, "authorization", "invalid_value"),
        ({"server_label": "open", "headers": {"X-Team": "red"}}, "headers", "invalid_value"),
        ({"server_label": "a/b"}, "server_label", "invalid_value"),
        ({"authorization": None}, "authorization", "missing_required_parameter"),
        ({"authorization": " "}, "authorization", "missing_required_parameter"),
        ({"authorization": "abc12"}, "authorization", "invalid_value"),
        ({"authorization": "Bearer abc12"}, "authorization", "invalid_value"),
        ({"authorization": "s3cret-value\r\nx-admin: 1"}, "authorization", "invalid_value"),
        ({"authorization": "s3cret-välue"}, "authorization", "invalid_value"),
        ({"authorization": ["s3cret-value"]}, "authorization", "invalid_type"),
        ({"authorization": "s3cret-value" * 20}, "authorization", "invalid_value"),
        ({"headers": {"x-a": "b" * 200}}, "headers", "invalid_value"),
        ({"headers": {"x-key": "abc12"}}, "headers.x-key", "invalid_value"),
        ({"headers": {"x-a": "s3cret-value\n"}}, "headers.x-a", "invalid_value"),
        ({"headers": {"x a": "s3cret-value"}}, "headers", "invalid_value"),
        ({"headers": {"Host": "s3cret-value"}}, "headers.Host", "invalid_value"),
        ({"headers": {"content-length": "10000000"}}, "headers.content-length", "invalid_value"),
        ({"headers": {"Authorization": "s3cret-value"}}, "headers.Authorization", "invalid_value"),
        ({"headers": {"x-a": "s3cret-value", "X-A": "another"}}, "headers.X-A", "invalid_value"),
        ({"headers": {f"x-{number}": "1" for number in range(65)}}, "headers", "invalid_value"),
        ({"headers": {"x-a": 1}}, "headers.x-a", "invalid_type"),
        ({"name": "a\u0000"}, "name", "invalid_value"),
        ({"name": "a" * 257}, "name", "invalid_value"),
        ({"user": "a\u001fb"}, "user", "invalid_value"),
        ({"user": ""}, "user", "invalid_value"),
        ({"user": "ada", "key_id": "key_1"}, "key_id", "invalid_value"),
        ({"key_id": "key_1"}, "key_id", "invalid_value"),
        ({"key_id": "key_\u0000"}, "key_id", "invalid_value"),
        ({"tenant": "other"}, "tenant", "unknown_parameter"),
    ],
)
def test_a_credential_that_can_not_be_is_refused_and_not_quoted(house, asked, param, code):
    whole = {"authorization": "s3cret-value", **asked}
    if asked and not {"server_url", "server_label"} & asked.keys():
        whole["server_url"] = "https://x.example/mcp"
    reply = house.post("admin", **whole)
    assert error_of(reply) == (400, code, param)
    assert "s3cret-v" not in reply.text


def test_there_is_one_credential_for_a_server_and_a_holder_however_its_url_is_written(house):
    made = house.store("admin", server_url="HTTPS://Once.Example:443", authorization="first-one")
    assert made["server_url"] == "https://once.example/"
    again = house.post("admin", server_url="https://once.example/a/..", authorization="second-one")
    assert error_of(again) == (400, "tool_credential_exists", "server_url")
    assert made["id"] in again.json()["error"]["message"]
    house.store("ada", server_url="https://once.example/", authorization="of-ada")
    house.store("admin", server_label="open", authorization="first-one")
    assert error_of(house.post("admin", server_label="open", authorization="second")) == (
        400,
        "tool_credential_exists",
        "server_label",
    )


def test_credentials_are_listed_in_pages(house):
    made = [
        house.store("bob", server_url=f"https://pages.example/{number}", authorization="of-bob")["id"]
        for number in range(3)
    ]
    shown = house.listed("bob")
    assert shown[:3] == made[::-1]
    assert house.listed("bob", order="asc")[-3:] == made
    assert house.listed("bob", after=made[2], limit=2) == [made[1], made[0]]
    with house.http("bob") as http:
        assert http.get("/tool_credentials", params={"limit": 1}).json()["has_more"] is True
        assert error_of(http.get("/tool_credentials", params={"after": "x"})) == (400, "invalid_value", "after")
    house.delete("bob", {"id": made[1]})
    assert house.listed("bob", after=made[1], limit=1) == [made[0]]


def test_the_number_of_credentials_is_limited(new_server, base_env, new_database):
    env = {**base_env, "DATABASE_URL": new_database()}
    limits = {"REPRISE_TOOL_CREDENTIALS_TENANT_MAX": "3", "REPRISE_TOOL_CREDENTIALS_HOLDER_MAX": "2"}
    keys = {
        user: reprise(env, "keys", "create", "--tenant=acme", *options).stdout.strip()
        for user, options in {"ada": ["--user=ada"], "bob": ["--user=bob"]}.items()
    }
    served = new_server(**{**env, **limits})
    codes = []
    for key, number in (("ada", 1), ("ada", 2), ("ada", 3), ("bob", 1), ("bob", 2)):
        with httpx.Client(base_url=served.url, headers={"Authorization": f"Bearer {keys[key]}"}) as http:
            asked = {"server_url": f"https://x.example/{number}", "authorization": "s3cret-value"}
            reply = http.post("/tool_credentials", json=asked)
        codes.append(reply.json().get("error", {}).get("code"))
    full = "tool_credential_limit_exceeded"
    assert codes == [None, None, full, None, full]
    assert len(fetch(env["DATABASE_URL"], "select from tool_credentials")) == 3


def test_creates_at_once_on_two_replicas_keep_the_limit_and_one_credential_for_a_server(
    new_server, base_env, new_database
):
    env = {**base_env, "DATABASE_URL": new_database(), "REPRISE_TOOL_CREDENTIALS_TENANT_MAX": "5"}
    urls = [new_server(**env).url for _ in range(2)]

    def create(number: int, server: int) -> str | None:
        asked = {"server_url": f"https://x.example/{server}", "authorization": "s3cret-value"}
        reply = httpx.post(f"{urls[number % 2]}/tool_credentials", json=asked, timeout=30)
        return reply.json().get("error", {}).get("code")

    with ThreadPoolExecutor(8) as pool:
        same = list(pool.map(create, range(8), [0] * 8))
        others = list(pool.map(create, range(16), range(1, 17)))
    assert sorted(same, key=str) == [None, *["tool_credential_exists"] * 7]
    assert sorted(others, key=str) == [*[None] * 4, *["tool_credential_limit_exceeded"] * 12]
    assert len(fetch(env["DATABASE_URL"], "select from tool_credentials")) == 5


# -- Whose it is ------------------------------------------------------------------------------------------------------------


def test_who_may_set_and_see_what(house, name):
    def tried(key: str, **holder: Any) -> Any:
        reply = house.post(
            key, server_url=house.url(f"{name}{key}{len(holder)}"), authorization="s3cret-value", **holder
        )
        if reply.status_code != 200:
            return error_of(reply)[:2]
        made = reply.json()
        house.delete(key, made)
        return made["user"] or made["key_id"] or "all"

    missing = (403, "missing_scope")
    # Without a word: the widest that the caller manages.
    assert [tried(key) for key in ("admin", "admin only", "ada", "plain")] == ["all", "all", "ada", house.ids["plain"]]
    assert [tried(key, user="ada") for key in ("admin", "ada", "bob", "plain")] == ["ada", "ada", missing, missing]
    own = house.ids["ada"]
    assert [tried(key, key_id=own) for key in ("admin", "ada", "ada too", "bob", "plain")] == [
        own,
        own,
        missing,
        missing,
        missing,
    ]
    assert tried("reader") == missing
    assert error_of(house.post("other", server_url="https://x.example/", authorization="s3cret-value", key_id=own)) == (
        400,
        "invalid_value",
        "key_id",
    )

    made = {
        holder: house.store("admin", server_url=house.url(name), authorization=f"s3cret-of-{holder}", **given)
        for holder, given in {
            "all": {},
            "ada": {"user": "ada"},
            "bob": {"user": "bob"},
            "plain": {"key_id": house.ids["plain"]},
        }.items()
    }
    seen = {"ada": {"all", "ada"}, "reader": {"all", "ada"}, "bob": {"all", "bob"}, "plain": {"all", "plain"}}
    seen |= {"plain too": {"all"}, "admin": set(made), "admin only": set(made), "other": set()}
    for key, holders in seen.items():
        listed = house.listed(key, limit=100)
        assert {holder for holder, one in made.items() if one["id"] in listed} == holders
        with house.http(key) as http:
            for holder, one in made.items():
                reply = http.get(f"/tool_credentials/{one['id']}")
                assert reply.status_code == (200 if holder in holders else 404)
    for change in (
        lambda *of: house.update(*of, name="x"),
        lambda *of: house.update(*of, authorization="st0len-value"),
        house.delete,
    ):
        assert change("ada", made["bob"]).status_code == 404
        assert change("other", made["all"]).status_code == 404
        assert error_of(change("ada", made["all"]))[:2] == missing
        assert error_of(change("plain", made["all"]))[:2] == missing
        assert error_of(change("reader", made["ada"]))[:2] == missing
    assert house.update("ada", made["ada"], authorization="an0ther-value").status_code == 200
    assert house.update("admin only", made["bob"], authorization="an0ther-value").status_code == 200
    assert house.delete("plain", made["plain"]).status_code == 200


def test_a_run_gets_the_most_specific_one_of_its_own(house, mcp, name):
    box = mcp()
    for holder, given in {"all": {}, "ada": {"user": "ada"}, "key": {"key_id": house.ids["ada too"]}}.items():
        house.store("admin", server_url=house.url(name), authorization=f"s3cret-of-{holder}", **given)
    of = ["plain", "bob", "ada", "ada too", "other"]
    for key in of:
        assert house.ask(key, box).status == "completed"
    assert dict(zip(of, house.heard(name), strict=True)) == {
        "plain": "Bearer s3cret-of-all",
        "bob": "Bearer s3cret-of-all",
        "ada": "Bearer s3cret-of-ada",
        "ada too": "Bearer s3cret-of-key",
        "other": None,
    }


def test_a_request_that_brings_its_own_gets_none(house, mcp, name):
    house.store("ada", server_url=house.url(name), authorization="s3cret-stored", headers={"x-key": "s3cret-too"})
    house.ask("ada", mcp(authorization="its-own"))
    house.ask("ada", mcp(headers={"x-mine": "its-own"}))
    house.ask("ada", mcp(authorization="", headers={}))
    sent = [(one.headers.get("authorization"), one.headers.get("x-key")) for one in house.toolserver.calls(name)]
    assert sent == [("Bearer its-own", None), (None, None), ("Bearer s3cret-stored", "s3cret-too")]


def test_a_new_secret_is_used_at_once_and_a_deleted_one_no_more(house, mcp, name):
    made = house.store("ada", server_url=house.url(name), authorization="s3cret-first")
    house.ask("ada", mcp())
    house.update("ada", made, authorization="Basic c2VjcmV0OnNlY3JldA==")
    house.ask("ada", mcp())
    house.update("ada", made, headers={"X-Key": "s3cret-third"})
    house.ask("ada", mcp())
    house.delete("ada", made)
    house.ask("ada", mcp())
    assert house.heard(name) == ["Bearer s3cret-first", "Basic c2VjcmV0OnNlY3JldA==", None, None]
    assert [one.headers.get("x-key") for one in house.toolserver.calls(name)] == [None, None, "s3cret-third", None]


def test_the_credentials_of_a_key_are_deleted_when_it_is_revoked(house, name):
    with house.http("admin") as http:
        key = http.post("/admin/keys", json={"user": "eve"}).json()
        house.keys["eve"] = key["value"]
        made = house.store("eve", server_url=house.url(name), authorization="s3cret-value", key_id=key["id"])
        kept = house.store("eve", server_url=house.url(name), authorization="s3cret-value")
        http.delete(f"/admin/keys/{key['id']}")
        assert http.get(f"/tool_credentials/{made['id']}").status_code == 404
        assert http.get(f"/tool_credentials/{kept['id']}").status_code == 200
        refused = http.post(
            "/tool_credentials",
            json={"server_url": house.url(name), "authorization": "s3cret-value", "key_id": key["id"]},
        )
        assert error_of(refused) == (400, "invalid_value", "key_id")


def test_on_a_server_without_keys_every_caller_is_the_tenant(server, toolserver, mcp, name):
    with httpx.Client(base_url=server.url) as http:
        asked = {"server_url": toolserver.url("mcp", name), "authorization": "s3cret-value"}
        made = http.post("/tool_credentials", json=asked).json()
        assert (made["user"], made["key_id"]) == (None, None)
        given = script([note(name), *calling("echo", {"x": 1})], answer("Done."))
        streamed(server, input=given, tools=[mcp()])
        assert [one.headers.get("authorization") for one in toolserver.calls(name)] == ["Bearer s3cret-value"]
        assert http.delete(f"/tool_credentials/{made['id']}").status_code == 200


# -- Where it goes ----------------------------------------------------------------------------------------------------------


def test_it_goes_to_its_own_server_only_whatever_the_label(house, mcp, name):
    house.store("ada", server_url=house.url(name), authorization="s3cret-of-url")
    house.store("ada", server_label="open", authorization="s3cret-of-label")
    other = f"{name}other"
    # The label of the operator's server, another server's URL.
    house.ask("ada", mcp("open", of=other))
    # Another path, host or scheme of the same server.
    for url in (f"{house.url(name)}/", house.url(name).replace("127.0.0.1", "127.0.0.2"), f"{house.url(name)}x"):
        house.ask("ada", {**mcp(), "server_url": url})
    assert {one.headers.get("authorization") for one in house.toolserver.asked(other)} == {None}
    assert {one.headers.get("authorization") for one in house.toolserver.asked(f"{name}x")} == {None}
    assert {one.headers.get("authorization") for one in house.toolserver.asked(name)} <= {None}
    # The operator's own, by its label, with what the operator has set.
    house.ask("ada", {"type": "mcp", "server_label": "open", "require_approval": "never"})
    made_call = house.toolserver.calls("operators")[-1]
    assert (made_call.headers["authorization"], made_call.headers["x-team"]) == (
        "Bearer s3cret-of-label",
        "blue research",
    )
    # The query is no part of what a server is; nor is the spelling of the URL.
    house.ask("ada", mcp(options={"echo": 1}))
    house.ask(
        "ada", {**mcp(), "server_url": house.url(name).replace("http://", "HTTP://").replace("/mcp/", "/x/../mcp/")}
    )
    assert house.heard(name)[-2:] == ["Bearer s3cret-of-url"] * 2


@pytest.mark.parametrize("transport", ["mcp", "sse"])
def test_it_does_not_follow_a_redirect_to_another_origin(house, mcp, name, transport):
    with Toolserver() as other:
        target = other.url(transport, name)
        made = house.store(
            "ada",
            server_url=house.toolserver.url(transport, name),
            authorization="s3cret-value",
            headers={"x-key": "s3cret-key"},
        )
        done = house.ask("ada", mcp(transport=transport, options={"redirect": target}), answer("Done."))
        assert done.output[0].error
        assert {one.headers.get("authorization") for one in house.toolserver.asked(name)} == {"Bearer s3cret-value"}
        assert other.asked(name) == []
    house.delete("ada", made)


def test_it_does_not_go_to_an_endpoint_of_another_origin(house, mcp, name):
    with Toolserver() as other:
        house.store("ada", server_url=house.toolserver.url("sse", name), authorization="s3cret-value")
        box = mcp(transport="sse", options={"endpoint": f"http://127.0.0.1:{other.port}"})
        assert house.ask("ada", box, answer("Done.")).output[0].error
        assert "Bearer s3cret-value" in {one.headers.get("authorization") for one in house.toolserver.asked(name)}
        assert other.asked(name) == []


# -- Where it never shows ---------------------------------------------------------------------------------------------------

TOKEN, KEY, WORDS = "t0ken-st0red", "k3y-st0red", "plain old words"

ECHO = "plain:authorization token:authorization base64:authorization url:authorization plain:x-key base64:x-key".split()


def hidden(text: str) -> None:
    for secret in (TOKEN, KEY, WORDS):
        assert secret not in text


@pytest.mark.parametrize("mode", ["plain", "stream", "background", "background stream"])
def test_a_stored_secret_is_nowhere_whatever_the_server_echoes(house, base_env, upstream, mcp, name, mode):
    box = mcp(options={"echo": 1, "tools": "echo,raw,refuse,status,headers", "auth": TOKEN})
    house.store(
        "admin",
        server_url=house.url(name),
        authorization=TOKEN,
        headers={"x-key": KEY, "x-thing": WORDS, "accept-language": f"{KEY}-language"},
    )
    said = " ".join(f"{{{form}}}" for form in [*ECHO, "plain:x-thing", "plain:accept-language"])
    content = {"content": [{"type": "text", "text": said}], "structuredContent": {said: [said]}}
    turns = (
        [
            call("raw", {"result": content}, id="a"),
            call("raw", {"result": {**content, "isError": True}}, id="b", index=1),
            call("refuse", {"message": said}, id="c", index=2),
            call("status", {"status": 500}, id="d", index=3),
            call("headers", {}, id="e", index=4),
            finish("tool_calls"),
        ],
        answer("Done."),
    )
    given = script([note(f"{name} {mode}"), *turns[0]], turns[1])
    options = {"background": "background" in mode, "stream": "stream" in mode}
    with house.served.client(api_key=house.keys["bob"]) as client:
        begun = client.responses.create(model="m", input=given, tools=[box], **options)
        if options["stream"]:
            events = [event.to_dict() for event in begun]
            hidden(json.dumps(events))
            begun = client.responses.retrieve(events[0]["response"]["id"])
        made = until(lambda: (one := client.responses.retrieve(begun.id)).status == "completed" and one)
        hidden(made.to_json())
        hidden(str(client.responses.input_items.list(made.id).to_dict()))
    calls = [item for item in made.output if item.type == "mcp_call"]
    assert [item.status for item in calls] == ["completed", "failed", "failed", "failed", "completed"]
    assert house.heard(name) == [f"Bearer {TOKEN}"] * 5
    assert "***" in (calls[0].output or "")
    hidden(dumped(house.served.database_url))
    hidden("".join(house.served.printed))
    hidden(remembered(base_env["REDIS_URL"], PREFIX))
    for record in upstream.asked(given):
        hidden(record.raw.decode())
    with house.http("admin") as http:
        for path in ("/tool_credentials", "/admin/audit", "/admin/keys"):
            hidden(http.get(path, params={"limit": 100}).text)


def test_what_the_operator_has_set_beside_it_is_masked_no_more_than_before(house, name):
    made = house.store("bob", server_label="open", headers={"x-key": "s3cret-value"})
    box = {"type": "mcp", "server_label": "open", "require_approval": "never"}
    done = house.ask("bob", box, calling("echo", {"x": "blue research s3cret-value"}), answer("Done."))
    [made_call] = [item for item in done.output if item.type == "mcp_call"]
    assert made_call.output == '{"x": "blue research ***"}'
    house.delete("bob", made)


# -- In the background ------------------------------------------------------------------------------------------------------


def test_a_background_run_gets_what_is_stored_when_it_is_made(
    new_server, base_env, new_database, toolserver, mcp, name
):
    env = {**base_env, "DATABASE_URL": new_database(), "REPRISE_LEASE_S": "1.5", "REPRISE_POLL_S": "0.2"}
    created = reprise(env, "keys", "create", "--tenant=acme")
    key = created.stdout.strip()
    served = new_server(**env, REPRISE_WORKERS_IN_API="false")
    given = script([note(name), *calling("gate", {"name": name})], calling("echo", {"x": 1}), answer("Done."))
    auth = {"Authorization": f"Bearer {key}"}
    with served.client(api_key=key) as client, httpx.Client(base_url=served.url, headers=auth) as http:
        queued = client.responses.create(model="m", input=given, tools=[mcp()], background=True)
        [row] = fetch(env["DATABASE_URL"], "select secrets, request::text from runs")
        asked = {"server_url": toolserver.url("mcp", name), "authorization": "s3cret-first"}
        made = http.post("/tool_credentials", json=asked).json()
        assert made["key_id"] == created.stderr.split()[0]
        first = new_server(**env)
        toolserver.wait_reached(name)
        http.post(f"/tool_credentials/{made['id']}", json={"authorization": "s3cret-second"})
        for text in (dumped(env["DATABASE_URL"]), row["request"], str(row["secrets"])):
            assert "s3cret-" not in text
        first.kill()
        second = new_server(**env)
        done = until(lambda: (one := client.responses.retrieve(queued.id)).status == "completed" and one)
        assert [item.status for item in done.output if item.type == "mcp_call"] == ["failed", "completed"]
        sent = [(one.tool, one.headers["authorization"]) for one in toolserver.calls(name)]
        assert sent == [("gate", "Bearer s3cret-first"), ("echo", "Bearer s3cret-second")]
        assert "s3cret-" not in done.to_json()
        second.kill()
        # Deleted while the run waits: it is made without, and says what comes of that.
        box = mcp(options={"auth": "s3cret-second"})
        given = script([note(f"{name} later"), *answer("Done.")])
        queued = client.responses.create(model="m", input=given, tools=[box], background=True)
        assert http.delete(f"/tool_credentials/{made['id']}").status_code == 200
        third = new_server(**env)
        done = until(lambda: (one := client.responses.retrieve(queued.id)).status == "completed" and one)
    assert done.output[0].error == "The tool server 'box' answered with HTTP status 401."
    assert done.output_text == "Done."
    printed = "".join([*served.printed, *first.printed, *second.printed, *third.printed])
    assert "s3cret-" not in printed


# -- The secret key ---------------------------------------------------------------------------------------------------------

OLD, NEW, OTHER = (f"{letter * 43}=" for letter in "AEI")


def test_a_change_of_the_secret_key_leaves_credentials_readable(
    new_server, base_env, new_database, toolserver, mcp, name
):
    env = {**base_env, "DATABASE_URL": new_database()}
    asked = {"server_url": toolserver.url("mcp", name), "authorization": "s3cret-value"}

    def heard(**keys: str) -> tuple[str | None, str | None]:
        served = new_server(**env, **keys)
        given = script([note(f"{name} {keys}"), *calling("echo", {"x": 1})], answer("Done."))
        if not fetch(env["DATABASE_URL"], "select from tool_credentials"):
            httpx.post(f"{served.url}/tool_credentials", json=asked).raise_for_status()
        with served.client() as client:
            made = client.responses.create(model="m", input=given, tools=[mcp()])
        served.stop()
        calls = toolserver.calls(name)
        return calls[-1].headers.get("authorization") if calls else None, made.output[0].error

    sent = ("Bearer s3cret-value", None)
    assert heard(REPRISE_SECRET_KEY=OLD) == sent
    both = {"REPRISE_SECRET_KEY": NEW, "REPRISE_OLD_SECRET_KEYS": OLD}
    assert heard(**both) == sent
    done = reprise({**env, **both}, "rekey")
    assert (done.returncode, done.stdout.splitlines()[1:]) == (
        0,
        [f"{what} sealed with it, 0 that none of the keys opens." for what in ("Tool credentials: 1", "Agents: 0")],
    )
    assert heard(REPRISE_SECRET_KEY=NEW) == sent
    # A key that is lost.
    lost = {"REPRISE_SECRET_KEY": OTHER}
    assert "Tool credentials: 0 sealed with it, 1 that" in reprise({**env, **lost}, "rekey").stdout
    count = len(toolserver.asked(name))
    _, error = heard(**lost)
    assert error and "can't be opened" in error
    assert len(toolserver.asked(name)) == count


def test_a_row_that_is_moved_to_another_tenant_server_or_holder_does_not_open(house, mcp, name):
    made = house.store("ada", server_url=house.url(name), authorization="s3cret-value")
    every = house.store("admin", server_url=house.url(name), authorization="s3cret-of-all")
    theirs = house.store("other", server_url=house.url(name), authorization="an0ther-value")
    elsewhere = house.store("ada", server_url=house.url(f"{name}2"), authorization="an0ther-value")
    copy = "update tool_credentials set sealed = (select sealed from tool_credentials where id = $1) where id = $2"
    for source, target in ((every, theirs), (made, elsewhere), (made, every)):
        fetch(house.served.database_url, copy, source["id"], target["id"])
    for key, box in (("other", mcp()), ("ada", mcp(of=f"{name}2")), ("bob", mcp())):
        assert "can't be opened" in house.ask(key, box, answer("Done.")).output[0].error
    assert house.toolserver.asked(name) == house.toolserver.asked(f"{name}2") == []
    house.ask("ada", mcp())
    assert house.heard(name) == ["Bearer s3cret-value"]


def test_credentials_count_with_the_headers_that_a_request_declares(new_server, mcp, name, toolserver):
    served = new_server(REPRISE_TOOL_HEADERS_BYTES_MAX="64")
    for number in range(2):
        asked = {"server_url": toolserver.url("mcp", f"{name}{number}"), "authorization": "a" * 40}
        httpx.post(f"{served.url}/tool_credentials", json=asked).raise_for_status()
    boxes = [mcp(f"box{number}", of=f"{name}{number}") for number in range(2)]
    with served.client() as client:
        client.responses.create(model="m", input="hi", tools=boxes[:1])
        with pytest.raises(openai.BadRequestError, match="stored credentials") as refused:
            client.responses.create(model="m", input="hi", tools=boxes)
    assert refused.value.param == "tools"
