"""The items of a context: what a response continues, what is listed, what references stand for.

A context is a path of threads from its root to a turn; each thread on it belongs to it up to some item. The turn is that of a response,
or the last one of a conversation.
"""

from collections.abc import Callable, Mapping, Sequence

from msgspec import Struct
from msgspec.structs import replace
from sqlalchemy import text

from app.domain import lifecycle
from app.errors import (
    ConversationNotFound,
    InvalidParameter,
    InvalidRequest,
    NotFound,
    PreviousResponseNotFound,
    ResponseNotFound,
)
from app.storage.database import Query, Row, Tx, storable
from app.storage.pages import SHOWN, Page
from app.storage.parts import size, whole
from app.storage.tables import IN_FLIGHT, LAST_POSITION, OUTPUT_POSITION
from app.wire.requests import Order


class Place(Struct, frozen=True):
    """A turn of a thread: where a response stands, or what a conversation points to."""

    thread_id: str
    turn: int


class Parent(Struct, frozen=True):
    """What a new turn continues."""

    place: Place
    must_branch: bool = False
    """Whether the thread's next turn is taken, or a conversation's."""
    conversation: "Slot | None" = None


class Slot(Struct, frozen=True):
    """The right to be a conversation's next turn, as long as nothing has changed it since it was read."""

    conversation_id: str
    writer: str | None
    """The response that took it last."""


class StoredItem(Struct, frozen=True):
    """An item as it lies in its row; `turn` and `position` order it in its context."""

    id: str
    turn: int
    position: int
    body: str


class Chain(Struct, frozen=True):
    """What a new response continues: its parent, that one's status, and every item up to it."""

    parent: Parent
    status: str
    """Of a conversation: that of its last writer."""
    bytes: int
    """What its items take as JSON."""
    items: list[StoredItem] | None
    """None where that is more than was asked for, or the status is not."""


_RESPONSE = f"""
    select thread_id, turn, cast({{position_max}} as int) as position_max, status, context_bytes,
           background or status not in {IN_FLIGHT} as is_visible,
           cast(null as text) as writer, conversation_id is not null as must_branch
    from responses where tenant_id = :tenant_id and id = :id and deleted_at is null
"""

CONVERSATION = f"""
    select thread_id, turn, cast({LAST_POSITION} as int) as position_max, coalesce((
               select status from responses response
               where response.tenant_id = :tenant_id and response.id = conversation.writer
           ), 'completed') as status, context_bytes, true as is_visible, writer,
           (  -- ordered, so that it stays a look into the index of places, whatever the statistics say
               select turn from responses response
               where response.tenant_id = :tenant_id and response.thread_id = conversation.thread_id
                 and response.turn > conversation.turn order by turn limit 1
           ) is not null as must_branch
    from conversations conversation
    where conversation.tenant_id = :tenant_id and id = :id
"""

_WITH_OUTPUT = _RESPONSE.format(position_max=LAST_POSITION)
_WITHOUT_OUTPUT = _RESPONSE.format(position_max=OUTPUT_POSITION - 1)


def path(target: str) -> str:
    """`path`: the threads of a context, each with the last item that belongs to it; and the items that are removed from it."""
    return f"""
    with recursive target as ({target}), path (thread_id, turn_max, position_max) as (
        select thread_id, turn, position_max from target
        union all
        select branch.parent_thread_id, branch.parent_turn, coalesce(branch.parent_position, {LAST_POSITION})
        from path cross join lateral (
            select parent_thread_id, parent_turn, parent_position from branches
            where tenant_id = :tenant_id and thread_id = path.thread_id limit 1
        ) branch
    ), removed as materialized (
        select removal.item_thread_id, removal.item_turn, removal.item_position
        from path cross join lateral (
            select item_thread_id, item_turn, item_position from removals
            where tenant_id = :tenant_id and thread_id = path.thread_id and turn <= path.turn_max
            order by turn
        ) removal
    )
"""


ON_PATH = """
    (turn, position) <= (path.turn_max, path.position_max)
    and (path.thread_id, turn, position) not in (select item_thread_id, item_turn, item_position from removed)
"""
"""The condition for an item of a thread on the path."""


def _chain(target: str) -> Query:
    return Query(
        text(f"""
    {path(target)}
    , measured as (
        select coalesce(context_bytes, (
            select coalesce(sum({size("item")}), 0) from path cross join lateral (
                select body, bytes from items
                where tenant_id = :tenant_id and thread_id = path.thread_id and {ON_PATH}
                order by turn, position
            ) item
        )) as bytes from target
    )
    select target.thread_id, target.turn as tip, target.status, target.writer, target.must_branch, measured.bytes,
           item.turn, item.position, item.id, {whole("item")} as body
    from target cross join measured cross join path
    left join lateral (  -- ordered, so that it stays a scan of the primary key for each thread, whatever the statistics say
        select turn, position, id, body, part_hashes from items
        where tenant_id = :tenant_id and thread_id = path.thread_id and {ON_PATH}
          and measured.bytes <= :bytes_max and (:in_flight or target.status not in {IN_FLIGHT})
        order by turn, position
    ) item on true
    order by item.turn, item.position
    limit :limit
    """)
    )


_CHAIN = _chain(_WITH_OUTPUT)
_CONVERSATION_CHAIN = _chain(CONVERSATION)

_FIND_ITEMS = Query(
    text(f"""
    with found as materialized (
        select distinct on (id) id, body, part_hashes, bytes from items
        where tenant_id = :tenant_id and id = any(cast(:ids as text[]))
        order by id, thread_id desc, turn desc, position
    ), measured as (
        select coalesce(sum({size("found")}), 0) as bytes from found
    )
    select measured.bytes, found.id, {whole("found")} as body from measured left join found on measured.bytes <= :bytes_max
    """)
)


def _page_of_context(target: str, order: Order) -> Query:
    """One page of a context; each thread on the path gives at most a page, so a page costs the same however long the chain. All
    of its items are measured: together they are no more than a context."""
    direction, beyond = ("desc", "<") if order == "desc" else ("asc", ">")
    return Query(
        text(f"""
    {path(target)}
    , cursor as (
        select item.turn, item.position
        from (select thread_id, turn, position from items where tenant_id = :tenant_id and id = :after offset 0) item
        join path on item.thread_id = path.thread_id and {ON_PATH}
        order by item.turn, item.position limit 1
    )
    , page as (
        select item.turn, item.position, item.id, item.body, item.part_hashes,
               row_number() over walk as number, sum({size("item")}) over walk as bytes
        from target cross join lateral (
            select one.* from path cross join lateral (
                select turn, position, id, body, part_hashes, bytes from items
                where tenant_id = :tenant_id and thread_id = path.thread_id and {ON_PATH}
                  and (:after = '' or (turn, position) {beyond} (select turn, position from cursor))
                order by turn {direction}, position {direction} limit cast(:limit as bigint) + 1
            ) one
            order by one.turn {direction}, one.position {direction} limit cast(:limit as bigint) + 1
        ) item
        where target.is_visible
        window walk as (order by item.turn {direction}, item.position {direction})
    ), {SHOWN}
    select (:after = '' or exists (select from cursor)) as found, whole.bytes,
           whole.last < (select count(*) from page) as has_more, shown.turn, shown.position, shown.id, {whole("shown")} as body
    from target cross join whole left join shown on whole.bytes <= :bytes_max
    where target.is_visible
    order by shown.number
    """)
    )


_INPUT_PAGES = {order: _page_of_context(_WITHOUT_OUTPUT, order) for order in ("asc", "desc")}
_CONVERSATION_PAGES = {order: _page_of_context(CONVERSATION, order) for order in ("asc", "desc")}


async def load_chain(
    tx: Tx, tenant_id: str, response_id: str, *, items_max: int, bytes_max: int, in_flight: bool = True
) -> Chain:
    """The context for what continues a response, in one indexed read; without its items, if they take more bytes than
    `bytes_max`, or if the response is still being made and `in_flight` is false. Raises PreviousResponseNotFound, or InvalidRequest
    if it has more items than `items_max`."""
    rows = await _rows_of_chain(tx, _CHAIN, tenant_id, response_id, items_max, bytes_max, in_flight)
    if not rows:
        raise PreviousResponseNotFound(response_id)
    return _read_chain(rows, f"response '{response_id}'", items_max, bytes_max, in_flight)


async def load_conversation(
    tx: Tx, tenant_id: str, conversation_id: str, *, items_max: int, bytes_max: int, in_flight: bool = True
) -> Chain:
    """The same for a conversation's next response, where its last writer is the one that may be in flight. Raises
    ConversationNotFound."""
    rows = await _rows_of_chain(tx, _CONVERSATION_CHAIN, tenant_id, conversation_id, items_max, bytes_max, in_flight)
    if not rows:
        raise ConversationNotFound(conversation_id, param="conversation")
    chain = _read_chain(rows, f"conversation '{conversation_id}'", items_max, bytes_max, in_flight)
    return replace(chain, parent=replace(chain.parent, conversation=Slot(conversation_id, rows[0]["writer"])))


async def _rows_of_chain(
    tx: Tx, query: Query, tenant_id: str, id: str, items_max: int, bytes_max: int, in_flight: bool
) -> list[Row]:
    if not storable(id):
        return []
    return await tx.all(
        query, tenant_id=tenant_id, id=id, limit=items_max + 1, bytes_max=bytes_max, in_flight=in_flight
    )


def _read_chain(rows: list[Row], whose: str, items_max: int, bytes_max: int, in_flight: bool) -> Chain:
    if len(rows) > items_max:
        raise InvalidRequest(
            f"The context of {whose} has more than {items_max} items.", param="input", code="context_length_exceeded"
        )
    head = rows[0]
    size = int(head["bytes"])
    is_read = size <= bytes_max and (in_flight or head["status"] not in lifecycle.IN_FLIGHT)
    stored = [_stored_item(row) for row in rows if row["id"] is not None] if is_read else None
    parent = Parent(Place(head["thread_id"], head["tip"]), head["must_branch"])
    return Chain(parent, head["status"], size, stored)


async def find_items(
    tx: Tx, tenant_id: str, ids: Sequence[str], *, bytes_max: int
) -> tuple[int, dict[str, str] | None]:
    """Stored items by id, as JSON; the newest where a client has resent one. Unknown ids are left out. First comes what they
    take; where that is more bytes than `bytes_max`, they don't come."""
    rows = await tx.all(_FIND_ITEMS, tenant_id=tenant_id, ids=[id for id in ids if storable(id)], bytes_max=bytes_max)
    size = int(rows[0]["bytes"])
    return size, {row["id"]: row["body"] for row in rows if row["id"] is not None} if size <= bytes_max else None


class ItemPage(Struct, frozen=True, kw_only=True):
    """Which items to list: up to `limit` of them after the cursor, fewer if they take more than `page_bytes`."""

    after: str | None
    limit: int
    order: Order
    page_bytes: int
    param: str = "after"
    """How the client has given the cursor."""


async def list_input_items(
    tx: Tx, tenant_id: str, response_id: str, page: ItemPage, bytes_max: int
) -> tuple[int, Page[StoredItem] | None]:
    """Items of a response's context: earlier inputs and outputs, and its own input. First come their bytes; where they are more than
    `bytes_max`, the page does not come. Raises ResponseNotFound, InvalidParameter for the cursor."""
    return await _list(tx, _INPUT_PAGES, ResponseNotFound, tenant_id, response_id, page, bytes_max)


async def list_conversation_items(
    tx: Tx, tenant_id: str, conversation_id: str, page: ItemPage, bytes_max: int
) -> tuple[int, Page[StoredItem] | None]:
    """The same for a conversation's items. Raises ConversationNotFound, InvalidParameter for the cursor."""
    return await _list(tx, _CONVERSATION_PAGES, ConversationNotFound, tenant_id, conversation_id, page, bytes_max)


async def _list(
    tx: Tx,
    queries: Mapping[str, Query],
    missing: Callable[[str], NotFound],
    tenant_id: str,
    id: str,
    page: ItemPage,
    bytes_max: int,
) -> tuple[int, Page[StoredItem] | None]:
    if not storable(id + (page.after or "")):
        raise missing(id)
    rows = await tx.all(
        queries[page.order],
        tenant_id=tenant_id,
        id=id,
        after=page.after or "",
        limit=page.limit,
        page_bytes=page.page_bytes,
        bytes_max=bytes_max,
    )
    if not rows:
        raise missing(id)
    if not rows[0]["found"]:
        raise InvalidParameter(f"Item with id '{page.after}' not found.", param=page.param)
    size = int(rows[0]["bytes"])
    if size > bytes_max:
        return size, None
    return size, Page([_stored_item(row) for row in rows if row["id"] is not None], rows[0]["has_more"])


def _stored_item(row: Row) -> StoredItem:
    return StoredItem(row["id"], row["turn"], row["position"], row["body"])
