"""Ways to break a request: its values, its bytes, its path, its query, its headers."""

import copy
import json
from collections.abc import Callable, Iterator
from functools import partial
from random import Random
from typing import Any
from urllib.parse import quote_from_bytes

from tests.fuzz.shapes import Sent

Place = tuple[Any, Any]
"""A list or an object, and where in it."""

LITERAL = "@literal@"
"""A string with this prefix stands for the JSON after it, which Python's encoder would not write."""
_DEEP = (10, 127, 129, 1_000, 20_000)
_LITERALS = [
    *("1e400", "-1e400", "1e-400", "9" * 5_000, "1" + "0" * 30, "-0", "NaN", "01", "1.", "18446744073709551616"),
    *(f"{'[' * depth}{']' * depth}" for depth in _DEEP),
    *(f"{'{' + chr(34) + 'a' + chr(34) + ':'}" * depth + "1" + "}" * depth for depth in _DEEP),
    *('"\\ud83d"', '"\\ude00\\ud83d"', '"\\u0000"', '"\\x"', '"\t"', '{"a":1,"a":2}', '{"type":"message","type":[]}'),
]
_STRINGS = [
    "",
    " ",
    "\0",
    "a\0b",
    "x",
    "é😀",
    "\u2028",
    "\ufeff",
    "x" * 600,
    "resp_x",
    "../x",
    "%00",
    "'\"`$[...]`",
    "\x7f\x85",
]
_JUNK: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**31, 2**53, 2**63, -(2**63), 2**64, 10**30, 1.5, 1e308, -1e-300),
    *(
        [],
        {},
        [[]],
        [None],
        [{}],
        [1, "a"],
        {"type": []},
        {"type": None},
        {"": ""},
        {"a\0": "\0"},
        {"type": "function"},
    ),
    *({"id": []}, {"id": "x"}, {"type": {}, "role": []}, {"text": 1}, ["\0"], {"url": ["x"]}),
    *_STRINGS,
    *(LITERAL + text for text in _LITERALS),
]
_BYTES = [
    b"\x00",
    b"\xff",
    b"\xed\xa0\x80",
    b"\xc0\xaf",
    b"\xf4\x90\x80\x80",
    b"\\",
    b'"',
    b"{",
    b"]",
    b",",
    b"\\ud83d",
    b"\n",
]
_WORDS = [
    *(
        b"",
        b"\x00",
        b"\xff\xfe",
        b"\xed\xa0\x80",
        b"..",
        b"a/b",
        b"x" * 4_000,
        "é😀".encode(),
        b"-1",
        b"1e400",
        b"9" * 30,
    ),
    *(b"\xef\xbc\x91", b"true", b"null", b"[]", b"{}", b"' or 1=1", b"%", b"\x7f", b"resp_x", b"a\r\nb", b"9" * 5_000),
]
_NAMES = [
    b"limit",
    b"include",
    b"include[]",
    b"metadata[]",
    b"metadata[a",
    b"metadata",
    b"a[b][c]",
    b"stream",
    b"after",
    b"\x00",
]
_HEADERS = [
    *(("authorization", "Bearer \xff\x80"), ("authorization", ""), ("authorization", "Bearer " + "x" * 5_000)),
    *(("content-type", "text/\xff"), ("content-type", "multipart/form-data"), ("content-encoding", "gzip")),
    *(("accept", "\xff"), ("cookie", "a=\xff; =;;"), ("upgrade", "websocket"), ("expect", "200-ok"), ("x-\xff", "a")),
    *(("accept-encoding", "zstd;q=\xff"), ("x-request-id", "a\tb"), ("last-event-id", "\x80")),
]


def mutated(random: Random, sent: Sent) -> tuple[bytes, bytes]:
    """The request line and headers, and the body, of a request that is broken in some ways."""
    body = copy.deepcopy(sent.body)
    head, path, target = [*sent.headers.items()], sent.path.encode(), sent.target.encode()
    query = target[len(path) :]
    tail: list[Callable[[bytes], bytes]] = []
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        draw = random.random()
        if body is not None and draw < 0.75:
            body = random.choice(_STRUCTURAL)(random, body)
        elif body is not None and draw < 0.92:
            tail.append(partial(random.choice(_RAW), random))
        elif draw < 0.6 and body is None:
            query = _query(random, query)
        elif draw < 0.85 and body is None:
            path = _path(random, path)
        else:
            head.append(random.choice(_HEADERS))
    raw = b"" if body is None else _encoded(body)
    for way in tail:
        raw = way(raw)
    return wire(sent.method, path + query, head, raw), raw


def wire(method: str, target: bytes, headers: list[tuple[str, str]], body: bytes) -> bytes:
    """A request's head."""
    lines = [f"{name}: {value}".encode("latin-1") for name, value in headers]
    lines += [b"host: 127.0.0.1", b"content-length: %d" % len(body)]
    return b"%b %b HTTP/1.1\r\n%b\r\n\r\n" % (method.encode(), target, b"\r\n".join(lines))


def encoded(body: Any) -> bytes:
    """A valid body's bytes."""
    return b"" if body is None else json.dumps(body).encode()


def _encoded(body: Any) -> bytes:
    """As JSON, with the literals in their places."""
    parts = json.dumps(body).split(f'"{LITERAL}')
    made = [parts[0]]
    for part in parts[1:]:
        end = next(at for at, char in enumerate(part) if char == '"' and not _escaped(part, at))
        made.append(str(json.loads(f'"{part[:end]}"')) + part[end + 1 :])
    return "".join(made).encode()


def _escaped(text: str, at: int) -> bool:
    return (at - len(text[:at].rstrip("\\"))) % 2 == 1


# -- Values -----------------------------------------------------------------------------------------------------------------


def _places(value: Any) -> Iterator[Place]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield value, key
        yield from _places(one)


def _place(random: Random, body: Any) -> Place | None:
    places = list(_places(body))
    return random.choice(places) if places else None


def _replace(random: Random, body: Any) -> Any:
    if place := _place(random, body):
        place[0][place[1]] = copy.deepcopy(random.choice(_JUNK))
        return body
    return copy.deepcopy(random.choice(_JUNK))


def _delete(random: Random, body: Any) -> Any:
    if place := _place(random, body):
        del place[0][place[1]]
    return body


def _double(random: Random, body: Any) -> Any:
    """An element again, or a key beside itself."""
    if place := _place(random, body):
        holder, key = place
        if isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        else:
            holder[f"{key}{random.choice(_STRINGS)}"] = copy.deepcopy(holder[key])
    return body


def _swap(random: Random, body: Any) -> Any:
    one, other = _place(random, body), _place(random, body)
    if one and other:
        value = copy.deepcopy(other[0][other[1]])
        other[0][other[1]] = copy.deepcopy(one[0][one[1]])
        one[0][one[1]] = value
    return body


def _wrap(random: Random, body: Any) -> Any:
    if place := _place(random, body):
        inner = place[0][place[1]]
        place[0][place[1]] = random.choice(([inner], {"a": inner}, [inner, inner], {"type": inner}, str(inner)))
    return body


def _rename(random: Random, body: Any) -> Any:
    place = _place(random, body)
    if place and isinstance(place[0], dict):
        value = place[0].pop(place[1])
        place[0][random.choice((*_STRINGS, "type", "id", "role", "name", "content"))] = value
    return body


def _cut(random: Random, body: Any) -> Any:
    """A string loses its end, or gains one."""
    place = _place(random, body)
    if place and isinstance(place[0][place[1]], str):
        text = place[0][place[1]]
        place[0][place[1]] = text[: random.randint(0, len(text))] + random.choice(("", *_STRINGS))
    return body


def _many(random: Random, body: Any) -> Any:
    """A list is long."""
    place = _place(random, body)
    if place and isinstance(place[0], list):
        place[0].extend([copy.deepcopy(place[0][place[1]])] * random.choice((10, 200)))
    return body


_STRUCTURAL = [_replace, _replace, _replace, _replace, _delete, _delete, _double, _swap, _wrap, _rename, _cut, _many]

# -- Bytes ------------------------------------------------------------------------------------------------------------------


def _flip(random: Random, raw: bytes) -> bytes:
    at = random.randrange(len(raw) + 1)
    return raw[:at] + bytes([random.randrange(256)]) + raw[at + 1 :]


def _insert(random: Random, raw: bytes) -> bytes:
    at = random.randrange(len(raw) + 1)
    return raw[:at] + random.choice(_BYTES) + raw[at:]


def _in_a_string(random: Random, raw: bytes) -> bytes:
    """Bytes after a quotation mark, so that the JSON around them stays valid."""
    at = random.choice([0, *(at + 1 for at, byte in enumerate(raw) if byte == ord('"'))])
    return raw[:at] + random.choice(_BYTES) + raw[at:]


def _truncate(random: Random, raw: bytes) -> bytes:
    return raw[: random.randrange(len(raw) + 1)]


def _other_encoding(random: Random, raw: bytes) -> bytes:
    return random.choice(
        (b"\xef\xbb\xbf" + raw, raw.decode("latin-1").encode("utf-16"), b"\x1f\x8b" + raw, b"  " + raw + b"\n")
    )


_RAW = [_flip, _flip, _insert, _insert, _in_a_string, _in_a_string, _truncate, _other_encoding]


def _escaped_word(random: Random) -> bytes:
    return quote_from_bytes(random.choice(_WORDS)).encode()


def _query(random: Random, query: bytes) -> bytes:
    pairs = [pair for pair in query.lstrip(b"?").split(b"&") if pair]
    if pairs and random.random() < 0.6:
        at = random.randrange(len(pairs))
        pairs[at] = pairs[at].partition(b"=")[0] + b"=" + _escaped_word(random)
    else:
        name = random.choice((*_NAMES, *_WORDS))
        pairs.append(quote_from_bytes(name).encode() + b"=" + _escaped_word(random))
    return b"?" + b"&".join(pairs)


def _path(random: Random, path: bytes) -> bytes:
    steps = path.split(b"/")
    at = random.randrange(1, len(steps))
    steps[at] = random.choice((_escaped_word(random), steps[at] + _escaped_word(random), steps[at][:-1]))
    return b"/".join(steps)
