"""The OpenAPI document, for every scripted case: it says what is streamed, what is listed, and what was asked for."""

import httpx
import pytest

from tests.conformance import operation, wrong, wrong_in
from tests.contract.cases import CASES
from tests.contract.conftest import Heard

EVERY = pytest.mark.parametrize("name", CASES)


@EVERY
def test_the_document_has_the_request(name: str):
    assert not wrong({"$ref": "#/components/schemas/CreateResponse"}, CASES[name].request)


@EVERY
def test_the_document_has_every_event(name: str, heard: Heard):
    found = {event["type"]: wrong({"$ref": "#/components/schemas/StreamEvent"}, event) for event in heard(name)}
    assert not {type_: lines for type_, lines in found.items() if lines}


@EVERY
def test_the_document_has_the_response_and_its_input(name: str, heard: Heard, http: httpx.Client):
    response = heard(name)[-1]["response"]
    for path in ("/v1/responses/{response_id}", "/v1/responses/{response_id}/input_items"):
        reply = http.get(path.removeprefix("/v1").format(response_id=response["id"]))
        assert reply.status_code == (200 if response["store"] else 404)
        assert not wrong_in(operation("GET", path), reply)
