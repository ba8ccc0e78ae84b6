"""The keys and values that a Struct declares, looked up in its types: to suggest the right one, and to leave out keys of a newer
version."""

import difflib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, lru_cache
from typing import Any, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Raw, inspect

LIKENESS = 0.7
"""Of two names, from 0 to 1; below it nothing is suggested."""

MISSPELT = 0.85
"""A name as like as this to a known one is that one, misspelt; others may be of a newer version."""

NAME_CHARS_MAX = 64
"""A longer name resembles none of the API's, and is slow to compare."""

KEYS_SEARCHED_MAX = 1_000
"""Of one object: for the key of a wrong value."""

TYPES_REMEMBERED = 1024
"""Unknown types that have been compared with the known ones, which takes ten times as long as decoding an item."""

_STEP = re.compile(r"\.(?P<key>[^.\[\]]+)|\[(?P<index>\d+)?")
_KEYS = msgspec.json.Decoder(dict[str, Raw])
_ROWS = msgspec.json.Decoder(list[Raw])


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


def suggestion(type_: Any, path: str, name: str, raw: bytes | Raw | None = None) -> str | None:
    """The declared key that an unknown key `name` resembles; `path` leads from `type_` to the object that holds it, in `raw` if that is
    given."""
    places, held = _places(type_, path, raw)
    structs = [place for place in _tagged(places, held) if isinstance(place, inspect.StructType)]
    return nearest(name, [field.encode_name for struct in structs for field in struct.fields])


def choices(type_: Any, path: str, raw: bytes | Raw | None = None) -> list[str]:
    """The strings that are allowed at a path, in `raw` if that is given."""
    places, _ = _places(type_, path, raw)
    literals = [place for place in places if isinstance(place, inspect.LiteralType)]
    return sorted({str(value) for literal in literals for value in literal.values})


def wrong_value(type_: Any, path: str, raw: bytes | Raw) -> tuple[str, Any, Raw, str] | None:
    """Of the object at a path whose keys may be any: the first key whose value is wrong, the value's type, the value, and what is wrong
    with it."""
    before, _, name = path.rpartition(".")
    places, held = _places(type_, before, raw)
    structs = [place for place in _tagged(places, held) if isinstance(place, inspect.StructType)]
    given = _inner(held, name, None)
    hints = (get_type_hints(struct.cls, include_extras=True).get(name) for struct in structs)
    values = next((found for hint in hints if (found := _values(hint))), None)
    if values is None or given is None or not bytes(given).startswith(b"{"):
        return None
    decoder = msgspec.json.Decoder(values)
    for key, value in itertools.islice(_KEYS.decode(given).items(), KEYS_SEARCHED_MAX):
        try:
            decoder.decode(value)
        except msgspec.ValidationError as error:
            return key, values, value, str(error)
    return None


def _values(hint: Any) -> Any:
    """The type of the values of a `dict` among the types of a hint."""
    if get_origin(hint) is dict:
        return get_args(hint)[1]
    return next((found for inner in get_args(hint) if (found := _values(inner))), None)


def _places(type_: Any, path: str, raw: bytes | Raw | None = None) -> tuple[list[inspect.Type], bytes | Raw | None]:
    """The types at a path, and what stands there in `raw`."""
    places = list(_members(_type(type_)))
    for step in _STEP.finditer(path):
        holders = _tagged(places, raw)
        places = [member for place in holders for inner in _below(place, step["key"]) for member in _members(inner)]
        raw = _inner(raw, step["key"], step["index"])
    return places, raw


def _inner(raw: bytes | Raw | None, key: str | None, index: str | None) -> Raw | None:
    """What an object has under a key, or an array at an index."""
    try:
        if raw is None or not (key or index):
            return None
        return _KEYS.decode(raw).get(key) if key else _ROWS.decode(raw)[int(index or 0)]
    except (msgspec.DecodeError, IndexError):
        return None


def _tagged(places: Sequence[inspect.Type], raw: bytes | Raw | None) -> Sequence[inspect.Type]:
    """Those of a union's types that the tag of `raw` names; all without one."""
    fields = {place.tag_field for place in places if isinstance(place, inspect.StructType) and place.tag_field}
    if len(places) < 2 or not fields or raw is None:
        return places
    tags = {field: msgspec.json.decode(_inner(raw, field, None) or b"null") for field in fields}
    named = [
        place
        for place in places
        if isinstance(place, inspect.StructType) and place.tag_field and tags[place.tag_field] == place.tag
    ]
    return named or places


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
