"""Words that this project does not use: identifiers, texts and pages have those of the field, in plain English."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

WORDS = (
    "said",
    "told",
    "tell",
    "tells",
    "telling",
    "whoever",
    "whomever",
    "nobody",
    "somebody",
    "anybody",
    "everybody",
    "anew",
    "for ever",
    "has gone",
    "have gone",
    "had gone",
    "behind",
    "in truth",
    "by now",
    "at work",
    "to be had",
    "what there is",
    "hear of",
    "hears of",
    "turn to",
    "turns to",
    "go on",
    "goes on",
    "unkept",
    "unsure",
    "is_sure",
    "retold",
    "jail",
)
"""In any letters; parts of an identifier count as words."""

OLD_NAMES = (
    "Manner",
    "HandOver",
    "Patience",
    "Parts",
    "Kept",
    "Hints",
    "Shown",
    "ClientGone",
    "Tasks",
    "Executor",
)
"""Names of classes. A capital may also begin a sentence: a small word follows then."""

IN_SPACE = ("behind a proxy", "behind a load balancer", "behind a lock", "fell behind", "falls behind")
"""Where "behind" is not "after"."""

RIGHT = {
    ("README.md", "Tell me more"): "a user's prompt",
    ("app/echo/replies.py", "Earlier you said"): "the demo's own voice",
    ("app/echo/replies.py", "You have not told me"): "the demo's own voice",
    ("app/echo/replies.py", "You said"): "the demo's own voice",
    ("app/echo/replies.py", "you_said"): "the demo's own voice",
    ("app/embedded.py", "nobody"): "the Unix user",
    ("docs/engines.md", "nobody-has-this"): "the name of a model, in an engine's error",
    ("app/storage/tables.py", "nobody can take over"): "the comment of a column, as migrated",
    ("app/storage/tables.py", "readers hear of it"): "the comment of a column, as migrated",
}
"""(file, phrase) → why a word on the list is right there."""

_BETWEEN_WORDS = r"[\s#]+"  # a phrase may be wrapped, in a comment too
_WORDS = "|".join(word.replace(" ", _BETWEEN_WORDS) for word in WORDS)
_ANY_WORD = re.compile(rf"(?<![A-Za-z])(?:(?i:{_WORDS})(?![a-z])|(?:{'|'.join(OLD_NAMES)})(?![A-Za-z]| [a-z]))")


def found_in(text: str) -> Iterator[tuple[int, str]]:
    """The line and the spelling of each word on the list."""
    for match in _ANY_WORD.finditer(text):
        yield text.count("\n", 0, match.start()) + 1, " ".join(match[0].split())


def findings() -> dict[str, list[str]]:
    """`file:line: word` of every file that has words on the list, those that are right taken out."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "app").rglob("*.py")]
    found = {}
    for page in pages:
        name = page.relative_to(ROOT).as_posix()
        text = page.read_text()
        for phrase in (*IN_SPACE, *(phrase for file, phrase in RIGHT if file == name)):
            text = text.replace(phrase, "")
        if words := [f"{name}:{line}: {word}" for line, word in found_in(text)]:
            found[name] = words
    return found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def said_by(self): ...", ["said"]),
        ("_nobody = 1  # Whoever told it", ["nobody", "Whoever", "told"]),
        ("# the client has\n    # gone", ["has # gone"]),
        ("class HandOver(Struct):", ["HandOver"]),
        ("# Kept for a day.", []),
        ("foretold, tellers, unsaid, jailer", []),
    ],
)
def test_words_are_found_in_identifiers_comments_and_texts(text: str, words: list[str]) -> None:
    assert [word for _, word in found_in(text)] == words


def test_words_that_this_project_does_not_use_are_nowhere() -> None:
    words = [word for words in findings().values() for word in words]
    assert words == [], "use the field's words, or list the phrase in RIGHT with its reason"


def test_every_phrase_that_is_right_is_still_there() -> None:
    assert [(file, phrase) for file, phrase in RIGHT if phrase not in (ROOT / file).read_text()] == []
