"""Programs of the catalog behind whole responses: how many there are, and what the death of a process leaves."""

import asyncio
import json
import os
import signal
import sys
import uuid

import pytest

from tests.processes import processes
from tests.servers import ROOT
from tests.upstream import answer, calling, script
from tests.waiting import until


@pytest.fixture
def marker():
    """Stands in the command line of every program of a test."""
    return f"mark={uuid.uuid4().hex}"


@pytest.fixture
def serving(new_server, base_env, catalog_file, marker):
    """A server whose catalog has the scripted tool server as a program."""
    catalog = catalog_file(f"""
[upstreams.scripted]
base_url = "{base_env["OPENAI_BASE_URL"]}"
[tool_servers.program]
command = ["{sys.executable}", "-m", "tests.toolserver", "{marker}"]
environment = {{ PYTHONPATH = "{ROOT}" }}
""")
    return new_server(REPRISE_CATALOG=catalog)


TOOLS = [{"type": "mcp", "server_label": "program", "require_approval": "never"}]


def called(response):
    """What the tool `process` gave."""
    [call] = (item for item in response.output if item.type == "mcp_call")
    return json.loads(call.output)


async def test_twenty_responses_at_once_share_one_program(serving, marker):
    given = script(calling("process", {}), answer("Done."))
    async with serving.async_client() as client:
        creating = (client.responses.create(model="m", input=given, tools=TOOLS) for _ in range(20))
        found = [called(response) for response in await asyncio.gather(*creating)]
    assert len({one["pid"] for one in found}) == 1
    assert sorted(one["calls"] for one in found) == list(range(1, 21))
    assert len(processes(marker)) == 2  # and the one that keeps it


def test_a_program_killed_in_mid_call_fails_that_call_and_the_next_response_works(serving):
    with serving.client() as client:
        first = called(
            client.responses.create(model="m", input=script(calling("process", {}), answer("x")), tools=TOOLS)
        )
        hanging = script(calling("slow", {"ms": 60_000}), answer("Sorry."))
        events = client.responses.create(model="m", input=hanging, tools=TOOLS, stream=True)
        for event in events:
            if event.type == "response.mcp_call.in_progress":
                os.kill(first["pid"], signal.SIGKILL)
            if event.type == "response.completed":
                made = event.response
        [call] = (item for item in made.output if item.type == "mcp_call")
        assert call.error and call.output is None
        assert made.output_text == "Sorry."
        after = called(
            client.responses.create(model="m", input=script(calling("process", {}), answer("x")), tools=TOOLS)
        )
        assert after["pid"] != first["pid"]
        assert after["calls"] == 1


@pytest.mark.parametrize("how", ["stop", "kill"])
@pytest.mark.parametrize("state", ["idle", "frozen"])
def test_no_program_outlives_the_server(serving, marker, how, state):
    with serving.client() as client:
        found = called(
            client.responses.create(model="m", input=script(calling("process", {}), answer("x")), tools=TOOLS)
        )
    if state == "frozen":
        os.kill(found["pid"], signal.SIGSTOP)
    assert processes(marker)
    getattr(serving, how)()
    until(lambda: not processes(marker))
