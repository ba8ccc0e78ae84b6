"""Tool servers that are programs: who shares them, how many there are, and what becomes of those that die, hang or idle."""

import asyncio
import json
import os
import signal
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import structlog
from msgspec.structs import replace

from app.outbound.guard import Guard
from app.outbound.masking import Mask
from app.outbound.mcp import ToolFailure, ToolServer, ToolSessions
from app.outbound.programs import Programs
from app.settings import Settings
from tests.processes import processes
from tests.servers import ROOT
from tests.waiting import until

Runs = Callable[..., ToolSessions]
"""Tenant → the sessions of a run."""


@pytest.fixture
def marker(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Stands in the command line of every program of a test; in the end none is left."""
    monkeypatch.chdir(ROOT)
    marker = f"mark={uuid.uuid4().hex}"
    yield marker
    until(lambda: not processes(marker))


@pytest.fixture(name="program")
def _program(marker: str) -> ToolServer:
    """The scripted tool server as a program."""
    return ToolServer("tools", command=(sys.executable, "-m", "tests.toolserver", marker), trusted=True)


def settings(**given: Any) -> Settings:
    return replace(Settings(), **given)


@pytest.fixture
async def pool(request: pytest.FixtureRequest, marker: str) -> AsyncIterator[Runs]:
    """Makes runs that share programs; the settings are the test's parameter."""
    given = settings(**getattr(request, "param", {}))
    programs: Programs[Any] = Programs(given)
    made: list[ToolSessions] = []

    def run(tenant: str = "acme") -> ToolSessions:
        made.append(ToolSessions(Guard.from_settings(given), given, Mask([]), programs, tenant=tenant))
        return made[-1]

    yield run
    await asyncio.gather(*(one.close() for one in made))
    await programs.close()


async def process(run: ToolSessions, server: ToolServer) -> dict[str, int]:
    """The process that answers, and how many calls it has had."""
    found: dict[str, int] = json.loads((await run.call(server, "process", {}, call_id="1")).text)
    return found


async def fails(work: Any) -> ToolFailure:
    with pytest.raises(ToolFailure) as caught:
        await work
    return caught.value


def running(marker: str) -> set[int]:
    """The programs, without those that keep them."""
    return {pid for pid, line in processes(marker).items() if "keeper.py" not in line}


async def test_twenty_runs_share_one_program_and_their_answers_are_their_own(
    pool: Runs, program: ToolServer, marker: str
) -> None:
    async def work(number: int) -> int:
        run = pool()
        answers = await asyncio.gather(*(run.call(program, "echo", {"n": number}, call_id="1") for _ in range(5)))
        assert [json.loads(answer.text)["n"] for answer in answers] == [number] * 5
        return (await process(run, program))["pid"]

    pids = set(await asyncio.gather(*(work(number) for number in range(20))))
    assert pids == running(marker)
    assert len(pids) == 1


async def test_what_a_request_brings_along_makes_no_other_program(pool: Runs, program: ToolServer) -> None:
    given = replace(program, headers={"x-key": "secret"}, authorization="secret")
    assert (await process(pool(), program))["pid"] == (await process(pool(), given))["pid"]
    assert "secret" not in (await pool().call(given, "headers", {}, call_id="1")).text


@pytest.mark.parametrize(
    ("shared", "of_one_tenant", "of_two"), [("tenant", True, False), ("all", True, True), ("run", False, False)]
)
async def test_the_catalog_says_who_shares_a_program(
    pool: Runs, program: ToolServer, shared: Any, of_one_tenant: bool, of_two: bool
) -> None:
    """Whoever shares it finds what others have left in its memory: here, how many calls there were."""
    program = replace(program, shared=shared)
    mine, mine_too, yours = pool("acme"), pool("acme"), pool("other")
    assert (await process(mine, program))["calls"] == 1
    assert (await process(mine_too, program))["calls"] == (2 if of_one_tenant else 1)
    assert (await process(yours, program))["calls"] == (3 if of_two else 1)
    assert (await process(mine, program))["calls"] == 2 + of_one_tenant + of_two


@pytest.mark.parametrize("pool", [{"tool_programs_max": 2}], indirect=True)
async def test_there_are_at_most_so_many_programs_and_the_next_waits(
    pool: Runs, program: ToolServer, marker: str
) -> None:
    program = replace(program, shared="run")
    most = 0

    async def work() -> int:
        nonlocal most
        async with pool() as run:
            pid = (await process(run, program))["pid"]
            most = max(most, len(running(marker)))
            return pid

    pids = await asyncio.gather(*(work() for _ in range(6)))
    assert len(set(pids)) == 6
    assert most <= 2


@pytest.mark.parametrize("pool", [{"tool_programs_max": 1, "tool_connect_timeout_s": 5.0}], indirect=True)
async def test_an_idle_program_makes_room_and_one_in_use_does_not(pool: Runs, program: ToolServer) -> None:
    async with pool("acme") as acme:
        first = await process(acme, program)
        failure = await fails(pool("other").call(program, "echo", {}, call_id="1"))
        assert (failure.kind, failure.code) == ("http_error", 503)
        assert "in use" in failure.message
    other = await process(pool("other"), program)
    assert other["pid"] != first["pid"]
    assert other["calls"] == 1


@pytest.mark.parametrize("pool", [{"tool_program_idle_s": 0.2}], indirect=True)
async def test_an_idle_program_ends_and_another_is_started(pool: Runs, program: ToolServer, marker: str) -> None:
    async with pool() as run:
        first = await process(run, program)
        await asyncio.sleep(0.5)  # longer than what is idle may live: it is held
        assert (await process(run, program))["pid"] == first["pid"]
    await asyncio.to_thread(until, lambda: not processes(marker))
    assert (await process(pool(), program))["pid"] != first["pid"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_a_killed_program_fails_its_calls_once_and_the_next_run_has_another(
    pool: Runs, program: ToolServer, marker: str, number: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    record = tmp_path_factory.mktemp("calls") / "record"
    program = replace(program, command=(*program.command, "--record", str(record)))
    mine, yours = pool(), pool()
    pid = (await process(mine, program))["pid"]
    calls = [asyncio.create_task(run.call(program, "slow", {"ms": 60_000}, call_id="1")) for run in (mine, yours)]
    await asyncio.to_thread(until, lambda: len(record.read_text().splitlines()) == 3)
    os.kill(pid, number)
    for call in calls:
        failure = await fails(call)
        assert (failure.kind, failure.code) == ("mcp_protocol_error", -32000)
    after = await process(mine, program)
    assert (after["pid"] != pid, after["calls"]) == (True, 1)
    assert (await process(pool(), program))["pid"] == after["pid"]
    assert [json.loads(line)["tool"] for line in record.read_text().splitlines()].count("slow") == 2


@pytest.mark.parametrize("pool", [{"tool_call_timeout_s": 0.5, "tool_connect_timeout_s": 3.0}], indirect=True)
async def test_a_program_that_hangs_is_replaced_and_one_that_is_only_slow_is_not(
    pool: Runs, program: ToolServer, marker: str
) -> None:
    run = pool()
    pid = (await process(run, program))["pid"]
    failure = await fails(run.call(program, "slow", {"ms": 60_000}, call_id="1"))
    assert (failure.kind, failure.code) == ("mcp_protocol_error", -32001)
    assert (await process(run, program))["pid"] == pid
    os.kill(pid, signal.SIGSTOP)
    assert (await fails(run.call(program, "echo", {}, call_id="2"))).code == -32001
    await asyncio.to_thread(until, lambda: pid not in running(marker))
    assert (await process(run, program))["pid"] != pid


async def test_the_end_of_a_run_ends_its_calls_and_nobody_elses(pool: Runs, program: ToolServer) -> None:
    mine, yours = pool(), pool()
    await process(mine, program)
    hanging = asyncio.create_task(mine.call(program, "slow", {"ms": 60_000}, call_id="1"))
    working = asyncio.create_task(yours.call(program, "slow", {"ms": 300}, call_id="2"))
    await process(yours, program)
    await mine.close()
    assert (await fails(hanging)).code == -32000
    assert (await working).text == "slept"


@pytest.mark.parametrize("pool", [{"tool_answer_bytes_max": 100_000}], indirect=True)
@pytest.mark.parametrize("shape", ["id first", "id last"])
async def test_an_answer_that_is_too_long_fails_its_own_call_only(pool: Runs, marker: str, shape: str) -> None:
    text = f"""
import json, sys
def say(id, result):
    message = {{"jsonrpc": "2.0", "id": id, "result": result}}
    if {shape == "id last"}:
        message = dict(sorted(message.items(), key=lambda member: member[0] != "result"))
    print(json.dumps(message), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    match asked:
        case {{"method": "initialize"}}:
            version = asked["params"]["protocolVersion"]
            say(asked["id"], {{"protocolVersion": version, "capabilities": {{}}, "serverInfo": {{"name": "x", "version": "1"}}}})
        case {{"method": "tools/call"}}:
            # The id of another call stands in the content, where it means nothing.
            say(asked["id"], {{"content": [], "structuredContent": {{"id": "r2", "x": "y" * asked["params"]["arguments"]["n"]}}}})
"""
    program = ToolServer("tools", command=(sys.executable, "-c", text, marker), trusted=True)
    run, other = pool(), pool()
    failure, short = await asyncio.gather(
        fails(run.call(program, "x", {"n": 5_000_000}, call_id="1")), other.call(program, "x", {"n": 10}, call_id="2")
    )
    assert "longer than 100000 bytes" in failure.message
    assert short.structured == {"id": "r2", "x": "y" * 10}


async def test_what_a_program_complains_of_is_read_bounded_and_masked(
    pool: Runs, program: ToolServer, marker: str
) -> None:
    """More on stderr than a pipe holds does not stop it; its first words are logged, and no secrets."""
    noisy = "import sys; sys.stderr.write('no such file: hush-hush\\n' + 'x' * 1_000_000 + '\\n'); sys.stderr.flush(); "
    noisy += "import runpy; sys.argv = ['x']; runpy.run_module('tests.toolserver', run_name='__main__')"
    program = replace(program, command=(sys.executable, "-c", noisy, marker), environment={"KEY": "hush-hush"})
    with structlog.testing.capture_logs() as logs:
        assert (await pool().call(program, "echo", {"x": 1}, call_id="1")).text == '{"x": 1}'
    said = [entry["line"] for entry in logs if entry["log_level"] == "info"]
    assert said[0] == "no such file: ***"
    assert len("".join(said)) < 50_000


async def test_nothing_that_a_program_has_started_outlives_it(pool: Runs, program: ToolServer, marker: str) -> None:
    """Not even what left its process group, and heeds no signal."""
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1000)"
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {stubborn!r}, '{marker} child'], start_new_session=True); "
    parent += "import runpy; sys.argv = ['x']; runpy.run_module('tests.toolserver', run_name='__main__')"
    program = replace(program, command=(sys.executable, "-c", parent, marker))
    pid = (await process(pool(), program))["pid"]
    child = f"{marker} child"
    assert processes(child)
    os.kill(pid, signal.SIGKILL)
    await asyncio.to_thread(until, lambda: not processes(child))
