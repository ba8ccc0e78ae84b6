"""Purging threads of what no response, branch or conversation needs any more."""

from sqlalchemy import text

from app.storage import parts
from app.storage.database import Query, Tx
from app.storage.tables import LAST_POSITION, OUTPUT_POSITION

_LOCK = Query(
    text("""
    with branch as (
        select 1 from branches where tenant_id = :tenant_id and thread_id = :thread_id for update
    )
    select pg_advisory_xact_lock(hashtextextended(:thread_id, 0)) where not exists (select from branch)
    """)
)
"""A branch is locked by its row: Postgres has room for a few thousand advisory locks, and a chain may have more threads."""

_PURGE = Query(
    text("""
    with held as (
        select coalesce(greatest(
            (select turn from responses
             where tenant_id = :tenant_id and thread_id = :thread_id and deleted_at is null
             order by turn desc limit 1),
            (select max(turn) from conversations where tenant_id = :tenant_id and thread_id = :thread_id)
        ), -1) as turn
    ), forked as (
        select parent_turn as turn, max(coalesce(parent_position, :last_position)) as position from branches
        where tenant_id = :tenant_id and parent_thread_id = :thread_id and parent_turn > (select turn from held)
        group by parent_turn order by parent_turn desc limit 1
    ), needed as (
        select turn, position from forked
        union all
        select turn, :last_position from held where turn >= 0 and not exists (select from forked)
    ), item as (
        delete from items
        where tenant_id = :tenant_id and thread_id = :thread_id
          and (turn, position) > (coalesce((select turn from needed), 0), coalesce((select position from needed), 0))
        returning id, position, part_hashes
    ), approval as (
        delete from approvals
        where tenant_id = :tenant_id and request_id in (select id from item where position >= :output_position)
    ), removal as (
        delete from removals
        where tenant_id = :tenant_id and thread_id = :thread_id and turn > coalesce((select turn from needed), 0)
    ), response as (
        delete from responses
        where tenant_id = :tenant_id and thread_id = :thread_id and turn > coalesce((select turn from needed), 0)
        returning part_hashes
    ), branch as (
        delete from branches
        where tenant_id = :tenant_id and thread_id = :thread_id and not exists (select from needed)
        returning parent_thread_id
    )
    select (select parent_thread_id from branch) as parent_thread_id,
           array(select part_hashes from item where part_hashes is not null
                 union select part_hashes from response where part_hashes is not null) as part_hashes
    """).bindparams(output_position=OUTPUT_POSITION, last_position=LAST_POSITION)
)
"""`needed`: up to which item. Every turn after it is that of a deleted response, or of a conversation that is gone."""

_FORGET = Query(
    text("""
    with forgotten as materialized (
        select removal.turn, removal.item_turn, removal.item_position, item.id
        from removals removal cross join lateral (  -- a look into the primary key, whatever the statistics say
            select id from items
            where tenant_id = :tenant_id and thread_id = :thread_id
              and turn = removal.item_turn and position = removal.item_position limit 1
        ) item
        where removal.tenant_id = :tenant_id and removal.thread_id = :thread_id and removal.item_thread_id = :thread_id
          and removal.turn >= :since
          and not exists (select from responses response
                          where response.tenant_id = :tenant_id and response.thread_id = :thread_id
                            and response.deleted_at is null
                            and response.turn >= removal.item_turn and response.turn < removal.turn)
          and not exists (select from branches branch
                          where branch.tenant_id = :tenant_id and branch.parent_thread_id = :thread_id
                            and branch.parent_turn >= removal.item_turn and branch.parent_turn < removal.turn)
    ), item as (
        delete from items
        where tenant_id = :tenant_id and thread_id = :thread_id and turn = any(array(select item_turn from forgotten))
          and (turn, position) in (select item_turn, item_position from forgotten)
        returning part_hashes
    ), approval as (
        delete from approvals
        where tenant_id = :tenant_id and request_id in (select id from forgotten where item_position >= :output_position)
    ), removal as (
        delete from removals
        where tenant_id = :tenant_id and thread_id = :thread_id and turn >= :since and item_thread_id = :thread_id
          and (turn, item_turn, item_position) in (select turn, item_turn, item_position from forgotten)
    )
    select array(select part_hashes from item where part_hashes is not null) as part_hashes
    """).bindparams(output_position=OUTPUT_POSITION)
)
"""Items that were removed from a conversation before any response or fork had them, or whose responses and forks are gone."""


async def purge(tx: Tx, tenant_id: str, thread_id: str | None) -> None:
    """Delete what nothing needs any more, from the thread's end towards the root of its chain. Needs a transaction.

    One purge of a thread waits for another: the later one sees what the earlier has left.
    """
    part_hashes: list[bytes] = []
    while thread_id is not None:
        part_hashes += await _forget(tx, tenant_id, thread_id, since=0)
        row = await tx.one(_PURGE, tenant_id=tenant_id, thread_id=thread_id)
        assert row
        part_hashes += row["part_hashes"]
        thread_id = row["parent_thread_id"]
    await parts.free(tx, tenant_id, part_hashes)


async def forget(tx: Tx, tenant_id: str, thread_id: str, turn: int) -> None:
    """Delete the item that this turn of a conversation removes, unless something has it. Needs a transaction."""
    await parts.free(tx, tenant_id, await _forget(tx, tenant_id, thread_id, since=turn))


async def _forget(tx: Tx, tenant_id: str, thread_id: str, *, since: int) -> list[bytes]:
    """The parts of what is deleted."""
    binds = {"tenant_id": tenant_id, "thread_id": thread_id}
    await tx.one(_LOCK, **binds)
    row = await tx.one(_FORGET, since=since, **binds)
    return list(row["part_hashes"]) if row else []
