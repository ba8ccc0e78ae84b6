"""What a list costs, whatever it asks for: rows looked at, counted by Postgres itself, must follow the page and not the table."""

import asyncio
import subprocess
import sys
from collections import Counter
from itertools import combinations
from typing import Any

import asyncpg
import msgspec
import pytest

from app import migrate
from app.errors import InvalidParameter
from app.storage.database import Query, Tx
from app.storage.pages import BYTES_MAX
from app.storage.responses import Filter, list_responses
from tests.servers import ROOT
from tests.storage.plans import looked_at, nodes

BEGIN = 1_750_000_000
RESPONSES = 6_000
LIMIT = 20
STATUSES = 6
READ_MAX = 6 * LIMIT
"""Each shown response is read in `facets`, in `responses` and perhaps in `items`; and each range is begun."""

FILL = f"""
insert into responses (tenant_id, id, thread_id, turn, status, background, model, metadata, created_at, body)
select 't', 'resp_' || lpad(to_hex(({BEGIN} + i)::bigint * 1000), 12, '0') || lpad(i::text, 24, '0'), 'thread_' || i, 1,
       case when i % 3 = 0 then 'failed' when i % 3000 = 1 then 'cancelled' when i > 5000 then 'in_progress' else 'completed' end,
       i > 5990, case when i % 2 = 0 then 'even' when i % 1000 = 1 then 'seldom' else 'odd' end,
       jsonb_build_object('half', case when i <= 3000 then 'first' else 'second' end, 'user', 'u' || i % 1000,
                          'kind', case when i % 3 = 0 then 'third' else 'other' end),
       {BEGIN} + i, '{{}}'
from generate_series(1, {RESPONSES}) i;
insert into items (tenant_id, thread_id, turn, position, id, body)
select tenant_id, thread_id, 1, 1000000, 'msg_' || thread_id, '{{}}' from responses;
update responses set deleted_at = now() where created_at between {BEGIN + 2000} and {BEGIN + 4000};
"""

FRESH = """
select tenant_id, facet, created_at, id from responses cross join lateral facets_of(status, model, metadata) facet
where deleted_at is null and (background or status not in ('queued', 'in_progress'))
"""
KEPT = "select tenant_id, facet, created_at, response_id from facets"

FILTERS: dict[str, dict[str, Any]] = {
    "model=even": {"model": "even"},
    "model=none": {"model": "none"},
    "model=seldom": {"model": "seldom"},
    "status=completed": {"status": "completed"},
    "status=failed": {"status": "failed"},
    "status=cancelled": {"status": "cancelled"},
    "status=queued": {"status": "queued"},
    "status=in_progress": {"status": "in_progress"},
    "half=second": {"metadata": {"half": "second"}},
    "user=u7": {"metadata": {"user": "u7"}},
    "kind=other": {"metadata": {"kind": "other"}},
    "kind=none": {"metadata": {"kind": "none"}},
    "before": {"created_before": BEGIN + 4500},
    "after": {"created_after": BEGIN + 1500},
    "late": {"created_after": BEGIN + 9000},
}
PAIRS = [
    (one, other)
    for one, other in combinations(FILTERS, 2)
    if not FILTERS[one].keys() & FILTERS[other].keys() - {"metadata"}
    and not FILTERS[one].get("metadata", {}).keys() & FILTERS[other].get("metadata", {}).keys()
]


class Counting(Tx):
    """Runs statements, and counts what they look at."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        super().__init__(connection)
        self.rows: Counter[str] = Counter()

    async def all(self, query: Query, **binds: Any) -> Any:
        arguments = query.arguments(binds)
        plan = await self._connection.fetchval(f"explain (analyze, format json) {query.sql}", *arguments)
        (root,) = msgspec.json.decode(plan)
        every = list(nodes(root["Plan"]))
        for node in every:
            if "Relation Name" in node:
                self.rows[node["Relation Name"]] += looked_at(node)
        return await super().all(query, **binds)


def filter_of(*names: str) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name in names:
        for key, value in FILTERS[name].items():
            made[key] = {**made[key], **value} if key in made else value
    return made


def _made(i: int) -> dict[str, Any] | None:
    """The response of this number as FILL makes it; None if no list shows it."""
    status = "failed" if i % 3 == 0 else "cancelled" if i % 3000 == 1 else "in_progress" if i > 5000 else "completed"
    if 2000 <= i <= 4000 or (status == "in_progress" and i <= 5990):
        return None
    return {
        "status": status,
        "model": "even" if i % 2 == 0 else "seldom" if i % 1000 == 1 else "odd",
        "half": "first" if i <= 3000 else "second",
        "user": f"u{i % 1000}",
        "kind": "third" if i % 3 == 0 else "other",
    }


MADE = {i: frozenset(made.items()) for i in range(1, RESPONSES + 1) if (made := _made(i))}


def expected(ids: dict[int, str], order: str, after: int | None, filter: dict[str, Any]) -> list[str]:
    """What a list shows, worked out from how the rows are made."""
    wanted = {
        *filter.get("metadata", {}).items(),
        *((key, filter[key]) for key in ("model", "status") if key in filter),
    }
    first, last = filter.get("created_after", BEGIN) - BEGIN, filter.get("created_before", 2**62) - BEGIN
    if after is not None:
        first, last = (max(first, after + 1), last) if order == "asc" else (first, min(last, after - 1))
    shown = [ids[i] for i, made in MADE.items() if first <= i <= last and wanted <= made]
    return shown if order == "asc" else shown[::-1]


async def page_of(tx: Tx, filter: Filter, **options: Any) -> tuple[list[str], bool]:
    """The ids that a page shows, and whether others follow."""
    asked = {"after": None, "limit": LIMIT, "order": "desc", "page_bytes": BYTES_MAX, **options}
    _, page = await list_responses(tx, "t", filter, bytes_max=BYTES_MAX, **asked)
    assert page
    return [id for id, _ in page.rows], page.has_more


async def bytes_of_ten(connection: asyncpg.Connection) -> int:
    """What ten responses take; each takes the same."""
    unbounded = {"page_bytes": BYTES_MAX, "bytes_max": BYTES_MAX}
    size, _ = await list_responses(Tx(connection), "t", Filter(), after=None, limit=10, order="asc", **unbounded)
    return size


@pytest.fixture
def new_url(servers):
    """A database without any tables."""
    asyncio.run(_execute(servers.database_url, "create database test_migrated"))
    return servers.database_url.replace("@/postgres?", "@/test_migrated?")


@pytest.fixture(scope="module")
async def listed(url):
    """Thousands of responses of one tenant; many are deleted, many are foreground ones in the making."""
    connection = await asyncpg.connect(url, server_settings={"jit": "off"})
    await connection.execute(FILL)
    yield connection
    await connection.close()


@pytest.fixture(scope="module")
async def ids(listed):
    """The numbers of the responses, and their ids."""
    return {row["i"]: row["id"] for row in await listed.fetch(f"select created_at - {BEGIN} as i, id from responses")}


@pytest.fixture(scope="module", params=["unknown", "known"])
async def planned(request, listed):
    """Generic plans before the first statistics, and with them."""
    if request.param == "known":
        await listed.execute("vacuum analyze")
    await listed.execute("set plan_cache_mode = force_generic_plan")
    return listed


@pytest.mark.parametrize("names", [(), *((name,) for name in FILTERS), *PAIRS], ids=" and ".join)
async def test_a_list_reads_what_it_shows(planned, ids, names):
    filter = filter_of(*names)
    for order, cursor in (("asc", None), ("asc", 1000), ("desc", None), ("desc", 5000)):
        tx = Counting(planned)
        after = ids[cursor] if cursor else None
        shown, has_more = await page_of(tx, Filter(**filter), after=after, order=order)
        wanted = expected(ids, order, cursor, filter)
        assert (shown, has_more) == (wanted[:LIMIT], len(wanted) > LIMIT)
        assert tx.rows.total() <= READ_MAX


async def test_more_filters_than_two_are_all_kept(planned, ids):
    filter = {"model": "even", "status": "completed", "metadata": {"half": "first", "kind": "other"}}
    shown, _ = await page_of(Tx(planned), Filter(**filter))
    assert shown == expected(ids, "desc", None, filter)[:LIMIT]


async def test_a_page_ends_with_its_bytes(planned, ids):
    whole = expected(ids, "asc", None, {})[: 3 * LIMIT]
    size = await bytes_of_ten(planned)
    for page_bytes, most in ((1, 1), (size, 10), (size - 1, 9)):
        seen: list[str] = []
        for _ in range(3):
            tx = Counting(planned)
            after = seen[-1] if seen else None
            shown, has_more = await page_of(tx, Filter(), after=after, order="asc", page_bytes=page_bytes)
            assert (len(shown), has_more) == (most, True)
            assert tx.rows["items"] <= most + 1
            seen += shown
        assert seen == whole[: 3 * most]


async def test_a_page_for_which_there_is_no_room_is_measured(planned):
    size = await bytes_of_ten(planned)
    unbounded = {"after": None, "limit": 10, "order": "asc", "page_bytes": BYTES_MAX}
    assert await list_responses(Tx(planned), "t", Filter(), **unbounded, bytes_max=size - 1) == (size, None)


async def test_a_purged_cursor_still_has_its_place(planned, ids):
    gone = ids[1000][:-1] + "5"
    shown, _ = await page_of(Tx(planned), Filter(), after=gone, limit=2, order="asc")
    assert shown == [ids[1001], ids[1002]]


async def test_a_cursor_that_is_no_id_is_refused(planned):
    for cursor in ("resp_", "nothing", "resp_ß", "a\0"):
        with pytest.raises(InvalidParameter) as refused:
            await page_of(Tx(planned), Filter(), after=cursor)
        assert refused.value.param == "after"


async def test_facets_are_those_of_the_responses(listed):
    """Each change leaves what a fresh fill would make."""
    async with listed.transaction():
        await listed.execute("update responses set status = 'completed' where status = 'in_progress' and turn = 1")
        await listed.execute("delete from responses where created_at % 7 = 0")
        await listed.execute("update responses set body = '{}', status = status")
        for one, other in ((FRESH, KEPT), (KEPT, FRESH)):
            assert await listed.fetch(f"({one}) except ({other})") == []
        assert await listed.fetchval("select count(*) from facets") > 0


def test_responses_from_before_are_listed(new_url):
    """Two processes migrate at once, in a database that has responses already."""
    migrate.upgrade(new_url, "0006")
    asyncio.run(_execute(new_url, FILL))
    command = [sys.executable, "-c", "import sys; from app import migrate; migrate.upgrade(sys.argv[1])", new_url]
    both = [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    missing, odd = asyncio.run(_execute(new_url, f"({FRESH}) except ({KEPT})", f"({KEPT}) except ({FRESH})"))
    assert (missing, odd) == ([], [])


async def _execute(url: str, *statements: str) -> list[list[asyncpg.Record]]:
    connection = await asyncpg.connect(url)
    try:
        if len(statements) == 1:
            await connection.execute(statements[0])
            return []
        return [await connection.fetch(statement) for statement in statements]
    finally:
        await connection.close()
