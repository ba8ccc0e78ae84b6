"""Chains: what a response that continues another one starts from, and which continuations are refused."""

import asyncio
import re
from contextlib import closing

import openai
import pytest

from tests.upstream import answer, call, calling, cut, finish, gate, note, script, text
from tests.waiting import fetch, settled

TOOL = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {}}, "strict": False}


def asked(upstream, said):
    """The messages of the one chat request that ended with this user message."""
    [record] = upstream.asked(said)
    return record.body["messages"]


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def exchange(content):
    """A plain text and the upstream's answer to it."""
    return [user(content), assistant(f"ok: {content}")]


def refused(client, **create):
    """The error of a request that must be refused with 400."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="m", **create)
    assert set(caught.value.body) == {"message", "type", "param", "code"}
    assert caught.value.type == "invalid_request_error"
    return caught.value


def refused_parent(client, id):
    """Continuing this response says that there is no such one."""
    error = refused(client, input="more", previous_response_id=id)
    assert error.code == "previous_response_not_found"
    assert error.param == "previous_response_id"
    assert error.body["message"] == f"Previous response with id '{id}' not found."


def answer_to(name, output="done", call_id="call_1"):
    return {"type": "function_call_output", "call_id": call_id, "output": output}


# -- The context ------------------------------------------------------------------------------------------------------------


def test_a_chat_of_five_turns_reaches_the_upstream_whole_each_time(client, upstream, said):
    previous, context = None, []
    for turn in range(5):
        text = f"{said} {turn}"
        made = client.responses.create(model="m", input=text, previous_response_id=previous)
        assert made.output_text == f"ok: {text}"
        assert made.previous_response_id == previous
        assert asked(upstream, text) == [*context, user(text)]
        previous, context = made.id, [*context, *exchange(text)]


def test_items_of_every_kind_keep_their_order_in_the_chain(client, upstream, said):
    parts = [{"type": "input_text", "text": "look at"}, {"type": "input_image", "image_url": "https://x.test/a.png"}]
    given = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "seen"},
        {"role": "developer", "content": "be briefer"},
        {"role": "user", "content": script([note(said), text("a"), text(" b"), finish()])},
    ]
    first = client.responses.create(model="m", input=given)
    client.responses.create(model="m", input=said, previous_response_id=first.id)
    assert asked(upstream, said) == [
        {"role": "system", "content": "be brief"},
        user(
            [
                {"type": "text", "text": "look at"},
                {"type": "image_url", "image_url": {"url": "https://x.test/a.png"}},
            ]
        ),
        assistant("seen"),
        {"role": "system", "content": "be briefer"},
        user(given[-1]["content"]),
        assistant("a b"),
        user(said),
    ]


def test_instructions_tools_and_text_format_are_not_inherited(client, upstream, said):
    first = client.responses.create(
        model="m",
        input="first",
        instructions="speak like a pirate",
        tools=[TOOL],
        tool_choice="auto",
        text={"format": {"type": "json_object"}},
        metadata={"a": "b"},
        temperature=0.5,
    )
    second = client.responses.create(model="m", input=said, previous_response_id=first.id)
    [record] = upstream.asked(said)
    assert record.body["messages"] == [*exchange("first"), user(said)]
    assert not {"tools", "tool_choice", "response_format", "temperature"} & record.body.keys()
    assert (second.instructions, second.tools, second.metadata, second.text.format.type) == (None, [], {}, "text")


def test_a_function_call_and_its_output_are_one_exchange_of_the_chain(client, upstream, said):
    asking = script([note(said), *calling("look", {"where": "here"})], answer("nothing there"))
    first = client.responses.create(model="m", input=asking, tools=[TOOL])
    second = client.responses.create(
        model="m", input=[answer_to("look", "empty")], previous_response_id=first.id, tools=[TOOL]
    )
    assert second.output_text == "nothing there"
    client.responses.create(model="m", input=said, previous_response_id=second.id)
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"where":"here"}'}}
    assert asked(upstream, said) == [
        user(asking),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "empty"},
        assistant("nothing there"),
        user(said),
    ]


def test_the_same_call_id_may_come_again_in_a_history_of_another_server(client, upstream, said):
    def look(arguments, output):
        called = {"type": "function_call", "call_id": "call_1", "name": "look", "arguments": arguments}
        return [called, answer_to("look", output)]

    asking = script([note(said), *calling("look", '{"n":1}')], calling("look", '{"n":2}'), answer("enough"))
    history = [*look('{"n":1}', "one"), *look('{"n":2}', "two")]
    given = [{"role": "user", "content": asking}, *history]
    assert client.responses.create(model="m", input=given, tools=[TOOL]).output_text == "enough"
    messages = upstream.asked(asking)[-1].body["messages"]
    assert [(m["tool_calls"][0]["function"]["arguments"]) for m in messages if "tool_calls" in m] == [
        '{"n":1}',
        '{"n":2}',
    ]
    assert [m["content"] for m in messages if m["role"] == "tool"] == ["one", "two"]
    assert [m["role"] for m in messages] == ["user", "assistant", "tool", "assistant", "tool"]


# -- Branches ---------------------------------------------------------------------------------------------------------------


def test_branches_from_the_middle_and_from_the_tip_see_only_their_own_way(client, upstream, said):
    def turn(name, previous=None):
        return client.responses.create(model="m", input=f"{said} {name}", previous_response_id=previous).id

    def way(*names):
        *earlier, last = (f"{said} {name}" for name in names)
        return [*(message for one in earlier for message in exchange(one)), user(last)]

    root = turn("root")
    middle = turn("middle", root)
    tip = turn("tip", middle)
    of_tip_1, of_tip_2 = turn("of tip 1", tip), turn("of tip 2", tip)
    of_middle = turn("of middle", middle)
    of_root = turn("of root", root)
    turn("end 1", of_tip_1)
    turn("end 2", of_tip_2)
    turn("end 3", of_middle)
    turn("end 4", of_root)
    ways = {
        "end 1": way("root", "middle", "tip", "of tip 1", "end 1"),
        "end 2": way("root", "middle", "tip", "of tip 2", "end 2"),
        "end 3": way("root", "middle", "of middle", "end 3"),
        "end 4": way("root", "of root", "end 4"),
    }
    assert {name: asked(upstream, f"{said} {name}") for name in ways} == ways


async def test_fifty_clients_continue_the_same_parent_at_once(async_client, upstream, said):
    create = async_client.responses.create
    root = await create(model="m", input=f"{said} root")
    parent = await create(model="m", input=f"{said} parent", previous_response_id=root.id)
    shared = [*exchange(f"{said} root"), *exchange(f"{said} parent")]
    # They wait for each other in the upstream, so all fifty are under way before any is stored.
    texts = [script([note(f"{said} {n}"), text(f"mine {n}"), gate(said), finish()]) for n in range(50)]
    running = [
        asyncio.create_task(create(model="m", input=one, previous_response_id=parent.id, stream=n % 2 == 0))
        for n, one in enumerate(texts)
    ]
    while sum(len(upstream.asked(one)) for one in texts) < len(texts):
        assert not any(task.done() and task.exception() for task in running)
        await asyncio.sleep(0.01)
    upstream.open(said)
    made = []
    for task in running:
        result = await task
        if isinstance(result, openai.AsyncStream):
            result = [event async for event in result][-1].response
        made.append(result)
    assert [one.output_text for one in made] == [f"mine {n}" for n in range(50)]
    assert len({one.id for one in made}) == 50
    assert [asked(upstream, one) for one in texts] == [[*shared, user(one)] for one in texts]
    after = await asyncio.gather(
        *(create(model="m", input=f"{said} after {n}", previous_response_id=one.id) for n, one in enumerate(made))
    )
    assert len({one.id for one in after}) == 50
    for n, one in enumerate(texts):
        expected = [*shared, user(one), assistant(f"mine {n}"), user(f"{said} after {n}")]
        assert asked(upstream, f"{said} after {n}") == expected


# -- Parents that did not end well ------------------------------------------------------------------------------------------


def test_a_parent_in_progress_is_refused_and_its_end_makes_it_a_parent(client, upstream, said):
    asking = script([text("slow"), gate(said), finish()])
    with client.responses.create(model="m", input=asking, stream=True) as stream:
        id = next(stream).response.id
        error = refused(client, input="too early", previous_response_id=id)
        assert error.body["message"] == f"Previous response with id '{id}' is still in progress."
        assert (error.param, error.code) == ("previous_response_id", None)
        upstream.open(said)
        assert list(stream)[-1].type == "response.completed"
    client.responses.create(model="m", input=said, previous_response_id=id)
    assert asked(upstream, said) == [user(asking), assistant("slow"), user(said)]


def test_an_incomplete_parent_leaves_its_partial_text(client, upstream, said):
    asking = script([note(said), text("cut"), text(" short"), finish("length")])
    parent = client.responses.create(model="m", input=asking)
    assert (parent.status, parent.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    client.responses.create(model="m", input=said, previous_response_id=parent.id)
    assert asked(upstream, said) == [user(asking), assistant("cut short"), user(said)]


def failed(client, upstream, name, *steps, **create):
    """A response whose upstream broke off once the client had heard a delta of it."""
    with client.responses.create(model="m", input=script([*steps, gate(name), cut()]), stream=True, **create) as stream:
        next(event for event in stream if event.type.endswith(".delta"))
        upstream.open(name)
        last = list(stream)[-1]
    assert last.type == "response.failed"
    return last.response


def test_a_failed_parent_leaves_its_partial_text(client, upstream, said):
    steps = text("half"), text(" said")
    parent = failed(client, upstream, said, *steps)
    client.responses.create(model="m", input=said, previous_response_id=parent.id)
    assert asked(upstream, said)[1:] == [assistant("half said"), user(said)]


def test_a_cancelled_parent_leaves_its_partial_text(client, upstream, said):
    asking = script([note(said), text("half"), gate(said), text("never"), finish()])
    with closing(client.responses.create(model="m", input=asking, stream=True)) as stream:
        id = next(event.response.id for event in stream)
        next(event for event in stream if event.type == "response.output_text.delta")
    assert settled(client.responses.retrieve, id, error=openai.NotFoundError).status == "cancelled"
    client.responses.create(model="m", input=said, previous_response_id=id)
    assert asked(upstream, said) == [user(asking), assistant("half"), user(said)]


def test_a_call_that_was_cut_off_needs_no_output(client, upstream, said):
    steps = text("looking"), call("look", '{"wh', id="call_1")
    parent = failed(client, upstream, said, *steps, tools=[TOOL])
    assert [item.type for item in parent.output] == ["message", "function_call"]
    client.responses.create(model="m", input=said, previous_response_id=parent.id)
    assert asked(upstream, said)[1:] == [assistant("looking"), user(said)]


# -- Continuations that are refused -----------------------------------------------------------------------------------------


def test_a_call_left_unanswered_is_refused(client, said):
    first = client.responses.create(model="m", input=script([note(said), *calling("look")]), tools=[TOOL])
    error = refused(client, input="never mind", previous_response_id=first.id)
    assert error.body["message"] == "No tool output found for function call call_1."
    assert (error.param, error.code) == ("input", None)


def test_an_output_without_its_call_is_refused(client, said):
    first = client.responses.create(model="m", input=said)
    for previous in (None, first.id):
        error = refused(client, input=[answer_to("look", call_id="call_9")], previous_response_id=previous)
        assert error.body["message"] == "No tool call found for function call output with call_id call_9."
        assert (error.param, error.code) == ("input", None)


def test_an_output_given_twice_is_refused(client, said):
    asking = script([note(said), *calling("look")], answer("thanks"))
    first = client.responses.create(model="m", input=asking, tools=[TOOL])
    second = client.responses.create(model="m", input=[answer_to("look")], previous_response_id=first.id)
    error = refused(client, input=[answer_to("look")], previous_response_id=second.id)
    assert error.body["message"] == "No tool call found for function call output with call_id call_1."


def test_an_item_that_the_chain_holds_already_is_a_duplicate(client, said):
    first = client.responses.create(model="m", input=said)
    [message] = first.output
    resent = [message.to_dict(), {"role": "user", "content": "and?"}]
    for duplicate in (resent, [{"type": "item_reference", "id": message.id}, *resent[1:]]):
        error = refused(client, input=duplicate, previous_response_id=first.id)
        assert error.body["message"] == (
            f"Duplicate item found with id {message.id}. Remove duplicate items from your input and try again."
        )
        assert (error.param, error.code) == ("input", None)
    error = refused(client, input=[resent[0], *resent])
    assert error.body["message"].startswith(f"Duplicate item found with id {message.id}.")
    # Without the chain the same item is simply the history that a stateless client sends.
    assert client.responses.create(model="m", input=resent).output_text == "ok: and?"


def test_an_item_reference_stands_for_the_stored_item(client, upstream, said):
    first = client.responses.create(model="m", input=f"{said} first")
    [message] = first.output
    [given] = client.responses.input_items.list(first.id).data
    second = client.responses.create(
        model="m",
        input=[
            {"type": "item_reference", "id": given.id},
            {"id": message.id},  # `type` may be left out
            {"role": "user", "content": said},
        ],
    )
    assert asked(upstream, said) == [*exchange(f"{said} first"), user(said)]
    listed = list(client.responses.input_items.list(second.id, order="asc"))
    assert [item.id for item in listed[:2]] == [given.id, message.id]
    assert listed[1].to_dict() == message.to_dict()


def test_a_reference_to_an_unknown_item_is_refused(client, said):
    for id in ("msg_0123456789", "msg_\0", ""):
        error = refused(client, input=[{"type": "item_reference", "id": id}, {"role": "user", "content": said}])
        assert error.body["message"] == (
            f"Item with id '{id}' not found. Items are not persisted when `store` is set to false. "
            "Try again with `store` set to true, or remove this item from your input."
        )
        assert (error.param, error.code) == ("input", None)


@pytest.mark.parametrize("id", ["resp_0123456789abcdef", "", "resp_\0", "'; drop table responses; --", "x" * 1500])
def test_an_unknown_parent_is_refused(client, id):
    refused_parent(client, id)


def test_a_deleted_parent_is_unknown(client, said):
    first = client.responses.create(model="m", input=said)
    client.responses.delete(first.id)
    refused_parent(client, first.id)


def test_a_parent_that_was_not_stored_is_unknown(client, said):
    first = client.responses.create(model="m", input=said, store=False)
    refused_parent(client, first.id)
    *_, last = client.responses.create(model="m", input=said, store=False, stream=True)
    refused_parent(client, last.response.id)


def test_a_continuation_that_is_not_stored_sees_the_chain_and_leaves_no_trace(client, upstream, said):
    first = client.responses.create(model="m", input=f"{said} first")
    second = client.responses.create(model="m", input=f"{said} second", previous_response_id=first.id, store=False)
    assert asked(upstream, f"{said} second") == [*exchange(f"{said} first"), user(f"{said} second")]
    refused_parent(client, second.id)
    client.responses.create(model="m", input=said, previous_response_id=first.id)
    assert asked(upstream, said) == [*exchange(f"{said} first"), user(said)]


def test_a_refused_continuation_leaves_no_trace_in_the_chain(client, upstream, said):
    first = client.responses.create(model="m", input=f"{said} first")
    refused(client, input=[answer_to("look")], previous_response_id=first.id)
    with pytest.raises(openai.APIStatusError):
        client.responses.create(
            model="m", input=script([note(said), {"status": 422}]), previous_response_id=first.id, stream=True
        )
    client.responses.create(model="m", input=said, previous_response_id=first.id)
    assert asked(upstream, said) == [*exchange(f"{said} first"), user(said)]


# -- Long chains ------------------------------------------------------------------------------------------------------------


def test_whoever_continues_at_the_completed_event_always_finds_the_parent(client):
    previous = None
    open_stream = None
    for turn in range(200):
        stream = client.responses.create(model="m", input=f"at once {turn}", previous_response_id=previous, stream=True)
        if open_stream is not None:
            open_stream.close()  # only now: the next one was asked for while its parent's stream was still open
        open_stream = stream
        previous = next(event.response.id for event in stream if event.type == "response.completed")
    open_stream.close()
    assert len(list(client.responses.input_items.list(previous, limit=100))) == 399


def test_a_chain_of_three_hundred_turns_costs_no_more_statements_than_a_short_one(new_server, servers, upstream, said):
    remembered = {"REPRISE_KEY_CACHE_S": "3600", "REPRISE_AGENT_CACHE_S": "3600"}
    quiet = {"REPRISE_WORKERS_IN_API": "false", "REPRISE_LEASE_S": "3600", **remembered}
    server = new_server(**quiet)  # nothing but what is counted
    log_statements(server)
    log = servers.data_dir / "embedded" / "log"

    with server.client() as client:

        def turn(number, previous, **more):
            return client.responses.create(
                model="m", input=f"{said} {number}", previous_response_id=previous, **more
            ).id

        def statements(previous, number, **more):
            """How many statements Postgres executes for one create."""
            begun = log.stat().st_size
            turn(number, previous, **more)
            with log.open("rb") as opened:
                opened.seek(begun)
                return re.findall(rb"LOG:  (?:execute [^:]+|statement):\s+(\w+)", opened.read())

        ids = [turn(0, None)]
        for number in range(1, 3):
            ids.append(turn(number, ids[-1]))
        short = statements(ids[1], "branch of a short one"), statements(ids[-1], "short, not stored", store=False)
        for number in range(3, 300):
            ids.append(turn(number, ids[-1]))
        long = statements(ids[150], "branch of a long one"), statements(ids[-1], "long, not stored", store=False)
        assert short == long
        assert 1 <= len(long[0]) <= 6
        assert len(long[1]) == 2, "the context is read, and the usage counted"
        turn("end", ids[-1])
        expected = [message for number in range(300) for message in exchange(f"{said} {number}")]
        assert asked(upstream, f"{said} end") == [*expected, user(f"{said} end")]


def log_statements(server):
    """From now on Postgres writes every statement of this server into its log."""
    name = fetch(server.database_url, "select current_database()")[0][0]
    fetch(server.database_url, f"alter database \"{name}\" set log_statement = 'all'")
    server.stop()
    server.start()  # it counts for new connections only
