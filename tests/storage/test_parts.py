"""What rows share is kept once per tenant, and is freed with the last row that has it, whatever happens at the same time."""

import asyncio
import hashlib

import alembic.command
import asyncpg
import msgspec
import pytest

from app import migrate
from app.domain.lifecycle import Outcome, close_response, open_response
from app.errors import CompletionNotFound, PreviousResponseNotFound
from app.storage import completions, contexts, endings, responses, threads
from app.storage.database import Tx
from app.storage.pages import BYTES_MAX
from app.storage.queue import Owner
from app.storage.usage import NO_CHARGE
from app.wire.resources import encode
from tests.unit.build import request

OWNER = Owner("worker", 60.0)
LONG = "a long text, " * 6_000
IMAGE = {"type": "input_image", "image_url": "data:image/png;base64," + "A" * 100_000}


def message(id):
    return id, encode({"type": "message", "id": id, "role": "user", "content": [IMAGE]})


async def insert(connection, tenant_id, id, *, instructions=LONG, parent=None, run=OWNER, is_chat=False):
    response = open_response(request(instructions=instructions), id=id, created_at=0)
    await responses.insert_response(
        Tx(connection),
        tenant_id,
        response,
        [message(f"msg_{id}")],
        parent=parent,
        earlier_bytes=0,
        run=run,
        is_chat=is_chat,
    )
    return response


async def insert_part(connection, tenant_id, id, *, instructions):
    """A response with only one of the two parts."""
    response = open_response(request(instructions=LONG if instructions else None), id=id, created_at=0)
    items = [] if instructions else [message(f"msg_{id}")]
    await responses.insert_response(Tx(connection), tenant_id, response, items, parent=None, earlier_bytes=0, run=OWNER)
    return response


async def end(connection, tenant_id, response, *, output=True):
    """End it with an answer that is the image again."""
    made = msgspec.structs.replace(
        response, output=[msgspec.Raw(message(f"msg_out_{response.id}")[1])] if output else []
    )
    closed = close_response(made, Outcome("completed"), usage=None, now=1)
    assert await endings.end_foreground(Tx(connection), tenant_id, closed, NO_CHARGE)
    return closed


async def delete(connection, tenant_id, id):
    async with connection.transaction():
        await responses.delete_response(Tx(connection), tenant_id, id)


async def update(connection, tenant_id, id, metadata):
    async with connection.transaction():
        await completions.update_metadata(Tx(connection), tenant_id, id, metadata)


async def parts(connection, tenant_id):
    """How many parts it has, and how many uses of them."""
    counted = "select (select count(*) from parts where tenant_id = $1), (select count(*) from part_uses where tenant_id = $1)"
    return tuple(await connection.fetchrow(counted, tenant_id))


async def read(connection, tenant_id, id):
    stored = await responses.get_response(Tx(connection), tenant_id, id)
    return responses.response_of(stored)


async def test_rows_share_what_they_have_in_common_and_are_read_as_they_came(connection):
    made = [await end(connection, "t", await insert(connection, "t", f"resp_{n}")) for n in range(3)]
    assert await parts(connection, "t") == (2, 9)
    for closed in made:
        stored = await responses.get_response(Tx(connection), "t", closed.id)
        assert encode(responses.response_of(stored)) == encode(closed)
        chain = await contexts.load_chain(Tx(connection), "t", closed.id, items_max=9, bytes_max=BYTES_MAX)
        assert [one.body.encode() for one in chain.items] == [
            message(id)[1] for id in (f"msg_{closed.id}", f"msg_out_{closed.id}")
        ]
        assert chain.bytes == sum(len(one.body) for one in chain.items)
    size, found = await contexts.find_items(Tx(connection), "t", ["msg_resp_1"], bytes_max=BYTES_MAX)
    assert found == {"msg_resp_1": message("msg_resp_1")[1].decode()}
    assert size == len(found["msg_resp_1"])


async def test_another_tenant_has_a_copy_of_its_own(connection):
    for tenant_id in ("one", "other"):
        await end(connection, tenant_id, await insert(connection, tenant_id, "resp_1"))
    await delete(connection, "one", "resp_1")
    assert (await parts(connection, "one"), await parts(connection, "other")) == ((0, 0), (2, 3))
    assert (await read(connection, "other", "resp_1")).instructions == LONG


async def test_what_fails_to_be_inserted_leaves_no_parts(connection):
    await end(connection, "gone", await insert(connection, "gone", "resp_1"))
    chain = await contexts.load_chain(Tx(connection), "gone", "resp_1", items_max=9, bytes_max=BYTES_MAX)
    await delete(connection, "gone", "resp_1")
    response = open_response(request(instructions=LONG, previous_response_id="resp_1"), id="resp_2", created_at=0)
    with pytest.raises(PreviousResponseNotFound):
        await responses.insert_response(
            Tx(connection), "gone", response, [message("m")], parent=chain.parent, earlier_bytes=0, run=OWNER
        )
    assert await parts(connection, "gone") == (0, 0)


async def test_an_end_with_other_fields_uses_those(connection):
    response = await insert(connection, "changed", "resp_1")
    await end(connection, "changed", msgspec.structs.replace(response, instructions=LONG[1:]))
    assert (await read(connection, "changed", "resp_1")).instructions == LONG[1:]
    assert await parts(connection, "changed") == (2, 3)
    await delete(connection, "changed", "resp_1")
    assert await parts(connection, "changed") == (0, 0)


WHOLE = "update responses set part_hashes = null, bytes = null, body = cast($2 as json) where tenant_id = $1"


@pytest.mark.parametrize("is_whole", [False, True], ids=["cut", "stored whole"])
async def test_other_metadata_leaves_a_completion_as_it_was_and_its_parts_used_once(connection, is_whole):
    tenant_id = f"metadata {is_whole}"
    closed = await end(connection, tenant_id, await insert(connection, tenant_id, "resp_1", is_chat=True))
    if is_whole:  # as the version before has stored it
        await connection.execute(WHOLE, tenant_id, encode(msgspec.structs.replace(closed, output=[])).decode())
        assert await parts(connection, tenant_id) == (1, 2)
    for metadata in ({"a": "1"}, {"b": "2"}):
        await update(connection, tenant_id, "chatcmpl-1", metadata)
        updated = msgspec.structs.replace(closed, metadata=metadata)
        assert encode(await read(connection, tenant_id, "resp_1")) == encode(updated)
        assert await parts(connection, tenant_id) == (2, 3)
    await delete(connection, tenant_id, "resp_1")
    assert await parts(connection, tenant_id) == (0, 0)


async def test_metadata_of_a_completion_that_is_deleted_meanwhile_waits_and_finds_it_gone(connection, another, waits):
    await end(connection, "late", await insert(connection, "late", "resp_1", is_chat=True))
    deleting = connection.transaction()
    await deleting.start()
    await completions.delete(Tx(connection), "late", "chatcmpl-1")
    updating = asyncio.create_task(update(another, "late", "chatcmpl-1", {"a": "1"}))
    await waits(connection, updating)
    await deleting.commit()
    with pytest.raises(CompletionNotFound):
        await updating
    assert await parts(connection, "late") == (0, 0)


async def test_two_that_delete_the_last_users_at_once_free_it(connection, another, waits):
    for id in ("resp_1", "resp_2"):
        await end(connection, "both", await insert(connection, "both", id))
    deleting = connection.transaction()
    await deleting.start()
    await responses.delete_response(Tx(connection), "both", "resp_1")
    waiting = asyncio.create_task(delete(another, "both", "resp_2"))
    await waits(connection, waiting)
    await deleting.commit()
    await waiting
    assert await parts(connection, "both") == (0, 0)


async def test_what_is_inserted_while_its_parts_are_deleted_has_them(connection, another, waits):
    await end(connection, "again", await insert(connection, "again", "resp_1"))
    deleting = connection.transaction()
    await deleting.start()
    await responses.delete_response(Tx(connection), "again", "resp_1")
    inserting = asyncio.create_task(insert(another, "again", "resp_2"))
    await waits(connection, inserting)
    await deleting.commit()
    await end(connection, "again", await inserting)
    assert (await read(connection, "again", "resp_2")).instructions == LONG
    assert await parts(connection, "again") == (2, 3)


async def test_what_is_deleted_while_another_begins_to_use_its_parts_leaves_them(connection, another, waits):
    await end(connection, "kept", await insert(connection, "kept", "resp_1"))
    inserting = another.transaction()
    await inserting.start()
    response = await insert(another, "kept", "resp_2")
    deleting = asyncio.create_task(delete(connection, "kept", "resp_1"))
    await waits(another, deleting)
    await inserting.commit()
    await deleting
    await end(connection, "kept", response)
    assert (await read(connection, "kept", "resp_2")).instructions == LONG
    assert await parts(connection, "kept") == (2, 3)


async def test_a_part_that_others_store_and_free_meanwhile_is_there(connection, another, url, waits):
    """Ours begins before another's is committed, and waits for a second part while a third client deletes that one."""
    lock_order = sorted([encode(LONG), encode(IMAGE["image_url"])], key=lambda part: hashlib.sha256(part).digest())
    instructions_first = lock_order[0] == encode(LONG)
    first, second = await asyncpg.connect(url), await asyncpg.connect(url)
    of_first, of_second = first.transaction(), second.transaction()
    await of_first.start()
    await of_second.start()
    made = await insert_part(first, "meanwhile", "resp_first", instructions=instructions_first)
    await insert_part(second, "meanwhile", "resp_second", instructions=not instructions_first)
    inserting = asyncio.create_task(insert(connection, "meanwhile", "resp_1"))
    await waits(another, inserting)
    await end(first, "meanwhile", made, output=False)
    await of_first.commit()
    deleting = asyncio.create_task(delete(another, "meanwhile", "resp_first"))
    await asyncio.wait([deleting], timeout=0.5)  # done at once without a lock of ours
    await of_second.commit()
    await end(connection, "meanwhile", await inserting)
    await deleting
    assert (await read(connection, "meanwhile", "resp_1")).instructions == LONG
    await first.close()
    await second.close()


async def test_a_branch_and_its_parent_that_are_deleted_at_once_do_not_wait_crosswise(connection, another, waits):
    """They share instructions, and the purge of the branch continues with the thread of its parent."""
    root = await end(connection, "crosswise", await insert(connection, "crosswise", "resp_root"))
    for id in ("resp_tip", "resp_branch"):
        chain = await contexts.load_chain(Tx(connection), "crosswise", root.id, items_max=9, bytes_max=BYTES_MAX)
        await end(connection, "crosswise", await insert(connection, "crosswise", id, parent=chain.parent))
    await delete(connection, "crosswise", root.id)
    deleting = connection.transaction()
    await deleting.start()
    thread_id = await connection.fetchval("select thread_id from responses where tenant_id = 'crosswise' and turn = 1")
    await Tx(connection).one(threads._LOCK, tenant_id="crosswise", thread_id=thread_id)
    waiting = asyncio.create_task(delete(another, "crosswise", "resp_branch"))
    await waits(connection, waiting)
    await responses.delete_response(Tx(connection), "crosswise", "resp_tip")
    await deleting.commit()
    await waiting
    assert await parts(connection, "crosswise") == (0, 0)


async def test_many_that_come_and_go_at_once_keep_what_they_use(url):
    """With the same parts, of which each may be the last user at any time."""
    connections = [await asyncpg.connect(url) for _ in range(8)]

    async def come_and_go(at, connection):
        for number in range(15):
            id = f"resp_{at}_{number}"
            closed = await end(
                connection, "many", await insert(connection, "many", id, instructions=LONG[number % 2 :])
            )
            assert encode(await read(connection, "many", id)) == encode(closed)
            await delete(connection, "many", id)

    await asyncio.gather(*(come_and_go(*one) for one in enumerate(connections)))
    assert await parts(connections[0], "many") == (0, 0)
    for connection in connections:
        await connection.close()


@pytest.fixture
def own_url(new_database):
    """A database whose schema may change."""
    return new_database()


async def test_the_version_before_finds_whole_bodies(own_url):
    connection = await asyncpg.connect(own_url)
    closed = await end(connection, "t", await insert(connection, "t", "resp_1"))
    for id in ("resp_1", "resp_whole"):
        await connection.execute("insert into event_archive (tenant_id, response_id, frames) values ('t', $1, '')", id)
    await asyncio.to_thread(alembic.command.downgrade, migrate.config(own_url), "0014")
    body = await connection.fetchval("select body from responses where tenant_id = 't'")
    assert body.encode() == encode(msgspec.structs.replace(closed, output=[]))
    bodies = [row["body"].encode() for row in await connection.fetch("select body from items order by position")]
    assert bodies == [message(id)[1] for id in ("msg_resp_1", "msg_out_resp_1")]
    archived = await connection.fetch("select response_id from event_archive")
    assert [row["response_id"] for row in archived] == ["resp_whole"]  # the other is compressed with the parts
    await asyncio.to_thread(alembic.command.upgrade, migrate.config(own_url), "head")
    assert encode(await read(connection, "t", "resp_1")) == encode(closed)
    await connection.close()
