"""Compaction: by a trigger, by a threshold, by the endpoint; what the model gets afterwards, and what stays stored."""

import openai
import pytest
from agents import SQLiteSession
from agents.memory import OpenAIResponsesCompactionSession

from app.domain.compaction import HEADING, MESSAGES_HEADING
from app.settings import Settings
from app.setup import compaction_prompt
from tests.api.streams import events_of, types_of
from tests.replay import replay
from tests.upstream import (
    answer,
    call,
    calling,
    cut,
    error,
    finish,
    gate,
    no_usage,
    note,
    reasoning,
    script,
    status,
    text,
    usage,
)

PROMPT = compaction_prompt(Settings())
TRIGGER = {"type": "compaction_trigger"}
TOOL = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {}}, "strict": False}


@pytest.fixture
def summary(upstream):
    """Sets the script of the turns that make a summary, by default `The summary.`, and gives their requests."""
    first = len(upstream.asked(PROMPT))

    def requests(*turn):
        if turn:
            upstream.scripts[PROMPT] = script(list(turn))
        return [record.body for record in upstream.asked(PROMPT)[first:]]

    requests(*answer("The summary."), usage(100, 20))
    yield requests
    upstream.scripts.pop(PROMPT)


def user(content):
    return {"role": "user", "content": content}


def summed(*last, summary="The summary."):
    """The message that stands for what was compacted; `last` are the user's last messages."""
    kept = f"\n\n{MESSAGES_HEADING}\n\n" + "\n\n".join(last) if last else ""
    return user(f"{HEADING}\n\n{summary}{kept}")


def seen(upstream, said):
    """The messages of the one request with this last user message."""
    [record] = upstream.asked(said if isinstance(said, str) else said["content"])
    return record.body["messages"]


# -- The trigger ------------------------------------------------------------------------------------------------------------


def test_a_trigger_makes_one_compaction_item_which_the_chain_continues_from(client, http, upstream, said, summary):
    first = client.responses.create(model="m", input=said, instructions="be brief")
    made = client.responses.create(model="m", input=[TRIGGER], previous_response_id=first.id, instructions="be kind")
    [item] = made.output
    assert (made.status, item.type, item.id[:4]) == ("completed", "compaction", "cmp_")
    assert (made.usage.input_tokens, made.usage.output_tokens) == (100, 20)
    assert "summary" not in item.encrypted_content
    [asked] = summary()
    assert asked["messages"] == [
        {"role": "system", "content": "be kind"},
        user(said),
        {"role": "assistant", "content": f"ok: {said}"},
        user(PROMPT),
    ]
    assert client.responses.retrieve(made.id).to_dict() == made.to_dict()
    more = client.responses.create(model="m", input=f"more {said}", previous_response_id=made.id)
    assert seen(upstream, f"more {said}") == [summed(said), user(f"more {said}")]
    listed = client.responses.input_items.list(more.id, order="asc").data
    assert [one.type for one in listed] == ["message", "message", "compaction", "message"]
    assert listed[2].to_dict() == item.to_dict()


def test_what_was_compacted_is_there_and_can_be_continued_from(client, upstream, said, summary):
    first = client.responses.create(model="m", input=said)
    made = client.responses.create(model="m", input=[TRIGGER], previous_response_id=first.id)
    stands_for = client.responses.input_items.list(made.id, order="asc").data
    assert [one.content[0].text for one in stands_for] == [said, f"ok: {said}"]
    client.responses.create(model="m", input=f"undo {said}", previous_response_id=first.id)
    assert [one["content"] for one in seen(upstream, f"undo {said}")] == [said, f"ok: {said}", f"undo {said}"]


def test_the_summary_is_shown_to_a_reader_that_asks_for_it(client, http, said, summary):
    shown = {"include": ["compaction.summary"]}
    body = {"model": "m", "input": [user(said), TRIGGER]}
    hidden = replay(events_of(http.post("/responses", json={**body, "stream": True, "background": True})))
    assert "summary" not in hidden["output"][0]
    [item] = client.responses.retrieve(hidden["id"], **shown).output
    assert item.to_dict() == {**hidden["output"][0], "summary": "The summary."}
    events = events_of(http.get(f"/responses/{hidden['id']}?stream=true&include=compaction.summary"))
    assert events[-1]["response"]["output"] == [item.to_dict()] == [events[-2]["item"]]
    next_one = client.responses.create(model="m", input="x", previous_response_id=hidden["id"])
    listed = client.responses.input_items.list(next_one.id, order="asc")
    assert [one.type for one in listed.data if "summary" in one.to_dict()] == []
    listed = client.responses.input_items.list(next_one.id, order="asc", **shown)
    assert [one.to_dict()["summary"] for one in listed.data if one.type == "compaction"] == ["The summary."]
    given = {**item.to_dict(), "summary": "forged", "id": None}
    again = client.responses.create(model="m", input=[given, user("y")])
    listed = client.responses.input_items.list(again.id, **shown)
    assert [one.type for one in listed.data if "summary" in one.to_dict()] == []
    assert "summary" not in http.post("/responses/compact", json=body).json()["output"][-1]


def test_what_is_streamed_is_what_is_stored(server, client, http, said, summary):
    body = {"model": "m", "input": [user(said), TRIGGER], "stream": True}
    events = events_of(http.post("/responses", json=body))
    kinds = ["output_item.added", "compaction.compacting", "output_item.done"]
    assert types_of(events) == ["created", "in_progress", *kinds, "completed"]
    added, compacting, done = events[2:5]
    assert added["item"] == {**done["item"], "encrypted_content": ""}
    assert (compacting["item_id"], compacting["output_index"]) == (done["item"]["id"], 0)
    response = replay(events)
    assert http.get(f"/responses/{response['id']}").json() == response
    with client.responses.stream(model="m", input=[user(said), TRIGGER]) as stream:
        typed = [event.type for event in stream]
        assert "response.compaction.compacting" in typed
        assert stream.get_final_response().output[0].type == "compaction"


def test_a_background_run_makes_one_too(client, http, upstream, said, summary):
    body = {"model": "m", "input": [user(said), TRIGGER], "stream": True, "background": True}
    response = replay(events_of(http.post("/responses", json=body)))
    assert [item["type"] for item in response["output"]] == ["compaction"]
    again = replay(events_of(http.get(f"/responses/{response['id']}?stream=true")))
    assert again == response == http.get(f"/responses/{response['id']}").json()
    client.responses.create(model="m", input=f"more {said}", previous_response_id=response["id"])
    assert seen(upstream, f"more {said}") == [summed(said), user(f"more {said}")]


def test_a_client_that_keeps_the_history_itself_sends_the_item_back(client, upstream, said, summary):
    """As Codex does: instructions as messages, tools, nothing stored, and the item at the end of what it keeps."""
    history = [{"role": "developer", "content": "be brief"}, user(f"old {said}"), user(said)]
    asking = {"tools": [TOOL], "parallel_tool_calls": True, "store": False, "reasoning": {"summary": "auto"}}
    made = client.responses.create(model="m", input=[*history, TRIGGER], **asking, max_output_tokens=16)
    [asked] = summary()
    assert (asked["tool_choice"], len(asked["tools"]), "max_tokens" in asked) == ("none", 1, False)
    [item] = made.output
    given = [*history, item.to_dict(), user(f"next {said}")]
    client.responses.create(model="m", input=given, **asking)
    assert seen(upstream, f"next {said}") == [
        {"role": "system", "content": "be brief"},
        summed(f"old {said}", said),
        user(f"next {said}"),
    ]


def test_the_summary_is_plain_text_whatever_the_answer_is_to_be(client, said, summary):
    summary(reasoning("Hm."), *answer("The summary."))
    options = {"text": {"format": {"type": "json_object"}}, "tool_choice": "required", "top_logprobs": 2}
    made = client.responses.create(model="m", input=[user(said), TRIGGER], tools=[TOOL], **options)
    assert [item.type for item in made.output] == ["compaction"]
    [asked] = summary()
    assert not {"response_format", "logprobs"} & asked.keys() and asked["tool_choice"] == "none"


def test_a_call_must_be_answered_first(client, said, summary):
    called = client.responses.create(model="m", input=script(calling("look")), tools=[TOOL])
    with pytest.raises(openai.BadRequestError, match="No tool output found"):
        client.responses.create(model="m", input=[TRIGGER], previous_response_id=called.id)
    output = {"type": "function_call_output", "call_id": "call_1", "output": "nothing"}
    made = client.responses.create(model="m", input=[output, TRIGGER], previous_response_id=called.id, tools=[TOOL])
    assert [item.type for item in made.output] == ["compaction"]


# -- When it fails ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_an_upstream_that_refuses_the_summary_is_the_status_of_the_request(http, said, summary, stream):
    summary(status(400, {"error": {"message": "too long", "code": "context_length_exceeded"}}))
    reply = http.post("/responses", json={"model": "m", "input": [user(said), TRIGGER], "stream": stream})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize(
    ("turn", "ends"),
    [
        ([text("The"), cut()], "failed"),
        ([text("The"), error("no")], "failed"),
        ([call("look", {}, id="c"), finish("tool_calls")], "failed"),
        ([text(" "), finish()], "failed"),
        ([text("x" * (1 << 20)), text("x"), finish()], "failed"),
        ([text("The"), finish("length")], "incomplete"),
    ],
)
def test_a_summary_that_is_not_whole_ends_the_run_and_stands_for_nothing(
    client, http, upstream, said, summary, turn, ends
):
    summary(*turn)
    body = {"model": "m", "input": [user(said), TRIGGER], "stream": True}
    response = replay(events_of(http.post("/responses", json=body)))
    assert (response["status"], response["output"][0]["encrypted_content"]) == (ends, "")
    assert http.get(f"/responses/{response['id']}").json() == response
    client.responses.create(model="m", input=f"more {said}", previous_response_id=response["id"])
    assert [one["content"] for one in seen(upstream, f"more {said}")] == [said, f"more {said}"]
    given = [user(said), *response["output"], user(f"again {said}")]
    client.responses.create(model="m", input=given)
    assert [one["content"] for one in seen(upstream, f"again {said}")] == [said, f"again {said}"]


def test_it_can_be_cancelled(client, upstream, said, summary):
    summary(text("The "), gate("cancelled summary"), text("summary."), finish())
    queued = client.responses.create(model="m", input=[user(said), TRIGGER], background=True)
    upstream.wait_reached("cancelled summary")
    cancelled = client.responses.cancel(queued.id)
    assert (cancelled.status, [item.encrypted_content for item in cancelled.output]) == ("cancelled", [""])


# -- What clients send back -------------------------------------------------------------------------------------------------


def test_an_item_may_stand_anywhere_and_the_newest_counts(client, upstream, said, summary):
    old = client.responses.create(model="m", input=[user("old"), TRIGGER], store=False).output[0].to_dict()
    summary(*answer("Another."))
    new = client.responses.create(model="m", input=[user("new"), TRIGGER], store=False).output[0].to_dict()
    del new["id"]
    client.responses.create(model="m", input=[user("a"), old, user("b"), new, user("c"), user(said)])
    assert seen(upstream, said) == [summed("new", summary="Another."), user("c"), user(said)]


def test_an_item_that_was_changed_or_is_too_long_is_refused_with_its_path(http, said, summary):
    body = {"model": "m", "input": [user(said), TRIGGER], "store": False}
    [item] = http.post("/responses", json=body).json()["output"]
    sealed = item["encrypted_content"]
    changed = {**item, "encrypted_content": sealed[:50] + ("A" if sealed[50] != "A" else "B") + sealed[51:]}
    long = {**item, "encrypted_content": "g" * 10_485_761}
    for given, code in ((changed, "invalid_encrypted_content"), (long, "invalid_value")):
        refused = http.post("/responses", json={"model": "m", "input": [user("a"), given, user("b")]})
        assert refused.status_code == 400
        assert (refused.json()["error"]["code"], refused.json()["error"]["param"]) == (
            code,
            "input[1].encrypted_content",
        )


# -- The endpoint -----------------------------------------------------------------------------------------------------------


def test_a_context_is_compacted_to_a_window_for_a_new_chain(client, http, upstream, said, summary):
    history = [
        {"role": "system", "content": "be brief"},
        user("old"),
        {"role": "assistant", "content": "b"},
        user(said),
    ]
    made = client.responses.compact(model="m", input=history, instructions="be kind")
    assert (made.object, made.id[:5]) == ("response.compaction", "resp_")
    assert (made.usage.input_tokens, made.usage.output_tokens) == (100, 20)
    outline = [(item.type, getattr(item, "role", None), getattr(item, "status", None)) for item in made.output]
    assert outline == [("message", role, "completed") for role in ("system", "user", "user")] + [
        ("compaction", None, None)
    ]
    [asked] = summary()
    assert [one["content"] for one in asked["messages"]] == ["be kind", "be brief", "old", "b", said, PROMPT]
    window = http.post("/responses/compact", json={"model": "m", "input": history}).json()["output"]
    client.responses.create(model="m", input=[*window, user(f"next {said}")])
    system = {"role": "system", "content": "be brief"}
    assert seen(upstream, f"next {said}") == [system, summed(said), user(f"next {said}")]
    again = client.responses.compact(model="m", input=[*window, user(f"next {said}")])
    assert [item.type for item in again.output] == ["message"] * 4 + ["compaction"]


def test_a_stored_chain_is_compacted_and_nothing_is_stored(client, upstream, said, summary):
    first = client.responses.create(model="m", input=said)
    made = client.responses.compact(model="m", previous_response_id=first.id, input="and this")
    assert [item.content[0].text for item in made.output[:-1]] == [said, "and this"]
    assert client.responses.compact(model="m", previous_response_id=first.id).output[-1].type == "compaction"
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="m", input="more", previous_response_id=made.id)
    assert refused.value.code == "previous_response_not_found"
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


@pytest.mark.parametrize(
    ("given", "code", "param"),
    [
        ({"model": None}, "missing_required_parameter", "model"),
        ({}, "missing_required_parameter", "input"),
        ({"instructions": "x"}, None, "input"),
        ({"input": "x", "tools": []}, "unknown_parameter", "tools"),
        ({"input": "x", "conversation": "conv_1"}, "unknown_parameter", "conversation"),
        ({"input": "x", "stream": False}, "unknown_parameter", "stream"),
        ({"input": "x", "instruction": "y"}, "unknown_parameter", "instruction"),
        ({"input": "x", "prompt_cache_key": "k" * 65}, "invalid_value", "prompt_cache_key"),
        (
            {"input": "x", "image": {"context_compression": "enabled"}},
            "unsupported_parameter",
            "image.context_compression",
        ),
        ({"input": [{"role": "king", "content": "x"}]}, "invalid_value", "input[0].role"),
        ({"input": [TRIGGER, user("x")]}, "invalid_value", "input[0]"),
        ({"previous_response_id": "resp_x"}, "previous_response_not_found", "previous_response_id"),
    ],
    ids=str,
)
def test_a_bad_compaction_is_refused_before_any_work(http, given, code, param):
    reply = http.post("/responses/compact", json={"model": "m", **given})
    assert (reply.json()["error"]["code"], reply.json()["error"]["param"]) == (code, param)


def test_hints_of_a_compaction_are_taken(http, said, summary):
    hints = {
        "service_tier": "auto",
        "prompt_cache_key": "k",
        "prompt_cache_retention": "24h",
        "prompt_cache_options": {"ttl": "30m", "prewarm": True},
        "image": {"context_compression": "auto"},
    }
    reply = http.post("/responses/compact", json={"model": "m", "input": [user(said), TRIGGER], **hints})
    assert [item["type"] for item in reply.json()["output"]] == ["message", "compaction"]


@pytest.mark.parametrize(
    ("turn", "answered"),
    [
        ([status(400, {"error": {"message": "no", "code": "context_length_exceeded"}})], 400),
        ([text("The"), cut()], 502),
        ([text("The"), finish("length")], 502),
    ],
)
def test_a_compaction_without_a_whole_summary_is_an_error(http, said, summary, turn, answered):
    summary(*turn)
    reply = http.post("/responses/compact", json={"model": "m", "input": said})
    assert (reply.status_code, reply.headers.get("x-should-retry")) == (answered, None)


def test_an_upstream_that_reports_no_usage_leaves_zeros(client, said, summary):
    summary(*answer("The summary."), no_usage())
    assert client.responses.compact(model="m", input=said).usage.total_tokens == 0


@pytest.mark.filterwarnings(
    "ignore:Pydantic serializer"
)  # of the SDK's types, which have no user messages in an output
async def test_the_agents_sdk_compacts_its_session(server, upstream, said, summary):
    async with server.async_client() as client:
        store = SQLiteSession(said)
        session = OpenAIResponsesCompactionSession(said, store, client=client, model="gpt-m", compaction_mode="input")
        await session.add_items([user(said), {"role": "assistant", "content": "b"}])
        await session.run_compaction({"force": True})
        kept = await session.get_items()
        store.close()
        assert [item["type"] for item in kept] == ["message", "compaction"]
        await client.responses.create(model="m", input=[*kept, user(f"next {said}")])
    assert seen(upstream, f"next {said}") == [summed(said), user(f"next {said}")]


# -- The threshold ----------------------------------------------------------------------------------------------------------


def managed(threshold=1000):
    """A request's wish for compaction beyond so many tokens."""
    return {"context_management": [{"type": "compaction", "compact_threshold": threshold}]}


def long_chain(client, said, tokens=1500):
    """The id of a response whose upstream has counted so many tokens of context and answer."""
    turns = script([note(said), text("ok"), finish(), usage(tokens - 10, 10)])
    return client.responses.create(model="m", input=turns).id


@pytest.mark.parametrize("background", [False, True])
def test_a_context_over_the_threshold_is_compacted_before_the_answer(client, http, upstream, said, summary, background):
    previous = long_chain(client, said)
    body = {"model": "m", "input": said, "previous_response_id": previous, **managed(), "stream": True}
    events = events_of(http.post("/responses", json={**body, "background": background}))
    response = replay(events)
    assert [item["type"] for item in response["output"]] == ["compaction", "message"]
    assert "compaction.compacting" not in types_of(events)
    [asked] = summary()
    assert [one["content"] for one in asked["messages"][1:]] == ["ok", said, PROMPT]
    assert seen(upstream, summed(said)) == [summed(said)]
    answered = upstream.asked(summed(said)["content"])[0]
    assert response["usage"]["input_tokens"] > 100
    assert http.get(f"/responses/{response['id']}").json() == response
    client.responses.create(model="m", input=f"more {said}", previous_response_id=response["id"], **managed())
    assert len(summary()) == 1
    more = seen(upstream, f"more {said}")
    assert [one["role"] for one in more] == ["user", "assistant", "user"] and more[0] == answered.body["messages"][0]


def test_a_json_reply_and_a_chain_without_storage_are_compacted_too(client, upstream, said, summary):
    history = [user("x" * 4000), {"role": "assistant", "content": "y" * 400}, user(said)]
    made = client.responses.create(model="m", input=history, store=False, **managed())
    assert [item.type for item in made.output] == ["compaction", "message"]
    given = [*history, *(item.to_dict() for item in made.output), user(f"next {said}")]
    again = client.responses.create(model="m", input=given, store=False, **managed())
    assert [item.type for item in again.output] == ["message"]
    assert seen(upstream, f"next {said}")[0] == summed(said)


@pytest.mark.parametrize(
    ("tokens", "management"),
    [(900, managed()), (2000, managed(10_000)), (2000, {}), (2000, {"context_management": [{"type": "compaction"}]})],
    ids=["below", "its-own", "none", "the-setting-s"],
)
def test_a_context_below_the_threshold_is_left_as_it_is(client, said, summary, tokens, management):
    previous = long_chain(client, said, tokens)
    made = client.responses.create(model="m", input="x", previous_response_id=previous, **management)
    assert ([item.type for item in made.output], summary()) == (["message"], [])


def test_messages_to_the_model_alone_are_not_compacted(client, said, summary):
    made = client.responses.create(model="m", input=[user("x" * 8000), user(said)], **managed())
    assert ([item.type for item in made.output], summary()) == (["message"], [])


def test_a_context_that_grows_within_a_run_is_compacted_before_the_next_turn(
    client, http, upstream, mcp, said, summary
):
    turns = script([note(said), call("add", {"a": 1, "b": 2}, id="c"), finish("tool_calls"), usage(1500, 5)])
    upstream.scripts[summed(turns)["content"]] = script([text("It is 3."), finish(), usage(60, 5)])
    body = {"model": "m", "input": turns, "tools": [mcp()], "tool_choice": "required", "max_output_tokens": 16}
    response = replay(events_of(http.post("/responses", json={**body, **managed(), "stream": True})))
    kinds = [item["type"] for item in response["output"]]
    assert (response["status"], kinds) == ("completed", ["mcp_list_tools", "mcp_call", "compaction", "message"])
    [asked] = summary()
    assert [one["role"] for one in asked["messages"]] == ["user", "assistant", "tool", "user"]
    [last] = upstream.asked(summed(turns)["content"])
    assert (last.body["messages"], last.body.get("tool_choice")) == ([summed(turns)], None)
    assert last.body["max_tokens"] == 11  # the summary does not count
    assert (response["usage"]["input_tokens"], response["usage"]["output_tokens"]) == (1660, 30)
    client.responses.create(model="m", input=f"more {said}", previous_response_id=response["id"])
    assert [one["role"] for one in seen(upstream, f"more {said}")] == ["user", "assistant", "user"]


@pytest.mark.parametrize(
    ("turn", "ends"), [([text("The"), cut()], "failed"), ([text("The"), finish("length")], "incomplete")]
)
def test_a_summary_that_fails_ends_the_run_before_its_answer(http, client, said, summary, turn, ends):
    summary(*turn)
    body = {"model": "m", "input": said, "previous_response_id": long_chain(client, said), **managed(), "stream": True}
    response = replay(events_of(http.post("/responses", json=body)))
    assert (response["status"], [item["type"] for item in response["output"]]) == (ends, ["compaction"])


def test_an_upstream_that_refuses_the_first_summary_is_the_status_of_the_request(http, client, said, summary):
    summary(status(400, {"error": {"message": "too long", "code": "context_length_exceeded"}}))
    body = {"model": "m", "input": said, "previous_response_id": long_chain(client, said), **managed(), "stream": True}
    assert http.post("/responses", json=body).status_code == 400


# -- Approvals --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [False, True])
def test_an_approval_request_can_be_answered_after_a_compaction(
    client, upstream, toolserver, mcp, name, said, summary, together
):
    tools = [mcp(require_approval="always", options={"tools": "add"})]
    first = client.responses.create(
        model="m", input=script([note(said), *calling("add", {"a": 1, "b": 2})]), tools=tools
    )
    approval = {"type": "mcp_approval_response", "approval_request_id": first.output[-1].id, "approve": True}
    if together:  # the call is made before the summary
        made = client.responses.create(model="m", input=[approval, TRIGGER], previous_response_id=first.id, tools=tools)
        assert [item.type for item in made.output] == ["mcp_call", "compaction"]
        assert [one["role"] for one in summary()[0]["messages"]] == ["user", "assistant", "tool", "user"]
    else:
        made = client.responses.create(model="m", input=[TRIGGER], previous_response_id=first.id, tools=tools)
        assert [item.type for item in made.output] == ["compaction"]
        more = client.responses.create(model="m", input=[approval], previous_response_id=made.id, tools=tools)
        assert [item.type for item in more.output] == ["mcp_call", "message"]
        shown = seen(upstream, {"content": upstream.requests[-1].said})
        assert [one["role"] for one in shown] == ["user", "assistant", "tool"]
        assert shown[0]["content"].startswith(HEADING) and shown[2]["content"] == "3"
    assert len(toolserver.calls(name)) == 1


# -- Conversations ----------------------------------------------------------------------------------------------------------


def test_a_conversation_is_compacted_and_goes_back_when_the_item_is_removed(client, upstream, said, summary):
    id = client.conversations.create().id
    client.responses.create(model="m", input=said, conversation=id)
    [item] = client.responses.create(model="m", input=[TRIGGER], conversation=id).output
    listed = client.conversations.items.list(id, order="asc").data
    assert [one.type for one in listed] == ["message", "message", "compaction"]
    client.responses.create(model="m", input=f"more {said}", conversation=id)
    assert seen(upstream, f"more {said}") == [summed(said), user(f"more {said}")]
    client.conversations.items.delete(item.id, conversation_id=id)
    client.responses.create(model="m", input=f"undo {said}", conversation=id)
    assert [one["content"] for one in seen(upstream, f"undo {said}")] == [
        *(said, f"ok: {said}", f"more {said}", f"ok: more {said}", f"undo {said}")
    ]


def test_a_conversation_over_the_threshold_is_compacted(client, said, summary):
    id = client.conversations.create().id
    turns = script([note(said), text("ok"), finish(), usage(1490, 10)])
    client.responses.create(model="m", input=turns, conversation=id)
    made = client.responses.create(model="m", input=said, conversation=id, **managed())
    assert [one.type for one in made.output] == ["compaction", "message"]
    types = [one.type for one in client.conversations.items.list(id, order="asc")]
    assert types == ["message", "message", "message", "compaction", "message"]
