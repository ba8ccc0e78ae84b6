"""Foreground runs: they live in the memory of one process and end with it. What is inserted before their end has a lease, so
that another process ends it if this one dies.

A run is a task of `ForegroundRuns`; a connection only reads its log.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
import structlog

from app.domain.context import Context
from app.domain.lifecycle import Outcome, close_response
from app.domain.rights import logged
from app.errors import RESPONSE_ID_HEADER, ApiError, DatabaseUnavailable, ServerError
from app.offload import offload
from app.outbound.upstream import ChunkStream
from app.runs.insert import insert, inserts_first
from app.runs.model_turn import ModelTurns
from app.runs.pipeline import Pipeline, Turns
from app.runs.plan import RunPlan
from app.runs.quotas import Grant, Quotas
from app.runs.recorder import Recorder
from app.runs.tools import Tools
from app.settings import Settings
from app.storage import endings, responses, usage
from app.storage.backlog import Backlog
from app.storage.database import UNAVAILABLE, Database, Tx
from app.storage.eventlog import MemoryLog
from app.storage.queue import Heartbeat, Owner
from app.storage.redisclient import break_off
from app.storage.usage import Charge
from app.wire.events import Entry
from app.wire.items import encode_items
from app.wire.resources import Response

log = structlog.get_logger()

LATE_ATTEMPTS_PER_LEASE = 3

CLOSE_STORE_S = 2.0
"""How long runs that a shutdown has broken off may take to be stored."""

COUNT_S = 1.0
"""How long the reader of a response that is not stored may wait until its usage is."""

NOT_BEGUN = "The run broke off before it began."

FIRST_EPOCH = 1
"""A foreground run has one owner."""


class ForegroundRuns:
    """Every foreground run of this process."""

    def __init__(
        self, settings: Settings, database: Database, pipeline: Pipeline, owner: Owner, quotas: Quotas
    ) -> None:
        self.settings, self.database, self.pipeline, self.owner = settings, database, pipeline, owner
        self.quotas = quotas
        self.is_closing = False
        self._runs: set[ForegroundRun] = set()

    def __len__(self) -> int:
        return len(self._runs)

    def start(
        self, plan: RunPlan, response: Response, backlog: Backlog | None, grant: Grant | None = None
    ) -> "ForegroundRun":
        """Start a run. `backlog` is that of a stream's client, `grant` what the run has taken of quotas."""
        run = ForegroundRun(self, plan, response, backlog, grant)
        self._runs.add(run)
        run.task = asyncio.create_task(run.make(), name=response.id)
        run.task.add_done_callback(lambda _: run.task_ended())
        return run

    def discard(self, run: "ForegroundRun") -> None:
        """Nothing is left to do for this run."""
        self._runs.discard(run)

    def heartbeats(self) -> list[Heartbeat]:
        """Those of the runs whose row may be inserted."""
        return [Heartbeat(run.tenant_id, run.response.id, FIRST_EPOCH, 0) for run in self._runs if run.is_leased]

    async def close(self) -> None:
        """Break off every run, and wait until it is stored, or for CLOSE_STORE_S: then Postgres is unavailable, as clients
        learn."""
        self.is_closing = True
        runs = list(self._runs)
        for run in runs:
            run.cancel()
        tasks = [run.task for run in runs if run.task]
        if tasks:
            _, unstored = await asyncio.wait(tasks, timeout=CLOSE_STORE_S)
            await break_off(unstored)
        late = [run.late for run in runs if run.late]
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)


class ForegroundRun:
    """One foreground run, and what its reader waits for."""

    attempts = 1

    def __init__(
        self,
        runs: ForegroundRuns,
        plan: RunPlan,
        response: Response,
        backlog: Backlog | None,
        grant: Grant | None,
    ) -> None:
        self._runs, self._plan, self._grant = runs, plan, grant
        self.tenant_id = plan.tenant_id
        self.left_out = plan.left_out
        self.response = response
        self.log = MemoryLog(backlog) if backlog else None
        self.recorder = Recorder(
            response, self.log, bytes_max=runs.settings.run_output_bytes_max, events_max=runs.settings.run_events_max
        )
        self.turns: Turns | None = None
        self.outcome: Outcome | None = None
        self.error: ApiError | None = None
        self.is_leased = False
        """Whether its row may be there, with our lease."""
        self.task: asyncio.Task[None] | None = None
        self.late: asyncio.Task[None] | None = None
        """Stores its end, if that was not possible in time."""
        self._is_stored = False
        self._inserting: asyncio.Task[None] | None = None
        """Inserts the row while the upstream opens."""
        self._is_decided = False
        """Whether its outcome can't change: then it can't be cancelled."""
        self._late_needs_plan = False
        self._tools: Tools | None = None
        self._opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def context(self) -> Context:
        """What it starts from, until its task has ended."""
        return self._plan.context

    # -- Readers ----------------------------------------------------------------------------------------------------------

    async def opened(self) -> None:
        """Wait for the first event. Raises the ApiError for which there is none."""
        await asyncio.shield(self._opened)

    async def finished(self) -> Response:
        """Wait until the response has ended and is stored. Raises the ApiError of a failed one."""
        await asyncio.shield(self._finished)
        if self.error is None:
            return self.response
        if self.recorder.has_output:  # tools may have been called: an SDK's retry would call them again
            self.error.is_final = True
            if self.response.store and (self._is_stored or self.late):
                self.error.headers[RESPONSE_ID_HEADER] = self.response.id
        raise self.error

    def reader_disconnected(self) -> None:
        """The policy: a foreground run ends with its reader, unless it is stored and the operator lets it finish."""
        if self.log:
            self.log.backlog.close()
        if self._runs.settings.on_disconnect == "cancel" or not self.response.store:
            self.cancel()

    def cancel(self) -> None:
        """Break the run off; its response becomes `cancelled` with its events so far."""
        if self.task is not None and not self._is_decided:
            self.task.cancel()

    # -- The steps of the pipeline ----------------------------------------------------------------------------------------

    async def make(self) -> None:
        """Make the response, then close the sessions with tool servers: the reader does not wait for that."""
        structlog.contextvars.bind_contextvars(response_id=self.response.id, **logged(self.tenant_id))
        try:
            await self._runs.pipeline.make(self)
            _settle(self._finished, None)
        except BaseException as error:
            _settle(self._finished, error)
            raise
        finally:
            if self._tools:
                await self._tools.close()

    def task_ended(self) -> None:
        """The task has ended, perhaps before its first step: then its readers still wait."""
        for waited in (self._opened, self._finished):
            _settle(waited, ServerError(NOT_BEGUN))
        if not self._late_needs_plan:
            self._plan.room.release()
        if self._grant:
            self._runs.quotas.settle_soon(self._grant, None)
        del self._plan, self._tools  # and the context with them: readers may stay for long
        if self.error:
            self.error.__traceback__ = self.error.__context__ = None  # their frames have it, too
        if not self.late:
            self._runs.discard(self)

    async def begin(self) -> Turns | None:
        """Open the upstream and insert the row. None if that failed: then the reader has the error."""
        turns = self._runs.pipeline.turns(self._plan, self.recorder, reader=self.log.backlog if self.log else None)
        self._tools = turns.tools
        try:
            await self._open(turns.model)
        except ApiError as error:
            await self._refuse(error)
            return None
        except BaseException as error:
            if not isinstance(error, asyncio.CancelledError):
                log.exception("A run could not begin.", action="run_refused")
            await self._refuse(ServerError(NOT_BEGUN))
            return None
        await self.recorder.begin()
        self._opened.set_result(None)
        return turns

    async def _open(self, model: ModelTurns) -> None:
        """Neither waits for the other. A stream's head waits only so long for the upstream's answer. Approvals are used up only
        after the upstream has accepted the request."""
        plan, settings = self._plan, self._runs.settings
        opening = model.open_first() if plan.begins_with_upstream else None
        try:
            if opening:
                if inserts_first(plan) and not plan.context.decisions:
                    self._inserting = asyncio.create_task(self._insert(self.response, self._runs.owner))
                wait_s = settings.stream_head_wait_s if plan.request.stream else None
                await _opened(opening, self._inserting, wait_s)
            if inserts_first(plan):
                inserted = asyncio.shield(self._inserting) if self._inserting else None
                await (inserted or self._insert(self.response, self._runs.owner))
                self._is_stored = True
            elif plan.context.decisions:
                await self._insert(None, None)
        except BaseException as error:
            if isinstance(error, DatabaseUnavailable):
                # The row may be inserted: then it must not stay in progress.
                self.late = asyncio.create_task(self._store_late(self._ended_as(_failed(self.response, error))))
            await model.close()
            raise

    async def _insert(self, response: Response | None, owner: Owner | None) -> None:
        self.is_leased = self.is_leased or owner is not None
        spent = self.recorder.spent
        await insert(self._runs.database, self._plan, self.response.id, response, owner, spent=spent)

    async def _refuse(self, error: ApiError) -> None:
        """Give the reader the error, at once unless a conversation is locked: a client that repeats the request must find it free."""
        is_outage = isinstance(error, DatabaseUnavailable)
        await self._settle_quotas(None if self.recorder.is_asking and not is_outage else 0)
        parent = self._plan.parent
        if parent and parent.conversation:
            await self._withdraw()
            self._settle_refused(error)
        else:
            self._settle_refused(error)
            await self._withdraw()

    async def _settle_quotas(self, tokens: int | None) -> None:
        grant, self._grant = self._grant, None
        if grant:
            await self._runs.quotas.settle(grant, tokens)

    def _settle_refused(self, error: ApiError) -> None:
        self.error = error
        if self.log:
            self.log.abandon()
            self.log.backlog.close()
        _settle(self._opened, error)
        _settle(self._finished, None)

    async def _withdraw(self) -> None:
        """Delete the row of a run that was refused while it was inserted: no client knows its id."""
        if self._inserting is None or self.late:
            return
        self._is_decided = True
        self._plan.room.release()

        async def withdraw(tx: Tx) -> None:
            await responses.withdraw_response(tx, self.tenant_id, self.response.id, FIRST_EPOCH)

        try:
            await self._inserting
            async with self._runs.database.begin() as tx:
                await withdraw(tx)
        except DatabaseUnavailable:
            self.late = asyncio.create_task(self._store_late(withdraw))
        except ApiError:
            pass  # it was never inserted
        finally:
            self._inserting.cancel()

    def interrupted(self) -> Outcome:
        """The outcome of a run that is cancelled now."""
        if self._runs.is_closing:
            return Outcome("failed", error=ServerError("The server was shut down."))
        return Outcome("cancelled")

    async def commit(self, closed: Response, entries: Sequence[Entry]) -> Response:
        """Store the end of the response. Returns what is stored: another process may have ended it, if the lease was lost."""
        assert self.outcome
        self._is_decided, self.error = True, self.outcome.error
        if closed.store:
            self.response = await self._stored(closed)
        else:
            self.response = closed
            await self._count(closed)
        if self.error is None and self.response.error is not None:
            self.error = ServerError(self.response.error.message)
        if self._grant:
            await self._settle_quotas(self.recorder.used_tokens(closed, self._grant.tokens))
        return self.response

    async def publish(self) -> None:
        """Nothing remains."""

    # -- Storing ----------------------------------------------------------------------------------------------------------

    async def _stored(self, closed: Response) -> Response:
        try:
            return await self._store_unless_closed(closed)
        except Exception as error:
            log.exception("A response could not be stored.", action="commit_failed")
            outage = error if isinstance(error, DatabaseUnavailable) else None
            self.error = why = outage or ServerError("The response could not be stored.")
            failed = _failed(closed, why, output=closed.output if outage else [])
            if self._is_stored:
                self.late = asyncio.create_task(self._store_late(self._ended_as(failed)))
            elif outage and not self._runs.is_closing:
                self._late_needs_plan = True
                self.late = asyncio.create_task(self._insert_late(self._plan, failed))
            return failed

    async def _store_unless_closed(self, closed: Response) -> Response:
        """Only `ForegroundRuns.close` breaks off a run whose outcome is decided, when its time is over."""
        try:
            return await self._store(closed)
        except asyncio.CancelledError as error:
            if not self._runs.is_closing:
                raise
            raise DatabaseUnavailable(UNAVAILABLE) from error

    async def _store(self, closed: Response) -> Response:
        database, tenant_id = self._runs.database, self.tenant_id
        async for attempt in database.retrying():
            with attempt:
                if not self._is_stored:
                    await self._insert(closed, None)
                    return closed
                async with database.autocommit() as tx:
                    if await endings.end_foreground(tx, tenant_id, closed, self._charge()):
                        return closed
                    return responses.response_of(await responses.get_response(tx, tenant_id, closed.id))
        raise AssertionError("stamina gives up by raising")

    async def _count(self, closed: Response) -> None:
        """Count a run that is not stored. The reader does not wait for a database that is unavailable: then that is done later, unless
        the process ends before."""
        tenant_id, charge = self.tenant_id, self._charge()

        async def count(tx: Tx) -> None:
            await usage.count_run(tx, tenant_id, closed, charge)

        try:
            async with asyncio.timeout(COUNT_S), self._runs.database.autocommit() as tx:
                await count(tx)
        except (DatabaseUnavailable, TimeoutError):
            log.warning("The usage of a response can't be stored yet.", action="usage_late")
            if not self._runs.is_closing:
                self.late = asyncio.create_task(self._store_late(count))
        except asyncio.CancelledError:
            if not self._runs.is_closing:
                raise
            log.warning("The usage of a response could not be stored in time.", action="usage_lost")
        except Exception:
            log.exception("The usage of a response could not be stored.", action="usage_lost")

    def _charge(self) -> Charge:
        return self._plan.charge(self.recorder.spent)

    def _ended_as(self, failed: Response) -> Callable[[Tx], Awaitable[object]]:
        """Writes the end that the client knows of a response which could not be stored in time."""
        charge = self._charge()
        return lambda tx: endings.end_foreground(tx, self.tenant_id, failed, charge)

    async def _insert_late(self, plan: RunPlan, failed: Response) -> None:
        """Insert a response that has no row yet. Until then there must be room for its context."""
        charge = plan.charge(self.recorder.spent)

        async def insert_failed(tx: Tx) -> None:
            items = await offload(plan.size, encode_items, plan.context.input)
            await responses.insert_response(
                tx,
                plan.tenant_id,
                failed,
                items,
                parent=None,
                earlier_bytes=plan.earlier_bytes,
                run=None,
                is_chat=plan.request.is_chat,
                charge=charge,
            )

        try:
            await self._store_late(insert_failed)
        finally:
            plan.room.release()

    async def _store_late(self, write: Callable[[Tx], Awaitable[object]]) -> None:
        """Write what could not be written in time. Until then the lease is prolonged."""
        try:
            while True:
                await asyncio.sleep(self._runs.owner.lease_s / LATE_ATTEMPTS_PER_LEASE)
                try:
                    async with self._runs.database.begin() as tx:
                        await write(tx)
                        return
                except DatabaseUnavailable:
                    continue
        finally:
            self._runs.discard(self)


def _failed(response: Response, error: ApiError, *, output: Sequence[msgspec.Raw] = ()) -> Response:
    """The end of a response that could not be stored."""
    begun = msgspec.structs.replace(response, status="in_progress", output=list(output))
    return close_response(begun, Outcome("failed", error=error), usage=response.usage, now=int(time.time()))


def _settle(waited: "asyncio.Future[None]", error: BaseException | None) -> None:
    """Wake a reader, unless it is awake already."""
    if waited.done():
        return
    if error is None:
        waited.set_result(None)
    else:
        waited.set_exception(error)
        waited.exception()  # the reader may have disconnected: then nothing else retrieves it


async def _opened(
    opening: "asyncio.Task[ChunkStream]", inserting: "asyncio.Task[None] | None", wait_s: float | None
) -> None:
    """Wait for the upstream's answer, or until the row can't be inserted. Raises what went wrong."""
    deadline = None if wait_s is None else time.monotonic() + wait_s
    waiting: set[asyncio.Task[Any]] = {opening, inserting} if inserting else {opening}
    while opening in waiting:
        left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
        done, waiting = await asyncio.wait(waiting, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        if not done:
            return
