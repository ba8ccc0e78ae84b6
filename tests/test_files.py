"""The tool server behind file_search: what the operator puts in is found, by its tenant and nobody else."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mcp import Client
from mcp_types import CallToolResult, TextContent

from app.toolservers import texts
from tests.servers import ROOT, START_TIMEOUT_S
from tests.toolservers import OverHttp, over_stdio, program
from tests.waiting import fetch

GUIDE = """Preface.

# Guide

## Installing

Run the installer and follow the wizard's instructions.

```sh
# this is no heading
make install
```

## Flying

Pelicans glide over water; flying takes patience.
"""


@pytest.fixture(scope="module")
def database(new_database: Callable[[], str]) -> str:
    """A database that Reprise has too."""
    return new_database()


@pytest.fixture(scope="module")
def server(database: str) -> Iterator[OverHttp]:
    """The server that most tests share."""
    with OverHttp(program("files", "--database", database)) as running:
        yield running


@pytest.fixture
def operate(
    database: str, tmp_path: Path, request: pytest.FixtureRequest
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command of the operator; the store is the test's own."""

    def run(command: str, *arguments: str, tenant: str = "acme", store: str = "") -> subprocess.CompletedProcess[str]:
        store = store or store_of(request)
        line = program("files", "--database", database, command, "--tenant", tenant, "--store", store, *arguments)
        return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=START_TIMEOUT_S, check=False)

    return run


@pytest.fixture
def put(operate: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> Callable[..., list[str]]:
    """Writes files and adds them; what came of each."""

    def add(files: dict[str, str | bytes], *options: str, **where: str) -> list[str]:
        paths = []
        for name, content in files.items():
            path = tmp_path / "files" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
            paths.append(str(path))
        done = operate("add", *options, *paths, **where)
        assert done.returncode == 0, done.stderr
        return [line.split("\t")[0] for line in done.stdout.splitlines()]

    return add


@pytest.fixture
def search(server: OverHttp, request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Asks the server; the results."""

    async def ask(*queries: str, **arguments: Any) -> list[dict[str, Any]]:
        result = await call(server, {"queries": queries, "stores": [store_of(request)], "tenant": "acme", **arguments})
        assert not result.is_error, result.content
        assert result.structured_content is not None
        found: list[dict[str, Any]] = result.structured_content["results"]
        assert all(0 < one["score"] < 1 for one in found)
        assert found == sorted(found, key=lambda one: -one["score"])
        return found

    return ask


def store_of(request: pytest.FixtureRequest) -> str:
    return f"vs_{request.node.name}"


async def call(server: OverHttp, arguments: dict[str, Any]) -> CallToolResult:
    async with server.client() as client:
        result = await client.call_tool("search_files", arguments)
        assert isinstance(result, CallToolResult)
        return result


def text(result: CallToolResult) -> str:
    assert isinstance(result.content[0], TextContent)
    return result.content[0].text


def names(found: list[dict[str, Any]]) -> list[str]:
    return [one["filename"] for one in found]


# -- finding ----------------------------------------------------------------------------------------------------------------


async def test_it_works_over_stdio_and_http(
    put: Any, server: OverHttp, database: str, request: pytest.FixtureRequest
) -> None:
    assert put({"guide.md": GUIDE}, "--attribute", "year=2024", "--attribute", "kind=manual") == ["added"]
    arguments = {"queries": ["pelican patience"], "stores": [store_of(request)], "tenant": "acme"}
    for connection in (server.client(), Client(over_stdio("files", DATABASE_URL=database))):
        async with connection as client:
            (tool,) = (await client.list_tools()).tools
            assert tool.name == "search_files"
            assert tool.input_schema["required"] == ["queries", "stores", "tenant"]
            assert tool.output_schema is not None
            result = await client.call_tool("search_files", arguments)
            assert isinstance(result, CallToolResult)
            assert result.structured_content is not None
            (found,) = result.structured_content["results"]
            assert found["file_id"].startswith("file-")
            assert 0 < found["score"] < 1
            del found["file_id"], found["score"]
            assert found == {
                "filename": "guide.md",
                "text": "Guide › Flying\n\nPelicans glide over water; flying takes patience.",
                "attributes": {"year": 2024, "kind": "manual"},
            }
            assert text(result).startswith("[1] guide.md (file-")
            assert text(result).endswith("Pelicans glide over water; flying takes patience.")


async def test_the_best_comes_first(put: Any, search: Any) -> None:
    put(
        {
            "much.txt": "pelican pelican pelican, and again a pelican",
            "little.txt": "once a pelican came by, and then for a long time nothing worth telling happened",
            "name/pelican.txt": "a bird with a large beak",
            "other.txt": "an albatross",
        }
    )
    found = await search("pelican")
    assert names(found) == ["pelican.txt", "much.txt", "little.txt"]
    assert names(await search("pelican", max_results=1)) == ["pelican.txt"]
    assert {*names(await search("albatross", "nothing worth"))} == {"other.txt", "little.txt"}


async def test_what_has_some_of_the_words_is_found_if_nothing_has_all(put: Any, search: Any) -> None:
    put({"a.txt": "red apples and green pears", "b.txt": "green cars", "c.txt": "blue sky"})
    strict = await search("green pears")
    assert names(strict) == ["a.txt"]
    loose = await search("green pears on a volcano")
    assert names(loose) == ["a.txt", "b.txt"]
    assert loose[0]["score"] < strict[0]["score"]
    assert names(await search("green volcano -pears")) == ["b.txt"]  # what is excluded stays out
    assert await search("volcano -green") == []


async def test_long_files_are_found_in_pieces(put: Any, search: Any) -> None:
    sentences = [f"Sentence number {n} is about the word{n}x and nothing else." for n in range(400)]
    put({"long.txt": " ".join(sentences)})
    for n in (0, 199, 399):
        found = await search(f"word{n}x")
        assert found
        assert all(f"word{n}x" in one["text"] and len(one["text"]) <= texts.CHUNK_CHARS for one in found)
    assert len(await search("sentence", max_results=50)) > 10


async def test_many_kinds_of_files_are_read(put: Any, search: Any) -> None:
    page = """<html><head><title>Birds</title><style>p { color: hidden }</style><script>var hidden = 1</script></head>
    <body><h1>Water birds</h1><p>Peli<b>cans</b> &amp; co</p><h2>Diet</h2><ul><li>fish</li></ul></body></html>"""
    put(
        {
            "page.html": page,
            "table.csv": 'name,size\n"Pelican, great",170\ncormorant,90\n',
            "data.json": '{"birds": [{"name": "heron", "legs": 2}], "none": null, "odd": "a\\u0000b\\ud800"}',
            "lines.jsonl": '{"bird": "stork"}\n\n{"bird": "ibis"}\n',
            "code.py": "def load_chain(tx):\n    # reads app/storage/responses.py\n    return tx\n",
            "utf16.txt": "ein Eisvogel".encode("utf-16"),
            "old.txt": "Störche".encode("cp1252"),
            "empty.txt": "",
        }
    )
    (diet,) = await search("diet fish")
    assert diet["text"] == "Birds › Water birds › Diet\n\nfish" or diet["text"] == "Water birds › Diet\n\nfish"
    assert (await search("pelicans"))[0]["filename"] in ("page.html", "table.csv")
    assert await search("hidden") == []
    (row,) = await search("cormorant")
    assert row["text"] == "name: Pelican, great; size: 170\nname: cormorant; size: 90"
    assert "birds[0].name: heron\nbirds[0].legs: 2\nnone: null" in (await search("heron"))[0]["text"]
    for query, name in {
        "ibis": "lines.jsonl",
        "load_chain": "code.py",
        "chain": "code.py",
        "responses.py": "code.py",
        "storage": "code.py",
        "Eisvogel": "utf16.txt",
        "Störche": "old.txt",
    }.items():
        assert names(await search(query)) == [name], query


async def test_other_languages_are_found(put: Any, search: Any) -> None:
    put(
        {
            "ja.txt": "東京都で会議を開きました。",
            "zh.txt": "我们在北京开会",
            "th.txt": "การประชุมที่กรุงเทพ",
            "ru.txt": "Встреча в «Москве»…",
        }
    )
    put({"ru2.txt": "Большие самолёты летали"}, "--language", "russian")
    for query, name in {
        "東京都": "ja.txt",
        "会議": "ja.txt",
        '"東京都"': "ja.txt",
        "北京": "zh.txt",
        "กรุงเทพ": "th.txt",
        "встреча": "ru.txt",
        "МОСКВЕ": "ru.txt",
        "большой самолёт": "ru2.txt",
        "会议 会議": "ja.txt",
    }.items():
        assert names(await search(query)) == [name], query
    assert await search("-東京 会議") == []
    assert names(await search("ﾃｽﾄ OR Ｔｏｋｙｏ OR 北京")) == ["zh.txt"]


ODD = [
    "",
    "   ",
    "the of and",
    "-pelican",
    "-",
    '"',
    '"unclosed phrase',
    "pelican OR",
    "OR OR OR",
    "pelican & | ! <-> () :* \\",
    "'; drop schema files cascade; --",
    "$1 $2 {query} %s",
    "x" * 5000,
    "word " * 5000,
    "\0nul\0",
    "\U0001f9a9\u202e\ufeff",
    "' & ' | ''",
    "http://example.com/?a=1&b=2 1.2.3.4 me@example.com 1e400 -0",
    "--pelican",
]


async def test_odd_queries_are_answered(put: Any, search: Any) -> None:
    put({"a.txt": "pelican"})
    for query in ODD:
        assert names(await search(query, "pelican")) == ["a.txt"], query


async def test_operators_mean_what_they_say(put: Any, search: Any) -> None:
    put({"a.txt": "black coffee in a white cup", "b.txt": "white coffee", "c.txt": "green tea"})
    assert names(await search('"white coffee"')) == ["b.txt"]
    assert names(await search("coffee -cup")) == ["b.txt"]
    assert {*names(await search("tea OR cup"))} == {"a.txt", "c.txt"}
    assert names(await search('coffee -"white cup"')) == ["b.txt"]


FILTERS: list[tuple[dict[str, Any], list[str]]] = [
    ({"type": "eq", "key": "year", "value": 2023}, ["b"]),
    ({"type": "ne", "key": "year", "value": 2023}, ["a", "c"]),
    ({"type": "gte", "key": "year", "value": 2023}, ["a", "b"]),
    ({"type": "lt", "key": "year", "value": 2023.5}, ["b"]),
    ({"type": "gt", "key": "year", "value": "2000"}, []),
    ({"type": "in", "key": "year", "value": [2023, "x"]}, ["b"]),
    ({"type": "nin", "key": "year", "value": [2023]}, ["a", "c"]),
    ({"type": "eq", "key": "draft", "value": True}, ["a"]),
    ({"type": "eq", "key": "team", "value": 'it\'s "x"'}, ["c"]),
    (
        {
            "type": "or",
            "filters": [
                {"type": "and", "filters": [{"type": "eq", "key": "draft", "value": True}]},
                {"type": "eq", "key": "team", "value": 'it\'s "x"'},
            ],
        },
        ["a", "c"],
    ),
]


async def test_filters_on_attributes(put: Any, search: Any) -> None:
    put({"a": "pelican one"}, "--attribute", "year=2024", "--attribute", "draft=true")
    put({"b": "pelican two"}, "--attribute", "year=2023")
    put({"c": "pelican three"}, "--attribute", 'team=it\'s "x"')
    for filters, expected in FILTERS:
        assert sorted(names(await search("pelican", filters=filters))) == expected, filters


NO_FILTERS: list[dict[str, Any]] = [
    {},
    {"type": "eq"},
    {"type": "like", "key": "a", "value": "b"},
    {"type": "eq", "key": "a", "value": None},
    {"type": "eq", "key": "a", "value": ["b"]},
    {"type": "in", "key": "a", "value": "b"},
    {"type": "and", "filters": []},
    {"type": "and", "filters": ["a"]},
    {"type": "eq", "key": "\0", "value": "b"},
    {"type": ["eq"], "key": "a", "value": "b"},
]


async def test_filters_that_make_no_sense_are_refused(server: OverHttp) -> None:
    for filters in NO_FILTERS:
        result = await call(server, {"queries": ["a"], "stores": ["s"], "tenant": "acme", "filters": filters})
        assert result.is_error, filters
        assert any(word in text(result) for word in ("filter", "value", "comparison")), filters


async def test_a_filter_without_end_is_refused(server: OverHttp) -> None:
    filters: dict[str, Any] = {"type": "eq", "key": "a", "value": "b"}
    for _ in range(20):
        filters = {"type": "and", "filters": [filters]}
    result = await call(server, {"queries": ["a"], "stores": ["s"], "tenant": "acme", "filters": filters})
    assert "not too deep" in text(result)


# -- whose files ------------------------------------------------------------------------------------------------------------


async def test_tenants_and_stores_are_apart(put: Any, search: Any, request: pytest.FixtureRequest) -> None:
    own, other = store_of(request), store_of(request) + "_other"
    put({"mine.txt": "a pelican of acme"})
    put({"mine.txt": "a pelican of globex"}, tenant="globex")
    put({"second.txt": "another pelican of acme"}, store=other)
    assert [one["text"] for one in await search("pelican")] == ["a pelican of acme"]
    assert [one["text"] for one in await search("pelican", tenant="globex")] == ["a pelican of globex"]
    assert {*names(await search("pelican", stores=[own, other]))} == {"mine.txt", "second.txt"}
    assert names(await search("pelican", stores=[other])) == ["second.txt"]
    assert await search("pelican", tenant="initech", stores=[own, other]) == []
    assert await search("pelican", stores=["vs_unknown"]) == []
    assert await search("pelican", tenant="acme%") == []


@pytest.mark.parametrize(
    "change",
    [
        {"tenant": ""},
        {"stores": []},
        {"queries": []},
        {"queries": ["x"] * 17},
        {"max_results": 0},
        {"tenant": "a\0"},
        {"stores": ["\0"]},
    ],
)
async def test_calls_that_make_no_sense_are_refused(server: OverHttp, change: dict[str, Any]) -> None:
    assert (await call(server, {"queries": ["x"], "stores": ["s"], "tenant": "acme", **change})).is_error


async def test_a_tenant_must_be_named(server: OverHttp) -> None:
    assert (await call(server, {"queries": ["x"], "stores": ["s"]})).is_error


async def test_a_removed_file_is_not_found(put: Any, operate: Any, search: Any) -> None:
    put({"a.txt": "pelican a", "b.txt": "pelican b"})
    put({"a.txt": "pelican a"}, tenant="globex")
    (a,) = [one for one in await search("pelican") if one["filename"] == "a.txt"]
    assert operate("remove", "b.txt").returncode == 0
    assert names(await search("pelican")) == ["a.txt"]
    foreign = operate("remove", a["file_id"], tenant="globex")
    assert foreign.returncode == 1
    assert f"there is no {a['file_id']}" in foreign.stderr
    assert operate("remove", a["file_id"]).returncode == 0
    assert await search("pelican") == []
    assert names(await search("pelican", tenant="globex")) == ["a.txt"]


# -- keeping files ----------------------------------------------------------------------------------------------------------


async def test_the_same_content_is_kept_once(put: Any, operate: Any, search: Any) -> None:
    assert put({"a.txt": "pelican"}) == ["added"]
    assert put({"a.txt": "pelican"}) == ["unchanged"]
    assert put({"b.txt": "pelican"}) == ["duplicate"]
    assert names(await search("pelican")) == ["a.txt"]
    assert put({"a.txt": "pelican"}, "--attribute", "year=1") == ["updated"]
    assert [(one["filename"], one["attributes"]) for one in await search("pelican")] == [("a.txt", {"year": 1})]
    assert len(operate("list").stdout.splitlines()) == 1


async def test_a_changed_file_replaces_its_older_version(put: Any, operate: Any, search: Any, database: str) -> None:
    long = "\n\n".join(f"pelican paragraph {n} " + "with many words " * 20 for n in range(40))
    assert put({"a.txt": long, "b.txt": "heron"}) == ["added", "added"]
    before = operate("list").stdout.splitlines()
    assert put({"a.txt": "albatross"}) == ["replaced"]
    after = operate("list").stdout.splitlines()
    assert before[0].split("\t")[0] == after[0].split("\t")[0]  # it keeps its id
    assert int(before[0].split("\t")[3]) > 5
    assert after[0].split("\t")[1:4] == ["a.txt", "9", "1"]
    assert await search("pelican") == []
    assert names(await search("albatross")) == ["a.txt"]
    # What has become the same as another file is that other file from now on.
    assert put({"a.txt": "heron"}) == ["duplicate"]
    assert names(await search("heron")) == ["b.txt"]
    assert await search("albatross") == []
    orphans = "select count(*) from files.chunks c where not exists (select from files.documents d where d.id = c.document_id)"
    assert fetch_apart(database, orphans) == 0


def fetch_apart(database: str, sql: str) -> int:
    """One number, asked for outside the running loop."""
    import concurrent.futures

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        found: int = pool.submit(lambda: fetch(database, sql)[0][0]).result()
        return found


async def test_a_file_is_replaced_at_once(put: Any, search: Any, operate: Any, tmp_path: Path) -> None:
    """Searches during replacements see the old or the new file, whole, and never both or none."""
    import asyncio

    def version(n: int) -> str:
        return "\n\n".join(f"pelican version{n} " + "words to fill a piece " * 60 for _ in range(6))

    put({"a.txt": version(0)})
    pieces = len(await search("pelican", max_results=50))
    for n in (1, 2, 3):
        replacing = asyncio.create_task(asyncio.to_thread(put, {"a.txt": version(n)}))
        while not replacing.done():
            found = await search("pelican", max_results=50)
            seen = {word for one in found for word in one["text"].split() if word.startswith("version")}
            assert len(found) == pieces
            assert len(seen) == 1
        assert await replacing == ["replaced"]


async def test_adding_at_once_keeps_one(operate: Any, tmp_path: Path) -> None:
    import asyncio

    (tmp_path / "a.txt").write_text("pelican")
    done = await asyncio.gather(*(asyncio.to_thread(operate, "add", str(tmp_path / "a.txt")) for _ in range(4)))
    assert sorted(one.stdout.split("\t")[0] for one in done) == ["added", "unchanged", "unchanged", "unchanged"]


async def test_directories_are_added_without_hidden_files(operate: Any, tmp_path: Path, search: Any) -> None:
    for name in ("docs/a.md", "docs/deep/a.md", "docs/.git/config.txt", "docs/.hidden.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"pelican {name}")
    done = operate("add", str(tmp_path / "docs"))
    assert done.returncode == 0, done.stderr
    assert {*names(await search("pelican"))} == {"a.md", "deep/a.md"}
    clash = operate("add", str(tmp_path / "docs/a.md"), str(tmp_path / "docs/deep/a.md"))
    assert clash.returncode == 1
    assert "would both be a.md" in clash.stderr


async def test_what_is_no_text_is_refused_and_the_rest_is_added(operate: Any, tmp_path: Path, search: Any) -> None:
    bad = {
        "a.pdf": (b"%PDF-1.7\n", "is a PDF: convert it first"),
        "b.docx": (b"PK\x03\x04...", "is an archive or an office document"),
        "c.png": (b"\x89PNG\r\n\x1a\n\0\0", "is no text that can be read"),
        "d.json": (b"{", "is no valid json"),
        "e.jsonl": (b"{}\n[", "is no valid jsonl"),
        "f.gz": (b"\x1f\x8b\x08", "is compressed"),
    }
    for name, (content, _) in bad.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "good.txt").write_text("pelican")
    done = operate("add", *(str(tmp_path / name) for name in [*bad, "good.txt"]))
    assert done.returncode == 1
    assert done.stdout.endswith("good.txt\n")
    for line, (name, (_, why)) in zip(done.stderr.splitlines(), bad.items(), strict=True):
        assert line.startswith(f"{tmp_path / name} {why}")
    assert names(await search("pelican")) == ["good.txt"]


def test_operators_are_told_what_is_wrong(operate: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    assert (
        "Postgres knows no language klingon" in operate("add", "--language", "klingon", str(tmp_path / "a.txt")).stderr
    )
    assert "expected KEY=VALUE" in operate("add", "--attribute", "year", str(tmp_path / "a.txt")).stderr
    away = [*program("files", "--database", "postgresql://127.0.0.1:1/x")]
    done = subprocess.run(away, cwd=ROOT, capture_output=True, text=True, timeout=START_TIMEOUT_S, check=False)
    assert done.returncode == 1
    assert "the database can't be used" in done.stderr
    assert "Traceback" not in done.stderr


# -- pieces -----------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(1, 60), st.sampled_from([" ", "\n", "\n\n", ". ", ""])), max_size=300))
def test_pieces_cover_a_text_and_overlap(parts: list[tuple[int, str]]) -> None:
    whole = "".join(f"{n:04}" * length + mark for n, (length, mark) in enumerate(parts)).strip()
    end = 0
    for piece in texts.pieces(whole):
        assert 0 < len(piece) <= texts.CHUNK_CHARS
        start = whole.index(piece)
        assert not whole[end:start].strip()  # nothing but space is lost between pieces
        assert start >= end - texts.OVERLAP_CHARS
        end = start + len(piece)
    assert end == len(whole)


def test_a_piece_repeats_the_end_of_the_one_before() -> None:
    first, second, *_ = texts.pieces(" ".join(f"word{n}" for n in range(1000)))
    repeated = first[first.index(second[:50]) :]
    assert second.startswith(repeated)
    assert 150 < len(repeated) <= texts.OVERLAP_CHARS


def test_words_are_the_same_in_a_text_and_in_a_query() -> None:
    for text, words in {
        "«Größe» 1.2/b_c": "grösse 1 2 b c",
        "a\ud800b\0": "a?b",
        "東京": "東京",
        "東京都 -東京都": '東京 京都 -"東京 京都"',
        "นี่ हिन्दी": "นี ี่ हिन्दी",
    }.items():
        assert texts.searchable(text).split() == words.split()


def test_sections_keep_the_headings_above_them() -> None:
    assert [(heading, part.strip().splitlines()[:1]) for heading, part in texts.sections(GUIDE) if part.strip()] == [
        ("", ["Preface."]),
        ("Guide › Installing", ["Run the installer and follow the wizard's instructions."]),
        ("Guide › Flying", ["Pelicans glide over water; flying takes patience."]),
    ]
