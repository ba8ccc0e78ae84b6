"""What the log says of requests and runs: one line each, with everything an operator looks for and nothing of the conversation."""

import json

import httpx
import pytest

from tests.servers import Served, reprise
from tests.upstream import answer, error, script, text, usage
from tests.waiting import until


@pytest.fixture
def logged(server: Served):
    """The lines of an action that hold a value, once there is one."""

    def lines(action: str, value: str):
        def found():
            records = [json.loads(line) for line in server.printed if line.startswith("{")]
            return [one for one in records if one.get("action") == action and value in one.values()]

        return until(found)

    return lines


def test_a_request_has_one_line_and_keeps_its_clients_id(server, http, logged):
    reply = http.post("/responses", json={"model": "m", "input": "A secret."}, headers={"x-request-id": "mine-1"})
    assert reply.headers["x-request-id"] == "mine-1"
    [line] = logged("request_answered", "mine-1")
    assert {key: line[key] for key in ("method", "route", "status", "tenant_id", "level")} == {
        "method": "POST",
        "route": "/v1/responses",
        "status": 200,
        "tenant_id": "default",
        "level": "info",
    }
    assert 0 <= line["ms"] < 60_000
    assert "A secret." not in "".join(server.printed)


def test_a_line_names_the_route_and_no_id(http, logged):
    id = http.post("/responses", json={"model": "m", "input": "x"}).json()["id"]
    http.get(f"/responses/{id}", headers={"x-request-id": "mine-2"})
    assert http.get("/nowhere", headers={"x-request-id": "mine-3"}).status_code == 404
    assert [(one["route"], one["status"]) for one in logged("request_answered", "mine-2")] == [
        ("/v1/responses/{response_id}", 200)
    ]
    assert [(one["route"], one["status"]) for one in logged("request_answered", "mine-3")] == [("unknown", 404)]


@pytest.mark.parametrize("id", ["a" * 129, "a b", 'a"b', ""])
def test_an_id_that_is_none_is_not_taken_over(http, id):
    assert http.get("/models", headers={"x-request-id": id}).headers["x-request-id"].startswith("req_")


def test_probes_are_no_news(server, http, logged):
    with httpx.Client(base_url=server.url.removesuffix("/v1")) as probe:
        probe.get("/livez", headers={"x-request-id": "probe-1"})
    http.get("/models", headers={"x-request-id": "mine-4"})
    assert logged("request_answered", "mine-4")
    assert "probe-1" not in "".join(server.printed)


@pytest.mark.parametrize("background", [False, True])
def test_the_end_of_a_run_says_what_it_took(client, logged, background):
    given = script([*answer("Hello."), usage(12, 5)])
    made = client.responses.create(model="scripted", input=given, background=background)
    [line] = logged("run_ended", made.id)
    assert line["duration_s"] >= 0
    expected = {"status": "completed", "model": "scripted", "upstream": "default", "error": None, "reason": None}
    expected |= {"input_tokens": 12, "output_tokens": 5, "attempts": 1, "tenant_id": "default"}
    assert {key: line[key] for key in expected} == expected


def test_lines_of_requests_and_runs_name_the_key_by_its_id(new_server, base_env, new_database):
    env = {**base_env, "DATABASE_URL": new_database()}
    made = reprise(env, "keys", "create", "--tenant", "acme", "--user", "ada")
    served = new_server(**env)
    with served.client(api_key=made.stdout.strip()) as client:
        ids = [client.responses.create(model="m", input="x", background=one).id for one in (False, True)]

    def lines():
        records = [json.loads(line) for line in served.printed if line.startswith("{")]
        ended = {one["response_id"]: one for one in records if one.get("action") == "run_ended"}
        answered = [one for one in records if one.get("action") == "request_answered"]
        return [*answered, *ended.values()] if set(ids) <= ended.keys() and len(answered) == 2 else None

    named = {"tenant_id": "acme", "user": "ada", "key_id": made.stderr.split()[0]}
    assert [{name: line.get(name) for name in named} for line in until(lines)] == [named] * 4


def test_the_end_of_a_failed_run_says_its_code_but_nothing_that_an_upstream_wrote(client, logged, http):
    given = script([text("Hm."), error("it hurts", code="sesame.7")])
    events = http.post("/responses", json={"model": "m", "input": given, "stream": True}).text
    id = json.loads(events.partition("data: ")[2].partition("\n")[0])["response"]["id"]
    [line] = logged("run_ended", id)
    assert (line["status"], line["error"]) == ("failed", "other")
