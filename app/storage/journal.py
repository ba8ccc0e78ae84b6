"""Events that outlive Redis: the journal of a run at work, item by item, and the archive of an ended one."""

import msgspec
import zstandard
from msgspec import Struct
from sqlalchemy import text

from app.storage.database import Query, Tx, storable
from app.wire.events import Entry, split_frames
from app.wire.resources import Usage

ARCHIVE_LEVEL = 3
"""zstd's own default: 239 kB of events become 9 kB."""

_APPEND = Query(
    text("""
    with run as (
        select 1 from runs where tenant_id = :tenant_id and response_id = :id and lease = :lease and state in ('running', 'cancelled')
        for no key update  -- whoever takes the run over waits for this, and then reads it
    ), spent as (
        update runs set usage = cast(:usage as json)
        where tenant_id = :tenant_id and response_id = :id and cast(usage as text) is distinct from :usage
          and exists (select from run)
    ), journal as (
        insert into event_journal (tenant_id, response_id, first_number, frames)
        select :tenant_id, :id, :first_number, :frames where exists (select from run)
        on conflict do nothing
    )
    select exists (select from run) as ours
    """)
)

_READ = Query(
    text("""
    select response.status, response.background, run.streamed, archive.frames as archive, array(
        select frames from event_journal journal
        where journal.tenant_id = response.tenant_id and journal.response_id = response.id order by first_number
    ) as journal
    from responses response
    left join event_archive archive on archive.tenant_id = response.tenant_id and archive.response_id = response.id
    left join runs run on run.tenant_id = response.tenant_id and run.response_id = response.id
    where response.tenant_id = :tenant_id and response.id = :id and response.deleted_at is null
    """)
)


class Kept(Struct, frozen=True):
    """What Postgres knows of a response's events: all of them once it is archived, else those of whole items."""

    status: str
    background: bool
    streamed: bool
    archived: bool
    entries: list[Entry]


async def append(
    tx: Tx, tenant_id: str, response_id: str, lease: int, first_number: int, frames: bytes, usage: Usage
) -> bool:
    """Keep the events up to the end of an item, and what the turns before took. False if the lease is lost."""
    row = await tx.one(
        _APPEND,
        tenant_id=tenant_id,
        id=response_id,
        lease=lease,
        first_number=first_number,
        frames=frames,
        usage=msgspec.json.encode(usage).decode(),
    )
    return row is not None and bool(row["ours"])


async def read(tx: Tx, tenant_id: str, response_id: str) -> Kept | None:
    """What is kept of a response's events; None for an unknown response."""
    row = await tx.one(_READ, tenant_id=tenant_id, id=response_id) if storable(response_id) else None
    if row is None:
        return None
    archive = row["archive"]
    frames = zstandard.decompress(archive) if archive is not None else b"".join(row["journal"])
    return Kept(
        status=row["status"],
        background=row["background"],
        streamed=bool(row["streamed"]) or archive is not None,
        archived=archive is not None,
        entries=split_frames(frames),
    )


def pack(frames: bytes) -> bytes:
    """Events as the archive keeps them."""
    return zstandard.compress(frames, ARCHIVE_LEVEL)
