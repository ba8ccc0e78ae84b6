"""Hosted tools: what goes into the tool behind one, and what comes out of it."""

import json
from typing import Any, get_args

import pytest

from app.domain.calls import arguments_for, hosted_call
from app.domain.hosted import HostedRoute
from app.domain.toolbox import ByHost
from app.domain.tools.answers import Answer
from app.domain.tools.shell import outputs_of
from app.domain.tools.table import SERVER_TOOLS, kind_of
from app.domain.tools.web_search import WebSearch
from app.wire.events import STAGES
from app.wire.items import ServerCallItem
from app.wire.tools import HostedTool
from tests.unit.build import counting

MAPPED = HostedRoute(
    server="s",
    tool="t",
    arguments={"q": "$queries", "of": "$tenant", "in": "$vector_store_ids", "at": "$container", "size": 3},
)


def sent(kind: str, route: HostedRoute, given: dict[str, Any], **declaration: Any) -> dict[str, Any] | None:
    """The arguments of the tool, from those of the model and the declaration."""
    call = hosted_call(counting(), ByHost(kind, declaration), route, json.dumps(given), "")
    return arguments_for(call, tenant="acme", container="box")


def test_every_call_that_the_server_runs_has_its_tool_in_the_table():
    items = {str(item.__struct_config__.tag) for item in get_args(ServerCallItem)}
    assert SERVER_TOOLS.keys() == items | {"shell_call"}
    assert all(set(tool.stages) <= set(STAGES.get(type_, ())) for type_, tool in SERVER_TOOLS.items())


def test_arguments_are_mapped():
    made = sent("file_search", MAPPED, {"queries": ["a", "b"]}, vector_store_ids=["vs_1"])
    assert made == {"q": ["a", "b"], "of": "acme", "in": ["vs_1"], "at": "box", "size": 3}


def test_the_model_says_neither_whose_files_nor_which():
    given = {"queries": ["a"], "tenant": "victim", "vector_store_ids": ["vs_2"], "container": "theirs"}
    assert sent("file_search", MAPPED, given) == {"q": ["a"], "of": "acme", "at": "box", "size": 3}


def test_without_a_mapping_the_tool_gets_what_the_model_said():
    route = HostedRoute(server="s", tool="t")
    assert sent("web_search", route, {"query": "a", "more": 1}) == {"query": "a"}
    assert sent("file_search", route, {"query": "a"}) == {"queries": ["a"]}


def test_a_filter_that_nobody_would_hear_of_is_seen():
    filters = {"type": "eq", "key": "year", "value": 2024}
    assert MAPPED.drops({"filters": filters}) == "filters"
    assert MAPPED.drops({}) is None
    assert HostedRoute(server="s", tool="t", arguments={"f": "$filters"}).drops({"filters": filters}) is None


@pytest.mark.parametrize(
    ("path", "structured", "text", "found"),
    [
        ("", {"results": [{"link": "u", "name": "t", "body": "x"}]}, "", [{"url": "u", "title": "t", "text": "x"}]),
        ("a.b", {"a": {"b": [{"url": "u"}]}}, "", [{"url": "u"}]),
        ("", None, '[{"href": "u"}]', [{"url": "u"}]),
        ("", None, "plain words", [{"text": "plain words"}]),
        ("", ["bare"], "", [{"text": "bare"}]),
        ("nowhere", {"results": []}, "said", [{"text": "said"}]),
        ("", {"results": []}, "said", []),
        ("", None, "", []),
    ],
)
def test_results_are_found(path: str, structured: Any, text: str, found: Any):
    route = HostedRoute(server="s", tool="t", results=path)
    assert WebSearch().results(Answer(text, structured), route) == found


def test_fields_may_be_named():
    route = HostedRoute(server="s", tool="t", fields={"url": "where"})
    assert WebSearch().results(Answer(structured=[{"where": "u", "url": "other"}]), route) == [{"url": "u"}]


@pytest.mark.parametrize(
    ("structured", "outcome"),
    [
        ({"stdout": "x", "exit_code": 2}, {"type": "exit", "exit_code": 2}),
        ({"stdout": "x"}, {"type": "exit", "exit_code": 0}),
        ({"stdout": "x", "exit_code": "SIGKILL"}, {"type": "exit", "exit_code": 1}),
        ({"stdout": "x", "timed_out": True}, {"type": "timeout"}),
    ],
)
def test_a_command_s_outcome(structured: Any, outcome: Any):
    (output,) = outputs_of(Answer(structured=structured), HostedRoute(server="s", tool="t"))
    assert output == {"stdout": "x", "stderr": "", "outcome": outcome}


def test_a_shell_is_ours_in_a_container_only():
    def kind(environment: Any) -> str | None:
        return kind_of(HostedTool("shell", {"type": "shell", "environment": environment}))

    assert (kind({"type": "container_auto"}), kind({"type": "local"}), kind(None)) == ("shell", None, None)
