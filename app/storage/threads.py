"""Purging threads of what no response, branch or conversation needs any more."""

from sqlalchemy import text

from app.storage.database import Query, Tx
from app.storage.tables import OUTPUT_POSITION

_LOCK = Query(
    text("select pg_advisory_xact_lock(hashtextextended(:thread_id, 0))"),
    across_tenants="a lock belongs to a thread, whose id is unique",
)

_PURGE = Query(
    text("""
    with needed as (
        select greatest(
            (select turn from responses
             where tenant_id = :tenant_id and thread_id = :thread_id and deleted_at is null
             order by turn desc limit 1),
            (select max(parent_turn) from branches where tenant_id = :tenant_id and parent_thread_id = :thread_id),
            (select max(turn) from conversations where tenant_id = :tenant_id and thread_id = :thread_id)
        ) as turn
    ), item as (
        delete from items
        where tenant_id = :tenant_id and thread_id = :thread_id and turn > coalesce((select turn from needed), 0)
        returning id, position
    ), approval as (
        delete from approvals
        where tenant_id = :tenant_id and request_id in (select id from item where position >= :output_position)
    ), removal as (
        delete from removals
        where tenant_id = :tenant_id and thread_id = :thread_id and turn > coalesce((select turn from needed), 0)
    ), response as (
        delete from responses
        where tenant_id = :tenant_id and thread_id = :thread_id and turn > coalesce((select turn from needed), 0)
    ), branch as (
        delete from branches
        where tenant_id = :tenant_id and thread_id = :thread_id and (select turn from needed) is null
        returning parent_thread_id
    )
    select parent_thread_id from branch
    """).bindparams(output_position=OUTPUT_POSITION)
)
"""`needed`: up to which turn. Every turn after it is that of a deleted response, or of a conversation that is gone."""

_FORGET = Query(
    text("""
    delete from items item using removals removal
    where item.tenant_id = :tenant_id and item.thread_id = :thread_id
      and removal.tenant_id = :tenant_id and removal.thread_id = :thread_id and removal.item_thread_id = :thread_id
      and removal.item_turn = item.turn and removal.item_position = item.position
      and not exists (select from responses response
                      where response.tenant_id = :tenant_id and response.thread_id = :thread_id
                        and response.deleted_at is null
                        and response.turn >= removal.item_turn and response.turn < removal.turn)
      and not exists (select from branches branch
                      where branch.tenant_id = :tenant_id and branch.parent_thread_id = :thread_id
                        and branch.parent_turn >= removal.item_turn and branch.parent_turn < removal.turn)
    """)
)
"""Items that were removed from a conversation before any response or fork had them, or whose responses and forks are gone."""


async def purge(tx: Tx, tenant_id: str, thread_id: str | None) -> None:
    """Delete what nothing needs any more, from the thread's end towards the root of its chain. Needs a transaction.

    One purge of a thread waits for another: the later one sees what the earlier has left.
    """
    while thread_id is not None:
        binds = {"tenant_id": tenant_id, "thread_id": thread_id}
        await tx.one(_LOCK, thread_id=thread_id)
        await tx.all(_FORGET, **binds)
        row = await tx.one(_PURGE, **binds)
        thread_id = row["parent_thread_id"] if row else None
