"""Bodies are cut where they have parts that are kept once; put together again, they are what they were."""

import hashlib
import json
import random

import msgspec
import pytest

from app.domain.lifecycle import open_response
from app.storage.parts import FIELD_BYTES_MIN, STRING_BYTES_MIN, SharedParts, long_strings, repeated
from app.wire.resources import encode
from tests.unit.build import request

TEXTS = ["a", '"', "\\", '\\"', "\n", "é", "\0", '","', "x" * 1_000, '"' * 5_000, "\\" * 9_999]


def put_together(body, parts):
    """What Postgres does."""
    if body.part_hashes is None:
        return body.text.encode()
    by_hash = dict(zip(parts.binds["stored_hashes"], parts.binds["stored_bodies"], strict=True))
    hashes = [body.part_hashes[at : at + 32] for at in range(0, len(body.part_hashes), 32)]
    around = json.loads(body.text)
    assert len(around) == len(hashes) + 1
    return "".join(text + by_hash.get(hash, "") for text, hash in zip(around, [*hashes, b""], strict=True)).encode()


def some_text(chosen, length):
    text = ""
    while len(text) < length:
        text += chosen.choice(TEXTS) * chosen.randrange(1, 40)
    return text[:length]


@pytest.mark.parametrize("seed", range(60))
def test_any_document_is_what_it_was_and_keeps_no_long_string(seed):
    chosen = random.Random(seed)
    around = chosen.choice([0, 10, 1_000, STRING_BYTES_MIN])
    lengths = [chosen.choice([0, 3, around, STRING_BYTES_MIN - 2, STRING_BYTES_MIN + 100]) for _ in range(9)]
    document = {"type": "message", "content": [some_text(chosen, length) for length in lengths], "n": [1] * around}
    body, parts = encode(document), SharedParts()
    cut = parts.take(body, long_strings(body))
    assert put_together(cut, parts) == body
    assert all(hashlib.sha256(part.encode()).digest() == hash for hash, part in zip(*parts.binds.values(), strict=True))
    long = {encode(text) for text in document["content"] if len(encode(text)) >= STRING_BYTES_MIN}
    assert long <= {part.encode() for part in parts.binds["stored_bodies"]}
    assert cut.bytes == (len(body) if cut.part_hashes else None)


def test_the_shortest_string_that_is_kept_once():
    for length, kept in ((STRING_BYTES_MIN - 3, 0), (STRING_BYTES_MIN - 2, 1)):
        assert len(long_strings(encode(["y", "x" * length, "z"]))) == kept


def test_a_string_that_is_there_twice_is_kept_once():
    parts, body = SharedParts(), encode(["x" * STRING_BYTES_MIN] * 2)
    cut = parts.take(body, long_strings(body))
    assert len(parts.binds["stored_bodies"]) == 1
    assert put_together(cut, parts) == body


def tool(number, description=""):
    return {"type": "function", "name": f"f{number}", "description": description, "parameters": {"type": "object"}}


@pytest.mark.parametrize(
    ("given", "fields"),
    [
        ({"instructions": "x" * FIELD_BYTES_MIN}, ["instructions"]),
        ({"instructions": "x" * (FIELD_BYTES_MIN - 3)}, []),
        ({"tools": [tool(number) for number in range(40)]}, ["tools"]),
        ({"instructions": "tools" * 1_000, "tools": [tool(1, "instructions" * 1_000)]}, ["instructions", "tools"]),
        ({"instructions": '"tools":[]' * 1_000, "metadata": {"tools": "text"}}, ["instructions"]),
        ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"title": "x" * 3_000}}}}, ["text"]),
    ],
)
def test_long_fields_of_a_response_are_kept_once(given, fields):
    response, parts = open_response(request(**given), id="resp_1", created_at=0), SharedParts()
    body = encode(response)
    cut = parts.take(body, repeated(response))
    assert put_together(cut, parts) == body
    assert {*parts.binds["stored_bodies"]} == {encode(getattr(response, field)).decode() for field in fields}
    assert len(cut.text) < 2 * FIELD_BYTES_MIN


def test_the_work_is_linear():
    """Counted in bytes looked at: a body of escaped quotes, of short strings, of backslashes."""
    for content in ('"' * 2_000_000, ["x"] * 500_000, "\\" * 2_000_000, ["\\" * 60_000 + '"'] * 30):
        body = Counted(encode(content))
        list(long_strings(body))
        assert body.looked_at < 6 * len(body)


def test_a_body_of_many_parts_is_not_copied_for_each():
    class Whole(bytes):
        def partition(self, sub):
            before, found, rest = super().partition(sub)
            copied.append(len(rest))
            return before, found, Whole(rest)

        def __getitem__(self, at):
            copied.append(len(found := super().__getitem__(at)))
            return found

    copied, body = [], Whole(encode(["x" * STRING_BYTES_MIN] * 100))
    SharedParts().take(body, [encode("x" * STRING_BYTES_MIN)] * 100)
    assert sum(copied) < 2 * STRING_BYTES_MIN


class Counted(bytes):
    """Counts what is looked at."""

    looked_at = 0

    def find(self, sub, begin=0):
        at = super().find(sub, begin)
        self.looked_at += (at if at >= 0 else len(self)) - begin + 1
        return at

    def rfind(self, sub, begin, end):
        at = super().rfind(sub, begin, end)
        self.looked_at += min(end, len(self)) - max(at, begin) + 1
        return at

    def __getitem__(self, at):
        self.looked_at += 1 if isinstance(at, int) else 0
        return super().__getitem__(at)


def test_a_stored_body_is_json():
    parts = SharedParts()
    body = encode({"a": "\0\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16") + "x" * STRING_BYTES_MIN})
    cut = parts.take(body, long_strings(body))
    assert msgspec.json.decode(cut.text)[0] == '{"a":'
