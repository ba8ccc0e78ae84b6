"""What the tests of faults share: a message of one's own, and a look at what is stored of it."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.servers import Served

Found = Callable[[Served], list[dict[str, Any]]]


@pytest.fixture
def said(request: pytest.FixtureRequest) -> str:
    """A text that is this test's own."""
    return request.node.nodeid


@pytest.fixture
def stored(said: str) -> Found:
    """The responses that a server has stored with this test's text in their metadata, newest first."""

    def find(served: Served) -> list[dict[str, Any]]:
        query = {"metadata[test]": said[-500:], "limit": 100}
        return httpx.get(f"{served.url}/responses", params=query).json()["data"]

    return find
