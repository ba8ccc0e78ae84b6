"""Planted secrets, and the search for them: as they stand, and in the encodings that servers and libraries use."""

import base64
import json
from collections.abc import Iterator, Mapping
from urllib.parse import quote

from ahocorasick_rs import AhoCorasick

QUOTED_BEFORE, QUOTED_AFTER = 300, 100


def free_of(secrets: Mapping[str, str], text: str, where: str) -> None:
    """Asserts that a text holds none of these, in any form."""
    of = {form: what for what, secret in secrets.items() for form in forms(secret)}
    found = [(list(of.values())[at], begin) for at, begin, _ in AhoCorasick(list(of)).find_matches_as_indexes(text)]
    assert not found, (
        f"{found[0][0]} is in {where}: {text[max(0, found[0][1] - QUOTED_BEFORE) : found[0][1] + QUOTED_AFTER]}"
    )


def forms(secret: str) -> Iterator[str]:
    """As it stands, URL-encoded, in JSON, and the middle of its base64 wherever it begins."""
    yield from {secret, quote(secret, safe=""), json.dumps(secret)[1:-1]}
    for before in range(3):
        encoded = base64.b64encode(bytes(before) + secret.encode()).decode()
        yield encoded[4:-4]
        yield base64.urlsafe_b64encode(bytes(before) + secret.encode()).decode()[4:-4]
