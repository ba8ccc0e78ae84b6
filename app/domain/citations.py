"""Citations: where a message names a search result.

A model reads search results with their addresses and names, and cites by writing them. A result's address in a text, alone
or as a Markdown link, becomes a `url_citation` of that span; a file's name becomes a `file_citation`.
"""

import re
from collections.abc import Iterable, Mapping
from functools import cached_property

from ahocorasick_rs import AhoCorasick, MatchKind
from msgspec import Raw, Struct

from app.wire.decoding import Json, json_object
from app.wire.items import AnyItem, FileSearchCall, WebSearchCall

NAMES_CHARS_MAX = 262_144
"""Addresses and file names that are searched for in a text, in characters: some thousands of names, for which building the
automaton takes 50 ms."""

_LINK = re.compile(r"\[[^\[\]\n]*\]\(")
"""A link up to its address; without a bracket inside, or this would be quadratic."""
_GOES_ON = re.compile(r"[\w/]")


class Sources(Struct, frozen=True, dict=True):
    """What may be cited: titles by URL, file ids by file name."""

    urls: Mapping[str, str] = {}
    files: Mapping[str, str] = {}

    def cited(self, text: str) -> list[Json]:
        """The annotations of a text, in the order of its characters."""
        return [self._annotation(named, start, end) for start, end, named in self._spans(text)]

    def _spans(self, text: str) -> list[tuple[int, int, str]]:
        """A link is cited as a whole; a bare address must not be the beginning of a longer one."""
        names = self._names
        if not names:
            return []
        found = self._automaton.find_matches_as_indexes(text)
        links = {match.end(): match.start() for match in _LINK.finditer(text)} if found else {}
        spans: list[tuple[int, int, str]] = []
        for number, start, end in found:
            if start in links and text.startswith(")", end):
                while spans and spans[-1][0] >= links[start]:  # what the link's own text names
                    spans.pop()
                spans.append((links[start], end + 1, names[number]))
            elif not _GOES_ON.match(text, end):
                spans.append((start, end, names[number]))
        return spans

    @cached_property
    def _automaton(self) -> AhoCorasick:
        """Made once for all the texts of a turn."""
        return AhoCorasick(self._names, matchkind=MatchKind.LeftmostLongest)

    @cached_property
    def _names(self) -> list[str]:
        """The latest results, up to NAMES_CHARS_MAX."""
        left = NAMES_CHARS_MAX
        names: list[str] = []
        for name in reversed((*self.urls, *self.files)):
            left -= len(name)
            if left < 0:
                break
            names.append(name)
        return names

    def _annotation(self, named: str, start: int, end: int) -> Json:
        if named in self.urls:
            title = self.urls[named]
            return {"type": "url_citation", "url": named, "title": title, "start_index": start, "end_index": end}
        return {"type": "file_citation", "file_id": self.files[named], "filename": named, "index": start}


NO_SOURCES = Sources()
"""No search was made."""


def sources_of(items: Iterable[AnyItem]) -> Sources:
    """The results of the searches in a context."""
    urls: dict[str, str] = {}
    files: dict[str, str] = {}
    for item in items:
        match item:
            case WebSearchCall(results=[*results]):
                urls |= {str(one["url"]): str(one.get("title", "")) for one in results if one.get("url")}
            case FileSearchCall(results=[*results]):
                files |= {str(one["filename"]): str(one.get("file_id", "")) for one in results if one.get("filename")}
    return Sources(urls, files) if urls or files else NO_SOURCES


def cited_upstream(given: Raw) -> Json | None:
    """An annotation by a model with a search of its own, in the API's form; None for another kind."""
    annotation = json_object(bytes(given).decode()) or {}
    cited = annotation.get("url_citation", annotation)
    if annotation.get("type") != "url_citation" or not isinstance(cited, dict) or not isinstance(cited.get("url"), str):
        return None
    title, start, end = cited.get("title"), cited.get("start_index"), cited.get("end_index")
    return {
        "type": "url_citation",
        "url": cited["url"],
        "title": title if isinstance(title, str) else "",
        "start_index": start if isinstance(start, int) else 0,
        "end_index": end if isinstance(end, int) else 0,
    }
