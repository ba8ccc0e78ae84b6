"""The contract of conversations, compactions and counts: what is streamed is stored, is listed, and is what the official client's types
say."""

from collections.abc import Callable
from typing import Any, get_args

import httpx
import pytest
from openai.types.conversations import (
    Conversation,
    ConversationDeletedResource,
    ConversationItem,
    ConversationItemList,
)
from openai.types.responses import CompactedResponse, InputTokenCountResponse, Response, ResponseItemList
from openai.types.responses.response_item import ResponseItem
from pydantic import BaseModel, TypeAdapter

from tests.api.streams import events_of
from tests.contract.cases import CASES, Case, outline
from tests.contract.compare import same
from tests.contract.test_contract import OPENAI_EVENTS, OPENAI_EXTRAS, extras, tag
from tests.replay import replay
from tests.waiting import settled

Json = dict[str, Any]

TOLD = [
    "text of every plane",
    "text, then refusal",
    "summary",
    "parallel calls",
    "custom tool, wrapped",
    "namespace",
    "tools of the client",
    "a tool of the client, arguments that do not fit",
    "logprobs",
    "length",
    "error",
    "history",
    "compaction",
]
"""A case for each type of item, and for each kind of end."""

EXTRAS = {
    ("ResponseCustomToolCallItem", "status"): "as in responses",
    ("LogprobTopLogprob", "bytes"): "as in responses",
}
"""(Model, field) of items beyond the SDK's types → why it is sent, beside those of responses."""


def _models(union: Any) -> dict[str, TypeAdapter[Any]]:
    """The models of each type: messages of users and of models have several."""
    by_type: dict[str, Any] = {}
    for model in get_args(get_args(union)[0]):
        by_type[tag(model)] = by_type[tag(model)] | model if tag(model) in by_type else model
    return {type_: TypeAdapter(models) for type_, models in by_type.items()}


LISTED = {"conversation": _models(ConversationItem), "response": _models(ResponseItem)}


@pytest.fixture(scope="module")
def conversation(http: httpx.Client) -> Callable[[], str]:
    """Makes an empty conversation; gives its id."""
    return lambda: str(http.post("/conversations", json={}).json()["id"])


def check(model: type[BaseModel], given: Json) -> None:
    """Check an object against the SDK's model: nothing is missing, of another type, or beyond it."""
    made = model.model_validate(given, strict=True)
    assert set(extras(made)) <= (OPENAI_EXTRAS | EXTRAS).keys(), given


def listed(http: httpx.Client, path: str) -> list[Json]:
    """The items of a list, oldest first, each checked."""
    page = http.get(path, params={"order": "asc", "limit": 100}).json()
    owner = "conversation" if path.startswith("/conversations") else "response"
    check(ConversationItemList if owner == "conversation" else ResponseItemList, {**page, "data": []})
    assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
    for item in page["data"]:
        made = LISTED[owner][item["type"]].validate_python(item, strict=True)
        assert set(extras(made)) <= (OPENAI_EXTRAS | EXTRAS).keys(), item
    return list(page["data"])


WAYS = {
    "streamed": {"stream": True},
    "whole": {},
    "background": {"background": True},
    "background, streamed": {"background": True, "stream": True},
}


def made(http: httpx.Client, case: Case, conversation: str, way: str) -> Json:
    """The response of a case in a conversation, once it has ended; its events are checked."""
    reply = http.post("/responses", json={**case.request, "conversation": conversation, **WAYS[way]})
    if WAYS[way].get("stream"):
        events = events_of(reply)
        for event in events:
            OPENAI_EVENTS[event["type"]].validate_python(event, strict=True)
            assert event.get("response", {"conversation": {"id": conversation}})["conversation"] == {"id": conversation}
        return replay(events)
    given: Json = reply.json()
    if "id" not in given:  # a failed one
        return given
    check(Response, given)

    def ended() -> Json:
        found: Json = http.get(f"/responses/{given['id']}").json()
        assert found["status"] not in {"queued", "in_progress"}
        return found

    return settled(ended, error=AssertionError)


@pytest.mark.parametrize("name", TOLD)
def test_a_conversation_holds_what_its_response_has_told(
    name: str, http: httpx.Client, conversation: Callable[[], str]
):
    case = CASES[name]
    found = []
    for way in WAYS:
        id = conversation()
        response = made(http, case, id, way)
        path = f"/conversations/{id}/items"
        if case.ends.startswith("failed"):
            assert http.get(path).json()["data"] == []
            continue
        assert [outline(item) for item in response["output"]] == list(case.made)
        assert http.get(f"/responses/{response['id']}").json() == response
        items = listed(http, path)
        given = listed(http, f"/responses/{response['id']}/input_items")
        assert items == [*given, *response["output"]]
        for item in items:
            assert http.get(f"{path}/{item['id']}").json() == item
        found.append(same([items, {**response, "background": None, "conversation": None}]))
    assert all(one == found[0] for one in found)


def test_the_objects_of_conversations_are_those_of_the_official_client(http: httpx.Client):
    greeting = {"role": "user", "content": "hi"}
    first = http.post("/conversations", json={"items": [greeting], "metadata": {"a": "b"}}).json()
    fork = http.post(f"/conversations/{first['id']}/fork", json={}).json()
    added = http.post(f"/conversations/{first['id']}/items", json={"items": [greeting, greeting]}).json()
    check(ConversationItemList, added)
    assert added["data"] == listed(http, f"/conversations/{first['id']}/items")[1:]
    path = f"/conversations/{first['id']}"
    left = http.delete(f"{path}/items/{added['last_id']}").json()
    changed = http.post(path, json={"metadata": {}}).json()
    for one in (first, fork, left, http.get(path).json(), changed):
        check(Conversation, one)
    assert (left, changed["metadata"]) == (first, {})
    check(ConversationDeletedResource, http.delete(path).json())


def test_a_compacted_window_and_a_count_are_those_of_the_official_client(http: httpx.Client):
    items = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    window = http.post("/responses/compact", json={"model": "m", "input": items}).json()
    check(CompactedResponse, {**window, "output": window["output"][1:]})  # its type knows no messages of users
    assert [item["type"] for item in window["output"]] == ["message", "compaction"]
    again = http.post("/responses", json={"model": "m", "input": [*window["output"], items[0]]}).json()
    assert listed(http, f"/responses/{again['id']}/input_items")[:2] == window["output"]
    check(InputTokenCountResponse, http.post("/responses/input_tokens", json={"model": "m", "input": "hi"}).json())


def test_a_compaction_within_a_run_is_streamed_stored_and_listed(http: httpx.Client, conversation: Callable[[], str]):
    """Over the threshold the run makes a compaction item, and then answers."""
    id = conversation()
    http.post(f"/conversations/{id}/items", json={"items": [{"role": "assistant", "content": "y" * 8000}]})
    body = {"context_management": [{"type": "compaction", "compact_threshold": 1000}]}
    response = made(http, Case(turns=CASES["text"].turns, made=[], body=body), id, "streamed")
    assert [item["type"] for item in response["output"]] == ["compaction", "message"]
    assert http.get(f"/responses/{response['id']}").json() == response
    assert listed(http, f"/conversations/{id}/items")[2:] == response["output"]
