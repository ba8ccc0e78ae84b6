"""Chat Completions: the same runs, read as completions and chunks by the official client."""

import asyncio
import contextlib
import json

import msgspec
import openai
import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from pydantic import BaseModel

from tests.upstream import answer, call, calling, cut, finish, gate, note, reasoning, refusal, script, status, text

ADD = {
    "name": "add",
    "description": "Adds.",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    },
    "strict": True,
}
TOOLS = [{"type": "function", "function": ADD}]
CALLED = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}


class Point(BaseModel):
    """What a parsed reply holds."""

    x: int


def user(content):
    return {"role": "user", "content": content}


def chunks_of(reply):
    """The chunks of a whole stream: frames of `data:` alone, then `[DONE]`."""
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    *frames, done, rest = reply.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [msgspec.json.decode(frame.removeprefix("data: ")) for frame in frames]


def streamed(client, **body):
    """The completion that the official client adds up from a stream."""
    state = ChatCompletionStreamState()
    for chunk in client.chat.completions.create(stream=True, **body):
        state.handle_chunk(chunk)
    return state.current_completion_snapshot


# -- Completions -------------------------------------------------------------------------------------------------------------


def test_a_completion_and_what_the_upstream_is_sent(client, upstream):
    given = script(answer("Hello there."))
    sent = [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": "Hi.", "name": "ann"},
        {"role": "assistant", "content": "Hi!", "name": "bot"},
        {"role": "system", "content": "Now answer."},
        {"role": "user", "content": given, "name": "ann"},
    ]
    made = client.chat.completions.create(
        model="m", messages=sent, temperature=0.5, stop=["END"], seed=7, max_tokens=5, logit_bias={"1": 2}
    )
    [choice] = made.choices
    assert (choice.message.content, choice.message.role, choice.finish_reason) == ("Hello there.", "assistant", "stop")
    assert made.object == "chat.completion"
    assert made.id.startswith("chatcmpl-")
    assert (made.usage.prompt_tokens, made.usage.completion_tokens, made.usage.total_tokens) == (10, 2, 12)
    [asked] = upstream.asked(given)
    assert b'"logit_bias":{"1":2}' in asked.raw  # some upstreams take no 2.0
    assert asked.body == {
        "model": "m",
        "messages": sent,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.5,
        "max_tokens": 5,
        "stop": ["END"],
        "seed": 7,
        "logit_bias": {"1": 2},
    }


def test_a_stream_has_the_role_first_one_finish_reason_and_usage_only_where_it_is_asked_for(http):
    given = script([reasoning("Hm."), text("Hello"), text(" there."), finish()])
    body = {"model": "m", "messages": [user(given)], "stream": True}
    chunks = chunks_of(http.post("/chat/completions", json=body))
    assert [one["choices"][0]["delta"] for one in chunks] == [
        {"role": "assistant", "content": None},
        {"reasoning_content": "Hm."},
        {"content": "Hello"},
        {"content": " there."},
        {},
    ]
    assert [one["choices"][0]["finish_reason"] for one in chunks] == [None] * 4 + ["stop"]
    assert not any("usage" in one for one in chunks)
    chunks = chunks_of(http.post("/chat/completions", json={**body, "stream_options": {"include_usage": True}}))
    assert [one["usage"] for one in chunks[:-1]] == [None] * 5
    assert (chunks[-1]["choices"], chunks[-1]["usage"]["completion_tokens"]) == ([], 3)


def test_tool_calls_and_their_results(client, upstream):
    given = script(
        [
            call("add", {"a": 1}, index=0, id="call_a"),
            call("add", {"a": 2}, index=1, id="call_b"),
            finish("tool_calls"),
        ],
        answer("Three."),
    )
    body = {"model": "m", "tools": TOOLS, "parallel_tool_calls": True}
    made = client.chat.completions.create(messages=[user(given)], **body)
    with client.chat.completions.stream(messages=[user(given)], **body) as stream:
        helped = stream.get_final_completion()
    for choice in (made.choices[0], helped.choices[0]):
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        assert [
            (one.id, one.type, one.function.name, json.loads(one.function.arguments))
            for one in choice.message.tool_calls
        ] == [
            ("call_a", "function", "add", {"a": 1}),
            ("call_b", "function", "add", {"a": 2}),
        ]
        results = [{"role": "tool", "tool_call_id": one.id, "content": "ok"} for one in choice.message.tool_calls]
        ended = client.chat.completions.create(messages=[user(given), choice.message, *results], **body)
        assert (ended.choices[0].message.content, ended.choices[0].finish_reason) == ("Three.", "stop")
        assert upstream.asked(given)[-1].body["messages"][1:] == [
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": id, "type": "function", "function": {"name": "add", "arguments": f'{{"a":{number}}}'}}
                    for id, number in (("call_a", 1), ("call_b", 2))
                ],
            },
            *results,
        ]


def test_custom_tools(client, http):
    given = script(calling("shell", {"input": "ls"}))
    tools = [{"type": "custom", "custom": {"name": "shell", "description": "Runs a command."}}]
    [called] = (
        client.chat.completions.create(model="m", messages=[user(given)], tools=tools).choices[0].message.tool_calls
    )
    assert (called.id, called.type, called.custom.name, called.custom.input) == ("call_1", "custom", "shell", "ls")
    body = {"model": "m", "messages": [user(given)], "tools": tools, "stream": True}
    deltas = [one["choices"][0]["delta"] for one in chunks_of(http.post("/chat/completions", json=body))]
    assert [one["tool_calls"] for one in deltas if "tool_calls" in one] == [
        [{"index": 0, "id": "call_1", "type": "custom", "custom": {"input": "", "name": "shell"}}],
        [{"index": 0, "custom": {"input": "ls"}}],
    ]


def test_parsed_replies(client, upstream):
    given = script(answer('{"x":1}'))
    made = client.chat.completions.parse(model="m", messages=[user(given)], response_format=Point)
    assert made.choices[0].message.parsed == Point(x=1)
    with client.chat.completions.stream(model="m", messages=[user(given)], response_format=Point) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == Point(x=1)
    assert upstream.asked(given)[0].body["response_format"]["json_schema"]["name"] == "Point"


def test_refusals_logprobs_and_answers_that_are_cut_off(client):
    token = {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}
    refused, scored, cut_off = (
        script([refusal("No."), finish()]),
        script([text("a", logprobs={"content": [token]}), finish()]),
        script([text("half"), finish("length")]),
    )
    body = {"model": "m", "logprobs": True, "top_logprobs": 1}
    for ask in (client.chat.completions.create, lambda **body: streamed(client, **body)):
        [choice] = ask(messages=[user(refused)], **body).choices
        assert (choice.message.content, choice.message.refusal) == (None, "No.")
        [choice] = ask(messages=[user(scored)], **body).choices
        assert [(one.token, one.logprob) for one in choice.logprobs.content] == [("a", -0.5)]
        [choice] = ask(messages=[user(cut_off)], **body).choices
        assert (choice.message.content, choice.finish_reason) == ("half", "length")


def test_tools_of_servers_run_inside_and_stand_in_the_stored_response(client, toolserver, name, mcp):
    given = script(
        [text("Let me see."), call("add", {"a": 1, "b": 2}, id="call_1"), finish("tool_calls")], answer("Three.")
    )
    body = {"model": "m", "messages": [user(given)], "tools": [mcp()]}
    made = client.chat.completions.create(store=True, **body)
    [choice] = made.choices
    assert (choice.message.content, choice.message.tool_calls) == ("Let me see.\n\nThree.", None)
    assert choice.finish_reason == "stop"
    assert streamed(client, **body).choices[0].message.content == "Let me see.\n\nThree."
    assert len(toolserver.calls(name)) == 2
    types = [item.type for item in client.responses.retrieve(made.response_id).output]
    assert types == ["mcp_list_tools", "message", "mcp_call", "message"]


def test_a_hosted_tool_without_a_server_is_left_out_and_named(http):
    given = script(answer("Hi."))
    reply = http.post(
        "/chat/completions", json={"model": "m", "messages": [user(given)], "tools": TOOLS, "web_search_options": {}}
    )
    assert (reply.status_code, reply.headers["x-reprise-left-out-tools"]) == (200, "web_search")


# -- Errors ------------------------------------------------------------------------------------------------------------------


def test_an_error_in_mid_stream_is_an_error_and_no_text(client, http):
    given = script([text("Half"), cut()])
    got = []
    with pytest.raises(openai.APIError) as failed:
        got.extend(
            chunk.choices[0] for chunk in client.chat.completions.create(model="m", messages=[user(given)], stream=True)
        )
    assert not isinstance(failed.value, openai.APIStatusError)
    assert failed.value.body["type"] == "server_error"
    assert "".join(one.delta.content or "" for one in got) == "Half"
    assert not any(one.finish_reason for one in got)
    *_, last = chunks_of(http.post("/chat/completions", json={"model": "m", "messages": [user(given)], "stream": True}))
    assert set(last) == {"error"}
    assert set(last["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_before_the_first_chunk_is_a_status(client, stream):
    refused = {"error": {"message": "Too long.", "type": "invalid_request_error", "code": "bad", "param": "messages"}}
    given = script([status(400, refused)])
    with pytest.raises(openai.BadRequestError, match="Too long") as failed:
        client.chat.completions.create(model="m", messages=[user(given)], stream=stream)
    assert (failed.value.param, failed.value.code) == ("messages", "bad")


def test_errors_about_state_name_what_the_chat_request_has(http):
    lost = {
        "role": "assistant",
        "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    }
    file = {"type": "file", "file": {"file_id": "file_none"}}
    choice = {"type": "allowed_tools", "allowed_tools": {"tools": [{"type": "function", "function": {"name": "g"}}]}}
    reply = http.post(
        "/chat/completions", json={"model": "m", "messages": [user("x")], "tools": TOOLS, "tool_choice": choice}
    )
    assert reply.json()["error"]["param"] == "tool_choice.allowed_tools.tools[0]"
    for key in ("conversation", "conversation_id"):
        reply = http.post("/chat/completions", json={"model": "m", "messages": [user("x")], key: "conv_none"})
        assert (reply.status_code, reply.json()["error"]["param"]) == (404, key)
    for messages, param in (
        ([user("x"), lost], "messages"),
        ([{"role": "tool", "tool_call_id": "call_9", "content": "x"}], "messages"),
        ([user("x"), user([{"type": "text", "text": "x"}, file])], "messages[1].content[1].file.file_id"),
    ):
        reply = http.post("/chat/completions", json={"model": "m", "messages": messages})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param), reply.text


def test_a_request_that_is_wrong_is_refused_by_name(client):
    with pytest.raises(openai.BadRequestError) as failed:
        client.chat.completions.create(model="m", messages=[user("x")], n=2)
    assert failed.value.param == "n"
    with pytest.raises(openai.BadRequestError, match="Unknown parameter: 'mood'"):
        client.chat.completions.create(model="m", messages=[user("x")], extra_body={"mood": 1})


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_disconnects_cancels_the_run(server, upstream, said, stream):
    given = script([note(said), text("half"), gate(said), text(" never"), finish()])
    async with server.async_client() as client:
        asked = client.chat.completions.create(model="m", messages=[user(given)], stream=stream)
        if stream:
            chunks = await asked
            await upstream.until_reached(said)
            await chunks.close()
        else:
            waiting = asyncio.create_task(asked)
            await upstream.until_reached(said)
            waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await waiting
    [record] = upstream.asked(given)
    assert await asyncio.to_thread(record.closed.wait, 5)
    assert record.peer_left


# -- State -------------------------------------------------------------------------------------------------------------------


def test_without_state_nothing_stays(client, said):
    before = client.responses.with_raw_response.create(model="m", input="x").parse().id
    made = client.chat.completions.create(model="m", messages=[user(said)], metadata={"test": said[-60:]})
    assert "response_id" not in made.to_dict()
    assert made.metadata is None
    id = made.id.replace("chatcmpl-", "resp_")
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(id)
    assert client.responses.retrieve(before).id == before


@pytest.mark.parametrize("stream", [False, True])
def test_a_completion_continues_a_response_and_is_continued_by_one(client, upstream, said, stream):
    first = client.responses.create(model="m", input=f"{said} one", instructions="Not inherited.")
    body = {"model": "m", "messages": [user(f"{said} two")], "extra_body": {"previous_response_id": first.id}}
    made = streamed(client, **body) if stream else client.chat.completions.create(**body)
    assert made.choices[0].message.content == f"ok: {said} two"
    third = client.responses.create(model="m", input=f"{said} three", previous_response_id=made.response_id)
    assert third.output_text == f"ok: {said} three"
    [asked] = upstream.asked(f"{said} three")
    assert [one["content"] for one in asked.body["messages"]] == [
        f"{said} one",
        f"ok: {said} one",
        f"{said} two",
        f"ok: {said} two",
        f"{said} three",
    ]


@pytest.mark.parametrize("key", ["conversation", "conversation_id"])
def test_a_conversation_is_continued_over_both_apis(client, upstream, said, key):
    conversation = client.conversations.create(items=[{"role": "user", "content": f"{said} one"}]).id
    for number, stream in (("two", False), ("three", True)):
        body = {"model": "m", "messages": [user(f"{said} {number}")], "extra_body": {key: conversation}}
        made = streamed(client, **body) if stream else client.chat.completions.create(**body)
        assert client.responses.retrieve(made.response_id).conversation.id == conversation
    client.responses.create(model="m", input=f"{said} four", conversation=conversation)
    [asked] = upstream.asked(f"{said} four")
    contents = [one["content"] for one in asked.body["messages"]]
    assert [one.removeprefix("ok: ").removeprefix(said).strip() for one in contents] == [
        *("one", "two", "two", "three", "three", "four")
    ]
    items = client.conversations.items.list(conversation, order="asc", limit=100)
    assert len(list(items)) == 7


@pytest.mark.parametrize("stream", [False, True])
def test_a_prewarm_has_no_answer_and_is_continued(client, upstream, said, stream):
    options = {"extra_body": {"prompt_cache_options": {"prewarm": True}}, "store": True}
    body = {"model": "m", "messages": [user(f"{said} one")], **options}
    made = streamed(client, **body) if stream else client.chat.completions.create(**body)
    [choice] = made.choices
    assert (choice.message.content, choice.finish_reason) == (None, "stop")
    assert upstream.asked(f"{said} one") == []
    again = {"previous_response_id": made.response_id}
    client.chat.completions.create(model="m", messages=[user(f"{said} two")], extra_body=again)
    [asked] = upstream.asked(f"{said} two")
    assert [one["content"] for one in asked.body["messages"]] == [f"{said} one", f"{said} two"]


CLIENTS = [
    {"type": "local_shell"},
    {"type": "tool_search", "execution": "client"},
    {"type": "namespace", "name": "box", "description": "A box.", "tools": [{"type": "function", "name": "add"}]},
]


@pytest.mark.parametrize("stream", [False, True])
def test_a_chain_brings_no_tools_whose_calls_are_none_of_chat_completions(http, client, upstream, said, stream):
    functions = [{"type": "function", "name": "look"}, {"type": "custom", "name": "note"}]
    adding = {"type": "additional_tools", "role": "developer", "tools": [*CLIENTS, *functions]}
    first = client.responses.create(model="m", input=[adding, user(f"{said} one")])
    given = script([note(f"{said} {stream}"), call("look", {}, id="call_1"), finish("tool_calls")])
    body = {"model": "m", "messages": [user(given)], "previous_response_id": first.id, "stream": stream}
    reply = http.post("/chat/completions", json=body)
    assert reply.headers["x-reprise-left-out-items"] == "additional_tools"
    [asked] = upstream.asked(given)
    assert [one["function"]["name"] for one in asked.body["tools"]] == ["look", "note"]
    assert ('"finish_reason":"tool_calls"' in reply.text, '"name":"look"' in reply.text) == (True, True)
    plain = {**adding, "tools": functions}
    second = client.responses.create(model="m", input=[plain, user(f"{said} two")])
    reply = http.post("/chat/completions", json={**body, "previous_response_id": second.id})
    assert "x-reprise-left-out-items" not in reply.headers


def test_state_that_is_unknown_is_an_error_and_not_ignored(client):
    for key, value, error in (
        ("previous_response_id", "resp_none", openai.BadRequestError),
        ("conversation", "conv_none", openai.NotFoundError),
        ("conversation_id", "7f1c8b9e-0000-4000-8000-000000000000", openai.NotFoundError),
    ):
        with pytest.raises(error):
            client.chat.completions.create(model="m", messages=[user("x")], extra_body={key: value})


def test_a_conversation_may_be_read_without_being_appended_to(client, said):
    conversation = client.conversations.create(items=[{"role": "user", "content": f"{said} one"}]).id
    body = {"model": "m", "messages": [user(f"{said} two")], "extra_body": {"conversation": conversation}}
    made = client.chat.completions.create(store=False, **body)
    assert "response_id" not in made.to_dict()
    assert len(list(client.conversations.items.list(conversation))) == 1


# -- Stored completions ------------------------------------------------------------------------------------------------------


def test_a_stored_completion_is_what_was_streamed(client, said):
    sent = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "name": "ann", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALLED]},
        {"role": "tool", "tool_call_id": "call_1", "content": "1"},
        user(script([note(said), reasoning("Hm."), text("Yes."), finish()])),
    ]
    body = {"model": "m", "messages": sent, "store": True, "metadata": {"test": said[-60:]}}
    snapshot = streamed(client, stream_options={"include_usage": True}, **body)
    stored = client.chat.completions.retrieve(snapshot.id)
    whole = client.chat.completions.create(**body)
    for made in (snapshot, whole):
        assert (made.choices[0].message.content, made.choices[0].message.reasoning_content) == ("Yes.", "Hm.")
        assert (made.usage, made.created, made.service_tier) == (stored.usage, made.created, stored.service_tier)
        assert client.chat.completions.retrieve(made.id).choices[0] == whole.choices[0]
    assert client.chat.completions.retrieve(whole.id).to_dict() == whole.to_dict()
    assert stored.metadata == {"test": said[-60:]}
    assert client.responses.retrieve(stored.response_id).metadata == stored.metadata
    listed = client.chat.completions.messages.list(stored.id)
    assert [one.id for one in listed] == [f"{stored.id}-{at}" for at in range(5)]
    shown = [
        {key: value for key, value in one.to_dict().items() if value is not None and key != "id"} for one in listed
    ]
    assert shown[0] == sent[0]
    assert shown[1] == {"role": "user", "name": "ann", "content_parts": sent[1]["content"]}
    assert shown[2] == {"role": "assistant", "tool_calls": [CALLED]}
    assert shown[3:] == sent[3:]
    newest = client.chat.completions.messages.list(stored.id, order="desc", limit=2)
    assert [one.id for one in newest] == [f"{stored.id}-{at}" for at in (4, 3, 2, 1, 0)]
    with pytest.raises(openai.BadRequestError, match="not found"):
        client.chat.completions.messages.list(stored.id, after="none")


def test_stored_completions_are_listed_by_model_and_metadata(client, said):
    tag = {"test": said[-60:]}
    body = {"messages": [user(said)], "store": True, "metadata": tag}
    ids = [client.chat.completions.create(model=model, **body).id for model in ("m", "m", "other")]
    client.responses.create(model="m", input=said, metadata=tag)
    client.chat.completions.create(model="m", messages=[user(said)], metadata=tag)
    cut_off = script([note(said), text("Half"), cut()])
    with pytest.raises(openai.APIError):
        streamed(client, model="m", **{**body, "messages": [user(cut_off)]})

    def listed(**query):
        return [one.id for one in client.chat.completions.list(metadata=tag, **query)]

    assert set(listed()) == set(ids)
    assert listed(limit=1) == listed(order="desc", limit=1)[::-1] == listed()
    assert set(listed(model="m")) == set(ids[:2])
    assert listed(model="other") == ids[2:]
    for after in ("none", "chatcmpl-none", ids[0].replace("chatcmpl-", "resp_")):
        with pytest.raises(openai.BadRequestError, match=f"Chat completion with id '{after}' not found"):
            listed(after=after)
    first = listed()[0]
    assert first not in [one.id for one in client.chat.completions.list(metadata=tag, after=first)]


def test_metadata_is_replaced_everywhere(client, said):
    old, new = {"test": said[-60:], "is": "old"}, {"test": said[-60:], "is": "new"}
    made = client.chat.completions.create(model="m", messages=[user(said)], store=True, metadata=old)
    updated = client.chat.completions.update(made.id, metadata=new)
    assert (updated.metadata, updated.choices) == (new, made.choices)
    assert client.chat.completions.retrieve(made.id).metadata == new
    assert client.responses.retrieve(made.response_id).metadata == new
    assert [one.id for one in client.chat.completions.list(metadata=new)] == [made.id]
    assert not list(client.chat.completions.list(metadata=old))
    page = client.get(
        "/responses", cast_to=object, options={"params": {"metadata[is]": "new", "metadata[test]": said[-60:]}}
    )
    assert [one["id"] for one in page["data"]] == [made.response_id]
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.update(made.id, metadata={"a": "x" * 513})


def test_a_deleted_completion_is_gone_with_its_response_and_is_still_continued(client, said):
    made = client.chat.completions.create(model="m", messages=[user(f"{said} one")], store=True)
    later = client.responses.create(model="m", input=f"{said} two", previous_response_id=made.response_id)
    deleted = client.chat.completions.delete(made.id)
    assert (deleted.id, deleted.object, deleted.deleted) == (made.id, "chat.completion.deleted", True)
    for gone in (
        lambda: client.chat.completions.retrieve(made.id),
        lambda: client.chat.completions.messages.list(made.id),
        lambda: client.chat.completions.update(made.id, metadata={}),
        lambda: client.chat.completions.delete(made.id),
        lambda: client.responses.retrieve(made.response_id),
    ):
        with pytest.raises(openai.NotFoundError):
            gone()
    third = client.responses.create(model="m", input=f"{said} three", previous_response_id=later.id)
    assert len(list(client.responses.input_items.list(third.id))) == 5


def test_only_what_was_made_as_a_completion_is_one(client, said):
    response = client.responses.create(model="m", input=said)
    made = client.chat.completions.create(model="m", messages=[user(said)], store=True)
    for id in (response.id, response.id.replace("resp_", "chatcmpl-"), made.response_id, "chatcmpl-none"):
        with pytest.raises(openai.NotFoundError, match=f"Chat completion with id '{id}' not found"):
            client.chat.completions.retrieve(id)
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.delete(id)
    assert client.responses.retrieve(response.id).id == response.id
