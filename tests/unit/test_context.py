"""Request + chain → context: calls and outputs are paired, duplicates refused, references resolved, items normalised."""

from collections.abc import Sequence
from typing import Any

import pytest

from app.domain.context import Context, check_parent, references, resolve, restore
from app.errors import InvalidRequest
from tests.unit.build import SEAL, assistant, call, context, counting, function, item, output, plain_item, request, user


def refused(*items: dict[str, Any], **options: Any) -> InvalidRequest:
    """The error of a context that can't be."""
    with pytest.raises(InvalidRequest) as caught:
        context(*items, **options)
    assert caught.value.status == 400
    return caught.value


def items(*given: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    """The items of a context."""
    return [plain_item(one) for one in context(*given, **options).items]


# -- Pairing ----------------------------------------------------------------------------------------------------------------


def test_calls_are_paired_with_their_outputs_by_position():
    given = [call("a"), call("b"), output("b", "2"), user("x"), output("a", "1")]
    answers = context(*given).answers
    assert {position: plain_item(one)["output"] for position, one in answers.items()} == {0: "1", 1: "2"}


def test_an_output_answers_the_earliest_open_call_of_its_id():
    given = [call("a"), call("a"), output("a", "1"), output("a", "2"), call("a"), output("a", "3")]
    answers = context(*given).answers
    assert {position: plain_item(one)["output"] for position, one in answers.items()} == {0: "1", 1: "2", 4: "3"}


def test_a_call_of_the_chain_is_answered_by_the_new_input():
    made = context(output("a"), chain=[user("x") | {"id": "msg_0"}, call("a", id="fc_0")])
    assert list(made.answers) == [1]
    assert [plain_item(one)["type"] for one in made.input] == ["function_call_output"]
    assert len(made.items) == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([call("a")], "No tool output found for function call a."),
        ([call("a"), user("x")], "No tool output found for function call a."),
        ([output("a")], "No tool call found for function call output with call_id a."),
        ([output("a"), call("a")], "No tool call found for function call output with call_id a."),
        ([call("a"), output("a"), output("a")], "No tool call found for function call output with call_id a."),
        ([call("a"), call("a"), output("a")], "No tool output found for function call a."),
        (
            [{"type": "custom_tool_call", "call_id": "a", "name": "run", "input": ""}],
            "No tool output found for custom tool call a.",
        ),
        (
            [{"type": "computer_call", "id": "cu_1", "call_id": "a", "actions": [], "status": "completed"}],
            "No tool output found for computer call a.",
        ),
        (
            [{"type": "shell_call_output", "call_id": "a", "output": []}],
            "No tool call found for shell call output with call_id a.",
        ),
    ],
)
def test_a_call_or_output_that_is_left_alone_is_refused(given: list[dict[str, Any]], message: str):
    error = refused(*given)
    assert (error.message, error.param) == (message, "input")


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "shell_call", "environment": {"type": "container_reference", "container_id": "c"}},
        {"type": "tool_search_call", "execution": "server"},
    ],
)
def test_an_unanswered_call_of_another_server_is_taken_and_named(fields: dict[str, Any]):
    made = context({"id": "x_1", "call_id": "a", "status": "completed", **fields}, user("x"))
    assert made.answers == {}
    assert made.left_out.items == (fields["type"],)


def test_a_call_of_the_client_s_tool_that_was_cut_off_needs_no_output():
    shell = {"type": "shell_call", "id": "sh_1", "call_id": "a", "status": "incomplete"}
    made = context(user("x"), chain=[shell])
    assert (made.answers, made.left_out.items) == ({}, ())


@pytest.mark.parametrize("status", ["incomplete", "in_progress"])
def test_a_call_that_was_cut_off_needs_no_output(status: str):
    assert [one["type"] for one in items(user("x"), chain=[call("a", id="fc_0", status=status)])] == ["message"]
    assert "No tool call found" in refused(output("a"), chain=[call("a", id="fc_0", status=status)]).message


# -- Duplicates and references ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"chain": [assistant("x", id="msg_a")]},
        {"chain": [], "twice": True},
    ],
)
def test_an_item_that_is_there_already_is_refused(options: dict[str, Any]):
    given = [assistant("x", id="msg_a")] * (2 if options.pop("twice", False) else 1)
    error = refused(*given, **options)
    assert error.message.startswith("Duplicate item found with id msg_a.") and error.param == "input"


def test_items_without_ids_are_never_duplicates():
    assert len(items(user("x"), user("x"))) == 2


def test_a_reference_is_the_item_that_it_names():
    stored = assistant("x", id="msg_a", status="completed")
    assert references(request(input=[{"id": "msg_a"}, user("y")]).input) == ["msg_a"]
    made = items({"type": "item_reference", "id": "msg_a"}, referenced={"msg_a": stored})
    assert made == [stored | {"content": [{"type": "output_text", "text": "x", "annotations": []}]}]


def test_an_unknown_reference_is_refused():
    error = refused({"id": "msg_a"})
    assert error.message.startswith("Item with id 'msg_a' not found.") and error.param == "input"


def test_a_reference_to_an_item_of_the_chain_is_a_duplicate():
    stored = assistant("x", id="msg_a")
    assert "Duplicate" in refused({"id": "msg_a"}, chain=[stored], referenced={"msg_a": stored}).message


# -- Normalisation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        (
            user("x"),
            {
                "type": "message",
                "id": "msg_1",
                "role": "user",
                "content": [{"type": "input_text", "text": "x"}],
                "status": "completed",
            },
        ),
        (
            {"role": "assistant", "content": "x", "phase": "commentary"},
            {
                "type": "message",
                "id": "msg_1",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "x", "annotations": []}],
                "status": "completed",
                "phase": "commentary",
            },
        ),
        (
            {"type": "message", "id": "mine", "role": "user", "content": [], "status": None, "phase": None},
            {"type": "message", "id": "mine", "role": "user", "content": [], "status": "completed"},
        ),
        (
            {"type": "reasoning", "summary": [], "content": None, "encrypted_content": None, "status": None},
            {"type": "reasoning", "id": "rs_1", "summary": []},
        ),
        (
            {"type": "web_search_call", "status": "completed", "action": {"type": "search"}},
            {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "search"}},
        ),
        (
            {"type": "mcp_list_tools", "server_label": "s", "tools": []},
            {"type": "mcp_list_tools", "id": "mcpl_1", "server_label": "s", "tools": []},
        ),
        (
            {"type": "additional_tools", "role": "developer", "tools": []},
            {"type": "additional_tools", "id": "at_1", "role": "developer", "tools": []},
        ),
    ],
)
def test_an_item_is_stored_with_id_status_and_parts(given: dict[str, Any], stored: dict[str, Any]):
    assert items(given) == [stored]


def test_calls_and_outputs_get_their_prefixes_and_a_status():
    custom = {"type": "custom_tool_call", "call_id": "b", "name": "run", "input": "", "namespace": None}
    answered = {"type": "custom_tool_call_output", "call_id": "b", "output": "", "status": None}
    made = items(call("a", namespace=None), output("a"), custom, answered)
    assert [one["id"] for one in made] == ["fc_1", "fco_2", "ctc_3", "ctco_4"]
    assert {one["status"] for one in made} == {"completed"}
    assert not any("namespace" in one for one in made)


def test_items_of_the_chain_are_left_as_they_are():
    stored = {"type": "message", "id": "msg_0", "role": "user", "content": [{"type": "input_text", "text": "x"}]}
    assert items(user("y"), chain=[stored])[0] == stored


# -- The rest ---------------------------------------------------------------------------------------------------------------


def test_tools_of_the_context_join_the_toolbox():
    added = {"type": "additional_tools", "id": "at_0", "role": "developer", "tools": [function("g")]}
    assert list(context(user("x"), chain=[added], tools=[function("f")]).toolbox.offers) == ["f", "g"]


def test_instructions_are_those_of_this_request():
    assert context(user("x"), instructions="be brief").instructions == "be brief"
    assert context(user("x")).instructions is None


@pytest.mark.parametrize("status", ["queued", "in_progress"])
def test_a_parent_in_the_making_can_t_be_continued(status: str):
    with pytest.raises(InvalidRequest, match="'resp_1' is still in progress") as caught:
        check_parent("resp_1", status)
    assert caught.value.param == "previous_response_id"


@pytest.mark.parametrize("status", ["completed", "incomplete", "failed", "cancelled"])
def test_a_parent_that_has_ended_can_be_continued(status: str):
    assert check_parent("resp_1", status) is None


# -- MCP servers and approvals ----------------------------------------------------------------------------------------------

MCP = {"type": "mcp", "server_label": "box", "server_url": "http://x"}


def asked(id: str = "mcpr_1", **more: Any) -> dict[str, Any]:
    """An approval request."""
    fields = {"server_label": "box", "name": "echo", "arguments": '{"x":1}', **more}
    return {"type": "mcp_approval_request", "id": id, **fields}


def answered(id: str = "mcpr_1", *, approve: bool = True) -> dict[str, Any]:
    """Its answer."""
    return {"type": "mcp_approval_response", "approval_request_id": id, "approve": approve}


def run(id: str = "mcpr_1", **more: Any) -> dict[str, Any]:
    """Its call."""
    fields = {
        "server_label": "box",
        "name": "echo",
        "arguments": '{"x":1}',
        "output": "1",
        "status": "completed",
        **more,
    }
    return {"type": "mcp_call", "id": "mcp_1", "approval_request_id": id, **fields}


def decided(*given: dict[str, Any], stored: Sequence[dict[str, Any]] = (asked(),), **options: Any) -> Context:
    """The context of a request whose input answers these stored approval requests."""
    chain = [item(one) for one in options.pop("chain", ())]
    requests = {one["id"]: item(one) for one in stored}
    return resolve(request(input=list(given), tools=[MCP]), chain, {}, counting(), seal=SEAL, requests=requests)


def test_what_is_approved_is_the_stored_request():
    copy = asked(arguments='{ "x" : 1.0 }')
    made = decided(copy, answered())
    assert [plain_item(one) for one in made.approved] == [asked()]
    assert made.decisions == (("mcpr_1", True),)


def test_a_denial_answers_its_request():
    made = decided(answered(approve=False), chain=[asked()])
    assert (made.approved, made.decisions) == ((), (("mcpr_1", False),))
    assert plain_item(made.answers[0])["approve"] is False


def test_what_was_made_already_is_not_decided_again():
    for one in (run(), run(status="incomplete"), run(output=None, error="no", status="failed")):
        made = decided(asked(), answered(), one, user("and?"))
        assert (made.approved, made.decisions) == ((), ())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([asked(), answered("mcpr_2")], "not found"),
        ([answered()], "not found"),
        ([asked("mcpr_2"), answered("mcpr_2")], "not found"),
        ([asked(), answered(), answered(approve=False)], "answered twice"),
        ([asked(name="add"), answered()], "not what was asked"),
        ([asked(server_label="other"), answered()], "not what was asked"),
        ([asked(arguments='{"x":2}'), answered()], "not what was asked"),
        ([asked(arguments="{"), answered()], "not what was asked"),
    ],
)
def test_an_answer_to_what_was_not_asked_is_refused(given: list[dict[str, Any]], message: str):
    with pytest.raises(InvalidRequest, match=message) as caught:
        decided(*given)
    assert caught.value.param == f"input[{len(given) - 1}].approval_request_id"


def test_an_approval_needs_its_server_and_a_denial_does_not():
    elsewhere = asked(server_label="other")
    with pytest.raises(InvalidRequest, match="not in 'tools'"):
        decided(elsewhere, answered(), stored=[elsewhere])
    assert decided(elsewhere, answered(approve=False), stored=[elsewhere]).decisions == (("mcpr_1", False),)


def test_a_request_is_answered_by_its_call_or_else_by_what_the_client_said():
    for given, type_ in (
        ([asked(), answered(), run()], "mcp_call"),
        ([asked(), answered(), run(status="incomplete")], "mcp_call"),
        ([asked(), answered()], "mcp_approval_response"),
        ([asked(), answered(approve=False)], "mcp_approval_response"),
    ):
        assert [plain_item(one)["type"] for one in pair_of(*given).values()] == [type_]
    assert pair_of(asked()) == {}


def pair_of(*given: dict[str, Any]) -> dict[int, Any]:
    """The answers of a context that is there already."""
    return dict(
        restore(
            request(tools=[MCP]), [item(one) for one in given], [], [], seal=SEAL, requests={}, hosted=frozenset()
        ).answers
    )


def test_a_restored_run_makes_what_was_approved_and_not_made():
    stored = [item(one) for one in (asked(), answered())]
    requests: Any = {"mcpr_1": item(asked())}

    def approved(*said: dict[str, Any]) -> int:
        made = restore(
            request(tools=[MCP]),
            stored,
            stored[1:],
            [item(one) for one in said],
            seal=SEAL,
            requests=requests,
            hosted=frozenset(),
        )
        return len(made.approved)

    assert (approved(), approved(run(output=None, error="unknown", status="failed"))) == (1, 0)


def test_a_list_counts_until_a_later_one_and_not_if_it_failed():
    def listed(*tools: str, **more: Any) -> dict[str, Any]:
        fields = {"tools": [{"name": name, "input_schema": {}} for name in tools], **more}
        return {"type": "mcp_list_tools", "server_label": "box", **fields}

    def offered(*given: dict[str, Any]) -> tuple[list[str], tuple[str, ...]]:
        toolbox = context(*given, user("x"), tools=[MCP]).toolbox
        return list(toolbox.offers), toolbox.unlisted

    assert offered() == ([], ("box",))
    assert offered(listed("a", "b")) == (["a", "b"], ())
    assert offered(listed("a"), listed("b")) == (["b"], ())
    assert offered(listed(error="no")) == ([], ("box",))
    assert offered(listed("a"), listed(error="no")) == (["a"], ())


def test_an_approval_that_the_chain_has_used_is_no_history():
    """It is an answer like the first one, and refused where answers are stored."""
    assert decided(answered(), chain=[asked(), answered(), run()]).decisions == (("mcpr_1", True),)
