"""The warning about tools, items and files that the model does not see, in the log and as headers."""

from collections.abc import Sequence
from urllib.parse import quote

import structlog

from app.domain.context import LeftOut
from app.wire.hosted_tools import HOSTED

log = structlog.get_logger()

LEFT_OUT_TOOLS_HEADER = "x-reprise-left-out-tools"
"""Names the types of declared tools that the model does not see, because no server here runs them."""

LEFT_OUT_ITEMS_HEADER = "x-reprise-left-out-items"
"""Names the types of items that the model does not see: this version does not know them, they are calls without an output, or their
tools are not all taken: an agent lets nothing add any, or Chat Completions can't carry their calls."""

LEFT_OUT_FILES_HEADER = "x-reprise-left-out-files"
"""Names files of earlier items that are gone: by their ids, or their addresses without the query."""

NAMED_MAX = 16
"""So many types, or files, are named in a header; an ellipsis stands for the others."""

NAME_CHARS_MAX = 200


def left_out_headers(left_out: LeftOut) -> dict[str, str]:
    """Log the warning; returns its headers."""
    headers = {}
    if left_out.tools:
        known = [type_ for type_ in left_out.tools if type_ in HOSTED]
        log.warning(
            "Tools that no server here runs were left out.",
            action="tools_left_out",
            tools=known,
            unknown=len(left_out.tools) - len(known),
        )
        headers[LEFT_OUT_TOOLS_HEADER] = _named(left_out.tools)
    if left_out.items:
        log.warning(
            "Items that the model can't read were left out.", action="items_left_out", types=len(left_out.items)
        )
        headers[LEFT_OUT_ITEMS_HEADER] = _named(left_out.items)
    if left_out.files:
        log.warning("Files of earlier items are gone.", action="files_left_out", files=len(left_out.files))
        headers[LEFT_OUT_FILES_HEADER] = _named([_in_ascii(name) for name in left_out.files])
    return headers


def _in_ascii(name: str) -> str:
    return quote(name.partition("?")[0][:NAME_CHARS_MAX], safe=":/")


def _named(types: Sequence[str]) -> str:
    return ", ".join([*types[:NAMED_MAX], *(["..."] if len(types) > NAMED_MAX else [])])
