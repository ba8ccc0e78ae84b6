"""Parts of bodies that are kept once per tenant, by their content: tool lists, instructions, long strings.

An agent sends the same tools and instructions with every request, and a client without state the same images. A row whose body has
such parts keeps the text around them, as a JSON array of strings, and their hashes; what reads the row puts them back (`whole`).
Postgres' triggers (migration 0015) keep which rows use a part. What deletes rows frees their parts at its end (`free`), after every
other lock, and in the order of their hashes: so none waits crosswise for another.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from msgspec import Struct
from sqlalchemy import text

from app.storage.database import Query, Tx
from app.storage.tables import HASH_BYTES
from app.wire.resources import Response, encode

STRING_BYTES_MIN = 64 * 1024
"""Of an item's strings, such as data URLs, these are kept once."""

FIELD_BYTES_MIN = 2 * 1024
"""Of a response's fields, these are. What is smaller costs less in the row than as a part."""

DICTIONARY_PART_BYTES_MAX = 256 * 1024
"""A larger part is not worth reading with each page of an archive."""

_FIELDS = ("instructions", "text", "tools")
"""Those that requests repeat, in the order in which a response has them."""

_KNOWN = """
    select hash from parts where tenant_id = :tenant_id and hash = any(cast(:stored_hashes as bytea[]))
    order by hash for key share  -- one that is being deleted is either gone for us, or waits and then finds its user
"""

_NEW = """
    insert into parts (tenant_id, hash, body)
    select :tenant_id, new.hash, new.body
    from unnest(cast(:stored_hashes as bytea[]), cast(:stored_bodies as text[])) as new (hash, body)
    where new.hash not in (select hash from known_part) and exists (select from {user})
    on conflict (tenant_id, hash) do update set body = excluded.body where false  -- which locks what others have stored meanwhile
"""


def storing(user: str) -> dict[str, str]:
    """The SQL, by name, of what a statement needs to store parts, if there is a `user`: the row that it stores with them."""
    return {"known_part": _KNOWN, "part": _NEW.format(user=user)}


def with_and_without(statement: Callable[[dict[str, str]], Query], user: str) -> dict[bool, Query]:
    """A statement for rows that have parts (True), and the same for those that have none, which is by a quarter faster."""
    return {has_parts: statement(storing(user) if has_parts else {}) for has_parts in (False, True)}


def ctes(named: dict[str, str]) -> str:
    """SQL of a `with` clause."""
    return ", ".join(f"{name} as ({sql})" for name, sql in named.items())


def whole(row: str) -> str:
    """SQL for the body of a row as it came, as text. It is put together where it is selected, so select it of rows that are needed."""
    return f"""
        case when {row}.part_hashes is null then cast({row}.body as text) else (
            select string_agg(around.text || coalesce(part.body, ''), '' order by around.number)
            from json_array_elements_text({row}.body) with ordinality around (text, number)
            left join lateral ({_part(row, "cast(around.number as int)")}) part on true
        ) end
    """


def size(row: str) -> str:
    """SQL for the bytes of that body."""
    return f"coalesce({row}.bytes, octet_length(cast({row}.body as text)))"


def dictionary(row: str) -> str:
    """SQL for the parts of a response that `dictionary_of` gives, one after another, as text."""
    return f"""(
        select string_agg(part.body, '' order by number)
        from generate_series(1, octet_length({row}.part_hashes) / {HASH_BYTES}) number
        cross join lateral ({_part(row, "number")}) part
        where octet_length(part.body) <= {DICTIONARY_PART_BYTES_MAX}
    )"""


def _part(row: str, number: str) -> str:
    """A look into the primary key, whatever the statistics say."""
    return f"""
        select body from parts
        where tenant_id = :tenant_id and hash = substr({row}.part_hashes, {HASH_BYTES} * ({number} - 1) + 1, {HASH_BYTES}) limit 1
    """


_FREE = Query(
    text("""
    select free_parts(:tenant_id, array(
        select distinct part.hash from unnest(cast(:part_hashes as bytea[])) one, hashes_of(one) part (hash)
    ))
    """)
)


async def free(tx: Tx, tenant_id: str, part_hashes: Sequence[bytes]) -> None:
    """Delete those parts of deleted rows that no row uses any more. Call it after every other lock of the transaction is taken."""
    if part_hashes:
        await tx.one(_FREE, tenant_id=tenant_id, part_hashes=part_hashes)


class Body(Struct, frozen=True):
    """A body as its row keeps it."""

    text: str
    """The body; of one with parts, the texts around them, as a JSON array."""
    part_hashes: bytes | None = None
    """The SHA-256 of each of its parts, one after another."""
    bytes: int | None = None
    """What it takes with its parts."""


class SharedParts:
    """The parts of the bodies that one statement stores."""

    def __init__(self) -> None:
        self._bodies: dict[bytes, bytes] = {}

    def take(self, body: bytes, parts: Sequence[bytes]) -> Body:
        """The body without its parts, which it has in this order."""
        if not parts:
            return Body(body.decode())
        around, hashes, end = [], [], 0
        for part in parts:
            at = body.index(part, end)
            around.append(body[end:at].decode())
            hashes.append(hashlib.sha256(part).digest())
            self._bodies[hashes[-1]] = part
            end = at + len(part)
        return Body(encode([*around, body[end:].decode()]).decode(), b"".join(hashes), len(body))

    @property
    def binds(self) -> dict[str, Any]:
        """Those of `storing`, in the order in which every statement locks them."""
        hashes = sorted(self._bodies)
        return {"stored_hashes": hashes, "stored_bodies": [self._bodies[hash].decode() for hash in hashes]}


def repeated(response: Response) -> list[bytes]:
    """The fields of a response that are kept once, as JSON."""
    fields = (encode(getattr(response, name)) for name in _FIELDS)
    return [field for field in fields if len(field) >= FIELD_BYTES_MIN]


def dictionary_of(response: Response) -> bytes:
    """What the archive of its events need not hold again."""
    return b"".join(part for part in repeated(response) if len(part) <= DICTIONARY_PART_BYTES_MAX)


def long_strings(body: bytes) -> list[bytes]:
    """The strings of a JSON document that are kept once, as JSON; also what stands between two strings, where that is as long."""
    return [] if len(body) < STRING_BYTES_MIN else list(_long_strings(body))


def _long_strings(body: bytes) -> Iterator[bytes]:
    begin = _next_quote(body, 0)
    while begin >= 0:
        later = _last_quote(body, begin + 1, begin + STRING_BYTES_MIN - 1)
        if later < 0:
            end = _next_quote(body, begin + STRING_BYTES_MIN - 1)
            if end >= 0:
                yield body[begin : end + 1]
            later = _next_quote(body, end + 1) if end >= 0 else end
        begin = later


def _next_quote(body: bytes, begin: int) -> int:
    at = body.find(_QUOTE, begin)
    while at >= 0 and _is_escaped(body, at):
        at = body.find(_QUOTE, at + 1)
    return at


def _last_quote(body: bytes, begin: int, end: int) -> int:
    at = body.rfind(_QUOTE, begin, end)
    while at >= 0 and _is_escaped(body, at):
        at = body.rfind(_QUOTE, begin, at)
    return at


def _is_escaped(body: bytes, at: int) -> bool:
    """Whether an odd number of backslashes precedes it."""
    begin = at
    while begin and body[begin - 1] == _BACKSLASH:
        begin -= 1
    return (at - begin) % 2 == 1


_QUOTE = b'"'
_BACKSLASH = ord("\\")
