"""Servers that die, servers that are told to end, and a Postgres that goes away: nothing that was told is lost."""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from app import embedded, migrate
from tests.servers import Served
from tests.upstream import answer, finish, forever, gate, note, script, status, text
from tests.waiting import count, fetch, settled, until

DIED = {"code": "server_error", "message": "The server that made this response has died."}
SHUT_DOWN = {"code": "server_error", "message": "The server was shut down."}


def text_of(response):
    return "".join(part.text for item in response.output for part in item.content)


def heard_in_thread(stream):
    """Follow a stream in a thread; gives the list that its events go to, with their times, and the thread."""
    events: list[tuple[float, object]] = []

    def follow():
        with contextlib.suppress(httpx.HTTPError, openai.APIError):
            for event in stream:
                events.append((time.monotonic(), event))  # noqa: PERF401  # seen while it grows

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    return events, thread


def wait_for_delta(events):
    until(lambda: any(event.type == "response.output_text.delta" for _, event in events))


# -- The server is killed ---------------------------------------------------------------------------------------------------


def test_a_server_killed_in_mid_stream_leaves_no_response_in_progress(new_server, upstream, said, capsys):
    served = new_server(REPRISE_LEASE_S="1")
    asking = [script([note(f"{said} {number}"), text("half"), gate(said), finish()]) for number in range(5)]
    with served.client() as client:
        whole = client.responses.create(model="m", input=f"{said} first")
        second = client.responses.create(model="m", input=f"{said} second", previous_response_id=whole.id)
        streams = [
            client.responses.create(model="m", input=one, previous_response_id=second.id, stream=True) for one in asking
        ]
        dead = [next(stream).response.id for stream in streams]
        followed = [heard_in_thread(stream) for stream in streams]
        for events, _ in followed:
            wait_for_delta(events)
        assert count(served.database_url, "runs") == len(dead)
        served.kill()
        for _, thread in followed:
            thread.join(10)
    served.start()
    begun_s = time.monotonic()
    with served.client() as client:
        found = [settled(client.responses.retrieve, id, error=openai.NotFoundError) for id in dead]
        with capsys.disabled():
            print(f"\n  the dead responses were ended {time.monotonic() - begun_s:.2f} s after the restart (lease 1 s)")
        assert [(one.status, one.error.to_dict(), one.output) for one in found] == [("failed", DIED, [])] * 5
        assert count(served.database_url, "runs") == 0
        states = fetch(served.database_url, "select status, count(*) from responses group by status order by status")
        assert [tuple(row) for row in states] == [("completed", 2), ("failed", 5)]
        for one in (whole, second):
            assert client.responses.retrieve(one.id).to_dict() == one.to_dict()
        before = [f"{said} first", f"ok: {said} first", f"{said} second", f"ok: {said} second"]
        for parent, between in ((second.id, []), (dead[0], [asking[0]])):
            said_now = f"{said} on from {parent}"
            client.responses.create(model="m", input=said_now, previous_response_id=parent)
            [record] = upstream.asked(said_now)
            assert [message["content"] for message in record.body["messages"]] == [*before, *between, said_now]


def test_another_server_ends_what_a_dead_one_left(new_server, upstream, said):
    dying = new_server(REPRISE_LEASE_S="1")
    other = new_server(REPRISE_LEASE_S="1", DATABASE_URL=dying.database_url)
    with dying.client() as client, other.client() as surviving:
        asking = script([note(said), text("half"), gate(said), text(" said"), finish()])
        dead = client.responses.create(model="m", input=asking, stream=True)
        alive = surviving.responses.create(model="m", input=asking, stream=True)
        dead_id, alive_id = next(dead).response.id, next(alive).response.id
        dying.kill()
        assert settled(surviving.responses.retrieve, dead_id, error=openai.NotFoundError).error.to_dict() == DIED
        # Its own run is older than the lease by now, and has prolonged it.
        upstream.open(said)
        assert list(alive)[-1].type == "response.completed"
        assert text_of(surviving.responses.retrieve(alive_id)) == "half said"


def test_a_server_that_was_frozen_longer_than_its_lease_tells_what_is_stored(new_server, upstream, said):
    frozen = new_server(REPRISE_LEASE_S="0.6")
    other = new_server(REPRISE_LEASE_S="0.6", DATABASE_URL=frozen.database_url)
    with frozen.client() as client, other.client() as surviving:
        asking = script([note(said), text("half"), gate(said), text(" said"), finish()])
        stream = client.responses.create(model="m", input=asking, stream=True)
        id = next(stream).response.id
        events, thread = heard_in_thread(stream)
        wait_for_delta(events)
        frozen.process.send_signal(signal.SIGSTOP)
        try:
            ended = settled(surviving.responses.retrieve, id, error=openai.NotFoundError)
            upstream.open(said)
        finally:
            frozen.process.send_signal(signal.SIGCONT)
        thread.join(10)
        assert (ended.status, ended.error.to_dict()) == ("failed", DIED)
        last = events[-1][1]
        assert last.type == "response.failed"
        assert last.response.to_dict() == ended.to_dict() == client.responses.retrieve(id).to_dict()


# -- The server is told to end ----------------------------------------------------------------------------------------------


def listens(url):
    """Whether new connections are taken."""
    port = int(url.split(":")[2].split("/")[0])
    with socket.socket() as peer:
        return peer.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_running_responses_may_finish_when_the_server_is_told_to_end(new_server, upstream, said, number):
    served = new_server()
    asking = script([note(said), text("half"), gate(said), text(" said"), finish()])
    with served.client() as client:
        events, streaming = heard_in_thread(client.responses.create(model="m", input=asking, stream=True))
        wait_for_delta(events)
        whole: list[openai.types.responses.Response] = []
        asking_whole = script([note("whole"), text("half"), gate(f"{said} whole"), text(" said"), finish()])
        waiting = threading.Thread(
            target=lambda: whole.append(client.responses.create(model="m", input=asking_whole)), daemon=True
        )
        waiting.start()
        upstream.wait_reached(f"{said} whole")
        served.process.send_signal(number)
        until(lambda: not listens(served.url))
        upstream.open(said)
        upstream.open(f"{said} whole")
        for thread in (streaming, waiting):
            thread.join(10)
        assert served.process.wait(10) == 0
    last = events[-1][1]
    assert (last.type, text_of(last.response), text_of(whole[0])) == ("response.completed", "half said", "half said")
    served.start()
    with served.client() as client:
        for one in (last.response, whole[0]):
            assert client.responses.retrieve(one.id).to_dict() == one.to_dict()


def test_responses_that_do_not_finish_in_time_end_as_failed_and_say_so(new_server, upstream, said):
    served = new_server(REPRISE_SHUTDOWN_GRACE_S="0.3")
    asking = script([note(said), text("half"), forever(text(" and"), every_ms=20)])
    with served.client() as client:
        events, streaming = heard_in_thread(client.responses.create(model="m", input=asking, stream=True))
        wait_for_delta(events)
        refused: list[openai.APIStatusError] = []

        def wait():
            with pytest.raises(openai.InternalServerError) as caught:
                client.responses.create(model="m", input=script([note("whole"), text("half"), gate(said), finish()]))
            refused.append(caught.value)

        waiting = threading.Thread(target=wait, daemon=True)
        waiting.start()
        upstream.wait_reached(said)
        begun_s = time.monotonic()
        assert served.stop() == 0
        assert time.monotonic() - begun_s < 4
        for thread in (streaming, waiting):
            thread.join(10)
    last = events[-1][1]
    assert (last.type, last.response.error.to_dict()) == ("response.failed", SHUT_DOWN)
    assert text_of(last.response).startswith("half and")
    assert refused[0].body == {"message": SHUT_DOWN["message"], "type": "server_error", "param": None, "code": None}
    served.start()
    with served.client() as client:
        assert client.responses.retrieve(last.response.id).to_dict() == last.response.to_dict()
    assert count(served.database_url, "runs") == 0
    assert [row[0] for row in fetch(served.database_url, "select status from responses")] == ["failed", "failed"]


# -- Postgres goes away -----------------------------------------------------------------------------------------------------


class Postgres:
    """A Postgres of our own, which may be harmed: its supervisor starts it again unless it is held."""

    def __init__(self, running: embedded.Embedded) -> None:
        self.url = running.database_url
        self._home = running.data_dir / "embedded"
        self._frozen: list[int] = []

    def _pid(self, file: str) -> int:
        return int((self._home / file).read_text().split()[0])

    def down(self) -> None:
        """Kill it, and let nobody start it again."""
        os.kill(self._pid("supervisor"), signal.SIGSTOP)
        self.kill()
        until(lambda: not self.listens())

    def kill(self) -> None:
        """Kill it; its supervisor starts it again."""
        os.kill(self._pid("postgres/postmaster.pid"), signal.SIGKILL)

    def up(self) -> None:
        """Let the supervisor start it again, and processes that stand still go on."""
        os.kill(self._pid("supervisor"), signal.SIGCONT)
        for pid in self._frozen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self._frozen = []
        until(self.answers)

    def freeze(self) -> None:
        """Let it and every process of it stand still."""
        parent = self._pid("postgres/postmaster.pid")
        os.kill(parent, signal.SIGSTOP)
        found = [path for path in Path("/proc").glob("[0-9]*/stat") if _parent_of(path) == parent]
        self._frozen = [parent, *(int(path.parent.name) for path in found)]
        for pid in self._frozen:
            os.kill(pid, signal.SIGSTOP)

    def listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as peer:
            return peer.connect_ex(str(self._home / "run" / ".s.PGSQL.5432")) == 0

    def answers(self) -> bool:
        try:
            return fetch(self.url, "select 1")[0][0] == 1
        except Exception:  # noqa: BLE001  # it may say no in many ways while it starts
            return False


def _parent_of(stat: Path) -> int:
    try:
        return int(stat.read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


@pytest.fixture(scope="module")
def own_postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    with embedded.start(tmp_path_factory.mktemp("own"), durable=False) as running:
        migrate.upgrade(running.database_url)
        yield Postgres(running)


@pytest.fixture
def postgres(own_postgres: Postgres) -> Iterator[Postgres]:
    """It is up again after each test, whatever the test did."""
    try:
        yield own_postgres
    finally:
        own_postgres.up()


@pytest.fixture(scope="module")
def robust(base_env: Mapping[str, str], own_postgres: Postgres) -> Iterator[Served]:
    env = {**base_env, "DATABASE_URL": own_postgres.url, "REPRISE_DATABASE_TIMEOUT_S": "1", "REPRISE_LEASE_S": "30"}
    with Served(env) as running:
        yield running


@pytest.fixture
def http(robust: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=robust.url, timeout=30) as made:
        yield made


UNAVAILABLE = {
    "error": {
        "message": "The database is unavailable; please try again.",
        "type": "server_error",
        "param": None,
        "code": None,
    }
}


def unavailable(reply):
    assert (reply.status_code, reply.json()) == (503, UNAVAILABLE)
    assert reply.headers["x-request-id"].startswith("req_")
    return True


def test_while_postgres_is_gone_every_request_is_answered_503_and_later_it_works_again(robust, postgres, http, capsys):
    made = http.post("/responses", json={"model": "m", "input": "hi"}).json()
    path = f"/responses/{made['id']}"
    postgres.down()
    for _ in range(3):
        assert unavailable(http.get(path))
        assert unavailable(http.get("/responses"))
        assert unavailable(http.get(f"{path}/input_items"))
        assert unavailable(http.delete(path))
        assert unavailable(http.post(f"{path}/cancel"))
        for stream in (False, True):
            body = {"model": "m", "input": "hi", "previous_response_id": made["id"], "stream": stream}
            assert unavailable(http.post("/responses", json=body))
    assert unavailable(http.post("/responses", json={"model": "m", "input": "hi", "stream": True}))
    root = robust.url.removesuffix("/v1")
    assert httpx.get(f"{root}/livez").status_code == 200
    assert httpx.get(f"{root}/readyz").status_code == 503
    postgres.up()
    begun_s = time.monotonic()
    assert http.get(path).json() == made
    with capsys.disabled():
        print(f"\n  answered {(time.monotonic() - begun_s) * 1000:.0f} ms after Postgres was back")
    on = http.post("/responses", json={"model": "m", "input": "on", "previous_response_id": made["id"]})
    assert (on.status_code, on.json()["status"]) == (200, "completed")
    assert httpx.get(f"{root}/readyz").status_code == 200


def test_what_is_refused_while_postgres_is_gone_is_taken_back_later(new_server, postgres, upstream, said):
    short = new_server(DATABASE_URL=postgres.url, REPRISE_DATABASE_TIMEOUT_S="1", REPRISE_LEASE_S="3")
    body = {"model": "m", "input": script([gate(said), status(400)]), "metadata": {"test": said[-500:]}}

    def statuses():
        return fetch(postgres.url, "select status from responses where metadata ->> 'test' = $1", said[-500:])

    with short.client() as client, ThreadPoolExecutor() as pool:
        refused = pool.submit(client.responses.create, stream=True, **body)
        until(lambda: [row["status"] for row in statuses()] == ["in_progress"])
        postgres.down()
        upstream.open(said)
        assert isinstance(refused.exception(timeout=5), openai.BadRequestError)
        postgres.up()
        until(lambda: statuses() == [])
        assert client.responses.create(model="m", input="hi").status == "completed"


def test_a_postgres_that_stands_still_is_answered_503_in_time(postgres, http):
    made = http.post("/responses", json={"model": "m", "input": "hi"}).json()
    path = f"/responses/{made['id']}"
    postgres.freeze()
    begun_s = time.monotonic()
    assert unavailable(http.get(path))
    assert time.monotonic() - begun_s < 5
    postgres.up()
    until(lambda: http.get(path).status_code == 200)
    assert http.get(path).json() == made


def test_postgres_restarted_between_turns_is_not_noticed(postgres, http):
    previous = None
    for number in range(4):
        body = {"model": "m", "input": f"turn {number}", "previous_response_id": previous}
        made = http.post("/responses", json=body)
        assert made.status_code == 200, made.text
        previous = made.json()["id"]
        postgres.down()
        postgres.up()
    assert len(http.get(f"/responses/{previous}/input_items").json()["data"]) == 7


def test_the_last_event_waits_until_postgres_has_the_response(robust, postgres, upstream, said):
    with robust.client() as client:
        asking = script([note(said), text("half"), gate(said), text(" said"), finish()])
        stream = client.responses.create(model="m", input=asking, stream=True)
        id = next(stream).response.id
        events, thread = heard_in_thread(stream)
        wait_for_delta(events)
        postgres.down()
        upstream.open(said)
        # Everything is said, but the row is not stored.
        until(lambda: any(event.type == "response.output_item.done" for _, event in events))
        until(lambda: has_tried(robust))
        back_s = time.monotonic()
        postgres.up()
        thread.join(15)
        last_s, last = events[-1]
        assert last.type == "response.completed"
        assert last_s > back_s
        assert client.responses.retrieve(id).to_dict() == last.response.to_dict()
        assert count(robust.database_url, f"runs where response_id = '{id}'") == 0  # others' may wait for a lease


def has_tried(served):
    """The server has had time to try in vain: a request that needs Postgres has been answered meanwhile."""
    return httpx.get(f"{served.url}/responses").status_code == 503


def test_a_whole_reply_waits_until_postgres_has_the_response(robust, postgres, upstream, said):
    with robust.client() as client:
        made: list[openai.types.responses.Response] = []
        asking = script([note(said), text("half"), gate(said), text(" said"), finish()])
        waiting = threading.Thread(
            target=lambda: made.append(client.responses.create(model="m", input=asking)), daemon=True
        )
        waiting.start()
        upstream.wait_reached(said)
        postgres.down()
        upstream.open(said)
        until(upstream.asked(asking)[0].closed.is_set)
        assert has_tried(robust)
        assert not made
        postgres.up()
        waiting.join(15)
        assert client.responses.retrieve(made[0].id).to_dict() == made[0].to_dict()


def test_a_response_that_can_never_be_stored_fails_and_says_why(base_env, postgres, upstream, said):
    env = {
        **base_env,
        "DATABASE_URL": postgres.url,
        "REPRISE_DATABASE_TIMEOUT_S": "1",
        "REPRISE_DATABASE_RETRY_S": "0.5",
        "REPRISE_LEASE_S": "6",  # the other server on this database would end it as abandoned
    }
    with Served(env) as served, served.client() as client:
        stream = client.responses.create(
            model="m", input=script([note(said), text("a"), gate(said), finish()]), stream=True
        )
        id = next(stream).response.id
        events, thread = heard_in_thread(stream)
        wait_for_delta(events)
        postgres.down()
        upstream.open(said)
        thread.join(15)
        last = events[-1][1]
        assert last.type == "response.failed"
        assert last.response.error.message == "The database is unavailable; please try again."
        with pytest.raises(openai.InternalServerError) as caught:
            client.responses.create(model="m", input=script([note(said), *answer("whole")]))
        assert (caught.value.status_code, caught.value.body) == (503, UNAVAILABLE["error"])
        postgres.up()
        # What its client was told is stored, now that it can be.
        ended = settled(client.responses.retrieve, id, error=openai.NotFoundError)
        assert ended.to_dict() == last.response.to_dict()
        assert text_of(ended) == "a"
        assert count(postgres.url, f"runs where response_id = '{id}'") == 0  # others' may wait for a lease


BUSY_S = 1
"""What other tests on the same cores may add to the end of a process."""


@pytest.mark.parametrize("away", ["down", "frozen"])
@pytest.mark.parametrize("runs", ["go on", "have ended"])
def test_the_server_ends_in_time_while_postgres_is_away_and_its_clients_hear_so(
    base_env, postgres, upstream, said, away, runs, capsys
):
    grace_s = 1.5
    env = {**base_env, "DATABASE_URL": postgres.url, "REPRISE_SHUTDOWN_GRACE_S": f"{grace_s}", "REPRISE_LEASE_S": "30"}
    with Served(env) as served, served.client() as client:
        streamed = client.responses.create(
            model="m", input=script([note(said), text("a"), gate(f"{said} stream"), finish()]), stream=True
        )
        events, streaming = heard_in_thread(streamed)
        wait_for_delta(events)
        parent = client.responses.create(model="m", input="hi").id
        refused: list[openai.APIStatusError] = []

        def wait():
            asking = script([note("whole"), text("a"), gate(said), finish()])
            with pytest.raises(openai.InternalServerError) as caught:
                client.responses.create(model="m", input=asking, previous_response_id=parent)
            refused.append(caught.value)

        waiting = threading.Thread(target=wait, daemon=True)
        waiting.start()
        upstream.wait_reached(said)
        client.responses.create(model="m", input=script([note("bg"), text("a"), gate(f"{said} bg")]), background=True)
        upstream.wait_reached(f"{said} bg")
        postgres.down() if away == "down" else postgres.freeze()
        if runs == "have ended":
            upstream.open(said)
            upstream.open(f"{said} stream")
        begun_s = time.monotonic()
        assert served.stop() == 0
        took_s = time.monotonic() - begun_s
        for thread in (streaming, waiting):
            thread.join(10)
        with capsys.disabled():
            print(f"\n  Postgres {away}, runs {runs}: gone after {took_s:.1f} s, with a grace of {grace_s} s")
        assert took_s < grace_s + 5 + BUSY_S
        last = events[-1][1]
        assert (last.type, last.response.status) == ("response.failed", "failed")
        assert last.response.error.message == UNAVAILABLE["error"]["message"]
        assert refused[0].body == UNAVAILABLE["error"]
        assert refused[0].status_code == 503
