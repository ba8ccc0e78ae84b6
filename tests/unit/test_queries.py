"""Every statement of the server names the tenant in each table that it touches, or says why it need not."""

import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from sqlalchemy import text

import app.api
import app.runs
import app.storage
from app.storage import database, notifications, redislog, tables

MODULES: list[ModuleType] = [
    importlib.import_module(found.name)
    for package in (app.storage, app.runs, app.api)
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
]

TABLES = "|".join(tables.metadata.tables)
NO_ALIAS = "on|where|set|left|right|inner|cross|join|order|group|limit|for|values|select|union|returning|using"
ACCESS = re.compile(
    rf"(?P<verb>\bfrom|\bjoin|\binto|\bupdate|\busing|,)\s+(?P<table>{TABLES})\b"
    rf"(?:\s+(?:as\s+)?(?!(?:{NO_ALIAS})\b)(?P<alias>[a-z_]\w*))?"
)
QUERY = re.compile(r"\b(?:select|insert|update|delete|with)\b")


def scopes(sql: str) -> Iterator[str]:
    """Each query and subquery by itself: what is in parentheses stays only where it is no query of its own."""
    stack = [""]
    for piece in re.split(r"([()])", sql):
        if piece == "(":
            stack.append("")
        elif piece == ")":
            inner = stack.pop()
            if QUERY.search(inner):
                yield from re.split(r"\bunion\b", inner)
                inner = ""
            stack[-1] += f"({inner})"
        else:
            stack[-1] += piece
    yield from re.split(r"\bunion\b", stack[0])


def strayed(sql: str, order: tuple[str, ...]) -> list[str]:
    """The accesses to tables that are not bound to the tenant; `order` names the binds `$1, $2, …`.

    A table is bound by `tenant_id = :tenant_id`, or by the tenant of a table around it; an insert by its columns.
    """
    sql = re.sub(r"--[^\n]*", "", sql).lower()
    numbers = "|".join(str(number) for number, name in enumerate(order, 1) if name == "tenant_id") or "no"
    bind = rf"\$(?:{numbers})\b"
    found = []
    for scope in scopes(sql):
        accesses = list(ACCESS.finditer(scope))
        for access in accesses:
            name = access["alias"] or access["table"]
            column = rf"\b{name}\.tenant_id" if len(accesses) > 1 else rf"(?:\b{name}\.|(?<![.\w]))tenant_id"
            bound = rf"{column}\s*=\s*(?:{bind}|(?!{name}\.)\w+\.tenant_id)"
            if access["verb"] == "into":
                bound = rf"\([^)]*\btenant_id\b[^)]*\)(?s:.*){bind}"
            if access["table"] == "tenants":  # its key is the tenant's id itself
                bound = rf"\(id\b[^)]*\)(?s:.*){bind}"
            if not re.search(bound, scope):
                found.append(f"{access[0]}: {' '.join(scope.split())}")
    return found


def test_the_statements_are_there():
    assert len(database.QUERIES) > 15
    touched = {table for query in database.QUERIES for table in tables.metadata.tables if table in query.sql}
    assert touched == tables.metadata.tables.keys() - {"part_uses"}  # triggers keep it


def test_no_statement_has_a_list_of_statuses_of_its_own():
    assert tables.IN_FLIGHT == "('in_progress', 'queued')"
    assert not [query.sql for query in database.QUERIES if "status in ('" in query.sql.replace(tables.IN_FLIGHT, "")]


@pytest.mark.parametrize(
    "query",
    sorted(database.QUERIES, key=lambda query: query.sql),  # their own order is that of imports
    ids=lambda query: " ".join(query.sql.split())[:60],
)
def test_a_statement_keeps_to_its_tenant_or_says_why_not(query):
    found = strayed(query.sql, tuple(query._order))
    if query.across_tenants is None:
        assert found == []
    else:
        assert len(query.across_tenants.split()) >= 3, "that is no reason"
        assert found or not re.search(TABLES, query.sql), "it needs no exception"


@pytest.mark.parametrize(
    ("sql", "strays"),
    [
        ("select body from responses where id = :id", 1),
        ("select body from responses where tenant_id = :id", 1),
        ("select body from responses where tenant_id = :tenant_id", 0),
        ("select body from responses r where r.tenant_id = :tenant_id", 0),
        ("select 1 from responses r join items i on i.id = r.id where r.tenant_id = :tenant_id", 1),
        ("select 1 from responses r, items i where r.tenant_id = :tenant_id", 1),
        ("select 1 from responses r join items i on i.tenant_id = :tenant_id where r.tenant_id = :tenant_id", 0),
        ("select 1 from responses where tenant_id = :tenant_id and exists (select from items)", 1),
        ("select 1 from responses where tenant_id = :tenant_id union all select 1 from items", 1),
        ("with x as (delete from items where tenant_id = :tenant_id) delete from runs where worker = :worker", 1),
        ("update responses set status = :status where id = :id", 1),
        ("insert into runs (response_id) values (:id)", 1),
        ("insert into runs (tenant_id, response_id) values (:tenant_id, :id)", 0),
        ("insert into runs (tenant_id, response_id) values (:other, :id)", 1),
    ],
)
def test_the_check_finds_what_strays(sql, strays):
    compiled = text(sql).compile(dialect=database._DIALECT)
    assert len(strayed(compiled.string, tuple(compiled.positiontup or ()))) == strays


def test_statements_stand_in_queries_only():
    """Nobody but the database module has a connection's `fetch` and `execute`, so the list is complete; Redis knows no SQL."""
    for module in MODULES:
        if module not in {database, notifications, redislog}:
            found = re.findall(r"(?<!self)\.(?:fetch|execute)\w*\(", Path(str(module.__file__)).read_text())
            assert found == [], module.__name__
