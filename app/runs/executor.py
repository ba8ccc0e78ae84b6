"""Runs of this process: start one, follow it, cancel it.

A run is a task of the executor; a connection only reads its log. Whether a run ends when its reader has gone is one line of
policy, `reader_gone`.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence

import msgspec
import structlog
from msgspec import Struct

from app.domain.context import Context, check_parent, references, resolve
from app.domain.groups import Manner
from app.domain.lifecycle import Outcome, close_response, open_response
from app.domain.sealed import Seal
from app.errors import (
    ApiError,
    DatabaseUnavailable,
    InvalidParameter,
    InvalidRequest,
    RunTooLong,
    ServerError,
    TooManyRequests,
)
from app.ids import new_id
from app.outbound.catalog import Catalog
from app.outbound.upstream import ChunkStream, Upstream
from app.runs.loop import Loop, Task
from app.runs.recorder import Recorder
from app.runs.worker import Worker
from app.settings import Settings
from app.storage import responses
from app.storage.database import Database
from app.storage.eventlog import MemoryLog
from app.storage.responses import Chain, Place
from app.wire.events import Entry
from app.wire.items import AnyItem, decode_item, encode_item
from app.wire.requests import CreateResponse
from app.wire.resources import Response

log = structlog.get_logger()


class Caller(Struct, frozen=True):
    """Who asks: the tenant, and the key that was sent, unless it is one of ours."""

    tenant_id: str
    key: str | None


class Run:
    """One response in the making, as its readers see it."""

    def __init__(self, tenant_id: str, response: Response, context: Context, parent: Place | None) -> None:
        self.tenant_id = tenant_id
        self.context = context
        self.parent = parent
        self.log = MemoryLog()
        self.response = response
        self.error: ApiError | None = None
        self.stored = False
        """Whether its row is there."""
        self.ending = False
        """Whether its outcome is decided: then it can't be broken off any more."""
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.task: asyncio.Task[None] | None = None

    def follow(self, after: int = -1, *, silence_s: float | None = None) -> AsyncIterator[list[Entry]]:
        """Its events behind a sequence number, in batches, to the terminal one; an empty batch after so much silence."""
        return self.log.read(after, silence_s=silence_s)


class Executor:
    """Every run of this process."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        catalog: Catalog,
        upstreams: Mapping[str, Upstream],
        seal: Seal,
        worker: Worker,
    ) -> None:
        self._settings, self._database, self._catalog = settings, database, catalog
        self._upstreams, self._seal, self._worker = upstreams, seal, worker
        self._runs: set[Run] = set()
        self._closing = False

    # -- Starting ---------------------------------------------------------------------------------------------------------

    async def start(self, caller: Caller, request: CreateResponse) -> Run:
        """Resolve the request and begin its run. Raises ApiError for everything that can be seen to be wrong by now."""
        if self._closing:
            raise ServerError("The server is shutting down.")
        if len(self._runs) >= self._settings.foreground_runs_max:
            raise TooManyRequests("Too many responses are being made; please try again.", headers={"Retry-After": "1"})
        if len(request.input) > self._settings.input_items_max:
            raise InvalidParameter(f"'input' has more than {self._settings.input_items_max} items.", param="input")
        routes = [(self._upstreams[route.upstream], route) for route in self._catalog.routes(request.model)]
        _refuse_untaken(request, [upstream for upstream, _ in routes])
        context, chain = await self._resolve(caller.tenant_id, request)
        response = open_response(request, id=new_id("resp"), created_at=int(time.time()))
        task = Task(
            request=request,
            context=context,
            routes=routes,
            caller_key=caller.key,
            unseal=self._seal.open,
            manner=self._manner(request),
            turns_max=self._settings.turns_max,
        )
        run = Run(caller.tenant_id, response, context, chain.place if chain else None)
        self._runs.add(run)
        run.task = asyncio.create_task(self._run(run, task), name=response.id)
        run.task.add_done_callback(lambda _: self._runs.discard(run))
        return run

    async def _resolve(self, tenant_id: str, request: CreateResponse) -> tuple[Context, Chain | None]:
        previous, wanted = request.body.previous_response_id, references(request)
        chain: Chain | None = None
        found: dict[str, str] = {}
        if previous is not None or wanted:
            async with self._database.autocommit() as tx:
                if previous is not None:
                    chain = await responses.load_chain(
                        tx, tenant_id, previous, items_max=self._settings.context_items_max
                    )
                    check_parent(previous, chain.status)
                if wanted:
                    found = await responses.find_items(tx, tenant_id, wanted)
        earlier: list[AnyItem] = [decode_item(item.body.encode()) for item in chain.items] if chain else []
        referenced = {id: decode_item(body.encode()) for id, body in found.items()}
        return resolve(request, earlier, referenced, new_id), chain

    def _manner(self, request: CreateResponse) -> Manner:
        reasoning = request.body.reasoning
        return Manner(
            summarize=bool(reasoning and (reasoning.summary or reasoning.generate_summary)),
            seal=self._seal.close if "reasoning.encrypted_content" in request.include else None,
        )

    # -- Reading ----------------------------------------------------------------------------------------------------------

    async def opened(self, run: Run) -> None:
        """Wait until the run has its first event. Raises the ApiError for which it has none."""
        await asyncio.shield(run.opened)

    async def finished(self, run: Run) -> Response:
        """Wait until the response is ended and stored. Raises the ApiError that a failed one ended with."""
        assert run.task is not None
        await asyncio.shield(run.task)
        if run.error is not None:
            raise run.error
        return run.response

    def reader_gone(self, run: Run) -> None:
        """The policy: a foreground run ends with its reader, unless a stored one may finish."""
        if self._settings.on_disconnect == "cancel" or not run.response.store:
            self.cancel(run)

    def cancel(self, run: Run) -> None:
        """Break the run off; its response becomes `cancelled` with what was said."""
        if run.task is not None and not run.ending:
            run.task.cancel()

    async def close(self) -> None:
        """Break off every run, and wait until each is stored."""
        self._closing = True
        runs = list(self._runs)
        for run in runs:
            self.cancel(run)
        await asyncio.gather(*(run.task for run in runs if run.task), return_exceptions=True)

    # -- Running ----------------------------------------------------------------------------------------------------------

    async def _run(self, run: Run, task: Task) -> None:
        with structlog.contextvars.bound_contextvars(response_id=run.response.id, tenant_id=run.tenant_id):
            recorder = Recorder(run.response, run.log, bytes_max=self._settings.run_output_bytes_max)
            loop = Loop(task, recorder)
            try:
                opening = await self._open(run, task, loop)
            except ApiError as error:
                _refuse(run, error)
                return
            except BaseException as error:
                _refuse(run, ServerError("The run broke off before it began."))
                if not isinstance(error, asyncio.CancelledError):
                    log.exception("A run could not begin.", action="run_refused")
                return
            recorder.begin()
            run.opened.set_result(None)
            outcome = await self._outcome(loop, opening)
            run.ending = True
            closed = close_response(recorder.response, outcome, usage=loop.usage, now=int(time.time()))
            run.error = outcome.error
            run.response = await recorder.finish(closed, lambda response: self._commit(run, response))
            log.info("A response has ended.", action="run_ended", status=run.response.status)

    async def _open(self, run: Run, task: Task, loop: Loop) -> "asyncio.Task[ChunkStream] | None":
        """Reach the upstream and store the row. A stream's head waits only so long for the upstream's answer."""
        opening: asyncio.Task[ChunkStream] | None = None
        if task.request.generate:
            opening = asyncio.create_task(loop.open())
        try:
            if opening:
                timeout_s = self._settings.stream_head_wait_s if task.request.stream else None
                await asyncio.wait({opening}, timeout=timeout_s)
                if opening.done():
                    opening.result()
            if run.response.store and (task.request.stream or run.parent):
                await self._insert(run, run.response, self._worker.lease)
                run.stored = True
        except BaseException:
            if opening:
                await _break_off(opening)
            raise
        return opening

    async def _outcome(self, loop: Loop, opening: "asyncio.Task[ChunkStream] | None") -> Outcome:
        """Make the response; every way to end is an outcome."""
        if opening is None:
            return Outcome("completed")
        try:
            async with asyncio.timeout(self._settings.run_duration_max_s):
                return await loop.make(await opening)
        except TimeoutError:
            return Outcome("failed", error=RunTooLong("The run took longer than REPRISE_RUN_DURATION_MAX_S allows."))
        except ApiError as error:
            return Outcome("failed", error=error)
        except asyncio.CancelledError:
            await _break_off(opening)
            if self._closing:
                return Outcome("failed", error=ServerError("The server was shut down."))
            return Outcome("cancelled")
        except Exception:
            log.exception("A run failed by our own mistake.", action="run_failed")
            return Outcome("failed", error=ServerError("The server had an error while making the response."))

    # -- Storing ----------------------------------------------------------------------------------------------------------

    async def _insert(self, run: Run, response: Response, lease: "responses.Lease | None") -> None:
        items = [(item.id, encode_item(item)) for item in run.context.input]
        async with self._database.begin() as tx:
            await responses.insert_response(tx, run.tenant_id, response, items, parent=run.parent, lease=lease)

    async def _commit(self, run: Run, closed: Response) -> Response:
        """Store the end of a response; gives what is stored in truth, which is not ours if the lease was lost."""
        if not closed.store:
            return closed
        try:
            return await self._store(run, closed)
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
                self._worker.end_later(run.tenant_id, failed)
            return failed

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


def _refuse_untaken(request: CreateResponse, upstreams: Sequence[Upstream]) -> None:
    """A parameter beyond the API must mean something to an upstream that may answer."""
    for name in request.extra:
        if not any(name in upstream.entry.passed_on for upstream in upstreams):
            raise InvalidRequest(f"Unknown parameter: '{name}'.", param=name, code="unknown_parameter")


def _refuse(run: Run, error: ApiError) -> None:
    run.error = error
    run.log.abandon()
    if not run.opened.done():
        run.opened.set_exception(error)
        run.opened.exception()  # the reader may have gone: nobody else need look


async def _break_off(opening: "asyncio.Task[ChunkStream]") -> None:
    """Close the upstream's answer, or stop waiting for it."""
    opening.cancel()
    results: Sequence[ChunkStream | BaseException] = await asyncio.gather(opening, return_exceptions=True)
    for result in results:
        if isinstance(result, ChunkStream):
            await result.close()
