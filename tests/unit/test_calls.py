"""Calls that the server runs: what clients hear of them, and what the model reads."""

from typing import Any

import msgspec
import pytest

from app.domain.calls import approval_request, arguments_for, close_list, hosted_call, mcp_call, open_list
from app.domain.hosted import HostedRoute
from app.domain.tool_transcript import answer_for_model, asked_of_model
from app.domain.toolbox import ByHost
from app.domain.tools.answers import Answer, error_text, failure, not_json, unknown_outcome
from app.domain.tools.server_tool import parse_arguments
from app.wire.items import CallError
from app.wire.tools import ListedTool
from tests.replay import replay
from tests.unit.build import counting, heard, item, plain, plain_item

ROUTE = HostedRoute(server="box", tool="tool")


def made(events: list[Any]) -> dict[str, Any]:
    """The one item that events put together, as the oracle has checked."""
    [one] = replay(heard(events))["output"]
    return dict(one)


def mcp(answer: Answer, arguments: str = '{"a":1}', **more: Any) -> dict[str, Any]:
    """An MCP call's item, with its answer."""
    call = mcp_call(counting(), "box", "add", arguments, **more)
    return made([*call.open(0), *call.close(answer)])


def test_a_call_of_an_mcp_server():
    assert mcp(Answer("3"), approval="mcpr_1") == {
        "id": "mcp_1",
        "type": "mcp_call",
        "server_label": "box",
        "name": "add",
        "arguments": '{"a":1}',
        "output": "3",
        "error": None,
        "approval_request_id": "mcpr_1",
        "status": "completed",
    }


@pytest.mark.parametrize(
    ("answer", "error", "read"),
    [
        (
            not_json(),
            {"type": "mcp_protocol_error", "code": -32602, "message": "The arguments are not a JSON object."},
            "The arguments are not a JSON object.",
        ),
        (failure("http_error", 503, "busy"), {"type": "http_error", "code": 503, "message": "busy"}, "busy"),
        (
            Answer(error=CallError("mcp_tool_execution_error", content=[{"type": "text", "text": "no"}])),
            {"type": "mcp_tool_execution_error", "content": [{"type": "text", "text": "no"}]},
            "no",
        ),
    ],
)
def test_a_call_that_fails(answer: Answer, error: dict[str, Any], read: str):
    failed = mcp(answer)
    assert (failed["status"], failed["output"], failed["error"]) == ("failed", None, error)
    assert answer_for_model(item(failed)) == f"Error: {read}"


def test_an_unknown_outcome_says_so():
    assert "may have been carried out" in answer_for_model(item(mcp(unknown_outcome())))


def test_a_call_that_is_cut_off_is_incomplete():
    call = mcp_call(counting(), "box", "add", "{}")
    cut = made([*call.open(0), *call.cut_off()])
    assert (cut["status"], cut["output"], cut["error"]) == ("incomplete", None, None)
    assert "may have been carried out" in answer_for_model(item(cut))


@pytest.mark.parametrize(
    ("arguments", "given"),
    [("", {}), ("{}", {}), ('{"a": 1}', {"a": 1}), ("[1]", None), ("1", None), ("{", None), ("null", None)],
)
def test_arguments_are_a_json_object(arguments: str, given: dict[str, Any] | None):
    assert parse_arguments(arguments) == given


def test_an_error_of_another_server_s_history_is_readable():
    assert error_text("it broke") == "it broke"
    assert error_text(CallError("x", content={"odd": 1})) == '{"odd":1}'


def test_a_list_and_a_request_for_approval():
    new_id = counting()
    begun, opening = open_list(new_id, "box", 0)
    listed = made([*opening, *close_list(begun, 0, [ListedTool("add")])])
    schema = {"type": "object", "properties": {}}
    assert (listed["tools"], "error" in listed) == ([{"name": "add", "input_schema": schema}], False)
    failed = made([*opening, *close_list(begun, 0, [], "no")])
    assert (failed["tools"], failed["error"]) == ([], "no")
    asked = made(approval_request(new_id, "box", "add", "{}", 0))
    assert sorted(asked) == ["arguments", "id", "name", "server_label", "type"]


@pytest.mark.parametrize(
    ("approve", "read"), [(False, "did not approve this call. It was not made. The reason: no"), (True, "broken off")]
)
def test_an_approval_without_its_call(approve: bool, read: str):
    answer = item({"type": "mcp_approval_response", "approval_request_id": "x", "approve": approve, "reason": "no"})
    assert read in answer_for_model(answer)


# -- Hosted ones ------------------------------------------------------------------------------------------------------------

HOSTED: list[tuple[Any, str, Answer, dict[str, Any]]] = [
    (
        "web_search",
        '{"query": "x"}',
        Answer(structured={"results": [{"link": "http://a", "name": "A", "snippet": "s"}]}),
        {"results": [{"url": "http://a", "title": "A", "text": "s"}]},
    ),
    (
        "file_search",
        '{"queries": ["x", "y"]}',
        Answer('[{"file_id": "f", "name": "a.txt", "score": 1, "content": "s"}]'),
        {"queries": ["x", "y"], "results": [{"file_id": "f", "filename": "a.txt", "score": 1, "text": "s"}]},
    ),
    (
        "code_interpreter",
        '{"code": "print(1)"}',
        Answer("1\n", images=[("image/png", "AA==")]),
        {
            "code": "print(1)",
            "outputs": [{"type": "logs", "logs": "1\n"}, {"type": "image", "url": "data:image/png;base64,AA=="}],
        },
    ),
    ("image_generation", '{"prompt": "a cat"}', Answer(images=[("image/png", "AA==")]), {"result": "AA=="}),
]


@pytest.mark.parametrize(("kind", "arguments", "answer", "shown"), HOSTED)
def test_hosted_calls_end_completed_or_failed(kind: Any, arguments: str, answer: Answer, shown: dict[str, Any]):
    def call() -> Any:
        return hosted_call(counting(), ByHost(kind, {}), ROUTE, arguments, "cntr_1")

    one = call()
    done = made([*one.open(0), *one.close(answer)])
    assert done["status"] == "completed"
    assert {key: done[key] for key in shown} == shown
    one = call()
    failed = made([*one.open(0), *one.close(failure("http_error", 500, "broken"))])
    assert failed["status"] == "failed"
    assert "Error" in answer_for_model(item(failed))
    one = call()
    assert made([*one.open(0), *one.cut_off()])["status"] == "incomplete"


@pytest.mark.parametrize(("kind", "arguments", "answer", "shown"), HOSTED)
def test_the_model_reads_its_own_hosted_call_again(kind: Any, arguments: str, answer: Answer, shown: dict[str, Any]):
    one = hosted_call(counting(), ByHost(kind, {}), ROUTE, arguments, "cntr_1")
    said = asked_of_model(item(made([*one.open(0), *one.close(answer)])))
    assert said is not None and msgspec.json.decode(said.arguments) == msgspec.json.decode(arguments)


def test_a_shell_call_and_its_output_are_taken_back_as_they_came():
    one = hosted_call(counting(), ByHost("shell", {}), ROUTE, '{"commands": ["ls"]}', "cntr_1")
    answer = Answer(structured=[{"stdout": "a", "exit_code": 0}, {"timed_out": True}])
    events = [*one.open(0), *one.close(answer), *one.output(answer, 1)]
    for done in replay(heard(events))["output"]:
        assert plain_item(item(done)) == done


def test_bare_code_is_code_and_other_arguments_must_be_json():
    code = hosted_call(counting(), ByHost("code_interpreter", {}), ROUTE, "print(1)", "cntr_1")
    assert arguments_for(code, tenant="t", container="c") == {"code": "print(1)"}
    assert plain(code.item)["code"] == "print(1)"
    search = hosted_call(counting(), ByHost("web_search", {}), ROUTE, "cats", "cntr_1")
    assert arguments_for(search, tenant="t", container="c") is None


def test_the_operator_s_mapping_fills_in_arguments():
    route = HostedRoute(
        server="box",
        tool="t",
        arguments={"q": "$query", "n": 3, "who": "$tenant", "of": "$vector_store_ids", "missing": "$nothing"},
    )
    call = hosted_call(
        counting(), ByHost("file_search", {"vector_store_ids": ["vs"]}), route, '{"queries":["a","b"]}', ""
    )
    assert arguments_for(call, tenant="acme", container="") == {"q": "a b", "n": 3, "who": "acme", "of": ["vs"]}
