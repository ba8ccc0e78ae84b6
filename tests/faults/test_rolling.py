"""Servers are replaced under load, and no request fails; `python -m tests.faults.rolling` does so for longer."""

import threading

import httpx
import pytest
import uvloop

from tests.faults.rolling import port_of, roll
from tests.servers import Served
from tests.upstream import script
from tests.waiting import until

REQUESTS = 600


@pytest.mark.parametrize("through_proxy", [False, True], ids=["direct", "proxy"])
def test_no_request_fails_while_servers_are_replaced(base_env, new_database, through_proxy):
    env = {**base_env, "DATABASE_URL": new_database(), "REPRISE_SHUTDOWN_DELAY_S": "0.5"}
    found, replaced = uvloop.run(
        roll(lambda more: Served({**env, **more}), requests=REQUESTS, through_proxy=through_proxy)
    )
    assert found == {"200": REQUESTS}
    assert replaced >= 1


def test_a_server_that_ends_says_so_and_answers_on(new_server, upstream, request):
    served = new_server(REPRISE_SHUTDOWN_DELAY_S="1.5")
    name, root = request.node.name, served.url.removesuffix("/v1")
    with httpx.Client(base_url=root, timeout=30) as kept:
        assert "connection" not in kept.get("/readyz").headers
        asking = {"model": "m", "input": script([{"text": "a"}, {"gate": name}, {"finish": "stop"}])}
        made = []
        waiting = threading.Thread(
            target=lambda: made.append(httpx.post(f"{served.url}/responses", json=asking, timeout=30))
        )
        waiting.start()
        upstream.wait_reached(name)
        stopping = threading.Thread(target=served.stop)
        stopping.start()
        until(lambda: httpx.get(f"{root}/readyz").status_code == 503)
        reply = kept.get("/v1/responses")
        assert (reply.status_code, reply.headers["connection"]) == (200, "close")
        again = kept.get("/readyz")
        assert again.json()["error"]["message"] == "The server is shutting down."
        assert again.headers["retry-after"] == "1"
        assert httpx.get(f"{root}/livez").status_code == 200
        until(lambda: refuses(served))
        upstream.open(name)
        waiting.join(15)
        stopping.join(15)
        assert (made[0].status_code, made[0].headers["connection"]) == (200, "close")
    assert served.process.returncode == 0


def refuses(served):
    try:
        httpx.get(f"http://127.0.0.1:{port_of(served)}/livez")
    except httpx.ConnectError:
        return True
    return False
