"""The OpenAPI document that is committed: it is what the code gives, it is valid, and it says all of every route."""

import hashlib
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
from litestar.handlers import HTTPRouteHandler
from openapi_spec_validator import OpenAPIV31SpecValidator

from app.api import queries, reference
from app.api.openapi.document import document, encoded
from app.api.openapi.operations import OPERATIONS
from tests.conformance import DOCUMENTED
from tests.routes import handlers
from tests.unit.test_api_page import parameters_of

EVERY = pytest.mark.parametrize("route", OPERATIONS)


def documented(route: str) -> dict[str, Any]:
    method, path = route.split(" ")
    return DOCUMENTED["paths"][path][method.lower()]


def properties(schema: dict[str, Any]) -> dict[str, Any]:
    return DOCUMENTED["components"]["schemas"][schema["$ref"].rpartition("/")[2]]["properties"]


def test_the_document_is_what_the_code_gives():
    assert reference.DOCUMENT.read_bytes() == encoded(document()), "run `make openapi`"


def test_the_document_is_valid():
    OpenAPIV31SpecValidator(DOCUMENTED).validate()


def test_every_route_is_in_the_document_and_no_other():
    paths = {f"{method.upper()} {path}" for path, methods in DOCUMENTED["paths"].items() for method in methods}
    assert paths == handlers().keys()
    ids = [documented(route)["operationId"] for route in paths]
    assert len(ids) == len(set(ids))


def query_of(handler: HTTPRouteHandler) -> set[str]:
    parsed = re.findall(r"queries\.parse\(request, queries\.(\w+)\)", inspect.getsource(handler.fn))
    return {name for one in parsed for name in getattr(queries, one).__struct_fields__}


@EVERY
def test_a_route_has_the_parameters_that_its_handler_reads(route: str):
    told, handler = documented(route), handlers()[route]
    query = {one["name"] for one in told.get("parameters", ()) if one["in"] == "query"}
    path = {one["name"] for one in told.get("parameters", ()) if one["in"] == "path"}
    assert (query, path) == (query_of(handler), set(re.findall(r"{(\w+)}", route)))
    assert all(one["description"] for one in told.get("parameters", ()))
    [media] = told["requestBody"]["content"].values() if "requestBody" in told else [None]
    body = set(properties(media["schema"])) if media else set()
    if route not in {"POST /v1/responses", "POST /v1/chat/completions"}:
        assert query | body == parameters_of(handler)


@pytest.mark.parametrize("name", ["Agent", "CreateAgent", "UpdateAgent"])
def test_an_agent_is_no_model_of_an_agent(name: str):
    assert "no agent" in DOCUMENTED["components"]["schemas"][name]["properties"]["model"]["description"]


def test_the_viewer_is_the_release_that_its_readme_names():
    readme = (reference.REDOC.parent / "README.md").read_text()
    body = reference.REDOC.read_bytes()
    assert re.findall(r"sha256  (\w{64})", readme) == [hashlib.sha256(body).hexdigest()]
    version = re.search(rb'Version: "([\d.]+)"', Path(f"{reference.REDOC}.LICENSE.txt").read_bytes())
    assert version
    assert f"Redocly/redoc) {version[1].decode()} " in " ".join(readme.split())
    assert (reference.REDOC.parent / "LICENSE").read_text().startswith("The MIT License")


def test_no_text_of_the_document_is_about_the_code():
    assert not re.findall(r"\b(?:app|wire|domain|api)/\w+\.py|encode_tools|UNSET", json.dumps(DOCUMENTED))
