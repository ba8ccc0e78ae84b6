"""The life of a response: the status table, the echo of a request, sums of usage."""

from typing import Any, get_args

import pytest
from msgspec.structs import replace

from app.domain.lifecycle import NEXT, TERMINAL, Outcome, add_usage, close_response, open_response, outcome_of
from app.errors import ServerError, UpstreamRefused
from app.wire import events
from app.wire.chat import ChatUsage, CompletionTokensDetails, PromptTokensDetails
from app.wire.resources import InputTokensDetails, OutputTokensDetails, Response, Status, Usage
from tests.unit.build import ECHO, function, plain, request

USAGE = Usage(1, InputTokensDetails(), 2, OutputTokensDetails(), 3)
STATUSES: tuple[Status, ...] = get_args(Status)
OUTCOMES: tuple[Any, ...] = get_args(Outcome.__annotations__["status"])


def opened(**body: Any) -> Response:
    """A response at its beginning."""
    return open_response(request(**body), id="resp_1", created_at=7)


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("following", OUTCOMES)
def test_only_the_moves_of_the_table_are_taken(status: Status, following: Any):
    response = replace(opened(), status=status)
    if following in NEXT[status]:
        assert close_response(response, Outcome(following), usage=None, now=9).status == following
    else:
        with pytest.raises(AssertionError):
            close_response(response, Outcome(following), usage=None, now=9)


def test_the_table_knows_every_status_and_has_no_way_back():
    assert set(NEXT) == set(STATUSES)
    assert TERMINAL == set(OUTCOMES) == set(events.TERMINAL)
    assert all(not NEXT[status] for status in TERMINAL)
    assert all("queued" not in following for following in NEXT.values())
    assert "completed" not in NEXT["queued"]


@pytest.mark.parametrize(
    ("reason", "status", "why"),
    [
        ("stop", "completed", None),
        ("tool_calls", "completed", None),
        ("function_call", "completed", None),
        ("something new", "incomplete", None),
        ("abort", "cancelled", None),
        (None, "completed", None),
        ("length", "incomplete", "max_output_tokens"),
        ("content_filter", "incomplete", "content_filter"),
    ],
)
def test_a_finish_reason_is_an_outcome(reason: str | None, status: str, why: str | None):
    assert outcome_of(reason) == Outcome(status, reason=why)


def test_an_upstream_that_ends_with_an_error_has_failed():
    outcome = outcome_of("error")
    assert (outcome.status, outcome.error and outcome.error.status) == ("failed", 502)


@pytest.mark.parametrize("status", OUTCOMES)
def test_only_a_completed_response_says_when(status: Any):
    closed = close_response(opened(), Outcome(status), usage=USAGE, now=9)
    assert closed.completed_at == (9 if status == "completed" else None)
    assert (closed.usage, closed.created_at) == (USAGE, 7)


def test_a_failed_response_says_why():
    closed = close_response(opened(), Outcome("failed", error=ServerError("broken")), usage=None, now=9)
    assert plain(closed.error) == {"code": "server_error", "message": "broken"}
    refused = UpstreamRefused("too long", status=400, type="x")
    closed = close_response(opened(), Outcome("failed", error=refused), usage=None, now=9)
    assert plain(closed.error) == {"code": "invalid_prompt", "message": "too long"}


def test_an_incomplete_response_says_why():
    closed = close_response(opened(), outcome_of("length"), usage=None, now=9)
    assert plain(closed.incomplete_details) == {"reason": "max_output_tokens"}
    assert close_response(opened(), outcome_of("stop"), usage=None, now=9).incomplete_details is None


# -- The echo ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "echo"),
    [
        ({"image": {"context_compression": "auto"}}, {"image": {"context_compression": "disabled"}}),
        ({"image": {}, "access_programs": {}}, {"image": {"context_compression": "disabled"}}),
        ({"access_programs": {"cyber": "standard"}}, {"access_programs": {"cyber": "standard"}}),
        ({"image": None, "access_programs": None}, {}),
    ],
)
def test_the_policies_that_are_in_effect_are_echoed_where_the_request_names_them(given: Any, echo: Any):
    shown = plain(opened(**given))
    assert {key: shown[key] for key in ("image", "access_programs") if key in shown} == echo


def test_a_bare_request_is_echoed_with_every_default():
    assert plain(opened()) == {
        **ECHO,
        "id": "resp_1",
        "created_at": 7,
        "completed_at": None,
        "status": "in_progress",
        "output": [],
        "usage": None,
    }


@pytest.mark.parametrize(
    ("body", "echo"),
    [
        ({"temperature": 0}, {"temperature": 0}),
        ({"top_p": 0}, {"top_p": 0}),
        ({"parallel_tool_calls": False}, {"parallel_tool_calls": False}),
        ({"store": False}, {"store": False}),
        ({"max_output_tokens": 16}, {"max_output_tokens": 16}),
        ({"max_tool_calls": 2}, {"max_tool_calls": 2}),
        ({"frequency_penalty": -1}, {"frequency_penalty": -1}),
        ({"metadata": {"a": "b"}}, {"metadata": {"a": "b"}}),
        ({"truncation": "auto"}, {"truncation": "auto"}),
        ({"instructions": "x"}, {"instructions": "x"}),
        ({"previous_response_id": "resp_0"}, {"previous_response_id": "resp_0"}),
        ({"user": "u", "safety_identifier": "s"}, {"user": "u", "safety_identifier": "s"}),
        ({"prompt_cache_key": "k"}, {"prompt_cache_key": "k"}),
        ({"prompt_cache_retention": "24h"}, {"prompt_cache_retention": "24h"}),
        ({"service_tier": "flex"}, {"service_tier": "default"}),
        ({"reasoning": {"effort": "low"}}, {"reasoning": {"effort": "low", "summary": None}}),
        ({"reasoning": {"generate_summary": "auto"}}, {"reasoning": {"effort": None, "summary": "auto"}}),
        ({"text": {"verbosity": "low"}}, {"text": {"format": {"type": "text"}, "verbosity": "low"}}),
        (
            {"text": {"format": {"type": "json_schema", "name": "n", "schema": {}}}},
            {
                "text": {
                    "format": {"type": "json_schema", "name": "n", "schema": {}, "description": None, "strict": False}
                }
            },
        ),
        (
            {"tools": [function("f")], "tool_choice": {"type": "function", "name": "f"}},
            {
                "tools": [{"type": "function", "name": "f", "description": None, "parameters": None, "strict": None}],
                "tool_choice": {"type": "function", "name": "f"},
            },
        ),
        (
            {
                "tools": [function("f")],
                "tool_choice": {"type": "allowed_tools", "tools": [{"type": "function", "name": "f"}]},
            },
            {"tool_choice": {"type": "allowed_tools", "tools": [{"type": "function", "name": "f"}], "mode": "auto"}},
        ),
    ],
)
def test_a_parameter_is_echoed(body: dict[str, Any], echo: dict[str, Any]):
    made = plain(opened(**body))
    assert {key: made[key] for key in echo} == echo


# -- Usage ------------------------------------------------------------------------------------------------------------------


def test_usage_is_the_sum_over_turns():
    first = ChatUsage(
        prompt_tokens=10,
        completion_tokens=5,
        total_tokens=15,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=4, cache_write_tokens=2),
        completion_tokens_details=CompletionTokensDetails(reasoning_tokens=3),
    )
    second = ChatUsage(prompt_tokens=20, completion_tokens=1)
    assert plain(add_usage(add_usage(None, first), second)) == {
        "input_tokens": 30,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 2},
        "output_tokens": 6,
        "output_tokens_details": {"reasoning_tokens": 3},
        "total_tokens": 36,
    }


def test_a_turn_without_usage_adds_nothing():
    known = add_usage(None, ChatUsage(prompt_tokens=0, completion_tokens=2))
    assert add_usage(known, None) == add_usage(known, ChatUsage()) == known


def test_what_no_turn_has_reported_is_not_known():
    assert add_usage(add_usage(None, None), ChatUsage()) is None
