"""The OpenAPI document as it is served, and its page; and requests and replies as it says."""

import re
import secrets
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from app.api.reference import DOCUMENT, REDOC
from app.domain.rights import SCOPES
from tests.conformance import DOCUMENTED, wrong, wrong_in
from tests.fuzz import documented
from tests.servers import Served, reprise

EXAMPLES_OF_EACH = 10
"""Requests that are made for each operation, of each kind."""
SEED = 20_261


@pytest.fixture(scope="module")
def site(server: Served) -> Iterator[httpx.Client]:
    """Raw HTTP to the shared server, from the root."""
    with httpx.Client(base_url=server.url.removesuffix("/v1"), timeout=30) as made:
        yield made


def test_the_document_is_served_as_it_is_committed(site: httpx.Client):
    reply = site.get("/openapi.json")
    assert (reply.status_code, reply.headers["content-type"]) == (200, "application/json")
    assert reply.content == DOCUMENT.read_bytes()
    again = site.get("/openapi.json", headers={"if-none-match": reply.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert site.get("/openapi.json", headers={"if-none-match": '"another"'}).content == reply.content


def test_the_page_needs_nothing_from_elsewhere(site: httpx.Client):
    page = site.get("/docs")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    sources = {source for rule in policy.values() for source in rule.split()}
    assert sources <= {"'none'", "'self'", "'unsafe-inline'", "data:", "blob:"}
    assert "unsafe" not in policy["script-src"]
    assert "<script>" not in page.text
    [document] = re.findall(r'spec-url="([^"]+)"', page.text)
    [script] = re.findall(r'src="([^"]+)"', page.text)
    assert site.get(f"/{document}").content == DOCUMENT.read_bytes()
    assert site.get(f"/{script}").content == REDOC.read_bytes()
    assert site.get(f"/{script}").headers["content-type"] == "text/javascript; charset=utf-8"
    assert 'href="/docs"' in site.get("/").text


def test_no_key_is_needed_where_keys_are_in_use(new_server):
    served = new_server()
    reprise(served.env, "keys", "create", "--tenant", "acme")
    with httpx.Client(base_url=served.url.removesuffix("/v1")) as site:
        assert [site.get(path).status_code for path in ("/docs", "/openapi.json", "/v1/models")] == [200, 200, 401]


# -- Examples ----------------------------------------------------------------------------------------------------------------

EXAMPLES = [
    (method, path, name)
    for path, methods in DOCUMENTED["paths"].items()
    for method, operation in methods.items()
    for media in operation.get("requestBody", {}).get("content", {}).values()
    for name in media.get("examples", ())
]


@pytest.fixture(scope="module")
def demo(base_env, new_database) -> Iterator[httpx.Client]:
    """A server with the demo model and a key for everything."""
    env = {name: value for name, value in base_env.items() if name != "OPENAI_BASE_URL"}
    env |= {"DATABASE_URL": new_database()}
    scopes = [f"--scope={scope}" for scope in SCOPES]
    key = reprise(env, "keys", "create", *scopes).stdout.strip()
    with (
        Served(env) as served,
        httpx.Client(
            base_url=served.url.removesuffix("/v1"), headers={"authorization": f"Bearer {key}"}, timeout=30
        ) as made,
    ):
        yield made


def new_id(demo: httpx.Client, name: str) -> str:
    """The id of a new thing, by the name of the path's parameter."""
    chat = {"model": "echo", "messages": [{"role": "user", "content": "hi"}], "store": True}
    made = {
        "conversation_id": ("/v1/conversations", {}),
        "completion_id": ("/v1/chat/completions", chat),
        "key_id": ("/v1/admin/keys", {}),
        "credential_id": (
            "/v1/tool_credentials",
            {"server_url": "https://new.example/", "authorization": "TOKEN-OF-ADA"},
        ),
        "agent_id": ("/v1/agents", {"name": "another", "model": "echo"}),
        "tenant_id": ("/v1/admin/tenants", {"id": secrets.token_hex(8)}),
    }
    path, body = made[name]
    return str(demo.post(path, json=body).json()["id"])


@pytest.mark.parametrize(("method", "path", "name"), EXAMPLES)
def test_an_example_is_answered_as_the_document_says(demo: httpx.Client, method: str, path: str, name: str):
    operation = DOCUMENTED["paths"][path][method]
    [media] = operation["requestBody"]["content"].values()
    body: Any = media["examples"][name]["value"]
    assert not wrong(media["schema"], body)
    ids = {parameter: new_id(demo, parameter) for parameter in re.findall(r"{(\w+)}", path)}
    reply = demo.request(method, path.format(**ids), json=body)
    assert reply.status_code == 200, reply.text
    assert not wrong_in(operation, reply)


def test_every_body_has_an_example():
    bodies = [
        media
        for methods in DOCUMENTED["paths"].values()
        for operation in methods.values()
        for kind, media in operation.get("requestBody", {}).get("content", {}).items()
        if kind == "application/json"
    ]
    assert all(media.get("examples") for media in bodies)


# -- Requests made from the document -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phases", "without"), [(documented.MADE, ()), (documented.BROKEN, documented.WITH_ITEMS)], ids=["made", "broken"]
)
def test_requests_made_from_the_document_are_answered_as_it_says(new_server, tmp_path, phases, without):
    served = new_server(REPRISE_AUTH_DELAY_MAX_S="0")
    assert not documented.run(served, tmp_path, phases=phases, examples=EXAMPLES_OF_EACH, seed=SEED, without=without)
    assert not [line for line in served.printed if "because of a bug" in line]
