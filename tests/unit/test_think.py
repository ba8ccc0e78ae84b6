"""The <think> splitter: the same pieces at any split, nothing lost."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.domain.think import CLOSE, OPEN, ThinkSplitter, Where

TAGGED = st.lists(
    st.sampled_from([OPEN, CLOSE, "<", "</", "<thi", "nk>", "/think", ">", "\n", " ", "a", "ü", "x < y"]), max_size=12
).map("".join)
SIZES = st.lists(st.integers(min_value=1, max_value=9), max_size=20)
ANYWHERE = st.sampled_from(["start", "thinking", "text", "anywhere"])


def split(content: str, sizes: list[int]) -> list[str]:
    """The content in pieces of these sizes, the rest as one."""
    pieces = []
    for size in sizes:
        pieces.append(content[:size])
        content = content[size:]
    return [piece for piece in [*pieces, content] if piece]


def heard(pieces: list[str], where: Where = "start") -> list[tuple[str, str]]:
    """What a splitter makes of the pieces, neighbours of one kind joined."""
    splitter = ThinkSplitter(where)
    joined: list[tuple[str, str]] = []
    for kind, text in [*(found for piece in pieces for found in splitter.feed(piece)), *splitter.close()]:
        assert text, "an empty piece"
        if joined and joined[-1][0] == kind:
            joined[-1] = (kind, joined[-1][1] + text)
        else:
            joined.append((kind, text))
    return joined


@given(TAGGED, SIZES, ANYWHERE)
@example("<think>\nhm</think>\n\nyes", [7, 3, 8, 1], "start")
def test_any_split_gives_the_same_pieces(content: str, sizes: list[int], where: Where):
    assert heard(split(content, sizes), where) == heard([content] if content else [], where)


@given(TAGGED, SIZES, ANYWHERE)
def test_nothing_but_tags_and_white_space_is_lost(content: str, sizes: list[int], where: Where):
    left = "".join("".join(text for _, text in heard(split(content, sizes), where)).split())
    there = "".join(content.split())
    rest = iter(there)
    assert all(character in rest for character in left), "something was made up, or is out of order"
    lost = len(there) - len(left)
    opened, closed = range(content.count(OPEN) + 1), range(content.count(CLOSE) + 1)
    assert any(lost == len(OPEN) * opens + len(CLOSE) * closes for opens in opened for closes in closed)


@given(st.text(min_size=1).filter(lambda content: content.strip() and OPEN not in content), SIZES)
def test_content_without_a_tag_is_left_alone(content: str, sizes: list[int]):
    assert heard(split(content, sizes)) == [("text", content)]


@pytest.mark.parametrize(
    ("content", "where", "expected"),
    [
        ("<think>\nhm\n</think>\n\nyes", "start", [("reasoning", "hm\n"), ("text", "yes")]),
        (" \n<think>hm</think>yes", "start", [("reasoning", "hm"), ("text", "yes")]),
        ("<think></think>\n\nyes", "start", [("text", "yes")]),
        ("<think>a</think> <think>b</think>c", "start", [("reasoning", "ab"), ("text", "c")]),
        ("<think>cut off", "start", [("reasoning", "cut off")]),
        ("<think>cut </thi", "start", [("reasoning", "cut </thi")]),
        ("<think>hm</think>\n", "start", [("reasoning", "hm")]),
        ("<thin", "start", [("text", "<thin")]),
        ("<thinking>", "start", [("text", "<thinking>")]),
        (" \n ", "start", []),
        ("The tag <think>x</think> is quoted", "start", [("text", "The tag <think>x</think> is quoted")]),
        ("<think>a</think>b<think>c</think>", "start", [("reasoning", "a"), ("text", "b<think>c</think>")]),
        ("hm</think>yes", "thinking", [("reasoning", "hm"), ("text", "yes")]),
        ("<think>x</think>", "text", [("text", "<think>x</think>")]),
        ("a <think>\nb</think>\n\nc", "anywhere", [("text", "a "), ("reasoning", "b"), ("text", "c")]),
        (
            "<think>a</think>\nb<think>c</think>d <thin",
            "anywhere",
            [("reasoning", "a"), ("text", "b"), ("reasoning", "c"), ("text", "d <thin")],
        ),
    ],
)
def test_a_tag_counts_where_it_is_said_to(content: str, where: Where, expected: list[tuple[str, str]]):
    assert heard([content], where) == expected


def test_what_is_certain_is_not_held_back():
    splitter = ThinkSplitter()
    assert splitter.feed("<think>a b </th") == [("reasoning", "a b ")]
    assert splitter.feed("ere") == [("reasoning", "</there")]
    assert splitter.feed("</think>\n") == []
    assert splitter.feed("yes") == [("text", "yes")]
    assert splitter.feed(" <") == [("text", " <")]
