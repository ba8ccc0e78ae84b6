"""A foreground run in memory: what it keeps while its reader stays, which may be long."""

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from app.domain.context import LeftOut, resolve
from app.domain.dialect import PRESETS
from app.domain.item_builders import OutputOptions
from app.domain.lifecycle import open_response
from app.errors import ApiError, UpstreamUnavailable
from app.ids import new_id
from app.outbound.guard import Guard
from app.outbound.tokens import TokenCounter
from app.rooms import Room, Rooms
from app.runs.foreground import ForegroundRun, ForegroundRuns
from app.runs.pipeline import Pipeline, Prompts
from app.runs.plan import RunPlan
from app.settings import Settings
from app.storage.backlog import Backlogs
from app.storage.queue import Owner
from app.wire.chat import Chunk
from tests.unit.build import SEAL, chunk, request


class Stream:
    """What an upstream answers: one chunk, then the end or an error."""

    model = "m"
    read_bytes = 0

    def __init__(self, upstream: "Upstream") -> None:
        self.upstream = upstream

    async def __aiter__(self) -> AsyncIterator[list[Chunk]]:
        yield [chunk(content="a", finish_reason=None)]
        if self.upstream.fails:
            raise UpstreamUnavailable("The upstream broke off.")
        yield [chunk(finish_reason="stop")]

    async def close(self) -> None: ...


class Postgres:
    """Takes what is counted."""

    @asynccontextmanager
    async def autocommit(self) -> AsyncIterator[Any]:
        yield self

    async def one(self, *_: Any, **binds: Any) -> None: ...


class Upstream:
    """An upstream whose answer breaks off, if it `fails`."""

    name = "u"
    dialect = PRESETS["plain"]
    entry = SimpleNamespace(takes=lambda _: True)

    def __init__(self, *, fails: bool) -> None:
        self.fails = fails

    def dialect_for(self, _: Any) -> Any:
        return self.dialect

    def record_reasoning_form(self, *_: Any) -> None: ...

    async def open(self, *_: Any) -> Stream:
        return Stream(self)


def start(*, fails: bool) -> tuple[ForegroundRuns, ForegroundRun, "weakref.ref[Room]"]:
    """A stream that is not stored among the runs of its process, and a weak reference to a part of its plan."""
    settings = Settings()
    programs: Any = SimpleNamespace(release=lambda *_: None)
    pipeline = Pipeline(
        settings, Guard.from_settings(settings), programs, TokenCounter(settings), Prompts("Summarize.", "Summarize.")
    )
    runs = ForegroundRuns(settings, Postgres(), pipeline, Owner("worker_1", 10.0), None)  # type: ignore[arg-type]
    asked = request(store=False, stream=True)
    room = Room(Rooms(1 << 20, waiting_max=4))
    route: Any = SimpleNamespace(model="m", lacks=frozenset(), prices=None, context_tokens=1_000)
    plan = RunPlan(
        tenant_id="tenant",
        key_id=None,
        currency="USD",
        request=asked,
        context=resolve(asked, [], {}, new_id, seal=SEAL, requests={}),
        routes=[(Upstream(fails=fails), route)],  # type: ignore[list-item]
        caller_key=None,
        seal=SEAL,
        options=OutputOptions(),
        parent=None,
        earlier_bytes=0,
        room=room,
        servers={},
        hosted={},
        tool_servers={},
        size=10,
        left_out=LeftOut((), ()),
    )
    response = open_response(asked, id="resp_1", created_at=1)
    return runs, runs.start(plan, response, Backlogs(settings).open()), weakref.ref(room)


async def ended(run: ForegroundRun) -> str:
    """The status of a run whose task is over."""
    assert run.task
    await asyncio.wait({run.task})
    await asyncio.sleep(0)  # what is called when it is done
    try:
        return (await run.finished()).status
    except ApiError:
        return "failed"


@pytest.mark.parametrize("fails", [False, True])
async def test_a_run_that_has_ended_keeps_no_context_while_it_is_read(fails: bool):
    runs, run, plan = start(fails=fails)
    assert len(runs) == 1
    assert await ended(run) == ("failed" if fails else "completed")
    gc.collect()
    assert (len(runs), plan()) == (0, None)
    assert run.log
    types = [entry.type async for batch in run.log.read(silence_s=5) for entry in batch]
    assert types[-1] == ("response.failed" if fails else "response.completed")


async def test_an_event_that_was_sent_is_kept_in_the_log_alone():
    _, run, _ = start(fails=False)
    await ended(run)
    assert run.log
    last = [entry async for batch in run.log.read(silence_s=5) for entry in batch][-1]
    gc.collect()
    holders = [holder for holder in gc.get_referrers(last) if isinstance(holder, list)]
    assert holders == []
