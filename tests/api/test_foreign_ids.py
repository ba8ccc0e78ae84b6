"""Ids of others, wherever a request may name one: they look unknown, to the letter. And ids that are none."""

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx
import pytest
from msgspec import Struct

from tests.api.test_rights_matrix import CALLS
from tests.servers import Served, reprise
from tests.waiting import until

CHAT = [{"role": "user", "content": "hi"}]
ASKED = {"model": "m", "input": "hi"}


def content(**part: Any) -> dict[str, Any]:
    return {"model": "m", "input": [{"role": "user", "content": [part]}]}


Place = tuple[str, str, Any, str]
"""Method, path, body, and the kind of thing that is named where `ID` stands."""

PLACES: dict[str, Place] = {
    "a stream": ("GET", "/responses/ID?stream=true&starting_after=0", None, "background"),
    "a chat completion as a response": ("GET", "/responses/ID", None, "response of the completion"),
    "a response as a chat completion": ("GET", "/chat/completions/ID", None, "completion of the response"),
    "a parent": ("POST", "/responses", {**ASKED, "previous_response_id": "ID"}, "response"),
    "a parent in the background": (
        "POST",
        "/responses",
        {**ASKED, "previous_response_id": "ID", "background": True},
        "response",
    ),
    "a parent of a chat": (
        "POST",
        "/chat/completions",
        {"model": "m", "messages": CHAT, "previous_response_id": "ID"},
        "response",
    ),
    "a parent to be compacted": ("POST", "/responses/compact", {**ASKED, "previous_response_id": "ID"}, "response"),
    "a parent to be counted": ("POST", "/responses/input_tokens", {**ASKED, "previous_response_id": "ID"}, "response"),
    "a conversation": ("POST", "/responses", {**ASKED, "conversation": "ID"}, "conversation"),
    "a conversation of a chat": (
        "POST",
        "/chat/completions",
        {"model": "m", "messages": CHAT, "conversation": "ID"},
        "conversation",
    ),
    "a conversation that is read": (
        "POST",
        "/responses",
        {**ASKED, "conversation": "ID", "store": False},
        "conversation",
    ),
    "an item": ("POST", "/responses", {"model": "m", "input": [{"type": "item_reference", "id": "ID"}]}, "item"),
    "an item for a conversation": (
        "POST",
        "/conversations",
        {"items": [{"type": "item_reference", "id": "ID"}]},
        "item",
    ),
    "an approval": (
        "POST",
        "/responses",
        {"model": "m", "input": [{"type": "mcp_approval_response", "approval_request_id": "ID", "approve": True}]},
        "item",
    ),
    "a file": ("POST", "/responses", content(type="input_file", file_id="ID"), "file"),
    "an image": ("POST", "/responses", content(type="input_image", file_id="ID"), "file"),
    "an item of one's own conversation": ("GET", "/conversations/MINE/items/ID", None, "conversation's item"),
    "an item to remove": ("DELETE", "/conversations/MINE/items/ID", None, "conversation's item"),
    "where a fork ends": ("POST", "/conversations/MINE/fork", {"after": "ID"}, "conversation's item"),
    "a cursor of items": ("GET", "/conversations/MINE/items?after=ID", None, "conversation's item"),
    "a cursor of responses": ("GET", "/responses?after=ID", None, "response"),
    "a cursor of conversations": ("GET", "/conversations?after=ID", None, "conversation"),
    "a cursor of files": ("GET", "/files?after=ID", None, "file"),
    "a cursor of completions": ("GET", "/chat/completions?after=ID", None, "completion"),
    "a cursor of credentials": ("GET", "/tool_credentials?after=ID", None, "credential"),
    "metadata of a conversation": ("GET", "/conversations?metadata[of]=ada", None, "conversation"),
    "metadata of a response": ("GET", "/responses?metadata[of]=ada", None, "response"),
    "metadata of a completion": ("GET", "/chat/completions?metadata[of]=ada", None, "completion"),
}

OF_ADMINISTRATORS: dict[str, Place] = {
    "a cursor of keys": ("GET", "/admin/keys?after=ID", None, "key"),
    "a cursor of the log": ("GET", "/admin/audit?after=ID&order=asc", None, "entry"),
    "whom a credential is for": (
        "POST",
        "/tool_credentials",
        {"server_url": "https://x.example/", "authorization": "s3cret-value", "key_id": "ID"},
        "key",
    ),
}

OURS = {"date", "x-request-id", "openai-processing-ms", "content-length"}
"""Headers that differ with each request, or with the length of an id."""


class House(Struct):
    """A server; keys by name; ids of ada's things, by kind."""

    served: Served
    keys: dict[str, str]
    ids: dict[str, str]

    def http(self, key: str) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.keys[key]}"}
        return httpx.Client(base_url=self.served.url, headers=headers, timeout=30)


@pytest.fixture(scope="module")
def house(base_env: Mapping[str, str], new_database: Callable[[], str]) -> Iterator[House]:
    env = {**base_env, "DATABASE_URL": new_database()}
    scopes = [f"--scope={scope}" for scope in ("admin", "responses.read", "responses.write")]
    made = {
        name: reprise(env, "keys", "create", *options)
        for name, options in {
            "ada": ["--tenant=acme", "--user=ada"],
            "bob": ["--tenant=acme", "--user=bob"],
            "unbound": ["--tenant=acme"],
            "admin": ["--tenant=acme", *scopes],
            "mallory": ["--tenant=mallory", *scopes],
        }.items()
    }
    with Served(env) as served:
        house = House(served, {name: one.stdout.strip() for name, one in made.items()}, {})
        with house.http("ada") as http, house.http("admin") as admin:
            of = {"metadata": {"of": "ada"}}

            def post(path: str, **asked: Any) -> Any:
                reply = http.post(path, **asked)
                assert reply.status_code == 200, reply.text
                return reply.json()

            response = post("/responses", json={**ASKED, **of})
            conversation = post("/conversations", json={"items": CHAT, **of})["id"]
            completion = post("/chat/completions", json={"model": "m", "messages": CHAT, "store": True, **of})["id"]
            credential = {"server_url": "https://x.example/", "authorization": "s3cret-value"}
            file = {"files": {"file": ("a.txt", b"of ada")}, "data": {"purpose": "user_data"}}
            house.ids |= {
                "background": post("/responses", json={**ASKED, "background": True, "stream": False})["id"],
                "response": response["id"],
                "completion of the response": response["id"].replace("resp_", "chatcmpl-"),
                "item": response["output"][0]["id"],
                "conversation": conversation,
                "conversation's item": http.get(f"/conversations/{conversation}/items").json()["first_id"],
                "completion": completion,
                "response of the completion": completion.replace("chatcmpl-", "resp_"),
                "file": post("/files", **file)["id"],
                "credential": post("/tool_credentials", json=credential)["id"],
                "key": made["ada"].stderr.split()[0],
                "entry": admin.get("/admin/audit").json()["first_id"],
            }
            until(lambda: http.get(f"/responses/{house.ids['background']}").json()["status"] == "completed")
        yield house


def looks(http: httpx.Client, place: Place, id: str, mine: str) -> tuple[int, str, dict[str, str]]:
    """What the reply says of an id, which stands in it as ID."""
    method, path, body, _ = place
    path = path.replace("ID", id).replace("MINE", mine)
    given = json.loads(json.dumps(body).replace("ID", id)) if body else None
    reply = http.request(method, path, json=given)
    headers = {name: value for name, value in reply.headers.items() if name not in OURS}
    return reply.status_code, reply.text.replace(id, "ID"), headers


def unknown(id: str) -> str:
    """An id of the same time that there is not."""
    return f"{id[:-12]}{'0' * 12}"


@pytest.mark.parametrize("key", ["bob", "unbound", "admin", "mallory"])
@pytest.mark.parametrize("name", PLACES)
def test_an_id_of_another_looks_unknown_wherever_it_is_named(house, name, key):
    place, (_, path, _, kind) = PLACES[name], PLACES[name]
    with house.http(key) as http:
        mine = http.post("/conversations", json={"items": CHAT}).json()["id"] if "MINE" in path else ""
        found = [looks(http, place, id, mine) for id in (house.ids[kind], unknown(house.ids[kind]))]
    assert found[0] == found[1]
    assert found[0][0] in {200, 400, 404}
    assert "ada" not in found[0][1]
    if found[0][0] == 200:
        assert not any(id in found[0][1] for id in house.ids.values()) or key == "admin"


@pytest.mark.parametrize("name", OF_ADMINISTRATORS)
def test_an_id_of_another_tenant_looks_unknown_to_administrators(house, name):
    place = OF_ADMINISTRATORS[name]
    with house.http("mallory") as http:
        found = [looks(http, place, id, "") for id in (house.ids[place[3]], unknown(house.ids[place[3]]))]
    assert found[0] == found[1]
    assert not any(id in found[0][1] for id in house.ids.values())


def test_what_is_of_ada_is_found_by_ada(house):
    """The places are right: with the owner's key an id is not unknown."""
    with house.http("ada") as http:
        for name, place in PLACES.items():
            if "MINE" in place[1] or name in {"an approval", "a response as a chat completion"} or "after=" in place[1]:
                continue
            found = [looks(http, place, id, "") for id in (house.ids[place[3]], unknown(house.ids[place[3]]))]
            assert name.startswith("metadata") or found[0] != found[1], name


ODD = (
    "%00", "%ff", "..%2f..%2fadmin", "a" * 7000, "%0d%0aX-Odd:1", "%E2%80%AE", "'%20or%201=1--", "key_" + "f" * 36,
    "resp_" + "f" * 12, "%C3%28", "%F0%9F%98%80", "%ed%a0%80", "-", "0", "*", "resp_%00", "conv_0" * 9,
)  # fmt: skip
"""Ids that are none, as they stand in a path or a query."""

QUERIES = (
    *(f"after={odd}" for odd in ODD), "limit=-1", "limit=99999999999999999999", "limit=1e3", "limit=%00", "order=ASC;drop",
    "metadata[%00]=1", "metadata[]=1", "metadata=1", f"metadata[a]={'x' * 5000}", "metadata[a]=%ed%a0%80", "after[]=1",
    "limit=5&limit=7", "created_after=9223372036854775807", "created_before=4611686018427387904", "created_before=-1",
    "type=%00", f"purpose={'x' * 5000}", "model=%00", "model=%ed%a0%80", "include[]=x", "order=desc&order=asc", "before=",
)  # fmt: skip


def test_an_id_that_is_none_is_refused_by_every_route(house):
    odd = []
    with house.http("admin") as http:
        for (route, call), id in itertools.product(CALLS.items(), ODD):
            method, path = route.split(" ")
            if "{" in path:
                body = call.json() if callable(call.json) else call.json
                reply = http.request(method, re.sub(r"{\w+}", lambda _, id=id: id, path.removeprefix("/v1")), json=body)
                if reply.status_code >= 500 or "x-odd" in reply.headers:
                    odd.append((route, id, reply.status_code, reply.text))
        for (route, _), query in itertools.product(CALLS.items(), QUERIES):
            method, path = route.split(" ")
            if method == "GET" and "{" not in path:
                reply = http.get(f"{path.removeprefix('/v1')}?{query}")
                if reply.status_code >= 500:
                    odd.append((route, query, reply.status_code, reply.text))
    assert odd == []
    assert not [line for line in house.served.printed if '"status": 500' in line or "because of a bug" in line]
