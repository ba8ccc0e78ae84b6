"""Foreground runs of this process: start one, follow it, cancel it.

A run is a task of the executor; a connection only reads its log. Whether a run ends when its reader has gone is one line of
policy, `reader_gone`.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import msgspec
import structlog
from msgspec import Struct

from app.domain.lifecycle import Outcome, close_response, open_response
from app.errors import (
    RESPONSE_ID_HEADER,
    ApiError,
    DatabaseUnavailable,
    ServerError,
    ServerUnavailable,
    TooManyRequests,
)
from app.ids import new_id
from app.outbound.guard import Guard
from app.outbound.mcp import ToolPrograms
from app.outbound.upstream import ChunkStream
from app.runs.aside import aside
from app.runs.ended import log_ended
from app.runs.loop import Loop, drop_opening
from app.runs.recorder import Recorder
from app.runs.task import Task, Tasks
from app.runs.tools import Tools
from app.settings import Settings
from app.storage import approvals, responses
from app.storage.backlog import Backlog, Backlogs
from app.storage.database import UNAVAILABLE, Database, Tx
from app.storage.eventlog import MemoryLog
from app.storage.queue import Hold, Owner
from app.storage.redisclient import break_off
from app.wire.events import Entry
from app.wire.items import encode_items
from app.wire.requests import CreateResponse
from app.wire.resources import Response

log = structlog.get_logger()

LATE_ATTEMPTS_PER_LEASE = 3

CLOSE_STORE_S = 2.0
"""How long runs that a shutdown has broken off may take to be stored."""

NOT_BEGUN = "The run broke off before it began."

FOREGROUND_LEASE = 1
"""A foreground run has one owner in its life."""


class Caller(Struct, frozen=True):
    """Who asks: the tenant, and the key that was sent, unless it is one of ours."""

    tenant_id: str
    key: str | None


class Run:
    """One response in the making, as its readers see it."""

    def __init__(self, tenant_id: str, response: Response, work: Task, backlog: Backlog | None) -> None:
        """`backlog` is that of a stream's client."""
        self.tenant_id = tenant_id
        self.work = work
        self.log = MemoryLog(backlog) if backlog else None
        self.response = response
        self.error: ApiError | None = None
        self.has_output = False
        """Whether anything was recorded of its output, by the time when it ends."""
        self.leased = False
        """Whether its row may be there, with our lease."""
        self.stored = False
        """Whether it surely is there."""
        self.storing: asyncio.Task[None] | None = None
        """Stores it while the upstream opens."""
        self.ending = False
        """Whether its outcome is decided: then it can't be broken off any more."""
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.task: asyncio.Task[None] | None = None
        self.late: asyncio.Task[None] | None = None
        """Stores its end, if that could not be done in time."""
        self.keeps_context = False
        """Whether that takes its context."""

    def follow(self, *, silence_s: float) -> AsyncIterator[list[Entry]]:
        """The events of a stream, in batches, to the terminal one; an empty batch after so much silence. For one reader."""
        assert self.log
        return self.log.read(silence_s=silence_s)


class Executor:
    """Every foreground run of this process."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        tasks: Tasks,
        guard: Guard,
        programs: ToolPrograms,
        owner: Owner,
        backlogs: Backlogs,
    ) -> None:
        self._settings, self._database, self._tasks, self._owner = settings, database, tasks, owner
        self._guard, self._programs, self._backlogs = guard, programs, backlogs
        self._runs: set[Run] = set()
        self._preparing = 0
        self._closing = False

    async def start(self, caller: Caller, request: CreateResponse) -> Run:
        """Resolve the request and begin its run. Raises ApiError for everything that can be seen to be wrong by now."""
        if self._closing:
            raise ServerUnavailable("The server is shutting down.")
        if len(self._runs) + self._preparing >= self._settings.foreground_runs_max:
            raise TooManyRequests("Too many responses are being made; please try again.", headers={"Retry-After": "1"})
        self._preparing += 1
        try:
            work = await self._tasks.prepare(caller.tenant_id, caller.key, request)
        finally:
            self._preparing -= 1
        if self._closing:
            work.room.release()
            raise ServerUnavailable("The server is shutting down.")
        response = open_response(
            request, id=new_id("resp"), created_at=int(time.time()), left_out=work.context.toolbox.left_out
        )
        run = Run(caller.tenant_id, response, work, self._backlogs.open() if request.stream else None)
        self._runs.add(run)
        run.task = asyncio.create_task(self._run(run), name=response.id)
        run.task.add_done_callback(lambda _: self._ended(run))
        return run

    def _ended(self, run: Run) -> None:
        """Its task is over, perhaps before its first step: then nothing of its own has run, and its readers still wait."""
        for waited in (run.opened, run.finished):
            _settle(waited, ServerError(NOT_BEGUN))
        if not run.keeps_context:
            run.work.room.release()
        del run.work  # its context: readers may stay for long
        if not run.late:
            self._runs.discard(run)

    @property
    def holds(self) -> list[Hold]:
        """The leases of rows that are being made here."""
        return [Hold(run.tenant_id, run.response.id, FOREGROUND_LEASE, 0) for run in self._runs if run.leased]

    # -- Reading ----------------------------------------------------------------------------------------------------------

    async def opened(self, run: Run) -> None:
        """Wait until the run has its first event. Raises the ApiError for which it has none."""
        await asyncio.shield(run.opened)

    async def finished(self, run: Run) -> Response:
        """Wait until the response is ended and stored. Raises the ApiError that a failed one ended with."""
        await asyncio.shield(run.finished)
        if run.error is None:
            return run.response
        if run.has_output:  # tools may have been called: an SDK's retry would call them again
            run.error.is_final = True
            if run.stored or run.late:
                run.error.headers[RESPONSE_ID_HEADER] = run.response.id
        raise run.error

    def reader_gone(self, run: Run) -> None:
        """The policy: a foreground run ends with its reader, unless a stored one may finish."""
        if run.log:
            run.log.backlog.close()
        if self._settings.on_disconnect == "cancel" or not run.response.store:
            self.cancel(run)

    def cancel(self, run: Run) -> None:
        """Break the run off; its response becomes `cancelled` with what was said."""
        if run.task is not None and not run.ending:
            run.task.cancel()

    async def close(self) -> None:
        """Break off every run, and wait until each is stored, or for CLOSE_STORE_S: then Postgres is away, and clients hear that."""
        self._closing = True
        runs = list(self._runs)
        for run in runs:
            self.cancel(run)
        tasks = [run.task for run in runs if run.task]
        if tasks:
            _, unstored = await asyncio.wait(tasks, timeout=CLOSE_STORE_S)
            await break_off(unstored)
        late = [run.late for run in runs if run.late]
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)

    # -- Running ----------------------------------------------------------------------------------------------------------

    async def _run(self, run: Run) -> None:
        """Make the response, and then take leave of its tool servers: nobody waits for that."""
        tools = Tools(run.work, self._guard, self._programs, self._settings)
        structlog.contextvars.bind_contextvars(response_id=run.response.id, tenant_id=run.tenant_id)
        try:
            await self._make(run, tools)
            _settle(run.finished, None)
        except BaseException as error:
            _settle(run.finished, error)
            raise
        finally:
            await tools.close()

    async def _make(self, run: Run, tools: Tools) -> None:
        recorder = Recorder(
            run.response,
            run.log,
            bytes_max=self._settings.run_output_bytes_max,
            events_max=self._settings.run_events_max,
        )
        loop = Loop(
            run.work,
            recorder,
            tools,
            turns_max=self._settings.turns_max,
            calls_max=self._settings.turn_calls_max,
            reader=run.log.backlog if run.log else None,
        )
        try:
            opening = await self._open(run, loop)
        except ApiError as error:
            _refuse(run, error)
            await self._withdraw(run)
            return
        except BaseException as error:
            _refuse(run, ServerError(NOT_BEGUN))
            if not isinstance(error, asyncio.CancelledError):
                log.exception("A run could not begin.", action="run_refused")
            await self._withdraw(run)
            return
        await recorder.begin()
        run.opened.set_result(None)
        outcome = await self._outcome(loop, opening)
        run.ending = True
        closed = close_response(recorder.response, outcome, usage=recorder.usage, now=int(time.time()))
        run.error = outcome.error
        run.has_output = recorder.has_output
        run.response = await recorder.finish(closed, lambda response, _: self._commit(run, response))
        if run.error is None and run.response.error is not None:  # another process has ended it meanwhile
            run.error = ServerError(run.response.error.message)
        log_ended(run.response, recorder)

    async def _open(self, run: Run, loop: Loop) -> "asyncio.Task[ChunkStream] | None":
        """Reach the upstream and store the row, at once: neither waits for the other. A stream's head waits only so long for the
        upstream's answer. Approvals are used up only when the upstream has taken the request."""
        request, decisions = run.work.request, run.work.context.decisions
        opening: asyncio.Task[ChunkStream] | None = None
        if run.work.begins_with_upstream:
            opening = asyncio.create_task(loop.open())
        is_stored = run.response.store and bool(request.stream or run.work.parent or not opening)
        try:
            if opening:
                if is_stored and not decisions:
                    run.storing = asyncio.create_task(self._insert(run, run.response, self._owner))
                await _opened(opening, run.storing, self._settings.stream_head_wait_s if request.stream else None)
            if is_stored:
                await (asyncio.shield(run.storing) if run.storing else self._insert(run, run.response, self._owner))
                run.stored = True
            elif decisions:
                await self._insert(run, None, None)
        except DatabaseUnavailable as error:
            # Nobody knows whether the row is there: if it is, it must not stay in progress.
            failed = close_response(run.response, Outcome("failed", error=error), usage=None, now=int(time.time()))
            run.late = asyncio.create_task(self._late(run, self._ended_as(run, failed)))
            if opening:
                await drop_opening(opening)
            raise
        except BaseException:
            if opening:
                await drop_opening(opening)
            raise
        return opening

    async def _outcome(self, loop: Loop, opening: "asyncio.Task[ChunkStream] | None") -> Outcome:
        try:
            return await loop.outcome(opening, self._settings.run_duration_max_s)
        except asyncio.CancelledError:
            if self._closing:
                return Outcome("failed", error=ServerError("The server was shut down."))
            return Outcome("cancelled")

    # -- Storing ----------------------------------------------------------------------------------------------------------

    async def _insert(self, run: Run, response: Response | None, owner: Owner | None) -> None:
        """Store a response, and which approvals it uses up; without a response only these. An approval must not be used up
        for nothing, so with one this is tried again whatever has happened."""
        decisions = run.work.context.decisions
        items = await aside(run.work.size, encode_items, run.work.context.input) if response else []
        run.leased = run.leased or owner is not None
        if not decisions:
            async for attempt in self._database.settling():
                with attempt:
                    async with self._database.autocommit() as tx:
                        await self._insert_response(tx, run, response, owner, items)
            return
        async for attempt in self._database.retrying():
            with attempt:
                async with self._database.begin() as tx:
                    await self._insert_response(tx, run, response, owner, items)
                    await approvals.answer_requests(tx, run.tenant_id, run.response.id, decisions)

    async def _insert_response(
        self,
        tx: Tx,
        run: Run,
        response: Response | None,
        owner: Owner | None,
        items: Sequence[tuple[str, bytes]],
    ) -> None:
        if response:
            await responses.insert_response(
                tx,
                run.tenant_id,
                response,
                items,
                parent=run.work.parent,
                earlier_bytes=run.work.earlier_bytes,
                run=owner,
            )

    async def _withdraw(self, run: Run) -> None:
        """Take back the row of a run that was refused while it was stored: nobody has heard of it."""
        if run.storing is None or run.late:
            return
        run.ending = True
        run.work.room.release()

        async def take_back(tx: Tx) -> None:
            await responses.withdraw_response(tx, run.tenant_id, run.response.id, FOREGROUND_LEASE)

        try:
            await run.storing
            async with self._database.begin() as tx:
                await take_back(tx)
        except DatabaseUnavailable:
            run.late = asyncio.create_task(self._late(run, take_back))
        except ApiError:
            pass  # it was never stored
        finally:
            run.storing.cancel()

    async def _commit(self, run: Run, closed: Response) -> Response:
        """Store the end of a response; gives what is stored in truth, which is not ours if the lease was lost."""
        if not closed.store:
            return closed
        try:
            return await self._store_unless_closed(run, closed)
        except Exception as error:
            log.exception("A response could not be stored.", action="commit_failed")
            unstored: ApiError = ServerError("The response could not be stored.")
            begun = msgspec.structs.replace(closed, status="in_progress", output=[])
            if isinstance(error, DatabaseUnavailable):
                unstored = error
                begun.output = closed.output
            run.error = unstored
            failed = close_response(begun, Outcome("failed", error=unstored), usage=closed.usage, now=int(time.time()))
            if run.stored:
                run.late = asyncio.create_task(self._late(run, self._ended_as(run, failed)))
            elif isinstance(error, DatabaseUnavailable) and not self._closing:
                run.keeps_context = True
                run.late = asyncio.create_task(self._insert_late(run, run.work, failed))
            return failed

    async def _store_unless_closed(self, run: Run, closed: Response) -> Response:
        """While the executor closes, time may be over: only `close` breaks off a run whose outcome is decided."""
        try:
            return await self._store(run, closed)
        except asyncio.CancelledError as error:
            if not self._closing:
                raise
            raise DatabaseUnavailable(UNAVAILABLE) from error

    async def _store(self, run: Run, closed: Response) -> Response:
        async for attempt in self._database.retrying():
            with attempt:
                if not run.stored:
                    await self._insert(run, closed, None)
                    return closed
                async with self._database.autocommit() as tx:
                    if await responses.finish_response(tx, run.tenant_id, closed):
                        return closed
                    return responses.response_of(await responses.get_response(tx, run.tenant_id, closed.id))
        raise AssertionError("stamina gives up by raising")

    def _ended_as(self, run: Run, failed: Response) -> Callable[[Tx], Awaitable[object]]:
        """What the client was told of a response that could not be stored in time."""
        return lambda tx: responses.finish_response(tx, run.tenant_id, failed)

    async def _insert_late(self, run: Run, work: Task, failed: Response) -> None:
        """Store a response that has no row yet. Until then there must be room for its context."""

        async def insert(tx: Tx) -> None:
            items = await aside(work.size, encode_items, work.context.input)
            await responses.insert_response(
                tx, run.tenant_id, failed, items, parent=None, earlier_bytes=work.earlier_bytes, run=None
            )

        try:
            await self._late(run, insert)
        finally:
            work.room.release()

    async def _late(self, run: Run, write: Callable[[Tx], Awaitable[object]]) -> None:
        """Write what could not be written in time. Until then the run's lease is held."""
        try:
            while True:
                await asyncio.sleep(self._owner.lease_s / LATE_ATTEMPTS_PER_LEASE)
                try:
                    async with self._database.begin() as tx:
                        await write(tx)
                        return
                except DatabaseUnavailable:
                    continue
        finally:
            self._runs.discard(run)


def _refuse(run: Run, error: ApiError) -> None:
    run.error = error
    if run.log:
        run.log.abandon()
        run.log.backlog.close()
    _settle(run.opened, error)
    _settle(run.finished, None)


def _settle(waited: "asyncio.Future[None]", error: BaseException | None) -> None:
    """What is waited for has come, or will not, unless that is known already."""
    if waited.done():
        return
    if error is None:
        waited.set_result(None)
    else:
        waited.set_exception(error)
        waited.exception()  # the reader may have gone: nobody else need look


async def _opened(
    opening: "asyncio.Task[ChunkStream]", storing: "asyncio.Task[None] | None", timeout_s: float | None
) -> None:
    """Wait for the upstream's answer, or until the row can't be stored. Raises what went wrong."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    waiting: set[asyncio.Task[Any]] = {opening, storing} if storing else {opening}
    while opening in waiting:
        left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
        done, waiting = await asyncio.wait(waiting, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        if not done:
            return
