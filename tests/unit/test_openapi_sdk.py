"""What the OpenAPI document says of what is sent, against the types of the official SDK: what those demand is always there."""

from collections.abc import Iterator
from types import NoneType
from typing import Any, get_args

import pytest
from openai.types import FileDeleted, FileObject, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionDeleted
from openai.types.conversations import Conversation, ConversationDeletedResource
from openai.types.responses import CompactedResponse, Response, ResponseOutputItem, ResponseStreamEvent
from openai.types.responses.input_token_count_response import InputTokenCountResponse
from pydantic import BaseModel

from app.wire.carried import CARRIED
from tests.conformance import DOCUMENTED

SCHEMAS: dict[str, Any] = DOCUMENTED["components"]["schemas"]


def tag(model: type[BaseModel]) -> str:
    return str(get_args(model.model_fields["type"].annotation)[0])


def members(hint: Any) -> list[type[BaseModel]]:
    """The models of an annotated union."""
    return list(get_args(get_args(hint)[0]))


EVENTS = DOCUMENTED["components"]["schemas"]["StreamEvent"]["discriminator"]["mapping"]
ITEMS = {
    schema["properties"]["type"].get("const"): name
    for name, schema in SCHEMAS.items()
    if "type" in schema.get("properties", {}) and {"$ref": f"#/components/schemas/{name}"} in SCHEMAS["Item"]["oneOf"]
}
PAIRS: list[tuple[str, type[BaseModel]]] = [
    ("Response", Response),
    ("Conversation", Conversation),
    ("File", FileObject),
    ("Model", Model),
    ("ChatCompletion", ChatCompletion),
    ("ChatCompletionChunk", ChatCompletionChunk),
    ("CompactedResponse", CompactedResponse),
    ("InputTokens", InputTokenCountResponse),
    *(("Deleted", model) for model in (FileDeleted, ChatCompletionDeleted, ConversationDeletedResource)),
    *((EVENTS[tag(one)].rpartition("/")[2], one) for one in members(ResponseStreamEvent) if tag(one) in EVENTS),
    *((ITEMS[tag(one)], one) for one in members(ResponseOutputItem) if tag(one) in ITEMS.keys() - CARRIED),
]

_COMPACTED = "a compacted window has messages as they were asked for"
DIFFERENT: dict[tuple[str, str], str] = {
    ("Message", "status"): _COMPACTED,
    ("FunctionCallOutput", "status"): _COMPACTED,
    ("CustomToolCallOutput", "status"): _COMPACTED,
    ("WebSearchCall", "action"): "a client's history may lack it",
}
"""(component, field) → why it is not as the SDK's type. Items that are carried are as clients have sent them."""


def differences(name: str, model: type[BaseModel]) -> Iterator[tuple[str, str]]:
    schema = SCHEMAS[name]
    for field, info in model.model_fields.items():
        key = info.alias or field
        if not info.is_required():
            continue
        given = schema["properties"].get(key)
        may_be_null = given is not None and (
            "null" in given.get("type", ()) or {"type": "null"} in given.get("anyOf", ())
        )
        if key not in schema.get("required", ()) or (may_be_null and NoneType not in get_args(info.annotation)):
            yield name, key


@pytest.mark.parametrize(("name", "model"), PAIRS, ids=[f"{name}-{model.__name__}" for name, model in PAIRS])
def test_what_the_sdk_demands_is_always_sent(name: str, model: type[BaseModel]):
    assert not [one for one in differences(name, model) if one not in DIFFERENT]


def test_every_difference_is_one():
    found = {one for name, model in PAIRS for one in differences(name, model)}
    assert found == DIFFERENT.keys()
    assert len(PAIRS) > 60
