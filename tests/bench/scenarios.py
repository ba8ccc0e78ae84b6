"""What is measured. Each scenario gives its figures of one round, by name; `_ms` are milliseconds, `_us` microseconds."""

import asyncio
import itertools
import os
import re
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import asyncpg
import msgspec

from tests.bench.http import Connection, request
from tests.bench.load import (
    PROMPT,
    Asked,
    Heard,
    ask_for,
    create,
    listen,
    listen_together,
    quantile,
)
from tests.bench.stage import Stage, Target, rss_kb

Figures = dict[str, float]
Scenario = Callable[["Bench"], Awaitable[Figures]]

WORDS = 8
"""Of an answer whose length does not matter."""
CALLS = 8
"""Of a run with tools: the upstream makes 3 + 3 + 2, and says its words in a fourth turn."""
DEPTHS = (100, 1000)
SETTLE_S = 0.3
COMMITS, COMMIT_SPACING_S = 50, 0.06
SAID = re.compile(rb'"text":"([^"]*)"')
ID = re.compile(rb'"id":"(resp_\w+)"')
_encode = msgspec.json.Encoder().encode


@dataclass
class Bench:
    """The stage, how long to look, and what is plotted in the end."""

    stage: Stage
    quick: bool
    chain_ms: dict[int, list[float]] = field(default_factory=dict)
    """Depth → latencies of such turns."""
    concurrency: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    """Target → clients → requests per second."""
    latencies_ms: dict[str, list[float]] = field(default_factory=dict)
    """Target → latencies of creates by 16 clients."""
    stored: list[str] = field(default_factory=list)
    """Responses to be read."""
    deep: str = ""
    """The last response of a long chain."""

    @property
    def seconds(self) -> float:
        """How long the clients of one measurement ask."""
        return 1.5 if self.quick else 3.0


# -- Whole replies ----------------------------------------------------------------------------------------------------------


async def creates(bench: Bench) -> Figures:
    """Non-stream creates by 16 clients, stored."""
    figures: Figures = {}
    for target in bench.stage.targets:
        asked = await _creates(bench, target, 16, figures)
        bench.latencies_ms.setdefault(target.name, []).extend(asked.latencies)
    return figures


async def _creates(bench: Bench, target: Target, clients: int, figures: Figures) -> Asked:
    async with bench.stage.spending(*target.pids) as spent:
        asked = await ask_for(bench.seconds, clients, [target], itertools.repeat(create(target, WORDS, 0)))
    count = len(asked.latencies)
    figures |= {
        f"{target.name}_per_s": asked.per_s,
        f"{target.name}_cpu_ms": spent.server_s / count * 1000,
        f"{target.name}_p50_ms": quantile(asked.latencies, 0.5),
        f"{target.name}_p99_ms": quantile(asked.latencies, 0.99),
    }
    if target is bench.stage.server:
        figures |= {
            "postgres_cpu_ms": spent.postgres_s / count * 1000,
            "redis_cpu_ms": spent.redis_s / count * 1000,
            "server_rss_mb": rss_kb(target.pids[0]) / 1024,
        }
    return asked


async def creates_alone(bench: Bench) -> Figures:
    """Non-stream creates by one client: what the server adds to the upstream's latency."""
    figures: Figures = {}
    for target in bench.stage.targets:
        await _creates(bench, target, 1, figures)
    return figures | _added(figures, "p50_ms")


def _added(figures: Figures, latency: str) -> Figures:
    """What the server, and what its libraries alone, add to the upstream's latency."""
    return {
        f"{name}_added_{latency}": figures[f"{name}_{latency}"] - figures[f"upstream_{latency}"]
        for name in ("server", "libraries")
    }


async def concurrency(bench: Bench) -> Figures:
    """Throughput of creates against the number of clients."""
    figures: Figures = {}
    for clients in (1, 2, 4, 8, 16, 32, 64):
        for target in bench.stage.targets:
            asked = await ask_for(bench.seconds / 3, clients, [target], itertools.repeat(create(target, WORDS, 0)))
            bench.concurrency.setdefault(target.name, {}).setdefault(clients, []).append(asked.per_s)
            figures[f"{target.name}_{clients}_per_s"] = asked.per_s
    return figures


async def two_processes(bench: Bench) -> Figures:
    """Creates by 32 clients at one process, and at two on the same data.

    All processes share this machine's cores, which would be saturated at `gain_at_most` without other load.
    """
    stage, figures = bench.stage, Figures()
    for name, targets in {"one": [stage.server], "two": [stage.server, stage.second]}.items():
        sent = itertools.repeat(create(stage.server, WORDS, 0))
        pids = [pid for target in targets for pid in target.pids]
        ours_s = time.process_time()
        async with stage.spending(*pids) as spent, stage.spending(*stage.upstream.pids) as upstream:
            asked = await ask_for(bench.seconds, 32, targets, sent)
        others_s = spent.postgres_s + upstream.server_s + time.process_time() - ours_s
        count = len(asked.latencies)
        figures |= {
            f"{name}_per_s": asked.per_s,
            f"{name}_server_cpu_ms": spent.server_s / count * 1000,
            f"{name}_others_cpu_ms": others_s / count * 1000,
        }
    every_ms = figures["two_server_cpu_ms"] + figures["two_others_cpu_ms"]
    return figures | {
        "gain": figures["two_per_s"] / figures["one_per_s"],
        "gain_at_most": len(os.sched_getaffinity(0)) * 1000 / every_ms / figures["one_per_s"],
    }


# -- Streams ----------------------------------------------------------------------------------------------------------------


async def streams(bench: Bench) -> Figures:
    """64 streams of 200 words, one every 5 ms; and how much of a stream's CPU is spent before its first word and after its
    last, which is what a stream of one word takes."""
    target, each = bench.stage.server, 4
    figures = await _streams(bench, clients=64, words=200, pace_ms=5, each=1 if bench.quick else 2)
    async with bench.stage.spending(*target.pids) as spent:
        heard = await listen_together([(target.port, create(target, 1, 0, stream=True))] * 64, each=each, spread_s=1)
    return figures | {"server_cpu_ms_of_one_word": spent.server_s / len(heard) * 1000}


async def streams_many(bench: Bench) -> Figures:
    """256 of them."""
    return await _streams(bench, clients=256, words=200, pace_ms=5, each=1)


async def streams_calm(bench: Bench) -> Figures:
    """16 streams of 50 words, one every 20 ms, that begin all over the time: the time to the first delta."""
    figures = await _streams(bench, clients=16, words=50, pace_ms=20, each=2 if bench.quick else 4)
    figures |= _added(figures, "first_p50_ms") | _added(figures, "first_p99_ms")
    return figures | {"commit_p50_ms": await _commit_ms(bench.stage)}


async def streams_waited_for(bench: Bench) -> Figures:
    """The same from a model that reads the prompt for 10 ms: the row is committed meanwhile."""
    each = 2 if bench.quick else 4
    figures = await _streams(bench, clients=16, words=50, pace_ms=20, wait_ms=10, each=each)
    return figures | _added(figures, "first_p50_ms") | _added(figures, "first_p99_ms")


async def _commit_ms(stage: Stage) -> float:
    """How long a commit takes that nothing but one row is in, as often as these streams begin."""
    taken: list[float] = []
    connection = await asyncpg.connect(stage.database_url)
    try:
        await connection.execute("create table if not exists bench (said text)")
        insert = await connection.prepare("insert into bench values (repeat('x', 1000))")
        for _ in range(COMMITS):
            await asyncio.sleep(COMMIT_SPACING_S)
            begun = time.perf_counter()
            await insert.fetch()
            taken.append((time.perf_counter() - begun) * 1000)
    finally:
        await connection.close()
    return quantile(taken, 0.5)


async def _streams(bench: Bench, *, clients: int, words: int, pace_ms: int, each: int, wait_ms: int = 0) -> Figures:
    figures: Figures = {}
    for target in bench.stage.targets:
        sent = create(target, words, pace_ms, wait_ms=wait_ms, stream=True)
        async with bench.stage.spending(*target.pids) as spent:
            heard = await listen_together([(target.port, sent)] * clients, each=each, spread_s=words * pace_ms / 1000)
        deltas = sum(one.deltas for one in heard)
        assert deltas == clients * each * words, (target, deltas)
        figures |= {
            f"{target.name}_cpu_us_per_delta": spent.server_s / deltas * 1e6,
            f"{target.name}_slowdown": statistics.median(one.whole_ms for one in heard) / (words * pace_ms),
            **_first(target, heard),
            **_late(target, heard),
        }
        if target is bench.stage.server:
            figures["postgres_cpu_ms_per_stream"] = spent.postgres_s / len(heard) * 1000
    for name in ("server", "libraries"):
        figures[f"{name}_over_floor"] = figures[f"{name}_cpu_us_per_delta"] / figures["floor_cpu_us_per_delta"]
    return figures


def _first(target: Target, heard: list[Heard]) -> Figures:
    first = [one.first_ms for one in heard if one.first_ms is not None]
    return {f"{target.name}_first_p50_ms": quantile(first, 0.5), f"{target.name}_first_p99_ms": quantile(first, 0.99)}


def _late(target: Target, heard: list[Heard]) -> Figures:
    late = [each for one in heard for each in one.late_ms]
    return {f"{target.name}_late_p50_ms": quantile(late, 0.5), f"{target.name}_late_p99_ms": quantile(late, 0.99)}


async def idle_streams(bench: Bench) -> Figures:
    """Streams that have begun and then say nothing for a long time: memory of a fresh process for each."""
    figures: Figures = {}
    for name, fresh in {"server": bench.stage.fresh, "libraries": bench.stage.fresh_libraries}.items():
        with fresh() as target:
            await _idle(target, 50)  # what the first streams of a process make it load is not theirs
            before, count = rss_kb(target.pids[0]), 300 if bench.quick else 900
            async with _idling(target, count):
                grown = rss_kb(target.pids[0]) - before
        figures |= {f"{name}_kb_per_stream": grown / count, f"{name}_rss_mb": before / 1024}
    return figures


async def _idle(target: Target, count: int) -> None:
    async with _idling(target, count):
        pass
    await asyncio.sleep(SETTLE_S)


@asynccontextmanager
async def _idling(target: Target, count: int) -> AsyncIterator[None]:
    """In the block so many streams are open, each with one word said and the next far away."""
    sent = create(target, 2, 3_600_000, stream=True)
    leave = asyncio.Event()
    begun = asyncio.Semaphore(0)

    async def until(heard: Heard) -> None:
        await heard.heard(1)
        begun.release()
        await leave.wait()

    listening = [asyncio.create_task(listen(target.port, sent, until=until)) for _ in range(count)]
    for _ in range(count):
        await begun.acquire()
    yield
    leave.set()
    await asyncio.gather(*listening)


async def tools(bench: Bench) -> Figures:
    """Runs with 8 MCP calls in 4 turns by 4 clients, each run with a session of its own, over 4 creates of one turn each."""
    target, figures = bench.stage.server, Figures()
    box = {
        "type": "mcp",
        "server_label": "box",
        "server_url": bench.stage.tools_url,
        "allowed_tools": ["echo"],
        "require_approval": "never",
    }
    asks = {"create": create(target, WORDS, 0), "run": create(target, WORDS, 0, calls=CALLS, tools=[box])}
    connection = await Connection.open(target.port)
    made = await connection.ask(asks["run"])
    connection.close()
    assert made.count(b'"output":"{') == CALLS, made
    for name, sent in asks.items():
        async with bench.stage.spending(*target.pids) as spent:
            asked = await ask_for(bench.seconds, 4, [target], itertools.repeat(sent))
        count = len(asked.latencies)
        figures |= {
            f"{name}_cpu_ms": spent.server_s / count * 1000,
            f"{name}_postgres_cpu_ms": spent.postgres_s / count * 1000,
            f"{name}_p50_ms": quantile(asked.latencies, 0.5),
        }
    return figures | {"cpu_ms_per_call": (figures["run_cpu_ms"] - 4 * figures["create_cpu_ms"]) / CALLS}


# -- Chains and reading -----------------------------------------------------------------------------------------------------


async def chain(bench: Bench) -> Figures:
    """A chain of 1,000 turns and more, over the same messages sent to the upstream directly."""
    stage, figures = bench.stage, Figures()
    server, upstream = await Connection.open(stage.server.port), await Connection.open(stage.upstream.port)
    previous, messages = "", []
    direct: dict[int, list[float]] = {}
    ids: dict[int, str] = {}
    for depth in range(1, DEPTHS[-1] + 6):
        more = {"previous_response_id": previous} if previous else {}
        sent, begun = create(stage.server, WORDS, 0, **more), time.perf_counter()
        reply = await server.ask(sent)
        bench.chain_ms.setdefault(depth, []).append((time.perf_counter() - begun) * 1000)
        previous = ids[depth] = _id(reply)
        messages.append({"role": "user", "content": PROMPT})
        if near := next((one for one in DEPTHS if abs(one - depth) <= 5), None):
            body = _encode({"model": f"bench-{WORDS}x0", "messages": messages})
            sent, begun = request(stage.upstream.path, body), time.perf_counter()
            await upstream.ask(sent)
            direct.setdefault(near, []).append((time.perf_counter() - begun) * 1000)
        said = SAID.search(reply)
        assert said
        messages.append({"role": "assistant", "content": said[1].decode()})
    for depth in DEPTHS:
        turns = [bench.chain_ms[near][-1] for near in range(depth - 5, depth + 6) if near in bench.chain_ms]
        figures[f"turn_{depth}_added_ms"] = statistics.median(turns) - statistics.median(direct[depth])
    figures["turn_1_ms"] = statistics.median(bench.chain_ms[depth][-1] for depth in range(1, 6))
    bytes_1, bytes_1000 = [await _stored_bytes(stage, ids[depth]) for depth in (2, DEPTHS[-1])]
    figures |= {"bytes_1": bytes_1, "bytes_1000": bytes_1000, "bytes_growth": bytes_1000 / bytes_1}
    bench.stored, bench.deep = list(ids.values())[-100:], ids[100]
    server.close()
    upstream.close()
    return figures


async def _stored_bytes(stage: Stage, response_id: str) -> float:
    rows = await stage.rows(
        """select pg_column_size(response.*) + (
               select sum(pg_column_size(item.*)) from items item where item.thread_id = response.thread_id and item.turn = response.turn
           ) from responses response where id = $1""",
        response_id,
    )
    return float(rows[0][0])


def _id(reply: bytes) -> str:
    found = ID.search(reply)
    assert found, reply
    return found[1].decode()


async def reading(bench: Bench) -> Figures:
    """Retrieve, and list input items (20 of them, of a chain's 100th turn), by 16 clients."""
    figures: Figures = {}
    target = bench.stage.server
    asks = {
        "retrieve": [request(f"{target.path}/{id}") for id in bench.stored],
        "items": [request(f"{target.path}/{bench.deep}/input_items")],
    }
    for name, requests in asks.items():
        async with bench.stage.spending(*target.pids) as spent:
            asked = await ask_for(bench.seconds, 16, [target], itertools.cycle(requests))
        count = len(asked.latencies)
        figures |= {
            f"{name}_per_s": asked.per_s,
            f"{name}_cpu_ms": spent.server_s / count * 1000,
            f"{name}_postgres_cpu_ms": spent.postgres_s / count * 1000,
            f"{name}_p50_ms": quantile(asked.latencies, 0.5),
        }
    return figures


# -- Background -------------------------------------------------------------------------------------------------------------


async def background(bench: Bench) -> Figures:
    """Background runs of 20 words, one every 5 ms: 16 at once, in the API process.

    That one has ended is seen in its row, and costs the server nothing.
    """
    target, stage = bench.stage.server, bench.stage
    sent = create(target, 20, 5, background=True)
    waiting: dict[str, asyncio.Future[None]] = {}
    latencies: list[float] = []
    connections = [await Connection.open(target.port) for _ in range(16)]
    begun = time.perf_counter()

    async def make(connection: Connection) -> None:
        while (asked := time.perf_counter()) - begun < bench.seconds:
            id = _id(await connection.ask(sent))
            waiting[id] = asyncio.get_running_loop().create_future()
            await waiting[id]
            latencies.append((time.perf_counter() - asked) * 1000)

    async with stage.spending(*target.pids) as spent:
        looking = asyncio.create_task(_look(stage, waiting))
        await asyncio.gather(*map(make, connections))
        wall_s = time.perf_counter() - begun
        looking.cancel()
    for connection in connections:
        connection.close()
    return {
        "per_s": len(latencies) / wall_s,
        "server_cpu_ms": spent.server_s / len(latencies) * 1000,
        "postgres_cpu_ms": spent.postgres_s / len(latencies) * 1000,
        "redis_cpu_ms": spent.redis_s / len(latencies) * 1000,
        "p50_ms": quantile(latencies, 0.5),
    }


async def _look(stage: Stage, waiting: dict[str, "asyncio.Future[None]"]) -> None:
    connection = await asyncpg.connect(stage.database_url)
    try:
        while True:
            ended = await connection.fetch(
                "select id from responses where id = any($1) and status not in ('queued', 'in_progress')", [*waiting]
            )
            for row in ended:
                waiting.pop(row["id"]).set_result(None)
            await asyncio.sleep(0.01)
    finally:
        await connection.close()


async def background_streams(bench: Bench) -> Figures:
    """64 background streams of 100 words, one every 20 ms, made by a worker process and followed on an API process."""
    stage = bench.stage
    sent = create(stage.replica, 100, 20, background=True, stream=True)
    async with stage.spending(*stage.replica.pids) as api, stage.spending(stage.worker) as made:
        heard = await listen_together([(stage.replica.port, sent)] * 64, spread_s=1)
    deltas = sum(one.deltas for one in heard)
    assert deltas == 6400, deltas
    return {
        **_first(stage.replica, heard),
        **_late(stage.replica, heard),
        "api_cpu_us_per_delta": api.server_s / deltas * 1e6,
        "worker_cpu_us_per_delta": made.server_s / deltas * 1e6,
        "redis_cpu_us_per_delta": made.redis_s / deltas * 1e6,
        "postgres_cpu_ms_per_run": made.postgres_s / len(heard) * 1000,
    }


async def resume(bench: Bench) -> Figures:
    """The first event of a run that is being made, and a finished one of 10,000 events from the beginning."""
    stage, target = bench.stage, bench.stage.replica
    live: list[float] = []
    for _ in range(5 if bench.quick else 10):
        sent = create(target, 50, 20, background=True, stream=True)
        left = await listen(target.port, sent, until=lambda heard: heard.heard(10))
        # Numbers 0 to 5 come before the first delta; these events are there already.
        again = await listen(target.port, _resumed(target, left.response_id, 8), until=lambda heard: heard.heard(1))
        assert again.any_ms is not None
        live.append(again.any_ms)
        await listen(target.port, _resumed(target, left.response_id, 8))
    long = await listen(target.port, create(target, 10_000, 0, background=True, stream=True))
    assert long.deltas == 10_000, long.deltas
    replays, spent_s = [], []
    for _ in range(3 if bench.quick else 5):
        async with stage.spending(*target.pids) as spent:
            again = await listen(target.port, _resumed(target, long.response_id, 0))
        assert again.deltas == 10_000, again.deltas
        replays.append(again.whole_ms)
        spent_s.append(spent.server_s)
    return {
        "first_event_p50_ms": quantile(live, 0.5),
        "replay_10000_ms": statistics.median(replays),
        "replay_10000_cpu_ms": statistics.mean(spent_s) * 1000,
    }


def _resumed(target: Target, response_id: str, after: int) -> bytes:
    return request(f"{target.path}/{response_id}?stream=true&starting_after={after}")


async def followers(bench: Bench) -> Figures:
    """1,000 clients that follow 50 runs of 10 words a second on a fresh API process."""
    with bench.stage.fresh() as target:
        return await _followers(bench, target)


async def _followers(bench: Bench, target: Target) -> Figures:
    stage = bench.stage
    words, pace_ms, runs, clients = 60 if bench.quick else 100, 100, 50, 1000
    sent = create(target, words, pace_ms, background=True, stream=True)
    begun = [_begun(target, sent) for _ in range(runs)]
    ids = await asyncio.gather(*begun)
    heard_one = [listen(target.port, _resumed(target, id, 0), until=lambda heard: heard.heard(1)) for id in ids]
    await asyncio.gather(*heard_one)  # what the first followers of a process make it load is not theirs
    before, connections = rss_kb(target.pids[0]), await stage.redis_connections()
    asked = [(target.port, _resumed(target, ids[number % runs], 0)) for number in range(clients)]
    following = asyncio.create_task(listen_together(asked, spread_s=1))
    await asyncio.sleep(2)
    grown, more_connections = rss_kb(target.pids[0]) - before, await stage.redis_connections() - connections
    async with stage.spending(*target.pids) as spent:
        await asyncio.sleep(1.5)
    heard = await following
    assert all(one.deltas == words for one in heard), "a client has missed something"
    # What was said before a client came is late by no fault of ours.
    late = [each for one in heard for each in one.late_ms[words // 2 :]]
    return {
        "slowdown": 1 + quantile(late, 0.99) / (words * pace_ms),
        "kb_per_client": grown / clients,
        "redis_connections": more_connections,
        "late_p50_ms": quantile(late, 0.5),
        "late_p99_ms": quantile(late, 0.99),
        "api_cpu_us_per_delivery": spent.server_s / spent.wall_s / (clients * 1000 / pace_ms) * 1e6,
    }


async def _begun(target: Target, sent: bytes) -> str:
    """The id of a run that continues without this client."""
    return (await listen(target.port, sent, until=lambda heard: heard.heard(1))).response_id


ALL: tuple[Scenario, ...] = (
    creates,
    creates_alone,
    streams,
    streams_many,
    streams_calm,
    streams_waited_for,
    chain,
    reading,
    background,
    background_streams,
    resume,
    followers,
    tools,
    idle_streams,
    two_processes,
    concurrency,
)
NOT_IN_QUICK = frozenset({concurrency})
