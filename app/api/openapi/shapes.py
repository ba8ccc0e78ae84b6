"""Bodies and replies that the wire format has no Struct of."""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, defstruct
from msgspec.structs import fields

from app.api.openapi.schemas import documented
from app.domain import agents
from app.wire import compactions, files, requests, resources


def page_of(type_: Any, name: str = "") -> type[Struct]:
    """A page of a list of these."""
    of = {"data": list[type_]}
    return defstruct(
        name or f"{type_.__name__}List",
        [
            (one.name, of.get(one.name, one.type), *([] if one.required else [one.default]))
            for one in fields(resources.Page)
        ],
        namespace={"__doc__": resources.Page.__doc__},
    )


def _some_of(names: frozenset[str], name: str, doc: str, **more: Any) -> type[Struct]:
    """A body with only some parameters of a create."""
    taken = [
        (one.name, _documented(requests.Body, one.name, one.type), one.default)
        for one in fields(requests.Body)
        if one.name in names
    ]
    own = [(key, type_, None) for key, type_ in more.items()]
    return defstruct(name, [*taken, *own], forbid_unknown_fields=True, namespace={"__doc__": doc})


def _documented(struct: type[Struct], name: str, type_: Any) -> Any:
    """The type of a field, with what the text below the field says of it."""
    text = documented(struct).get(name)
    return Annotated[type_, Meta(description=text)] if text else type_


CountTokens = _some_of(
    requests.COUNTED, "CountTokens", "Those parameters of a create that shape its prompt.", personality=str | None
)
Compact = _some_of(compactions.PARAMETERS, "Compact", "The context that is compacted.")
PARTIAL = (CountTokens, Compact)


UpdateAgent = defstruct(
    "UpdateAgent",
    [
        (one.name, _documented(agents.CreateAgent, one.name, one.type | None), None)
        for one in fields(agents.CreateAgent)
    ],
    forbid_unknown_fields=True,
    namespace={"__doc__": "What is replaced of an agent; null for what it is by default."},
)


class Upload(Struct):
    """The form of an upload."""

    file: bytes
    purpose: files.Purpose


class ChatMessageOf(Struct):
    """A message of a stored completion's request, as Chat Completions has it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
