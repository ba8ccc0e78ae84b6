"""Prompts: the operator's templates, which stand in for what a request does not give.

    [prompts.greeting.versions.1]
    model = "qwen3"
    instructions = "Greet {{name}} in {{language}}."
    variables = { name = "string", language = "string" }

A value is put in as it is: what looks like a variable in it stays text. Time is linear in the template and its values.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Raw, Struct
from msgspec.structs import replace

from app.errors import BodyTooLarge, PromptNotFound
from app.wire.decoding import decode, missing, not_among, unknown
from app.wire.items import Content, InputFile, InputImage, InputText, PromptedMessage, Role
from app.wire.keys import nearest
from app.wire.requests import NOTHING, Body, PromptParameters, PromptReference, decode_create

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


class PromptVersion(PromptParameters, kw_only=True, forbid_unknown_fields=True):
    """`[prompts.ID.versions.VERSION]`."""

    instructions: Annotated[str, Meta(min_length=1)] | Annotated[list[PromptMessage], Meta(min_length=1)]
    """A string is the text of one developer message."""
    variables: dict[str, VariableType] = {}

    @property
    def messages(self) -> Sequence[PromptMessage]:
        """The template's messages."""
        if isinstance(self.instructions, str):
            return [PromptMessage("developer", self.instructions)]
        return self.instructions

    def faults(self) -> Iterator[str]:
        """What is wrong with its text. Raises InvalidRequest for a parameter that no request may have."""
        used = {name for message in self.messages for name in _VARIABLE.findall(message.content)}
        for name in sorted(used - self.variables.keys()):
            yield f"'{{{{{name}}}}}' in 'instructions' is not among 'variables'"
        for name in sorted(self.variables.keys() - used):
            yield f"the variable '{name}' stands nowhere in 'instructions'"
        for message in self.messages:
            for name in _VARIABLE.findall(message.content) if message.role != "user" else ():
                if self.variables.get(name, "string") not in TEXTUAL:
                    yield f"'{name}' is no text, so it can't stand in a message of the role '{message.role}'"
        given = {name: getattr(self, name) for name in PromptParameters.__struct_fields__}
        decode_create(msgspec.json.encode({**given, "model": self.model or "any", "input": "any"}), ())


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
    values = _values(reference.variables or {}, template.variables)
    _check_size(template, reference.variables or {}, bytes_max)
    messages = [PromptedMessage(one.role, _content(one.content, values)) for one in template.messages]
    return _with_parameters(body, template, replace(reference, version=version)), messages


def _with_parameters(body: Body, template: PromptVersion, reference: PromptReference) -> Body:
    absent = [name for name in PromptParameters.__struct_fields__ if _is_absent(getattr(body, name))]
    return replace(body, prompt=reference, **{name: getattr(template, name) for name in absent})


def _is_absent(value: object) -> bool:
    return value is None or value == NOTHING


def _values(given: Mapping[str, Raw], types: Mapping[str, VariableType]) -> dict[str, Value]:
    for name in given:
        if name not in types:
            near = nearest(name, types)
            raise unknown(_path(name), near and _path(near))
    for name in types:
        if name not in given:
            raise missing(_path(name))
    return {name: _value(given[name], type_, _path(name)) for name, type_ in types.items()}


def _path(name: str) -> str:
    return f"prompt.variables.{name}"


def _value(raw: Raw, type_: VariableType, at: str) -> Value:
    if type_ == "string":
        return decode(_STRING, raw, at)
    part: InputText | InputImage | InputFile = decode(_PART, raw, at)
    given = str(part.__struct_config__.tag)
    if given != type_:
        raise not_among(f"{at}.type", given, [type_])
    return part


def _check_size(template: PromptVersion, given: Mapping[str, Raw], bytes_max: int) -> None:
    """A template may repeat a long value."""
    sizes = {name: memoryview(value).nbytes for name, value in given.items()}
    size = sum(
        len(message.content) + sum(sizes[name] for name in _VARIABLE.findall(message.content))
        for message in template.messages
    )
    if size > bytes_max:
        raise BodyTooLarge(
            f"The prompt takes {size} bytes with its variables; at most {bytes_max} are possible.",
            param="prompt.variables",
        )


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
