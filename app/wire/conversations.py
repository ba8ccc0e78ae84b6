"""Conversations: what clients ask for, and what they get."""

from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta, Raw, Struct

from app.errors import InvalidParameter
from app.wire.decoding import check_text, decode
from app.wire.items import AnyItem, CompactionTrigger, decode_item
from app.wire.requests import Metadata, check_metadata, mend_surrogates

ITEMS_MAX = 20
"""Items of one request (the API's own limit)."""

T = TypeVar("T")

Items = Annotated[list[Raw], Meta(max_length=ITEMS_MAX)]


class CreateConversation(Struct, forbid_unknown_fields=True):
    """`POST /v1/conversations`."""

    metadata: Metadata | None = None
    items: Items | None = None


class UpdateConversation(Struct, forbid_unknown_fields=True):
    """`POST /v1/conversations/{id}`."""

    metadata: Metadata | None


class ForkConversation(Struct, forbid_unknown_fields=True):
    """`POST /v1/conversations/{id}/fork`, beyond the hosted API; without metadata the fork has that of the source."""

    after: str | None = None
    metadata: Metadata | None = None


class CreateItems(Struct, forbid_unknown_fields=True):
    """`POST /v1/conversations/{id}/items`."""

    items: Annotated[list[Raw], Meta(min_length=1, max_length=ITEMS_MAX)]


class Conversation(Struct):
    """A conversation as clients get it."""

    id: str
    created_at: int
    metadata: Raw
    object: Literal["conversation"] = "conversation"


CREATE = msgspec.json.Decoder(CreateConversation)
UPDATE = msgspec.json.Decoder(UpdateConversation)
FORK = msgspec.json.Decoder(ForkConversation)
ITEMS = msgspec.json.Decoder(CreateItems)


def decode_request(decoder: msgspec.json.Decoder[T], raw: bytes) -> T:
    """A request's body; an empty one is that of an empty object. Raises InvalidRequest, with the parameter's path."""
    check_text(raw)
    request = decode(decoder, mend_surrogates(raw) or b"{}")
    check_metadata(getattr(request, "metadata", None) or {})
    return request


def decode_items(given: list[Raw]) -> list[AnyItem]:
    """The items of a request. Raises InvalidParameter."""
    items = [decode_item(item, f"items[{index}]") for index, item in enumerate(given)]
    for index, item in enumerate(items):
        if isinstance(item, CompactionTrigger):
            raise InvalidParameter(
                f"Invalid value for 'items[{index}]': a compaction trigger is for the input of a response only.",
                param=f"items[{index}]",
            )
    return items
