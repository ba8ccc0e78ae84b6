"""Masking: secrets that a server was sent do not come back in its answers.

A secret is found as it is, escaped in JSON, URL-encoded, and in base64 at any offset inside the encoded bytes. All forms of all
secrets are one automaton (Aho-Corasick): a text is read once, however many there are.
"""

import base64
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any
from urllib.parse import quote, quote_plus

import msgspec
from ahocorasick_rs import AhoCorasick, Implementation, MatchKind

SECRET_CHARS_MIN = 6
"""Shorter values (`true`, `en`, `1`) are no secrets, and masking them would garble every answer."""

MASKED = "***"

_ESCAPE = re.compile(r"%[0-9A-F]{2}")


PUBLIC_HEADERS = frozenset(
    "accept accept-charset accept-language cache-control content-language origin pragma referer user-agent".split()
)
"""Headers that hold no secrets."""

SCHEMES = frozenset("apikey api-key basic bearer digest dpop key negotiate token".split())
"""Authentication schemes, which precede a secret in a header's value."""

KEY_NAME = re.compile(r"auth|code|cred|key|pass|secret|sig|token", re.IGNORECASE)
"""Names of headers and URL parameters that hold secrets."""


_WORD = r"(?:[A-Za-z]{1,20}|[A-Za-z]?\d{1,12}|\d{1,12}[A-Za-z])"
WORDS = re.compile(rf"{_WORD}(?:[ _.,:/+-]+{_WORD})*")
"""A value of plain words and numbers, as in `x-region: us-east-1`; masking it would garble ordinary answers."""


def is_secret(name: str, value: str) -> bool:
    """Whether a value is a secret: by its name, or because it is not plain words and numbers."""
    return bool(KEY_NAME.search(name) or name.lower() == "cookie") or not WORDS.fullmatch(value.strip())


class Mask:
    """Replaces secrets in texts and in JSON."""

    def __init__(self, secrets: Iterable[str]) -> None:
        """Secrets shorter than SECRET_CHARS_MIN are ignored."""
        self._secrets = {secret for secret in secrets if len(secret) >= SECRET_CHARS_MIN}

    @cached_property
    def _automaton(self) -> AhoCorasick:
        """Built on first use. The compact implementation: others take a second to build for long secrets."""
        forms = sorted({form for secret in self._secrets for form in _forms(secret)})
        return AhoCorasick(forms, MatchKind.LeftmostLongest, False, Implementation.ContiguousNFA)

    def text(self, text: str) -> str:
        """A text with each secret replaced."""
        if len(text) < SECRET_CHARS_MIN or not self._secrets:
            return text
        parts, end = [], 0
        for _, start, stop in self._automaton.find_matches_as_indexes(text):
            parts += [text[end:start], MASKED]
            end = stop
        return "".join([*parts, text[end:]]) if parts else text

    def json(self, value: Any) -> Any:
        """A JSON value with masked strings and keys, and numbers that equal a secret."""
        # Secrets are rare: one search of the whole value usually finds none.
        if not self._secrets or not self._automaton.find_matches_as_indexes(msgspec.json.encode(value).decode()):
            return value
        return self._within(value)

    def _within(self, value: Any) -> Any:
        match value:
            case str():
                return self.text(value)
            case dict():
                return {self.text(str(key)): self._within(inner) for key, inner in value.items()}
            case list():
                return [self._within(inner) for inner in value]
            case int() | float() if str(value) in self._secrets:
                return MASKED
        return value


def secrets_of(headers: Mapping[str, str], *, always: Collection[str] = ()) -> Iterator[str]:
    """The secrets in the values of headers: each whole, without its scheme, and the parts of cookies and Basic credentials. Those named
    in `always` are secret also if they look public."""
    for name, value in headers.items():
        if name not in always and (name.lower() in PUBLIC_HEADERS or not is_secret(name, value)):
            continue
        yield value.strip()
        scheme, _, rest = value.strip().partition(" ")
        if scheme.lower() in SCHEMES or KEY_NAME.search(name):
            yield rest.strip()
        if scheme.lower() == "basic":
            yield from _of_basic(rest)
        if "=" in value:
            yield from re.findall(r'=\s*"?([^\s;,"]+)', value)


def _of_basic(encoded: str) -> Iterator[str]:
    """User and password, and the password alone."""
    try:
        pair = base64.b64decode(encoded).decode()
    except ValueError:
        return
    yield pair
    yield pair.partition(":")[2]


def _forms(secret: str) -> Iterator[str]:
    """A secret as it is, and in its encodings."""
    yield secret
    for escaped in (msgspec.json.encode(secret).decode(), json.dumps(secret)):
        yield escaped[1:-1]
    raw = secret.encode(errors="replace")
    for encoded in (quote(raw), quote(raw, safe=""), quote_plus(raw)):
        yield encoded
        yield _ESCAPE.sub(lambda escape: escape[0].lower(), encoded)
    for form in _base64_forms(raw):
        yield form
        yield form.translate({ord("+"): "-", ord("/"): "_"})


def _base64_forms(raw: bytes) -> Iterator[str]:
    """The whole encoding, and for each of the three offsets the characters that do not depend on the bytes around it."""
    yield base64.b64encode(raw).decode()
    for before in range(3):
        encoded = base64.b64encode(bytes(before) + raw).decode()
        yield encoded[-(-8 * before // 6) : 8 * (before + len(raw)) // 6]
