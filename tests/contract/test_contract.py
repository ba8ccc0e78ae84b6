"""The contract, for every scripted case: what is streamed is in order, is what is stored, and is what clients can read."""

from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any, get_args

import httpx
import openai
import openresponses_types.types as open_responses
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from tests.contract.cases import CASES, Case, outline
from tests.contract.compare import same
from tests.contract.conftest import Heard
from tests.replay import replay

Event = dict[str, Any]
EVERY = pytest.mark.parametrize("name", CASES)
COMPLETED = [name for name, case in CASES.items() if case.ends == "completed"]
ENDED_EARLY = [name for name in CASES if name not in COMPLETED]


# -- What is streamed is what is stored -------------------------------------------------------------------------------------


@EVERY
def test_the_events_are_in_order_and_make_what_the_case_says(name: str, heard: Heard):
    events, case = heard(name), CASES[name]
    response = replay(events)
    assert [outline(item) for item in response["output"]] == list(case.made)
    assert _ending(response) == case.ends
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1]["type"] == f"response.{response['status']}"
    assert _groups(events) == list(range(len(response["output"])))
    usage = response["usage"]
    if case.used is not None:
        assert (() if usage is None else (usage["input_tokens"], usage["output_tokens"])) == case.used


def _ending(response: dict[str, Any]) -> str:
    why = response["incomplete_details"] and response["incomplete_details"]["reason"]
    code = response["error"] and response["error"]["code"]
    return ":".join(filter(None, [response["status"], why, code]))


def _groups(events: list[Event]) -> list[int]:
    """The output index of each contiguous group of events: no item's events stand among another's."""
    indexes = [event["output_index"] for event in events if "output_index" in event]
    return [index for place, index in enumerate(indexes) if place == 0 or indexes[place - 1] != index]


@EVERY
def test_what_is_retrieved_is_the_terminal_event_s_response(name: str, heard: Heard, http: httpx.Client):
    response = heard(name)[-1]["response"]
    found = http.get(f"/responses/{response['id']}")
    if response["store"]:
        assert found.json() == response
    else:
        assert found.status_code == 404


@EVERY
def test_a_reply_that_is_not_streamed_is_the_same(name: str, heard: Heard, http: httpx.Client):
    streamed = heard(name)[-1]["response"]
    whole = http.post("/responses", json=CASES[name].request)
    if streamed["status"] == "failed":
        assert whole.status_code >= 400
        assert whole.json()["error"]["code"] == streamed["error"]["code"]
        assert whole.json()["error"]["message"] == streamed["error"]["message"]
    else:
        assert whole.status_code == 200
        assert same(whole.json()) == same(streamed)


# -- The official client ----------------------------------------------------------------------------------------------------


def _stream(client: openai.OpenAI, case: Case) -> Any:
    known = {"model", "input", "tools"}
    body = {key: value for key, value in case.request.items() if key not in known}
    return client.responses.stream(**{key: case.request[key] for key in known & case.request.keys()}, extra_body=body)


def _plain(model: BaseModel) -> Any:
    """A model of the SDK as JSON, without what its parsing added."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(one) for key, one in value.items() if key not in {"parsed", "parsed_arguments"}}
        return [strip(one) for one in value] if isinstance(value, list) else value

    return strip(model.to_dict())  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", COMPLETED)
def test_the_official_client_accumulates_the_same_response(name: str, heard: Heard, client: openai.OpenAI):
    texts: dict[int, str] = {}
    with _stream(client, CASES[name]) as stream:
        for event in stream:
            if event.type == "response.function_call_arguments.delta":
                texts[event.output_index] = event.snapshot
            if event.type == "response.output_text.delta" and event.content_index == 0:
                texts[event.output_index] = event.snapshot
        final = stream.get_final_response()
    assert same(_plain(final)) == same(heard(name)[-1]["response"])
    for index, text in texts.items():
        item = _plain(final)["output"][index]
        assert text == (item["arguments"] if "arguments" in item else item["content"][0]["text"])


@pytest.mark.parametrize("name", ENDED_EARLY)
def test_the_official_client_hears_how_a_response_ended_early(name: str, heard: Heard, client: openai.OpenAI):
    with _stream(client, CASES[name]) as stream:
        *_, last = stream
    terminal = heard(name)[-1]
    assert last.type == terminal["type"]
    assert same(_plain(last.response)) == same(terminal["response"])


# -- The official client's types --------------------------------------------------------------------------------------------


def tag(model: type[BaseModel]) -> str:
    """The value of a model's `type`, a literal or an enumeration of one."""
    annotation = model.model_fields["type"].annotation
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return str(next(iter(annotation)).value)
    return str(get_args(annotation)[0])


OPENAI_EVENTS: dict[str, TypeAdapter[Any]] = {
    tag(model): TypeAdapter(model) for model in get_args(get_args(ResponseStreamEvent)[0])
}
OPENAI_RESPONSE = TypeAdapter(Response)

OPENAI_EXTRAS = {
    ("Response", "store"): "on the wire of the hosted API in every example, though its SDK has no field for it",
    ("Response", "frequency_penalty"): "the same; the open specification demands it",
    ("Response", "presence_penalty"): "the same; the open specification demands it",
    ("ResponseFunctionCallArgumentsDoneEvent", "name"): "required by the API's specification",
    ("ResponseCustomToolCall", "status"): "the AI SDK drops calls without it",
    ("Logprob", "bytes"): "in events too, not only in items: the open specification demands it",
    ("LogprobTopLogprob", "bytes"): "the same",
}
"""(Model, field) that the SDK's types do not have → why it is sent. Its models take any field, so a misspelt one would pass."""


def extras(model: Any) -> Iterator[tuple[str, str]]:
    """The fields that no model declares."""
    if isinstance(model, BaseModel):
        yield from ((type(model).__name__, key) for key in model.model_extra or ())
        for value in model.__dict__.values():
            yield from extras(value)
    elif isinstance(model, list):
        for value in model:
            yield from extras(value)


OPENAI_CODES = {
    "insufficient_quota": "an upstream's own code is passed on, as clients decide by it whether to try again; the hosted API sends it too"
}
"""Codes of failed responses that the SDK's type does not list → why they are sent."""


def _with_a_known_code(event: Event) -> Event:
    error = event.get("response", {}).get("error")
    if error and error["code"] in OPENAI_CODES:
        return {**event, "response": {**event["response"], "error": {**error, "code": "server_error"}}}
    return event


@EVERY
def test_every_event_is_one_of_the_official_client_s_types(name: str, heard: Heard):
    for event in map(_with_a_known_code, heard(name)):
        model = OPENAI_EVENTS[event["type"]].validate_python(event, strict=True)
        assert set(extras(model)) <= OPENAI_EXTRAS.keys(), event
    OPENAI_RESPONSE.validate_python(_with_a_known_code(heard(name)[-1])["response"], strict=True)


def test_no_extra_is_declared_in_vain(heard: Heard):
    sent = {
        extra
        for name in CASES
        for event in map(_with_a_known_code, heard(name))
        for extra in extras(OPENAI_EVENTS[event["type"]].validate_python(event))
    }
    assert sent == OPENAI_EXTRAS.keys()


# -- The open specification's types -----------------------------------------------------------------------------------------

OPEN_EVENTS: dict[str, TypeAdapter[Any]] = {
    tag(model): TypeAdapter(model)
    for key, model in vars(open_responses).items()
    if key.startswith("Response") and key.endswith("StreamingEvent")
}
OPEN_RESPONSE = TypeAdapter(open_responses.ResponseResource)

BEYOND_OPEN = {
    "response.reasoning_text.delta": "the hosted API's name of what is `response.reasoning.delta` there",
    "response.reasoning_text.done": "the same, `response.reasoning.done`",
    "response.custom_tool_call_input.delta": "custom tools are not in the specification; the request asked for one",
    "response.custom_tool_call_input.done": "the same",
    "custom_tool_call": "the same: the item",
    **dict.fromkeys(
        [
            *("shell", "local_shell", "apply_patch", "computer", "tool_search"),
            *("shell_call", "local_shell_call", "apply_patch_call", "computer_call", "tool_search_call"),
            *(f"response.shell_call_command.{stage}" for stage in ("added", "delta", "done")),
        ],
        "of the client's tools it knows functions only; the request declared others",
    ),
    "response.compaction.compacting": "the specification has no trigger; the request had one",
    "custom": "the same: the declared tool",
    "namespace": "namespaces are not in the specification; the request asked for one",
    "json_schema": "the echo's `schema` must be null there, a mistake known as their issue 12; it is checked as null",
}
"""Types of events, items, tools and formats that the open specification does not know → why they are sent all the same. Events
of these types are left out of the check, items and tools of these types are left out of what holds them."""


def _narrowed(value: Any, met: set[str]) -> Any:
    """A response, event or item without what the specification does not know; `met` says what that was."""
    if isinstance(value, list):
        kept = [one for one in value if not (isinstance(one, dict) and one.get("type") in BEYOND_OPEN)]
        met |= {one["type"] for one in value if one not in kept}
        return [_narrowed(one, met) for one in kept]
    if isinstance(value, dict):
        if value.get("type") == "json_schema":
            met.add("json_schema")
            return {**value, "schema": None}
        return {key: _narrowed(one, met) for key, one in value.items()}
    return value


def _nulls(model: Any) -> Iterator[str]:
    """Optional fields that are null instead of absent."""
    if isinstance(model, BaseModel):
        for key, field in type(model).model_fields.items():
            value = getattr(model, key)
            if key in model.model_fields_set and value is None and not field.is_required():
                yield f"{type(model).__name__}.{key}"
            yield from _nulls(value)
    elif isinstance(model, list):
        for value in model:
            yield from _nulls(value)


def _check_open(event: Event, met: set[str]) -> None:
    inner = event.get("item", {}).get("type")
    if beyond := {event["type"], inner} & BEYOND_OPEN.keys():
        met |= beyond
        return
    model = OPEN_EVENTS[event["type"]].validate_python(_narrowed(event, met))
    assert list(_nulls(model)) == [], event


@EVERY
def test_every_event_is_one_of_the_open_specification_s_types(name: str, heard: Heard):
    for event in heard(name):
        _check_open(event, set())
    response = _narrowed(heard(name)[-1]["response"], set())
    assert list(_nulls(OPEN_RESPONSE.validate_python(response))) == []


def test_nothing_is_said_to_be_beyond_the_open_specification_in_vain(heard: Heard):
    met: set[str] = set()
    for name in CASES:
        for event in heard(name):
            _check_open(event, met)
    assert met == BEYOND_OPEN.keys()


# -- What breaks clients ----------------------------------------------------------------------------------------------------


def created_says_who_and_when(events: list[Event]) -> None:
    """Python and Node demand it first; the AI SDK reads `created_at` and `model`, LangChain `text`."""
    first = events[0]["response"]
    assert events[0]["type"] == "response.created"
    assert first["object"] == "response" and first["output"] == []
    assert isinstance(first["created_at"], int) and first["model"] and first["text"]["format"]["type"]


def one_id_everywhere(events: list[Event]) -> None:
    """Python raises at a lifecycle event of another response."""
    assert len({event["response"]["id"] for event in events if "response" in event}) == 1


def no_event_has_an_error_key(events: list[Event]) -> None:
    """The SDKs raise at any event with a truthy `error`, and never hear `response.failed`."""
    assert not any(event.get("error") for event in events)


def every_type_is_known(events: list[Event]) -> None:
    """Node's accumulator throws at others."""
    assert {event["type"] for event in events} <= OPENAI_EVENTS.keys()


def added_items_are_empty_and_whole(events: list[Event]) -> None:
    """Python and Node crash without `content: []`, LangChain and Pydantic AI without a call's `arguments`."""
    empty = {
        "message": {"role": "assistant", "content": []},
        "reasoning": {"summary": []},
        "function_call": {"arguments": ""},
        "custom_tool_call": {"input": ""},
        "compaction": {"encrypted_content": ""},
        "shell_call": {},
        "local_shell_call": {},
        "apply_patch_call": {},
        "computer_call": {"pending_safety_checks": []},
        "tool_search_call": {"execution": "client"},
    }
    for event in events:
        if event["type"] == "response.output_item.added":
            item = event["item"]
            expected = empty[item["type"]] | ({} if item["type"] == "compaction" else {"status": "in_progress"})
            assert {key: item[key] for key in expected} == expected and item["id"]
            assert not item["type"].endswith("_call") or 1 <= len(item["call_id"]) <= 64
            assert item["type"] not in {"function_call", "custom_tool_call"} or item["name"]


def done_items_are_whole(events: list[Event]) -> None:
    """Codex takes items from `output_item.done` only; the AI SDK drops calls without a status."""
    for event in events:
        if event["type"] == "response.output_item.done":
            item = event["item"]
            cut_off = "in_progress" if item["type"] == "apply_patch_call" else "incomplete"
            assert item["id"] and (item["type"] == "compaction" or item["status"] in {"completed", cut_off})
            assert item["type"] != "message" or (item["role"] == "assistant" and item["content"])
            assert item["type"] != "reasoning" or isinstance(item["summary"], list)


def items_hold_no_null(events: list[Event]) -> None:
    """Strict clients reject nulls of optional fields: what is not known is absent."""

    def nulls(value: Any) -> bool:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return value is None or any(nulls(one) for one in inner)

    assert not any(nulls(event[key]) for event in events for key in ("item", "part") if key in event)


def events_say_where_they_belong(events: list[Event]) -> None:
    """Node, the AI SDK and LangChain put deltas together by these."""
    for event in events:
        what = event["type"].rpartition(".")[2]
        if what in {"delta", "done", "added"} and "output_item" not in event["type"]:
            names_item = not event["type"].startswith("response.shell_call_command.")
            assert (event["item_id"] if names_item else event["command_index"] >= 0) and isinstance(
                event["output_index"], int
            )
            index = "summary_index" if "summary" in event["type"] else "content_index"
            assert isinstance(event.get(index), int) or "call" in event["type"]


def item_ids_stay(events: list[Event]) -> None:
    """Added, deltas, done and the terminal response name an item by one id."""
    ids: dict[int, set[str]] = {}
    for event in events:
        if "output_index" in event and "command_index" not in event:
            ids.setdefault(event["output_index"], set()).add(event.get("item_id") or event["item"]["id"])
    assert [{item["id"]} for item in events[-1]["response"]["output"]] == list(ids.values())


def texts_have_annotations(events: list[Event]) -> None:
    """Pydantic AI, the AI SDK and LiteLLM read them unasked; deltas and texts have `logprobs`."""
    for event in events:
        content = [event.get("part", {}), *event.get("item", {}).get("content", ())]
        assert all(part["annotations"] == [] for part in content if part.get("type") == "output_text")
        assert "output_text" not in event["type"] or isinstance(event["logprobs"], list)


def arguments_are_streamed(events: list[Event]) -> None:
    """LangChain knows no arguments but those of the deltas."""
    streamed = {event["output_index"] for event in events if "function_call_arguments.delta" in event["type"]}
    items = events[-1]["response"]["output"]
    assert streamed == {index for index, item in enumerate(items) if isinstance(item.get("arguments"), str)}


def the_end_tells_everything(events: list[Event]) -> None:
    """Clients take the output from it, Codex the usage if there is one; a failure without a message ends quietly."""
    response = events[-1]["response"]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert response["output"] == done
    if usage := response["usage"]:
        assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
        assert isinstance(usage["input_tokens_details"]["cached_tokens"], int)
        assert isinstance(usage["input_tokens_details"]["cache_write_tokens"], int)
        assert isinstance(usage["output_tokens_details"]["reasoning_tokens"], int)
    assert (response["status"] == "failed") == bool(response["error"])
    assert not response["error"] or (response["error"]["message"] and response["error"]["code"])
    assert (response["status"] == "completed") == bool(response["completed_at"])


def a_summary_shows_the_reasoning(events: list[Event]) -> None:
    """Codex, LangChain and the AI SDK show nothing else; so it is there where it was asked for, and nowhere else."""
    asked = bool(events[0]["response"]["reasoning"]["summary"])
    for item in events[-1]["response"]["output"]:
        if item["type"] == "reasoning":
            assert bool(item["summary"]) == asked
    assert any("reasoning_summary" in event["type"] for event in events) == asked


RULES: list[Callable[[list[Event]], None]] = [
    created_says_who_and_when,
    one_id_everywhere,
    no_event_has_an_error_key,
    every_type_is_known,
    added_items_are_empty_and_whole,
    done_items_are_whole,
    items_hold_no_null,
    events_say_where_they_belong,
    item_ids_stay,
    texts_have_annotations,
    arguments_are_streamed,
    the_end_tells_everything,
    a_summary_shows_the_reasoning,
]


@EVERY
def test_nothing_that_is_known_to_break_clients_is_sent(name: str, heard: Heard):
    for rule in RULES:
        rule(heard(name))


# -- What the table of cases can't say --------------------------------------------------------------------------------------


def test_encrypted_reasoning_is_there_where_it_is_included_only(heard: Heard):
    reasoning = heard("encrypted reasoning")[-1]["response"]["output"][0]
    assert reasoning["encrypted_content"] and "Hm." not in reasoning["encrypted_content"]
    assert "encrypted_content" not in heard("reasoning")[-1]["response"]["output"][0]


def test_log_probabilities_are_told_with_each_delta_and_with_the_whole(heard: Heard):
    events = heard("logprobs")
    deltas = [event["logprobs"] for event in events if event["type"] == "response.output_text.delta"]
    whole = events[-1]["response"]["output"][0]["content"][0]["logprobs"]
    assert [[one["token"] for one in delta] for delta in deltas] == [["Hel"], ["l", "o"]]
    assert whole == [one for delta in deltas for one in delta]
    assert whole[0] == {
        "token": "Hel",
        "logprob": -0.5,
        "bytes": [72, 101, 108],
        "top_logprobs": [{"token": "x", "logprob": -3.25, "bytes": [120]}],
    }


def test_details_of_usage_are_told(heard: Heard):
    usage = heard("usage with details")[-1]["response"]["usage"]
    assert usage["input_tokens_details"] == {"cached_tokens": 10, "cache_write_tokens": 0}
    assert usage["output_tokens_details"] == {"reasoning_tokens": 20}
    assert usage["total_tokens"] == 70
