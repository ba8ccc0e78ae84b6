"""Responses: written, read, listed, deleted.

A row is inserted in any status: a foreground response that nothing refers to before its end is inserted finished. The others are
ended by storage/endings.py, once.
"""

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct
from sqlalchemy import text

from app.errors import (
    ConversationLocked,
    InvalidParameter,
    InvalidRequest,
    PreviousResponseNotFound,
    ResponseNotFound,
)
from app.ids import new_id, seconds_of
from app.offload import offload
from app.storage import threads, usage
from app.storage.contexts import Parent, Place
from app.storage.database import Query, Row, Tx, storable
from app.storage.facets import STATUSES, facets, terms_of
from app.storage.items import INSERT, item_rows
from app.storage.pages import BYTES_MAX, SHOWN, Page
from app.storage.parts import SharedParts, ctes, repeated, size, whole, with_and_without
from app.storage.queue import Owner, Queued
from app.storage.tables import IN_FLIGHT, OUTPUT_POSITION
from app.storage.usage import NO_CHARGE, Charge
from app.wire.decoding import decode_stored
from app.wire.requests import Order
from app.wire.resources import Response, encode


class Stored(Struct, frozen=True):
    """A response row with its output items."""

    status: str
    body: str
    output: list[str]


# -- Writing ----------------------------------------------------------------------------------------------------------------


def _insert(parts: dict[str, str]) -> Query:
    return Query(
        text(f"""
    with parent as (
        select 1 from responses
        where tenant_id = :tenant_id and id = :previous_response_id and deleted_at is null
        for key share  -- a parent that is being deleted is either gone for us, or waits and then finds its child
    ), conversation as (
        update conversations set writer = :id
        where tenant_id = :tenant_id and id = :conversation_id and thread_id = :from_thread_id and turn = :from_turn
          and (writer is not distinct from :writer or writer = :id)  -- that of an earlier attempt
        returning 1
    ), response as (
        insert into responses (tenant_id, id, thread_id, turn, previous_response_id, conversation_id, status, background,
                               is_chat, model, metadata, created_at, body, part_hashes, bytes, context_bytes)
        select :tenant_id, :id, :thread_id, :turn, :previous_response_id, :conversation_id, :status, :background,
               cast(:is_chat as boolean), :model,
               cast(:metadata as jsonb), :created_at, cast(:body as json), :part_hashes, :bytes,
               cast(:earlier_bytes as bigint) + cast(:own_bytes as bigint)
        where (cast(:previous_response_id as text) is null or exists (select from parent))
          and (cast(:conversation_id as text) is null or exists (select from conversation))
        on conflict do nothing
        returning thread_id, turn
    ), {ctes({**parts, "item": INSERT.format(place="response")})}, branch as (
        insert into branches (tenant_id, thread_id, parent_thread_id, parent_turn)
        select :tenant_id, :thread_id, :parent_thread_id, :parent_turn
        where cast(:parent_thread_id as text) is not null and exists (select from response)
    ), run as (
        insert into runs (tenant_id, response_id, state, due_at, lease_s, lease, worker, request, secrets, streamed,
                          number_ceiling, key_id, reserved_tokens)
        select :tenant_id, :id, :run_state, clock_timestamp() + cast(:lease_s as float8) * interval '1 second', :lease_s,
               :epoch, :worker, cast(:request as json), :secrets, :streamed, 0, :key_id, cast(:reserved_tokens as bigint)
        where cast(:run_state as text) is not null and exists (select from response)
    ), journal as (
        insert into event_journal (tenant_id, response_id, first_number, frames)
        select :tenant_id, :id, 0, :frames
        where cast(:frames as bytea) is not null and exists (select from response)
    ), usage as ({usage.OF_RESPONSE})
    select exists (select from response) as inserted,
           exists (select from responses where tenant_id = :tenant_id and id = :id) as known  -- by an earlier attempt
    """)
    )


_INSERT = with_and_without(_insert, "response")


async def insert_response(
    tx: Tx,
    tenant_id: str,
    response: Response,
    input_items: Sequence[tuple[str, bytes]],
    *,
    parent: Parent | None,
    earlier_bytes: int,
    run: Owner | Queued | None,
    is_chat: bool = False,
    charge: Charge = NO_CHARGE,
) -> None:
    """Store a response with its input items (id, JSON) and, if it is finished, its output. `earlier_bytes` is what the items
    of its parent's context take.

    It takes the next turn of its parent's thread, or a new thread when another response has that turn; and the slot of its
    conversation. `run` is given for a response that is still to be made: by us, or by a worker that claims it. One that has ended
    is counted. Raises PreviousResponseNotFound for a deleted parent, ConversationLocked if the conversation has changed.
    """
    slot = parent.conversation if parent else None
    binds = {
        "tenant_id": tenant_id,
        "previous_response_id": response.previous_response_id if parent else None,
        "conversation_id": slot.conversation_id if slot else None,
        "from_thread_id": parent.place.thread_id if parent else None,
        "from_turn": parent.place.turn if parent else None,
        "writer": slot.writer if slot else None,
        "background": response.background,
        "is_chat": is_chat or None,
        "model": response.model,
        "metadata": encode(response.metadata).decode(),
        "created_at": response.created_at,
        "earlier_bytes": earlier_bytes,
        **_run(run),
        **await usage.binds(response, charge),
        "id": response.id,
        "status": response.status,
        **await rows_of(response, input_items),
    }
    if parent is None:
        await _insert_at(tx, Place(new_id("thread"), 1), None, binds)
        return
    turn = parent.place.turn + 1
    if not parent.must_branch and await _insert_at(tx, Place(parent.place.thread_id, turn), None, binds):
        return
    # Its turn is taken, or its parent is gone: as a branch it fails only for the second reason.
    if not await _insert_at(tx, Place(new_id("thread"), turn), parent.place, binds):
        raise ConversationLocked if slot else PreviousResponseNotFound(str(response.previous_response_id))


async def rows_of(response: Response, input_items: Sequence[tuple[str, bytes]]) -> dict[str, Any]:
    """The binds of a response's body, its items, and the parts of these that are kept once."""
    encoded = encode(msgspec.structs.replace(response, output=[]))
    lengths = [
        len(encoded),
        *(len(body) for _, body in input_items),
        *(memoryview(raw).nbytes for raw in response.output),
    ]
    return await offload(sum(lengths), _rows_of, response, encoded, input_items)


def _rows_of(response: Response, encoded: bytes, input_items: Sequence[tuple[str, bytes]]) -> dict[str, Any]:
    parts = SharedParts()
    body = parts.take(encoded, repeated(response))
    items = item_rows(input_items, response.output, parts)
    return {"body": body.text, "part_hashes": body.part_hashes, "bytes": body.bytes, **items, **parts.binds}


def _run(run: Owner | Queued | None) -> dict[str, Any]:
    """The binds of the run's row."""
    queued = run if isinstance(run, Queued) else None
    owner = run if isinstance(run, Owner) else None
    return {
        "run_state": "queued" if queued else "running" if owner else None,
        "epoch": 1 if owner else 0,
        "lease_s": owner.lease_s if owner else 0.0,
        "worker": owner.worker if owner else None,
        "request": queued.request.decode() if queued else None,
        "secrets": queued.secrets if queued else None,
        "streamed": bool(queued and queued.streamed),
        "frames": queued.frames if queued else None,
        "reserved_tokens": queued.reserved_tokens if queued else None,
    }


async def _insert_at(tx: Tx, place: Place, parent: Place | None, binds: dict[str, Any]) -> bool:
    row = await tx.one(
        _INSERT[bool(binds["stored_hashes"])],
        thread_id=place.thread_id,
        turn=place.turn,
        parent_thread_id=parent.thread_id if parent else None,
        parent_turn=parent.turn if parent else None,
        **binds,
    )
    return row is not None and bool(row["inserted"] or row["known"])


_BEGIN = Query(
    text("""
    with run as (
        update runs set redis_run = :stream_token
        where tenant_id = :tenant_id and response_id = :id and lease = :epoch and state = 'running' returning 1
    ), response as (
        update responses set status = 'in_progress'
        where tenant_id = :tenant_id and id = :id and status = 'queued' and exists (select from run)
    )
    select exists (select from run) as ours
    """)
)


async def begin_response(tx: Tx, tenant_id: str, response_id: str, epoch: int, stream_token: str | None) -> bool:
    """Set a queued response in progress; its events go to the stream with this token. False if the lease is lost."""
    row = await tx.one(_BEGIN, tenant_id=tenant_id, id=response_id, epoch=epoch, stream_token=stream_token)
    return row is not None and bool(row["ours"])


# -- Reading ----------------------------------------------------------------------------------------------------------------

_OUTPUT_OF = f"""
    array(
        select {whole("item")} from items item
        where item.tenant_id = :tenant_id and item.thread_id = {{0}}.thread_id and item.turn = {{0}}.turn
          and item.position >= :output_position
        order by item.position
    )
"""

_GET = Query(
    text(f"""
    select status, measured.bytes, case when measured.bytes <= :bytes_max then {whole("response")} end as body,
           case when measured.bytes <= :bytes_max then output end as output
    from responses response cross join lateral (
        select {_OUTPUT_OF.format("response")} as output offset 0  -- so that it is read once
    ) made cross join lateral (
        select cast({size("response")} + pg_column_size(made.output) as bigint) as bytes offset 0
    ) measured
    where tenant_id = :tenant_id and id = :id and deleted_at is null
      and (background or status not in {IN_FLIGHT})
    """).bindparams(output_position=OUTPUT_POSITION)
)


def _list_of_responses(order: Order, ranges: int) -> Query:
    """A list along so many facets. Each range is read in its order, and only as far as the page goes; and of the responses
    themselves, which may be large, no more than its bytes."""
    walk = f"order by created_at {order}, response_id {order}"
    one = """
        (select created_at, response_id from facets
         where tenant_id = :tenant_id and facet = :facet_{number}
           and (created_at, response_id) > (:from_time, :from_id) and (created_at, response_id) < (:to_time, :to_id)
         {walk})
    """
    every = "union all".join(one.format(number=number, walk=walk) for number in range(ranges))
    return Query(
        text(f"""
    with recursive listed as materialized (
        select row_number() over ({walk}) as number, id, status, body, part_hashes, bytes, thread_id, turn from (
            select created_at, response_id, response.*
            from (select created_at, response_id from ({every}) one {walk}) along cross join lateral (
                select id, status, body, part_hashes, bytes, thread_id, turn from responses
                where tenant_id = :tenant_id and id = along.response_id
                  and (cast(:model as text) is null or model = :model) and metadata @> cast(:metadata as jsonb)
                limit 1
            ) response
            {walk} limit cast(:limit as bigint) + 1
        ) one
    ), page as (
        select cast(0 as bigint) as number, cast(0 as bigint) as bytes, cast(null as text) as id, cast(null as text) as status,
               cast(null as json) as body, cast(null as bytea) as part_hashes, cast(null as text[]) as output
        union all
        select next.number, page.bytes + {size("next")} + pg_column_size(made.output),
               next.id, next.status, next.body, next.part_hashes, made.output
        from page
        cross join lateral (select * from listed where number = page.number + 1 limit 1) next
        cross join lateral (select {_OUTPUT_OF.format("next")} as output offset 0) made
        where page.bytes <= :page_bytes
    ), {SHOWN}
    select whole.bytes, whole.last < (select count(*) from listed) as has_more, shown.id, status, {whole("shown")} as body, output
    from whole left join shown on whole.bytes <= :bytes_max
    order by shown.number
    """).bindparams(output_position=OUTPUT_POSITION)
    )


_LISTS = {
    (order, ranges): _list_of_responses(order, ranges) for order in ("asc", "desc") for ranges in (1, len(STATUSES))
}

_CREATED_AT = Query(text("select created_at from responses where tenant_id = :tenant_id and id = :id"))


async def get_response(tx: Tx, tenant_id: str, response_id: str) -> Stored:
    """A response that is finished, or made in the background. Raises NotFound."""
    _, stored = await find_response(tx, tenant_id, response_id, bytes_max=BYTES_MAX)
    assert stored
    return stored


async def find_response(tx: Tx, tenant_id: str, response_id: str, *, bytes_max: int) -> tuple[int, Stored | None]:
    """The size of the same response in bytes, and the response, unless that is more than `bytes_max`. Raises NotFound."""
    row = (
        await tx.one(_GET, tenant_id=tenant_id, id=response_id, bytes_max=bytes_max) if storable(response_id) else None
    )
    if row is None:
        raise ResponseNotFound(response_id)
    return row["bytes"], _stored(row) if row["bytes"] <= bytes_max else None


def _stored(row: Row) -> Stored:
    return Stored(row["status"], row["body"], row["output"])


class Filter(Struct, kw_only=True, frozen=True):
    """Which responses to list; times are unix seconds, both ends included. In place of a status CHAT lists chat completions."""

    model: str | None = None
    status: str | None = None
    metadata: dict[str, str] = {}
    created_after: int = 0
    created_before: int = 2**62


async def list_responses(
    tx: Tx,
    tenant_id: str,
    filter: Filter,
    *,
    after: str | None,
    limit: int,
    order: Order,
    page_bytes: int,
    bytes_max: int,
) -> tuple[int, Page[tuple[str, Stored]] | None]:
    """Up to `limit` responses with their ids after the cursor, by creation, fewer if they take more than `page_bytes`. First
    come their bytes; where they are more than `bytes_max`, the page does not come. Raises InvalidParameter for the cursor."""
    begin, end = (filter.created_after, ""), (filter.created_before + 1, "")  # every id is greater than the empty one
    if after is not None:
        cursor = (await _created_at(tx, tenant_id, after), after)
        begin, end = (begin, min(end, cursor)) if order == "desc" else (max(begin, cursor), end)
    along = facets(filter.status, terms_of(filter.model, filter.metadata))
    rows = await tx.all(
        _LISTS[order, len(along)],
        tenant_id=tenant_id,
        limit=limit,
        page_bytes=page_bytes,
        bytes_max=bytes_max,
        model=filter.model,
        metadata=encode(filter.metadata).decode(),
        **{f"facet_{number}": facet for number, facet in enumerate(along)},
        **dict(zip(("from_time", "from_id", "to_time", "to_id"), (*begin, *end), strict=True)),
    )
    size = rows[0]["bytes"]
    if size > bytes_max:
        return size, None
    return size, Page([(row["id"], _stored(row)) for row in rows if row["id"] is not None], rows[0]["has_more"])


async def _created_at(tx: Tx, tenant_id: str, id: str) -> int:
    """When a response was made, which may be deleted. Raises InvalidParameter if its id is none of ours."""
    row = await tx.one(_CREATED_AT, tenant_id=tenant_id, id=id) if storable(id) else None
    seconds = row["created_at"] if row else seconds_of(id)
    if seconds is None:
        raise InvalidParameter(f"Response with id '{id}' not found.", param="after")
    return int(seconds)


_BODY = Query(
    text(f"select {whole('response')} as body from responses response where tenant_id = :tenant_id and id = :id")
)


async def load_body(tx: Tx, tenant_id: str, response_id: str) -> Response | None:
    """The response as its run began or ended, without output; None if there is no such row."""
    row = await tx.one(_BODY, tenant_id=tenant_id, id=response_id)
    return decode_stored(_RESPONSE, row["body"]) if row else None


# -- Deleting ---------------------------------------------------------------------------------------------------------------

_LOCK = Query(
    text(f"""
    select thread_id, deleted_at is not null as deleted, status in {IN_FLIGHT} as in_flight
    from responses
    where tenant_id = :tenant_id and id = :id and (background or status not in {IN_FLIGHT})
    for update
    """)
)

_TOMBSTONE = Query(
    text("""
    with archive as (
        delete from event_archive where tenant_id = :tenant_id and response_id = :id
    )
    update responses set deleted_at = now() where tenant_id = :tenant_id and id = :id returning 1
    """)
)

_WITHDRAW = Query(
    text("""
    with run as (
        delete from runs where tenant_id = :tenant_id and response_id = :id and lease = :epoch and state = 'running'
        returning 1
    )
    update responses set deleted_at = now()
    where tenant_id = :tenant_id and id = :id and status = 'in_progress' and exists (select from run)
    returning thread_id
    """)
)


async def withdraw_response(tx: Tx, tenant_id: str, response_id: str, epoch: int) -> None:
    """Take back a response that no client knows, as if it had never been inserted; not if the lease is lost: then another
    process has ended it. Needs a transaction."""
    row = await tx.one(_WITHDRAW, tenant_id=tenant_id, id=response_id, epoch=epoch)
    if row is not None:
        await threads.purge(tx, tenant_id, row["thread_id"])


async def delete_response(tx: Tx, tenant_id: str, response_id: str, *, again: bool = False) -> None:
    """Delete a response: gone at once for everyone. Its items stay as long as a later response's context, or a conversation, holds
    them.

    Needs a transaction. `again` if an earlier attempt may have deleted it. Raises NotFound, or InvalidRequest for one that is still being made.
    """
    row = await tx.one(_LOCK, tenant_id=tenant_id, id=response_id) if storable(response_id) else None
    if row is None or row["deleted"]:
        if again:
            return
        raise ResponseNotFound(response_id)
    if row["in_flight"]:
        raise InvalidRequest("Cannot delete an in-flight response.", param="response_id")
    await tx.one(_TOMBSTONE, tenant_id=tenant_id, id=response_id)
    await threads.purge(tx, tenant_id, row["thread_id"])


_RESPONSE = msgspec.json.Decoder(Response)


def response_of(stored: Stored) -> Response:
    """A stored response with its output: as in its terminal event."""
    output = [msgspec.Raw(body.encode()) for body in stored.output]
    return msgspec.structs.replace(decode_stored(_RESPONSE, stored.body), output=output, status=stored.status)
