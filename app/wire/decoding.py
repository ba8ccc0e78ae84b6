"""Bytes → Struct, or the 400 that names the parameter's path."""

import re
from typing import Any, TypeVar

import msgspec

from app.errors import InvalidParameter, InvalidRequest

T = TypeVar("T")

_AT = re.compile(r" - at `(?:key` in `)?\$(?P<path>[^`]*?)(?:\[\.\.\.\])?`$")
_MISSING = re.compile(r"^Object missing required field `(?P<name>[^`]+)`$")
_TYPE = re.compile(r"^Expected `(?P<want>[^`]+)`, got `(?P<got>[^`]+)`$")
_ENUM = re.compile(r"^Invalid (?:enum )?value '?(?P<value>[^']*)'?$")

Json = dict[str, Any]
"""A JSON object that we carry and do not read."""


def join(base: str, path: str) -> str:
    """`input[0]` + `.content[1]` → `input[0].content[1]`."""
    return (base + path) if base else path.removeprefix(".")


def decode(decoder: msgspec.json.Decoder[T], raw: bytes | msgspec.Raw, at: str = "") -> T:
    """Decode; `at` is the path of `raw` inside the body. Raises InvalidParameter, or InvalidRequest for bad JSON."""
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        raise invalid(str(error), at) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"We could not parse the JSON body of your request: {error}.", param=at or None) from None
    except RecursionError:
        raise InvalidRequest("The JSON body of your request is nested too deeply.", param=at or None) from None


def invalid(message: str, at: str) -> InvalidParameter:
    """A message of msgspec → the 400 that names the parameter; `at` is the path of what was decoded."""
    found = _AT.search(message)
    path = join(at, found["path"]) if found else at
    detail = message[: found.start()] if found else message
    if missing := _MISSING.match(detail):
        path = join(path, f".{missing['name']}")
        return InvalidParameter(f"Missing required parameter: '{path}'.", param=path, code="missing_required_parameter")
    name = path or "body"
    if wrong := _TYPE.match(detail):
        return InvalidParameter(
            f"Invalid type for '{name}': expected {_said(wrong['want'])}, got {_said(wrong['got'])} instead.",
            param=path or None,
            code="invalid_type",
        )
    if enum := _ENUM.match(detail):
        return InvalidParameter(f"Invalid value for '{name}': '{enum['value']}'.", param=path or None)
    return InvalidParameter(f"Invalid value for '{name}': {detail}.", param=path or None)


_NAMES = {
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "bool": "a boolean",
    "array": "an array",
    "object": "an object",
    "null": "null",
}


def _said(types: str) -> str:
    return " or ".join(_NAMES.get(name.strip(), name.strip()) for name in types.split("|"))
