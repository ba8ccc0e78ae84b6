"""Structs → JSON Schemas.

A Struct is described twice where it is both received and sent: what is received may leave out keys and has no others; what is
sent has all keys, and may have others in later versions.

msgspec makes the schemas, of mirrors: Structs of the same fields, in which `contents` says what raw JSON holds.
"""

import ast
import inspect
import textwrap
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType, defstruct, field

Direction = Literal["received", "sent"]
Schema = dict[str, Any]
Field = tuple[type[Struct], str]
"""A Struct, and the name of its field."""

RECEIVED = "Param"
"""Ends the name of a schema of what is received, if there is another of what is sent."""

FIRST = frozenset({"id", "object", "role", "model", "input", "messages", "instructions"})
"""Names of the fields that people look for first."""

_PREFIX = "#/components/schemas/"


def name_of(name: str, direction: Direction) -> str:
    """The name of a component."""
    return name + (RECEIVED if direction == "received" else "")


def pointer(name: str) -> Schema:
    """The schema that refers to a component."""
    return {"$ref": _PREFIX + name}


def reference(name: str, direction: Direction) -> Any:
    """A type that stands for a component which is composed."""
    return exactly(pointer(name_of(name, direction)))


def exactly(schema: Schema) -> Any:
    """A type that stands for this schema."""
    return Annotated[Any, Meta(extra_json_schema=schema)]


class Schemas:
    """The schemas of a document, gathered while it is made."""

    def __init__(self, contents: Mapping[Direction, Mapping[Field, Any]], names: Mapping[type[Struct], str]) -> None:
        """`contents` has the types of fields of raw JSON, and of tags that may be left out; `names` has those of components whose Structs have others."""
        self._contents, self._names = contents, names
        self._mirrors: dict[tuple[type[Struct], Direction, str], type[Struct]] = {}
        self._composed: dict[str, Schema] = {}
        self._alone: set[str] = set()
        """Components that stand in no union somewhere: what is received may leave out their tags."""

    def of(self, type_: Any, direction: Direction) -> Schema:
        """The schema of any type; Structs are components."""
        [schema], _ = msgspec.json.schema_components(
            [self._mirrored(type_, direction)], ref_template=_PREFIX + "{name}"
        )
        tidied: Schema = _tidied(schema, direction)
        return tidied

    def add(
        self, struct: type[Struct], direction: Direction, *, tag: str = "", name: str = "", may_have: str = ""
    ) -> str:
        """The name of the component of a Struct. It may be given a `tag`, a `name`, and a text that it `may_have` beside its fields."""
        return self._mirror(struct, direction, tag, name, may_have).__name__

    def compose(self, name: str, schema: Schema) -> None:
        """Add a component that is no Struct's."""
        assert name not in self._composed
        self._composed[name] = schema

    def components(self) -> dict[str, Schema]:
        """All of them by their names."""
        mirrors = self._mirrors.values()
        names = [mirror.__name__ for mirror in mirrors]
        assert len(names) == len(set(names)), sorted(name for name in set(names) if names.count(name) > 1)
        _, made = msgspec.json.schema_components(mirrors, ref_template=_PREFIX + "{name}")
        directions = {mirror.__name__: key[1] for key, mirror in self._mirrors.items()}
        found = {name: _tidied(schema, directions[name]) for name, schema in made.items()}
        for name in self._alone:
            found[name]["required"] = [
                key for key in found[name]["required"] if "const" not in found[name]["properties"][key]
            ]
        return dict(sorted({**found, **self._composed}.items()))

    def _mirror(
        self, struct: type[Struct], direction: Direction, tag: str = "", name: str = "", may_have: str = ""
    ) -> type[Struct]:
        key = (struct, direction, tag or name)
        if key not in self._mirrors:
            self._mirrors[key] = self._made_mirror(struct, direction, tag, name, may_have)
        return self._mirrors[key]

    def _made_mirror(
        self, struct: type[Struct], direction: Direction, tag: str, name: str, may_have: str
    ) -> type[Struct]:
        config, types = struct.__struct_config__, self._contents[direction]
        tag, tag_field = tag or str(config.tag or ""), config.tag_field or "type"
        fields: list[Any] = [(may_have, str, field(default=UNSET))] if may_have else []
        if tag and (struct, tag_field) in types:
            tag = ""
            fields.append((tag_field, types[struct, tag_field], field(default=UNSET)))
        docs = documented(struct)
        for one in sorted(msgspec.structs.fields(struct), key=lambda one: one.name not in FIRST):
            if tag and one.encode_name == tag_field:
                continue
            type_ = types.get((struct, one.name), one.type)
            assert Raw not in _parts_of(type_), f"contents.py does not say what {struct.__name__}.{one.name} holds"
            mirrored = self._mirrored(type_, direction)
            if one.name in docs:
                mirrored = Annotated[mirrored, Meta(description=docs[one.name])]
            may_lack = config.omit_defaults or one.default is UNSET or UnsetType in _parts_of(one.type)
            always = one.required if direction == "received" else one.required or not may_lack
            default = one.default if isinstance(one.default, str | int | float | bool) else UNSET
            settings = {} if always else {"default": default}
            fields.append((one.name, mirrored, field(name=one.encode_name, **settings)))
        return defstruct(
            name_of(name or self._names.get(struct) or struct.__name__.lstrip("_"), direction),
            fields,
            tag=tag or None,
            tag_field=tag_field if tag else None,
            forbid_unknown_fields=direction == "received" and config.forbid_unknown_fields,
            kw_only=True,
            namespace={"__doc__": _unwrapped(struct.__doc__ or "")},
        )

    def _mirrored(self, type_: Any, direction: Direction, *, alone: bool = True) -> Any:
        """A type with mirrors in the places of Structs. They stand `alone` unless they are members of a union."""
        if isinstance(type_, type) and issubclass(type_, Struct):
            mirror = self._mirror(type_, direction)
            if alone and direction == "received" and mirror.__struct_config__.tag:
                self._alone.add(mirror.__name__)
            return mirror
        origin, arguments = get_origin(type_), get_args(type_)
        if origin is None or origin is Literal:
            return type_
        if origin is Annotated:
            return Annotated[self._mirrored(arguments[0], direction, alone=alone), *type_.__metadata__]
        alone = sum(isinstance(one, type) and issubclass(one, Struct) for one in arguments) < 2
        inner = tuple(self._mirrored(one, direction, alone=alone) for one in arguments)
        return Union[inner] if origin in {Union, UnionType} else origin[inner]  # noqa: UP007


def _parts_of(type_: Any) -> set[Any]:
    """Every type in a type."""
    arguments = [] if get_origin(type_) is Literal else get_args(type_)
    return {type_} if not arguments else set().union(*(_parts_of(one) for one in arguments))


def _tidied(schema: Any, direction: Direction) -> Any:
    """As people like to read it: types with null in short, constants as such."""
    if isinstance(schema, list):
        return [_tidied(one, direction) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {
        key: {name: _tidied(one, direction) for name, one in value.items()}
        if key == "properties"
        else value
        if key in {"default", "enum", "const", "mapping"}
        else _tidied(value, direction)
        for key, value in schema.items()
        if key != "title" and not (key == "default" and direction == "sent") and not (key == "required" and not value)
    }
    if "discriminator" in made:
        made["oneOf"] = made.pop("anyOf")
        made["required"] = [made["discriminator"]["propertyName"]]
    if "enum" in made and all(isinstance(value, str) for value in made["enum"]):
        made = {"type": "string", **made}
    match made.get("anyOf"):
        case [only]:
            made = {**only, **_without_any_of(made)}
        case [{"type": str(type_)} as one, {"type": "null"}]:
            made = {**one, **_without_any_of(made), "type": [type_, "null"]}
            if "const" in made:
                made["enum"] = [made.pop("const")]
            if "enum" in made:
                made["enum"] = [*made["enum"], None]
    if len(made.get("enum", ())) == 1:
        made["const"] = made.pop("enum")[0]
    return made


def _without_any_of(schema: Schema) -> Schema:
    return {key: value for key, value in schema.items() if key != "anyOf"}


@cache
def documented(struct: type[Struct]) -> Mapping[str, str]:
    """What the texts below its fields say of them."""
    found: dict[str, str] = {}
    for base in reversed(struct.__mro__):
        try:
            [tree] = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        except (OSError, TypeError):  # it was not written but made
            continue
        body = tree.body if isinstance(tree, ast.ClassDef) else []
        for one, after in pairwise(body):
            match one, after:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = _unwrapped(text)
    return found


def _unwrapped(text: str) -> str:
    """A docstring whose paragraphs are lines."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n")).strip()
