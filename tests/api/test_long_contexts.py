"""Contexts in bytes: a limit for one, and a bound on all that a process holds at once."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from tests.faults.memory import Grown, needs_proc
from tests.servers import Served
from tests.upstream import finish, gate, note, script, text
from tests.waiting import fetch, until

MB = 1024 * 1024
CHAIN_MB = 8
AT_ONCE = 3
"""So many chains of that size find room: three quarters of 36 MB are for long ones."""
SMALL = {"REPRISE_CONTEXTS_BYTES_MAX": str(36 * MB), "REPRISE_DATABASE_POOL_SIZE": "1"}
PEAK_MB_MAX = 4 * 36
"""What all contexts together may take of memory: more than their bytes, since they are decoded, sent, and sent again."""

WAITING = 16
"""Background runs, of which one finds room."""

READS_PEAK_MB_MAX = 4 * 2 * CHAIN_MB + 8 * CHAIN_MB
"""Several times the bytes of all reads at once, and the replies that are not taken yet."""


def error_of(refused: openai.APIStatusError) -> tuple[int, str | None, str | None]:
    return refused.status_code, refused.code, refused.param


@pytest.fixture(scope="module")
def limited(base_env, new_database):
    """A server whose contexts may take 10,000 bytes."""
    with Served({**base_env, "DATABASE_URL": new_database(), "REPRISE_CONTEXT_BYTES_MAX": "10000"}) as running:
        yield running


@pytest.fixture
def roomy(new_server):
    """A server with room for few long contexts."""
    return new_server(**SMALL)


@pytest.fixture
def impatient(new_server):
    """One where nobody waits long for room."""
    return new_server(**SMALL, REPRISE_CONTEXT_WAIT_S="0.3")


@pytest.fixture
def crowded(new_server):
    """One that takes one run more than finds room, and lets it wait."""
    return new_server(**SMALL, REPRISE_FOREGROUND_RUNS_MAX=str(AT_ONCE + 1), REPRISE_CONTEXT_WAIT_S="600")


@pytest.fixture(scope="module")
def short(limited):
    """Its client."""
    with limited.client() as made:
        yield made


@pytest.mark.parametrize("background", [False, True])
def test_a_context_that_is_too_long_in_bytes_is_refused(short, limited, background):
    def create(size: int, previous: str | None = None) -> openai.types.responses.Response:
        asked = {"previous_response_id": previous} if previous else {}
        return short.responses.create(model="m", input="x" * size, background=background, **asked)

    first = create(3000)
    if background:
        until(lambda: short.responses.retrieve(first.id).status == "completed")
    kept = fetch(limited.database_url, "select count(*) from responses")
    with pytest.raises(openai.BadRequestError) as refused:  # the answer repeats the input
        create(5000, first.id)
    assert error_of(refused.value) == (400, "context_length_exceeded", "input")
    with pytest.raises(openai.BadRequestError) as refused:
        create(10_000)
    assert error_of(refused.value) == (400, "context_length_exceeded", "input")
    assert fetch(limited.database_url, "select count(*) from responses") == kept
    assert create(100, first.id).previous_response_id == first.id


def test_items_that_are_referred_to_count(short):
    first = short.responses.create(model="m", input="x" * 4000)
    (item,) = short.responses.input_items.list(first.id)
    with pytest.raises(openai.BadRequestError) as refused:
        short.responses.create(
            model="m", input=[{"type": "item_reference", "id": item.id}, {"role": "user", "content": "y" * 6500}]
        )
    assert error_of(refused.value) == (400, "context_length_exceeded", "input")


def test_the_bytes_of_a_context_are_counted_along_its_branches(client, server):
    root = client.responses.create(model="m", input="one")
    client.responses.create(model="m", input="two", previous_response_id=root.id)
    branch = client.responses.create(model="m", input="other", previous_response_id=root.id, background=True)
    until(lambda: client.responses.retrieve(branch.id).status == "completed")
    with client.responses.stream(model="m", input="more", previous_response_id=branch.id) as stream:
        tip = stream.get_final_response()
    counted = fetch(
        server.database_url, "select id, context_bytes from responses where id = any($1)", [root.id, branch.id, tip.id]
    )
    taken = """
        select sum(octet_length(item.body::text)) from items item join responses response using (tenant_id, thread_id, turn)
        where response.id = any($1)
    """
    along = [root.id, branch.id, tip.id]
    for id, bytes_ in counted:
        assert fetch(server.database_url, taken, along[: along.index(id) + 1])[0][0] == bytes_


async def test_long_contexts_wait_for_each_other(roomy, upstream, said):
    async with roomy.async_client() as client:
        chain = await client.responses.create(
            model="m", input=script([note("x" * CHAIN_MB * MB), text("ok"), finish()])
        )
        asking = script([note(said), text("ok"), gate(said), finish()])
        at_rest = peak_mb(roomy)
        waiting = [
            asyncio.create_task(client.responses.create(model="m", input=asking, previous_response_id=chain.id))
            for _ in range(32)
        ]
        await until_async(lambda: len(upstream.asked(asking)) == AT_ONCE)
        # Short ones neither wait, nor does whoever waits hold the only connection to Postgres.
        for _ in range(5):
            await client.responses.create(model="m", input=said)
        assert len(upstream.asked(asking)) == AT_ONCE
        upstream.open(said)
        assert {response.status for response in await asyncio.gather(*waiting)} == {"completed"}
    assert peak_mb(roomy) - at_rest < PEAK_MB_MAX


def test_reads_of_long_responses_wait_for_each_other(new_server):
    """All of them at once would be hundreds of megabytes, several times over."""
    reading = new_server(REPRISE_READS_BYTES_MAX=str(2 * CHAIN_MB * MB), REPRISE_PAGE_BYTES_MAX=str(2 * CHAIN_MB * MB))
    with reading.client() as client:
        for _ in range(4):
            made = client.responses.create(model="m", input="x", instructions="x" * CHAIN_MB * MB)
    at_rest = peak_mb(reading)

    def size_of(path: str) -> int:
        reply = httpx.get(f"{reading.url}/responses{path}", timeout=60)
        assert reply.status_code == 200
        return len(reply.content)

    with ThreadPoolExecutor(8) as threads:
        sizes = list(threads.map(size_of, ["?limit=100", f"/{made.id}"] * 4))
    assert min(sizes) > CHAIN_MB * MB
    assert max(sizes) < 2 * CHAIN_MB * MB + MB
    assert peak_mb(reading) - at_rest < READS_PEAK_MB_MAX


def test_a_context_is_forgotten_with_its_run(roomy, said):
    """One after the other: what had stayed of each would add up."""
    with roomy.client() as client:
        chain = client.responses.create(model="m", input=script([note("x" * CHAIN_MB * MB), text("ok"), finish()]))

        def go_on(times: int) -> None:
            for _ in range(times):
                client.responses.create(
                    model="m", input=script([note(said), text("ok"), finish()]), previous_response_id=chain.id
                )

        go_on(3)
        settled = peak_mb(roomy)
        go_on(12)
        assert peak_mb(roomy) - settled < 4 * CHAIN_MB


async def test_who_waits_too_long_for_room_is_told_when_to_come_again(impatient, upstream, said):
    async with impatient.async_client() as client:
        chain = await client.responses.create(
            model="m", input=script([note("x" * CHAIN_MB * MB), text("ok"), finish()])
        )
        asking = script([note(said), text("ok"), gate(said), finish()])

        async def go_on() -> openai.types.responses.Response:
            return await client.responses.create(model="m", input=asking, previous_response_id=chain.id)

        held = [asyncio.create_task(go_on()) for _ in range(AT_ONCE)]
        await until_async(lambda: len(upstream.asked(asking)) == AT_ONCE)
        with pytest.raises(openai.RateLimitError) as refused:
            await go_on()
        assert int(refused.value.response.headers["retry-after"]) > 0
        upstream.open(said)
        await asyncio.gather(*held)
        assert (await go_on()).status == "completed"


@pytest.mark.parametrize("background", [False, True])
async def test_all_of_a_request_takes_room(impatient, upstream, said, background):
    async with impatient.async_client() as client:
        asking = script([note(said), text("ok"), gate(said), finish()])

        def create(background: bool) -> Awaitable[openai.types.responses.Response]:
            return client.responses.create(
                model="m", input=asking, instructions="x" * CHAIN_MB * MB, background=background
            )

        held = [asyncio.create_task(create(background)) for _ in range(AT_ONCE)]
        await until_async(lambda: len(upstream.asked(asking)) == AT_ONCE)
        with pytest.raises(openai.RateLimitError):
            await create(False)
        upstream.open(said)
        await asyncio.gather(*held)


def test_accepted_runs_wait_for_room_however_many_they_are(new_server, upstream, said):
    queueing = new_server(REPRISE_WORKERS_IN_API="false")
    asking = script([note(said), text("ok"), gate(said), finish()])
    with queueing.client() as client:
        queued = [
            client.responses.create(model="m", input=asking, instructions="x" * (MB // 4), background=True)
            for _ in range(AT_ONCE + 3)
        ]
    cramped = new_server(
        DATABASE_URL=queueing.database_url,
        REPRISE_CONTEXTS_BYTES_MAX=str(MB + MB // 8),
        REPRISE_FOREGROUND_RUNS_MAX="1",
    )
    until(lambda: len(upstream.asked(asking)) == AT_ONCE)
    upstream.open(said)
    with cramped.client() as client:

        def ended() -> set[str]:
            return {client.responses.retrieve(one.id).status or "" for one in queued}

        until(lambda: not ended() & {"queued", "in_progress"})
        assert ended() == {"completed"}


@needs_proc
def test_runs_that_wait_for_room_are_not_in_memory(new_server, upstream, said):
    queueing = new_server(REPRISE_WORKERS_IN_API="false")
    cramped = new_server(DATABASE_URL=queueing.database_url, REPRISE_CONTEXTS_BYTES_MAX=str(8 * MB))
    asking = script([note(said), text("ok"), gate(said), finish()])
    grown = Grown()
    grown.begin(cramped)
    with queueing.client() as client:
        for _ in range(WAITING):
            client.responses.create(model="m", input=asking, instructions="x" * 5 * MB, background=True)
    until(lambda: fetch(cramped.database_url, "select count(*) from runs where state = 'running'")[0][0] == WAITING)
    until(lambda: len(upstream.asked(asking)) == 1)
    assert grown.most_kb() < WAITING * 5 * MB / 1000
    upstream.open(said)
    until(lambda: fetch(cramped.database_url, "select count(*) from runs")[0][0] == 0, timeout_s=60)


AMPLIFIED = """
[upstreams.up]
base_url = "{upstream}"
[agents.long]
model = "m"
instructions = "{text}"
variables = {{ value = "string" }}
"""
"""An agent whose value of 1 KB makes 5 MB."""


@pytest.fixture
def amplifying(new_server, upstream, catalog_file):
    """Starts servers with such an agent, and room for one request that names it."""
    catalog = catalog_file(AMPLIFIED.format(upstream=upstream.base_url, text="{{value}}" * 5_000))

    def start(**env: str) -> Served:
        cramped = {"REPRISE_CONTEXTS_BYTES_MAX": str(8 * MB), "REPRISE_CONTEXT_WAIT_S": "600"}
        return new_server(REPRISE_CATALOG=catalog, OPENAI_BASE_URL="", **cramped, **env)

    return start


VALUE = {"agent": {"variables": {"value": "x" * 1_000}}}


@needs_proc
def test_the_messages_of_an_agent_are_made_once_there_is_room_for_them(amplifying, upstream, said):
    served, grown = amplifying(), Grown()
    asking = script([note(said), text("ok"), gate(said), finish()])
    grown.begin(served)
    with served.client() as client, ThreadPoolExecutor(32) as pool:

        def create(_: int) -> str | None:
            return client.responses.create(model="long", input=asking, store=False, extra_body=VALUE).status

        waiting = [pool.submit(create, at) for at in range(32)]
        upstream.wait_reached(said)
        for _ in range(20):
            client.responses.create(model="m", input=said)
        assert len(upstream.asked(asking)) == 1
        assert grown.most_kb() < len(waiting) * 5 * MB / 1000 / 2
        upstream.open(said)
        assert {one.result() for one in waiting} == {"completed"}


@needs_proc
def test_background_runs_whose_agent_has_long_messages_wait_for_room(amplifying, upstream, said):
    queueing = amplifying(REPRISE_WORKERS_IN_API="false")
    asking = script([note(said), text("ok"), gate(said), finish()])
    with queueing.client() as client:
        for _ in range(4):
            client.responses.create(model="long", input=asking, background=True, extra_body=VALUE)
    worker = amplifying(DATABASE_URL=queueing.database_url)
    until(lambda: fetch(worker.database_url, "select count(*) from runs where state = 'running'")[0][0] == 4)
    with worker.client() as client:
        upstream.wait_reached(said)
        for _ in range(20):
            client.responses.create(model="m", input=said)
        assert len(upstream.asked(asking)) == 1
    upstream.open(said)
    until(lambda: fetch(worker.database_url, "select count(*) from runs")[0][0] == 0, timeout_s=60)


def test_a_run_that_waits_for_room_is_cancelled_at_once(new_server, upstream, said):
    queueing = new_server(REPRISE_WORKERS_IN_API="false")
    cramped = new_server(DATABASE_URL=queueing.database_url, REPRISE_CONTEXTS_BYTES_MAX=str(8 * MB))
    asking = script([note(said), text("ok"), gate(said), finish()])
    with queueing.client() as queue, cramped.client(timeout=10) as client:
        runs = [
            queue.responses.create(model="m", input=asking, instructions="x" * 5 * MB, background=True)
            for _ in range(2)
        ]
        until(lambda: fetch(cramped.database_url, "select count(*) from runs where state = 'running'")[0][0] == 2)
        upstream.wait_reached(said)
        [waiting] = [run for run in runs if client.responses.retrieve(run.id).status == "queued"]
        assert client.responses.cancel(waiting.id).status == "cancelled"
        assert len(upstream.asked(asking)) == 1
        upstream.open(said)
        until(lambda: fetch(cramped.database_url, "select count(*) from runs")[0][0] == 0, timeout_s=60)
        assert sorted(client.responses.retrieve(run.id).status for run in runs) == ["cancelled", "completed"]


async def test_a_client_that_leaves_while_it_waits_for_room_gives_up_its_place_at_once(crowded, upstream, said):
    async with crowded.async_client() as client:
        chain = await client.responses.create(
            model="m", input=script([note("x" * CHAIN_MB * MB), text("ok"), finish()])
        )
        asking = script([note(said), text("ok"), gate(said), finish()])

        def go_on() -> "asyncio.Task[openai.types.responses.Response]":
            create = client.responses.create(model="m", input=asking, previous_response_id=chain.id)
            return asyncio.create_task(create)

        async def is_full() -> bool:
            try:
                await client.responses.create(model="m", input="short")
            except openai.RateLimitError:
                return True
            return False

        held = [go_on() for _ in range(AT_ONCE)]
        await until_async(lambda: len(upstream.asked(asking)) == AT_ONCE)
        leaving = go_on()
        await asyncio.wait({leaving}, timeout=0.5)
        while not await is_full():
            if leaving.done():  # a look was quicker, and took its place
                assert isinstance(leaving.exception(), openai.RateLimitError)
                leaving = go_on()
                await asyncio.wait({leaving}, timeout=0.5)
        leaving.cancel()
        async with asyncio.timeout(30):
            while await is_full():
                pass
        upstream.open(said)
        await asyncio.gather(*held)
        assert len(upstream.asked(asking)) == AT_ONCE


def peak_mb(server: Served) -> float:
    """The most memory that the server has ever had."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


async def until_async(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
