"""The list of models: what the catalog names and what the upstreams list."""

from typing import Any

import httpx
import openai
import pytest

from tests.upstream import Upstream

LISTED = ["scripted", "scripted-no-usage-option", "scripted-strict"]
"""What the scripted upstream lists."""


def listed(name: str, owner: str) -> dict[str, Any]:
    """A model of which nothing else is known."""
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": owner,
        "name": name,
        "description": None,
        "context_window": None,
        "is_agent": False,
    }


def ids_of(client: openai.OpenAI) -> list[str]:
    """The listed models."""
    return [model.id for model in client.models.list().data]


def test_without_a_catalog_the_upstreams_own_list_is_given(http):
    assert http.get("/models").json() == {
        "object": "list",
        "data": [listed(id, "tests") for id in LISTED],
    }


def test_a_model_is_retrieved_as_it_is_listed(client):
    assert client.models.retrieve("scripted").to_dict() == client.models.list().data[0].to_dict()


def not_found(http, name):
    """The error's message for a name that is none."""
    reply = http.get(f"/models/{name}")
    assert reply.status_code == 404
    error = reply.json()["error"]
    assert [error[key] for key in ("type", "param", "code")] == ["invalid_request_error", "model", "model_not_found"]
    return error["message"]


@pytest.mark.parametrize("name", ["a%00b", "m" * 513])
def test_what_no_model_may_be_called_is_not_found(http, name):
    assert not_found(http, name).startswith("The model '")


@pytest.mark.parametrize("name", ["unlisted", "some/model", "default@any", "SCRIPTED", "a b", "scripted:free"])
def test_whatever_name_create_takes_is_found(client, name):
    assert client.responses.create(model=name, input="Hello").model == name
    assert client.models.retrieve(name).to_dict() == listed(name, "default")


def test_a_catalog_names_its_models_first_and_marks_whose_the_others_are(new_server, catalog_file):
    with Upstream(models=["Qwen/Qwen3-8B", "small"]) as local, Upstream(models=["gpt"]) as hosted:
        catalog = catalog_file(f"""
            default = "local"
            [upstreams.local]
            base_url = "{local.base_url}"
            [upstreams.hosted]
            base_url = "{hosted.base_url}"
            [[models]]
            name = "house/best"
            routes = [{{ upstream = "hosted", model = "gpt" }}]
            [[models]]
            name = "qwen*"
            routes = [{{ upstream = "local" }}]
        """)
        served = new_server(REPRISE_CATALOG=catalog)
        with served.client() as client:
            assert ids_of(client) == ["house/best", "local@Qwen/Qwen3-8B", "local@small", "hosted@gpt"]
            assert client.models.retrieve("house/best").owned_by == "reprise"
            found = client.models.retrieve("local@Qwen/Qwen3-8B")
            assert (found.id, found.owned_by) == ("local@Qwen/Qwen3-8B", "tests")
            made = client.responses.create(model=found.id, input="Hello")
            assert made.model == "local@Qwen/Qwen3-8B"
            assert local.requests[-1].body["model"] == "Qwen/Qwen3-8B"
            # Whatever a request may say is found: by a pattern, and by its plain name at the default upstream.
            assert client.models.retrieve("qwen-anything").owned_by == "local"
            assert (client.models.retrieve("small").id, client.models.retrieve("small").owned_by) == ("small", "tests")
            assert client.models.retrieve("hosted@small").owned_by == "hosted"
            # An upstream that is down lists nothing, the others go on.
            hosted.stop()
            assert ids_of(client) == ["house/best", "local@Qwen/Qwen3-8B", "local@small"]


def test_an_upstream_that_says_nothing_is_not_waited_for_long(new_server, catalog_file, silent, upstream):
    catalog = catalog_file(f"""
        [upstreams.silent]
        base_url = "{silent.url}"
        [upstreams.good]
        base_url = "{upstream.base_url}"
    """)
    served = new_server(REPRISE_CATALOG=catalog, REPRISE_MODELS_WAIT_S="0.2")
    with served.client(timeout=30) as client:
        assert ids_of(client) == [f"good@{id}" for id in LISTED]
        assert client.models.retrieve("silent@any").owned_by == "silent"
        with httpx.Client(base_url=served.url) as http:
            assert not_found(http, "any") == "The model 'any' does not exist or you do not have access to it."
    served = new_server(OPENAI_BASE_URL=silent.url, REPRISE_MODELS_WAIT_S="0.2")
    reply = httpx.get(f"{served.url}/models", timeout=30)
    assert (reply.status_code, reply.json()["error"]["message"]) == (
        504,
        "Upstream 'default' did not list its models in time.",
    )


def test_an_upstream_that_is_down_lists_nothing_and_says_so(new_server):
    with Upstream() as gone:
        url = gone.base_url
    served = new_server(OPENAI_BASE_URL=url)
    with httpx.Client(base_url=served.url) as http:
        reply = http.get("/models")
        assert reply.status_code == 502
        assert reply.json()["error"] == {
            "message": "Upstream 'default' can't be reached.",
            "type": "server_error",
            "param": None,
            "code": "server_error",
        }
        assert http.get("/models/m").json()["owned_by"] == "default"  # create decides whom it asks
