"""Prompts: what a template's messages become, what a request is given, which variables are wrong."""

from functools import partial
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.context import resolve
from app.domain.dialect import HOSTED, Dialect
from app.domain.messages import messages
from app.domain.prompt_templates import Prompt, fill_in
from app.errors import ApiError, InvalidRequest, NotFound
from app.wire.requests import CreateResponse, as_stored, decode_create
from tests.unit.build import SEAL, counting, plain

IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,AAAA", "detail": "low"}
FILE = {"type": "input_file", "filename": "a.txt", "file_data": "data:text/plain;base64,aGk="}


def version(instructions: Any, **fields: Any) -> dict[str, Any]:
    return {"instructions": instructions, **fields}


GREETING = {
    "versions": {
        "1": version("Greet {{name}}.", variables={"name": "string"}),
        "2": version("Hail {{ name }}, {{name}}!", variables={"name": "string"}, model="old", temperature=0.5),
        "10": version(
            [
                {"role": "system", "content": "You are {{who}}."},
                {"role": "user", "content": "Look: {{photo}}{{paper}} by {{who}}."},
                {"role": "assistant", "content": "I see, {{who}}."},
            ],
            variables={"who": "string", "photo": "input_image", "paper": "input_file"},
            model="new",
        ),
    }
}


def prompts(**entries: Any) -> dict[str, Prompt]:
    return msgspec.convert({"greeting": GREETING, **entries}, dict[str, Prompt])


def decoded(raw: bytes, *, bytes_max: int = 10_000, **entries: Any) -> CreateResponse:
    return decode_create(raw, (), partial(fill_in, prompts=prompts(**entries), bytes_max=bytes_max))


def asked(prompt: dict[str, Any] | None = None, *, bytes_max: int = 10_000, **body: Any) -> CreateResponse:
    """A request with the greeting, decoded."""
    reference = {"id": "greeting", "version": "1", "variables": {"name": "Ada"}} | (prompt or {})
    return decoded(msgspec.json.encode({"model": "m", "prompt": reference, **body}), bytes_max=bytes_max)


def refused(prompt: dict[str, Any] | None = None, **body: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        asked(prompt, **body)
    return caught.value


def texts(request: CreateResponse) -> list[str]:
    return [part.text for message in request.prompted for part in message.content]


def test_values_stand_where_the_variables_stood():
    assert plain(asked().instructions) == [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Greet Ada."}]}
    ]
    assert texts(asked({"version": "2"})) == ["Hail Ada, Ada!"]


@pytest.mark.parametrize("value", ["{{name}}", "{{ name }}", "{{", "}}", "\\1", "\\g<0>", "", "a\0b"])
def test_a_value_is_put_in_as_it_is(value):
    assert texts(asked({"version": "2", "variables": {"name": value}})) == [f"Hail {value}, {value}!"]


@given(st.lists(st.text(alphabet="{} nam"), max_size=8), st.text(alphabet="{}name"))
def test_only_variables_are_replaced(pieces, value):
    """Whatever stands between them, and whatever they are given."""
    between = [piece.replace("{{", "{").replace("}}", "}").strip("{}") for piece in pieces]
    template = {"versions": {"1": version("|" + "|{{name}}|".join(between) + "|", variables={"name": "string"})}}
    raw = msgspec.json.encode({"model": "m", "prompt": {"id": "x", "variables": {"name": value}}})
    assert texts(decoded(raw, x=template)) == ["|" + f"|{value}|".join(between) + "|"]


def test_parts_stand_between_the_texts_of_their_message():
    variables = {"who": "Ada", "photo": IMAGE, "paper": FILE}
    made = asked({"version": "10", "variables": variables}, instructions=None)
    assert [plain(message) for message in made.prompted] == [
        {"type": "message", "role": "system", "content": [{"type": "input_text", "text": "You are Ada."}]},
        {
            "type": "message",
            "role": "user",
            "content": [
                {"type": "input_text", "text": "Look: "},
                IMAGE,
                FILE,
                {"type": "input_text", "text": " by Ada."},
            ],
        },
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "input_text", "text": "I see, Ada."}],
        },
    ]
    context = resolve(made, [], {}, counting(), seal=SEAL)
    assert [(one["role"], type(one["content"])) for one in messages(context, HOSTED, SEAL.open)] == [
        ("system", str),
        ("user", list),
        ("assistant", str),
    ]


def test_a_single_text_is_a_developer_message_where_there_is_such_a_role():
    context = resolve(asked(input="Hi"), [], {}, counting(), seal=SEAL)
    assert messages(context, HOSTED, SEAL.open)[0] == {"role": "developer", "content": "Greet Ada."}
    assert messages(context, Dialect(), SEAL.open)[0] == {"role": "system", "content": "Greet Ada."}


# -- Versions, and what the request gives ------------------------------------------------------------------------------------


def test_without_a_version_the_highest_number_counts_unless_there_is_a_default():
    made = asked({"version": None, "variables": {"who": "x", "photo": IMAGE, "paper": FILE}})
    assert (made.body.prompt.version, made.model) == ("10", "m")
    raw = msgspec.json.encode({"model": "m", "prompt": {"id": "old", "variables": {"name": "Ada"}}})
    made = decoded(raw, old={**GREETING, "default": "2"})
    assert (made.body.prompt.version, texts(made)) == ("2", ["Hail Ada, Ada!"])


def test_what_the_request_gives_wins():
    given = asked({"version": "2"}, model="mine", temperature=0.0, instructions="Be brief.")
    assert (given.model, given.body.temperature, given.instructions) == ("mine", 0.0, "Be brief.")
    left_out = asked({"version": "2"}, model=None, temperature=None, instructions=None)
    assert (left_out.model, left_out.body.temperature, texts(left_out)) == ("old", 0.5, ["Hail Ada, Ada!"])


def test_no_tools_are_tools_that_the_request_gives():
    tools = [msgspec.Raw(msgspec.json.encode({"type": "function", "name": "f"}))]
    choice = msgspec.Raw(b'"required"')
    template = {"versions": {"1": version("x", tools=tools, tool_choice=choice)}}
    raw = {"model": "m", "prompt": {"id": "x"}}
    made = decoded(msgspec.json.encode(raw), x=template)
    assert ([tool.name for tool in made.tools], made.tool_choice) == (["f"], "required")
    made = decoded(msgspec.json.encode({**raw, "tools": [], "tool_choice": "none"}), x=template)
    assert (made.tools, made.tool_choice) == ([], "none")


def test_neither_a_model_nor_an_input_is_needed_beside_a_prompt_that_has_them():
    made = asked({"version": "2"}, model=None)
    assert (made.model, made.input) == ("old", [])
    assert asked({"version": "2"}, input=[]).input == []
    assert (refused(model=None).param, refused(model=None).code) == ("model", "missing_required_parameter")


# -- What is stored of it ------------------------------------------------------------------------------------------------------


def test_a_stored_request_has_what_its_prompt_gave_and_not_the_values_again():
    tools = [msgspec.Raw(b'{"type":"mcp","server_label":"s","server_url":"http://x","authorization":"key"}')]
    template = {"versions": {"3": version("Greet {{name}}.", variables={"name": "string"}, model="q", tools=tools)}}
    raw = msgspec.json.encode({"prompt": {"id": "x", "variables": {"name": "Ada"}}, "top_p": 0.5})
    request = decoded(raw, x=template)
    stored, secrets = as_stored(raw, request)
    assert msgspec.json.decode(stored) == {
        "prompt": {"id": "x", "version": "3"},
        "top_p": 0.5,
        "model": "q",
        "tool_choice": None,
        "tools": [{"type": "mcp", "server_label": "s"}],
    }
    assert secrets["s"].authorization == "key"
    again = decode_create(stored, (), lambda body: (body, request.prompted))
    assert (again.model, again.instructions, again.body.prompt.version) == ("q", request.instructions, "3")


def test_its_size_counts():
    assert asked({"version": "2"}).size > asked().size > len(msgspec.json.encode(asked().prompted))


# -- What is wrong -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "param", "message"),
    [
        ({"id": "nope"}, "prompt.id", "Prompt with id 'nope' not found."),
        ({"version": "3"}, "prompt.version", "Prompt with id 'greeting' has no version '3'."),
        ({"version": "01"}, "prompt.version", "Prompt with id 'greeting' has no version '01'."),
    ],
)
def test_an_unknown_prompt_is_a_404_that_names_it(prompt, param, message):
    error = refused(prompt)
    assert isinstance(error, NotFound)
    assert (error.status, error.param, error.code, error.message) == (404, param, "prompt_not_found", message)


@pytest.mark.parametrize(
    ("prompt", "param", "code"),
    [
        ({"variables": {}}, "prompt.variables.name", "missing_required_parameter"),
        ({"variables": None}, "prompt.variables.name", "missing_required_parameter"),
        ({"variables": {"name": "x", "nam": "y"}}, "prompt.variables.nam", "unknown_parameter"),
        ({"variables": {"name": 1}}, "prompt.variables.name", "invalid_type"),
        ({"variables": {"name": None}}, "prompt.variables.name", "invalid_type"),
        ({"variables": {"name": {"type": "input_text", "text": "x"}}}, "prompt.variables.name", "invalid_type"),
        ({"variables": []}, "prompt.variables", "invalid_type"),
        ({"version": 1}, "prompt.version", "invalid_type"),
        ({"id": None}, "prompt.id", "invalid_type"),
        ({"name": "x"}, "prompt.name", "unknown_parameter"),
    ],
)
def test_a_wrong_reference_is_refused_with_its_path(prompt, param, code):
    error = refused(prompt)
    assert isinstance(error, InvalidRequest)
    assert (error.param, error.code) == (param, code)


@pytest.mark.parametrize(
    ("photo", "param", "code"),
    [
        ("x", "prompt.variables.photo", "invalid_type"),
        ({}, "prompt.variables.photo.type", "missing_required_parameter"),
        (FILE, "prompt.variables.photo.type", "invalid_value"),
        ({"type": "input_audio"}, "prompt.variables.photo.type", "invalid_value"),
        ({**IMAGE, "detail": "tiny"}, "prompt.variables.photo.detail", "invalid_value"),
        ({**IMAGE, "url": "x"}, "prompt.variables.photo.url", "unknown_parameter"),
    ],
)
def test_a_value_of_another_type_is_refused_with_its_path(photo, param, code):
    error = refused({"version": "10", "variables": {"who": "x", "photo": photo, "paper": FILE}})
    assert (error.param, error.code) == (param, code)


def test_a_name_that_resembles_a_variable_is_suggested():
    error = refused({"variables": {"Name": "x"}})
    assert error.message == "Unknown parameter: 'prompt.variables.Name'. Did you mean 'prompt.variables.name'?"


def test_a_long_value_that_a_template_repeats_is_refused():
    long = {"version": "2", "variables": {"name": "x" * 4_990}}
    assert refused(long, bytes_max=10_009).status == 413
    assert asked(long, bytes_max=10_010).prompted


def test_a_server_without_prompts_knows_none():
    with pytest.raises(NotFound, match="greeting"):
        decode_create(b'{"model": "m", "prompt": {"id": "greeting"}}', ())
