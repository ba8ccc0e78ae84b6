"""Every route of the application with every kind of key that may not use it, and with one that may."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx
import pytest
from msgspec import UNSET, Struct, UnsetType

from tests.routes import handlers
from tests.servers import Served, reprise
from tests.waiting import fetch

ORDINARY = ("responses.read", "responses.write")
ALL = (*ORDINARY, "admin")


class Call(Struct, frozen=True):
    """How a test calls a route."""

    json: Any = None
    form: bool = False
    scope: str | UnsetType | None = UNSET
    """What a key needs; by default what its method says."""
    is_of_tenant: bool = False
    """Whether it is about the tenant, whoever of its users calls."""


ASKED = {"model": "good", "input": "hi"}
CHAT = {"model": "good", "messages": [{"role": "user", "content": "hi"}]}

CALLS: dict[str, Call] = {
    "POST /v1/responses": Call(ASKED),
    "GET /v1/responses": Call(),
    "POST /v1/responses/input_tokens": Call(ASKED),
    "POST /v1/responses/compact": Call(ASKED),
    "POST /v1/chat/completions": Call(CHAT),
    "GET /v1/chat/completions": Call(),
    "GET /v1/chat/completions/{completion_id}": Call(),
    "GET /v1/chat/completions/{completion_id}/messages": Call(),
    "POST /v1/chat/completions/{completion_id}": Call({"metadata": {}}),
    "DELETE /v1/chat/completions/{completion_id}": Call(),
    "GET /v1/responses/{response_id}": Call(),
    "GET /v1/responses/{response_id}/input_items": Call(),
    "POST /v1/responses/{response_id}/cancel": Call(),
    "DELETE /v1/responses/{response_id}": Call(),
    "POST /v1/conversations": Call({}),
    "GET /v1/conversations": Call(),
    "GET /v1/conversations/{conversation_id}": Call(),
    "POST /v1/conversations/{conversation_id}": Call({"metadata": {}}),
    "POST /v1/conversations/{conversation_id}/fork": Call({}),
    "GET /v1/conversations/{conversation_id}/items": Call(),
    "POST /v1/conversations/{conversation_id}/items": Call({"items": [{"role": "user", "content": "more"}]}),
    "GET /v1/conversations/{conversation_id}/items/{item_id}": Call(),
    "DELETE /v1/conversations/{conversation_id}/items/{item_id}": Call(),
    "DELETE /v1/conversations/{conversation_id}": Call(),
    "POST /v1/files": Call(form=True),
    "GET /v1/files": Call(),
    "GET /v1/files/{file_id}": Call(),
    "GET /v1/files/{file_id}/content": Call(),
    "DELETE /v1/files/{file_id}": Call(),
    "GET /v1/models": Call(scope=None, is_of_tenant=True),
    "GET /v1/models/{model_id}": Call(scope=None, is_of_tenant=True),
    "POST /v1/admin/keys": Call({}, scope="admin", is_of_tenant=True),
    "GET /v1/admin/keys": Call(scope="admin", is_of_tenant=True),
    "GET /v1/admin/keys/{key_id}": Call(scope="admin", is_of_tenant=True),
    "POST /v1/admin/keys/{key_id}/rotate": Call({}, scope="admin", is_of_tenant=True),
    "DELETE /v1/admin/keys/{key_id}": Call(scope="admin", is_of_tenant=True),
    "GET /v1/admin/audit": Call(scope="admin", is_of_tenant=True),
}
"""In an order in which each may follow those before it."""

OPEN = {"GET /", "GET /livez", "GET /readyz"}
"""Routes without a key."""


def test_every_route_has_a_row():
    assert CALLS.keys() | OPEN == handlers().keys()


def scope_of(route: str) -> str | None:
    call = CALLS[route]
    if call.scope is not UNSET:
        return call.scope
    return "responses.read" if route.startswith("GET ") else "responses.write"


class House(Struct):
    """A server with keys of every kind, by name."""

    served: Served
    keys: dict[str, str]
    ids: dict[str, str]
    """Of things of alice's, a user of the tenant `a`, by the name of the path's parameter."""
    key_id: str

    def send(self, route: str, key: str | None, ids: Mapping[str, str] | None = None) -> httpx.Response:
        """Call a route with a key, by its name."""
        method, path = route.split(" ")
        call = CALLS[route]
        form = {"files": {"file": ("a.txt", b"of a")}, "data": {"purpose": "user_data"}} if call.form else {}
        authorization = {} if key is None else {"Authorization": f"Bearer {self.keys[key]}"}
        with httpx.Client(base_url=self.served.url.removesuffix("/v1"), headers=authorization, timeout=30) as http:
            return http.request(method, path.format(**(ids or self.ids)), json=call.json, **form)

    def owner(self, route: str) -> str:
        """The key that may call the route, and to which what it names belongs."""
        return "admin" if scope_of(route) == "admin" else "alice"


@pytest.fixture(scope="module")
def house(base_env: Mapping[str, str], new_database: Callable[[], str], upstream, tmp_path_factory) -> Iterator[House]:
    catalog = tmp_path_factory.mktemp("rights") / "catalog.toml"
    routes = '[{ upstream = "up", model = "scripted" }]'
    catalog.write_text(f"""
        [upstreams.up]
        base_url = "{upstream.base_url}"
        [upstreams.spare]
        base_url = "{upstream.base_url}"
        [[models]]
        name = "good"
        routes = {routes}
        [[models]]
        name = "other"
        routes = {routes}
    """)
    env = {name: value for name, value in base_env.items() if name != "OPENAI_BASE_URL"}
    env |= {"DATABASE_URL": new_database(), "REPRISE_CATALOG": str(catalog), "REPRISE_AUTH_DELAY_MAX_S": "0"}
    first = reprise(env, "keys", "create", "--tenant", "a", *(f"--scope={scope}" for scope in ALL))
    admin = first.stdout.strip()
    theirs = reprise(env, "keys", "create", "--tenant", "b", *(f"--scope={scope}" for scope in ALL)).stdout.strip()
    with Served(env) as served, httpx.Client(base_url=served.url, timeout=30) as http:
        http.headers["Authorization"] = f"Bearer {admin}"

        def make(**given: Any) -> dict[str, Any]:
            reply = http.post("/admin/keys", json=given)
            assert reply.status_code == 200, reply.text
            return reply.json()

        keys = {"admin": admin, "other tenant": theirs, "wrong": "sk-reprise-wrong", "unbound": make()["value"]}
        keys |= {user: make(user=user)["value"] for user in ("alice", "bob")}
        keys |= {f"all but {scope}": make(scopes=[one for one in ALL if one != scope])["value"] for scope in ALL}
        keys["other model"] = make(scopes=[*ALL], models=["oth*", "x"])["value"]
        gone = {state: make(scopes=[*ALL], name=state) for state in ("revoked", "expired")}
        keys |= {state: key["value"] for state, key in gone.items()}
        assert http.delete(f"/admin/keys/{gone['revoked']['id']}").status_code == 200
        past = "update keys set expires_at = now() - interval '1 second' where id = $1"
        fetch(env["DATABASE_URL"], past, gone["expired"]["id"])
        house = House(served, keys, {"model_id": "good", "key_id": make(name="named")["id"]}, first.stderr.split()[0])
        http.headers["Authorization"] = f"Bearer {keys['alice']}"
        house.ids |= things(http)
        yield house


def things(http: httpx.Client) -> dict[str, str]:
    """One of each, and their ids by the name of the path's parameter."""
    conversation = http.post("/conversations", json={"items": [{"role": "user", "content": "mine"}]}).json()["id"]
    return {
        "response_id": http.post("/responses", json={**ASKED, "background": True}).json()["id"],
        "completion_id": http.post("/chat/completions", json={**CHAT, "store": True}).json()["id"],
        "conversation_id": conversation,
        "item_id": http.get(f"/conversations/{conversation}/items").json()["first_id"],
        "file_id": http.post("/files", files={"file": ("a", b"a")}, data={"purpose": "vision"}).json()["id"],
    }


def error_of(reply: httpx.Response) -> tuple[int, str | None]:
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return reply.status_code, error["code"]


@pytest.mark.parametrize("key", [None, "wrong", "revoked", "expired"])
def test_no_route_takes_a_key_that_is_not_valid(house, key):
    expected = (401, "missing_api_key" if key is None else "invalid_api_key")
    assert {route: error_of(house.send(route, key)) for route in CALLS} == dict.fromkeys(CALLS, expected)


def test_every_route_demands_its_scope(house):
    scoped = [route for route in CALLS if scope_of(route)]
    found = {route: error_of(house.send(route, f"all but {scope_of(route)}")) for route in scoped}
    assert found == dict.fromkeys(scoped, (403, "missing_scope"))
    assert {house.send(route, "all but admin").status_code for route in CALLS.keys() - scoped} == {200}


@pytest.mark.parametrize("key", ["other tenant", "bob", "unbound"])
def test_what_belongs_to_others_looks_unknown(house, key):
    for route, call in CALLS.items():
        if key != "other tenant" and call.is_of_tenant:
            continue
        named = [name for name in house.ids if f"{{{name}}}" in route and name != "model_id"]
        reply = house.send(route, key)
        assert not any(id in reply.text for name, id in house.ids.items() if name not in {"model_id", *named}), route
        if named:
            unknown = {name: f"{id.partition('_')[0]}_{'0' * 36}" for name, id in house.ids.items()}
            nothing = house.send(route, key, unknown)
            assert (route, reply.status_code, nothing.status_code) == (route, 404, 404)
            assert reply.text.replace(house.ids[named[0]], unknown[named[0]]) == nothing.text
        else:
            assert (route, reply.status_code) == (route, 200)


def test_no_user_administers_keys_nor_reads_the_log(house):
    admin = [route for route in CALLS if scope_of(route) == "admin"]
    assert {error_of(house.send(route, "alice")) for route in admin} == {(403, "missing_scope")}


def test_a_model_that_a_key_may_not_use_is_refused_wherever_it_is_named(house):
    naming = [route for route, call in CALLS.items() if "{model_id}" in route or "model" in (call.json or {})]
    assert len(naming) >= 4
    found = {route: error_of(house.send(route, "other model")) for route in naming}
    assert found == dict.fromkeys(naming, (403, "model_not_allowed"))
    with httpx.Client(
        base_url=house.served.url, headers={"Authorization": f"Bearer {house.keys['other model']}"}
    ) as http:
        assert [model["id"] for model in http.get("/models").json()["data"]] == ["other"]
        assert http.get("/models/other").json()["id"] == "other"
        assert error_of(http.get("/models/unknown")) == (404, "model_not_found")
        assert error_of(http.get("/models/up@scripted")) == (403, "model_not_allowed")
        assert error_of(http.post("/responses", json={**ASKED, "model": "unknown"})) == (404, "model_not_found")
        assert http.post("/responses", json={**ASKED, "model": "other"}).status_code == 200
        background = {**ASKED, "background": True}
        assert error_of(http.post("/responses", json=background)) == (403, "model_not_allowed")
        assert http.post("/responses", json={**background, "model": "other"}).status_code == 200


def test_every_route_serves_the_key_that_may_use_it(house):
    time_before = int(time.time())
    assert {route: house.send(route, house.owner(route)).status_code for route in CALLS} == dict.fromkeys(CALLS, 200)
    with httpx.Client(base_url=house.served.url, headers={"Authorization": f"Bearer {house.keys['admin']}"}) as http:
        log = http.get("/admin/audit", params={"limit": 100, "order": "asc"}).json()["data"]
        known = http.get(f"/admin/keys/{log[0]['target']}").json()
    done = [(one["type"], one["target"], one["actor"]["user"]) for one in log if one["effective_at"] >= time_before]
    mine = [one for one in done if one[2] == "alice"]
    assert mine == [
        ("response.deleted", house.ids["completion_id"].replace("chatcmpl-", "resp_"), "alice"),
        ("response.deleted", house.ids["response_id"], "alice"),
        ("conversation.item.deleted", house.ids["item_id"], "alice"),
        ("conversation.deleted", house.ids["conversation_id"], "alice"),
        ("file.deleted", house.ids["file_id"], "alice"),
    ]
    by_admin = [one for one in done if one[1] == house.ids["key_id"] and one[0] != "key.created"]
    assert by_admin == [(f"key.{what}", house.ids["key_id"], None) for what in ("rotated", "revoked")]
    assert (log[0]["type"], log[0]["actor"], known["id"]) == (
        "key.created",
        {"type": "command_line", "key_id": None, "user": None},
        house.key_id,
    )
