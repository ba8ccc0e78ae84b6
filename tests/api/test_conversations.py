"""Conversations: their items, the responses that continue them, forks, and who may write."""

import itertools

import openai
import pytest

from tests.api.test_background import ended
from tests.api.test_chain import answer_to, asked, assistant, exchange, refused, user
from tests.upstream import answer, calling, cut, finish, gate, script, status, text
from tests.waiting import count, fetch, settled

TOOL = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {}}, "strict": False}
LOCKED = "Another process is currently operating on this conversation. Please retry in a few seconds."


def message(content, **more):
    return {"type": "message", "role": "user", "content": content, **more}


def texts(client, conversation_id, **query):
    """The texts of a conversation's items, oldest first, read page by page."""
    items = client.conversations.items.list(conversation_id, **{"order": "asc", "limit": 3, **query})
    return [part.text for item in items if item.type == "message" for part in item.content]


def respond(client, conversation_id, input, **create):
    return client.responses.create(model="m", input=input, conversation=conversation_id, **create)


@pytest.fixture
def conversation(client):
    """An empty conversation's id."""
    return client.conversations.create().id


# -- Responses --------------------------------------------------------------------------------------------------------------


def test_responses_continue_a_conversation_in_every_way_of_making_them(client, upstream, said):
    made = client.conversations.create(
        metadata={"topic": "demo"}, items=[message("I am Ada."), {"role": "assistant", "content": "Hello Ada."}]
    )
    assert made.id.startswith("conv_") and (made.object, made.metadata) == ("conversation", {"topic": "demo"})
    context = [user("I am Ada."), assistant("Hello Ada.")]

    def stream(**create):
        events = list(respond(client, {"id": made.id}, stream=True, **create))
        return events[-1].response

    ways = {
        "json": lambda **create: respond(client, made.id, **create),
        "stream": stream,
        "background": lambda **create: ended(client, respond(client, made.id, background=True, **create).id),
        "background stream": lambda **create: stream(background=True, **create),
    }
    for name, make in ways.items():
        response = make(input=f"{said} {name}")
        assert (response.status, response.conversation.id) == ("completed", made.id)
        assert client.responses.retrieve(response.id).conversation.id == made.id
        context += exchange(f"{said} {name}")
        assert asked(upstream, f"{said} {name}") == context[:-1]
        assert texts(client, made.id) == [one["content"] for one in context]
        inputs = client.responses.input_items.list(response.id, order="asc", limit=2)
        assert [item.content[0].text for item in inputs] == [one["content"] for one in context[:-1]]


def test_a_response_that_fails_or_is_cancelled_is_not_appended(client, upstream, conversation, said):
    respond(client, conversation, "first")
    with pytest.raises(openai.APIStatusError):
        respond(client.with_options(max_retries=0), conversation, script([status(400, {"error": {"message": "no"}})]))
    broken = [*respond(client, conversation, script([text("so far"), cut()]), stream=True)][-1].response
    assert broken.status == "failed"
    waiting = respond(client, conversation, script([text("so far"), gate(said)]), background=True)
    assert client.responses.cancel(waiting.id).status == "cancelled"
    respond(client, conversation, said)
    assert texts(client, conversation) == ["first", "ok: first", said, f"ok: {said}"]
    assert asked(upstream, said) == [*exchange("first"), user(said)]
    for response in (broken, waiting):
        kept = client.responses.input_items.list(response.id, order="asc")
        assert [item.content[0].text for item in kept][:2] == ["first", "ok: first"]


def test_an_incomplete_response_is_appended(client, conversation):
    response = respond(client, conversation, script([text("half"), finish("length")]))
    assert response.status == "incomplete"
    assert texts(client, conversation)[1:] == ["half"]


def test_calls_wait_in_the_conversation_for_their_outputs(client, upstream, conversation, said):
    called = respond(client, conversation, script(calling("look"), answer("seen")), tools=[TOOL])
    assert called.output[0].type == "function_call"
    error = refused(client, input="ignored", conversation=conversation)
    assert error.body["message"] == "No tool output found for function call call_1."
    assert respond(client, conversation, [answer_to("look")], tools=[TOOL]).output_text == "seen"
    items = client.conversations.items.list(conversation, order="asc")
    assert [item.type for item in items] == ["message", "function_call", "function_call_output", "message"]


def test_nothing_is_read_or_locked_of_a_conversation_but_its_items_when_nothing_is_stored(client, upstream, said):
    made = client.conversations.create(items=[message("earlier")])
    with respond(client, made.id, script([text("busy"), gate(said), finish()]), stream=True) as stream:
        next(stream)
        response = respond(client, made.id, said, store=False)
        assert response.conversation.id == made.id
        upstream.open(said)
        assert list(stream)[-1].type == "response.completed"
    assert asked(upstream, said) == [user("earlier"), user(said)]
    assert texts(client, made.id)[2:] == ["busy"]


def test_a_conversation_has_one_writer_at_a_time(client, upstream, said):
    made = client.conversations.create(items=[message("earlier")])
    [item] = client.conversations.items.list(made.id)
    for background in (False, True):
        busy = script([text("busy"), gate(f"{said} {background}"), finish()])
        with respond(client, made.id, busy, stream=True, background=background) as stream:
            next(stream)
            for write in (
                lambda: respond(client, made.id, "me, too"),
                lambda: respond(client, made.id, "me, too", background=True),
                lambda: client.conversations.items.create(made.id, items=[message("me, too")]),
                lambda: client.conversations.items.delete(item.id, conversation_id=made.id),
            ):
                with pytest.raises(openai.BadRequestError) as caught:
                    write()
                assert (caught.value.code, caught.value.param) == ("conversation_locked", "conversation")
                assert caught.value.body["message"] == LOCKED
            client.conversations.update(made.id, metadata={"while": "busy"})
            upstream.open(f"{said} {background}")
            assert list(stream)[-1].type == "response.completed"
        assert client.conversations.items.create(made.id, items=[message("now")]).data[0].content[0].text == "now"


def test_the_lock_goes_with_a_response_that_is_refused(client, conversation):
    """Its row is taken back: the upstream does not take the request."""
    bad = script([status(400, {"error": {"message": "no", "type": "invalid_request_error"}})])
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            respond(client, conversation, bad, stream=stream)
        assert caught.value.body["message"] == "no"
    assert respond(client, conversation, "more").output_text == "ok: more"
    assert texts(client, conversation) == ["more", "ok: more"]


def test_a_client_that_disconnects_frees_its_conversation(client, conversation, said):
    with respond(client, conversation, script([text("busy"), gate(said)]), stream=True) as stream:
        next(stream)
    done = settled(respond, client, conversation, "more", error=openai.BadRequestError)
    assert done.output_text == "ok: more"


def test_conversation_and_previous_response_exclude_each_other(client, conversation):
    first = client.responses.create(model="m", input="hi")
    error = refused(client, input="more", conversation=conversation, previous_response_id=first.id)
    assert (error.code, error.param) == ("mutually_exclusive_parameters", "conversation")


def test_a_chain_leaves_the_conversation_as_it_was(client, upstream, conversation, said):
    first = respond(client, conversation, "first")
    beside = [client.responses.create(model="m", input="beside", previous_response_id=first.id) for _ in range(2)]
    respond(client, conversation, "second")
    client.responses.create(model="m", input=said, previous_response_id=beside[0].id)
    assert texts(client, conversation) == ["first", "ok: first", "second", "ok: second"]
    assert asked(upstream, said) == [*exchange("first"), *exchange("beside"), user(said)]


@pytest.mark.parametrize("given", ["conv_unknown", {"id": "conv_unknown"}, "", "\0"])
def test_an_unknown_conversation_is_not_found(client, given):
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.create(model="m", input="hi", conversation=given)
    id = given if isinstance(given, str) else given["id"]
    assert caught.value.body["message"] == f"Conversation with id '{id}' not found."
    assert caught.value.param == "conversation"


@pytest.mark.parametrize(
    ("given", "param"), [(7, "conversation"), ({}, "conversation.id"), ({"id": "a", "more": 1}, "conversation.more")]
)
def test_what_is_no_conversation_is_refused(client, given, param):
    assert refused(client, input="hi", conversation=given).param == param


# -- Items ------------------------------------------------------------------------------------------------------------------


def test_items_are_added_listed_read_and_removed(client, conversation):
    added = client.conversations.items.create(conversation, items=[message(f"{n}") for n in range(20)])
    assert [item.content[0].text for item in added.data] == [f"{n}" for n in range(20)]
    assert (added.first_id, added.last_id, added.has_more) == (added.data[0].id, added.data[-1].id, False)
    assert all(item.status == "completed" and item.id.startswith("msg_") for item in added.data)
    assert texts(client, conversation) == [f"{n}" for n in range(20)]
    assert texts(client, conversation, order="desc", limit=7) == [f"{n}" for n in reversed(range(20))]
    page = client.conversations.items.list(conversation)
    assert page.last_id == added.data[0].id and not page.has_more
    third = added.data[3].id
    assert client.conversations.items.retrieve(third, conversation_id=conversation).content[0].text == "3"
    left = client.conversations.items.delete(third, conversation_id=conversation)
    assert (left.id, left.object) == (conversation, "conversation")
    assert texts(client, conversation) == [f"{n}" for n in range(20) if n != 3]
    for again in (client.conversations.items.retrieve, client.conversations.items.delete):
        with pytest.raises(openai.NotFoundError, match=f"Item with id '{third}' not found"):
            again(third, conversation_id=conversation)


def test_items_of_every_kind_are_carried(client, upstream, conversation, said):
    given = [
        {"role": "developer", "content": "Be brief."},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "why"}]},
        {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "seen"},
        {"type": "local_shell_call", "id": "lsh_1", "call_id": "s1", "action": {"type": "exec"}, "status": "completed"},
        {"type": "local_shell_call_output", "id": "s1", "output": "done"},
    ]
    client.conversations.items.create(conversation, items=given)
    listed = client.conversations.items.list(conversation, order="asc").data
    assert [item.type for item in listed] == ["message", *(one["type"] for one in given[1:])]
    copied = client.conversations.create(items=[item.to_dict() for item in listed])
    assert [item.to_dict() for item in client.conversations.items.list(copied.id, order="asc")] == [
        item.to_dict() for item in listed
    ]
    respond(client, conversation, said)
    assert [one["role"] for one in asked(upstream, said)][-1] == "user"


def test_a_reference_stands_for_a_stored_item(client, conversation):
    response = client.responses.create(model="m", input="hi")
    added = client.conversations.items.create(
        conversation, items=[{"type": "item_reference", "id": response.output[0].id}]
    )
    assert added.data[0].to_dict() == response.output[0].to_dict()


def test_references_take_no_more_than_a_context(new_server):
    with new_server(REPRISE_CONTEXT_BYTES_MAX="100000").client() as own:
        made = own.conversations.create(items=[message("x" * 60_000, id=f"msg_{n}") for n in range(2)])
        references = [{"type": "item_reference", "id": f"msg_{n}"} for n in range(2)]
        assert texts(own, own.conversations.create(items=references[:1]).id) == ["x" * 60_000]
        with pytest.raises(openai.BadRequestError, match="more than 100000 are not possible"):
            own.conversations.create(items=references)
        assert own.conversations.items.retrieve("msg_1", conversation_id=made.id).content[0].text == "x" * 60_000


@pytest.mark.parametrize(
    ("items", "param"),
    [
        ([], "items"),
        ([message("x")] * 21, "items"),
        ([message("x"), {"type": "message", "role": "user"}], "items[1].content"),
        ([message("x", id="msg_1"), message("y", id="msg_1")], "items"),
        ([{"type": "item_reference", "id": "msg_unknown"}], "items"),
        ([{"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"}], "items[0].encrypted_content"),
        ([message("x"), {"type": "compaction", "encrypted_content": "x"}], "items[1].encrypted_content"),
        ([message("x"), {"type": "compaction_trigger"}], "items[1]"),
        ("text", "items"),
    ],
)
def test_items_that_are_wrong_are_refused_and_none_is_added(client, conversation, items, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.conversations.items.create(conversation, items=items)
    assert caught.value.param == param
    assert texts(client, conversation) == []


def test_an_item_is_found_by_whatever_id_it_may_have(client, conversation):
    ids = ["a b?c#d%2e&é", "a+b=", "...", "items", "\U0001f600", "\\", ";x=1", "~", "%2F"]
    client.conversations.items.create(conversation, items=[message(id, id=id) for id in ids])
    for id in ids:
        found = client.conversations.items.retrieve(id, conversation_id=conversation)
        assert (found.id, found.content[0].text) == (id, id)
        client.conversations.items.delete(id, conversation_id=conversation)
    assert texts(client, conversation) == []
    for id in ("a/b", "/", ".", ".."):
        with pytest.raises(openai.BadRequestError) as caught:
            client.conversations.items.create(conversation, items=[message("x", id=id)])
        assert caught.value.param == "items[0].id"


def test_an_item_is_in_a_conversation_once(client, conversation):
    client.conversations.items.create(conversation, items=[message("x", id="msg_once")])
    with pytest.raises(openai.BadRequestError, match="'msg_once' is in the conversation already"):
        client.conversations.items.create(conversation, items=[message("y", id="msg_once")])
    assert (
        "Duplicate" in refused(client, input=[message("z", id="msg_once")], conversation=conversation).body["message"]
    )


def test_what_is_removed_from_a_conversation_stays_in_its_responses(client, upstream, conversation, said):
    first = respond(client, conversation, "first")
    [asking, _] = client.conversations.items.list(conversation, order="asc")
    client.conversations.items.delete(asking.id, conversation_id=conversation)
    second = respond(client, conversation, said)
    assert asked(upstream, said) == [assistant("ok: first"), user(said)]
    inputs = client.responses.input_items.list
    assert [item.content[0].text for item in inputs(first.id)] == ["first"]
    assert [item.content[0].text for item in inputs(second.id, order="asc")] == ["ok: first", said]
    client.responses.delete(first.id)
    assert texts(client, conversation) == ["ok: first", said, f"ok: {said}"]


def test_results_are_shown_where_they_are_included(http, client, conversation):
    item = {
        "type": "file_search_call",
        "id": "fs_1",
        "queries": ["q"],
        "status": "completed",
        "results": [{"file_id": "f", "text": "found"}],
    }
    client.conversations.items.create(conversation, items=[item])
    path = f"/conversations/{conversation}/items"
    asks = {"include[]": "file_search_call.results"}
    assert http.get(f"{path}/fs_1").json()["results"] is None
    assert http.get(f"{path}/fs_1", params=asks).json()["results"] == item["results"]
    assert http.get(path, params=asks).json()["data"][0]["results"] == item["results"]


# -- Conversations ----------------------------------------------------------------------------------------------------------


def test_a_conversation_is_read_changed_and_deleted(client, http):
    made = client.conversations.create(metadata={"a": "1"}, items=[message("hi")])
    response = respond(client, made.id, "more")
    assert client.conversations.retrieve(made.id) == made
    assert client.conversations.update(made.id, metadata={"b": "2"}).metadata == {"b": "2"}
    assert client.conversations.update(made.id, metadata=None).metadata == {}
    assert http.delete(f"/conversations/{made.id}").json() == {
        "id": made.id,
        "object": "conversation.deleted",
        "deleted": True,
    }
    for gone in (
        client.conversations.retrieve,
        client.conversations.delete,
        client.conversations.items.list,
        lambda id: client.conversations.items.create(id, items=[message("x")]),
        lambda id: client.conversations.items.retrieve("msg_1", conversation_id=id),
        lambda id: client.conversations.update(id, metadata={}),
        lambda id: respond(client, id, "x"),
    ):
        with pytest.raises(openai.NotFoundError, match=f"Conversation with id '{made.id}' not found"):
            gone(made.id)
    assert client.responses.retrieve(response.id).output_text == "ok: more"
    assert len(client.responses.input_items.list(response.id).data) == 2
    assert client.responses.create(model="m", input="on", previous_response_id=response.id).output_text == "ok: on"


def test_a_conversation_that_is_deleted_while_a_response_is_made_leaves_the_response(
    client, upstream, conversation, said
):
    with respond(client, conversation, script([text("a"), gate(said), finish()]), stream=True) as stream:
        id = next(stream).response.id
        client.conversations.delete(conversation)
        upstream.open(said)
        assert list(stream)[-1].type == "response.completed"
    assert client.responses.retrieve(id).output_text == "a"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("", {"metadata": {"k": 1}}, "metadata.k"),
        ("", {"metadata": {"k": "\0"}}, "metadata"),
        ("", {"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ("", {"item": []}, "item"),
        ("/ID", {}, "metadata"),
        ("/ID/items", {}, "items"),
        ("/ID/fork", {"after": "msg_unknown"}, "after"),
        ("/ID/fork", {"before": "msg_unknown"}, "before"),
        ("?limit=3", {}, "limit"),
    ],
)
def test_bad_requests_are_refused_with_the_parameter(http, conversation, path, body, param):
    reply = http.post(f"/conversations{path.replace('ID', conversation)}", json=body)
    assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error")
    assert reply.json()["error"]["param"] == param


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "order=up", "after=msg_unknown", "before=a&after=b", "x=1"])
def test_bad_queries_are_refused(http, conversation, query):
    assert http.get(f"/conversations/{conversation}/items?{query}").status_code == 400


def test_conversations_are_listed_by_creation_and_metadata(http, new_server):
    def listed(served, **query):
        return [one["id"] for one in served.get("/conversations", params=query).json()["data"]]

    with http.__class__(base_url=new_server().url, timeout=30) as own:
        metadata = [{"user": "a"}, {"user": "a", "topic": "x"}, {"user": "b", "topic": "x", "n": "3"}, {}]
        ids = [own.post("/conversations", json={"metadata": one}).json()["id"] for one in metadata]
        assert listed(own, order="asc") == ids
        assert listed(own) == ids[::-1]
        page = own.get("/conversations", params={"limit": 3}).json()
        assert (page["has_more"], page["last_id"]) == (True, ids[1])
        assert listed(own, after=page["last_id"]) == [ids[0]]
        assert listed(own, **{"metadata[user]": "a"}) == [ids[1], ids[0]]
        assert listed(own, **{"metadata[user]": "b", "metadata[topic]": "x", "metadata[n]": "3"}) == [ids[2]]
        own.post(f"/conversations/{ids[3]}", json={"metadata": {"user": "a"}})
        own.post(f"/conversations/{ids[0]}", json={"metadata": {"user": "b"}})
        assert listed(own, **{"metadata[user]": "a"}) == [ids[3], ids[1]]
        own.delete(f"/conversations/{ids[1]}")
        assert listed(own, order="asc", after=ids[1]) == ids[2:]
        assert listed(own, **{"metadata[user]": "a"}) == [ids[3]]
        assert own.get("/conversations", params={"after": "nonsense"}).status_code == 400
        assert own.get("/responses").json()["data"] == []


# -- Forks ------------------------------------------------------------------------------------------------------------------


def fork(http, id, **body):
    reply = http.post(f"/conversations/{id}/fork", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_a_fork_shares_the_items_up_to_one(http, client, upstream, conversation, said):
    client.conversations.update(conversation, metadata={"a": "1"})
    respond(client, conversation, [message("one"), message("two")])
    respond(client, conversation, "three")
    items = list(client.conversations.items.list(conversation, order="asc"))
    whole = fork(http, conversation)
    assert whole["metadata"] == {"a": "1"} and whole["id"] != conversation
    everything = ["one", "two", "ok: two", "three", "ok: three"]
    assert texts(client, whole["id"]) == everything
    cut_in_the_turn = fork(http, conversation, after=items[0].id, metadata={})
    assert (texts(client, cut_in_the_turn["id"]), cut_in_the_turn["metadata"]) == (["one"], {})
    of_the_fork = fork(http, whole["id"], after=items[3].id)
    respond(client, of_the_fork["id"], said)
    assert asked(upstream, said) == [user("one"), user("two"), assistant("ok: two"), user("three"), user(said)]
    client.conversations.items.delete(items[1].id, conversation_id=whole["id"])
    respond(client, conversation, "four")
    assert texts(client, whole["id"]) == [one for one in everything if one != "two"]
    assert texts(client, conversation) == [*everything, "four", "ok: four"]
    assert texts(client, of_the_fork["id"]) == [*everything[:4], said, f"ok: {said}"]
    client.conversations.delete(conversation)
    assert texts(client, whole["id"]) == [one for one in everything if one != "two"]
    assert texts(client, cut_in_the_turn["id"]) == ["one"]


def test_what_was_removed_before_a_fork_is_not_in_it(http, client, conversation):
    ids = [client.conversations.items.create(conversation, items=[message(f"{n}")]).data[0].id for n in range(4)]
    client.conversations.items.delete(ids[1], conversation_id=conversation)
    assert texts(client, fork(http, conversation, after=ids[2])["id"]) == ["0", "2"]


def test_a_fork_copies_nothing(http, client, server):
    made = client.conversations.create(items=[message("x") for _ in range(20)])
    before = count(server.env["DATABASE_URL"], "items")
    fork(http, made.id)
    assert count(server.env["DATABASE_URL"], "items") == before


def test_what_nothing_needs_any_more_is_deleted(client, http, new_server):
    served = new_server()
    with openai.OpenAI(base_url=served.url, api_key="none") as own:
        made = own.conversations.create(items=[message("first")])
        own.conversations.items.delete(own.conversations.items.list(made.id).data[0].id, conversation_id=made.id)
        rows = fetch(served.env["DATABASE_URL"], "select body from items")
        assert rows == []
        responses = [respond(own, made.id, f"{n}") for n in range(3)]
        for deleted in itertools.chain([made.id], (one.id for one in responses)):
            own.delete(f"/{'conversations' if deleted == made.id else 'responses'}/{deleted}", cast_to=object)
        for table in ("items", "responses", "conversations", "branches", "removals", "facets"):
            assert count(served.env["DATABASE_URL"], table) == 0, table
