"""Hosted tools: what goes into the tool behind one, and what comes out of it."""

from typing import Any

import pytest

from app.domain.hosted import Asked, HostedRoute, arguments_of, kind_of, results_of, shell_outputs
from app.wire.tools import HostedTool

MAPPED = HostedRoute(
    server="s",
    tool="t",
    arguments={"q": "$queries", "of": "$tenant", "in": "$vector_store_ids", "at": "$container", "size": 3},
)


def asked(given: dict[str, Any], **declaration: Any) -> Asked:
    """What the model has said, and what was declared."""
    return Asked(given, declaration, tenant="acme", container="box")


def test_arguments_are_mapped():
    made = arguments_of("file_search", MAPPED, asked({"queries": ["a", "b"]}, vector_store_ids=["vs_1"]))
    assert made == {"q": ["a", "b"], "of": "acme", "in": ["vs_1"], "at": "box", "size": 3}


def test_the_model_says_neither_whose_files_nor_which():
    said = {"queries": ["a"], "tenant": "victim", "vector_store_ids": ["vs_2"], "container": "theirs"}
    made = arguments_of("file_search", MAPPED, asked(said))
    assert made == {"q": ["a"], "of": "acme", "at": "box", "size": 3}


def test_without_a_mapping_the_tool_gets_what_the_model_said():
    route = HostedRoute(server="s", tool="t")
    assert arguments_of("web_search", route, asked({"query": "a", "more": 1})) == {"query": "a"}
    assert arguments_of("file_search", route, asked({"query": "a"})) == {"queries": ["a"]}


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
    assert results_of("web_search", route, structured, text) == found


def test_fields_may_be_named():
    route = HostedRoute(server="s", tool="t", fields={"url": "where"})
    assert results_of("web_search", route, [{"where": "u", "url": "other"}], "") == [{"url": "u"}]


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
    (output,) = shell_outputs(HostedRoute(server="s", tool="t"), structured, "")
    assert output == {"stdout": "x", "stderr": "", "outcome": outcome}


def test_a_shell_is_ours_in_a_container_only():
    def kind(environment: Any) -> str | None:
        return kind_of(HostedTool("shell", {"type": "shell", "environment": environment}))

    assert (kind({"type": "container_auto"}), kind({"type": "local"}), kind(None)) == ("shell", None, None)
