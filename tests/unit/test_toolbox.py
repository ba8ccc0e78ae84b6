"""The toolbox: what the model sees, who runs a call, which calls are refused."""

import re
from typing import Any

import msgspec
import pytest

from app.domain.toolbox import (
    MODEL_NAME_CHARS_MAX,
    ByServer,
    ClientCall,
    NeedsApproval,
    Rejected,
    ServerCall,
    Toolbox,
    open_toolbox,
)
from app.errors import InvalidRequest
from app.wire.tools import CustomTool, FunctionTool, ListedTool, NamespaceTool, decode_tool_choice, decode_tools
from tests.unit.build import function, toolbox

CUSTOM = {"type": "custom", "name": "run"}


def namespace(name: str, *tools: dict[str, Any]) -> dict[str, Any]:
    """A namespace's declaration."""
    return {"type": "namespace", "name": name, "tools": list(tools)}


def allowed(*names: str, mode: str = "auto") -> dict[str, Any]:
    """A tool choice of these functions."""
    return {"type": "allowed_tools", "mode": mode, "tools": [{"type": "function", "name": name} for name in names]}


def test_calls_of_offered_tools_are_handed_over():
    tools = toolbox(function("f"), CUSTOM, namespace("crm", function("find")))
    assert tools.verdict("f") == ClientCall("function", "f", None)
    assert tools.verdict("run") == ClientCall("custom", "run", None)
    assert tools.verdict("crm__find") == ClientCall("function", "find", "crm")


@pytest.mark.parametrize(
    ("choice", "name"),
    [
        ("auto", "g2"),
        ("auto", ""),
        ("none", "f"),
        (allowed("f"), "g"),
        (allowed("f", mode="required"), "g"),
        ({"type": "function", "name": "f"}, "g"),
    ],
)
def test_calls_that_may_not_be_are_refused_with_a_reason(choice: Any, name: str):
    verdict = toolbox(function("f"), function("g"), choice=choice).verdict(name)
    assert isinstance(verdict, Rejected) and f"'{name}'" in verdict.reason


@pytest.mark.parametrize("choice", ["auto", "required", allowed("f"), {"type": "function", "name": "f"}])
def test_the_allowed_call_is_handed_over(choice: Any):
    assert toolbox(function("f"), function("g"), choice=choice).verdict("f") == ClientCall("function", "f", None)


def test_a_single_choice_must_be_called():
    tools = toolbox(function("f"), function("g"), choice={"type": "function", "name": "g"})
    assert tools.only is not None
    assert (tools.mode, tools.only.model_name) == ("required", "g")


def test_allowed_tools_keep_their_mode():
    assert toolbox(function("f"), choice=allowed("f", mode="required")).mode == "required"
    assert toolbox(function("f"), choice=allowed("f")).mode == "auto"


@pytest.mark.parametrize(
    ("tools", "choice", "param"),
    [
        ([], "required", "tool_choice"),
        ([function("f")], {"type": "function", "name": "g"}, "tool_choice"),
        ([function("f")], {"type": "custom", "name": "f"}, "tool_choice"),
        ([function("f")], allowed("f", "g"), "tool_choice.tools[1]"),
        ([function("f")], {"type": "web_search_preview"}, "tool_choice"),
        ([{"type": "file_search", "vector_store_ids": ["vs_1"]}], {"type": "file_search"}, "tool_choice"),
        ([function("f"), function("f")], "auto", "tools"),
        ([namespace("n", function("f"), function("f"))], "auto", "tools"),
        ([namespace("n", function("f")), function("n")], "auto", "tools"),
        ([{"type": "programmatic_tool_calling"}], {"type": "programmatic_tool_calling"}, "tool_choice"),
        ([{"type": "tool_search"}], {"type": "tool_search"}, "tool_choice"),
        ([{"type": "dream"}], "required", "tool_choice"),
        ([function("f")], {"type": "apply_patch"}, "tool_choice"),
        ([function("f")], {"type": "shell"}, "tool_choice"),
    ],
)
def test_what_can_t_be_offered_is_refused_with_its_path(tools: list[dict[str, Any]], choice: Any, param: str):
    with pytest.raises(InvalidRequest) as caught:
        toolbox(*tools, choice=choice)
    assert caught.value.param == param


def test_hosted_tools_that_clients_declare_anyway_are_left_out():
    tools = toolbox({"type": "web_search"}, function("f"), {"type": "image_generation"})
    assert (list(tools.offers), tools.left_out) == (["f"], ("web_search", "image_generation"))


def test_the_later_of_two_tools_of_one_name_counts_when_the_context_adds_it():
    tools = open_toolbox([FunctionTool("f")], [FunctionTool("f", description="new")], "auto")
    assert [offer.tool.description for offer in tools.offers.values()] == ["new"]


def test_names_that_collide_are_numbered():
    tools = toolbox(namespace("a", function("b__c")), namespace("a__b", function("c")), function("a__b__c"))
    assert list(tools.offers) == ["a__b__c", "a__b__c_2", "a__b__c_3"]
    assert tools.verdict("a__b__c_2") == ClientCall("function", "c", "a__b")
    assert tools.model_name("c", "a__b") == "a__b__c_2"
    assert tools.model_name("a__b__c", None) == "a__b__c_3"


def test_long_names_are_shortened_and_stay_apart():
    inner = [FunctionTool("f" * 60 + end) for end in "12"]
    tools = open_toolbox([NamespaceTool("n" * 60, [*inner])], [], "auto")
    assert len(tools.offers) == 2
    assert all(len(name) <= MODEL_NAME_CHARS_MAX for name in tools.offers)
    for name, offer in tools.offers.items():
        assert tools.verdict(name) == ClientCall("function", offer.tool.name, "n" * 60)


def test_a_tool_that_is_no_longer_offered_keeps_its_name_in_old_context():
    tools = toolbox()
    assert tools.model_name("find", "crm") == "crm__find"
    assert tools.model_name("f", None) == "f"
    assert tools.model_name("f" * 70, None) == toolbox(function("f" * 70)).model_name("f" * 70, None)


def test_custom_tools_of_a_namespace_are_offered():
    tools = open_toolbox([NamespaceTool("n", [CustomTool("run")])], [], "auto")
    assert tools.verdict("n__run") == ClientCall("custom", "run", "n")


# -- MCP servers ------------------------------------------------------------------------------------------------------------


def mcp(label: str = "box", **more: Any) -> dict[str, Any]:
    """An MCP server's declaration."""
    return {"type": "mcp", "server_label": label, "server_url": "http://x", "require_approval": "never", **more}


ECHO, ADD = ListedTool("echo"), ListedTool("add", annotations={"readOnlyHint": True})


def served(*tools: dict[str, Any], choice: Any = "auto", **listed: list[ListedTool]) -> Toolbox:
    """The toolbox of these declarations, with the lists of MCP servers that are known."""
    declared = decode_tools([msgspec.Raw(msgspec.json.encode(tool)) for tool in tools])
    return open_toolbox(declared, [], decode_tool_choice(msgspec.Raw(msgspec.json.encode(choice))), listed=listed)


def test_a_server_s_tools_have_their_plain_names_unless_they_clash():
    tools = served(mcp("a"), function("add"), mcp("b"), a=[ECHO, ADD], b=[ADD])
    assert list(tools.offers) == ["echo", "a__add", "add", "b__add"]
    assert tools.verdict("add") == ClientCall("function", "add", None)
    assert tools.verdict("b__add") == ServerCall("add", ByServer("b", ask=False))
    assert isinstance(tools.verdict("a__echo"), Rejected)
    assert (tools.model_name("add", "a"), tools.model_name("gone", "a", qualified=False)) == ("a__add", "gone")


@pytest.mark.parametrize("name", ["get weather", "a/b.c:d", "é", "x" * 65, "x" * 200])
def test_odd_and_long_names_are_made_fit_and_mapped_back(name: str):
    tools = served(mcp("a"), mcp("b"), a=[ListedTool(name), ListedTool(f"{name}!")], b=[ListedTool(name)])
    assert len(tools.offers) == 3
    for model_name, offer in tools.offers.items():
        assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", model_name)
        assert tools.verdict(model_name) == ServerCall(offer.tool.name, offer.by)
    assert sorted(offer.tool.name for offer in tools.offers.values()) == sorted([name, name, f"{name}!"])


def test_a_name_that_another_server_s_prefix_makes_is_numbered():
    tools = served(mcp("a"), mcp("b"), function("a__add"), a=[ADD], b=[ADD])
    assert list(tools.offers) == ["a__add", "b__add", "a__add_2"]
    assert tools.verdict("a__add_2") == ClientCall("function", "a__add", None)


@pytest.mark.parametrize(
    ("wanted", "asks"),
    [
        (None, {"echo", "add"}),
        ("always", {"echo", "add"}),
        ("never", set()),
        ({}, {"echo", "add"}),
        ({"never": {}}, {"echo", "add"}),
        ({"always": {}}, {"echo", "add"}),
        ({"never": {"read_only": True}}, {"echo"}),
        ({"never": {"read_only": True, "tool_names": ["echo"]}}, {"echo", "add"}),
    ],
)
def test_which_calls_wait_for_approval(wanted: Any, asks: set[str]):
    tools = served(mcp(require_approval=wanted), box=[ECHO, ADD])
    assert {name for name in tools.offers if isinstance(tools.verdict(name), NeedsApproval)} == asks


def test_a_server_without_a_list_in_the_context_is_to_be_listed():
    assert served(mcp()).unlisted == ("box",)
    assert served(mcp(), box=[]).unlisted == ()
    assert served(mcp(allowed_tools=["add", "echo"]), box=[ADD]).unlisted == ()


@pytest.mark.parametrize(
    ("choice", "offers", "only"),
    [
        ({"type": "mcp", "server_label": "a"}, ["echo", "a__add"], None),
        ({"type": "mcp", "server_label": "a", "name": "add"}, ["echo", "a__add", "b__add", "f"], "a__add"),
        ({"type": "allowed_tools", "tools": [{"type": "mcp", "server_label": "b"}]}, ["b__add"], None),
        # Of a server that is not listed yet nothing is known: what the choice leaves is nothing.
        ({"type": "mcp", "server_label": "c"}, [], None),
        ({"type": "mcp", "server_label": "c", "name": "x"}, [], None),
        ({"type": "allowed_tools", "tools": [{"type": "mcp", "server_label": "c"}]}, [], None),
    ],
)
def test_choices_of_servers(choice: Any, offers: list[str], only: str | None):
    tools = served(mcp("a"), mcp("b"), mcp("c"), function("f"), choice=choice, a=[ECHO, ADD], b=[ADD])
    assert (list(tools.offers), tools.only and tools.only.model_name) == (offers, only)
    assert tools.mode == ("auto" if choice["type"] == "allowed_tools" else "required")
    assert {name for name in ("echo", "a__add", "b__add", "f") if not isinstance(tools.verdict(name), Rejected)} == set(
        [only] if only else offers
    )


@pytest.mark.parametrize("named", [{"server_label": "other"}, {"server_label": "box", "name": "other"}])
def test_a_choice_of_nothing_that_is_there_is_refused(named: dict[str, Any]):
    with pytest.raises(InvalidRequest) as caught:
        served(mcp(), choice={"type": "mcp", **named}, box=[ECHO])
    assert caught.value.param == "tool_choice"
