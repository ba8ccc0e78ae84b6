"""What a process remembers of keys and tenants."""

import time

from app.api.auth import CACHED_MAX, _remember


def test_what_is_out_of_date_is_forgotten():
    cache: dict[str, tuple[float, str]] = {}
    now = time.monotonic()
    for name, until in {"a": now - 2, "b": now - 1, "c": now + 60, "d": now - 1}.items():
        cache[name] = until, name
    _remember(cache, "e", now + 60, "e")
    assert list(cache) == ["c", "d", "e"], "as far as it is the oldest"
    _remember(cache, "c", now + 90, "c")
    assert list(cache) == ["e", "c"]


def test_there_is_a_limit():
    cache: dict[int, tuple[float, None]] = {}
    for number in range(CACHED_MAX + 5):
        _remember(cache, number, time.monotonic() + 600, None)
    assert (len(cache), next(iter(cache))) == (CACHED_MAX, 5)
