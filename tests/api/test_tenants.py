"""Keys and tenants: who may call, and that another tenant's data looks like no data at all."""

from collections.abc import Callable, Iterator, Mapping

import httpx
import pytest
from msgspec import Struct

from tests.servers import Served, reprise
from tests.upstream import answer, calling, note, reasoning, script
from tests.waiting import fetch, until

KEY_CACHE_S = 0.5
UNKNOWN = "resp_0123456789abcdef"
OF_A_CONVERSATION = [
    ("GET", ""),
    ("POST", ""),
    ("DELETE", ""),
    ("POST", "/fork"),
    ("GET", "/items"),
    ("POST", "/items"),
    ("GET", "/items/msg_1"),
    ("DELETE", "/items/msg_1"),
]


def made(env, tenant, name="") -> tuple[str, str]:
    """A new key: its id and the key itself."""
    done = reprise(env, "keys", "create", "--tenant", tenant, "--name", name)
    assert done.returncode == 0, done.stderr
    assert f"for tenant {tenant}" in done.stderr
    return done.stderr.split()[0], done.stdout.strip()


class House(Struct):
    """A server with two tenants."""

    env: dict[str, str]
    served: Served
    a: str
    b: str

    def http(self, key: str | None) -> httpx.Client:
        """Raw HTTP with a key, or with none."""
        headers = {"Authorization": f"Bearer {key}"} if key is not None else {}
        return httpx.Client(base_url=self.served.url, headers=headers, timeout=30)


@pytest.fixture(scope="module")
def house(base_env: Mapping[str, str], new_database: Callable[[], str]) -> Iterator[House]:
    env = {**base_env, "DATABASE_URL": new_database(), "REPRISE_KEY_CACHE_S": f"{KEY_CACHE_S}"}
    env["REPRISE_AUTH_DELAY_MAX_S"] = "0"
    a, b = made(env, "a")[1], made(env, "b")[1]
    with Served(env) as served:
        yield House(env, served, a, b)


@pytest.fixture
def a(house: House) -> Iterator[httpx.Client]:
    with house.http(house.a) as http:
        yield http


@pytest.fixture
def b(house: House) -> Iterator[httpx.Client]:
    with house.http(house.b) as http:
        yield http


def create(http, **body):
    reply = http.post("/responses", json={"model": "m", "input": "hi", **body})
    assert reply.status_code == 200, reply.text
    return reply.json()


# -- Keys -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/responses"),
        ("GET", "/responses"),
        ("GET", f"/responses/{UNKNOWN}"),
        ("DELETE", f"/responses/{UNKNOWN}"),
        ("GET", f"/responses/{UNKNOWN}/input_items"),
        ("POST", f"/responses/{UNKNOWN}/cancel"),
        ("POST", "/responses/input_tokens"),
        ("POST", "/responses/compact"),
        ("POST", "/conversations"),
        ("GET", "/conversations"),
        *((method, f"/conversations/conv_1{path}") for method, path in OF_A_CONVERSATION),
        ("POST", "/files"),
        ("GET", "/files"),
        ("GET", "/files/file_1"),
        ("GET", "/files/file_1/content"),
        ("DELETE", "/files/file_1"),
        ("GET", "/models"),
        ("GET", "/models/scripted"),
    ],
)
def test_every_path_needs_a_key(house, method, path):
    no_key = {
        "code": "missing_api_key",
        "message": "You didn't provide an API key. Send it as 'Authorization: Bearer KEY'.",
    }
    cases = {
        None: no_key,
        "": no_key,
        "Basic c2s6": no_key,
        "Bearer": no_key,
        "Bearer wrong": {"code": "invalid_api_key", "message": "Incorrect API key provided: ***."},
        f"Bearer {house.a}x": {
            "code": "invalid_api_key",
            "message": f"Incorrect API key provided: sk-repr***{house.a[-3:]}x.",
        },
    }
    with house.http(None) as http:
        for authorization, expected in cases.items():
            headers = {} if authorization is None else {"Authorization": authorization}
            reply = http.request(method, path, json={"model": "m", "input": "hi"}, headers=headers)
            assert reply.status_code == 401
            assert reply.json() == {"error": {"type": "invalid_request_error", "param": None, **expected}}
            assert reply.headers["x-request-id"].startswith("req_")


def test_a_bad_key_is_refused_before_the_body_is_looked_at(house):
    with house.http("wrong") as http:
        assert http.post("/responses", content=b"{").status_code == 401


def test_the_scheme_is_written_as_one_likes(house):
    with house.http(None) as http:
        assert http.get("/responses", headers={"Authorization": f"bearer  {house.a}"}).status_code == 200


def test_health_needs_no_key(house):
    root = house.served.url.removesuffix("/v1")
    assert [httpx.get(f"{root}/{path}").status_code for path in ("livez", "readyz")] == [200, 200]


def test_a_revoked_key_is_refused_soon_and_the_others_go_on(house):
    id, key = made(house.env, "a", "to be revoked")
    with house.http(key) as http:
        own = create(http)
        assert http.get(f"/responses/{own['id']}").status_code == 200
        done = reprise(house.env, "keys", "revoke", id)
        assert (done.returncode, done.stdout) == (0, f"{id} is revoked; servers notice within {KEY_CACHE_S:g} s.\n")
        until(lambda: http.get(f"/responses/{own['id']}").status_code == 401, timeout_s=KEY_CACHE_S + 1)
        assert http.get("/responses").json()["error"]["code"] == "invalid_api_key"
    with house.http(house.a) as http:  # what the key made belongs to the tenant
        assert http.get(f"/responses/{own['id']}").json() == own
    again = reprise(house.env, "keys", "revoke", id)
    assert (again.returncode, again.stderr) == (1, f"reprise: There is no valid key {id}.\n")


def test_keys_are_listed_without_their_secrets(house):
    id, key = made(house.env, "c", "for the list")
    assert reprise(house.env, "keys", "revoke", id).returncode == 0
    listed = reprise(house.env, "keys", "list")
    lines = [line.split("\t") for line in listed.stdout.splitlines()]
    assert {(tenant, name) for _, tenant, _, name, *_ in lines} >= {("a", "-"), ("b", "-"), ("c", "for the list")}
    [(*_, created, state, _)] = [line for line in lines if line[0] == id]
    assert state.startswith("revoked 20")
    assert created <= state.removeprefix("revoked ")
    assert {state for line_id, *_, state, _ in lines if line_id != id and not state.startswith("revoked ")} == {"valid"}
    assert not any(secret in listed.stdout for secret in (key, house.a, house.b))


def test_a_key_is_stored_only_as_its_hash(house):
    rows = fetch(house.env["DATABASE_URL"], "select keys::text as row from keys")
    assert rows
    assert not any(key.removeprefix("sk-reprise-") in row["row"] for row in rows for key in (house.a, house.b))


def test_no_key_ever_appears_in_the_log(house, a):
    create(a)
    with house.http(f"{house.a}x") as http:
        http.get("/responses")
    printed = "".join(house.served.printed)
    assert "run_ended" in printed
    assert not any(key[16:] in printed for key in (house.a, house.b))


def test_without_keys_only_loopback_is_served(base_env, new_database):
    env = {**base_env, "DATABASE_URL": new_database(), "REPRISE_HOST": "0.0.0.0", "REPRISE_PORT": "0"}
    refused = reprise(env, "serve")
    assert refused.returncode == 1
    assert refused.stdout == ""
    assert refused.stderr == (
        "reprise: REPRISE_HOST=0.0.0.0 would let every client in, because there are no keys: "
        "make one with `reprise keys create`, or listen on 127.0.0.1.\n"
    )
    id, key = made(env, "a")
    with Served(env) as served:
        url = served.url.replace("0.0.0.0", "127.0.0.1")
        assert httpx.get(f"{url}/responses").status_code == 401
        assert httpx.get(f"{url}/responses", headers={"Authorization": f"Bearer {key}"}).status_code == 200
    # Revoking the last key closes the server to all; it does not open it.
    assert reprise(env, "keys", "revoke", id).returncode == 0
    with Served(env) as served:
        url = served.url.replace("0.0.0.0", "127.0.0.1")
        assert httpx.get(f"{url}/responses").status_code == 401


def test_a_first_key_closes_a_running_server(base_env, new_database):
    env = {**base_env, "DATABASE_URL": new_database(), "REPRISE_KEY_CACHE_S": "0.2"}
    with Served(env) as served, httpx.Client(base_url=served.url) as http:
        own = create(http)
        _, key = made(env, "default")
        until(lambda: http.get(f"/responses/{own['id']}").status_code == 401, timeout_s=2)
        headers = {"Authorization": f"Bearer {key}"}
        assert http.get(f"/responses/{own['id']}", headers=headers).json() == own


# -- Tenants ----------------------------------------------------------------------------------------------------------------


def seen(reply: httpx.Response, *ids: str) -> tuple[int, str, set[str]]:
    """Status, body with the given ids blotted out, and which headers there are."""
    body = reply.text
    for id in ids:
        body = body.replace(id, "ID")
    return reply.status_code, body, set(reply.headers)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/responses/{}"),
        ("GET", "/responses/{}?stream=true"),
        ("GET", "/responses/{}?include[]=message.output_text.logprobs"),
        ("DELETE", "/responses/{}"),
        ("GET", "/responses/{}/input_items"),
        ("GET", "/responses/{}/input_items?after=msg_1"),
        ("POST", "/responses/{}/cancel"),
    ],
)
def test_another_tenants_response_looks_unknown(a, b, method, path):
    id = create(a)["id"]
    assert seen(b.request(method, path.format(id)), id) == seen(b.request(method, path.format(UNKNOWN)), UNKNOWN)
    assert b.request(method, path.format(id)).status_code == 404
    assert a.get(f"/responses/{id}").status_code == 200


@pytest.mark.parametrize(("method", "path"), OF_A_CONVERSATION)
def test_another_tenants_conversation_looks_unknown(a, b, method, path):
    given = {"items": [{"role": "user", "content": "mine", "id": "msg_1"}]}
    id = a.post("/conversations", json={**given, "metadata": {"of": "a"}}).json()["id"]
    body = {"": {"metadata": {}}, "/fork": {}, "/items": given}.get(path) if method == "POST" else None
    theirs = b.request(method, f"/conversations/{id}{path}", json=body)
    assert seen(theirs, id) == seen(b.request(method, f"/conversations/{UNKNOWN}{path}", json=body), UNKNOWN)
    assert theirs.status_code == 404
    create = {"model": "m", "input": "hi", "conversation": id}
    assert b.post("/responses", json=create).status_code == 404
    assert b.get("/conversations").json()["data"] == b.get("/conversations?metadata[of]=a").json()["data"] == []
    assert a.get(f"/conversations/{id}/items/msg_1").json()["content"][0]["text"] == "mine"
    own = b.post("/conversations", json=given).json()["id"]
    assert b.post("/responses", json={**create, "conversation": own}).status_code == 200
    assert b.delete(f"/conversations/{own}").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_another_tenants_response_is_no_parent(a, b, stream):
    id = create(a)["id"]
    asking = {"model": "m", "input": "hi", "stream": stream}
    theirs = b.post("/responses", json={**asking, "previous_response_id": id})
    unknown = b.post("/responses", json={**asking, "previous_response_id": UNKNOWN})
    assert seen(theirs, id) == seen(unknown, UNKNOWN)
    assert (theirs.status_code, theirs.json()["error"]["code"]) == (400, "previous_response_not_found")


def test_another_tenants_item_cannot_be_referred_to(a, b):
    made = create(a)
    ids = [made["output"][0]["id"], a.get(f"/responses/{made['id']}/input_items").json()["first_id"]]

    def referring(http, id):
        given = [{"type": "item_reference", "id": id}, {"role": "user", "content": "hi"}]
        return http.post("/responses", json={"model": "m", "input": given})

    for id in ids:
        assert seen(referring(b, id), id) == seen(referring(b, "msg_0"), "msg_0")
        assert referring(b, id).status_code == 400
        assert referring(a, id).status_code == 200


def test_another_tenants_item_is_no_cursor(a, b):
    theirs, own = create(a), create(b)
    for cursor in (theirs["output"][0]["id"], a.get(f"/responses/{theirs['id']}/input_items").json()["first_id"]):
        found = b.get(f"/responses/{own['id']}/input_items", params={"after": cursor})
        unknown = b.get(f"/responses/{own['id']}/input_items", params={"after": "msg_0"})
        assert seen(found, cursor) == seen(unknown, "msg_0")
        assert found.status_code == 400


def test_a_list_holds_the_tenants_own_responses_only(a, b):
    theirs, own = create(a, metadata={"of": "a"}), create(b, metadata={"of": "b"})
    newer = create(a)
    listed = b.get("/responses", params={"limit": 100}).json()["data"]
    assert own in listed
    assert not {theirs["id"], newer["id"]} & {one["id"] for one in listed}
    assert b.get("/responses", params={"metadata[of]": "a"}).json()["data"] == []
    # Another tenant's id is a place in time like any other, whether it exists or not.
    assert own["id"] in [one["id"] for one in b.get("/responses", params={"after": newer["id"]}).json()["data"]]


def test_the_same_item_ids_may_be_used_by_two_tenants(a, b):
    given = [{"type": "message", "id": "msg_same", "role": "user", "content": "{}"}]
    for http, text in ((a, "mine"), (b, "yours")):
        made = create(http, input=[{**given[0], "content": text}])
        [item] = http.get(f"/responses/{made['id']}/input_items").json()["data"]
        assert (item["id"], item["content"][0]["text"]) == ("msg_same", text)
    for http, text in ((a, "mine"), (b, "yours")):
        made = create(http, input=[{"type": "item_reference", "id": "msg_same"}])
        assert made["output"][0]["content"][0]["text"] == f"ok: {text}"


def test_a_key_of_this_server_never_goes_to_the_upstream(a, upstream):
    said = "whose key is this?"
    create(a, input=said)
    (asked,) = upstream.asked(said)
    assert asked.headers["authorization"] == "Bearer none"


def test_callers_keys_are_not_passed_on_where_they_are_keys_of_this_server(house):
    done = reprise({**house.env, "REPRISE_PORT": "0", "REPRISE_UPSTREAM_AUTH": "caller"}, "serve")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("reprise: REPRISE_UPSTREAM_AUTH=caller")


@pytest.mark.parametrize("store", [True, False])
def test_another_tenant_s_approval_request_is_not_found(a, b, toolserver, name, mcp, store):
    given = script([note(name), *calling("echo", {"x": 1})], answer("Then."))
    body = {"tools": [mcp(require_approval="always")], "input": given, "store": store}
    first = create(a, **body)
    approval = {"type": "mcp_approval_response", "approval_request_id": first["output"][-1]["id"], "approve": True}
    asking = [{"role": "user", "content": given}, *first["output"], approval]
    reply = b.post("/responses", json={"model": "m", **body, "input": asking})
    assert (reply.status_code, "not found" in reply.json()["error"]["message"]) == (400, True)
    assert toolserver.calls(name) == []
    create(a, **{**body, "input": asking})
    assert len(toolserver.calls(name)) == 1


def test_another_tenant_s_sealed_reasoning_is_not_opened(a, b):
    made = create(a, input=script([reasoning("Hm."), *answer("Hi")]), store=False)
    body = {"model": "m", "input": [*made["output"], {"role": "user", "content": "Repeat it."}]}
    reply = b.post("/responses", json=body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_encrypted_content")
    create(a, **body)


def test_a_count_continues_no_response_of_another_tenant(a, b):
    first = create(a)["id"]
    body = {"model": "m", "input": "more", "previous_response_id": first}
    reply = b.post("/responses/input_tokens", json=body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "previous_response_not_found")
    assert a.post("/responses/input_tokens", json=body).json()["input_tokens"] == 4


def test_a_count_is_remembered_for_its_tenant_only(a, b, upstream, name):
    body = {"model": "m", "input": name}
    counts = [http.post("/responses/input_tokens", json=body).json()["input_tokens"] for http in (a, b, a, b)]
    assert counts == [1, 1, 1, 1]
    assert len(upstream.asked(name)) == 2


def test_another_tenant_s_compaction_is_not_opened_nor_its_chain_compacted(a, b):
    asked = [{"role": "user", "content": "a secret"}, {"type": "compaction_trigger"}]
    made = create(a, input=asked)
    body = {"model": "m", "input": [*made["output"], {"role": "user", "content": "Repeat it."}]}
    reply = b.post("/responses", json=body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_encrypted_content")
    for given in (body, {"model": "m", "previous_response_id": made["id"]}):
        assert b.post("/responses/compact", json=given).status_code == 400
        assert a.post("/responses/compact", json=given).status_code == 200
    reference = [{"type": "item_reference", "id": made["output"][0]["id"]}, {"role": "user", "content": "Repeat it."}]
    assert b.post("/responses", json={"model": "m", "input": reference}).status_code == 400
    create(a, input=reference)


def test_another_tenant_s_file_is_not_found_nor_listed(a, b):
    made = a.post("/files", files={"file": ("a.txt", b"a secret")}, data={"purpose": "user_data"}).json()
    for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        theirs, unknown = b.request(method, f"/files/{made['id']}{path}"), b.request(method, f"/files/file_0{path}")
        assert seen(theirs, made["id"]) == seen(unknown, "file_0")
        assert theirs.status_code == 404
    assert b.get("/files").json()["data"] == []
    assert a.get("/files").json()["data"] == [made]
    assert a.get(f"/files/{made['id']}/content").content == b"a secret"
