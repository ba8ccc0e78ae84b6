"""Conversations, chains, forks and deletions in any order: what is listed is what a plain list would hold, and nothing stays behind."""

import asyncio
import itertools
import json
import random

import msgspec
import pytest

from app.domain.lifecycle import Outcome, close_response, open_response
from app.errors import ConversationLocked, ConversationNotFound, ItemNotFound
from app.storage import contexts, conversations, endings, responses
from app.storage.contexts import ItemPage
from app.storage.conversations import StoredConversation
from app.storage.database import Tx
from app.storage.pages import BYTES_MAX
from app.storage.queue import Owner
from app.storage.usage import NO_CHARGE
from tests.unit.build import request

OWNER = Owner("worker", 60.0)
EVERYTHING = {"items_max": 10**6, "bytes_max": BYTES_MAX}


class House:
    """The tables of one tenant, and beside them plain lists of what they should hold."""

    def __init__(self, connection, tenant_id):
        self.connection, self.tx, self.tenant_id = connection, Tx(connection), tenant_id
        self.numbers = itertools.count()
        self.conversations: dict[str, list[str]] = {}
        self.responses: dict[str, tuple[list[str], list[str]]] = {}
        """Id → what it was made from, and its output."""
        self.begun: dict[str, list[str]] = {}
        self.instructions: dict[str, str | None] = {}

    def new(self, prefix):
        return f"{prefix}_{next(self.numbers)}"

    def new_items(self, count):
        ids = [self.new("msg") for _ in range(count)]
        return ids, [(id, item(id)) for id in ids]

    async def create(self, count):
        id, (ids, items) = self.new("conv"), self.new_items(count)
        await conversations.create_conversation(self.tx, self.tenant_id, StoredConversation(id, 0, "{}"), items)
        self.conversations[id] = ids
        return id

    async def append(self, id, count):
        ids, items = self.new_items(count)
        async with self.tx.transaction():
            await conversations.append_items(self.tx, self.tenant_id, id, items)
        self.conversations[id] = [*self.conversations[id], *ids]

    async def begin(self, *, conversation=None, previous=None, count=1):
        """A response that has begun."""
        ids, items = self.new_items(count)
        if conversation is not None:
            chain = await contexts.load_conversation(self.tx, self.tenant_id, conversation, **EVERYTHING)
        else:
            chain = await contexts.load_chain(self.tx, self.tenant_id, previous, **EVERYTHING)
        create = request(
            **({"conversation": conversation} if conversation is not None else {"previous_response_id": previous}),
            instructions=LONG[next(self.numbers) % 5 : 3_000],
        )
        response = open_response(create, id=self.new("resp"), created_at=0)
        self.instructions[response.id] = response.instructions
        earlier = [one.id for one in chain.items]
        assert chain.bytes == sum(len(item(one)) for one in earlier)
        async with self.tx.transaction():
            await responses.insert_response(
                self.tx, self.tenant_id, response, items, parent=chain.parent, earlier_bytes=chain.bytes, run=OWNER
            )
        self.begun[response.id] = [*earlier, *ids]
        return response

    async def end(self, response, status, count=1):
        context = self.begun.pop(response.id)
        ids, items = self.new_items(count)
        made = msgspec.structs.replace(response, output=[msgspec.Raw(body) for _, body in items])
        closed = close_response(made, Outcome(status), usage=None, now=1)
        assert await endings.end_foreground(self.tx, self.tenant_id, closed, NO_CHARGE)
        self.responses[response.id] = context, ids
        id = response.conversation and response.conversation.id
        if id in self.conversations and status in {"completed", "incomplete"}:
            self.conversations[id] = [*context, *ids]

    async def remove(self, id, item_id):
        async with self.tx.transaction():
            await conversations.remove_item(self.tx, self.tenant_id, id, item_id)
        self.conversations[id] = [one for one in self.conversations[id] if one != item_id]

    async def fork(self, id, after):
        fork = self.new("conv")
        async with self.tx.transaction():
            await conversations.fork_conversation(
                self.tx, self.tenant_id, id, StoredConversation(fork, 0, "{}"), after=after
            )
        items = self.conversations[id]
        self.conversations[fork] = items if after is None else items[: items.index(after) + 1]
        return fork

    async def delete(self, id):
        async with self.tx.transaction():
            await conversations.delete_conversation(self.tx, self.tenant_id, id)
        del self.conversations[id]

    async def delete_response(self, id):
        async with self.tx.transaction():
            await self.delete_response_within(id)

    async def delete_response_within(self, id):
        """In a transaction of the caller's."""
        await responses.delete_response(self.tx, self.tenant_id, id)
        del self.responses[id]

    async def listed(self, list_items, id, order="asc", limit=7):
        """Every item, page by page."""
        found, after = [], None
        while True:
            asked = ItemPage(after=after, limit=limit, order=order, page_bytes=BYTES_MAX)
            _, page = await list_items(self.tx, self.tenant_id, id, asked, BYTES_MAX)
            found += [one.id for one in page.rows]
            if not page.has_more:
                return found
            after = found[-1]

    async def check(self):
        """What the tables say is what the lists hold."""
        for id, items in self.conversations.items():
            assert await self.listed(contexts.list_conversation_items, id) == items
            assert await self.listed(contexts.list_conversation_items, id, "desc") == items[::-1]
        for id, (context, output) in self.responses.items():
            assert await self.listed(contexts.list_input_items, id) == context
            chain = await contexts.load_chain(self.tx, self.tenant_id, id, **EVERYTHING)
            assert [(one.id, one.body) for one in chain.items] == [
                (id, item(id).decode()) for id in (*context, *output)
            ]
            stored = await responses.get_response(self.tx, self.tenant_id, id)
            assert responses.response_of(stored).instructions == self.instructions.get(id)
        assert [*map(tuple, await self.connection.fetch(USES, self.tenant_id))] == []

    async def rows(self, table):
        return await self.connection.fetchval(f"select count(*) from {table} where tenant_id = $1", self.tenant_id)


LONG = "long " * 14_000

USES = """
with kept as (
    select part_hashes, thread_id, turn, -1 as position from responses where tenant_id = $1
    union all select part_hashes, thread_id, turn, position from items where tenant_id = $1
), used as (
    select part.hash, thread_id, turn, position from kept, hashes_of(part_hashes) part (hash)
), known as (
    select hash, thread_id, turn, position from part_uses where tenant_id = $1
)
(select * from used except select * from known) union all (select * from known except select * from used)
union all select hash, 'unused', 0, 0 from parts where tenant_id = $1 and hash not in (select hash from used)
"""
"""What Postgres has wrong of which rows use which parts."""


def item(id):
    """Every seventh has a text that is kept once; there are three such texts."""
    number = int(id.split("_")[1])
    content = LONG[number % 3 :] if number % 7 == 0 else str(number)
    return json.dumps({"type": "message", "id": id, "content": content}).encode()


TABLES = ("responses", "items", "branches", "conversations", "facets", "parts", "part_uses")
STEPS = "append answer fail chain remove remove fork fork_at delete delete_response delete_response create".split()


@pytest.mark.parametrize("seed", range(40))
async def test_any_history_is_what_plain_lists_hold_and_leaves_nothing(connection, seed):
    chosen = random.Random(seed)
    house = House(connection, f"tenant_{seed}")
    for _ in range(40):
        step = chosen.choice(STEPS)
        id = chosen.choice([*house.conversations]) if house.conversations else await house.create(chosen.randrange(3))
        items = house.conversations[id]
        previous = chosen.choice([*house.responses]) if house.responses else None
        match step:
            case "append":
                await house.append(id, chosen.randrange(1, 4))
            case "answer" | "fail":
                begun = await house.begin(conversation=id, count=chosen.randrange(3))
                ends = ["failed", "cancelled"] if step == "fail" else ["completed", "incomplete"]
                await house.end(begun, chosen.choice(ends), chosen.randrange(3))
            case "chain" if previous:
                await house.end(await house.begin(previous=previous), "completed")
            case "remove" if items:
                await house.remove(id, chosen.choice(items))
            case "fork":
                await house.fork(id, None)
            case "fork_at" if items:
                await house.fork(id, chosen.choice(items))
            case "delete":
                await house.delete(id)
            case "delete_response" if previous:
                await house.delete_response(previous)
            case "create":
                await house.create(chosen.randrange(4))
        await house.check()
    leaving = [(house.delete, id) for id in house.conversations]
    leaving += [(house.delete_response, id) for id in house.responses]
    chosen.shuffle(leaving)
    for leave, id in leaving:
        await leave(id)
        await house.check()
    left = {table: await house.rows(table) for table in TABLES}
    assert not any(left.values()), left
    assert await house.rows("removals") == 0


async def test_a_conversation_that_a_response_has_taken_is_locked(connection):
    house = House(connection, "locked")
    id = await house.create(2)
    begun = await house.begin(conversation=id)
    for refused in (house.append(id, 1), house.remove(id, house.conversations[id][0])):
        with pytest.raises(ConversationLocked):
            await refused
    await house.check()
    for in_flight, items in ((True, 2), (False, 0)):
        chain = await contexts.load_conversation(house.tx, house.tenant_id, id, **EVERYTHING, in_flight=in_flight)
        assert (chain.status, len(chain.items or [])) == ("in_progress", items)
    await house.end(begun, "completed")
    await house.append(id, 1)
    await house.check()


@pytest.mark.parametrize("change", ["append", "remove", "answer", "delete"])
async def test_a_response_is_not_inserted_into_a_conversation_that_has_changed(connection, change):
    house = House(connection, f"changed_{change}")
    id = await house.create(2)
    chain = await contexts.load_conversation(house.tx, house.tenant_id, id, **EVERYTHING)
    match change:
        case "append":
            await house.append(id, 1)
        case "remove":
            await house.remove(id, house.conversations[id][0])
        case "answer":
            await house.end(await house.begin(conversation=id), "failed")
        case "delete":
            await house.delete(id)
    response = open_response(request(conversation=id), id="resp_late", created_at=0)
    with pytest.raises(ConversationLocked):
        await responses.insert_response(
            house.tx, house.tenant_id, response, [], parent=chain.parent, earlier_bytes=0, run=OWNER
        )
    assert "resp_late" not in [row["id"] for row in await connection.fetch("select id from responses")]
    await house.check()


async def test_a_turn_whose_response_is_being_deleted_is_taken_after_it(connection, another, waits):
    house = House(connection, "taken")
    root = await house.begin(conversation=await house.create(0))
    await house.end(root, "completed")
    parent = await house.begin(previous=root.id)
    await house.end(parent, "completed")
    turn = await house.begin(previous=parent.id)
    await house.end(turn, "completed")
    deleting = connection.transaction()
    await deleting.start()
    await house.delete_response_within(turn.id)
    other = House(another, house.tenant_id)
    other.numbers, other.responses, other.instructions = house.numbers, house.responses, house.instructions
    inserting = asyncio.create_task(other.begin(previous=parent.id))
    await waits(connection, inserting)
    await deleting.commit()
    child = await inserting
    await other.end(child, "completed")
    await house.check()
    assert len(await connection.fetch("select from branches where tenant_id = $1", house.tenant_id)) == 1


async def test_two_that_delete_the_last_responses_at_once_leave_nothing(connection, another, waits):
    house = House(connection, "both")
    id = await house.create(0)
    first = await house.begin(conversation=id)
    await house.end(first, "completed")
    second = await house.begin(conversation=id)
    await house.end(second, "completed")
    await house.delete(id)
    deleting = connection.transaction()
    await deleting.start()
    await house.delete_response_within(first.id)
    other = House(another, house.tenant_id)
    other.responses = house.responses
    waiting = asyncio.create_task(other.delete_response(second.id))
    await waits(connection, waiting)
    await deleting.commit()
    await waiting
    assert await house.rows("items") == await house.rows("responses") == 0


async def test_a_response_whose_insert_is_repeated_is_known(connection):
    house = House(connection, "repeated")
    id = await house.create(1)
    chain = await contexts.load_conversation(house.tx, house.tenant_id, id, **EVERYTHING)
    response = open_response(request(conversation=id), id=house.new("resp"), created_at=0)
    for _ in range(2):
        await responses.insert_response(
            house.tx, house.tenant_id, response, [], parent=chain.parent, earlier_bytes=0, run=OWNER
        )
    house.begun[response.id] = house.conversations[id]
    await house.end(response, "completed")
    await house.check()


async def test_a_repeated_change_is_made_once(connection):
    """An attempt whose commit was not answered is repeated."""
    house = House(connection, "again")
    id = await house.create(0)
    _, items = house.new_items(2)
    for again in (False, True):
        async with house.tx.transaction():
            await conversations.append_items(house.tx, house.tenant_id, id, items, again=again)
    house.conversations[id] = [id for id, _ in items]
    await house.check()
    first = items[0][0]
    await house.remove(id, first)
    with pytest.raises(ItemNotFound):
        await conversations.remove_item(house.tx, house.tenant_id, id, first)
    await conversations.remove_item(house.tx, house.tenant_id, id, first, again=True)
    fork = StoredConversation(house.new("conv"), 0, "{}")
    for _ in range(2):
        await conversations.fork_conversation(house.tx, house.tenant_id, id, fork, after=None)
    house.conversations[fork.id] = house.conversations[id]
    await house.check()
    assert await house.rows("branches") == 1
    await house.delete(id)
    with pytest.raises(ConversationNotFound):
        await conversations.delete_conversation(house.tx, house.tenant_id, id)
    await conversations.delete_conversation(house.tx, house.tenant_id, id, again=True)
    await house.check()


async def test_a_fork_keeps_of_a_turn_no_more_than_it_has(connection):
    house = House(connection, "cut")
    id = await house.create(5)
    second = house.conversations[id][1]
    forks = [await house.fork(id, one) for one in (second, house.conversations[id][3])]
    await house.delete(id)
    for fork, kept in ((forks[1], 2), (forks[0], 0)):
        await house.delete(fork)
        await house.check()
        assert await house.rows("items") == kept


async def test_a_removed_item_that_nothing_has_leaves_nothing(connection):
    house = House(connection, "removed")
    id = await house.create(3)
    for item_id in house.conversations[id]:
        await house.remove(id, item_id)
    assert await house.rows("items") == await house.rows("removals") == 0
    await house.append(id, 1)
    await house.end(await house.begin(conversation=id), "completed")
    approving = house.conversations[id][-1]
    await connection.execute("insert into approvals values ($1, $2, true, 'resp')", house.tenant_id, approving)
    await house.remove(id, approving)
    assert await house.rows("removals") == await house.rows("approvals") == 1  # its response has it
    [response] = house.responses
    await house.delete_response(response)
    assert await house.rows("removals") == await house.rows("approvals") == 0
    await house.check()


async def test_a_long_chain_of_forks_is_deleted_with_one_advisory_lock(connection):
    """Postgres has room for a few thousand of them, for everyone together."""
    house = House(connection, "forks")
    ids = [await house.create(1)]
    for _ in range(20):
        ids.append(await house.fork(ids[-1], None))
    for id in ids[:-1]:
        await house.delete(id)
    async with connection.transaction():
        await conversations.delete_conversation(house.tx, house.tenant_id, ids[-1])
        assert await connection.fetchval("select count(*) from pg_locks where locktype = 'advisory'") == 1
    assert await house.rows("items") == await house.rows("branches") == 0
