"""Credentials of tool servers while Postgres is away."""

import httpx

from tests.faults.cluster import Cluster
from tests.upstream import answer, calling, note, script
from tests.waiting import until


def test_without_postgres_a_request_that_may_need_a_credential_is_a_503_and_one_with_its_own_is_made(
    own_servers, fault_env, box
):
    cluster = Cluster(own_servers, fault_env, REPRISE_KEY_CACHE_S="3600", REPRISE_AGENT_CACHE_S="3600")
    try:
        cluster.ensure(replicas=1, workers=0)
        url = box.url("outage")
        with httpx.Client(base_url=cluster.urls[0], timeout=60) as http:
            stored = {"server_url": url, "authorization": "s3cret-stored"}
            assert http.post("/tool_credentials", json=stored).status_code == 200

            def ask(**fields: str) -> httpx.Response:
                tool = {"type": "mcp", "server_label": "box", "server_url": url, "require_approval": "never", **fields}
                given = script([note("outage"), *calling("echo", {"x": 1})], answer("Done."))
                return http.post("/responses", json={"model": "m", "input": given, "store": False, "tools": [tool]})

            assert ask().json()["status"] == "completed"
            with own_servers.without_postgres():
                refused = ask()
                assert (refused.status_code, refused.json()["error"]["message"]) == (
                    503,
                    "The database is unavailable; please try again.",
                )
                assert len(box.calls("outage")) == 1  # the server is not called without what is stored for it
                assert ask(authorization="its-own").json()["status"] == "completed"
            until(lambda: ask().status_code == 200)
        sent = [one["headers"].get("authorization") for one in box.calls("outage")]
        assert sent == ["Bearer s3cret-stored", "Bearer its-own", "Bearer s3cret-stored"]
    finally:
        cluster.close()
