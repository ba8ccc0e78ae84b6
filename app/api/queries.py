"""Query strings → Structs. Arrays come as `include[]=a&include[]=b` or `include=a`."""

from datetime import date
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from litestar import Request
from msgspec import Meta, Struct

from app.errors import InvalidParameter
from app.wire.admin import Action
from app.wire.decoding import invalid, unknown
from app.wire.keys import suggestion
from app.wire.requests import Include, Order
from app.wire.resources import Status
from app.wire.usage import Group

LISTS = frozenset({"include", "group_by"})
MAPS = frozenset({"metadata"})

Q = TypeVar("Q")

Limit = Annotated[int, Meta(ge=1, le=100)]


class Retrieve(Struct, forbid_unknown_fields=True, frozen=True):
    """`GET /v1/responses/{id}`."""

    include: list[Include] = []
    stream: bool = False
    starting_after: Annotated[int, Meta(ge=0, lt=2**62)] | None = None
    include_obfuscation: bool | None = None


class ItemPage(Struct, forbid_unknown_fields=True, frozen=True):
    """The items of a response or a conversation: the page after `after`, or the one that ends before `before`."""

    after: str | None = None
    before: str | None = None
    limit: Limit = 20
    order: Order = "desc"
    include: list[Include] = []


class ResponsePage(Struct, forbid_unknown_fields=True, frozen=True):
    """`GET /v1/responses`; times are unix seconds, both ends included."""

    after: str | None = None
    limit: Limit = 20
    order: Order = "desc"
    model: str | None = None
    status: Status | None = None
    metadata: dict[str, str] = {}
    created_after: Annotated[int, Meta(ge=0, lt=2**62)] = 0
    created_before: Annotated[int, Meta(ge=0, le=2**62)] = 2**62


class ConversationPage(Struct, forbid_unknown_fields=True, frozen=True):
    """`GET /v1/conversations`."""

    after: str | None = None
    limit: Limit = 20
    order: Order = "desc"
    metadata: dict[str, str] = {}


class CompletionPage(Struct, forbid_unknown_fields=True, frozen=True):
    """`GET /v1/chat/completions`."""

    after: str | None = None
    limit: Limit = 20
    order: Order = "asc"
    model: str | None = None
    metadata: dict[str, str] = {}


class MessagePage(Struct, forbid_unknown_fields=True, frozen=True):
    """The messages of a chat completion."""

    after: str | None = None
    limit: Limit = 20
    order: Order = "asc"


class FilePage(Struct, forbid_unknown_fields=True, frozen=True):
    """`GET /v1/files`; the limit is the hosted API's."""

    after: str | None = None
    limit: Annotated[int, Meta(ge=1, le=10_000)] = 10_000
    order: Order = "desc"
    purpose: str | None = None


class KeyPage(Struct, forbid_unknown_fields=True, frozen=True):
    """`GET /v1/admin/keys`."""

    after: str | None = None
    limit: Limit = 20
    order: Order = "desc"


class TenantPage(Struct, forbid_unknown_fields=True, frozen=True):
    """`GET /v1/admin/tenants`."""

    after: str | None = None
    limit: Limit = 20
    order: Order = "desc"


class AgentPage(Struct, forbid_unknown_fields=True, frozen=True):
    """`GET /v1/agents`."""

    after: str | None = None
    limit: Limit = 20
    order: Order = "desc"


class AuditPage(Struct, forbid_unknown_fields=True, frozen=True):
    """`GET /v1/admin/audit`."""

    after: str | None = None
    limit: Limit = 20
    order: Order = "desc"
    type: Action | None = None


class ToolCredentialPage(Struct, forbid_unknown_fields=True, frozen=True):
    """`GET /v1/tool_credentials`."""

    after: str | None = None
    limit: Limit = 20
    order: Order = "desc"


class UsagePage(Struct, forbid_unknown_fields=True, frozen=True):
    """`GET /v1/usage`; days in UTC, both ends included."""

    group_by: Annotated[list[Group], Meta(max_length=4)] = []
    since: date | None = None
    until: date | None = None
    model: str | None = None
    key_id: str | None = None
    user: str | None = None
    after: str | None = None
    limit: Annotated[int, Meta(ge=1, le=1_000)] = 1_000
    order: Order = "asc"
    format: Literal["json", "csv"] = "json"


class Included(Struct, forbid_unknown_fields=True, frozen=True):
    """What the reply holds beyond the defaults."""

    include: list[Include] = []


class Nothing(Struct, forbid_unknown_fields=True, frozen=True):
    """No parameters at all."""


TAKEN = {"takes_query": True}
"""The option of a handler that parses its query; below /v1 all others take none."""

IGNORED = frozenset({"beta", "api-version", "client_version"})
"""What clients name their versions in on every path: SDKs of beta features, clients of Azure, Codex."""


def parse(request: Request[Any, Any, Any], type_: type[Q]) -> Q:
    """The query of a request. Raises InvalidParameter, also for unknown names, and for those that are given twice."""
    values = _values(request)
    known = {field.name for field in msgspec.structs.fields(type_)}  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise unknown(name, suggestion(type_, "", name.partition("[")[0]))
    try:
        query = msgspec.convert(values, type_, strict=False)
    except msgspec.ValidationError as error:
        raise invalid(str(error), "", type_) from None
    for name in values:
        if getattr(query, name) is None:  # `null`, in any letters
            raise InvalidParameter(f"Invalid value for '{name}': null.", param=name)
    return query


def refuse_unless_taken(request: Request[Any, Any, Any]) -> None:
    """Raises InvalidParameter for a query of a handler that takes none."""
    if request.scope["query_string"] and not request.route_handler.opt.get("takes_query"):
        parse(request, Nothing)


def _values(request: Request[Any, Any, Any]) -> dict[str, Any]:
    """The values of a query by their names; arrays and maps put together."""
    values: dict[str, Any] = {}
    maps: dict[str, dict[str, Any]] = {}
    for name, value in request.query_params.multi_items():
        if "\0" in name + value:
            raise InvalidParameter("Query parameters may not contain NUL characters.", param=name.partition("[")[0])
        if name in IGNORED:
            continue
        base, _, key = name.removesuffix("]").partition("[")
        if base in LISTS:
            values.setdefault(base, []).append(value)
            continue
        is_of_map = base in MAPS and key
        holder, at = (maps.setdefault(base, {}), key) if is_of_map else (values, name)
        if at in holder:
            raise InvalidParameter(f"'{name}' is given twice.", param=base)
        holder[at] = value if is_of_map else _boolean(value)
    return {**maps, **values}


def _boolean(value: str) -> str | bool:
    """`true` and `false` as SDKs write them."""
    words: dict[str, Literal[True, False]] = {"true": True, "false": False}
    return words.get(value, value)
