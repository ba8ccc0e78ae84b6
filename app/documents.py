"""A PDF or office file → its text. A separate program, which `outbound/extraction.py` starts for each file: files are hostile.

    python -IBc BOOTSTRAP LIMITS < FILE

LIMITS is the JSON of `Limits`. Standard output gets a line of JSON, the `Outcome`, and then the text.
"""

import io
import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date, datetime, timedelta
from posixpath import dirname, join, normpath
from typing import IO, TypedDict
from xml.etree.ElementTree import Element
from zipfile import ZipFile

from defusedxml.ElementTree import iterparse

NICENESS = 10
"""Streams come first."""

Found = Iterator[tuple[str, str]]
"""The texts of pages, each with its heading, which may be empty."""


class Limits(TypedDict):
    """Limits of this process."""

    cpu_s: int
    memory_bytes: int
    bytes_max: int


class Outcome(TypedDict, total=False):
    """Either `fault`, a predicate for the file's name, or the other keys, and the CPU seconds that this process took."""

    cpu_s: float
    fault: str
    kind: str
    pages: int
    unit: str


class Unreadable(Exception):
    """The file has no text that can be read; the message is a predicate for its name."""


def main() -> None:
    """Read a file within limits."""
    limits: Limits = json.loads(sys.argv[1])
    confine(limits)
    try:
        outcome, text = read(sys.stdin.buffer.read(), limits["bytes_max"])
    except Unreadable as error:
        outcome, text = {"fault": str(error)}, b""
    except (MemoryError, RecursionError):
        outcome, text = {"fault": "takes too much memory to be read"}, b""
    except Exception:  # noqa: BLE001 the libraries raise whatever a damaged file leads to
        outcome, text = {"fault": "is damaged"}, b""
    outcome["cpu_s"] = time.process_time()
    sys.stdout.buffer.write(json.dumps(outcome).encode() + b"\n" + text)


def confine(limits: Limits) -> None:
    """Limit this process: no files, no children."""
    os.nice(NICENESS)
    resource.setrlimit(resource.RLIMIT_CPU, (limits["cpu_s"], limits["cpu_s"] + 1))
    resource.setrlimit(resource.RLIMIT_AS, (limits["memory_bytes"],) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def read(content: bytes, bytes_max: int) -> tuple[Outcome, bytes]:
    """What a file is, and its text, of at most so many bytes. Raises Unreadable, and what the libraries raise."""
    kind, unit, found = pdf(content) if content.startswith(b"%PDF-") else office(content)
    pages: list[str] = []
    size = 0
    is_empty = True
    for heading, text in found:
        is_empty = is_empty and not text.strip()
        pages.append(f"[{heading}]\n{text.strip()}" if heading else text.strip())
        size += len(pages[-1]) + 2
        if size > bytes_max:
            raise Unreadable(f"has more than {bytes_max} bytes of text")
    if is_empty:
        raise Unreadable("has no text: perhaps its pages are images")
    counted = len(pages) if unit else 0
    whole = "\n\n".join(pages).encode(errors="replace").replace(b"\0", b"?")
    if len(whole) > bytes_max:
        raise Unreadable(f"has more than {bytes_max} bytes of text")
    return {"kind": kind, "pages": counted, "unit": unit}, whole


# -- PDF --------------------------------------------------------------------------------------------------------------------


def pdf(content: bytes) -> tuple[str, str, Found]:
    """The pages of a PDF."""
    from pypdf import PasswordType, PdfReader  # takes 0.1 s, and office files do not need it

    reader = PdfReader(io.BytesIO(content))
    if reader.is_encrypted and reader.decrypt("") == PasswordType.NOT_DECRYPTED:
        raise Unreadable("is encrypted")
    return "PDF", "page", ((f"Page {number}", page.extract_text()) for number, page in enumerate(reader.pages, 1))


# -- Office files: XML in an archive ----------------------------------------------------------------------------------------


def office(content: bytes) -> tuple[str, str, Found]:
    """The text of a Word document, a spreadsheet or a presentation."""
    archive = ZipFile(io.BytesIO(content))
    names = set(archive.namelist())
    readers: dict[str, tuple[str, str, Callable[[ZipFile], Found]]] = {
        "word/document.xml": ("Word document", "", document),
        "xl/workbook.xml": ("spreadsheet", "sheet", workbook),
        "ppt/presentation.xml": ("presentation", "slide", presentation),
    }
    for name, (kind, unit, reader) in readers.items():
        if name in names:
            return kind, unit, reader(archive)
    raise Unreadable("is an archive, and no document")


def local(tag: str) -> str:
    """A tag's name without its namespace."""
    return tag.rpartition("}")[2]


def elements(file: IO[bytes]) -> Iterator[tuple[str, str, Element]]:
    """The events of an XML file, each with the tag's local name. An element that ended is emptied by the caller."""
    for event, element in iterparse(file, events=("start", "end"), forbid_dtd=True):
        yield event, local(element.tag), element


def relation(element: Element) -> str:
    """The id of the part that an element stands for: `r:id`, beside an `id` of its own."""
    return next((value for key, value in element.items() if key.startswith("{") and local(key) == "id"), "")


SIGNS = {"tab": "\t", "br": "\n", "cr": "\n", "p": "\n", "tc": "\t", "tr": "\n"}
"""What stands for the end of an element in a text."""


def prose(file: IO[bytes]) -> str:
    """The paragraphs of a document or a slide; cells of tables are separated by tabs."""
    made: list[str] = []
    inside = {"r": 0, "tc": 0, "Fallback": 0}
    for event, name, element in elements(file):
        if name in inside:
            inside[name] += 1 if event == "start" else -1
        if event == "start" or inside["Fallback"]:
            continue
        if name == "t":
            made.append(element.text or "")
        elif name == "p" and inside["tc"]:
            made.append(" ")
        elif name in SIGNS and (name != "tab" or inside["r"]):  # others define tab stops
            made.append(SIGNS[name])
        if name in {"p", "tr"}:
            element.clear()
    return "".join(made)


def document(archive: ZipFile) -> Found:
    """The text of a Word document, and its notes."""
    names = set(archive.namelist())
    for name, heading in (("document", ""), ("footnotes", "Footnotes"), ("endnotes", "Endnotes")):
        if (path := f"word/{name}.xml") in names:
            with archive.open(path) as file:
                text = prose(file)
            if text.strip() or not heading:
                yield heading, text


def related(archive: ZipFile, path: str) -> dict[str, str]:
    """The parts that a part names: id → path."""
    with archive.open(f"{dirname(path)}/_rels/{path.rpartition('/')[2]}.rels") as file:
        links = [element for event, name, element in elements(file) if event == "end" and name == "Relationship"]
    return {link.get("Id", ""): normpath(join("/", dirname(path), link.get("Target", "")))[1:] for link in links}


def presentation(archive: ZipFile) -> Found:
    """The slides of a presentation, in their order."""
    path = "ppt/presentation.xml"
    paths = related(archive, path)
    with archive.open(path) as file:
        ids = [relation(element) for event, name, element in elements(file) if (event, name) == ("end", "sldId")]
    for number, id in enumerate(ids, 1):
        with archive.open(paths[id]) as file:
            yield f"Slide {number}", prose(file)


# -- Spreadsheets -----------------------------------------------------------------------------------------------------------

DATE_FORMATS = frozenset((*range(14, 23), *range(27, 37), *range(45, 48), *range(50, 59)))
"""Numbers of the built-in formats of dates and times."""
NO_DATE = re.compile(r'"[^"]*"|\[[^\]]*\]|\\.|_.|\*.')
COLUMN = re.compile("[A-Z]{1,3}")
COLUMNS_MAX = 16_384
EPOCH, EPOCH_1904 = datetime(1899, 12, 30), datetime(1904, 1, 1)  # noqa: DTZ001 a spreadsheet has no time zones


def workbook(archive: ZipFile) -> Found:
    """The sheets of a spreadsheet: a line for each row, tabs between the cells."""
    path = "xl/workbook.xml"
    paths, names = related(archive, path), set(archive.namelist())
    sheets: list[tuple[str, str]] = []
    epoch = EPOCH
    with archive.open(path) as file:
        for event, name, element in elements(file):
            if event == "end" and name == "sheet":
                sheets.append((element.get("name", ""), paths.get(relation(element), "")))
            elif event == "end" and name == "workbookPr" and element.get("date1904") in {"1", "true"}:
                epoch = EPOCH_1904
    shared = list(strings(archive)) if "xl/sharedStrings.xml" in names else []
    dates = date_styles(archive) if "xl/styles.xml" in names else frozenset()
    for title, sheet in sheets:
        if sheet in names:
            with archive.open(sheet) as file:
                yield f"Sheet {title}", "\n".join(rows(file, shared, dates, epoch))


def strings(archive: ZipFile) -> Iterator[str]:
    """The strings that cells refer to by their numbers."""
    with archive.open("xl/sharedStrings.xml") as file:
        for event, name, element in elements(file):
            if event == "end" and name == "si":
                yield string(element)
                element.clear()


def string(element: Element) -> str:
    """The runs of a string, without how they are pronounced."""
    runs = (one for one in element if local(one.tag) in {"t", "r"})
    return "".join(text.text or "" for run in runs for text in run.iter() if local(text.tag) == "t")


def date_styles(archive: ZipFile) -> frozenset[int]:
    """The numbers of the styles that show a number as a date or a time."""
    custom: set[int] = set()
    found: set[int] = set()
    in_cells, count = False, 0
    with archive.open("xl/styles.xml") as file:
        for event, name, element in elements(file):
            if name == "cellXfs":
                in_cells = event == "start"
            elif event == "start":
                continue
            elif name == "numFmt" and re.search("[ymdhs]", NO_DATE.sub("", element.get("formatCode", "")).lower()):
                custom.add(int(element.get("numFmtId", "-1")))
            elif name == "xf" and in_cells:
                if int(element.get("numFmtId", "0")) in custom | DATE_FORMATS:
                    found.add(count)
                count += 1
    return frozenset(found)


def rows(file: IO[bytes], shared: list[str], dates: frozenset[int], epoch: datetime) -> Iterator[str]:
    """The rows of a sheet that are not empty."""
    cells: list[str] = []
    for event, name, element in elements(file):
        if event == "start":
            continue
        if name == "c":
            at = column(element.get("r", ""), len(cells))
            cells.extend([""] * (at - len(cells)))
            cells.append(value(element, shared, dates, epoch))
        elif name == "row":
            if any(cells):
                yield "\t".join(cells)
            cells = []
            element.clear()


def column(reference: str, default: int) -> int:
    """The column's number, from 0, of a cell like `AB12`."""
    found = COLUMN.match(reference)
    if not found:
        return default
    number = 0
    for letter in found[0]:
        number = number * 26 + ord(letter) - 64
    return min(number, COLUMNS_MAX) - 1


def value(cell: Element, shared: list[str], dates: frozenset[int], epoch: datetime) -> str:
    """What a cell shows, as far as that is known."""
    given = {local(one.tag): one for one in cell}
    if "is" in given:
        return string(given["is"])
    text = (given["v"].text or "") if "v" in given else ""
    match cell.get("t", "n"):
        case "s":
            return shared[int(text)] if text.isdecimal() and int(text) < len(shared) else ""
        case "b":
            return {"1": "TRUE", "0": "FALSE"}.get(text, text)
        case "n" if text and int(cell.get("s", "0")) in dates:
            return shown_date(text, epoch)
    return text


def shown_date(text: str, epoch: datetime) -> str:
    """A number as the date, the time or both that it stands for."""
    try:
        days = float(text)
        moment = epoch + timedelta(days=days)
    except (ValueError, OverflowError):
        return text
    moment = (moment + timedelta(microseconds=500_000)).replace(microsecond=0)
    if 0 <= days < 1:
        return moment.time().isoformat()
    return date(moment.year, moment.month, moment.day).isoformat() if days == int(days) else moment.isoformat(" ")


if __name__ == "__main__":
    main()
