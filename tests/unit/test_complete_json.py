"""When JSON that comes in pieces is a whole object, as far as a decoder of the whole says so."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.complete_json import WholeObject
from app.wire.decoding import NESTING_MAX, json_object, nests_too_deeply

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text('{}[]"\\ ax', max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('{"\\', max_size=2), inner, max_size=3),
    max_leaves=6,
)
ALMOST = st.one_of(JSON.map(json.dumps), st.text('{}[]":\\, 1ax', max_size=12))


@given(st.tuples(ALMOST, st.text(" \n}x", max_size=2)).map("".join), st.lists(st.integers(0, 4), max_size=12))
def test_at_every_border_it_agrees_with_a_decoder(text: str, sizes: list[int]):
    scanned, said = WholeObject(), ""
    for size in [*sizes, len(text)]:
        piece, text = text[:size], text[size:]
        scanned.take(piece)
        said += piece
        assert scanned.whole == (json_object(said) is not None)


@given(JSON)
def test_nesting_is_that_of_the_values(value: object):
    raw = json.dumps(value).encode()
    wrapped = b"[" * NESTING_MAX + raw + b"]" * NESTING_MAX
    assert nests_too_deeply(wrapped) == isinstance(value, list | dict)
    assert not nests_too_deeply(raw)


@pytest.mark.parametrize(
    ("text", "deep"),
    [
        ('"%s"' % ("[" * 1000), False),
        ('"\\"%s"' % ("[" * 1000), False),
        ('"\\\\", %s' % ("[" * 1000), True),
        ("[" * NESTING_MAX, False),
        ("[" * NESTING_MAX + "{", True),
        ("[]" * 1000, False),
        ('"{}\\"{}"'.format("x" * ((1 << 18) - 2), "[" * 1000), False),
        ('"{}\\\\"{}'.format("x" * ((1 << 18) - 3), "[" * 1000), True),
    ],
    ids=range(8),
)
def test_brackets_inside_strings_nest_nothing(text: str, deep: bool):
    assert nests_too_deeply(text.encode()) == deep
