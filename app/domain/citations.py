"""Citations: where a message names what was found for it.

A model is shown search results with their addresses and names, and cites by writing them. A result's address in a text, alone
or as a Markdown link, becomes a `url_citation` of that span; a file's name becomes a `file_citation`.
"""

import re
from collections.abc import Iterable, Mapping

from msgspec import Struct

from app.wire.decoding import Json
from app.wire.items import AnyItem, FileSearchCall, WebSearchCall


class Sources(Struct, frozen=True):
    """What may be cited: titles by URL, file ids by file name."""

    urls: Mapping[str, str] = {}
    files: Mapping[str, str] = {}

    def cited(self, text: str) -> list[Json]:
        """The annotations of a text, in the order of its characters."""
        if not self.urls and not self.files:
            return []
        found = [(start, end, self._annotation(named, start, end)) for start, end, named in self._spans(text)]
        return [annotation for _, _, annotation in sorted(found, key=lambda one: one[:2])]

    def _spans(self, text: str) -> Iterable[tuple[int, int, str]]:
        names = sorted((*self.urls, *self.files), key=len, reverse=True)
        known = "|".join(re.escape(name) for name in names)
        # A link is cited as a whole, and has no bracket inside, or this would be quadratic; behind a bare address may follow what is not part of a longer one.
        pattern = rf"\[[^\[\]\n]*\]\((?P<link>{known})\)|(?P<bare>{known})(?![\w/])"
        for match in re.finditer(pattern, text):
            yield match.start(), match.end(), match["link"] or match["bare"]

    def _annotation(self, named: str, start: int, end: int) -> Json:
        if named in self.urls:
            title = self.urls[named]
            return {"type": "url_citation", "url": named, "title": title, "start_index": start, "end_index": end}
        return {"type": "file_citation", "file_id": self.files[named], "filename": named, "index": start}


NO_SOURCES = Sources()
"""Nothing was searched."""


def sources_of(items: Iterable[AnyItem]) -> Sources:
    """What the searches of a context have found."""
    urls: dict[str, str] = {}
    files: dict[str, str] = {}
    for item in items:
        match item:
            case WebSearchCall(results=[*results]):
                urls |= {str(one["url"]): str(one.get("title", "")) for one in results if one.get("url")}
            case FileSearchCall(results=[*results]):
                files |= {str(one["filename"]): str(one.get("file_id", "")) for one in results if one.get("filename")}
    return Sources(urls, files) if urls or files else NO_SOURCES
