"""The document: routes, operations and schemas put together."""

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec
from msgspec import Struct

from app import errors
from app.api.left_out import LEFT_OUT_FILES_HEADER, LEFT_OUT_ITEMS_HEADER, LEFT_OUT_TOOLS_HEADER
from app.api.openapi.contents import NAMES, compose, contents
from app.api.openapi.operations import OPERATIONS, PARAMETERS, TAGS, Operation
from app.api.openapi.routes import Route, routes
from app.api.openapi.schemas import RECEIVED, Schema, Schemas, pointer
from app.api.services import scope_of
from app.wire.resources import ErrorReply

DESCRIPTION = """\
Reprise speaks the OpenAI Responses API to any client, calls any Chat Completions server, and keeps every response in Postgres.
Clients of the OpenAI API use it with `base_url` set to `/v1` of this server.

**Keys.** As soon as the server has a key, every request below `/v1` needs one: `Authorization: Bearer KEY`. A key has scopes, which each
operation names; a GET needs `responses.read`, other methods need `responses.write`, the administration needs
`admin`, that of all tenants `operator`.

**Errors.** Every error is an object `error` with `message`, `type`, `param` and `code`; `param` is the path of the parameter that is wrong.
Unknown parameters are refused, never ignored. A 429 or 503 may be sent again, after `Retry-After`; `x-should-retry: false` says that no
retry can succeed, or that it would repeat work.

**Newer types.** Items and tools of types that this version does not know are kept and given back as they came. Later versions may add
keys to what is sent.
"""

DOCUMENT_VERSION = "3.1.1"

STREAM = "Server-sent events, each with this JSON as its data; `data: [DONE]` ends the stream."

_FRONT_DOOR = (408, 414, 431)
_ALWAYS = (400, 401, 403, *_FRONT_DOOR, 429, 500, 503)
_UPSTREAM = (424, 502, 504)

_REASONS = {
    400: "The request can't be served as it stands.",
    401: "The key is missing, unknown, revoked or expired.",
    403: "The key may not do this.",
    404: "There is nothing with this id, or it belongs to others.",
    408: "The request did not arrive in time.",
    413: "The body is too large.",
    414: "The request line is too long.",
    424: "Tools that the request asks for are not available.",
    429: "A limit is reached; try again later.",
    431: "The headers are too large.",
    500: "A bug in this server.",
    502: "The model's server failed.",
    503: "The server can't serve this now; try again.",
    504: "The model's server sent nothing for too long.",
}

_RATE_HEADERS = {
    f"x-ratelimit-{name}-{measure}": text.format(measure)
    for measure in ("requests", "tokens")
    for name, text in (
        ("limit", "How many {} a minute has, by the quota that leaves the least; absent without one."),
        ("remaining", "How many {} are left of it."),
        ("reset", "When all {} of it are there again, such as `1s` or `6m0s`."),
    )
}

_HEADERS = {
    **_RATE_HEADERS,
    "x-request-id": "The client's own id of the request, or one of this server; the log has it.",
    "Retry-After": "Seconds until a retry may succeed.",
    "x-should-retry": "`false` if no retry can succeed, or if it would repeat work.",
    LEFT_OUT_TOOLS_HEADER: "Types of declared tools that the model does not see, because no server here runs them.",
    LEFT_OUT_ITEMS_HEADER: "Types of items that the model does not see.",
    LEFT_OUT_FILES_HEADER: "Files of earlier items that are gone.",
    errors.RESPONSE_ID_HEADER: "The response that was made although its reply could not be sent.",
}


def document() -> Schema:
    """The whole document. Raises AssertionError for what has no description, or no route."""
    schemas = Schemas({"received": contents("received"), "sent": contents("sent")}, NAMES)
    compose(schemas)
    made = routes()
    assert {route.name for route in made} == OPERATIONS.keys(), "operations.py has a line for each route"
    paths: dict[str, Schema] = {}
    for route in sorted(made, key=lambda one: [*OPERATIONS].index(one.name)):
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, OPERATIONS[route.name], schemas)
    statuses = sorted({*_ALWAYS, *_UPSTREAM, 404, 413})
    whole = {
        "openapi": DOCUMENT_VERSION,
        "info": {
            "title": "Reprise",
            "version": "0.1.0",
            "description": DESCRIPTION,
            "license": {"name": "Apache 2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": name, "description": description} for name, description in TAGS.items()],
        "paths": paths,
        "components": {
            "securitySchemes": {
                "key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "A key of this server, or a JWT of an issuer that it trusts; it has scopes.",
                }
            },
            "headers": {
                name: {"description": text, "schema": {"type": "string"}} for name, text in sorted(_HEADERS.items())
            },
            "responses": {
                **{str(status): _error(status, schemas) for status in statuses},
                "4XX": _error_reply("An error of the model's server, passed on with its status.", schemas),
            },
            "schemas": schemas.components(),
        },
    }
    return _renamed(whole)


def encoded(document: Schema) -> bytes:
    """The document as it is stored and served: in lines, so that changes are readable."""
    return msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n"


# -- Operations --------------------------------------------------------------------------------------------------------------


def _operation(route: Route, operation: Operation, schemas: Schemas) -> Schema:
    needs_key = route.path.startswith("/v1/")
    scope = scope_of(route.options, route.method)
    scopes = [[scope] if scope else [], *([["admin"]] if route.options.get("or_admin") else [])]
    made: Schema = {
        "operationId": _operation_id(route, operation),
        "tags": [operation.tag],
        "summary": operation.summary,
        "description": " ".join(str(inspect.getdoc(route.handler.fn)).split()),
        "security": [{"key": needed} for needed in scopes] if needs_key else [],
    }
    if parameters := [*_path_parameters(route), *_query_parameters(operation, schemas)]:
        made["parameters"] = parameters
    if operation.takes:
        made["requestBody"] = _body(operation, operation.takes, schemas)
    made["responses"] = {"200": _reply(operation, schemas)}
    for status in _statuses(route, operation):
        made["responses"][str(status)] = {"$ref": f"#/components/responses/{status}"}
    return made


def _operation_id(route: Route, operation: Operation) -> str:
    """`chat.completions.create`, as the SDKs name methods: the resource, then what is done."""
    steps = [step for step in route.path.split("/") if step and "{" not in step]
    if steps[:1] != ["v1"]:
        return route.handler.fn.__name__
    verb = operation.summary.partition(" ")[0].lower()
    return ".".join([*steps[1:], *([verb] if steps[-1] != verb else [])])


def _path_parameters(route: Route) -> Iterator[Schema]:
    for name in re.findall(r"{(\w+)}", route.path):
        schema = {"type": "string", "minLength": 1}
        yield {"name": name, "in": "path", "required": True, "description": PARAMETERS[name], "schema": schema}


def _query_parameters(operation: Operation, schemas: Schemas) -> Iterator[Schema]:
    for one in msgspec.structs.fields(operation.query):
        schema = schemas.of(one.type, "received")
        if isinstance(one.default, str | int) and one.default is not False:
            schema["default"] = one.default
        if "null" in schema.get("type", ()):
            schema["type"] = next(type_ for type_ in schema["type"] if type_ != "null")
        if "enum" in schema:
            schema["enum"] = [value for value in schema["enum"] if value is not None]
        made: Schema = {"name": one.name, "in": "query", "description": PARAMETERS[one.name], "schema": schema}
        if schema.get("type") == "object":
            made |= {"style": "deepObject", "explode": True}
        yield made


def _body(operation: Operation, type_: type[Struct], schemas: Schemas) -> Schema:
    content: Schema = {"schema": schemas.of(type_, "received")}
    if operation.examples:
        content["examples"] = {
            _key(name): {"summary": name, "value": value} for name, value in operation.examples.items()
        }
    media = "multipart/form-data" if operation.form else "application/json"
    is_needed = operation.calls or any(
        one.required for one in msgspec.structs.fields(type_)
    )  # else an empty one is `{}`
    return {"required": is_needed, "content": {media: content}}


def _key(name: str) -> str:
    return re.sub(r"\W+", "_", name.lower())


def _reply(operation: Operation, schemas: Schemas) -> Schema:
    headers = ["x-request-id"]
    if operation.takes and operation.calls:
        headers += [LEFT_OUT_TOOLS_HEADER, LEFT_OUT_ITEMS_HEADER, LEFT_OUT_FILES_HEADER, *_RATE_HEADERS]
    return {
        "description": STREAM if operation.events else "It is done.",
        "headers": _header_references(headers),
        "content": dict(_contents_of_reply(operation, schemas)),
    }


def _contents_of_reply(operation: Operation, schemas: Schemas) -> Iterator[tuple[str, Schema]]:
    match operation.sends:
        case "application/json":
            yield "application/json", {"schema": {"type": "object"}}
        case "application/octet-stream" as media:
            yield media, {"schema": {"type": "string", "format": "binary"}}
        case str(media):
            yield media, {"schema": {"type": "string"}}
        case type_:
            yield "application/json", {"schema": schemas.of(type_, "sent")}
    if operation.or_sends:
        yield operation.or_sends, {"schema": {"type": "string"}}
    if operation.events:
        yield "text/event-stream", {"schema": pointer(operation.events)}


# -- Errors ------------------------------------------------------------------------------------------------------------------


def _statuses(route: Route, operation: Operation) -> Iterable[int | str]:
    if not route.path.startswith("/v1/"):
        return [503] if route.path == "/readyz" else []
    found: set[int] = {*_ALWAYS}
    if "{" in route.path or operation.calls:
        found.add(404)
    if operation.takes:
        found.add(413)
    if operation.calls:
        found |= {*_UPSTREAM}
    return [*sorted(found), *(["4XX"] if operation.calls else [])]


def _error(status: int, schemas: Schemas) -> Schema:
    codes = {error.code: error for error in _below(errors.ApiError) if error.status == status and error.code}
    listed = [f"- `{code}`: {_first_sentence(error)}" for code, error in sorted(codes.items())]
    return _error_reply("\n".join([_REASONS[status], *([""] if listed else []), *listed]), schemas)


def _error_reply(description: str, schemas: Schemas) -> Schema:
    headers = ["x-request-id", "Retry-After", "x-should-retry", errors.RESPONSE_ID_HEADER]
    return {
        "description": description,
        "headers": _header_references(headers),
        "content": {"application/json": {"schema": schemas.of(ErrorReply, "sent")}},
    }


def _header_references(names: Iterable[str]) -> Schema:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _below(error: type[errors.ApiError]) -> Iterator[type[errors.ApiError]]:
    for one in error.__subclasses__():
        yield one
        yield from _below(one)


def _first_sentence(error: type[errors.ApiError]) -> str:
    return " ".join(str(inspect.getdoc(error)).split("\n\n", maxsplit=1)[0].split())


# -- Names -------------------------------------------------------------------------------------------------------------------


def _renamed(whole: Schema) -> Schema:
    """What is received only needs no mark in its name."""
    schemas: Mapping[str, Any] = whole["components"]["schemas"]
    names = {
        name: name.removesuffix(RECEIVED)
        for name in schemas
        if name.endswith(RECEIVED) and name.removesuffix(RECEIVED) not in schemas
    }

    def renamed(value: Any) -> Any:
        match value:
            case dict():
                return {key: renamed(one) for key, one in value.items()}
            case list():
                return [renamed(one) for one in value]
            case str() if value.startswith("#/components/schemas/"):
                head, _, name = value.rpartition("/")
                return f"{head}/{names.get(name, name)}"
        return value

    whole = renamed(whole)
    whole["components"]["schemas"] = {
        names.get(name, name): schema for name, schema in whole["components"]["schemas"].items()
    }
    return whole
