"""Queries of every route: what a route does not take is refused before anything else is looked at, except for names of versions."""

import re
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from app.domain.rights import SCOPES
from tests.api.test_rights_matrix import OPEN
from tests.routes import handlers
from tests.servers import Served, reprise

BELOW_V1 = sorted(handlers().keys() - OPEN)
VERSIONS = {"beta": "true", "api-version": "2025-04-01-preview", "client_version": "0.169.0"}


@pytest.fixture(scope="module")
def house(base_env, new_database) -> Iterator[tuple[Served, str]]:
    """A server, and a key that may do everything."""
    env = {**base_env, "DATABASE_URL": new_database()}
    key = reprise(env, "keys", "create", "--tenant", "acme", *(f"--scope={one}" for one in SCOPES)).stdout.strip()
    with Served(env) as served:
        yield served, key


def send(house: tuple[Served, str], route: str, key: str | None = None, **params: str) -> httpx.Response:
    """A request without a body, about something that does not exist."""
    served, its_key = house
    method, path = route.split(" ")
    url = served.url.removesuffix("/v1") + re.sub(r"{\w+}", "none", path)
    return httpx.request(method, url, params=params, headers={"Authorization": f"Bearer {key or its_key}"})


def error(reply: httpx.Response) -> Any:
    return reply.json()["error"] if reply.status_code >= 400 else None


@pytest.mark.parametrize("route", BELOW_V1)
def test_a_parameter_that_a_route_does_not_take_is_refused_first(house, route):
    reply = send(house, route, nonsense="1")
    refused = error(reply)
    assert (reply.status_code, refused["code"], refused["param"]) == (400, "unknown_parameter", "nonsense")
    assert send(house, route, key="wrong", nonsense="1").status_code == 401


@pytest.mark.parametrize("route", BELOW_V1)
def test_names_of_versions_change_nothing(house, route):
    plain, versioned = send(house, route), send(house, route, **VERSIONS)
    assert (versioned.status_code, error(versioned)) == (plain.status_code, error(plain))


@pytest.mark.parametrize("route", sorted(OPEN))
def test_pages_and_probes_do_not_look_at_their_queries(house, route):
    assert send(house, route, nonsense="1").status_code == 200


def test_a_client_of_azure_is_served(house, said):
    served, key = house
    with openai.AzureOpenAI(
        base_url=served.url, api_version=VERSIONS["api-version"], azure_ad_token=key, max_retries=0
    ) as client:
        made = client.responses.create(model="m", input=said)
        assert made.output_text == f"ok: {said}"
        assert client.responses.retrieve(made.id).output_text == made.output_text
        assert [one.id for one in client.responses.input_items.list(made.id)]
