"""Fixtures of the fault suite: servers of its own, and one cluster that is repaired before each test."""

import os
import random
import time
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from tests.faults.client import decoded, frames_of, get
from tests.faults.cluster import Cluster, Servers
from tests.faults.memory import Grown
from tests.faults.stream_oracle import checked_response, text_of
from tests.servers import Served
from tests.toolserver import Toolprocess

SEED, ENDS = os.environ.get("FAULTS_SEED"), os.environ.get("FAULTS_END")
"""Set by `make faults`: the order of the tests, with other timing (cluster.py); the monotonic time of the last test's begin."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With a seed the modules come in another order, and so do the tests of each."""
    if SEED is not None:
        items.sort(key=lambda item: [random.Random(SEED + at).random() for at in (item.location[0], item.nodeid)])


def pytest_runtest_logfinish(nodeid: str, location: object) -> None:
    """No more tests once the time is over."""
    if ENDS is not None and time.monotonic() > float(ENDS):
        pytest.exit("the time is over", returncode=0)


Found = Callable[[Served], list[dict[str, Any]]]


@pytest.fixture
def grown():
    """The peak of a server's memory."""
    return Grown()


@pytest.fixture(scope="session")
def own_servers(tmp_path_factory):
    """A Postgres and a Valkey that may be killed."""
    servers = Servers(tmp_path_factory.mktemp("faults"))
    yield servers
    servers.close()


@pytest.fixture(scope="session")
def fault_env(upstream, tmp_path_factory):
    """Settings of every process but its servers."""
    return {
        "OPENAI_BASE_URL": upstream.base_url,
        "REPRISE_DATA_DIR": str(tmp_path_factory.mktemp("faults-data")),
        "REPRISE_OUTBOUND_ALLOW": "127.0.0.1/32",
    }


@pytest.fixture(scope="session")
def standing(own_servers, fault_env):
    """The cluster that most tests share."""
    cluster = Cluster(own_servers, fault_env)
    yield cluster
    cluster.close()


@pytest.fixture(scope="session")
def standing_toolserver(tmp_path_factory):
    """A scripted MCP server that may be killed."""
    with Toolprocess(tmp_path_factory.mktemp("faults-tools") / "calls") as running:
        yield running


@pytest.fixture
def box(standing_toolserver):
    """The same, alive."""
    if standing_toolserver.process.poll() is not None:
        standing_toolserver.start()
    return standing_toolserver


@pytest.fixture
def cluster(standing):
    """Two replicas and one worker at least, in their initial state; a test may leave nothing over."""
    standing.ensure()
    yield standing
    try:
        standing.assert_nothing_is_left()
    finally:
        print(standing.printed)  # captured, and shown only for a failed test


@pytest.fixture(scope="session")
def official():
    """The official client."""
    with openai.OpenAI(base_url="http://nowhere", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def check(cluster, official):
    """Checks one client's events by the oracle, the row, later replays and the official client; returns the response."""

    def check(follower, *, status="completed", jumps=0):
        seen = follower.join()
        response = checked_response(seen, jumps=jumps)
        assert response["status"] == status
        for url in cluster.urls:
            assert get(url, follower.response_id) == response
            kept = frames_of(url, follower.response_id)
            if jumps:
                assert checked_response([decoded(frame) for frame in kept], jumps=jumps) == response
            else:
                assert kept == follower.frames
        if status == "completed":
            with official.with_options(base_url=cluster.urls[0]).responses.stream(response_id=response["id"]) as stream:
                assert stream.get_final_response().output_text == text_of(
                    {"output": [item for item in response["output"] if item["type"] == "message"]}
                )
        return response

    return check


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
