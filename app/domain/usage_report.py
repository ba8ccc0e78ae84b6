"""Usage as a table and as pages; pure."""

import base64
import binascii
import csv
import io
import re
from collections.abc import Sequence

import msgspec
from msgspec import UNSET

from app.wire.usage import COLUMNS, TEXTS, GroupUsage

_PLACE = msgspec.json.Decoder(tuple[str, str, str, str, str])

_FORMULA = re.compile(r"^[\t\r\n]|(?:^|(?<=[;|\t\r\n]))(?= *[=+\-@\uff1d\uff0b\uff0d\uff20])")
"""Where a spreadsheet takes the rest of a text for a formula: at its beginning, and after what separates cells in some countries. Clients
choose the names of models."""


def cursor(place: Sequence[str]) -> str:
    """The cursor of a page that begins after this place."""
    return base64.urlsafe_b64encode(msgspec.json.encode(place)).decode().rstrip("=")


def place_of(cursor: str) -> tuple[str, ...] | None:
    """The place of a cursor; None for what is none."""
    try:
        return _PLACE.decode(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
    except (binascii.Error, ValueError):
        return None


def as_rows(used: Sequence[GroupUsage]) -> tuple[list[str], list[list[str]]]:
    """The names of the columns, and the rows."""
    names = [name for name in COLUMNS if not used or getattr(used[0], name) is not UNSET]
    return names, [[_cell(getattr(one, name)) for name in names] for one in used]


def as_table(used: Sequence[GroupUsage]) -> str:
    """A table for a terminal; numbers are aligned to the right."""
    names, rows = as_rows(used)
    shown = [[name.replace("_", " ") for name in names], *([printable(cell) or "-" for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if name in TEXTS else cell.rjust(width)
            for name, cell, width in zip(names, row, widths, strict=True)
        )
        for row in shown
    ]
    return "\n".join(line.rstrip() for line in lines)


def printable(text: str) -> str:
    """The same without what a terminal would obey. Clients choose the names of models."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def _cell(value: object) -> str:
    return "" if value is None else str(value)


def as_csv(used: Sequence[GroupUsage]) -> str:
    """A table as CSV, with a head. What a spreadsheet would take for a formula has an apostrophe before it."""
    names, rows = as_rows(used)
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\r\n")
    writer.writerow(names)
    writer.writerows([_FORMULA.sub(r"'\g<0>", cell) for cell in row] for row in rows)
    return written.getvalue()
