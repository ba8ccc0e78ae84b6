"""Keys that are made, rotated and revoked, by the API and on the command line; users; failed attempts in the log."""

import re
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import openai
import pytest
from msgspec import Struct

from app import migrate
from app.storage import keys
from tests.servers import Served, reprise
from tests.upstream import finish, gate, script
from tests.waiting import count, fetch, until

CACHE_S = 0.3
ADMIN = ("--scope=admin", "--scope=responses.read", "--scope=responses.write")


class House(Struct):
    """Two replicas, and the key of a tenant's administrators."""

    env: dict[str, str]
    one: Served
    other: Served
    admin: str

    def http(self, key: str | None = None, served: Served | None = None) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key or self.admin}"}
        return httpx.Client(base_url=(served or self.one).url, headers=headers, timeout=30)

    def make(self, **given: Any) -> dict[str, Any]:
        with self.http() as http:
            reply = http.post("/admin/keys", json=given)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def statuses(self, key: str) -> list[int]:
        """What each replica answers a key."""
        found = []
        for served in (self.one, self.other):
            with self.http(key, served) as http:
                found.append(http.get("/models").status_code)
        return found


@pytest.fixture(scope="module")
def house(base_env: Mapping[str, str], new_database: Callable[[], str]) -> Iterator[House]:
    env = {**base_env, "DATABASE_URL": new_database(), "REPRISE_KEY_CACHE_S": f"{CACHE_S}"}
    env |= {"REPRISE_AUTH_DELAY_MAX_S": "0", "REPRISE_FILES_TENANT_MAX": "3", "REPRISE_PROXIES": "127.0.0.1"}
    scopes = ("--scope=admin", "--scope=responses.read")
    admin = reprise(env, "keys", "create", "--tenant", "acme", *scopes).stdout.strip()
    with Served(env) as one, Served(env) as other:
        yield House(env, one, other, admin)


# -- Keys by API ------------------------------------------------------------------------------------------------------------


def test_a_key_is_made_and_its_secret_is_shown_once(house):
    made = house.make(name="for Ada", user="ada", scopes=["responses.read"], models=["m*"], expires_at=4_000_000_000)
    secret = made.pop("value")
    assert secret.startswith("sk-reprise-")
    assert made == {
        "id": made["id"],
        "object": "api_key",
        "name": "for Ada",
        "tenant": "acme",
        "user": "ada",
        "scopes": ["responses.read"],
        "models": ["m*"],
        "limits": {
            "requests_per_minute": None,
            "tokens_per_minute": None,
            "concurrent_runs": None,
            "stored_bytes": None,
        },
        "created_at": made["created_at"],
        "expires_at": 4_000_000_000,
        "revoked_at": None,
    }
    with house.http() as http:
        assert http.get(f"/admin/keys/{made['id']}").json() == made
        listed = http.get("/admin/keys").json()
        assert listed["data"][0] == made
        older = http.get("/admin/keys", params={"after": made["id"], "limit": 1}).json()
        assert [key["id"] for key in older["data"]] != [made["id"]]
        assert http.get("/admin/keys", params={"after": "nonsense"}).status_code == 400
    [row] = fetch(house.env["DATABASE_URL"], "select keys::text from keys where id = $1", made["id"])
    assert secret.removeprefix("sk-reprise-") not in row[0]
    assert row[0].count(keys.digest(secret).hex()) == 1
    assert secret not in "".join(house.one.printed)


@pytest.mark.parametrize(
    ("given", "param", "code"),
    [
        ({"scopes": ["everything"]}, "scopes[0]", "invalid_value"),
        ({"scopes": []}, "scopes", "invalid_value"),
        ({"models": []}, "models", "invalid_value"),
        ({"models": ["a\n"]}, "models", "invalid_value"),
        ({"user": "a\u001fb"}, "user", "invalid_value"),
        ({"user": ""}, "user", "invalid_value"),
        ({"user": "ada", "scopes": ["admin"]}, "user", "invalid_value"),
        ({"expires_at": 1}, "expires_at", "invalid_value"),
        ({"expires_at": "soon"}, "expires_at", "invalid_type"),
        ({"name": "a\u0000"}, "name", "invalid_value"),
        ({"name": "a" * 257}, "name", "invalid_value"),
        ({"tenant": "other"}, "tenant", "unknown_parameter"),
    ],
)
def test_a_key_that_can_not_be_is_refused(house, given, param, code):
    with house.http() as http:
        reply = http.post("/admin/keys", json=given)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["code"]) == (400, param, code)


def test_a_revoked_key_is_refused_by_every_replica_soon_and_stays_in_the_list(house):
    made = house.make()
    assert house.statuses(made["value"]) == [200, 200]
    with house.http() as http:
        gone = http.delete(f"/admin/keys/{made['id']}")
        assert gone.json() == {"id": made["id"], "object": "api_key.deleted", "deleted": True}
        until(lambda: house.statuses(made["value"]) == [401, 401], timeout_s=CACHE_S + 2)
        assert http.delete(f"/admin/keys/{made['id']}").status_code == 404
        assert http.post(f"/admin/keys/{made['id']}/rotate").status_code == 404
        assert http.get(f"/admin/keys/{made['id']}").json()["revoked_at"] >= made["created_at"]


def test_a_rotated_key_has_a_new_secret_and_those_that_it_had_are_valid_for_a_while(house):
    made = house.make(models=["m"])
    with house.http() as http:
        second = http.post(f"/admin/keys/{made['id']}/rotate", json={"overlap_s": 1_000}).json()
        third = http.post(f"/admin/keys/{made['id']}/rotate").json()
        assert third["models"] == ["m"]
        secrets = [one["value"] for one in (made, second, third)]
        assert [house.statuses(secret) for secret in secrets] == [[200, 200]] * 3
        # What was valid for so long is not any more.
        query = "update retired_secrets set valid_until = now() where hash = $1"
        fetch(house.env["DATABASE_URL"], query, keys.digest(made["value"]))
        until(lambda: house.statuses(secrets[0]) == [401, 401], timeout_s=CACHE_S + 2)
        assert [house.statuses(secret) for secret in secrets[1:]] == [[200, 200]] * 2
        last = http.post(f"/admin/keys/{made['id']}/rotate", json={"overlap_s": 0}).json()["value"]
        until(lambda: [house.statuses(one) for one in secrets[1:]] == [[401, 401]] * 2, timeout_s=CACHE_S + 2)
        assert house.statuses(last) == [200, 200]
        for overlap_s in (-1, 31_536_001):
            refused = http.post(f"/admin/keys/{made['id']}/rotate", json={"overlap_s": overlap_s})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "overlap_s")
        http.post(f"/admin/keys/{made['id']}/rotate")
        assert house.statuses(last) == [200, 200]
        http.delete(f"/admin/keys/{made['id']}")
    until(lambda: house.statuses(last) == [401, 401], timeout_s=CACHE_S + 2)


def test_a_key_expires_on_every_replica(house):
    made = house.make(expires_at=4_000_000_000)
    assert house.statuses(made["value"]) == [200, 200]
    query = "update keys set expires_at = now() where id = $1"
    fetch(house.env["DATABASE_URL"], query, made["id"])
    until(lambda: house.statuses(made["value"]) == [401, 401], timeout_s=CACHE_S + 2)
    with house.http(made["value"]) as http:
        assert http.get("/models").json()["error"]["message"] == "The API key is expired."


def test_an_administrator_of_some_models_gives_no_access_to_others(house):
    limited = house.make(scopes=["admin"], models=["m*", "n"])
    all_models = house.make()
    with house.http(limited["value"]) as http:

        def status(**given: Any) -> tuple[int, str | None]:
            reply = http.post("/admin/keys", json=given)
            return reply.status_code, reply.json().get("error", {}).get("param")

        for models in (["m"], ["m*"], ["m1", "m*2", "n"], ["m**"]):
            assert status(models=models) == (200, None), models
        for models in (["*"], ["n*"], ["m", "o"], ["*m"], ["N"]):
            assert status(models=models) == (403, "models"), models
        assert status() == (403, "models")
        for models in (["*"], None, ["o"]):
            reply = http.post(f"/admin/keys/{limited['id']}", json={"models": models})
            assert (reply.status_code, reply.json()["error"]["param"]) == (403, "models")
        assert http.post(f"/admin/keys/{all_models['id']}", json={"name": "x"}).json()["models"] is None
        assert http.get(f"/admin/keys/{limited['id']}").json()["models"] == ["m*", "n"]
        assert http.post(f"/admin/keys/{limited['id']}/rotate").status_code == 200
        refused = http.post(f"/admin/keys/{all_models['id']}/rotate", json={"overlap_s": 0})
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "model_not_allowed")
        log = http.get("/admin/audit", params={"type": "key.rotated"}).json()["data"]
        assert [one["target"] for one in log if one["target"] in {limited["id"], all_models["id"]}] == [limited["id"]]
    assert house.statuses(all_models["value"]) == [200, 200]


def test_an_administrator_sees_no_key_of_another_tenant(house):
    done = reprise(house.env, "keys", "create", "--tenant", "other")
    id = done.stderr.split()[0]
    with house.http() as http:
        assert id not in http.get("/admin/keys", params={"limit": 100}).text
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/rotate")):
            assert http.request(method, f"/admin/keys/{id}{path}").status_code == 404
    assert house.statuses(done.stdout.strip()) == [200, 200]


def test_the_official_client_sees_what_a_key_may_not_do(house):
    key = house.make(scopes=["responses.read"], models=["m"])["value"]
    with house.one.client(api_key=key) as client:
        with pytest.raises(openai.PermissionDeniedError, match=r"Missing scopes: responses\.write\."):
            client.responses.create(model="m", input="hi")
        assert client.models.list().data == []
        with pytest.raises(openai.PermissionDeniedError, match="does not have access to the model 'n'"):
            client.models.retrieve("n")


def test_a_server_without_keys_has_no_administrators(server):
    with httpx.Client(base_url=server.url) as http:
        for reply in (http.post("/admin/keys", json={}), http.get("/admin/audit")):
            assert (reply.status_code, reply.json()["error"]["code"]) == (403, "missing_scope")
    assert fetch(server.database_url, "select from keys") == []


@pytest.mark.parametrize("given", [{"background": True}, {"stream": True}])
def test_a_run_knows_the_key_that_asked_for_it(house, upstream, said, given):
    made = house.make()
    with house.one.client(made["value"]) as client:
        answered = client.responses.create(model="m", input=script([gate(said), finish()]), **given)
        upstream.wait_reached(said, 20)
        [run] = fetch(house.env["DATABASE_URL"], "select tenant_id, key_id, request is null as is_foreground from runs")
        assert dict(run) == {"tenant_id": "acme", "key_id": made["id"], "is_foreground": "stream" in given}
        upstream.open(said)
        if "stream" in given:
            list(answered)
    until(lambda: not count(house.env["DATABASE_URL"], "runs"), "its row is gone")


# -- The audit log ----------------------------------------------------------------------------------------------------------

OLD_ENTRIES = """
insert into audit_log (tenant_id, id, created_at, actor, user_name, action, target)
select tenant, 'audit_' || lpad(to_hex(1000 * made_at + number), 12, '0') || repeat('0', 24), made_at, 'command_line', '', 'key.created', 'x'
from unnest(array['acme', 'other']) tenant, generate_series(1, 6000) number,
     cast(extract(epoch from now() - interval '31 days') as bigint) made_at
"""


def test_entries_of_the_audit_log_are_kept_unless_the_setting_says_how_long(base_env, new_database):
    url = new_database()
    env = {**base_env, "DATABASE_URL": url}
    made = [reprise(env, "keys", "create", f"--tenant={name}", *ADMIN) for name in ("acme", "other")]
    keys, ids = ([one.stdout.strip() for one in made], [one.stderr.split()[0] for one in made])
    young = count(url, "audit_log")
    fetch(url, OLD_ENTRIES)

    def listed(key: str, served: Served) -> list[str]:
        with served.client(key) as client:
            page = client.get("/admin/audit?order=asc&limit=2&type=key.created", cast_to=httpx.Response).json()
        return [one["target"] for one in page["data"]]

    with Served({**env, "REPRISE_USAGE_LEDGER_S": "1"}) as served, served.client(keys[0]) as client:
        client.responses.create(model="m", input="hi")
        until(lambda: count(url, "usage_days"), "maintenance is done")
        assert [listed(key, served) for key in keys] == [["x", "x"]] * 2
        assert count(url, "audit_log") == 12_000 + young
    with Served({**env, "REPRISE_AUDIT_DAYS": "30"}) as served:
        until(lambda: count(url, "audit_log") <= young)
        assert [listed(key, served) for key in keys] == [[id] for id in ids]
        deleted = re.compile(r'"entries": ?(\d+)')
        until(lambda: sum(map(int, deleted.findall("".join(served.printed)))) == 12_000, "the log says so")


# -- The command line -------------------------------------------------------------------------------------------------------


def test_the_command_line_makes_rotates_and_lists_keys(house):
    tomorrow = (datetime.now(UTC) + timedelta(days=1)).strftime("%Y-%m-%d")
    options = ("--user=ada", "--scope=responses.read", "--model=m*", "--model=n", f"--expires={tomorrow}")
    made = reprise(house.env, "keys", "create", "--tenant=acme", *options)
    id, secret = made.stderr.split()[0], made.stdout.strip()
    assert "for tenant acme, user ada; keep it: only its hash is stored.\n" in made.stderr
    endless = reprise(house.env, "keys", "rotate", id, "--overlap-s=inf")
    assert (endless.returncode, endless.stderr) == (1, "reprise: 'overlap_s' must be from 0 to 31536000.\n")
    rotated = reprise(house.env, "keys", "rotate", id, "--overlap-s=0")
    assert rotated.stderr == f"{id} has a new secret; earlier ones are valid for 0 s.\n"
    assert house.statuses(secret) == [401, 401]
    assert house.statuses(rotated.stdout.strip()) == [200, 200]
    [line] = [line for line in reprise(house.env, "keys", "list").stdout.splitlines() if line.startswith(id)]
    _, *cells, _, state, limits = line.split("\t")
    assert cells == ["acme", "ada", "-", "responses.read", "m*,n"]
    assert (state, limits) == (f"valid until {tomorrow}T00:00:00+00:00", "-")
    refused = reprise(house.env, "keys", "create", "--expires=2020-01-01")
    assert (refused.returncode, refused.stderr) == (1, "reprise: 'expires_at' is in the past.\n")
    with house.http() as http:
        log = http.get("/admin/audit", params={"limit": 100}).json()["data"]
        assert [(one["type"], one["actor"]["type"]) for one in log if one["target"] == id] == [
            ("key.rotated", "command_line"),
            ("key.created", "command_line"),
        ]
        rotations = http.get("/admin/audit", params={"type": "key.rotated"}).json()["data"]
        assert {one["type"] for one in rotations} == {"key.rotated"}
        assert http.get("/admin/audit", params={"type": "key.made"}).json()["error"]["param"] == "type"
        page = http.get("/admin/audit", params={"limit": 1, "after": log[0]["id"]}).json()
        assert (page["data"], page["has_more"]) == ([log[1]], True)


@pytest.mark.parametrize(
    ("options", "new"),
    [
        (("--tenant=acme",), []),
        (("--tenant=acmee",), ["tenant"]),
        (("--tenant=acmee",), []),
        (("--tenant=acmee", "--user=ada"), ["user"]),
        (("--tenant=acmee", "--user=ada"), []),
        (("--tenant=ACME", "--user=bob"), ["tenant", "user"]),
        ((), []),  # the default tenant is known
    ],
)
def test_the_command_line_says_what_a_key_is_the_first_of(house, options, new):
    """One after another; a name may be a typing error."""
    made = reprise(house.env, "keys", "create", *options)
    assert made.returncode == 0
    assert made.stderr.splitlines()[1:] == [f"The {what} is new." for what in new]
    assert len(made.stdout.splitlines()) == 1


def test_a_key_of_the_version_before_reads_and_writes(base_env, new_database):
    empty_database = new_database()
    for statement in ("drop schema public cascade", "create schema public"):
        fetch(empty_database, statement)
    migrate.upgrade(empty_database, "0013")
    key = "insert into keys (hash, id, tenant_id, name) values ($1, 'key_old', 'a', '')"
    fetch(empty_database, "insert into tenants (id) values ('a')")
    fetch(empty_database, key, keys.digest("sk-reprise-old"))
    migrate.upgrade(empty_database)
    with Served({**base_env, "DATABASE_URL": empty_database}) as served, served.client("sk-reprise-old") as client:
        made = client.responses.create(model="any", input="hi")
        assert client.responses.retrieve(made.id).output_text == made.output_text
        assert client.models.list().data
        with pytest.raises(openai.PermissionDeniedError, match="admin"):
            client.get("/admin/keys", cast_to=object)


# -- Users ------------------------------------------------------------------------------------------------------------------


def test_users_of_a_tenant_do_not_see_each_other_s_data(house):
    ada, bob = (house.make(user=user)["value"] for user in ("ada", "bob"))
    with house.one.client(api_key=ada) as hers, house.other.client(api_key=bob) as his:
        made = hers.responses.create(model="m", input="hi", background=True)
        again = house.make(user="ada")["value"]
        with house.other.client(api_key=again) as also_hers:
            assert also_hers.responses.retrieve(made.id).id == made.id
        for unknown in (
            lambda: his.responses.retrieve(made.id),
            lambda: his.responses.create(model="m", input="hi", previous_response_id=made.id),
            lambda: his.responses.delete(made.id),
        ):
            with pytest.raises((openai.NotFoundError, openai.BadRequestError), match="not found"):
                unknown()
        until(lambda: hers.responses.retrieve(made.id).status == "completed")


def test_a_tenant_s_limits_hold_for_all_its_users_together(house):
    form = {"files": {"file": ("a.txt", b"a")}, "data": {"purpose": "user_data"}}
    uploaded = []
    for user in ("u1", "u2", "u3", None, "u4"):
        with house.http(house.make(user=user)["value"]) as http:
            reply = http.post("/files", **form)
            uploaded.append(reply.status_code)
            if user == "u4":
                assert reply.json()["error"]["code"] == "storage_limit_exceeded"
    assert uploaded == [200, 200, 200, 400, 400]


# -- Failed attempts --------------------------------------------------------------------------------------------------------


def test_failed_attempts_are_logged_with_their_address_and_without_the_secret(house):
    made = house.make()
    with house.http() as http:
        http.delete(f"/admin/keys/{made['id']}")
    until(lambda: house.statuses(made["value"]) == [401, 401], timeout_s=CACHE_S + 2)
    for secret in (made["value"], "sk-reprise-0123456789abcdefghij"):
        with house.http(secret) as http:
            assert http.get("/models", headers={"X-Forwarded-For": "1.2.3.4, 5.6.7.8"}).status_code == 401
    lines: list[str] = []

    def logged() -> bool:
        lines[:] = [line for line in house.one.printed if "authentication_failed" in line and "5.6.7.8" in line]
        return len(lines) == 2

    until(logged)
    assert [re.search(r'"key_id": "?(\w+)', line)[1] for line in lines] == [made["id"], "null"]
    secrets = (made["value"].removeprefix("sk-reprise-"), "0123456789abc")
    assert not any(secret in line for line in house.one.printed for secret in secrets)


def test_the_reply_to_a_failed_attempt_waits_where_a_client_has_failed_often(new_server, base_env, new_database):
    env = {"DATABASE_URL": new_database(), "REPRISE_PROXIES": "127.0.0.1", "REPRISE_AUTH_DELAY_MAX_S": "120"}
    key = reprise({**base_env, **env}, "keys", "create").stdout.strip()
    served = new_server(**env, REPRISE_AUTH_ATTEMPTS_PER_MINUTE="1")
    often, once = {"X-Forwarded-For": "5.6.7.8"}, {"X-Forwarded-For": "5.6.7.9"}
    with httpx.Client(base_url=served.url, timeout=30) as http:
        assert http.get("/models", headers=often).status_code == 401
        with pytest.raises(httpx.ReadTimeout):  # it waits for a minute, or until its client disconnects
            http.get("/models", headers=often, timeout=0.5)
        assert http.get("/models", headers=once).status_code == 401
        assert http.get("/models", headers={**often, "Authorization": f"Bearer {key}"}).status_code == 200
    until(lambda: any('"status": 499' in line for line in served.printed))
