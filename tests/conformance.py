"""Requests and replies against the OpenAPI document."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema_rs

from app.api.reference import DOCUMENT

DOCUMENTED: dict[str, Any] = json.loads(DOCUMENT.read_bytes())

_SCHEMAS: dict[str, Any] = DOCUMENTED["components"]["schemas"]
_OPEN = frozenset({"ChatMessageOf"})
"""Objects of which the document does not say all keys, beside those of unknown types."""


def _named_in(value: Any, found: set[str]) -> set[str]:
    """Every schema that a part of the document needs, added to those that were found."""
    match value:
        case {"$ref": str(pointer)}:
            *_, kind, name = pointer.split("/")
            if kind == "schemas" and name not in found:
                found.add(name)
                _named_in(_SCHEMAS[name], found)
            elif kind == "responses":
                _named_in(DOCUMENTED["components"]["responses"][name], found)
        case dict():
            for one in value.values():
                _named_in(one, found)
        case list():
            for one in value:
                _named_in(one, found)
    return found


_SENT = _named_in(
    [operation["responses"] for methods in DOCUMENTED["paths"].values() for operation in methods.values()], set()
)


def _closed(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    """An object that is sent and has no other keys: one that the document lacks is a mistake."""
    is_open = "properties" not in schema or name not in _SENT - _OPEN or name.startswith("Unknown")
    return schema if is_open else {"additionalProperties": False, **schema}


_COMPONENTS = {"schemas": {name: _closed(name, schema) for name, schema in _SCHEMAS.items()}}
_VALIDATORS: dict[str, jsonschema_rs.Draft202012Validator] = {}


def wrong(schema: dict[str, Any], value: Any) -> list[str]:
    """What is wrong with a value, by a schema of the document."""
    key = json.dumps(schema)
    if key not in _VALIDATORS:
        _VALIDATORS[key] = jsonschema_rs.Draft202012Validator({**schema, "components": _COMPONENTS})
    return [line for error in _VALIDATORS[key].iter_errors(value) for line in _lines(error)]


def _lines(error: Any) -> Iterator[str]:
    yield f"{'.'.join(map(str, error.instance_path))}: {str(error.message)[-400:]}"


def wrong_in(operation: dict[str, Any], reply: httpx.Response) -> list[str]:
    """What is wrong with a reply, by its operation."""
    documented = operation["responses"].get(str(reply.status_code))
    if documented is None:
        return [f"the status {reply.status_code} is not documented"]
    if "$ref" in documented:
        documented = DOCUMENTED["components"]["responses"][str(reply.status_code)]
    media = reply.headers["content-type"].partition(";")[0]
    if media not in documented["content"]:
        return [f"{media} is not documented"]
    schema = documented["content"][media]["schema"]
    if media == "text/event-stream":
        return [line for event in events_in(reply.text) for line in wrong(schema, event)]
    return wrong(schema, reply.json()) if media == "application/json" else []


def events_in(text: str) -> list[Any]:
    """The JSON of the events of a stream, which must have ended."""
    found = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert found[-1] == "[DONE]"
    return [json.loads(one) for one in found[:-1]]


def operation(method: str, path: str) -> dict[str, Any]:
    """What the document says of a route."""
    found: dict[str, Any] = DOCUMENTED["paths"][path][method.lower()]
    return found
