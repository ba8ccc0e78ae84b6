"""What the tests of the API share: raw HTTP, the text of a test, and what the upstream was asked for it."""

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.servers import Served
from tests.toolserver import Toolserver
from tests.upstream import Upstream

Heard = Callable[[], dict[str, Any]]
Declare = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def http(server: Served) -> Iterator[httpx.Client]:
    """Raw HTTP to the shared server, or the module's own, below /v1."""
    with httpx.Client(base_url=server.url, timeout=30) as made:
        yield made


@pytest.fixture
def said(request: pytest.FixtureRequest) -> str:
    """A user message that is this test's own; the upstream answers `ok: <it>`."""
    return request.node.nodeid


@pytest.fixture
def heard(upstream: Upstream, said: str) -> Heard:
    """Gives the body of the one chat request that the upstream got for `said`."""

    def body() -> dict[str, Any]:
        [record] = upstream.asked(said)
        return record.body

    return body


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A tool server's name that is this test's own."""
    return "".join(filter(str.isalnum, request.node.name))


@pytest.fixture
def mcp(toolserver: Toolserver, name: str) -> Declare:
    """Declares the scripted MCP server as a tool; nothing needs approval unless it is said. `of` is the name under which the
    server finds its calls again, `options` are those of its URL."""

    def declare(
        label: str = "box", transport: str = "mcp", of: str = "", options: dict[str, Any] | None = None, **fields: Any
    ) -> dict[str, Any]:
        url = toolserver.url(transport, of or name, **(options or {}))
        return {"type": "mcp", "server_label": label, "server_url": url, "require_approval": "never", **fields}

    return declare
