"""Files: uploaded piece by piece, read piece by piece, listed, deleted.

An upload is a row without a purpose, which nothing finds; its end sets the purpose. No connection is held between pieces, so an upload
may outlive its process: what it leaves is deleted with the next upload of any tenant, after ABANDONED_AFTER.
"""

from collections.abc import Sequence

from msgspec import Struct
from sqlalchemy import text

from app.domain.rights import tenant_of
from app.errors import InvalidParameter, InvalidRequest, ServerUnavailable, StoredFileNotFound
from app.storage.database import Database, Query, Row, Tx, storable
from app.storage.pages import Page, id_range
from app.storage.tables import OF_TENANT
from app.wire.files import Purpose
from app.wire.requests import Order

PIECE_BYTES = 192 * 1024
"""A multiple of three, so that pieces can be put together in base64."""

PAGE_ROWS_MAX = 1_000
"""Rows of a page, however many are asked for."""

ABANDONED_AFTER = "interval '1 hour'"
"""A client that is silent for so long is long disconnected."""


class StoredFile(Struct, frozen=True):
    """A file's row."""

    id: str
    created_at: int
    filename: str
    purpose: str
    bytes: int

    @property
    def pieces(self) -> range:
        """The numbers of its pieces."""
        return range(-(-self.bytes // PIECE_BYTES))


class Quota(Struct, frozen=True):
    """What the files of a tenant may take together, those that are being uploaded included."""

    files_max: int
    bytes_max: int

    def check(self, files: int, size: int) -> None:
        """Raises InvalidRequest."""
        if files > self.files_max:
            what = f"more than {self.files_max} files (REPRISE_FILES_TENANT_MAX)"
        elif size > self.bytes_max:
            what = f"files of more than {self.bytes_max} bytes (REPRISE_FILES_TENANT_BYTES_MAX)"
        else:
            return
        raise InvalidRequest(f"There would be {what}; delete some first.", param="file", code="storage_limit_exceeded")


_COLUMNS = "id, created_at, filename, purpose, bytes"

_ABANDONED = Query(
    text(f"delete from files where purpose is null and written_at < now() - {ABANDONED_AFTER}"),
    across_tenants="uploads of processes that died, whose tenants may never come again",
)

_USED_BY_TENANT = f"""
    select count(*) as files, cast(coalesce(sum(bytes), 0) as bigint) as bytes from files where tenant_id {OF_TENANT}
"""

_USED = Query(text(_USED_BY_TENANT), across_tenants="the limit is that of a tenant with its users")

_BEGIN = Query(
    text("""
    insert into files (tenant_id, id, created_at, filename, bytes, written_at)
    values (:tenant_id, :id, :created_at, :filename, 0, now())
    on conflict do nothing  -- by an earlier attempt
    """)
)

_WRITE = Query(
    text("""
    with upload as (
        update files set bytes = :begin + octet_length(cast(:data as bytea)), written_at = now()
        where tenant_id = :tenant_id and id = :id and purpose is null
        returning 1
    ), piece as (
        insert into file_pieces (tenant_id, file_id, number, data)
        select :tenant_id, :id, :number, :data from upload
        on conflict do nothing  -- by an earlier attempt
    )
    select exists (select from upload) as goes_on
    """)
)

# Every piece of every upload is committed before its end, so of two that end at once the later statement counts both.
_END = Query(
    text(f"""
    with used as ({_USED_BY_TENANT}), file as (
        update files set purpose = :purpose
        where tenant_id = :tenant_id and id = :id
          and exists (select from used where used.files <= :files_max and used.bytes <= :bytes_max)
        returning id, created_at, filename, purpose, bytes
    )
    select used.files, used.bytes as used_bytes, file.* from used left join file on true
    """),
    across_tenants="the limit is that of a tenant with its users",
)

_DISCARD = Query(text("delete from files where tenant_id = :tenant_id and id = :id"))

_GET = Query(text(f"select {_COLUMNS} from files where tenant_id = :tenant_id and id = :id and purpose is not null"))

_FIND = Query(
    text(f"""
    select {_COLUMNS} from files
    where tenant_id = :tenant_id and id = any(cast(:ids as text[])) and purpose is not null
    """)
)

_PIECE = Query(text("select data from file_pieces where tenant_id = :tenant_id and file_id = :id and number = :number"))

_DELETE = Query(
    text("delete from files where tenant_id = :tenant_id and id = :id and purpose is not null returning id")
)


def _list(order: Order) -> Query:
    """Ids begin with the time, so they are in the order of creation."""
    return Query(
        text(f"""
    select {_COLUMNS} from files
    where tenant_id = :tenant_id and id > :from_id and id < :to_id
      and purpose is not null and purpose = coalesce(cast(:purpose as text), purpose)
    order by id {order} limit cast(:limit as bigint) + 1
    """)
    )


_LISTS: dict[Order, Query] = {"asc": _list("asc"), "desc": _list("desc")}


class Upload:
    """A file that is being uploaded."""

    def __init__(self, database: Database, tenant_id: str, file_id: str, quota: Quota) -> None:
        self._database, self._tenant_id, self._id, self._quota = database, tenant_id, file_id, quota
        self._bytes = self._pieces = 0
        self._used = 0
        """Bytes of the tenant's other files when it began."""

    async def begin(self, filename: str, created_at: int) -> None:
        """Raises InvalidRequest for a tenant that has too many files."""
        async with self._database.autocommit() as tx:
            await tx.one(_ABANDONED)
            used = await tx.one(_USED, tenant=tenant_of(self._tenant_id))
        assert used
        self._quota.check(used["files"] + 1, used["bytes"])
        self._used = used["bytes"]
        await self._one(_BEGIN, filename=filename, created_at=created_at)

    async def write(self, data: bytes) -> None:
        """The next piece: PIECE_BYTES, or the rest. Raises InvalidRequest for a tenant whose files take too much, ServerUnavailable."""
        self._quota.check(1, self._used + self._bytes + len(data))
        row = await self._one(_WRITE, number=self._pieces, begin=self._bytes, data=data)
        if not row or not row["goes_on"]:
            raise ServerUnavailable("The upload took too long; please try again.")
        self._bytes += len(data)
        self._pieces += 1

    async def end(self, purpose: Purpose) -> StoredFile:
        """The file, which can be found from now on. Raises InvalidRequest as `begin` and `write`, ServerUnavailable."""
        quota = self._quota
        tenant = tenant_of(self._tenant_id)
        row = await self._one(
            _END, tenant=tenant, purpose=purpose, files_max=quota.files_max, bytes_max=quota.bytes_max
        )
        assert row
        if row["id"] is None:
            quota.check(row["files"], row["used_bytes"])
            raise ServerUnavailable("The upload took too long; please try again.")
        return _stored(row)

    async def discard(self) -> None:
        """Delete what is stored of it."""
        await self._one(_DISCARD)

    async def _one(self, query: Query, **binds: object) -> Row | None:
        row: Row | None = None
        async for attempt in self._database.settling():
            with attempt:
                async with self._database.autocommit() as tx:
                    row = await tx.one(query, tenant_id=self._tenant_id, id=self._id, **binds)
        return row


async def get_file(tx: Tx, tenant_id: str, file_id: str) -> StoredFile:
    """Raises StoredFileNotFound."""
    row = await tx.one(_GET, tenant_id=tenant_id, id=file_id) if storable(file_id) else None
    if row is None:
        raise StoredFileNotFound(file_id)
    return _stored(row)


async def find_files(tx: Tx, tenant_id: str, ids: Sequence[str]) -> list[StoredFile]:
    """Those of these files that there are."""
    rows = await tx.all(_FIND, tenant_id=tenant_id, ids=[id for id in ids if storable(id)])
    return [_stored(row) for row in rows]


async def read_piece(tx: Tx, tenant_id: str, file_id: str, number: int) -> bytes:
    """A piece of a file's content. Raises StoredFileNotFound if it is deleted meanwhile."""
    row = await tx.one(_PIECE, tenant_id=tenant_id, id=file_id, number=number)
    if row is None:
        raise StoredFileNotFound(file_id)
    return bytes(row["data"])


async def delete_file(tx: Tx, tenant_id: str, file_id: str, *, again: bool = False) -> None:
    """Delete a file and its content. `again` if an earlier attempt may have deleted it. Raises StoredFileNotFound."""
    row = await tx.one(_DELETE, tenant_id=tenant_id, id=file_id) if storable(file_id) else None
    if row is None and not again:
        raise StoredFileNotFound(file_id)


async def list_files(
    tx: Tx, tenant_id: str, purpose: str | None, *, after: str | None, limit: int, order: Order
) -> Page[StoredFile]:
    """Up to `limit` files after the cursor, which may be deleted. Raises InvalidParameter for a cursor that is no file's id."""
    between = id_range("file_", after, order)
    if between is None:
        raise InvalidParameter(f"No such File object: {after}", param="after")
    limit = min(limit, PAGE_ROWS_MAX)
    rows = await tx.all(_LISTS[order], tenant_id=tenant_id, purpose=purpose, limit=limit, **between)
    return Page([_stored(row) for row in rows[:limit]], len(rows) > limit)


def _stored(row: Row) -> StoredFile:
    return StoredFile(row["id"], row["created_at"], row["filename"], row["purpose"], row["bytes"])
