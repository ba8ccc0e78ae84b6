"""Approval requests that are not stored: their ids say what was asked."""

import pytest

from app.domain.approvals import signing, was_asked
from app.ids import new_id, seconds_of
from app.wire.items import McpApprovalRequest
from tests.unit.build import SEAL

ARGUMENTS = '{"x":1,"y":[1.0,null,"a"],"z":{"b":2,"a":1e3}}'


def asked(arguments: str = ARGUMENTS, **changes: str) -> McpApprovalRequest:
    """The request to approve a call of `echo` with ARGUMENTS, as a client sends it back."""
    id = signing(new_id, SEAL, "box", "echo", ARGUMENTS)("mcpr")
    return McpApprovalRequest(**{"id": id, "server_label": "box", "name": "echo", "arguments": arguments, **changes})


@pytest.mark.parametrize("arguments", [ARGUMENTS, '{ "z": {"a": 1000, "b": 2.0}, "y": [1, null, "\\u0061"], "x": 1 }'])
def test_arguments_are_the_same_however_they_are_written(arguments: str):
    assert was_asked(SEAL, asked(arguments))


@pytest.mark.parametrize(
    "change",
    [
        {"name": "add"},
        {"server_label": "other"},
        {"arguments": '{"x":1,"y":[1.5,null,"a"],"z":{"b":2,"a":1e3}}'},
        {"arguments": "{"},
        {"id": "mcpr_1"},
        {"id": ""},
    ],
)
def test_what_was_not_asked_does_not_count(change: dict[str, str]):
    assert not was_asked(SEAL, asked(**change))


def test_each_request_has_an_id_of_its_own():
    one, other = asked(), asked()
    assert one.id != other.id
    assert was_asked(SEAL, other)
    assert seconds_of(one.id)


@pytest.mark.parametrize("arguments", ["", "no json", "[1]", "[" * 10_000, '{"a":' * 10_000, '{"x": 1e999}'])
def test_arguments_that_are_no_object_count_as_they_are(arguments: str):
    id = signing(new_id, SEAL, "box", "echo", arguments)("mcpr")
    assert was_asked(SEAL, McpApprovalRequest(id=id, server_label="box", name="echo", arguments=arguments))
    assert not was_asked(SEAL, McpApprovalRequest(id=id, server_label="box", name="echo", arguments=arguments + " x"))
