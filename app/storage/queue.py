"""The queue of runs, which is also their lease and their fence: one row per run that is waiting or being made.

`due_at` orders queued runs, and says when a running one's lease ends; so recovery after a crash is the same claim as the first.
Each owner gets the next epoch (the column `lease`), a fencing token: every later write of a run demands that its epoch is the newest.
"""

from collections.abc import Sequence
from datetime import datetime

from msgspec import Struct
from msgspec.structs import asdict
from sqlalchemy import text

from app.domain.rights import tenant_of
from app.storage.database import Query, Row, Tx
from app.storage.parts import size
from app.storage.tables import OF_TENANT


class Owner(Struct, frozen=True):
    """Who makes responses: the process, and how long its leases last without a heartbeat."""

    worker: str
    lease_s: float


class Queued(Struct, frozen=True):
    """What makes a background response later, elsewhere."""

    request: bytes
    secrets: str | None
    streamed: bool
    frames: bytes
    """The first events, `created` and `queued`."""
    reserved_tokens: int | None = None
    """Of quotas; None if it has taken nothing that is to be settled."""


class Claim(Struct, frozen=True):
    """A run that this process owns, as long as its epoch is the newest."""

    tenant_id: str
    response_id: str
    epoch: int
    handed_over: int
    """How many of its owners have handed it back; the others are presumed dead."""
    state: str
    request_bytes: int | None
    """Of the request; None for a foreground run, which no other worker can make."""
    context_bytes: int
    """Of what it continues, and of its input."""
    response_bytes: int
    """Of the response so far, which has the messages of its prompt or agent."""
    secrets: str | None
    streamed: bool
    number_ceiling: int
    """No earlier owner has sent an event with a number this high."""
    stream_token: str | None
    """That of the stream which held every event that was sent; None if none is known to."""
    usage: str | None
    """Of the turns that earlier owners have finished, as JSON; None if there was none."""
    key_id: str | None
    """Of the key that asked for it."""
    reserved_tokens: int | None
    """Of quotas; None if it has taken nothing that is to be settled."""


class Heartbeat(Struct, frozen=True):
    """Prolongs the lease of one run that this process owns."""

    tenant_id: str
    response_id: str
    epoch: int
    number_ceiling: int
    stream_token: str | None = None
    """That of the stream that holds every event sent so far; None changes nothing."""


NUMBERS_AHEAD = 1_000_000
"""How far a claim and each heartbeat raise a run's ceiling: more events than a run can make in between."""


_DUE_AT = "due_at = clock_timestamp() + cast(:lease_s as float8) * interval '1 second'"
"""Not `now()`: the statement may have waited for a lock, for longer than the lease."""


def _ours(state: str) -> str:
    """The runs that `free` has locked become ours, in this state; what is given of numbers is the former owner's word."""
    return f"""
    update runs set state = {state}, lease = runs.lease + 1,
        handed_over = runs.handed_over + case when runs.worker = :worker then 1 else 0 end,  -- to ourselves, alive
        worker = :worker, lease_s = :lease_s, {_DUE_AT},
        number_ceiling = runs.number_ceiling + {NUMBERS_AHEAD}
    from free left join lateral (
        select context_bytes, {size("response")} as response_bytes from responses response
        where tenant_id = free.tenant_id and id = free.response_id
    ) made on true
    where runs.tenant_id = free.tenant_id and runs.response_id = free.response_id
    returning runs.tenant_id, runs.response_id, runs.lease as epoch, runs.handed_over, runs.state, runs.secrets, runs.streamed,
              free.number_ceiling, runs.redis_run as stream_token, runs.usage, runs.key_id, runs.reserved_tokens,
              octet_length(cast(runs.request as text)) as request_bytes,
              coalesce(made.context_bytes, 0) as context_bytes, coalesce(made.response_bytes, 0) as response_bytes
    """


_LOCKED = "tenant_id, response_id, number_ceiling"

# Rows of our own are due only if nothing here makes them: a heartbeat has just prolonged the others.
_CLAIM_DUE = Query(
    text(f"""
    with free as (
        select {_LOCKED} from runs where state <> 'queued' and due_at <= now()
          and (worker is null or (due_at < cast(:horizon as timestamptz)
                                  and (worker = :worker or coalesce(lease_s, 0) <= :watched_s)))
        order by due_at limit :limit for update skip locked
    ) {_ours("runs.state")}
    """),
    across_tenants="dead processes leave runs of any tenant",
)

# The tenants with the fewest running runs come first, so that a tenant's first run never waits for another's thousandth.
_CLAIM_QUEUED = Query(
    text(f"""
    with recursive waiting as (
        (select tenant_id from runs where state = 'queued' order by tenant_id limit 1)
        union all
        select (select tenant_id from runs where state = 'queued' and tenant_id > waiting.tenant_id
                order by tenant_id limit 1)
        from waiting where waiting.tenant_id is not null
    ), busy as (
        select tenant_id, count(*) as runs from runs where state = 'running' and request is not null group by tenant_id
    ), next as (
        select one.tenant_id, one.response_id
        from waiting left join busy using (tenant_id) cross join lateral (
            select tenant_id, response_id, due_at, row_number() over (order by due_at) as rank
            from (select tenant_id, response_id, due_at from runs
                  where state = 'queued' and tenant_id = waiting.tenant_id
                  order by due_at limit :limit) as oldest
        ) one
        order by coalesce(busy.runs, 0) + one.rank, one.due_at limit :limit
    ), free as (
        select {_LOCKED} from runs
        where (tenant_id, response_id) in (select tenant_id, response_id from next) and state = 'queued'
        for update skip locked
    ) {_ours("'running'")}
    """),
    across_tenants="a worker makes responses of every tenant",
)

_CANCEL = Query(
    text(f"""
    with free as (
        select {_LOCKED} from runs
        where tenant_id = :tenant_id and response_id = :id and request is not null
          and (state in ('queued', 'running') or (:again and state = 'cancelled' and worker = :worker))
        for update
    ) {_ours("'cancelled'")}
    """)
)

_REQUEST = Query(text("select request from runs where tenant_id = :tenant_id and response_id = :id and lease = :epoch"))

_RUNS_SILENTLY = Query(
    text("""
    select 1 from runs
    where tenant_id = :tenant_id and response_id = :id and request is not null and state = 'running' and not streamed
    """)
)

_BEAT = Query(
    text(f"""
    with standing as (
        update runs set lease_s = :lease_s, {_DUE_AT},
                        redis_run = coalesce(heartbeat.redis_run, runs.redis_run),
                        number_ceiling = greatest(runs.number_ceiling, heartbeat.number_ceiling)
        from unnest(cast(:tenants as text[]), cast(:ids as text[]), cast(:epochs as int[]), cast(:ceilings as bigint[]),
                    cast(:stream_tokens as text[])) as heartbeat (tenant_id, response_id, epoch, number_ceiling, redis_run)
        where runs.tenant_id = heartbeat.tenant_id and runs.response_id = heartbeat.response_id
          and runs.lease = heartbeat.epoch
        returning runs.tenant_id, runs.response_id
    )
    select present.clock, standing.tenant_id, standing.response_id
    from (select clock_timestamp() as clock) present left join standing on true
    """)
)

_SHORTEN = Query(
    text("""
    update runs set due_at = now() + lease_s * interval '1 second'
    from (select tenant_id, response_id from runs
          where state <> 'queued' and due_at > now() and due_at > now() + (lease_s + 1) * interval '1 second'
          for update skip locked) as far
    where runs.tenant_id = far.tenant_id and runs.response_id = far.response_id
    """),
    across_tenants="the clock is that of all tenants",
)

_HAND_BACK = Query(
    text("""
    update runs set due_at = now() + cast(:after_s as float8) * interval '1 second', worker = null,
                    handed_over = handed_over + case when :failed then 0 else 1 end
    where tenant_id = :tenant_id and response_id = :id and lease = :epoch returning 1
    """)
)

_DISOWN = Query(
    text("""
    update runs set due_at = now(), worker = null, handed_over = handed_over + 1
    where worker = :worker and state = 'running' and request is not null and response_id <> all (cast(:except_for as text[]))
    """),
    across_tenants="a worker makes responses of every tenant",
)

_REMOVE = Query(
    text("""
    delete from runs where tenant_id = :tenant_id and response_id = :id and lease = :epoch and state = 'sealed' returning 1
    """)
)

_DEPTH = Query(
    text(f"""
    select (select count(*) from (select from runs where tenant_id {OF_TENANT} and state = 'queued' limit :tenant_max) one)
               >= :tenant_max as tenant_full,
           (select count(*) from (select from runs where state = 'queued' limit :all_max) one) >= :all_max as all_full
    """),
    across_tenants="the whole queue has a limit, too",
)


_ALIVE = Query(
    text(f"""
    select response_id from runs
    where tenant_id {OF_TENANT} and response_id = any(cast(:ids as text[])) and state <> 'sealed'
    """),
    across_tenants="the limit is that of a tenant with its users",
)


async def claim(tx: Tx, owner: Owner, *, limit: int, horizon: datetime, watched_s: float) -> list[Claim]:
    """Up to `limit` runs become ours: first those whose owner is gone, then queued ones in fair order.

    A lease has ended if it ends before `horizon` by the database's clock. That of another process must not be longer than
    the `watched_s` for which we have seen that it could have been prolonged.
    """
    rows = await tx.all(_CLAIM_DUE, **asdict(owner), limit=limit, horizon=horizon, watched_s=watched_s)
    if len(rows) < limit:
        rows += await tx.all(_CLAIM_QUEUED, **asdict(owner), limit=limit - len(rows))
    return [_claim(row) for row in rows]


async def cancel(tx: Tx, tenant_id: str, response_id: str, owner: Owner, *, again: bool = False) -> Claim | None:
    """The run becomes ours, to be cancelled: this commit decides the race with its completion. None if it is decided already.

    `again` if the answer of our first attempt was lost: then what that one has decided counts.
    """
    row = await tx.one(_CANCEL, tenant_id=tenant_id, id=response_id, again=again, **asdict(owner))
    return _claim(row) if row else None


async def load_request(tx: Tx, claim: Claim) -> str | None:
    """What is to be made, as JSON; None if the lease is lost."""
    row = await tx.one(_REQUEST, tenant_id=claim.tenant_id, id=claim.response_id, epoch=claim.epoch)
    return row["request"] if row else None


async def runs_silently(tx: Tx, tenant_id: str, response_id: str) -> bool:
    """Whether a background run is being made without a stream."""
    return bool(await tx.one(_RUNS_SILENTLY, tenant_id=tenant_id, id=response_id))


async def beat(tx: Tx, heartbeats: Sequence[Heartbeat], lease_s: float) -> tuple[set[tuple[str, str]], datetime]:
    """Prolong leases, in one statement. Returns (tenant, response id) of those that are still ours, and the database's time."""
    rows = await tx.all(
        _BEAT,
        tenants=[one.tenant_id for one in heartbeats],
        ids=[one.response_id for one in heartbeats],
        epochs=[one.epoch for one in heartbeats],
        ceilings=[one.number_ceiling for one in heartbeats],
        stream_tokens=[one.stream_token for one in heartbeats],
        lease_s=lease_s,
    )
    standing = {(row["tenant_id"], row["response_id"]) for row in rows if row["response_id"] is not None}
    return standing, rows[0]["clock"]


async def shorten(tx: Tx) -> None:
    """No lease ends later than its owner could have asked for: the database's clock may have been set back."""
    await tx.all(_SHORTEN)


async def hand_back(tx: Tx, claim: Claim, *, after_s: float = 0.0, failed: bool = False) -> None:
    """Hand a run back: another worker may claim it in so many seconds. If it has `failed` here, that was an attempt."""
    await tx.one(
        _HAND_BACK,
        tenant_id=claim.tenant_id,
        id=claim.response_id,
        epoch=claim.epoch,
        after_s=after_s,
        failed=failed,
    )


async def disown(tx: Tx, worker: str, *, except_for: Sequence[str]) -> None:
    """Hand back every background run that this worker owns, except for those given by response id."""
    await tx.all(_DISOWN, worker=worker, except_for=list(except_for))


async def remove(tx: Tx, tenant_id: str, response_id: str, epoch: int) -> None:
    """Delete the row of an ended run, after its terminal event was sent."""
    await tx.one(_REMOVE, tenant_id=tenant_id, id=response_id, epoch=epoch)


async def is_full(tx: Tx, tenant_id: str, *, tenant_max: int, all_max: int) -> bool:
    """Whether the queue takes no more, of this tenant or in all."""
    row = await tx.one(_DEPTH, tenant=tenant_of(tenant_id), tenant_max=tenant_max, all_max=all_max)
    return row is not None and bool(row["tenant_full"] or row["all_full"])


async def those_alive(tx: Tx, tenant: str, response_ids: Sequence[str]) -> set[str]:
    """Those of these runs of a tenant that wait or are being made."""
    rows = await tx.all(_ALIVE, tenant=tenant, ids=list(response_ids))
    return {row["response_id"] for row in rows}


def _claim(row: Row) -> Claim:
    return Claim(**{name: row[name] for name in Claim.__struct_fields__})
