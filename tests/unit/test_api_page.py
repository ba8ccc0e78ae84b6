"""docs/api.md against the code and the types of the official SDK: nothing is missing, unknown, or wrongly refused."""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec
import pytest
from litestar.handlers import HTTPRouteHandler
from msgspec import Raw, Struct
from openai.types import responses as sdk
from openai.types.chat import completion_create_params
from openai.types.responses import response_create_params, response_includable, response_input_param, tool_param

from app.api import queries, uploads
from app.domain.agents import CreateAgent
from app.domain.toolbox import open_toolbox
from app.domain.tools import table
from app.errors import ApiError, UnsupportedParameter
from app.wire import (
    admin,
    chat_requests,
    compactions,
    conversations,
    events,
    items,
    requests,
    tool_credentials,
    tools,
)
from app.wire.decoding import decode
from tests.routes import handlers

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
CHAT_PAGE = (Path(__file__).parents[2] / "docs" / "chat-completions.md").read_text()

Row = tuple[str, list[str]]
"""A word of the legend, and the cells after it."""


def rows(section: str, page: str = PAGE) -> dict[str, Row]:
    """The rows of a section's table, by each name in their first cells."""
    text = page[page.index(f"## {section}\n") :].split("\n## ", maxsplit=1)[0]
    found: dict[str, Row] = {}
    for line in re.findall(r"(?m)^\|(.*)\|$", text)[2:]:
        names, word, *rest = (cell.strip() for cell in re.split(r"(?<!\\)\|", line))
        for name in re.findall(r"`([^`]+)`", names):
            assert name not in found, f"{name} has two rows"
            found[name] = (word, rest)
    return found


def words(section: str) -> dict[str, str]:
    return {name: word for name, (word, _) in rows(section).items()}


def refused(section: str) -> set[str]:
    return {name for name, word in words(section).items() if word == "refused"}


def literals(hint: Any) -> Iterator[str]:
    """Every string of a Literal, in a type of any form."""
    for one in get_args(hint):
        if isinstance(one, str):
            yield one
        else:
            yield from literals(one)


def types_of(hint: Any) -> set[str]:
    """The values of `type` of every object of a union in the SDK."""
    arguments = get_args(hint)
    if not arguments:
        fields = getattr(hint, "model_fields", None)
        type_ = fields["type"].annotation if fields else get_type_hints(hint).get("type")
        return set(literals(type_))
    return set().union(*(types_of(one) for one in arguments if inspect.isclass(one) or get_args(one)))


def test_every_row_has_a_word_of_the_legend():
    legend = {line.split("|")[1].strip() for line in PAGE.split("\n## ")[0].splitlines() if line.startswith("| ")}
    sections = re.findall(r"(?m)^## (.+)$", PAGE)
    assert len(sections) == 8
    assert {word for section in sections for word in words(section).values()} <= legend - {"word"}


# -- Endpoints ---------------------------------------------------------------------------------------------------------------


BODIES = {
    "decode_count": requests.COUNTED,
    "decode_compact": compactions.PARAMETERS,
    "uploads.receive": uploads.FIELDS,
    "chat_requests.UPDATE": chat_requests.UpdateCompletion.__struct_fields__,
    **{
        f"wire.{name}": getattr(conversations, name).type.__struct_fields__
        for name in ("CREATE", "UPDATE", "FORK", "ITEMS")
    },
    **{f"agents.{name}": CreateAgent.__struct_fields__ for name in ("CREATE", "UPDATE")},
    **{
        f"wire.{name}": getattr(admin, name).type.__struct_fields__
        for name in ("CREATE_KEY", "UPDATE_KEY", "ROTATE_KEY", "CREATE_TENANT", "UPDATE_TENANT")
    },
    **{
        f"wire.{name}": getattr(tool_credentials, name).type.__struct_fields__
        for name in ("CREATE_TOOL_CREDENTIAL", "UPDATE_TOOL_CREDENTIAL")
    },
}
"""What decodes the body of an endpoint, and its parameters; those of a create have a table of their own."""


def parameters_of(handler: HTTPRouteHandler) -> set[str]:
    """The parameters that an endpoint reads, in its query or its body."""
    source = inspect.getsource(handler.fn)
    queried = re.findall(r"queries\.parse\(request, queries\.(\w+)\)", source)
    known = {name for one in queried for name in getattr(queries, one).__struct_fields__}
    return known.union(*(names for decoder, names in BODIES.items() if re.search(rf"{decoder}\b", source)))


def test_every_endpoint_has_a_row_with_its_parameters():
    made = handlers()
    assert len(made) > 10
    page = {name: set(re.findall(r"`(\w+)`", cells[0])) for name, (_, cells) in rows("Endpoints").items()}
    assert page == {name: parameters_of(handler) for name, handler in made.items()}


# -- Create ------------------------------------------------------------------------------------------------------------------


def parameters() -> Iterator[str]:
    """Every parameter of a create; of one that is an object its keys."""
    for name, hint in get_type_hints(requests.Body).items():
        inner = [one for one in get_args(hint) if inspect.isclass(one) and issubclass(one, Struct)]
        is_object = inner and name not in {"prompt", "conversation"}
        yield from (f"{name}.{key}" for key in inner[0].__struct_fields__) if is_object else (name,)


ODD: dict[str, Any] = {
    "reasoning.mode": {"mode": "pro"},
    "image.context_compression": {"context_compression": "enabled"},
    "access_programs.cyber": {"cyber": "other"},
}
"""Values that are refused of parameters of which others are not."""


def test_every_parameter_has_a_row_and_is_refused_if_that_says_so():
    names = list(parameters())
    assert set(words("Parameters of create")) == set(names)
    found = set()
    for name in names:
        body = {"model": "m", "input": "hi", name.partition(".")[0]: ODD.get(name, {"id": "x"})}
        try:
            requests.decode_create(msgspec.json.encode(body), ())
        except UnsupportedParameter as error:
            found.add(error.param)
        except ApiError:
            pass
    assert found == refused("Parameters of create")


def test_the_sdk_knows_no_other_parameter():
    known = set(get_type_hints(response_create_params.ResponseCreateParamsBase))
    assert known <= {name.partition(".")[0] for name in words("Parameters of create")}


CHAT_ODD: dict[str, Any] = {
    "n": 2,
    "audio": {"voice": "x"},
    "functions": [{}],
    "function_call": "auto",
    "moderation": {"model": "x"},
}
"""Values of parameters of Chat Completions that are refused."""


def test_every_parameter_of_chat_completions_has_a_row_and_is_refused_if_that_says_so():
    listed = {name: word for name, (word, _) in rows("Parameters", CHAT_PAGE).items()}
    found = set()
    for name in listed:
        body = {"model": "m", "messages": [{"role": "user", "content": "x"}], name: CHAT_ODD.get(name)}
        try:
            chat_requests.decode_chat(msgspec.json.encode(body), ())
        except UnsupportedParameter as error:
            found.add(error.param)
        except ApiError:
            pass
    sent = set(get_type_hints(completion_create_params.CompletionCreateParamsBase)) | {"stream"}
    assert found == {name for name, word in listed.items() if word == "refused"} == CHAT_ODD.keys()
    assert set(chat_requests.ChatBody.__struct_fields__) == listed.keys()
    assert listed.keys() - sent == {name for name, word in listed.items() if word == "beyond"}
    assert sent <= listed.keys()
    parts = rows("Messages", CHAT_PAGE).keys()
    assert parts == {str(part.__struct_config__.tag) for part in get_args(chat_requests.AnyPart)}


def test_keys_without_effect_are_listed():
    listed = re.search(r"Without effect: (.*?)\.\n", PAGE, re.DOTALL)
    assert listed
    assert set(re.findall(r"`(\w+)`", listed[1])) == requests.HINTS


def test_every_value_of_include_has_a_row():
    made, sent = set(literals(requests.Include)), set(get_args(response_includable.ResponseIncludable))
    assert set(words("Values of include")) == made | sent
    assert {name for name, word in words("Values of include").items() if word == "beyond"} == made - sent


# -- Items, parts, tools -----------------------------------------------------------------------------------------------------


def test_every_item_has_a_row_and_is_left_out_if_that_says_so():
    made = {*items._DECODERS, "additional_tools", *items.CARRIED}
    sent = types_of(response_input_param.ResponseInputItemParam) | types_of(sdk.ResponseOutputItem)
    assert len(sent) > 25
    assert set(words("Items")) == made | sent
    unknown = {name for name, word in words("Items").items() if word == "left out"}
    assert (refused("Items"), unknown) == (set(), sent - made)
    assert {name for name, word in words("Items").items() if word == "carried"} == set(items.CARRIED)
    assert all(items.is_unknown(items.decode_item(msgspec.json.encode({"type": name}))) for name in unknown)


def test_every_content_part_has_a_row():
    made = {str(part.__struct_config__.tag) for part in get_args(items.Content)}
    sent = types_of(sdk.response_input_content_param.ResponseInputContentParam)
    assert sent <= made == set(words("Content parts"))


def hosted_word(type_: str) -> str:
    """What happens to a tool that is not a function where every kind has a tool server."""
    inside = {"environment": {"type": "container_auto"}} if type_ == "shell" else {}
    declared = tools.HostedTool(type_, {"execution": "client", **inside})
    box = open_toolbox([declared], [], "auto", hosted=frozenset(table.HOSTED))
    return "left out" if box.left_out else "supported"


def test_every_tool_has_a_row_and_is_left_out_if_that_says_so():
    made = {*tools._DECODERS, *tools.HOSTED}
    assert set(words("Tools")) == made | types_of(tool_param.ToolParam)
    assert {name: hosted_word(name) for name in tools.HOSTED} == {
        name: word for name, word in words("Tools").items() if name in tools.HOSTED
    }
    without = [tools.HostedTool(type_, {}) for type_ in table.KINDS if type_ != "shell"]
    assert set(open_toolbox(without, [], "auto").left_out) == table.KINDS.keys() - {"shell"}


def test_every_tool_choice_has_a_row_and_is_refused_if_the_tool_can_not_be_declared():
    sent = get_type_hints(response_create_params.ResponseCreateParamsBase)["tool_choice"]
    made = {*get_args(tools.ToolMode), *tools._CHOICES, *tools.CHOOSABLE}
    listed = words("Tool choice")
    assert set(listed) == made
    assert types_of(sent) | set(literals(sent)) <= made
    usable = {name for name in tools.HOSTED if hosted_word(name) == "supported"}
    assert refused("Tool choice") == tools.HOSTED - usable
    for name in refused("Tool choice"):
        choice = decode(tools._NAMED, Raw(msgspec.json.encode({"type": name})))
        with pytest.raises(ApiError):
            open_toolbox([tools.HostedTool(name, {})], [], choice, hosted=frozenset(table.HOSTED))


# -- Events ------------------------------------------------------------------------------------------------------------------


def event_types(base: type[Struct]) -> set[str]:
    own = {str(base.__struct_config__.tag)}
    return own.union(*(event_types(one) for one in base.__subclasses__()))


def test_every_event_has_a_row_that_says_whether_it_is_sent():
    made = {type_ for type_ in event_types(events.Event) if type_.startswith("response.")}
    known = types_of(sdk.ResponseStreamEvent)
    assert len(known) > 50
    assert set(words("Events")) == made | known
    assert {name for name, word in words("Events").items() if word == "not sent"} == known - made
