"""Operators make tenants, limit them and make their first keys, by the API at two replicas; nobody else does."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import httpx
import pytest
from msgspec import Struct

from tests import wire_proxy
from tests.issuer import Issuer
from tests.servers import Served, reprise
from tests.waiting import fetch, until
from tests.wire_proxy import WireProxy

CACHE_S = 0.3
NO_LIMITS = {"requests_per_minute": None, "tokens_per_minute": None, "concurrent_runs": None, "stored_bytes": None}
MISSING = (403, "missing_scope")


class House(Struct):
    """Two replicas, an operator, and an administrator of the operator's own tenant who is none."""

    env: dict[str, str]
    replicas: tuple[Served, Served]
    operator: str
    operator_id: str
    admin: str
    issuer: Issuer

    def http(self, key: str | None, replica: int = 0) -> httpx.Client:
        """Raw HTTP with a key."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.replicas[replica].url, headers=headers, timeout=30)

    def ask(self, method: str, path: str, json: Any = None, *, key: str | None = None, replica: int = 0) -> Any:
        """What an operator, or another, is answered."""
        with self.http(key or self.operator, replica) as http:
            reply = http.request(method, path, json=json)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def refusal(self, method: str, path: str, json: Any = None, *, key: str | None = None) -> tuple[int, str | None]:
        """Why an operator, or another, is refused."""
        with self.http(key or self.operator) as http:
            reply = http.request(method, path, json=json)
        return reply.status_code, reply.json()["error"]["code"]

    def tenant(self, name: str, **given: Any) -> dict[str, Any]:
        """A new one."""
        return self.ask("POST", "/admin/tenants", {"id": name, **given})

    def first_key(self, tenant: str, *scopes: str) -> str:
        """A key that the operator makes there."""
        return self.ask("POST", f"/admin/tenants/{tenant}/keys", {"scopes": scopes} if scopes else {})["value"]


@pytest.fixture(scope="module")
def house(base_env: Mapping[str, str], new_database: Callable[[], str], upstream, tmp_path_factory) -> Iterator[House]:
    with Issuer() as issuer:
        catalog = tmp_path_factory.mktemp("tenants") / "catalog.toml"
        catalog.write_text(f"""
            [upstreams.up]
            base_url = "{upstream.base_url}"
            [issuers.plain]
            issuer = "{issuer.url}/plain"
            audience = "reprise"
            algorithms = ["RS256"]
            jwks_url = "{issuer.jwks_url}"
            tenant = "operators"
            claims = {{ scopes = "scope" }}
            [issuers.mapped]
            issuer = "{issuer.url}/mapped"
            audience = "reprise"
            algorithms = ["RS256"]
            jwks_url = "{issuer.jwks_url}"
            tenant = "operators"
            claims = {{ scopes = "scope" }}
            scopes = {{ operator = ["admin", "responses.read", "responses.write"] }}
        """)
        env = {name: value for name, value in base_env.items() if name != "OPENAI_BASE_URL"}
        env |= {"DATABASE_URL": new_database(), "REPRISE_KEY_CACHE_S": f"{CACHE_S}", "REPRISE_CATALOG": str(catalog)}
        operator = reprise(env, "keys", "create", "--tenant=operators", "--scope=operator")
        admin = reprise(env, "keys", "create", "--tenant=operators", "--scope=admin", "--scope=responses.read")
        with Served(env) as one, Served(env) as other:
            id = operator.stderr.split()[0]
            yield House(env, (one, other), operator.stdout.strip(), id, admin.stdout.strip(), issuer)


# -- What operators do ------------------------------------------------------------------------------------------------------


def test_an_operator_makes_a_tenant_and_its_administrator_makes_the_users_keys(house):
    limits = {**NO_LIMITS, "requests_per_minute": 600}
    made = house.tenant("acme", limits={"requests_per_minute": 600})
    assert made == {
        "id": "acme",
        "object": "tenant",
        "created_at": made["created_at"],
        "keys": 0,
        "users": 0,
        "stored_bytes": None,
        "limits": limits,
    }
    house.tenant("rival")
    admins = {name: house.first_key(name, "admin", "responses.read") for name in ("acme", "rival")}
    user = house.ask("POST", "/admin/keys", {"user": "ada"}, key=admins["acme"], replica=1)
    assert (user["tenant"], user["user"]) == ("acme", "ada")
    stored = house.ask("POST", "/responses", {"model": "m", "input": "hi"}, key=user["value"])["id"]
    assert house.ask("GET", f"/responses/{stored}", key=user["value"], replica=1)["id"] == stored
    assert house.refusal("GET", f"/responses/{stored}", key=admins["acme"])[0] == 404
    assert house.refusal("GET", f"/responses/{stored}", key=admins["rival"])[0] == 404
    assert house.refusal("GET", f"/admin/keys/{user['id']}", key=admins["rival"])[0] == 404
    for replica in (0, 1):
        assert house.ask("GET", "/admin/tenants/acme", replica=replica) == {**made, "keys": 2, "users": 1}
        listed = house.ask("GET", "/admin/keys", key=admins["rival"], replica=replica)["data"]
        assert [key["tenant"] for key in listed] == ["rival"]


def test_the_log_of_the_tenant_names_the_operator_s_key_but_no_secret(house):
    house.tenant("logged")
    admin = house.ask("POST", "/admin/tenants/logged/keys", {"scopes": ["admin"]})
    house.ask("POST", "/admin/tenants/logged", {"limits": {"concurrent_runs": 2}})
    with house.http(admin["value"], 1) as http:
        log = http.get("/admin/audit", params={"order": "asc"})
    by = {"type": "operator", "key_id": house.operator_id, "user": None}
    assert [(one["type"], one["target"], one["actor"]) for one in log.json()["data"]] == [
        ("tenant.created", "logged", by),
        ("key.created", admin["id"], by),
        ("tenant.updated", "logged", by),
    ]
    assert house.operator not in log.text
    of_operators = house.ask("GET", "/admin/audit", key=house.admin)["data"]
    assert not {"logged", admin["id"]} & {one["target"] for one in of_operators}


def test_limits_are_replaced_and_noticed_by_both_replicas(house):
    house.tenant("limited", limits={"requests_per_minute": 0})
    key = house.first_key("limited")

    def limits() -> list[str | None]:
        """How many requests a minute has, by each replica."""
        found = []
        for replica in (0, 1):
            with house.http(key, replica) as http:
                found.append(http.post("/responses", json={"model": "m", "input": "hi"}))
        assert {one.status_code for one in found} == {200}
        return [one.headers.get("x-ratelimit-limit-requests") for one in found]

    assert limits() == [None, None]
    changed = house.ask("POST", "/admin/tenants/limited", {"limits": {"requests_per_minute": 700}})
    assert changed["limits"] == {**NO_LIMITS, "requests_per_minute": 700}
    until(lambda: limits() == ["700", "700"], timeout_s=CACHE_S + 5)
    changed = house.ask("POST", "/admin/tenants/limited", {"limits": {"concurrent_runs": 3}}, replica=1)
    assert changed["limits"] == {**NO_LIMITS, "concurrent_runs": 3}
    until(lambda: limits() == [None, None], timeout_s=CACHE_S + 5)


def test_tenants_are_listed_by_creation_and_users_are_none(house):
    names = [f"listed-{number}" for number in range(5)]
    for name in names:
        house.tenant(name)
    house.ask("POST", f"/admin/tenants/{names[0]}/keys", {"user": "ada", "expires_at": 4_000_000_000})
    [second] = [house.ask("POST", f"/admin/tenants/{names[0]}/keys", {"expires_at": 4_000_000_000})]
    past = "update keys set expires_at = now() - interval '1 second' where id = $1"
    fetch(house.env["DATABASE_URL"], past, second["id"])
    everything, after = [], {}
    while True:
        query = "&".join(f"{name}={quote(value)}" for name, value in after.items())
        page = house.ask("GET", f"/admin/tenants?limit=2&order=asc&{query}".rstrip("&"), replica=len(everything) % 2)
        everything += page["data"]
        assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
        if not page["has_more"]:
            break
        after = {"after": page["last_id"]}
    rows = fetch(house.env["DATABASE_URL"], "select id from tenants where tenant is null order by created_at, id")
    assert [one["id"] for one in everything] == [row["id"] for row in rows]
    assert [one["id"] for one in everything][-5:] == names
    assert [(one["keys"], one["users"]) for one in everything[-5:]] == [(1, 1), *[(0, 0)] * 4]
    newest = house.ask("GET", f"/admin/tenants?limit=3&after={names[4]}")
    assert [one["id"] for one in newest["data"]] == names[3:0:-1]
    assert house.refusal("GET", "/admin/tenants?after=nobody") == (400, "invalid_value")
    [user] = fetch(house.env["DATABASE_URL"], "select id from tenants where tenant = $1", names[0])
    for method, path, body in routes(quote(user["id"]))[2:]:
        assert house.refusal(method, path, body)[0] == 404, path
    assert house.refusal("GET", f"/admin/tenants?after={quote(user['id'])}") == (400, "invalid_value")


def test_what_was_measured_last_is_shown(house):
    house.tenant("measured")
    fetch(house.env["DATABASE_URL"], "update tenants set stored_bytes = 12345 where id = 'measured'")
    assert house.ask("GET", "/admin/tenants/measured")["stored_bytes"] == 12345


@pytest.mark.parametrize(
    "name", ["a b?c#d%2e&é", "a+b=", "...", "keys", "\U0001f600", "\\", ";x=1", "~", "%2F", "a" * 256]
)
def test_a_tenant_has_almost_any_name(house, name):
    house.tenant(name)
    path = f"/admin/tenants/{quote(name, safe='')}"
    assert house.ask("GET", path)["id"] == name
    assert house.ask("POST", path, {"limits": {"concurrent_runs": 1}})["limits"]["concurrent_runs"] == 1
    assert house.ask("POST", f"{path}/keys", {})["tenant"] == name


@pytest.mark.parametrize(
    ("given", "param", "code"),
    [
        ({}, "id", "missing_required_parameter"),
        ({"id": ""}, "id", "invalid_value"),
        ({"id": "a" * 257}, "id", "invalid_value"),
        ({"id": "a\u001fb"}, "id", "invalid_value"),
        ({"id": "a\u0000"}, "id", "invalid_value"),
        ({"id": "a/b"}, "id", "invalid_value"),
        ({"id": ".."}, "id", "invalid_value"),
        ({"id": "operators"}, "id", "name_taken"),
        ({"id": "new", "limits": {"requests": 1}}, "limits.requests", "unknown_parameter"),
        ({"id": "new", "limits": {"concurrent_runs": -1}}, "limits.concurrent_runs", "invalid_value"),
        ({"id": "new", "user": "ada"}, "user", "unknown_parameter"),
    ],
)
def test_a_tenant_that_can_not_be_is_refused(house, given, param, code):
    with house.http(house.operator) as http:
        error = http.post("/admin/tenants", json=given)
        assert (error.status_code, error.json()["error"]["param"], error.json()["error"]["code"]) == (400, param, code)
        assert http.get("/admin/tenants/new").status_code == 404


def test_a_name_with_a_slash_does_not_reach_the_keys_of_another_tenant(house):
    """The command line and issuers may make one."""
    house.tenant("other")
    made = reprise(house.env, "keys", "create", "--tenant=other/keys")
    assert made.returncode == 0, made.stderr
    for slash in ("%2F", "%2f"):
        assert house.refusal("POST", f"/admin/tenants/other{slash}keys", {"limits": {"concurrent_runs": 1}})[0] == 404
        assert house.refusal("POST", f"/admin/tenants{slash}other/keys", {})[0] == 404
    assert house.ask("GET", "/admin/tenants/other")["keys"] == 0


def test_a_tenant_whose_commit_was_not_answered_is_made_once(house):
    url = house.env["DATABASE_URL"]
    directory = parse_qs(urlsplit(url).query)["host"][0]
    with (
        WireProxy(Path(directory) / ".s.PGSQL.5432", ".s.PGSQL.5432", wire_proxy.postgres) as wire,
        Served({**house.env, "DATABASE_URL": url.replace(directory, str(wire.directory))}) as served,
        httpx.Client(base_url=served.url, headers={"Authorization": f"Bearer {house.operator}"}, timeout=30) as http,
    ):
        assert http.get("/admin/tenants/once").status_code == 404
        wire.lose_answer_of("COMMIT")
        made = http.post("/admin/tenants", json={"id": "once"})
        assert (made.status_code, wire.lost, made.json()["id"]) == (200, 1, "once")
        assert http.post("/admin/tenants", json={"id": "once"}).json()["error"]["code"] == "name_taken"
    assert len(fetch(url, "select from audit_log where tenant_id = 'once'")) == 1


def routes(tenant: str) -> list[tuple[str, str, Any]]:
    """Every route of operators, with a body."""
    return [
        ("GET", "/admin/tenants", None),
        ("POST", "/admin/tenants", {"id": "sneaked"}),
        ("GET", f"/admin/tenants/{tenant}", None),
        ("POST", f"/admin/tenants/{tenant}", {"limits": {}}),
        ("POST", f"/admin/tenants/{tenant}/keys", {"scopes": ["admin"]}),
    ]


def test_an_unknown_tenant_is_not_found_and_not_made(house):
    for method, path, body in routes("nobody")[2:]:
        assert house.refusal(method, path, body)[0] == 404, path
    assert fetch(house.env["DATABASE_URL"], "select from tenants where id = 'nobody'") == []
    assert fetch(house.env["DATABASE_URL"], "select from keys where tenant_id = 'nobody'") == []
    assert house.refusal("DELETE", "/admin/tenants/operators")[0] == 405


# -- What they do not, and who is none --------------------------------------------------------------------------------------


def test_an_operator_reads_and_administers_no_tenant_by_itself(house):
    mine = house.ask("POST", "/admin/tenants/operators/keys", {})["value"]
    stored = house.ask("POST", "/responses", {"model": "m", "input": "hi"}, key=mine)["id"]
    for method, path, body in (
        ("GET", f"/responses/{stored}", None),
        ("GET", "/responses", None),
        ("GET", "/conversations", None),
        ("GET", "/files", None),
        ("GET", "/usage", None),
        ("GET", "/admin/keys", None),
        ("GET", "/admin/audit", None),
        ("POST", "/admin/keys", {}),
        ("POST", "/responses", {"model": "m", "input": "hi"}),
    ):
        assert house.refusal(method, path, body) == MISSING, path


def test_who_is_no_operator_has_none_of_the_routes(house):
    house.tenant("closed")
    admin = house.first_key("closed", "admin", "responses.read", "responses.write")
    user = house.ask("POST", "/admin/keys", {"user": "ada"}, key=admin)["value"]
    for key in (admin, user, house.admin):
        assert [house.refusal(*route, key=key) for route in routes("closed")] == [MISSING] * 5
    assert fetch(house.env["DATABASE_URL"], "select from tenants where id = 'sneaked'") == []
    [(count,)] = fetch(house.env["DATABASE_URL"], "select count(*) from keys where tenant_id = 'closed'")
    assert count == 2


def test_an_administrator_makes_no_operator(house):
    """Of the tenant to which the operator's key belongs."""
    own = house.ask("POST", "/admin/keys", {"scopes": ["admin"]}, key=house.admin)
    every = ["admin", "operator", "responses.read", "responses.write"]
    for scopes in (["operator"], every):
        assert house.refusal("POST", "/admin/keys", {"scopes": scopes}, key=house.admin) == MISSING
        assert house.refusal("POST", f"/admin/keys/{own['id']}", {"scopes": scopes}, key=house.admin) == MISSING
        assert house.refusal("POST", f"/admin/keys/{own['id']}", {"scopes": scopes}, key=own["value"]) == MISSING
    assert (
        house.refusal("POST", f"/admin/keys/{house.operator_id}/rotate", {"overlap_s": 0}, key=house.admin) == MISSING
    )
    assert house.refusal("POST", f"/admin/keys/{house.operator_id}", {"scopes": every}, key=house.admin) == MISSING
    assert house.ask("GET", f"/admin/keys/{own['id']}", key=house.admin)["scopes"] == ["admin"]
    assert house.ask("GET", f"/admin/keys/{house.operator_id}", key=house.admin)["scopes"] == ["operator"]
    assert house.ask("GET", "/admin/tenants/operators")["id"] == "operators"  # its secret is as before
    log = house.ask("GET", "/admin/audit?limit=100", key=house.admin)["data"]
    assert not any(one["target"] == house.operator_id and one["type"] != "key.created" for one in log)


def test_an_operator_makes_another_which_its_administrators_may_revoke(house):
    other = house.ask("POST", "/admin/tenants/operators/keys", {"scopes": ["operator"]})
    assert other["scopes"] == ["operator"]
    assert house.ask("GET", "/admin/tenants/operators", key=other["value"])["id"] == "operators"
    house.ask("DELETE", f"/admin/keys/{other['id']}", key=house.admin)
    with house.http(other["value"]) as http:
        until(lambda: http.get("/admin/tenants").status_code == 401, timeout_s=CACHE_S + 5)


@pytest.mark.parametrize(("given", "param"), [({"user": "ada"}, "user"), ({"models": ["*"]}, "models")])
def test_an_operator_s_key_is_of_no_user_and_for_no_models(house, given, param):
    both = house.ask("POST", "/admin/tenants/operators/keys", {"scopes": ["operator", "admin"]})
    for path in ("/admin/tenants/operators/keys", "/admin/keys"):
        with house.http(both["value"]) as http:
            reply = http.post(path, json={"scopes": ["operator"], **given})
        error = reply.json()["error"]
        assert (reply.status_code, error["param"], error["code"]) == (400, param, "invalid_value")
    refused = reprise(house.env, "keys", "create", "--scope=operator", f"--{param.rstrip('s')}=x")
    assert refused.returncode == 1
    assert refused.stderr.endswith("can't have the scope 'operator'.\n")
    limited = house.ask("POST", "/admin/keys", given, key=both["value"])["id"]
    assert house.refusal("POST", f"/admin/keys/{limited}", {"scopes": ["operator"]}, key=both["value"])[0] == 400
    if param == "models":
        assert house.refusal("POST", f"/admin/keys/{both['id']}", given, key=both["value"])[0] == 400


def test_no_token_is_an_operator_s(house):
    claims = {"scope": "operator admin responses.read"}
    for name in ("plain", "mapped"):
        token = house.issuer.token(iss=f"{house.issuer.url}/{name}", **claims)
        assert [house.refusal(*route, key=token) for route in routes("operators")] == [MISSING] * 5
        assert house.ask("GET", "/responses", key=token)["data"] is not None
    token = house.issuer.token(iss=f"{house.issuer.url}/mapped", **claims)  # an administrator's
    assert house.refusal("POST", "/admin/keys", {"scopes": ["operator"]}, key=token) == MISSING


def test_a_server_without_keys_has_no_operators(server):
    with httpx.Client(base_url=server.url) as http:
        for method, path, body in routes("default"):
            reply = http.request(method, path, json=body)
            assert (reply.status_code, reply.json()["error"]["code"]) == MISSING
