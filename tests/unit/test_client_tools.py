"""Tools of the client that have items of their own: what the model sees, which arguments fit, what becomes of the others."""

from typing import Any

import pytest

from app.domain.client_tools import Unfit, client_tool_of
from app.domain.compaction import Compacted, seal_compacted
from app.domain.context import waits_for_client
from app.domain.toolbox import ByClient, Rejected
from app.domain.turn import Turn
from app.wire.items import type_of
from app.wire.tools import HostedTool
from tests.unit.build import SEAL, chunk, context, counting, function, item, made, piece, toolbox, user

SEARCH = {"type": "tool_search", "execution": "client"}


def called(type_: str, arguments: str) -> dict[str, Any]:
    """What the call of a tool holds, without what every call has."""
    tool = client_tool_of(HostedTool(type_, {"type": type_, "execution": "client"}))
    assert tool
    fields = tool.item("x_1", "c1", arguments).fields
    common = {"type": tool.item_type, "id": "x_1", "call_id": "c1", "status": "in_progress"}
    assert common.items() <= fields.items()
    return {key: value for key, value in fields.items() if key not in common}


@pytest.mark.parametrize(
    ("type_", "arguments", "held"),
    [
        (
            "shell",
            '{"commands":["ls"],"timeout_ms":"10","why":"to see"}',
            {"action": {"commands": ["ls"], "timeout_ms": 10}, "environment": {"type": "local"}},
        ),
        (
            "local_shell",
            '{"command":["ls"],"env":null}',
            {"action": {"type": "exec", "command": ["ls"], "env": {}}},
        ),
        (
            "apply_patch",
            '{"type":"delete_file","path":"a","diff":null}',
            {"operation": {"type": "delete_file", "path": "a"}},
        ),
        (
            "computer",
            '{"actions":[{"type":"click","x":1.0,"y":2},{"type":"wait"}]}',
            {
                "actions": [{"type": "click", "x": 1, "y": 2, "button": "left"}, {"type": "wait"}],
                "pending_safety_checks": [],
            },
        ),
        (
            "computer_use_preview",
            '{"action":{"type":"type","text":"hi"}}',
            {"action": {"type": "type", "text": "hi"}, "pending_safety_checks": []},
        ),
        ("tool_search", '{"q":[1]}', {"arguments": {"q": [1]}, "execution": "client"}),
    ],
)
def test_the_arguments_of_a_call_become_its_item(type_: str, arguments: str, held: dict[str, Any]):
    assert called(type_, arguments) == held


@pytest.mark.parametrize(
    ("type_", "arguments", "why"),
    [
        ("shell", "ls", "not a JSON object"),
        ("shell", "{}", r"missing required field `commands`"),
        ("shell", '{"commands":"ls"}', r"Expected `array`, got `str` - at `\$.commands`"),
        ("shell", '{"commands":[]}', "length >= 1"),
        ("apply_patch", '{"type":"update_file","path":"a"}', "missing required field `diff`"),
        ("apply_patch", '{"type":"move_file","path":"a"}', "Invalid value 'move_file'"),
        ("computer", '{"actions":[{"type":"click","x":1}]}', r"missing required field `y` - at `\$.actions\[0\]`"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_with_the_reason(type_: str, arguments: str, why: str):
    with pytest.raises(Unfit, match=why):
        called(type_, arguments)


def test_an_equal_name_is_kept_apart_and_a_choice_finds_either():
    tools = [
        {"type": "shell"},
        function("shell"),
        {"type": "computer_use_preview", "display_height": 2, "display_width": 3, "environment": "browser"},
    ]
    assert list(toolbox(*tools).offers) == ["shell", "shell_2", "computer"]
    assert "3 x 2 pixels" in str(toolbox(*tools).offers["computer"].tool.description)
    chosen = {type_: toolbox(*tools, choice={"type": type_}).only for type_ in ("shell", "computer", "computer_use")}
    assert [offer and offer.model_name for offer in chosen.values()] == ["shell", "computer", "computer"]
    named = toolbox(*tools, choice={"type": "function", "name": "shell"}).only
    assert named and (named.model_name, named.by) == ("shell_2", ByClient())


def test_a_skill_of_the_shell_is_in_its_description():
    skill = {"name": "pdf", "description": "Reads PDF.", "path": "/skills/pdf"}
    [offer] = toolbox({"type": "shell", "environment": {"type": "local", "skills": [skill]}}).offers.values()
    assert str(offer.tool.description).endswith("\nSkill pdf, in /skills/pdf: Reads PDF.")


def test_a_search_has_the_client_s_own_description_and_parameters():
    own = {"type": "object", "properties": {"goal": {"type": "string"}}}
    [offer] = toolbox({**SEARCH, "description": "Find.", "parameters": own}).offers.values()
    assert isinstance(offer.by, ByClient)
    assert (offer.tool.description, getattr(offer.tool, "parameters", None)) == ("Find.", own)
    assert toolbox({"type": "tool_search"}).left_out == ("tool_search",)


def test_what_a_search_has_found_may_be_called_also_after_a_compaction():
    found = [function("get_time"), {"type": "namespace", "name": "crm", "tools": [function("find")]}, SEARCH]
    search = {"type": "tool_search_call", "call_id": "c1", "arguments": {}, "execution": "client"}
    output = {"type": "tool_search_output", "call_id": "c1", "tools": found, "execution": "client"}
    compaction = {"type": "compaction", "id": "cmp_1", "encrypted_content": seal_compacted(Compacted("Hm."), SEAL)}
    for after in ([], [compaction]):
        made = context(user("hi"), search, output, *after, user("go on"), tools=[SEARCH])
        assert list(made.toolbox.offers) == ["tool_search", "get_time", "crm__find"]
    assert [type_of(one) for _, one in made.visible] == ["compaction", "message"]


def test_a_call_is_added_whole_and_one_that_does_not_fit_is_rejected():
    turn = Turn(toolbox({"type": "shell"}), counting())
    items = made(
        turn,
        [
            chunk(tool_calls=[piece(0, "c1", "shell", '{"comm')]),
            chunk(tool_calls=[piece(0, None, None, 'ands":["ls"]}')]),
            chunk(tool_calls=[piece(1, "c2", "shell", '{"command":"ls"}')]),
            chunk("tool_calls"),
        ],
    )
    assert [(one["type"], one["call_id"], one["status"]) for one in items] == [("shell_call", "c1", "completed")]
    assert turn.client_calls == 1
    [own] = turn.own_calls
    assert isinstance(own.verdict, Rejected) and "commands" in own.verdict.reason


@pytest.mark.parametrize(
    ("fields", "waits"),
    [
        ({"type": "shell_call", "status": "completed", "environment": {"type": "local"}}, True),
        ({"type": "shell_call", "status": "completed", "environment": {"type": "container_reference"}}, False),
        ({"type": "computer_call", "status": "incomplete"}, False),
        ({"type": "shell_call_output", "status": "completed"}, False),
    ],
)
def test_a_response_waits_for_the_client_s_output_of_a_whole_call(fields: dict[str, Any], waits: bool):
    assert waits_for_client(item(fields)) is waits
