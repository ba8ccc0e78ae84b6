"""What lists walk along: for each response or conversation and every facet of it a row, in the order of creation.

A facet is a status, alone or with one or two more terms: the model, or an entry of the metadata. So a list with any two
filters is the merge of one range per status, and reads what it shows, however many responses there are and whatever they
match. With more terms than two it walks along the range of two, and looks at the rest in the rows.

A conversation has the constant CONVERSATION in place of a status, and a chat completion the constant CHAT beside its response's.

Postgres' triggers `keep_facets` write the rows (migrations 0012 and 0016): no statement can forget them, and those of a deleted
response are gone. Nothing in them ever changes but for the status of a background response and the metadata of a chat completion, and the responses' own rows
have no index over their status, so that ending one stays a cheap update in place.
"""

import hashlib
from collections.abc import Mapping
from itertools import islice

from app.domain.lifecycle import NEXT

STATUSES: tuple[str, ...] = tuple(NEXT)

CONVERSATION = "conversation"
CHAT = "chat_completion"

_ENTRY = "\x02"
_MODEL = "\x01"
_AND = "\x03"
"""Where names of facets could still be the same, what is found is compared with the row."""

TERMS_MAX = 2


def terms_of(model: str | None, metadata: Mapping[str, str]) -> list[str]:
    """What a filter asks for beside the status and time, in the order of their bytes; entries of metadata are as a rule
    rarer than a model, so where there are too many it is they that count."""
    entries = [f"{key}{_ENTRY}{value}" for key, value in metadata.items()]
    given = [*entries, *([_MODEL + model] if model is not None else [])]
    return sorted(islice(given, TERMS_MAX), key=str.encode)


def facets(status: str | None, terms: list[str]) -> list[int]:
    """The facets whose ranges hold every response with these terms; without a status there is one for each."""
    return [_facet(one, terms) for one in ([status] if status else STATUSES)]


def _facet(status: str, terms: list[str]) -> int:
    name = _AND.join([status, *terms])
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)
