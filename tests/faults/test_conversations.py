"""Conversations under faults: one writer at a time over all replicas, nothing appended twice, no lock outlives its process."""

import asyncio

import httpx
import openai
import pytest

from tests.faults.client import begin
from tests.faults.cluster import LEASE_S, locked
from tests.upstream import finish, gate, script, text
from tests.waiting import settled, until

WRITERS = 50
WAITS = "select from pg_locks where not granted and relation = 'conversations'::regclass"


@pytest.fixture
def client(cluster, official):
    """The official client of a replica."""
    return official.with_options(base_url=cluster.urls[0])


@pytest.fixture
def conversation(client):
    """An empty conversation's id."""
    return client.conversations.create().id


def texts(client, conversation):
    items = client.conversations.items.list(conversation, order="asc", limit=100)
    return [part.text for item in items for part in item.content]


async def write(urls, conversation, number):
    """The id of this writer's response; None if it found the conversation locked, as all must but one at a time."""
    async with httpx.AsyncClient(base_url=urls[number % 2], timeout=30) as http:
        create = {"model": "m", "input": f"writer {number}", "conversation": conversation}
        reply = await http.post("/responses", json={**create, "background": number % 3 == 0})
    made = reply.json()
    assert reply.status_code == 200 or made["error"]["code"] == "conversation_locked"
    return made.get("id")


def test_fifty_writers_on_two_replicas_append_one_after_the_other(cluster, client, conversation):
    async def all_at_once():
        return await asyncio.gather(*(write(cluster.urls, conversation, number) for number in range(WRITERS)))

    ids = [id for id in asyncio.run(all_at_once()) if id]
    for id in ids:
        cluster.ended(id)
    found = texts(client, conversation)
    questions = found[::2]
    assert found[1::2] == [f"ok: {question}" for question in questions]
    assert len(set(questions)) == len(questions) == len(ids) >= 1
    contexts = [len(client.responses.input_items.list(id, limit=100).data) for id in ids]
    assert sorted(contexts) == [2 * place + 1 for place in range(len(ids))]  # each was made from all before it


def test_items_added_at_once_are_all_there(cluster, client, conversation):
    async def add(number):
        async with httpx.AsyncClient(base_url=cluster.urls[number % 2], timeout=30) as http:
            items = [{"role": "user", "content": f"{number} {part}"} for part in range(3)]
            reply = await http.post(f"/conversations/{conversation}/items", json={"items": items})
            assert reply.status_code == 200, reply.text

    async def all_at_once():
        await asyncio.gather(*(add(number) for number in range(WRITERS)))

    asyncio.run(all_at_once())
    found = texts(client, conversation)
    heads = [one.split()[0] for one in found[::3]]
    assert sorted(map(int, heads)) == list(range(WRITERS))
    assert found == [f"{head} {part}" for head in heads for part in range(3)]


def test_a_killed_worker_keeps_the_conversation_locked_until_another_appends_once(
    cluster, upstream, client, conversation
):
    cluster.ensure(workers=2)
    said = script([text("so far"), gate("conversation append"), text(" and on"), finish()])
    id = begin(cluster.urls[0], said, conversation=conversation)
    upstream.wait_reached("conversation append", 20)
    cluster.kill_owner(id)
    with pytest.raises(openai.BadRequestError, match="currently operating on this conversation"):
        client.responses.create(model="m", input="me, too", conversation=conversation)
    upstream.open("conversation append")
    cluster.ended(id)
    assert len(upstream.asked(said)) == 2
    assert texts(client, conversation)[:1] == [said]
    assert "".join(texts(client, conversation)[1:]).endswith("so far and on")
    response = client.responses.create(model="m", input="after", conversation=conversation)
    assert response.output_text == "ok: after"
    assert len(texts(client, conversation)) == len(client.responses.input_items.list(response.id).data) + 1


def test_a_worker_killed_between_the_models_end_and_the_append(cluster, upstream, client, conversation):
    """The append is in the commit that ends the response: either both are there, or the next owner makes both."""
    cluster.ensure(workers=2)
    said = script([text("answer"), gate("conversation last"), finish()])
    id = begin(cluster.urls[0], said, conversation=conversation)
    upstream.wait_reached("conversation last", 20)
    owner = cluster.owner_of(id)
    with locked(cluster.database_url, "conversations"):
        upstream.open("conversation last")
        until(lambda: cluster.query(WAITS), "the commit waits")
        cluster.kill(owner)
    cluster.ended(id)
    assert texts(client, conversation)[0] == said
    assert texts(client, conversation)[-1].endswith("answer")
    kept = client.responses.retrieve(id)
    assert [part.text for item in kept.output for part in item.content] == texts(client, conversation)[1:]


def test_the_lock_of_a_killed_foreground_process_ends_with_its_lease(cluster, upstream, client, conversation):
    replica = cluster.start_replica()
    said = script([text("so far"), gate("conversation never"), finish()])
    with httpx.stream(
        "POST",
        f"{replica.url}/responses",
        json={"model": "m", "input": said, "conversation": conversation, "stream": True},
        timeout=20,
    ) as stream:
        assert stream.status_code == 200, stream.read()
        lines = stream.iter_lines()  # closed with the stream
        next(lines)
        upstream.wait_reached("conversation never", 20)
        with pytest.raises(openai.BadRequestError, match="currently operating on this conversation"):
            client.responses.create(model="m", input="me, too", conversation=conversation)
        cluster.kill(replica)
    upstream.open("conversation never")
    response = settled(
        lambda: client.responses.create(model="m", input="after", conversation=conversation),
        error=openai.BadRequestError,
        timeout_s=10 + 2 * LEASE_S,
    )
    assert response.output_text == "ok: after"
    assert texts(client, conversation) == ["after", "ok: after"]
