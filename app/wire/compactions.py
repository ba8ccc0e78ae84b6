"""`POST /v1/responses/compact`: its body and its reply."""

from collections.abc import Collection
from typing import Literal

from msgspec import Raw, Struct
from msgspec.structs import replace

from app.errors import InvalidParameter
from app.wire.items import CompactionTrigger
from app.wire.requests import CreateResponse, decode_request
from app.wire.resources import Usage

PARAMETERS = frozenset(
    "model agent input instructions previous_response_id service_tier prompt_cache_key prompt_cache_options "
    "prompt_cache_retention image".split()
)

CACHE_KEY_CHARS_MAX = 64


class CompactedResponse(Struct, kw_only=True):
    """A window for a new chain. Its id is that of no stored response."""

    id: str
    object: Literal["response.compaction"] = "response.compaction"
    created_at: int
    output: list[Raw]
    usage: Usage


def decode_compact(raw: bytes, passed_on: Collection[str]) -> CreateResponse:
    """The body, as the request of a response that is not stored and makes a compaction item. Raises InvalidRequest as
    `decode_create` does."""
    request = decode_request(raw, passed_on, PARAMETERS)
    body = request.body
    if len(body.prompt_cache_key or "") > CACHE_KEY_CHARS_MAX:
        raise InvalidParameter(
            f"Invalid value for 'prompt_cache_key': expected at most {CACHE_KEY_CHARS_MAX} characters.",
            param="prompt_cache_key",
        )
    options = body.prompt_cache_options and replace(body.prompt_cache_options, prewarm=None)
    body = replace(body, store=False, prompt_cache_options=options)
    return replace(
        request, body=body, input=request.input if request.compacts else [*request.input, CompactionTrigger()]
    )
