"""Leases: a process's time-limited right to write the responses that it makes.

Each process prolongs all of its leases with one statement. A lease that ran out belongs to a process that is gone: whoever
notices takes its responses over and ends them.
"""

from sqlalchemy import text

from app.storage.database import Query, Tx

_PROLONG = Query(
    text("""
    update runs set lease_until = now() + cast(:lease_s as float8) * interval '1 second' where worker = :worker returning 1
    """),
    across_tenants="one statement for all runs of a process",
)
_TAKE_OVER = Query(
    text("""
    update runs set worker = :worker, lease_until = now() + cast(:lease_s as float8) * interval '1 second'
    where (tenant_id, response_id) in (
        select tenant_id, response_id from runs where lease_until < now() order by lease_until limit :limit
        for update skip locked
    )
    returning tenant_id, response_id
    """),
    across_tenants="dead processes leave runs of any tenant",
)
_BODY = Query(text("select body from responses where tenant_id = :tenant_id and id = :id"))


async def prolong(tx: Tx, worker: str, lease_s: float) -> None:
    """Prolong every lease of this process."""
    await tx.all(_PROLONG, worker=worker, lease_s=lease_s)


async def take_over(tx: Tx, worker: str, lease_s: float, *, limit: int) -> list[tuple[str, str]]:
    """Leases that ran out become ours: (tenant_id, response_id)."""
    rows = await tx.all(_TAKE_OVER, worker=worker, lease_s=lease_s, limit=limit)
    return [(row["tenant_id"], row["response_id"]) for row in rows]


async def load_body(tx: Tx, tenant_id: str, response_id: str) -> str | None:
    """The response as it was when its run began, without output; None if it is deleted."""
    row = await tx.one(_BODY, tenant_id=tenant_id, id=response_id)
    return str(row["body"]) if row else None
