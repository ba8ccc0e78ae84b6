"""What readers get of the items of hosted tools, and of compactions.

Stored items and recorded events are whole: they hold what the model has read. A reader gets results, sources and outputs only
where `include` asks for them, so they are removed when bytes are written out; everything else is passed on unchanged.
"""

from collections.abc import Collection, Sequence

import msgspec
from msgspec import Raw

from app.wire.events import TERMINAL, Entry, Event, InProgress, ItemDone

HIDDEN = {
    "web_search_call": ("results", "web_search_call.results"),
    "file_search_call": ("results", "file_search_call.results"),
    "code_interpreter_call": ("outputs", "code_interpreter_call.outputs"),
    "compaction": ("summary", "compaction.summary"),
}
"""Item type → the key that is hidden, and the value of `include` that shows it."""

SOURCES = "web_search_call.action.sources"

_TAGS = {b'{"type":"%b"' % type_.encode(): type_ for type_ in HIDDEN}
"""How the JSON of these items begins."""

_CARRYING: tuple[type[Event], ...] = (ItemDone, InProgress, *TERMINAL.values())
_CARRIERS = frozenset(str(event.__struct_config__.tag) for event in _CARRYING)
"""Types of the events that carry whole items."""

_FIELDS = msgspec.json.Decoder(dict[str, Raw])
_ITEMS = msgspec.json.Decoder(list[Raw])


class Redaction:
    """Removes what one reader does not get."""

    def __init__(self, include: Collection[str]) -> None:
        self._hidden = {type_: key for type_, (key, shown_by) in HIDDEN.items() if shown_by not in include}
        self._sources = SOURCES in include

    def item(self, raw: bytes) -> bytes:
        """An item's JSON."""
        tag = next((tag for tag in _TAGS if raw.startswith(tag)), None)
        if tag is None:
            return raw
        type_ = _TAGS[tag]
        fields = _FIELDS.decode(raw)
        if type_ == "web_search_call":
            if not self._sources and "action" in fields:
                fields["action"] = _without_sources(fields["action"])
            if type_ in self._hidden:
                fields.pop("results", None)
        elif type_ == "compaction":
            if type_ in self._hidden:
                fields.pop("summary", None)
        elif type_ in self._hidden and fields.get(self._hidden[type_]) is not None:
            fields[self._hidden[type_]] = Raw(b"null")
        return msgspec.json.encode(fields)

    def output(self, items: Sequence[Raw]) -> list[Raw]:
        """The items of a response."""
        return [Raw(self.item(bytes(item))) for item in items]

    def frame(self, entry: Entry) -> bytes:
        """An event's SSE frame."""
        if entry.type not in _CARRIERS or not any(tag in entry.frame for tag in _TAGS):
            return entry.frame
        fields = _FIELDS.decode(entry.body)
        if "item" in fields:
            fields["item"] = Raw(self.item(bytes(fields["item"])))
        else:
            response = _FIELDS.decode(fields["response"])
            response["output"] = Raw(msgspec.json.encode(self.output(_ITEMS.decode(response["output"]))))
            fields["response"] = Raw(msgspec.json.encode(response))
        return b"event: %b\ndata: %b\n\n" % (entry.type.encode(), msgspec.json.encode(fields))


def _without_sources(action: Raw) -> Raw:
    if bytes(action) == b"null":
        return action
    fields = _FIELDS.decode(action)
    fields.pop("sources", None)
    return Raw(msgspec.json.encode(fields))
