"""Bytes → Struct, or the 400 that names the parameter's path."""

import codecs
import itertools
import re
from collections.abc import Iterable
from typing import Any, TypeVar

import msgspec

from app.errors import InvalidParameter, InvalidRequest, shortened
from app.wire.keys import choices, nearest, suggestion, without_unknown, wrong_value

T = TypeVar("T")

_AT = re.compile(r" - at `(?P<key>key` in `)?\$(?P<path>[^`]*?)(?P<value>\[\.\.\.\])?`$")
_MISSING = re.compile(r"^Object missing required field `(?P<name>[^`]+)`$")
_UNKNOWN = re.compile(r"^Object contains unknown field `(?P<name>.*)`$", re.DOTALL)
_TYPE = re.compile(r"^Expected `(?P<want>[^`]+)`, got `(?P<got>[^`]+)`$")
_RULE = re.compile(r"^Expected `(?P<want>\w+)`(?P<rule>.*)$", re.DOTALL)
_ENUM = re.compile(r"^Invalid (?:enum )?value '?(?P<value>[^']*)'?$")

Json = dict[str, Any]
"""A JSON object that we carry and do not read."""

NESTING_MAX = 128
"""Arrays and objects inside each other. What is taken must be writable: the encoders of tools and of Postgres crash at less depth
than decoders."""

_OBJECT = msgspec.json.Decoder(Json)
_PIECE_BYTES = 1 << 18
_STEPS = bytes.maketrans(b"[{]}", bytes([1, 1, 255, 255]))
_NO_STEPS = bytes(set(range(256)) - set(b'[{]}"'))


def join(base: str, path: str) -> str:
    """`input[0]` + `.content[1]` → `input[0].content[1]`."""
    return (base + path) if base else path.removeprefix(".")


def decode(decoder: msgspec.json.Decoder[T], raw: bytes | msgspec.Raw, at: str = "") -> T:
    """Decode; `at` is the path of `raw` inside the body. Raises InvalidParameter, or InvalidRequest for bad JSON."""
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        raise invalid(str(error), at, decoder.type, raw) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"We could not parse the JSON body of your request: {error}.", param=at or None) from None
    except RecursionError:
        raise InvalidRequest("The JSON body of your request is nested too deeply.", param=at or None) from None


def decode_stored(decoder: msgspec.json.Decoder[T], raw: bytes | str | msgspec.Raw) -> T:
    """Decode what a server has stored, perhaps one of a newer version: keys that are unknown here are left out.

    Raises msgspec.DecodeError for what no version has stored.
    """
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError:
        return decoder.decode(msgspec.json.encode(without_unknown(msgspec.json.decode(raw), decoder.type)))


def json_object(text: str) -> Json | None:
    """A JSON object; None for any other text, and for one that nests too deeply."""
    raw = text.encode()
    if nests_too_deeply(raw):
        return None
    try:
        return _OBJECT.decode(raw)
    except msgspec.DecodeError:
        return None


def check_text(raw: bytes) -> None:
    """Raises InvalidRequest for a body that is not UTF-8, also in what is not decoded, or that nests too deeply."""
    if not raw.isascii():
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            for at in range(0, len(raw), _PIECE_BYTES):
                decoder.decode(raw[at : at + _PIECE_BYTES])
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"We could not parse the JSON body of your request: {error.reason}.") from None
    if nests_too_deeply(raw):
        raise InvalidRequest(
            f"The JSON body of your request is nested too deeply: at most {NESTING_MAX} arrays and objects inside each other."
        )


def nests_too_deeply(raw: bytes) -> bool:
    """Whether JSON nests deeper than NESTING_MAX. The result means nothing for what is not JSON."""
    if raw.count(b"[") + raw.count(b"{") <= NESTING_MAX:
        return False
    depth, in_string, at = 0, False, 0
    while at < len(raw):  # piece by piece, so that other threads run in between
        piece = raw[at : at + _PIECE_BYTES]
        if (len(piece) - len(piece.rstrip(b"\\"))) % 2:
            piece = piece[:-1] or piece  # an escape is not cut in two
        at += len(piece)
        if b"\\" in piece:
            piece = piece.replace(b"\\\\", b"").replace(b'\\"', b"")
        parts = piece.translate(_STEPS, _NO_STEPS).split(b'"')
        brackets = b"".join(parts[in_string::2])
        depths = list(itertools.accumulate(memoryview(brackets).cast("b"), initial=depth))
        if max(depths) > NESTING_MAX:
            return True
        depth = depths[-1]
        in_string ^= len(parts) % 2 == 0
    return False


def missing(path: str) -> InvalidParameter:
    """The 400 for a required key that is absent."""
    return InvalidParameter(f"Missing required parameter: '{path}'.", param=path, code="missing_required_parameter")


def did_you_mean(near: str | None) -> str:
    """What an error's message ends with where a name resembles a known one."""
    return f" Did you mean '{near}'?" if near else ""


def unknown(path: str, near: str | None) -> InvalidParameter:
    """The 400 for a key that is not declared; `near` is the path of the one that may be meant."""
    return InvalidParameter(f"Unknown parameter: '{path}'.{did_you_mean(near)}", param=path, code="unknown_parameter")


def not_among(path: str, value: str, known: Iterable[str]) -> InvalidParameter:
    """The 400 for a value that is not among the known ones."""
    known = tuple(known)
    listed = ", ".join(f"'{one}'" for one in known)
    supported = f" Supported values are: {listed}." if known else ""
    message = f"Invalid value for '{path}': '{value}'.{supported}{did_you_mean(nearest(value, known))}"
    return InvalidParameter(message, param=path)


def invalid(message: str, at: str, type_: Any = None, raw: bytes | msgspec.Raw | None = None) -> InvalidParameter:
    """A message of msgspec → the 400 that names the parameter; `at` is the path of what was decoded, as `type_` and of `raw`."""
    message = shortened(message)
    found = _AT.search(message)
    below = found["path"] if found else ""
    path = join(at, below)
    if found and found["value"] and raw is not None and (wrong := wrong_value(type_, below, raw)):
        key, values, value, why = wrong
        return invalid(why, shortened(join(path, f".{key}")), values, value)
    detail = message[: found.start()] if found else message
    if absent := _MISSING.match(detail):
        return missing(join(path, f".{absent['name']}"))
    if extra := _UNKNOWN.match(detail):
        near = suggestion(type_, below, extra["name"], raw) if type_ else None
        return unknown(join(path, f".{extra['name']}"), near and join(path, f".{near}"))
    name = path or "body"
    if wrong_type := _TYPE.match(detail):
        return InvalidParameter(
            f"Invalid type for '{name}': expected {_type_names(wrong_type['want'])}, got {_type_names(wrong_type['got'])} instead.",
            param=path or None,
            code="invalid_type",
        )
    if enum := _ENUM.match(detail):
        return not_among(path, enum["value"], choices(type_, below, raw) if type_ else ())
    of_key = "a key is wrong: " if found and found["key"] else ""
    return InvalidParameter(f"Invalid value for '{name}': {of_key}{_rule(detail)}.", param=path or None)


def _rule(detail: str) -> str:
    """What a value has to be, in the words of the other errors."""
    if detail == "Invalid RFC3339 encoded date":
        return "expected a day like 2026-11-27"
    rule = _RULE.match(detail)
    return f"expected {_type_names(rule['want'])}{rule['rule']}" if rule else detail


_NAMES = {
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "bool": "a boolean",
    "array": "an array",
    "object": "an object",
    "null": "null",
}


def _type_names(types: str) -> str:
    return " or ".join(_NAMES.get(name.strip(), name.strip()) for name in types.split("|"))
