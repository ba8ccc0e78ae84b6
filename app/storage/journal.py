"""Events in Postgres: the journal of a running response, checkpointed item by item, and the archive of an ended one."""

from collections.abc import Sequence

import msgspec
import zstandard
from msgspec import Struct
from msgspec.structs import asdict
from sqlalchemy import text

from app.domain.spending import NOTHING_SPENT, Spent
from app.errors import Fenced
from app.offload import offload
from app.storage.backlog import pages_of, size_of
from app.storage.database import Database, Query, Tx, storable
from app.storage.parts import dictionary, dictionary_of
from app.storage.tables import IN_FLIGHT
from app.wire.events import Entry, split_frames
from app.wire.resources import NO_USAGE, Response, Usage

ARCHIVE_LEVEL = 3
"""zstd's own default: 239 kB of events become 9 kB."""

STORED_PAGE_BYTES = 256 * 1024
"""Of a page of events, unless a single one is larger."""

_APPEND = Query(
    text("""
    with run as (
        select 1 from runs where tenant_id = :tenant_id and response_id = :id and lease = :epoch and state in ('running', 'cancelled')
        for no key update  -- who takes the run over waits for this, and then reads it
    ), spent as (
        update runs set usage = cast(:usage as json)
        where tenant_id = :tenant_id and response_id = :id and cast(usage as text) is distinct from :usage
          and exists (select from run)
    ), journal as (
        insert into event_journal (tenant_id, response_id, first_number, frames)
        select :tenant_id, :id, page.first_number, page.frames
        from unnest(cast(:first_numbers as bigint[]), cast(:pages as bytea[])) as page (first_number, frames)
        where exists (select from run)
        on conflict do nothing
    )
    select exists (select from run) as ours
    """)
)


def _page(table: str) -> str:
    """The page that holds an event, or the first after it where its number was given up; and where the next one begins."""
    own = f"from {table} page where page.tenant_id = response.tenant_id and page.response_id = response.id"
    return f"""
        select frames, (select min(first_number) {own} and page.first_number > found.first_number) as next_number
        from (
            select page.first_number, page.frames {own} and page.first_number <= :number
            order by page.first_number desc limit 1
        ) found
    """


_READ = Query(
    text(f"""
    select response.status, response.background, run.streamed,
           archive.frames as archive, archive.next_number as archive_next,
           case when archive.frames is not null then {dictionary("response")} end as dictionary,
           journal.frames as journal, journal.next_number as journal_next
    from responses response
    left join lateral ({_page("event_archive")}) archive on true
    left join lateral ({_page("event_journal")}) journal on archive.frames is null
    left join runs run on run.tenant_id = response.tenant_id and run.response_id = response.id
    where response.tenant_id = :tenant_id and response.id = :id and response.deleted_at is null
      and (response.background or response.status not in {IN_FLIGHT})
    """)
)


class _Spent(Usage):
    """What a run has used so far, as the queue keeps it for the next owner."""

    unlimited_output_tokens: int = 0
    cost: int = 0
    tool_s: float = 0.0
    is_reported: bool = True
    """Whether any upstream has reported the usage."""


class StoredEvents(Struct, frozen=True):
    """A page of a response's events: of the archive once it has ended, before that of the journal."""

    status: str
    background: bool
    streamed: bool
    archived: bool
    is_last: bool
    """Whether none is stored after this page."""
    entries: list[Entry]


Pages = Sequence[tuple[int, bytes]]
"""Joined frames, each page with the number of its first event."""


def paged(entries: list[Entry]) -> Pages:
    """Events as they are stored: in pages, so that a reader need not hold all."""
    return [
        (page[0].sequence_number, b"".join(entry.frame for entry in page))
        for page in pages_of(entries, size_of(entries), STORED_PAGE_BYTES)
    ]


def archive(entries: list[Entry], response: Response) -> Pages:
    """Events as the archive keeps them: pages, compressed. What is kept once of their response is not in them."""
    compressor = zstandard.ZstdCompressor(ARCHIVE_LEVEL, dict_data=_dictionary(dictionary_of(response)))
    return [(number, compressor.compress(frames)) for number, frames in paged(entries)]


def decompress(frames: bytes, parts: str | None) -> bytes:
    """A page of the archive, which was compressed with these parts of its response."""
    return zstandard.ZstdDecompressor(dict_data=_dictionary((parts or "").encode())).decompress(frames)


def _dictionary(parts: bytes) -> zstandard.ZstdCompressionDict | None:
    return zstandard.ZstdCompressionDict(parts, dict_type=zstandard.DICT_TYPE_RAWCONTENT) if parts else None


async def append(tx: Tx, tenant_id: str, response_id: str, epoch: int, pages: Pages, spent: str) -> bool:
    """Checkpoint events, and what is `spent` so far. False if the lease is lost."""
    row = await tx.one(
        _APPEND,
        tenant_id=tenant_id,
        id=response_id,
        epoch=epoch,
        first_numbers=[number for number, _ in pages],
        pages=[frames for _, frames in pages],
        usage=spent,
    )
    return row is not None and bool(row["ours"])


class RunJournal:
    """The journal of one run, as its owner writes it."""

    def __init__(self, database: Database, tenant_id: str, response_id: str, epoch: int) -> None:
        self._database = database
        self._place = (tenant_id, response_id, epoch)

    async def checkpoint(self, entries: Sequence[Entry], spent: Spent) -> None:
        """Commit events, however long Postgres is unavailable: meanwhile no other worker can continue either, and what only
        this one knows would be lost. Raises Fenced."""
        pages = await offload(size_of(entries), paged, list(entries))
        as_stored = _stored(spent)
        async for attempt in self._database.retrying(forever=True):
            with attempt:
                async with self._database.begin() as tx:
                    if not await append(tx, *self._place, pages, as_stored):
                        raise Fenced


def _stored(spent: Spent) -> str:
    if spent == NOTHING_SPENT:
        return "null"
    others = {name: getattr(spent, name) for name in Spent.__struct_fields__ if name != "usage"}
    usage = _Spent(**asdict(spent.usage or NO_USAGE), **others, is_reported=spent.usage is not None)
    return msgspec.json.encode(usage).decode()


def read_spent(stored: str | None) -> Spent:
    """What a run has used by the queue's record."""
    read = msgspec.json.decode(stored, type=_Spent | None) if stored else None
    if read is None:
        return NOTHING_SPENT
    usage = Usage(*(getattr(read, name) for name in Usage.__struct_fields__))
    others = {name: getattr(read, name) for name in Spent.__struct_fields__ if name != "usage"}
    return Spent(usage=usage if read.is_reported else None, **others)


async def read(tx: Tx, tenant_id: str, response_id: str, after: int) -> StoredEvents | None:
    """A page of a response's stored events after a number; None for an unknown response."""
    number = after + 1
    while True:
        row = await tx.one(_READ, tenant_id=tenant_id, id=response_id, number=number) if storable(response_id) else None
        if row is None:
            return None
        archived = row["archive"] is not None
        frames = decompress(row["archive"], row["dictionary"]) if archived else row["journal"] or b""
        entries = [entry for entry in split_frames(frames) if entry.sequence_number > after]
        next_number = row["archive_next"] if archived else row["journal_next"]
        if entries or next_number is None:
            return StoredEvents(
                status=row["status"],
                background=row["background"],
                streamed=bool(row["streamed"]) or archived,
                archived=archived,
                is_last=next_number is None,
                entries=entries,
            )
        number = next_number


async def read_all(tx: Tx, tenant_id: str, response_id: str) -> list[Entry]:
    """Every stored event of a response."""
    entries: list[Entry] = []
    while page := await read(tx, tenant_id, response_id, entries[-1].sequence_number if entries else -1):
        entries += page.entries
        if page.is_last:
            break
    return entries
