"""Clients that leave: their run is cancelled, or finished when the setting says so, and nothing is left behind."""

import asyncio
import contextlib
import os
import random
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path

import asyncpg
import httpx
import openai
import pytest
import uvicorn

from app import assembly
from app.settings import Settings, load
from tests.upstream import Upstream, finish, forever, gate, note, script, text
from tests.waiting import count, fetch, settled, until

CLOSED_WITHIN_S = (
    2.0  # asserted with slack for a busy machine; what is promised is 0.1, and printed is what was measured
)


@pytest.fixture
def closing(capsys):
    """Waits until the upstream has lost its client; says how long after `left_s` that was, and asserts that it is soon."""

    def measure(record, left_s):
        assert record.closed.wait(5)
        assert record.peer_left
        took_s = record.closed_s - left_s
        with capsys.disabled():
            print(f"\n  upstream closed {took_s * 1000:.1f} ms after the client left")
        assert took_s < CLOSED_WITHIN_S

    return measure


def leave_stream(served, asking, *, deltas, **body):
    """Open a stream, hear so many deltas, leave; gives the response's id and when that was."""
    with (
        served.client() as client,
        client.responses.create(model="m", input=asking, stream=True, **body) as stream,
    ):
        id = next(stream).response.id
        for _ in range(deltas):
            next(event for event in stream if event.type == "response.output_text.delta")
        stream.response.close()
        return id, time.monotonic()


def text_of(response):
    return "".join(part["text"] for item in response["output"] for part in item["content"])


def retrieved(served, id):
    """The stored response, once it has ended."""
    with served.client() as client:
        return settled(client.responses.retrieve, id, error=openai.NotFoundError).to_dict()


def test_leaving_a_stream_cancels_its_run(server, upstream, said, closing):
    asking = script([note(said), text("half"), text(" said"), gate(said), text(" never"), finish()])
    id, left_s = leave_stream(server, asking, deltas=2)
    closing(upstream.asked(asking)[0], left_s)
    made = retrieved(server, id)
    assert (made["status"], text_of(made)) == ("cancelled", "half said")
    assert [item["status"] for item in made["output"]] == ["incomplete"]
    assert (made["error"], made["incomplete_details"], made.get("completed_at")) == (None, None, None)


def test_leaving_a_stream_that_never_stops_talking_cancels_its_run(server, upstream, said, closing):
    asking = script([note(said), forever(text("w{i} "), every_ms=1)])
    id, left_s = leave_stream(server, asking, deltas=20)
    closing(upstream.asked(asking)[0], left_s)
    made = retrieved(server, id)
    assert made["status"] == "cancelled"
    assert text_of(made).startswith("".join(f"w{number} " for number in range(20)))


async def leave_whole(served, asking, upstream, name, **body):
    """Ask for a whole reply, and leave once the upstream is at the gate; says when that was."""
    async with httpx.AsyncClient(base_url=served.url, timeout=30) as http:
        asked = asyncio.create_task(http.post("/responses", json={"model": "m", "input": asking, **body}))
        await upstream.until_reached(name)
        asked.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asked
        return time.monotonic()


async def test_leaving_before_a_whole_reply_cancels_its_run(server, upstream, said, stored, closing):
    asking = script([note(said), text("half"), text(" said"), gate(said), text(" never"), finish()])
    left_s = await leave_whole(server, asking, upstream, said, metadata={"test": said[-500:]})
    await asyncio.to_thread(closing, upstream.asked(asking)[0], left_s)
    [made] = await asyncio.to_thread(until, lambda: stored(server))
    assert (made["status"], text_of(made)) == ("cancelled", "half said")
    with server.client() as client:
        assert client.responses.create(model="m", input="go on", previous_response_id=made["id"]).status == "completed"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_leaving_before_the_upstream_has_answered_leaves_nothing(server, upstream, said, stored, closing, stream):
    asking = script([note(said), gate(said), text("never"), finish()])
    left_s = await leave_whole(server, asking, upstream, said, stream=stream, metadata={"test": said[-500:]})
    await asyncio.to_thread(closing, upstream.asked(asking)[0], left_s)
    await asyncio.to_thread(until, lambda: count(server.database_url, "runs") == 0)
    assert stored(server) == []


async def test_leaving_a_response_that_is_not_stored_leaves_nothing(server, upstream, said, stored, closing):
    asking = script([note(said), text("half"), gate(said), text("never"), finish()])
    body = {"store": False, "metadata": {"test": said[-500:]}}
    left_s = await leave_whole(server, asking, upstream, said, **body)
    await asyncio.to_thread(closing, upstream.asked(asking)[0], left_s)
    id, left_s = await asyncio.to_thread(leave_stream, server, asking, deltas=1, **body)
    await asyncio.to_thread(closing, upstream.asked(asking)[1], left_s)
    assert stored(server) == []
    assert httpx.get(f"{server.url}/responses/{id}").status_code == 404


async def test_a_run_may_finish_without_its_client_when_the_setting_says_so(
    new_server, upstream, said, stored, closing
):
    served = await asyncio.to_thread(new_server, REPRISE_ON_DISCONNECT="finish")
    asking = script([note(said), text("half"), gate(said), text(" and half"), finish()])
    id, _ = await asyncio.to_thread(leave_stream, served, asking, deltas=1)
    whole_asking = script([text("half"), gate(f"{said} whole"), text(" and half"), finish()])
    await leave_whole(served, whole_asking, upstream, f"{said} whole", metadata={"test": said[-500:]})
    # Both clients are gone, as far as the server can know; neither run has ended.
    unstored, left_s = await asyncio.to_thread(leave_stream, served, asking, deltas=1, store=False)
    await asyncio.to_thread(closing, upstream.asked(asking)[1], left_s)
    assert not upstream.asked(asking)[0].peer_left
    upstream.open(said)
    upstream.open(f"{said} whole")
    made = await asyncio.to_thread(retrieved, served, id)
    assert (made["status"], text_of(made)) == ("completed", "half and half")
    [whole] = await asyncio.to_thread(until, lambda: stored(served))
    assert (whole["status"], text_of(whole)) == ("completed", "half and half")
    assert httpx.get(f"{served.url}/responses/{unstored}").status_code == 404


# -- Many -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def talker() -> Iterator[Upstream]:
    """An upstream whose connections are those of one server only."""
    with Upstream() as running:
        yield running


def talk(number):
    """A script that never ends; some begin late."""
    return script([note(f"{number}"), *([{"stall": 0.05}] if number % 3 == 0 else []), forever(text("w "), every_ms=2)])


async def come_and_go(url, number, dice):
    """One client: asks, hears a random number of events, or waits a random while, and leaves without a word."""
    body = {"model": "m", "input": talk(number), "stream": number % 4 != 0, "metadata": {"number": f"{number}"}}
    async with httpx.AsyncClient(base_url=url, timeout=30) as http:
        if number % 4 == 0 or number % 5 == 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(http.post("/responses", json=body), dice.uniform(0.001, 0.3))
            return
        heard = 0
        async with http.stream("POST", "/responses", json=body) as reply:
            wanted = dice.randrange(40)
            async for line in reply.aiter_lines():
                heard += line.startswith("data:")
                if heard >= wanted:
                    break


def footprint(pid):
    """Open files and resident kilobytes of a process."""
    resident_pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return len(list(Path(f"/proc/{pid}/fd").iterdir())), resident_pages * os.sysconf("SC_PAGE_SIZE") // 1024


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
async def test_a_hundred_clients_that_leave_at_random_leave_nothing_behind(new_server, talker, capsys):
    served = await asyncio.to_thread(new_server, OPENAI_BASE_URL=talker.base_url)
    dice = random.Random(7)
    before = None
    for round in range(3):
        await asyncio.gather(*(come_and_go(served.url, 100 * round + number, dice) for number in range(100)))

        def quiet():
            return count(served.database_url, "runs") == 0 and not talker.connections

        await asyncio.to_thread(until, quiet)
        if before is None:
            before = footprint(served.process.pid)  # the first round fills pools and caches
    after = await asyncio.to_thread(until, lambda: _no_more_files(served.process.pid, before[0]))
    with capsys.disabled():
        print(f"\n  300 clients gone: {before} -> {after} (open files, resident KB)")
    assert after[1] < before[1] * 1.25
    assert all(record.peer_left for record in talker.requests if record.body)  # but the list of its models
    states = await asyncio.to_thread(
        fetch, served.database_url, "select status, count(*) as n from responses group by status"
    )
    assert {row["status"] for row in states} == {"cancelled"}
    assert served.stop() == 0


def _no_more_files(pid, files):
    """But for connections to Postgres, which the pool opens as they are needed."""
    found = footprint(pid)
    return found if found[0] <= files + Settings().database_pool_size else None


@contextlib.asynccontextmanager
async def serving(env: Mapping[str, str]) -> AsyncIterator[str]:
    """The server inside this very loop, so that its tasks can be seen."""
    async with assembly.assembled(load(env)) as built:
        listener = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(built.app, lifespan="on", log_config=None, http="httptools", ws="none")
        server = uvicorn.Server(config)
        server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            await task


@pytest.mark.filterwarnings("ignore::litestar.exceptions.LitestarDeprecationWarning")
async def test_clients_that_leave_leave_no_task_behind(
    base_env: Mapping[str, str], new_database: Callable[[], str], talker: Upstream
):
    url = await asyncio.to_thread(new_database)
    async with serving({**base_env, "DATABASE_URL": url, "OPENAI_BASE_URL": talker.base_url}) as server:
        async with httpx.AsyncClient(base_url=server) as http:
            (await http.get("/responses")).raise_for_status()
        before = asyncio.all_tasks()
        dice = random.Random(11)
        await asyncio.gather(*(come_and_go(server, number, dice) for number in range(100)))
        deadline = time.monotonic() + 10
        while left := asyncio.all_tasks() - before:
            assert time.monotonic() < deadline, left
            await asyncio.sleep(0.01)
        assert not talker.connections
        connection = await asyncpg.connect(url)
        assert await connection.fetchval("select count(*) from runs") == 0
        await connection.close()
