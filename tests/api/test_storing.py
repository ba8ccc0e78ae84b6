"""A stream's row is stored while its upstream opens; of a request that is refused then, or left, nothing stays."""

import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from tests.upstream import finish, gate, note, script, status, text
from tests.waiting import fetch, settled, until


@pytest.fixture
def rows(server, said):
    """Gives the status of this test's responses, as the table has them."""

    def find() -> list[str]:
        found = fetch(
            server.database_url, "select status from responses where metadata ->> 'test' = $1 order by id", said[-500:]
        )
        return [row["status"] for row in found]

    return find


@pytest.fixture
def body(said):
    """The body of a stream that is found again."""
    return {"model": "m", "metadata": {"test": said[-500:]}, "stream": True}


def left(server) -> dict[str, int]:
    """How many rows each table has that a response adds to."""
    tables = ("responses", "items", "branches", "runs", "facets")
    return {table: fetch(server.database_url, f"select count(*) from {table}")[0][0] for table in tables}


@pytest.fixture
def quiet(server):
    """Waits until nothing is being made on the shared server any more."""

    def wait() -> dict[str, int]:
        until(lambda: left(server)["runs"] == 0)
        return left(server)

    return wait


def test_the_row_is_stored_while_the_upstream_opens(client, upstream, said, rows, body):
    asking = script([gate(said), text("Hi"), finish()])
    with ThreadPoolExecutor() as pool:
        streamed = pool.submit(lambda: list(client.responses.create(input=asking, **body)))
        upstream.wait_reached(said)
        until(lambda: rows() == ["in_progress"])
        assert not streamed.done()
        upstream.open(said)
        events = streamed.result()
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1].type == "response.completed"
    assert rows() == ["completed"]


@pytest.mark.parametrize("of", ["nothing", "a tip", "a middle"])
@pytest.mark.parametrize("stream", [True, False])
def test_nothing_stays_of_what_the_upstream_refuses(client, server, upstream, said, body, quiet, of, stream):
    root = client.responses.create(model="m", input="one")
    tip = client.responses.create(model="m", input="two", previous_response_id=root.id)
    parent = {"nothing": None, "a tip": tip.id, "a middle": root.id}[of]
    before = quiet()
    asking = script([gate(said), status(400)])
    body |= {"stream": stream, "previous_response_id": parent}
    with ThreadPoolExecutor() as pool:
        refused = pool.submit(client.responses.create, input=asking, **body)
        upstream.wait_reached(said)
        if stream or parent:
            until(lambda: left(server)["runs"] == 1)
        upstream.open(said)
        assert isinstance(refused.exception(), openai.BadRequestError)
    assert quiet() == before
    # The place is free again.
    again = client.responses.create(model="m", input="three", previous_response_id=tip.id)
    threads = fetch(
        server.database_url, "select distinct thread_id from responses where id = any($1)", [tip.id, again.id]
    )
    assert len(threads) == 1


def test_a_parent_that_is_deleted_meanwhile_goes_with_what_was_refused(client, server, upstream, said, body, quiet):
    before = quiet()
    parent = client.responses.create(model="m", input="one")
    asking = script([gate(said), status(400)])
    with ThreadPoolExecutor() as pool:
        refused = pool.submit(client.responses.create, input=asking, previous_response_id=parent.id, **body)
        until(lambda: left(server)["runs"] == 1)
        client.responses.delete(parent.id)
        upstream.open(said)
        assert isinstance(refused.exception(), openai.BadRequestError)
    assert quiet() == before


def test_nothing_stays_of_what_its_client_left_before_the_upstream_answered(server, upstream, said, rows, body, quiet):
    before = quiet()
    asking = script([gate(said), text("Hi"), finish()])
    with httpx.Client() as leaving:
        begun = threading.Thread(target=_leave, args=(leaving, f"{server.url}/responses", {**body, "input": asking}))
        begun.start()
        until(lambda: rows() == ["in_progress"])
        begun.join()
    assert quiet() == before
    [record] = upstream.asked(asking)
    assert record.closed.wait(5)


def _leave(client: httpx.Client, url: str, body: dict) -> None:
    with pytest.raises(httpx.ReadTimeout):
        client.post(url, json=body, timeout=httpx.Timeout(10, read=2))


def test_a_server_that_dies_before_the_upstream_answers_leaves_nothing_in_progress(new_server, upstream, said, body):
    dying = new_server(REPRISE_LEASE_S="1")
    with dying.client() as client, ThreadPoolExecutor() as pool:
        asking = script([note(said), gate(said), text("Hi"), finish()])
        pool.submit(client.responses.create, input=asking, **body)
        until(lambda: fetch(dying.database_url, "select count(*) from runs")[0][0] == 1)
        [row] = fetch(dying.database_url, "select id from responses")
        dying.kill()
    dying.start()
    with dying.client() as client:
        assert settled(client.responses.retrieve, row["id"], error=openai.NotFoundError).status == "failed"
