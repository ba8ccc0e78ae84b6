"""Postgres is away while requests name what may be agents."""

from tests.faults.client import call
from tests.faults.test_outages import UNAVAILABLE


def test_a_name_that_may_be_an_agent_s_is_a_503_and_what_is_known_is_served(cluster):
    replica = cluster.start_replica(REPRISE_KEY_CACHE_S="3600", REPRISE_AGENT_CACHE_S="3600")

    def create(model):
        body = {"model": model, "input": "hi", "store": False}
        return call(replica.url, "POST", "/responses", body, timeout_s=60)

    assert create("known")[0] == 200
    with cluster.servers.without_postgres():
        assert create("unknown") == (503, {"error": UNAVAILABLE})
        assert [create(name)[0] for name in ("known", "no/agent")] == [200, 200]
        assert call(replica.url, "GET", "/models", timeout_s=60) == (503, {"error": UNAVAILABLE})
    assert create("unknown")[0] == 200
