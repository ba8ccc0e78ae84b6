"""Instances of JSON schemas: pure. `pattern`, `uniqueItems` and conditions are not looked at."""

import contextlib
import math
import re
from collections.abc import Sequence
from typing import Any

JsonSchema = dict[str, Any]

FORMATS = {
    "date": "2025-01-31",
    "date-time": "2025-01-31T12:00:00Z",
    "duration": "P1D",
    "email": "demo@example.com",
    "hostname": "example.com",
    "ipv4": "127.0.0.1",
    "ipv6": "::1",
    "time": "12:00:00Z",
    "uri": "https://example.com/",
    "uuid": "00000000-0000-4000-8000-000000000000",
}


class EndlessError(Exception):
    """This part of a recursive schema has no end; another must be taken."""


def instance(schema: JsonSchema, text: str) -> Any:
    """A value that satisfies the schema, made from the text where it fits; None where no value ends."""
    try:
        return Filler(schema, text).value(schema, frozenset({"#"}))
    except EndlessError:
        return None


class Filler:
    """Makes values for the parts of one schema; `path` holds the references being followed, to see recursion."""

    def __init__(self, root: JsonSchema, text: str) -> None:
        """`root` is what references point into."""
        self.root = root
        self.text = text

    def value(self, schema: Any, path: frozenset[str]) -> Any:
        """A value for a schema anywhere in the root, where `true` allows everything."""
        if not isinstance(schema, dict):
            return self.text
        key = next((key for key in ("$ref", "allOf", "anyOf", "oneOf") if key in schema), None)
        if key is None:
            return self.plain(schema, path)
        found, rest = schema[key], {name: value for name, value in schema.items() if name != key}
        if key == "$ref":
            if found in path:
                raise EndlessError
            return self.value(merged([self.target(found), rest]), path | {found})
        if key == "allOf":
            return self.value(merged([*found, rest]), path)
        return self.first([merged([choice, rest]) for choice in found], path)

    def first(self, choices: Sequence[JsonSchema], path: frozenset[str]) -> Any:
        """A value for the first choice that has an end."""
        for choice in choices:
            with contextlib.suppress(EndlessError):
                return self.value(choice, path)
        raise EndlessError

    def plain(self, schema: JsonSchema, path: frozenset[str]) -> Any:
        """A value for a schema without references and branches."""
        for key in ("const", "default"):
            if key in schema:
                return schema[key]
        if options := schema.get("enum"):
            spoken = [one for one in options if isinstance(one, str) and one.lower() in self.text.lower()]
            return (spoken or options)[0]
        kind = kind_of(schema)
        if kind == "object":
            return self.object(schema, path)
        if kind == "array":
            return self.array(schema, path)
        if kind in ("integer", "number"):
            return number(schema, kind, self.text)
        return {"boolean": True, "null": None}.get(kind, string(schema, self.text))

    def object(self, schema: JsonSchema, path: frozenset[str]) -> dict[str, Any]:
        """The required properties, or all of them if none is required."""
        properties: dict[str, Any] = schema.get("properties", {})
        required: list[str] = schema.get("required", [])
        made: dict[str, Any] = {}
        for name in required or properties:
            try:
                made[name] = self.value(properties.get(name, True), path)
            except EndlessError:
                if name in required:
                    raise
        return made

    def array(self, schema: JsonSchema, path: frozenset[str]) -> list[Any]:
        """As few items as allowed, but one if possible."""
        least: int = schema.get("minItems", 0)
        count = min(max(least, 1), schema.get("maxItems", math.inf))
        try:
            return [self.value(schema.get("items", True), path)] * int(count)
        except EndlessError:
            if least:
                raise
            return []

    def target(self, reference: str) -> JsonSchema:
        """What a reference points to; only those into the same schema are followed."""
        found: Any = self.root
        for step in reference.removeprefix("#").split("/")[1:]:
            key = step.replace("~1", "/").replace("~0", "~")
            found = found.get(key) if isinstance(found, dict) else None
        return found if isinstance(found, dict) else {}


def merged(schemas: Sequence[Any]) -> JsonSchema:
    """One schema with the keywords of all; properties and requirements add up."""
    whole: JsonSchema = {}
    for schema in schemas:
        if isinstance(schema, dict):
            properties = {**whole.get("properties", {}), **schema.get("properties", {})}
            required = [*whole.get("required", ()), *schema.get("required", ())]
            whole |= schema
            whole |= ({"properties": properties} if properties else {}) | ({"required": required} if required else {})
    return whole


def kind_of(schema: JsonSchema) -> str:
    """The type to make; null only where nothing else is allowed."""
    declared = schema.get("type")
    if isinstance(declared, list):
        return next((kind for kind in declared if kind != "null"), "null")
    if isinstance(declared, str):
        return declared
    if schema.keys() & {"properties", "required", "additionalProperties"}:
        return "object"
    if schema.keys() & {"items", "minItems"}:
        return "array"
    return "number" if schema.keys() & {"minimum", "maximum", "multipleOf"} else "string"


def string(schema: JsonSchema, text: str) -> str:
    """The text in the allowed length, or an example of the format."""
    value = FORMATS.get(schema.get("format", ""), text)
    return value.ljust(schema.get("minLength", 0), ".")[: schema.get("maxLength")]


def number(schema: JsonSchema, kind: str, text: str) -> float:
    """The first number of the text that is allowed, or else a small one that is."""
    step = schema.get("multipleOf", 1)
    candidates: list[float] = [
        float(found) if "." in found else int(found) for found in re.findall(r"-?\d{1,15}(?:\.\d{1,9})?", text)
    ]
    candidates += [1, 0, step]
    bounds = [schema[key] for key in schema if key.lower().endswith(("minimum", "maximum"))]
    for bound in bounds:
        candidates += [bound, *(step * (math.floor(bound / step) + offset) for offset in (-1, 0, 1, 2))]
    if bounds:
        candidates.append(sum(bounds) / len(bounds))
    return next((one for one in candidates if is_allowed(one, schema, kind)), 0)


def is_allowed(value: float, schema: JsonSchema, kind: str) -> bool:
    """Whether a number is of the type and within the bounds."""
    step = schema.get("multipleOf")
    return bool(
        (kind == "number" or isinstance(value, int))
        and schema.get("minimum", -math.inf) <= value <= schema.get("maximum", math.inf)
        and schema.get("exclusiveMinimum", -math.inf) < value < schema.get("exclusiveMaximum", math.inf)
        and (step is None or value / step == round(value / step))
    )
