"""Example values of JSON schemas: pure, and bounded. `pattern`, `uniqueItems` and conditions are ignored."""

import contextlib
import math
import re
from collections.abc import Iterable
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct, field

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


BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")

WORK_MAX = 20_000
"""The cost of an example: keywords, choices and values that are read, and characters that are made. The maximum takes a tenth
of a second."""

Count = Annotated[int, Meta(ge=0)]


class Keywords(Struct, rename="camel"):
    """The keywords that are read, with their types."""

    ref: str = field(default="", name="$ref")
    all_of: list[Any] = []
    any_of: list[Any] = []
    one_of: list[Any] = []
    enum: Annotated[list[Any], Meta(min_length=1)] = []
    type: str | list[str] = ""
    properties: dict[str, Any] = {}
    required: list[str] = []
    min_items: Count = 0
    max_items: Count = 0
    format: str = ""
    min_length: Count = 0
    max_length: Count = 0
    minimum: float = 0
    maximum: float = 0
    exclusive_minimum: float = 0
    exclusive_maximum: float = 0
    multiple_of: Annotated[float, Meta(gt=0)] = 1


class SchemaError(Exception):
    """This is not a JSON schema, or not one that the demo can fill."""


class EndlessError(Exception):
    """This part of a recursive schema has no end; another must be taken."""


def example(schema: JsonSchema, text: str) -> Any:
    """A value that satisfies the schema, made from the text where it fits; None where no value ends. Raises SchemaError."""
    try:
        return Filler(schema, text).value(schema, frozenset({"#"}))
    except EndlessError:
        return None
    except (msgspec.ValidationError, ArithmeticError, ValueError) as error:
        raise SchemaError(f"The schema is not valid: {error}") from error
    except RecursionError as error:
        raise SchemaError("The schema nests too deeply for the demo model.") from error


class Filler:
    """Makes values for the parts of one schema; `path` holds the references being followed, to see recursion."""

    def __init__(self, root: JsonSchema, text: str) -> None:
        """`root` is what references point into."""
        self.root = root
        self.text = text
        self.work = WORK_MAX

    def spend(self, work: int) -> None:
        """Count work before it is done. Raises SchemaError beyond WORK_MAX."""
        self.work -= work
        if self.work < 0:
            raise SchemaError("What the schema describes is too large for the demo model.")

    def check(self, schema: JsonSchema) -> None:
        """Check a schema's own keywords. Raises SchemaError, msgspec.ValidationError."""
        self.spend(1 + sum(len(value) for value in schema.values() if isinstance(value, str | list | dict)))
        msgspec.convert(schema, Keywords)

    def given(self, value: Any) -> Any:
        """A value that the schema contains."""
        self.spend(len(msgspec.json.encode(value)))
        return value

    def value(self, schema: Any, path: frozenset[str]) -> Any:
        """A value for a schema anywhere in the root, where `true` allows everything."""
        if not isinstance(schema, dict):
            return self.string({})
        self.check(schema)
        key = next((key for key in ("$ref", "allOf", "anyOf", "oneOf") if key in schema), None)
        if key is None:
            return self.plain(schema, path)
        found, rest = schema[key], {name: value for name, value in schema.items() if name != key}
        if key == "$ref":
            if found in path:
                raise EndlessError
            return self.value(self.merged([self.target(found), rest]), path | {found})
        if key == "allOf":
            return self.value(self.merged([*found, rest]), path)
        return self.first((self.merged([choice, rest]) for choice in found), path)

    def first(self, choices: Iterable[JsonSchema], path: frozenset[str]) -> Any:
        """A value for the first choice that has an end."""
        for choice in choices:
            with contextlib.suppress(EndlessError):
                return self.value(choice, path)
        raise EndlessError

    def plain(self, schema: JsonSchema, path: frozenset[str]) -> Any:
        """A value for a schema without references and branches."""
        for key in ("const", "default"):
            if key in schema:
                return self.given(schema[key])
        if options := schema.get("enum"):
            strings = [one for one in options if isinstance(one, str)]
            self.spend(sum(map(len, strings)))
            text = self.text.lower()
            return self.given(next((one for one in strings if one.lower() in text), options[0]))
        kind = kind_of(schema)
        if kind == "object":
            return self.object(schema, path)
        if kind == "array":
            return self.array(schema, path)
        if kind in ("integer", "number"):
            self.spend(len(self.text))
            return number(schema, kind, self.text)
        return {"boolean": True, "null": None}[kind] if kind in ("boolean", "null") else self.string(schema)

    def string(self, schema: JsonSchema) -> str:
        """The text in the allowed length, or an example of the format."""
        value = FORMATS.get(schema.get("format", ""), self.text)
        self.spend(max(len(value), schema.get("minLength", 0)))
        return value.ljust(schema.get("minLength", 0), ".")[: schema.get("maxLength")]

    def object(self, schema: JsonSchema, path: frozenset[str]) -> dict[str, Any]:
        """The required properties, or all of them if none is required."""
        properties: dict[str, Any] = schema.get("properties", {})
        required: list[str] = schema.get("required", [])
        made: dict[str, Any] = {}
        for name in required or properties:
            self.spend(len(name))
            try:
                made[name] = self.value(properties.get(name, True), path)
            except EndlessError:
                if required:
                    raise
        return made

    def array(self, schema: JsonSchema, path: frozenset[str]) -> list[Any]:
        """As few items as allowed, but one if possible."""
        least: int = schema.get("minItems", 0)
        count = min(max(least, 1), schema.get("maxItems", math.inf))
        try:
            return [self.value(schema.get("items", True), path) for _ in range(int(count))]
        except EndlessError:
            if least:
                raise
            return []

    def merged(self, schemas: Iterable[Any]) -> JsonSchema:
        """One schema with the keywords of all; properties and requirements add up."""
        whole: JsonSchema = {}
        properties: JsonSchema = {}
        required: list[str] = []
        for schema in schemas:
            if isinstance(schema, dict):
                self.check(schema)
                properties |= schema.get("properties", {})
                required += schema.get("required", ())
                whole |= schema
        return whole | ({"properties": properties} if properties else {}) | ({"required": required} if required else {})

    def target(self, reference: str) -> JsonSchema:
        """The target of a reference; only those within the same schema are followed."""
        found: Any = self.root
        for step in reference.removeprefix("#").split("/")[1:]:
            key = step.replace("~1", "/").replace("~0", "~")
            found = found.get(key) if isinstance(found, dict) else None
        return found if isinstance(found, dict) else {}


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


def number(schema: JsonSchema, kind: str, text: str) -> float:
    """The first number of the text that is allowed, or else a small one that is."""
    step = schema.get("multipleOf", 1)
    candidates: list[float] = [
        float(found) if "." in found else int(found) for found in re.findall(r"-?\d{1,15}(?:\.\d{1,9})?", text)
    ]
    candidates += [1, 0, step]
    bounds = [schema[key] for key in BOUNDS if key in schema]
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
