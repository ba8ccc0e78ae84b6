"""Citations: where a message names what was found for it."""

import time

import pytest

from app.domain.citations import NO_SOURCES, sources_of
from tests.unit.build import item

SEARCHED = {
    "type": "web_search_call",
    "id": "ws_1",
    "status": "completed",
    "action": {"type": "search", "query": "x"},
    "results": [
        {"url": "https://a.example/b", "title": "B"},
        {"url": "https://a.example", "title": "A"},
        {"text": "x"},
    ],
}
FOUND = {
    "type": "file_search_call",
    "id": "fs_1",
    "status": "completed",
    "queries": ["x"],
    "results": [{"file_id": "file_1", "filename": "plan.md"}],
}
SOURCES = sources_of([item(SEARCHED), item(FOUND)])


@pytest.mark.parametrize(
    ("text", "cited"),
    [
        ("Nothing.", []),
        ("See https://a.example/b.", ["https://a.example/b"]),
        ("See https://a.example/bc.", []),
        ("[B](https://a.example/b), [A](https://a.example)", ["[B](https://a.example/b)", "[A](https://a.example)"]),
        ("[[B](https://a.example/b)]", ["[B](https://a.example/b)"]),
        ("says 【plan.md】 and plan.md", ["plan.md", "plan.md"]),
        ("[" * 100_000, []),
    ],
)
def test_what_is_cited(text: str, cited: list[str]):
    found = SOURCES.cited(text)
    spans = [text[one.get("start_index", one.get("index")) :] for one in found]
    assert [span[: len(name)] for span, name in zip(spans, cited, strict=True)] == cited
    assert [one["end_index"] - one["start_index"] for one in found if one["type"] == "url_citation"] == [
        len(name) for name in cited if name != "plan.md"
    ]


def test_a_citation_names_its_source():
    web, file = SOURCES.cited("https://a.example/b plan.md")
    assert web == {
        "type": "url_citation",
        "url": "https://a.example/b",
        "title": "B",
        "start_index": 0,
        "end_index": 19,
    }
    assert file == {"type": "file_citation", "file_id": "file_1", "filename": "plan.md", "index": 20}


def test_sources_are_prepared_once_for_all_texts():
    results = [{"url": f"https://a.example/{at:0100}"} for at in range(2000)]
    sources = sources_of([item({**SEARCHED, "results": results})])

    def seconds(texts: int) -> float:
        begun = time.process_time()
        assert not any(sources.cited("Nothing.") for _ in range(texts))
        return time.process_time() - begun

    assert seconds(1) * 10 > seconds(50)


def test_without_searches_nothing_is_cited():
    assert sources_of([]) is NO_SOURCES
    assert NO_SOURCES.cited("https://a.example/b") == []
