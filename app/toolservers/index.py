"""Files in Postgres, in their own schema, with full-text search over chunks. Every statement names the tenant."""

import hashlib
import json
import re
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import asyncpg

from app.toolservers.texts import chunks, searchable

TIMEOUT_S = 15.0
QUERY_CHARS_MAX = 1000
FILTER_DEPTH_MAX = 8
LOST = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError)
LOOSE_WORTH = 0.5  # weight of chunks with some of the words, where none has all

SCHEMA = """
create schema if not exists files;
create table if not exists files.documents (
    tenant text not null,
    store text not null,
    id text not null,
    filename text not null,
    hash bytea not null,
    size bigint not null,
    language regconfig not null,
    attributes jsonb not null,
    added_at timestamptz not null default now(),
    primary key (tenant, store, id),
    unique (tenant, store, filename),
    unique (tenant, store, hash)
);
create table if not exists files.chunks (
    tenant text not null,
    store text not null,
    document_id text not null,
    position integer not null,
    heading text not null,
    body text not null,
    words tsvector not null,
    primary key (tenant, store, document_id, position),
    foreign key (tenant, store, document_id) references files.documents on delete cascade
);
create index if not exists chunks_words_idx on files.chunks using gin (words);
"""

INSERT_CHUNK = """
insert into files.chunks (tenant, store, document_id, position, heading, body, words)
values ($1, $2, $3, $4, $5, $6,
    setweight(to_tsvector($7::text::regconfig, $8), 'A') || to_tsvector($7::text::regconfig, $9))
"""

# Each document is searched in its own language. $3 is the query's words, $4 its exclusions, $5 the limit.
SEARCH = """
with languages as (select distinct language from files.documents where tenant = $1 and store = any($2)),
wanted as (select language, {words} as words from languages where numnode(plainto_tsquery(language, $3)) > 0),
asked as materialized (select language, words, words && websearch_to_tsquery(language, $4) as query from wanted)
select d.id, d.filename, d.attributes, c.position, c.heading, c.body,
    ts_rank('{{0.3, 0.3, 0.6, 1.0}}', c.words, asked.words) as rank
from asked
join files.chunks c on c.words @@ asked.query and c.tenant = $1 and c.store = any($2)
join files.documents d on d.tenant = c.tenant and d.store = c.store and d.id = c.document_id and d.language = asked.language
where {filter}
order by rank desc, d.filename, c.position
limit $5
"""
ALL_WORDS = "websearch_to_tsquery(language, $3)"
ANY_WORD = "replace(plainto_tsquery(language, $3)::text, ''' & ''', ''' | ''')::tsquery"
EXCLUDED = re.compile(r'(?<!\S)-(?:"[^"]*"?|\S+)')

Outcome = Literal["added", "replaced", "updated", "unchanged", "duplicate"]


class BadFilter(Exception):
    """An invalid filter on attributes; the message is the reason."""


@dataclass(frozen=True)
class Stored:
    """A file of a store."""

    id: str
    filename: str
    size: int
    chunks: int
    added_at: datetime
    attributes: dict[str, Any]


@dataclass(frozen=True)
class Hit:
    """A matching chunk; the score is above 0 and below 1."""

    file_id: str
    filename: str
    score: float
    heading: str
    text: str
    attributes: dict[str, Any]


class Index:
    """The files of all tenants."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def add(
        self, tenant: str, store: str, filename: str, content: bytes, *, language: str, attributes: Mapping[str, Any]
    ) -> tuple[Outcome, str]:
        """Add a file, or replace the one of that name; returns the outcome and the file's id.

        A store has each content once: with `duplicate` the id is that of the file with this content and another name. Searches
        see the old file or the new one, never parts of both. Raises UnreadableFile, and asyncpg.UndefinedObjectError for a
        language that Postgres has no text search configuration for.
        """
        found = chunks(filename, content)
        hash = hashlib.sha256(f"{language}\n".encode() + content).digest()
        wanted = json.dumps(attributes)
        async with self._pool.acquire() as connection, connection.transaction():
            await connection.execute(
                "select pg_advisory_xact_lock(hashtextextended($1, 0))", json.dumps(["files", tenant, store])
            )
            known = await connection.fetch(
                """select id, filename, hash, attributes = $5::jsonb as same_attributes from files.documents
                where tenant = $1 and store = $2 and (filename = $3 or hash = $4)""",
                *(tenant, store, filename, hash, wanted),
            )
            older = next((row for row in known if row["filename"] == filename), None)
            same = next((row for row in known if row["hash"] == hash), None)
            if older and older == same:
                if older["same_attributes"]:
                    return "unchanged", older["id"]
                await connection.execute(
                    "update files.documents set attributes = $4::jsonb where tenant = $1 and store = $2 and id = $3",
                    *(tenant, store, older["id"], wanted),
                )
                return "updated", older["id"]
            if older:
                await connection.execute(
                    "delete from files.documents where tenant = $1 and store = $2 and id = $3",
                    tenant,
                    store,
                    older["id"],
                )
            if same:
                return "duplicate", same["id"]
            id = older["id"] if older else f"file-{secrets.token_hex(12)}"
            await connection.execute(
                """insert into files.documents (tenant, store, id, filename, hash, size, language, attributes)
                values ($1, $2, $3, $4, $5, $6, $7::text::regconfig, $8::jsonb)""",
                *(tenant, store, id, filename, hash, len(content), language, wanted),
            )
            rows = [
                (
                    *(tenant, store, id, position, chunk.heading, chunk.text, language),
                    *(searchable(f"{filename} {chunk.heading}"), searchable(chunk.text)),
                )
                for position, chunk in enumerate(found)
            ]
            await connection.executemany(INSERT_CHUNK, rows)
            return "replaced" if older else "added", id

    async def files(self, tenant: str, store: str) -> list[Stored]:
        """The files of a store, by name."""
        rows = await self._pool.fetch(
            """select id, filename, size, added_at, attributes, (select count(*) from files.chunks c
                where c.tenant = d.tenant and c.store = d.store and c.document_id = d.id) as chunks
            from files.documents d where tenant = $1 and store = $2 order by filename""",
            *(tenant, store),
        )
        return [Stored(**{**row, "attributes": json.loads(row["attributes"])}) for row in rows]

    async def remove(self, tenant: str, store: str, name: str) -> bool:
        """Remove a file by name or id; False if there is none."""
        removed = await self._pool.fetch(
            "delete from files.documents where tenant = $1 and store = $2 and (filename = $3 or id = $3) returning id",
            *(tenant, store, name),
        )
        return bool(removed)

    async def search(
        self,
        tenant: str,
        stores: Sequence[str],
        queries: Sequence[str],
        *,
        limit: int,
        filters: Mapping[str, Any] | None = None,
    ) -> list[Hit]:
        """The chunks that match any of the queries best, best first. Raises BadFilter.

        A query may have "phrases", -exclusions and OR. If no chunk has all of its words, chunks with some of them match.
        """
        best: dict[tuple[str, int], Hit] = {}
        async with self._pool.acquire() as connection:
            for query in queries:
                for row, score in await _search(connection, tenant, stores, query, limit, filters):
                    key = (row["id"], row["position"])
                    if key not in best or best[key].score < score:
                        attributes = json.loads(row["attributes"])
                        best[key] = Hit(row["id"], row["filename"], score, row["heading"], row["body"], attributes)
        return sorted(best.values(), key=lambda hit: -hit.score)[:limit]


async def _search(
    connection: Any,
    tenant: str,
    stores: Sequence[str],
    query: str,
    limit: int,
    filters: Mapping[str, Any] | None,
) -> list[tuple[Mapping[str, Any], float]]:
    """The rows that one query finds, with their scores."""
    asked = searchable(query[:QUERY_CHARS_MAX])
    excluded = " ".join(EXCLUDED.findall(asked))
    binds: list[Any] = [tenant, list(stores), EXCLUDED.sub(" ", asked), excluded, limit]
    condition = "true" if filters is None else filter_sql(filters, binds)
    for words, worth in ((ALL_WORDS, 1.0), (ANY_WORD, LOOSE_WORTH)):
        sql = SEARCH.format(words=words, filter=condition)
        if rows := await connection.fetch(sql, *binds):
            return [(row, worth * row["rank"] / (row["rank"] + 0.2)) for row in rows]
    return []


@asynccontextmanager
async def opened(database_url: str) -> AsyncIterator[Index]:
    """The index of a database; creates its schema if needed. Raises OSError, asyncpg.PostgresError, ValueError."""
    url = re.sub(r"^postgres(ql)?(\+\w+)?://", "postgresql://", database_url)
    async with asyncpg.create_pool(
        url, min_size=1, max_size=4, timeout=TIMEOUT_S, command_timeout=TIMEOUT_S, server_settings={"jit": "off"}
    ) as pool:
        async with pool.acquire() as connection, connection.transaction():
            await connection.execute("select pg_advisory_xact_lock(hashtextextended('files', 0))")
            if await connection.fetchval("select to_regclass('files.chunks_words_idx')") is None:
                await connection.execute(SCHEMA)
        yield Index(pool)


# -- filters ----------------------------------------------------------------------------------------------------------------

COMPARISONS = {"eq": "=", "ne": "<>", "gt": ">", "gte": ">=", "lt": "<", "lte": "<="}


def filter_sql(given: Any, binds: list[Any], depth: int = 0) -> str:
    """The SQL condition for a filter of the API; its values are appended to `binds`. Raises BadFilter.

    A comparison is `{"type": "eq", "key": "year", "value": 2024}`, with eq, ne, gt, gte, lt, lte, in and nin; a compound is
    `{"type": "and", "filters": […]}`, with and, or. A file without the attribute matches only `ne` and `nin`.
    """
    if depth > FILTER_DEPTH_MAX or not isinstance(given, Mapping):
        raise BadFilter("a filter is an object, and not too deep.")
    kind, key, value = given.get("type"), given.get("key"), given.get("value")
    if kind in ("and", "or"):
        inner = given.get("filters")
        if not isinstance(inner, list) or not inner or len(inner) > 100:
            raise BadFilter(f"{kind} needs a list of filters.")
        return "(" + f" {kind} ".join(filter_sql(one, binds, depth + 1) for one in inner) + ")"
    several = kind in ("in", "nin")
    if not isinstance(kind, str) or not (several or kind in COMPARISONS) or not isinstance(key, str):
        raise BadFilter("a comparison has a type (eq, ne, gt, gte, lt, lte, in, nin), a key and a value.")
    values = value if several else [value]
    if not isinstance(values, list) or not all(isinstance(one, str | int | float) for one in values):
        raise BadFilter(f"the value of {key!r} must be a string, a number, a boolean{' or a list' * several}.")
    if "\0" in json.dumps([key, values], ensure_ascii=False) or "\\u0000" in json.dumps([key, values]):
        raise BadFilter("a filter has no null characters.")
    binds += [key, json.dumps(values if several else value)]
    attribute, bind = f"(d.attributes -> ${len(binds) - 1}::text)", f"${len(binds)}::text::jsonb"
    if several:
        inside = f"coalesce({bind} @> jsonb_build_array({attribute}), false)"
        return inside if kind == "in" else f"(not {inside})"
    same_kind = f"jsonb_typeof({attribute}) = jsonb_typeof({bind})"
    if kind == "ne":
        return f"({attribute} is distinct from {bind})"
    return f"coalesce({same_kind} and {attribute} {COMPARISONS[kind]} {bind}, false)"
