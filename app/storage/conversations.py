"""Conversations: made, changed, read, listed, forked, deleted.

A conversation points to a turn of a thread (see tables.py). A run takes its slot with the insert of its response, and moves the pointer in
the commit that ends it; what a client adds or removes is a turn of its own, in one transaction.
"""

from collections.abc import Sequence
from typing import Any

from msgspec import Struct
from sqlalchemy import text

from app.domain.lifecycle import IN_FLIGHT
from app.errors import ConversationLocked, ConversationNotFound, InvalidParameter, InvalidRequest, ItemNotFound
from app.ids import new_id, seconds_of
from app.storage import threads
from app.storage.contexts import CONVERSATION, ON_PATH, Place, path
from app.storage.database import Query, Row, Tx, storable
from app.storage.facets import CONVERSATION as FACET
from app.storage.facets import facets, terms_of
from app.storage.items import INSERT, item_rows
from app.storage.pages import Page
from app.storage.parts import SharedParts, ctes, size, storing, whole
from app.wire.requests import Order
from app.wire.resources import encode


class StoredConversation(Struct, frozen=True):
    """A conversation's row."""

    id: str
    created_at: int
    metadata: str
    """JSON."""


NO_BODY = -1
"""As a bound: no item is that small."""

_BRANCH = """
    insert into branches (tenant_id, thread_id, parent_thread_id, parent_turn, parent_position)
    select :tenant_id, :thread_id, :parent_thread_id, :parent_turn, :parent_position
    where cast(:parent_thread_id as text) is not null
"""

_CREATE = Query(
    text(f"""
    with conversation as (
        insert into conversations (tenant_id, id, created_at, metadata, thread_id, turn, context_bytes)
        values (:tenant_id, :id, :created_at, cast(:metadata as jsonb), :thread_id, :turn, :own_bytes)
        on conflict do nothing  -- by an earlier attempt
        returning thread_id, turn
    ), {ctes({**storing("conversation"), "item": INSERT.format(place="conversation")})}
    select exists (select from conversation) as created
    """)
)

_GET = Query(
    text("select id, created_at, cast(metadata as text) from conversations where tenant_id = :tenant_id and id = :id")
)

_UPDATE = Query(
    text("""
    update conversations set metadata = cast(:metadata as jsonb) where tenant_id = :tenant_id and id = :id
    returning id, created_at, cast(metadata as text)
    """)
)

_DELETE = Query(text("delete from conversations where tenant_id = :tenant_id and id = :id returning thread_id"))

_LOCK = Query(text("select 1 from conversations where tenant_id = :tenant_id and id = :id for update"))

_TIP = Query(text(f"select thread_id, turn, status, must_branch from ({CONVERSATION}) conversation"))

_FIND = Query(
    text(f"""
    {path(CONVERSATION)}
    select item.thread_id, item.turn, item.position, item.id, item.size as bytes,
           case when item.size <= :bytes_max then {whole("item")} end as body
    from target left join lateral (
        select path.thread_id, item.turn, item.position, item.id, item.body, item.part_hashes, {size("item")} as size
        from (select thread_id, turn, position, id, body, part_hashes, bytes from items
              where tenant_id = :tenant_id and id = any(cast(:item_ids as text[])) offset 0) item
        join path on item.thread_id = path.thread_id and {ON_PATH}
        order by item.turn, item.position limit 1
    ) item on true
    """)
)

_APPEND = Query(
    text(f"""
    with place as (select cast(:thread_id as text) as thread_id, cast(:turn as int) as turn),
         {ctes({**storing("place"), "item": INSERT.format(place="place"), "branch": _BRANCH})}
    update conversations set thread_id = :thread_id, turn = :turn, context_bytes = context_bytes + cast(:own_bytes as bigint)
    where tenant_id = :tenant_id and id = :id returning 1
    """)
)

_REMOVE = Query(
    text(f"""
    with removal as (
        insert into removals (tenant_id, thread_id, turn, item_thread_id, item_turn, item_position)
        values (:tenant_id, :thread_id, :turn, :item_thread_id, :item_turn, :item_position)
    ), branch as ({_BRANCH})
    update conversations set thread_id = :thread_id, turn = :turn, context_bytes = context_bytes - cast(:bytes as bigint)
    where tenant_id = :tenant_id and id = :id
    returning id, created_at, cast(metadata as text)
    """)
)

_SOURCE = Query(
    text("""
    select thread_id, turn, context_bytes from conversations where tenant_id = :tenant_id and id = :id for key share
    """)
)

# What was removed before the item is removed from the fork, too, though its path ends before those turns.
_FORK = Query(
    text(f"""
    {path(CONVERSATION)}
    , conversation as (
        insert into conversations (tenant_id, id, created_at, metadata, thread_id, turn, context_bytes)
        values (:tenant_id, :fork_id, :created_at, cast(:metadata as jsonb), :thread_id, :parent_turn, :context_bytes)
        on conflict do nothing  -- by an earlier attempt
        returning 1
    ), branch as ({_BRANCH} and exists (select from conversation)), removal as (
        insert into removals (tenant_id, thread_id, turn, item_thread_id, item_turn, item_position)
        select distinct :tenant_id, :thread_id, cast(:parent_turn as int), item_thread_id, item_turn, item_position from removed
        where cast(:parent_position as int) is not null and exists (select from conversation)
    )
    select exists (select from conversation) as created
    """)
)


def _list(order: Order) -> Query:
    return Query(
        text(f"""
    select conversation.id, conversation.created_at, cast(conversation.metadata as text)
    from (select created_at, response_id as id from facets
          where tenant_id = :tenant_id and facet = :facet
            and (created_at, response_id) > (:from_time, :from_id) and (created_at, response_id) < (:to_time, :to_id)
          order by created_at {order}, response_id {order}) along
    cross join lateral (
        select id, created_at, metadata from conversations
        where tenant_id = :tenant_id and id = along.id and metadata @> cast(:metadata as jsonb) limit 1
    ) conversation
    order by along.created_at {order}, along.id {order} limit cast(:limit as bigint) + 1
    """)
    )


_LISTS: dict[Order, Query] = {"asc": _list("asc"), "desc": _list("desc")}


async def create_conversation(
    tx: Tx, tenant_id: str, made: StoredConversation, items: Sequence[tuple[str, bytes]]
) -> None:
    """Store a new conversation with its first items (id, JSON)."""
    place = {"thread_id": new_id("thread"), "turn": 1 if items else 0}
    await tx.one(
        _CREATE,
        tenant_id=tenant_id,
        id=made.id,
        created_at=made.created_at,
        metadata=made.metadata,
        **place,
        **_rows(items),
    )


async def get_conversation(tx: Tx, tenant_id: str, conversation_id: str) -> StoredConversation:
    """Raises ConversationNotFound."""
    return _stored(await _one(tx, _GET, tenant_id, conversation_id))


async def update_conversation(tx: Tx, tenant_id: str, conversation_id: str, metadata: str) -> StoredConversation:
    """Replace the metadata. Raises ConversationNotFound."""
    return _stored(await _one(tx, _UPDATE, tenant_id, conversation_id, metadata=metadata))


async def delete_conversation(tx: Tx, tenant_id: str, conversation_id: str, *, again: bool = False) -> None:
    """Delete a conversation. Its responses stay, with their contexts; so do its forks. What no response and no fork holds goes with it.

    Needs a transaction. `again` if an earlier attempt may have deleted it. Raises ConversationNotFound.
    """
    try:
        row = await _one(tx, _DELETE, tenant_id, conversation_id)
    except ConversationNotFound:
        if again:
            return
        raise
    await threads.purge(tx, tenant_id, row["thread_id"])


async def append_items(
    tx: Tx, tenant_id: str, conversation_id: str, items: Sequence[tuple[str, bytes]], *, again: bool = False
) -> None:
    """Append items (id, JSON). Needs a transaction. `again` if an earlier attempt may have appended them.

    Raises ConversationNotFound, ConversationLocked, InvalidRequest for an item that it has already.
    """
    await _one(tx, _LOCK, tenant_id, conversation_id)
    found = await _one(tx, _FIND, tenant_id, conversation_id, item_ids=[id for id, _ in items], bytes_max=NO_BODY)
    if found["id"] is not None:
        if again:
            return
        raise InvalidRequest(f"Item with id '{found['id']}' is in the conversation already.", param="items")
    binds = await _next_turn(tx, tenant_id, conversation_id)
    await tx.one(_APPEND, tenant_id=tenant_id, id=conversation_id, **binds, **_rows(items))


async def get_item(
    tx: Tx, tenant_id: str, conversation_id: str, item_id: str, *, bytes_max: int
) -> tuple[int, str | None]:
    """The size of an item in bytes, and its JSON, unless that is more than `bytes_max`. Raises ConversationNotFound, ItemNotFound."""
    found = await _find_item(tx, tenant_id, conversation_id, item_id, bytes_max=bytes_max)
    return found["bytes"], found["body"]


async def remove_item(
    tx: Tx, tenant_id: str, conversation_id: str, item_id: str, *, again: bool = False
) -> StoredConversation:
    """Remove an item. Responses and forks that have it keep it; if there are none, it is deleted.

    Needs a transaction. `again` if an earlier attempt may have removed it. Raises ConversationNotFound, ConversationLocked, ItemNotFound.
    """
    await _one(tx, _LOCK, tenant_id, conversation_id)
    try:
        found = await _find_item(tx, tenant_id, conversation_id, item_id)
    except ItemNotFound:
        if again:
            return await get_conversation(tx, tenant_id, conversation_id)
        raise
    binds = await _next_turn(tx, tenant_id, conversation_id)
    row = await tx.one(
        _REMOVE,
        tenant_id=tenant_id,
        id=conversation_id,
        item_thread_id=found["thread_id"],
        item_turn=found["turn"],
        item_position=found["position"],
        bytes=found["bytes"],
        **binds,
    )
    assert row
    await threads.forget(tx, tenant_id, binds["thread_id"], binds["turn"])
    return _stored(row)


async def fork_conversation(
    tx: Tx, tenant_id: str, conversation_id: str, fork: StoredConversation, *, after: str | None
) -> None:
    """Make a conversation that shares the items of another: all of them, or those up to the item `after`. Nothing is copied.

    Needs a transaction. Raises ConversationNotFound, InvalidParameter for the item.
    """
    source = await _one(tx, _SOURCE, tenant_id, conversation_id)
    parent = {"parent_thread_id": source["thread_id"], "parent_turn": source["turn"], "parent_position": None}
    if after is not None:
        try:
            item = await _find_item(tx, tenant_id, conversation_id, after)
        except ItemNotFound as error:
            raise InvalidParameter(error.message, param="after") from None
        parent = {
            "parent_thread_id": item["thread_id"],
            "parent_turn": item["turn"],
            "parent_position": item["position"],
        }
    await tx.one(
        _FORK,
        tenant_id=tenant_id,
        id=conversation_id,
        fork_id=fork.id,
        created_at=fork.created_at,
        metadata=fork.metadata,
        thread_id=new_id("thread"),
        context_bytes=source["context_bytes"] if after is None else None,
        **parent,
    )


async def list_conversations(
    tx: Tx, tenant_id: str, metadata: dict[str, str], *, after: str | None, limit: int, order: Order
) -> Page[StoredConversation]:
    """Up to `limit` conversations with these entries of metadata after the cursor, by creation. Raises InvalidParameter for the cursor."""
    begin, end = (-1, ""), (2**62, "")
    if after is not None:
        cursor = (await _created_at(tx, tenant_id, after), after)
        begin, end = (begin, cursor) if order == "desc" else (cursor, end)
    [facet] = facets(FACET, terms_of(None, metadata))
    rows = await tx.all(
        _LISTS[order],
        tenant_id=tenant_id,
        facet=facet,
        metadata=encode(metadata).decode(),
        limit=limit,
        **dict(zip(("from_time", "from_id", "to_time", "to_id"), (*begin, *end), strict=True)),
    )
    return Page([_stored(row) for row in rows[:limit]], len(rows) > limit)


async def _created_at(tx: Tx, tenant_id: str, id: str) -> int:
    """When a conversation was made, which may be deleted. Raises InvalidParameter if its id is none of ours."""
    try:
        return (await get_conversation(tx, tenant_id, id)).created_at
    except ConversationNotFound as error:
        seconds = seconds_of(id)
        if seconds is None:
            raise InvalidParameter(error.message, param="after") from None
        return seconds


async def _one(tx: Tx, query: Query, tenant_id: str, conversation_id: str, **binds: Any) -> Row:
    row = await tx.one(query, tenant_id=tenant_id, id=conversation_id, **binds) if storable(conversation_id) else None
    if row is None:
        raise ConversationNotFound(conversation_id)
    return row


async def _find_item(tx: Tx, tenant_id: str, conversation_id: str, item_id: str, *, bytes_max: int = NO_BODY) -> Row:
    ids = [item_id] if storable(item_id) else []
    found = await _one(tx, _FIND, tenant_id, conversation_id, item_ids=ids, bytes_max=bytes_max)
    if found["id"] is None:
        raise ItemNotFound(item_id)
    return found


async def _next_turn(tx: Tx, tenant_id: str, conversation_id: str) -> dict[str, Any]:
    """The binds of a locked conversation's next turn, and of its parent where that is a branch. Raises ConversationLocked."""
    # In a statement of its own: that of the lock has waited, and does not see what came meanwhile.
    tip = await _one(tx, _TIP, tenant_id, conversation_id)
    if tip["status"] in IN_FLIGHT:
        raise ConversationLocked
    place = Place(tip["thread_id"], tip["turn"])
    branches = tip["must_branch"]
    return {
        "thread_id": new_id("thread") if branches else place.thread_id,
        "turn": place.turn + 1,
        "parent_thread_id": place.thread_id if branches else None,
        "parent_turn": place.turn if branches else None,
        "parent_position": None,
    }


def _rows(items: Sequence[tuple[str, bytes]]) -> dict[str, Any]:
    """The binds of items that a client adds."""
    parts = SharedParts()
    return {**item_rows(items, (), parts), **parts.binds}


def _stored(row: Row) -> StoredConversation:
    return StoredConversation(row["id"], row["created_at"], row["metadata"])
