"""A file's bytes → chunks of text for search; pure."""

import codecs
import csv
import io
import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import PurePosixPath
from typing import Any

CHUNK_CHARS = 1600
OVERLAP_CHARS = 200

HTML = {".html", ".htm", ".xhtml"}
MARKDOWN = {".md", ".markdown", ".mdx"}
TABLES = {".csv": ",", ".tsv": "\t"}
BINARY = {
    b"%PDF-": "is a PDF: convert it first, for example with pdftotext",
    b"PK\x03\x04": "is an archive or an office document: export it as text first",
    b"\x1f\x8b": "is compressed: unpack it first",
}
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
CONTROL = re.compile(r"[\0-\x08\x0b\x0e-\x1a\x1c-\x1f\x7f]")
HEADING = re.compile(r"(#{1,6})\s+(.*?)\s*#*\s*$")
FENCE = re.compile(r"\s*(```|~~~)")

ODD_CHARACTER = re.compile(r"[^\w\s\x00-\x7f]")  # punctuation, symbols, and the marks of some scripts
# Scripts without spaces between words; Postgres parses a run of them as one word.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff]+"
)
# Postgres parses a path, a host name or a version as one word, so its parts are not found.
INNER_PUNCTUATION = re.compile(r"(?<=\w)[./\\@:_=]+(?=\w)")


class UnreadableFile(Exception):
    """The file is not readable text; the message is a predicate for the file's name."""


@dataclass(frozen=True)
class Chunk:
    """A piece of a file: at most CHUNK_CHARS of text, and the headings above it, outermost first."""

    heading: str
    text: str


def chunks(name: str, content: bytes) -> list[Chunk]:
    """A file's text as overlapping chunks. Raises UnreadableFile."""
    if name != storable(name):
        raise UnreadableFile("has a name that is no text")
    suffix = PurePosixPath(name).suffix.lower()
    text = decoded(content)
    try:
        if suffix in HTML:
            text = html_text(text)
        elif suffix in TABLES:
            text = table_text(text, TABLES[suffix])
        elif suffix == ".json":
            text = "\n".join(json_lines(json.loads(text)))
        elif suffix in (".jsonl", ".ndjson"):
            text = "\n\n".join("\n".join(json_lines(json.loads(line))) for line in text.splitlines() if line.strip())
    except (ValueError, RecursionError, csv.Error) as error:
        raise UnreadableFile(f"is no valid {suffix.removeprefix('.')}: {error}") from error
    text = storable(text)
    parts = sections(text) if suffix in MARKDOWN | HTML else [("", text)]
    return [Chunk(heading, piece) for heading, part in parts for piece in pieces(part)]


def storable(text: str) -> str:
    """The text without null characters and lone surrogates, which Postgres can't store."""
    return text.encode(errors="replace").decode().replace("\0", "\ufffd")


def decoded(content: bytes) -> str:
    """The text of bytes: UTF-8, UTF-16 with a BOM, else Windows-1252. Raises UnreadableFile."""
    for beginning, why in BINARY.items():
        if content.startswith(beginning):
            raise UnreadableFile(why)
    marked = next((encoding for mark, encoding in MARKS.items() if content.startswith(mark)), None)
    for encoding in (marked,) if marked else ("utf-8", "cp1252"):
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError:
            continue
        if not CONTROL.search(text):
            return text.replace("\r\n", "\n")
    raise UnreadableFile("is no text that can be read: it is binary, or in an unknown encoding")


# -- kinds of files ---------------------------------------------------------------------------------------------------------


class _Text(HTMLParser):
    """Collects the visible text of a page, with Markdown headings."""

    SILENT = frozenset({"script", "style", "template", "svg"})
    BLOCKS = frozenset(
        "p div section article header footer main aside nav ul ol li table tr pre blockquote dl dt dd form hr figure".split()
    )

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.silent: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.SILENT:
            self.silent.append(tag)
        elif re.fullmatch("h[1-6]", tag):
            self.parts.append(f"\n\n{'#' * int(tag[1])} ")
        elif tag == "title":
            self.parts.append("\n\n# ")
        elif tag == "br":
            self.parts.append("\n")
        elif tag in ("td", "th"):
            self.parts.append(" | ")
        elif tag in self.BLOCKS:
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.silent:
            del self.silent[self.silent.index(tag) :]
        elif tag in self.BLOCKS or tag == "title" or re.fullmatch("h[1-6]", tag):
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self.silent:
            self.parts.append(re.sub(r"\s+", " ", data))


def html_text(page: str) -> str:
    """The visible text of a page, with Markdown headings."""
    parser = _Text()
    parser.feed(page)
    parser.close()
    lines = "".join(parser.parts).split("\n")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line.strip() for line in lines)).strip()


def table_text(table: str, delimiter: str) -> str:
    """A table with the column's name before each value, so that each row is clear without the header."""
    rows = csv.reader(io.StringIO(table), delimiter=delimiter)
    names = next(rows, [])
    return "\n".join(
        "; ".join(f"{names[n]}: {value}" if n < len(names) else value for n, value in enumerate(row) if value)
        for row in rows
    ) or delimiter.join(names)


def json_lines(value: Any, path: str = "") -> Iterator[str]:
    """A line for each value, with its path before it."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from json_lines(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and value:
        for number, inner in enumerate(value):
            yield from json_lines(inner, f"{path}[{number}]")
    else:
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        yield f"{path}: {shown}" if path else shown


# -- pieces -----------------------------------------------------------------------------------------------------------------


def sections(text: str) -> Iterator[tuple[str, str]]:
    """The sections of a Markdown text, each with the headings above it."""
    above: list[tuple[int, str]] = []
    lines: list[str] = []
    fenced = False
    for line in text.splitlines():
        fenced ^= bool(FENCE.match(line))
        found = None if fenced else HEADING.match(line)
        if found:
            yield " › ".join(title for _, title in above), "\n".join(lines)
            level = len(found[1])
            above = [*((outer, title) for outer, title in above if outer < level), (level, found[2])]
            lines = []
        else:
            lines.append(line)
    yield " › ".join(title for _, title in above), "\n".join(lines)


def pieces(text: str) -> Iterator[str]:
    """A text in pieces of at most CHUNK_CHARS that overlap, cut where a paragraph, a line, a sentence or a word ends."""
    text = text.strip()
    start = 0
    while start < len(text):
        end = start + CHUNK_CHARS
        if end >= len(text):
            yield text[start:]
            return
        least = start + CHUNK_CHARS // 2
        cuts = (text.rfind(mark, least, end) + len(mark) for mark in ("\n\n", "\n", ". ", " "))
        end = next((cut for cut in cuts if cut > least), end)
        yield text[start:end].rstrip()
        back = end - OVERLAP_CHARS
        word = re.compile(r"\s").search(text, back, end - 1)
        start = word.end() if word else back
        while start < len(text) and text[start].isspace():
            start += 1


# -- words ------------------------------------------------------------------------------------------------------------------


def searchable(text: str) -> str:
    """A text or a query, normalized alike, so that Postgres finds its words."""
    # Which characters are letters to Postgres depends on the database's locale: in "C" only ASCII.
    text = unicodedata.normalize("NFKC", storable(text)).casefold()
    text = ODD_CHARACTER.sub(lambda found: found[0] if unicodedata.category(found[0])[0] == "M" else " ", text)
    text = INNER_PUNCTUATION.sub(" ", CONTROL.sub(" ", text))
    return UNSPACED.sub(in_pairs, text)


def in_pairs(found: re.Match[str]) -> str:
    """The bigrams of an unspaced run, as words; after a minus as one phrase, so that the phrase is excluded."""
    run = found[0]
    words = " ".join(run[n : n + 2] for n in range(max(len(run) - 1, 1)))
    return f'"{words}" ' if found.string[: found.start()].endswith("-") else f" {words} "
