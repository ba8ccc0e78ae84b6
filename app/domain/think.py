"""Splits `<think>…</think>` out of content, at any chunk border.

Models that think in their content do so at its start, so only there a tag counts: a `<think>` that an answer quotes later
stays text. Line breaks behind the opening tag and white space behind the closing one are not content.
"""

from typing import Literal

Where = Literal["start", "thinking", "text"]
Kind = Literal["reasoning", "text"]

OPEN, CLOSE = "<think>", "</think>"


class ThinkSplitter:
    """Feed content, get (kind, text) pieces; `close()` gives what was held back."""

    def __init__(self, where: Where = "start") -> None:
        """`where` is "thinking" for models whose prompt already opened the tag, "text" to leave content alone."""
        self._where: Where = where
        self._held = ""
        self._has_thought = False
        self._is_fresh = True
        """Nothing was thought since the tag was opened."""

    def feed(self, text: str) -> list[tuple[Kind, str]]:
        """The pieces that are certain by now."""
        if self._where == "text":
            return [("text", text)]
        self._held += text
        pieces: list[tuple[Kind, str]] = []
        while self._advance(pieces):
            pass
        return [piece for piece in pieces if piece[1]]

    def close(self) -> list[tuple[Kind, str]]:
        """The rest: what looked like the beginning of a tag was none."""
        held, self._held = self._held, ""
        kind: Kind = "reasoning" if self._where == "thinking" else "text"
        self._where = "text"
        if kind == "text":
            held = self._text_begins(held)
        return [(kind, held)] if held else []

    def _advance(self, pieces: list[tuple[Kind, str]]) -> bool:
        """One step; False when more text is needed."""
        if self._where == "start":
            return self._start()
        if self._where == "thinking":
            return self._think(pieces)
        pieces.append(("text", self._held))
        self._held = ""
        return False

    def _start(self) -> bool:
        stripped = self._held.lstrip()
        if stripped.startswith(OPEN):
            self._held = stripped[len(OPEN) :]
            self._where, self._is_fresh = "thinking", True
            return True
        if OPEN.startswith(stripped):
            return False
        self._held = self._text_begins(self._held)
        self._where = "text"
        return True

    def _text_begins(self, text: str) -> str:
        return text.lstrip() if self._has_thought or not text.strip() else text

    def _think(self, pieces: list[tuple[Kind, str]]) -> bool:
        if self._is_fresh:
            self._held = self._held.lstrip("\n")
            self._is_fresh = not self._held
        before, found, after = self._held.partition(CLOSE)
        if found:
            pieces.append(("reasoning", before))
            self._held = after
            self._where, self._has_thought = "start", True
            return bool(self._held)
        certain = len(self._held) - _tag_beginning(self._held)
        pieces.append(("reasoning", self._held[:certain]))
        self._held = self._held[certain:]
        return False


def _tag_beginning(text: str) -> int:
    """How many characters at the end of `text` may be the beginning of the closing tag."""
    for length in range(min(len(CLOSE) - 1, len(text)), 0, -1):
        if CLOSE.startswith(text[-length:]):
            return length
    return 0
