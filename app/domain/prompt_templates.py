"""Prompts: the operator's templates, which stand in for what a request does not give.

    [prompts.greeting.versions.1]
    model = "qwen3"
    instructions = "Greet {{name}} in {{language}}."
    variables = { name = "string", language = "string" }

A value is put in as it is: what looks like a variable in it stays text. Time is linear in the template and its values.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Raw, Struct
from msgspec.structs import replace

from app.errors import BodyTooLarge, PromptNotFound
from app.wire.decoding import decode, missing, not_among, unknown
from app.wire.items import Content, InputFile, InputImage, InputText, PromptedMessage, Role
from app.wire.keys import nearest
from app.wire.requests import NOTHING, Body, CreateResponse, PromptParameters, PromptReference, decode_create

VariableType = Literal["string", "input_text", "input_image", "input_file"]
TEXTUAL: frozenset[VariableType] = frozenset({"string", "input_text"})

Value = str | InputText | InputImage | InputFile

_VARIABLE = re.compile(r"\{\{\s*(\w+)\s*\}\}")
_STRING = msgspec.json.Decoder(str)
_PART = msgspec.json.Decoder(InputText | InputImage | InputFile)


class PromptMessage(Struct, frozen=True, forbid_unknown_fields=True):
    """A message of a template."""

    role: Role
    content: Annotated[str, Meta(min_length=1)]


Instructions = Annotated[str, Meta(min_length=1)] | Annotated[list[PromptMessage], Meta(min_length=1)]


class Template(PromptParameters, kw_only=True, forbid_unknown_fields=True):
    """Messages with variables, and the parameters that go with them."""

    instructions: Instructions | None = None
    """A string is the text of one developer message."""
    variables: dict[str, VariableType] = {}

    @property
    def messages(self) -> Sequence[PromptMessage]:
        """The template's messages."""
        if isinstance(self.instructions, str):
            return [PromptMessage("developer", self.instructions)]
        return self.instructions or ()

    def faults(self) -> Iterator[str]:
        """What is wrong with its text."""
        used = {name for message in self.messages for name in _VARIABLE.findall(message.content)}
        for name in sorted(used - self.variables.keys()):
            yield f"'{{{{{name}}}}}' in 'instructions' is not among 'variables'"
        for name in sorted(self.variables.keys() - used):
            yield f"the variable '{name}' stands nowhere in 'instructions'"
        for message in self.messages:
            for name in _VARIABLE.findall(message.content) if message.role != "user" else ():
                if self.variables.get(name, "string") not in TEXTUAL:
                    yield f"'{name}' is no text, so it can't stand in a message of the role '{message.role}'"

    def as_request(self) -> CreateResponse:
        """A request with its parameters. Raises InvalidRequest for one that no request may have."""
        given = {name: getattr(self, name) for name in PromptParameters.__struct_fields__}
        return decode_create(msgspec.json.encode({**given, "model": self.model or "any", "input": "any"}), ())

    def filled(self, variables: Mapping[str, Raw], at: str, *, bytes_max: int) -> list[PromptedMessage]:
        """Its messages with the values of the variables; `at` is the path of these in the request.

        Raises InvalidParameter for a variable; BodyTooLarge for messages of more than `bytes_max`."""
        values = _values(variables, self.variables, at)
        _check_size(self, variables, at, bytes_max)
        return [PromptedMessage(one.role, _content(one.content, values)) for one in self.messages]

    def filled_bytes(self, variables: Mapping[str, Raw], at: str, *, bytes_max: int) -> int:
        """What these messages take, before they are made: a small request may make long ones. Raises as `filled`."""
        _values(variables, self.variables, at)
        return _check_size(self, variables, at, bytes_max)


class PromptVersion(Template, kw_only=True, forbid_unknown_fields=True):
    """`[prompts.ID.versions.VERSION]`."""

    instructions: Instructions


class Prompt(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[prompts.ID]`."""

    versions: Annotated[dict[Annotated[str, Meta(pattern=r"^[1-9][0-9]{0,8}$")], PromptVersion], Meta(min_length=1)]
    default: str = ""
    """The version of requests that name none; the highest if it is not set."""

    @property
    def default_version(self) -> str:
        """The version of requests that name none."""
        return self.default or max(self.versions, key=int)


def fill_in(body: Body, prompts: Mapping[str, Prompt], *, bytes_max: int) -> tuple[Body, list[PromptedMessage]]:
    """A request with what its prompt gives: the body, with the parameters that it leaves out and the prompt's version, and the
    messages that stand in the place of instructions.

    Raises PromptNotFound; InvalidParameter for a variable; BodyTooLarge for messages of more than `bytes_max`.
    """
    reference = body.prompt
    if reference is None:
        return body, []
    prompt = prompts.get(reference.id)
    if prompt is None:
        raise PromptNotFound(reference.id)
    version = reference.version or prompt.default_version
    template = prompt.versions.get(version)
    if template is None:
        raise PromptNotFound(reference.id, version)
    messages = template.filled(reference.variables or {}, "prompt.variables", bytes_max=bytes_max)
    return _with_parameters(body, template, replace(reference, version=version)), messages


def _with_parameters(body: Body, template: PromptVersion, reference: PromptReference) -> Body:
    return replace(body, prompt=reference, **left_out(body, template))


def left_out(body: Body, template: PromptParameters) -> dict[str, Any]:
    """The parameters that a body leaves out, as its template has them."""
    names = PromptParameters.__struct_fields__
    return {name: getattr(template, name) for name in names if is_absent(getattr(body, name))}


def is_absent(value: object) -> bool:
    """Whether a parameter is not given, null, or an object that sets nothing."""
    if isinstance(value, Struct):
        return all(getattr(value, name) in (None, UNSET) for name in value.__struct_fields__)
    return value is None or value == NOTHING


def _values(given: Mapping[str, Raw], types: Mapping[str, VariableType], at: str) -> dict[str, Value]:
    for name in given:
        if name not in types:
            near = nearest(name, types)
            raise unknown(f"{at}.{name}", near and f"{at}.{near}")
    for name in types:
        if name not in given:
            raise missing(f"{at}.{name}")
    return {name: _value(given[name], type_, f"{at}.{name}") for name, type_ in types.items()}


def _value(raw: Raw, type_: VariableType, at: str) -> Value:
    if type_ == "string":
        return decode(_STRING, raw, at)
    part: InputText | InputImage | InputFile = decode(_PART, raw, at)
    given = str(part.__struct_config__.tag)
    if given != type_:
        raise not_among(f"{at}.type", given, [type_])
    return part


def _check_size(template: Template, given: Mapping[str, Raw], at: str, bytes_max: int) -> int:
    """The bytes of its messages with these values: a template may repeat a long one. Raises BodyTooLarge."""
    sizes = {name: memoryview(value).nbytes for name, value in given.items()}
    size = sum(
        len(message.content.encode()) + sum(sizes[name] for name in _VARIABLE.findall(message.content))
        for message in template.messages
    )
    if size > bytes_max:
        raise BodyTooLarge(
            f"The {at.partition('.')[0]} takes {size} bytes with its variables; at most {bytes_max} are possible.",
            param=at,
        )
    return size


def _content(content: str, values: Mapping[str, Value]) -> list[Content]:
    """The parts of a message: text, in one part, up to each value that is a part itself."""
    parts: list[Content] = []
    texts: list[str] = []
    for index, piece in enumerate(_VARIABLE.split(content)):
        value = values[piece] if index % 2 else piece
        if isinstance(value, str):
            texts.append(value)
            continue
        if text := "".join(texts):
            parts.append(InputText(text=text))
        parts.append(value)
        texts = []
    if text := "".join(texts):
        parts.append(InputText(text=text))
    return parts
