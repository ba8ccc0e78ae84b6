"""What the contract's tests share: raw HTTP, and one stream of each case."""

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.api.streams import events_of
from tests.contract.cases import CASES
from tests.servers import Served

Heard = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="session")
def http(server: Served) -> Iterator[httpx.Client]:
    """Raw HTTP to the shared server, below /v1."""
    with httpx.Client(base_url=server.url, timeout=30) as made:
        yield made


@pytest.fixture(scope="session")
def heard(http: httpx.Client) -> Heard:
    """The events of a case, streamed once."""
    streamed: dict[str, list[dict[str, Any]]] = {}

    def events(name: str) -> list[dict[str, Any]]:
        if name not in streamed:
            streamed[name] = events_of(http.post("/responses", json={**CASES[name].request, "stream": True}))
        return streamed[name]

    return events
