"""The items of a response's context: what it continues, what is listed, what references stand for.

A context is a path of threads from the chain's root to the response; each thread on it belongs to it up to some turn.
"""

from collections.abc import Sequence

from msgspec import Struct
from sqlalchemy import text

from app.errors import InvalidParameter, InvalidRequest, PreviousResponseNotFound, ResponseNotFound
from app.storage.database import Query, Row, Tx, storable
from app.storage.pages import SHOWN, Page
from app.storage.tables import IN_FLIGHT, OUTPUT_POSITION
from app.wire.requests import Order


class Place(Struct, frozen=True):
    """Where a response stands: a turn of a thread."""

    thread_id: str
    turn: int


class StoredItem(Struct, frozen=True):
    """An item as it lies in its row; `turn` and `position` order it in its context."""

    id: str
    turn: int
    position: int
    body: str


class Chain(Struct, frozen=True):
    """What a new response continues: its parent's place and status, and every item up to it."""

    place: Place
    status: str
    bytes: int
    """What its items take as JSON."""
    items: list[StoredItem] | None
    """None where that is more than was asked for."""


_PATH = """
    with recursive target as (
        select thread_id, turn, status, background, context_bytes from responses
        where tenant_id = :tenant_id and id = :id and deleted_at is null
    ), path (thread_id, turn_max) as (
        select thread_id, turn from target
        union all
        select branch.parent_thread_id, branch.parent_turn
        from path cross join lateral (
            select parent_thread_id, parent_turn from branches
            where tenant_id = :tenant_id and thread_id = path.thread_id limit 1
        ) branch
    )
"""
"""`path`: the threads of a context, each with the last turn that belongs to it."""

_CHAIN = Query(
    text(
        _PATH
        + """
    , measured as (
        select coalesce(context_bytes, (
            select coalesce(sum(octet_length(cast(item.body as text))), 0) from path cross join lateral (
                select body from items
                where tenant_id = :tenant_id and thread_id = path.thread_id and turn <= path.turn_max
                order by turn, position
            ) item
        )) as bytes from target
    )
    select target.thread_id, target.turn as tip, target.status, measured.bytes,
           item.turn, item.position, item.id, item.body
    from target cross join measured cross join path
    left join lateral (  -- ordered, so that it stays a scan of the primary key for each thread, whatever the statistics say
        select turn, position, id, body from items
        where tenant_id = :tenant_id and thread_id = path.thread_id and turn <= path.turn_max
          and measured.bytes <= :bytes_max
        order by turn, position
    ) item on true
    order by item.turn, item.position
    limit :limit
    """
    )
)

_FIND_ITEMS = Query(
    text("""
    with found as materialized (
        select distinct on (id) id, body from items
        where tenant_id = :tenant_id and id = any(cast(:ids as text[]))
        order by id, thread_id desc, turn desc, position
    ), measured as (
        select coalesce(sum(octet_length(cast(body as text))), 0) as bytes from found
    )
    select measured.bytes, found.id, found.body from measured left join found on measured.bytes <= :bytes_max
    """)
)


def _page_of_context(order: Order) -> Query:
    """One page of a context; each thread on the path gives at most a page, so a page costs the same however long the chain. All
    of its items are measured: together they are no more than a context."""
    direction, beyond = ("desc", "<") if order == "desc" else ("asc", ">")
    return Query(
        text(
            _PATH
            + f"""
    , cursor as (
        select item.turn, item.position
        from (select thread_id, turn, position from items where tenant_id = :tenant_id and id = :after offset 0) item
        join path on item.thread_id = path.thread_id and item.turn <= path.turn_max
        cross join target
        where item.turn < target.turn or item.position < :output_position
        order by item.turn, item.position limit 1
    )
    , page as (
        select item.*, row_number() over walk as number, sum(octet_length(cast(item.body as text))) over walk as bytes
        from target cross join lateral (
            select one.* from path cross join lateral (
                select turn, position, id, body from items
                where tenant_id = :tenant_id and thread_id = path.thread_id and turn <= path.turn_max
                  and (turn < target.turn or position < :output_position)
                  and (:after = '' or (turn, position) {beyond} (select turn, position from cursor))
                order by turn {direction}, position {direction} limit cast(:limit as bigint) + 1
            ) one
            order by one.turn {direction}, one.position {direction} limit cast(:limit as bigint) + 1
        ) item
        where target.background or target.status not in {IN_FLIGHT}
        window walk as (order by item.turn {direction}, item.position {direction})
    ), {SHOWN}
    select (:after = '' or exists (select from cursor)) as found, whole.bytes,
           whole.last < (select count(*) from page) as has_more, shown.turn, shown.position, shown.id, shown.body
    from target cross join whole left join shown on whole.bytes <= :bytes_max
    where target.background or target.status not in {IN_FLIGHT}
    order by shown.number
    """
        ).bindparams(output_position=OUTPUT_POSITION)
    )


_PAGES = {"asc": _page_of_context("asc"), "desc": _page_of_context("desc")}


async def load_chain(tx: Tx, tenant_id: str, response_id: str, *, items_max: int, bytes_max: int) -> Chain:
    """The context for what continues a response, in one indexed read; without its items, if they take more bytes than
    `bytes_max`. Raises PreviousResponseNotFound, or InvalidRequest if it has more items than `items_max`."""
    if not storable(response_id):
        raise PreviousResponseNotFound(response_id)
    rows = await tx.all(_CHAIN, tenant_id=tenant_id, id=response_id, limit=items_max + 1, bytes_max=bytes_max)
    if not rows:
        raise PreviousResponseNotFound(response_id)
    if len(rows) > items_max:
        raise InvalidRequest(
            f"The context of response '{response_id}' has more than {items_max} items.",
            param="input",
            code="context_length_exceeded",
        )
    head = rows[0]
    size = int(head["bytes"])
    stored = [_stored_item(row) for row in rows if row["id"] is not None] if size <= bytes_max else None
    return Chain(Place(head["thread_id"], head["tip"]), head["status"], size, stored)


async def find_items(
    tx: Tx, tenant_id: str, ids: Sequence[str], *, bytes_max: int
) -> tuple[int, dict[str, str] | None]:
    """Stored items by id, as JSON; the newest where a client has resent one. Unknown ids are left out. First comes what they
    take; where that is more bytes than `bytes_max`, they don't come."""
    rows = await tx.all(_FIND_ITEMS, tenant_id=tenant_id, ids=[id for id in ids if storable(id)], bytes_max=bytes_max)
    size = int(rows[0]["bytes"])
    return size, {row["id"]: row["body"] for row in rows if row["id"] is not None} if size <= bytes_max else None


async def list_input_items(
    tx: Tx,
    tenant_id: str,
    response_id: str,
    *,
    after: str | None,
    limit: int,
    order: Order,
    page_bytes: int,
    bytes_max: int,
    param: str = "after",
) -> tuple[int, Page[StoredItem] | None]:
    """Up to `limit` items of a response's context (earlier inputs and outputs, and its own input) after the cursor, fewer if
    they take more than `page_bytes`. First come their bytes; where they are more than `bytes_max`, the page does not come.

    Raises NotFound for the response, InvalidParameter for the cursor, which the client has given as `param`.
    """
    if not storable(response_id + (after or "")):
        raise ResponseNotFound(response_id)
    rows = await tx.all(
        _PAGES[order],
        tenant_id=tenant_id,
        id=response_id,
        after=after or "",
        limit=limit,
        page_bytes=page_bytes,
        bytes_max=bytes_max,
    )
    if not rows:
        raise ResponseNotFound(response_id)
    if not rows[0]["found"]:
        raise InvalidParameter(f"Item with id '{after}' not found.", param=param)
    size = int(rows[0]["bytes"])
    if size > bytes_max:
        return size, None
    return size, Page([_stored_item(row) for row in rows if row["id"] is not None], rows[0]["has_more"])


def _stored_item(row: Row) -> StoredItem:
    return StoredItem(row["id"], row["turn"], row["position"], row["body"])
