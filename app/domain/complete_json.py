"""Whether JSON that comes in pieces is a whole object yet. No character is scanned twice."""

import re

from app.wire.decoding import json_object

_INSIDE, _OUTSIDE = re.compile(r'["\\]'), re.compile(r'["{}\[\]]')
"""What matters inside strings, and outside."""
_BLANKS = " \t\n\r"


class WholeObject:
    """Take pieces, then ask. Most calls are never asked about, so pieces are scanned only then."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._unseen: list[str] = []
        self._depth = 0
        self._in_string = self._escaped = self._closed = False
        self._whole = False

    def take(self, text: str) -> None:
        """The next piece."""
        self._unseen.append(text)

    @property
    def whole(self) -> bool:
        """Whether the pieces so far are one JSON object, followed by nothing but white space."""
        unseen, self._unseen = self._unseen, []
        for text in unseen:
            self._look(text)
        return self._whole

    def _look(self, text: str) -> None:
        if self._closed:
            self._whole = self._whole and not text.strip(_BLANKS)
            return
        self._pieces.append(text)
        at = self._end(text)
        if at is not None:
            self._closed = True
            self._whole = not text[at:].strip(_BLANKS) and json_object("".join(self._pieces)) is not None
            self._pieces.clear()

    def _end(self, text: str) -> int | None:
        """Where the outermost bracket is closed."""
        at = 0
        if self._escaped and text:
            at, self._escaped = 1, False
        while found := (_INSIDE if self._in_string else _OUTSIDE).search(text, at):
            at = found.end()
            match found[0]:
                case "\\":
                    self._escaped = at == len(text)
                    at += 1
                case '"':
                    self._in_string = not self._in_string
                case "{" | "[":
                    self._depth += 1
                case _:
                    self._depth -= 1
                    if self._depth <= 0:
                        return at
        return None
