"""The keys and values that a Struct declares, looked up in its types: to suggest the right one, and to leave out keys of a newer
version."""

import difflib
import re
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache
from typing import Any

from msgspec import inspect

LIKENESS = 0.7
"""Of two names, from 0 to 1; below it nothing is suggested."""

MISSPELT = 0.85
"""A name as like as this to a known one is that one, misspelt; others may be of a newer version."""

NAME_CHARS_MAX = 64
"""A longer name resembles none of the API's, and is slow to compare."""

TYPES_REMEMBERED = 1024
"""Unknown types that have been compared with the known ones, which takes ten times as long as decoding an item."""

_STEP = re.compile(r"\.(?P<key>[^.\[\]]+)|\[")


@cache
def _type(type_: Any) -> inspect.Type:
    return inspect.type_info(type_)


_TYPE = re.compile(rf"[A-Za-z][A-Za-z0-9_.-]{{0,{NAME_CHARS_MAX - 1}}}")


def may_be_newer(type_: str, known: tuple[str, ...]) -> bool:
    """Whether an unknown type may be one of a newer version of the API, and is not a known one that is misspelt."""
    return bool(_TYPE.fullmatch(type_)) and not _is_misspelt(type_, known)


@lru_cache(TYPES_REMEMBERED)
def _is_misspelt(type_: str, known: tuple[str, ...]) -> bool:
    return nearest(type_, known, MISSPELT) is not None


def nearest(name: str, known: Iterable[str], likeness: float = LIKENESS) -> str | None:
    """The one of the known names that a name resembles."""
    if len(name) > NAME_CHARS_MAX:
        return None
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=likeness)
    return near[0] if near else None


def suggestion(type_: Any, path: str, name: str) -> str | None:
    """The declared key that an unknown key `name` resembles; `path` leads from `type_` to the object that holds it."""
    places = _places(type_, path)
    return nearest(
        name, [field.encode_name for place in places if isinstance(place, inspect.StructType) for field in place.fields]
    )


def choices(type_: Any, path: str) -> list[str]:
    """The strings that are allowed at a path."""
    literals = [place for place in _places(type_, path) if isinstance(place, inspect.LiteralType)]
    return sorted(str(value) for literal in literals for value in literal.values)


def _places(type_: Any, path: str) -> list[inspect.Type]:
    """The types at a path."""
    places = list(_members(_type(type_)))
    for step in _STEP.finditer(path):
        places = [member for place in places for inner in _below(place, step["key"]) for member in _members(inner)]
    return places


def _members(type_: inspect.Type) -> Iterator[inspect.Type]:
    """A union's types, and any other type alone, without annotations."""
    if isinstance(type_, inspect.UnionType):
        for member in type_.types:
            yield from _members(member)
    elif isinstance(type_, inspect.Metadata):
        yield from _members(type_.type)
    else:
        yield type_


def _below(place: inspect.Type, key: str | None) -> list[inspect.Type]:
    match place:
        case inspect.StructType(tag_field=str(tag_field), tag=tag) if tag_field == key:
            return [inspect.LiteralType((tag,))]
        case inspect.StructType(fields=fields):
            return [field.type for field in fields if field.encode_name == key]
        case (
            inspect.ListType(item_type=item)
            | inspect.FrozenSetType(item_type=item)
            | inspect.VarTupleType(item_type=item)
        ):
            return [item]
        case inspect.DictType(value_type=value):
            return [value]
    return []


def without_unknown(value: Any, type_: Any) -> Any:
    """Plain JSON without the keys that its type does not declare; time is linear in its size."""
    return _pruned(value, list(_members(_type(type_))))


def _pruned(value: Any, members: list[inspect.Type]) -> Any:
    match value:
        case dict():
            return _pruned_object(value, members)
        case list():
            item = next((list(_members(one.item_type)) for one in members if isinstance(one, inspect.ListType)), [])
            return [_pruned(one, item) for one in value] if item else value
    return value


def _pruned_object(value: dict[str, Any], members: list[inspect.Type]) -> dict[str, Any]:
    structs = [member for member in members if isinstance(member, inspect.StructType)]
    tagged = [struct for struct in structs if struct.tag_field and value.get(struct.tag_field) == struct.tag]
    found = next(iter(tagged or structs), None)
    if found is None:
        values = next((list(_members(one.value_type)) for one in members if isinstance(one, inspect.DictType)), [])
        return {key: _pruned(one, values) for key, one in value.items()} if values else value
    types = {field.encode_name: list(_members(field.type)) for field in found.fields}
    if found.tag_field:
        types[found.tag_field] = []
    return {key: _pruned(one, types[key]) for key, one in value.items() if key in types}
