"""Splits `<think>…</think>` out of content, at any chunk border.

Models that think in their content do so at its start, so as a rule only there a tag counts: a `<think>` that an answer quotes
later stays text. For models that think in the middle of an answer too, tags count anywhere. Line breaks after the opening tag
and white space after the closing one are not content.
"""

import re
from typing import Literal

Where = Literal["start", "thinking", "text", "anywhere"]
Kind = Literal["reasoning", "text"]

OPEN, CLOSE = "<think>", "</think>"

_BLANK, _LINE_BREAKS = re.compile(r"\s*"), re.compile(r"\n*")


class ThinkSplitter:
    """Feed content, get (kind, text) pieces; `close()` gives what was held back."""

    def __init__(self, where: Where = "start") -> None:
        """`where` is "thinking" for models whose prompt already opened the tag, "text" to leave content alone."""
        self._rest: Where = "anywhere" if where == "anywhere" else "text"
        """What an answer is once it has begun."""
        self._where: Where = "start" if where == "anywhere" else where
        self._blank: list[str] = []
        """White space where a tag may still begin."""
        self._held = ""
        """What may be the beginning of a tag."""
        self._has_thought = False
        self._is_fresh = True
        """No reasoning has followed the opening tag yet."""

    def feed(self, text: str) -> list[tuple[Kind, str]]:
        """The pieces that are certain."""
        if self._where == "text":
            return [("text", text)]
        text, self._held = self._held + text, ""
        pieces: list[tuple[Kind, str]] = []
        at: int | None = 0
        while at is not None and at < len(text):
            if self._where == "thinking":
                at = self._think(text, at, pieces)
            else:
                at = self._start(text, at, pieces) if self._where == "start" else self._look(text, at, pieces)
        return [piece for piece in pieces if piece[1]]

    def close(self) -> list[tuple[Kind, str]]:
        """The rest: what looked like the beginning of a tag was text."""
        held, self._held = self._held, ""
        thinking = self._where == "thinking"
        self._where = "text"
        if not thinking:
            held = self._text_begins(held)
        return [("reasoning" if thinking else "text", held)] if held else []

    def _start(self, text: str, at: int, pieces: list[tuple[Kind, str]]) -> int | None:
        """Looks for an opening tag; gives where to continue, or None when more text is needed."""
        begins = _skip(_BLANK, text, at)
        self._blank.append(text[at:begins])
        if text.startswith(OPEN, begins):
            self._blank.clear()
            self._where, self._is_fresh = "thinking", True
            return begins + len(OPEN)
        rest = text[begins : begins + len(OPEN)]
        if OPEN.startswith(rest):
            self._held = rest
            return None
        self._where = self._rest
        if self._rest == "text":
            pieces.append(("text", self._text_begins(text[begins:])))
            return None
        pieces.append(("text", self._text_begins(text[begins : begins + 1])))
        return begins + 1

    def _look(self, text: str, at: int, pieces: list[tuple[Kind, str]]) -> int | None:
        """Looks for an opening tag inside an answer; gives where to continue, or None when more text is needed."""
        found = text.find(OPEN, at)
        if found >= 0:
            pieces.append(("text", text[at:found]))
            self._where, self._is_fresh = "thinking", True
            return found + len(OPEN)
        certain = len(text) - _tag_beginning(text[max(at, len(text) - len(OPEN)) :], OPEN)
        pieces.append(("text", text[at:certain]))
        self._held = text[certain:]
        return None

    def _text_begins(self, text: str) -> str:
        blank, self._blank = self._blank, []
        return text if self._has_thought or not text else "".join((*blank, text))

    def _think(self, text: str, at: int, pieces: list[tuple[Kind, str]]) -> int | None:
        """Looks for the closing tag; gives where to continue, or None when more text is needed."""
        if self._is_fresh:
            at = _skip(_LINE_BREAKS, text, at)
            self._is_fresh = at == len(text)
        end = text.find(CLOSE, at)
        if end >= 0:
            pieces.append(("reasoning", text[at:end]))
            self._where, self._has_thought = "start", True
            return end + len(CLOSE)
        certain = len(text) - _tag_beginning(text[max(at, len(text) - len(CLOSE)) :], CLOSE)
        pieces.append(("reasoning", text[at:certain]))
        self._held = text[certain:]
        return None


def _skip(pattern: re.Pattern[str], text: str, at: int) -> int:
    found = pattern.match(text, at)
    return found.end() if found else at


def _tag_beginning(text: str, tag: str) -> int:
    """How many characters at the end of `text` may be the beginning of the tag."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if tag.startswith(text[-length:]):
            return length
    return 0
