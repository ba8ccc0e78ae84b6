"""Every route of the application with every kind of key or token that may not use it, and with those that may."""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx
import pytest
from msgspec import UNSET, Struct, UnsetType

from tests.conformance import operation, wrong_in
from tests.issuer import Issuer
from tests.routes import handlers
from tests.servers import Served, reprise
from tests.waiting import fetch

ORDINARY = ("responses.read", "responses.write")
ALL = (*ORDINARY, "admin")


class Call(Struct, frozen=True):
    """How a test calls a route."""

    json: Any = None
    """Its body, or what makes one."""
    form: bool = False
    scope: str | UnsetType | None = UNSET
    """What a key needs; by default what its method says."""
    or_admin: bool = False
    """Whether the scope `admin` will do, too."""
    is_of_tenant: bool = False
    """Whether it is about the tenant, whoever of its users calls."""

    @property
    def body(self) -> Any:
        """The body of one call."""
        return self.json() if callable(self.json) else self.json


ASKED = {"model": "good", "input": "hi"}
CHAT = {"model": "good", "messages": [{"role": "user", "content": "hi"}]}
NUMBERS = itertools.count()


def credential() -> dict[str, Any]:
    """One for a server that has none yet."""
    return {"server_url": f"https://tools.example/{next(NUMBERS)}", "authorization": "s3cret-value"}


def agent() -> dict[str, Any]:
    """One of another name."""
    return {"name": f"agent-{next(NUMBERS)}", "model": "good"}


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
    "POST /v1/agents": Call(agent, scope="admin", is_of_tenant=True),
    "GET /v1/agents": Call(scope=None, is_of_tenant=True),
    "GET /v1/agents/{agent_id}": Call(scope=None, is_of_tenant=True),
    "POST /v1/agents/{agent_id}": Call({"temperature": 1}, scope="admin", is_of_tenant=True),
    "DELETE /v1/agents/{agent_id}": Call(scope="admin", is_of_tenant=True),
    "POST /v1/admin/keys": Call({}, scope="admin", is_of_tenant=True),
    "GET /v1/admin/keys": Call(scope="admin", is_of_tenant=True),
    "GET /v1/admin/keys/{key_id}": Call(scope="admin", is_of_tenant=True),
    "POST /v1/admin/keys/{key_id}": Call({"name": "renamed"}, scope="admin", is_of_tenant=True),
    "POST /v1/admin/keys/{key_id}/rotate": Call({}, scope="admin", is_of_tenant=True),
    "DELETE /v1/admin/keys/{key_id}": Call(scope="admin", is_of_tenant=True),
    "GET /v1/admin/audit": Call(scope="admin", is_of_tenant=True),
    "POST /v1/admin/tenants": Call(lambda: {"id": f"tenant-{next(NUMBERS)}"}, scope="operator", is_of_tenant=True),
    "GET /v1/admin/tenants": Call(scope="operator", is_of_tenant=True),
    "GET /v1/admin/tenants/{tenant_id}": Call(scope="operator", is_of_tenant=True),
    "POST /v1/admin/tenants/{tenant_id}": Call({"limits": {}}, scope="operator", is_of_tenant=True),
    "POST /v1/admin/tenants/{tenant_id}/keys": Call({}, scope="operator", is_of_tenant=True),
    "POST /v1/tool_credentials": Call(credential, or_admin=True),
    "GET /v1/tool_credentials": Call(or_admin=True),
    "GET /v1/tool_credentials/{credential_id}": Call(or_admin=True),
    "POST /v1/tool_credentials/{credential_id}": Call({"name": "mine"}, or_admin=True),
    "DELETE /v1/tool_credentials/{credential_id}": Call(or_admin=True),
    "GET /v1/usage": Call(is_of_tenant=True, or_admin=True),
}
"""In an order in which each may follow those before it."""

OPEN = {"GET /", "GET /docs", "GET /docs/redoc.standalone.js", "GET /openapi.json", "GET /livez", "GET /readyz"}
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
    """Also tokens."""
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
            reply = http.request(method, path.format(**(ids or self.ids)), json=call.body, **form)
        assert not wrong_in(operation(method, path), reply), route
        return reply

    def http(self, key: str) -> httpx.Client:
        """A client with a key, by its name."""
        headers = {"Authorization": f"Bearer {self.keys[key]}"}
        return httpx.Client(base_url=self.served.url, headers=headers, timeout=30)


def owner(route: str) -> str:
    """The key that may call the route, and to which what it names belongs."""
    return scope if (scope := scope_of(route)) in {"admin", "operator"} else "alice"


@pytest.fixture(scope="module")
def issuer() -> Iterator[Issuer]:
    with Issuer() as running:
        yield running


def tokens(issuer: Issuer) -> dict[str, str]:
    """Tokens of every kind, by name."""
    staff = {"iss": f"{issuer.url}/staff", "tenant": "a", "scope": "read write administer"}
    alice = {"iss": f"{issuer.url}/users", "tenant": "a", "sub": "alice"}
    past = int(time.time()) - 100
    words: dict[str, str] = {"responses.read": "read", "responses.write": "write", "admin": "administer"}
    made = {
        "admin": issuer.token(**staff),
        "unbound": issuer.token(**{**staff, "scope": "read write"}),
        "alice": issuer.token(**alice),
        "bob": issuer.token(**{**alice, "sub": "bob"}),
        "other tenant": issuer.token(**{**staff, "tenant": "b"}),
        "user of b": issuer.token(**{**alice, "tenant": "b"}),
        "other model": issuer.token(**staff, models=["oth*", "x"]),
        "expired": issuer.token(**{**alice, "iat": past - 100, "exp": past}),
        "of a wrong issuer": issuer.token(**{**alice, "iss": issuer.url}),
        "for a wrong audience": issuer.token(**{**alice, "aud": "another"}),
        "with a wrong signature": issuer.token(key=Issuer().keys["first"], **alice),
        "without a signature": issuer.forged("none", **alice),
        "with the public key as a secret": issuer.forged("HS256", **alice),
    }
    for scope, word in words.items():
        made[f"all but {scope}"] = issuer.token(**{**staff, "scope": staff["scope"].replace(word, "other")})
        made[f"only {scope}"] = issuer.token(**{**staff, "scope": word})
    made["all but operator"] = made["admin"]
    return {f"token {name}": token for name, token in made.items()}


@pytest.fixture(scope="module")
def house(
    base_env: Mapping[str, str], new_database: Callable[[], str], upstream, tmp_path_factory, issuer: Issuer
) -> Iterator[House]:
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
        [issuers.staff]
        issuer = "{issuer.url}/staff"
        audience = "reprise"
        algorithms = ["RS256"]
        jwks_url = "{issuer.jwks_url}"
        tenants = ["a", "b"]
        claims = {{ tenant = "tenant", scopes = "scope", models = "models" }}
        scopes = {{ read = ["responses.read"], write = ["responses.write"], administer = ["admin"] }}
        default_models = ["*"]
        [issuers.users]
        issuer = "{issuer.url}/users"
        audience = "reprise"
        algorithms = ["RS256"]
        tenants = ["a", "b"]
        claims = {{ tenant = "tenant", user = "sub" }}
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
        keys |= {f"only {scope}": make(scopes=[scope])["value"] for scope in ALL}
        operator = reprise(env, "keys", "create", "--tenant", "operators", "--scope", "operator")
        keys |= {"operator": operator.stdout.strip(), "all but operator": admin}
        keys["other model"] = make(scopes=[*ALL], models=["oth*", "x"])["value"]
        gone = {state: make(scopes=[*ALL], name=state) for state in ("revoked", "expired")}
        keys |= {state: key["value"] for state, key in gone.items()}
        assert http.delete(f"/admin/keys/{gone['revoked']['id']}").status_code == 200
        past = "update keys set expires_at = now() - interval '1 second' where id = $1"
        fetch(env["DATABASE_URL"], past, gone["expired"]["id"])
        house = House(served, keys | tokens(issuer), {"model_id": "good", "tenant_id": "a"}, first.stderr.split()[0])
        house.ids |= things(house, "")
        yield house


def things(house: House, kind: str) -> dict[str, str]:
    """One of each, made by alice and an administrator with keys or, of that kind, tokens; their ids by the name of the path's
    parameter."""
    with house.http(f"{kind}admin") as http:
        key_id = http.post("/admin/keys", json={"name": "named"}).json()["id"]
        agent_id = http.post("/agents", json=agent()).json()["id"]
    with house.http(f"{kind}alice") as http:
        return {"key_id": key_id, "agent_id": agent_id, **things_of(http)}


def things_of(http: httpx.Client) -> dict[str, str]:
    """What a user owns."""
    conversation = http.post("/conversations", json={"items": [{"role": "user", "content": "mine"}]}).json()["id"]
    return {
        "response_id": http.post("/responses", json={**ASKED, "background": True}).json()["id"],
        "completion_id": http.post("/chat/completions", json={**CHAT, "store": True}).json()["id"],
        "conversation_id": conversation,
        "item_id": http.get(f"/conversations/{conversation}/items").json()["first_id"],
        "credential_id": http.post("/tool_credentials", json=credential()).json()["id"],
        "file_id": http.post("/files", files={"file": ("a", b"a")}, data={"purpose": "vision"}).json()["id"],
    }


KINDS = pytest.mark.parametrize("kind", ["", "token "], ids=["key", "token"])
OTHERS = ("other tenant", "bob", "unbound")


def error_of(reply: httpx.Response) -> tuple[int, str | None]:
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return reply.status_code, error["code"]


@pytest.mark.parametrize("key", [None, "wrong", "revoked", "expired"])
def test_no_route_takes_a_key_that_is_not_valid(house, key):
    expected = (401, "missing_api_key" if key is None else "invalid_api_key")
    assert {route: error_of(house.send(route, key)) for route in CALLS} == dict.fromkeys(CALLS, expected)


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("expired", "The token is expired."),
        ("of a wrong issuer", "The token is from an issuer that this server does not know."),
        ("for a wrong audience", "The token is for another audience."),
        ("with a wrong signature", "The token's signature is not valid."),
        ("without a signature", "The token is signed in a way that this server does not take from its issuer."),
        (
            "with the public key as a secret",
            "The token is signed in a way that this server does not take from its issuer.",
        ),
    ],
)
def test_no_route_takes_a_token_that_is_not_valid(house, token, message):
    expected = (401, "token_expired" if token == "expired" else "invalid_api_key")
    replies = {route: house.send(route, f"token {token}") for route in CALLS}
    assert {route: error_of(reply) for route, reply in replies.items()} == dict.fromkeys(CALLS, expected)
    assert {reply.json()["error"]["message"] for reply in replies.values()} == {message}


@KINDS
def test_every_route_demands_its_scope(house, kind):
    scoped = [route for route in CALLS if scope_of(route)]
    without = {
        route: f"only {next(one for one in ORDINARY if one != scope_of(route))}"
        if CALLS[route].or_admin
        else f"all but {scope_of(route)}"
        for route in scoped
    }
    found = {route: error_of(house.send(route, f"{kind}{key}")) for route, key in without.items()}
    assert found == dict.fromkeys(scoped, (403, "missing_scope"))
    assert {house.send(route, f"{kind}all but admin").status_code for route in CALLS.keys() - scoped} == {200}


@pytest.mark.parametrize(
    "key",
    [*OTHERS, *(f"token {one}" for one in OTHERS), "token user of b"],
)
def test_what_belongs_to_others_looks_unknown(house, key):
    for route, call in CALLS.items():
        if not key.endswith("other tenant") and call.is_of_tenant:
            continue
        reply = house.send(route, key)
        if call.scope == "operator":
            assert error_of(reply) == (403, "missing_scope"), route
            continue
        ids = {name: id for name, id in house.ids.items() if name not in {"model_id", "tenant_id"}}
        named = [name for name in ids if f"{{{name}}}" in route]
        assert not any(id in reply.text for name, id in ids.items() if name not in named), route
        if named:
            unknown = {name: f"{id.partition('_')[0]}_{'0' * 36}" for name, id in ids.items()}
            nothing = house.send(route, key, unknown)
            assert (route, reply.status_code, nothing.status_code) == (route, 404, 404)
            assert reply.text.replace(house.ids[named[0]], unknown[named[0]]) == nothing.text
        else:
            # Who is neither a user nor a key has no credentials of its own.
            has_own = (route, key) != ("POST /v1/tool_credentials", "token unbound")
            assert (route, reply.status_code) == (route, 200 if has_own else 403)


@KINDS
def test_where_the_scope_admin_will_do_no_other_is_needed(house, kind):
    routes = [route for route, call in CALLS.items() if call.or_admin and "{" not in route]
    found = {route: house.send(route, f"{kind}only admin").status_code for route in routes}
    assert found == dict.fromkeys(routes, 200)


@KINDS
def test_no_user_administers_keys_nor_reads_the_log(house, kind):
    admin = [route for route in CALLS if scope_of(route) in {"admin", "operator"}]
    assert {error_of(house.send(route, f"{kind}alice")) for route in admin} == {(403, "missing_scope")}


@KINDS
def test_a_model_that_a_key_may_not_use_is_refused_wherever_it_is_named(house, kind):
    naming = [route for route, call in CALLS.items() if "{model_id}" in route or "model" in (call.body or {})]
    assert len(naming) >= 4
    found = {route: error_of(house.send(route, f"{kind}other model")) for route in naming}
    assert found == dict.fromkeys(naming, (403, "model_not_allowed"))
    with house.http(f"{kind}other model") as http:
        assert [model["id"] for model in http.get("/models").json()["data"]] == ["other"]
        assert http.get("/models/other").json()["id"] == "other"
        assert error_of(http.get("/models/unknown")) == (404, "model_not_found")
        assert error_of(http.get("/models/up@scripted")) == (403, "model_not_allowed")
        assert error_of(http.post("/responses", json={**ASKED, "model": "unknown"})) == (404, "model_not_found")
        assert http.post("/responses", json={**ASKED, "model": "other"}).status_code == 200
        background = {**ASKED, "background": True}
        assert error_of(http.post("/responses", json=background)) == (403, "model_not_allowed")
        assert http.post("/responses", json={**background, "model": "other"}).status_code == 200


@KINDS
def test_every_route_serves_the_key_that_may_use_it(house, kind):
    time_before, ids = int(time.time()), {**house.ids, **things(house, kind)}
    routes = [route for route in CALLS if kind == "" or owner(route) != "operator"]
    if kind:
        del ids["tenant_id"]  # no token is an operator's
    found = {route: house.send(route, f"{kind}{owner(route)}", ids).status_code for route in routes}
    assert found == dict.fromkeys(routes, 200)
    with house.http("admin") as http:
        log = http.get("/admin/audit", params={"limit": 100, "order": "asc"}).json()["data"]
        first = {one["type"]: one for one in log[:2]}  # in one moment
        known = http.get(f"/admin/keys/{first['key.created']['target']}").json()
    by_alice = {"type": "api_key", "user": "alice"} if kind == "" else jwt_of("users", "alice")
    mine = [one for one in log if one["effective_at"] >= time_before and one["target"] in expected_targets(ids)]
    done = [(one["type"], one["target"], one["actor"]) for one in mine]
    for _, _, actor in done:
        if kind == "":
            actor.pop("key_id")
    by_admin = {"type": "api_key", "user": None} if kind == "" else jwt_of("staff", None)
    assert done == [
        ("key.created", ids["key_id"], by_admin),
        ("agent.created", ids["agent_id"], by_admin),
        ("tool_credential.created", ids["credential_id"], by_alice),
        ("response.deleted", expected_targets(ids)[0], by_alice),
        ("response.deleted", ids["response_id"], by_alice),
        ("conversation.item.deleted", ids["item_id"], by_alice),
        ("conversation.deleted", ids["conversation_id"], by_alice),
        ("file.deleted", ids["file_id"], by_alice),
        ("agent.updated", ids["agent_id"], by_admin),
        ("agent.deleted", ids["agent_id"], by_admin),
        ("key.updated", ids["key_id"], by_admin),
        ("key.rotated", ids["key_id"], by_admin),
        ("key.revoked", ids["key_id"], by_admin),
        *([("tenant.updated", "a", {"type": "operator", "user": None})] if kind == "" else []),
        ("tool_credential.updated", ids["credential_id"], by_alice),
        ("tool_credential.deleted", ids["credential_id"], by_alice),
    ]
    operator = {"type": "command_line", "key_id": None, "user": None}
    assert [first[type_]["actor"] for type_ in ("tenant.created", "key.created")] == [operator, operator]
    assert (first["tenant.created"]["target"], known["id"]) == ("a", house.key_id)


def jwt_of(issuer: str, user: str | None) -> dict[str, str | None]:
    return {"type": "jwt", "key_id": f"jwt:{issuer}", "user": user}


def expected_targets(ids: dict[str, str]) -> list[str]:
    """The ids that the audit log names; that of a chat completion is its response's."""
    return [ids["completion_id"].replace("chatcmpl-", "resp_"), *ids.values()]
