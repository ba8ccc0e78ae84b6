"""Background runs: enqueue, follow, cancel from any process; make one that this process has claimed.

Postgres decides and remembers, Redis only carries. A claim's lease number guards every write: whoever has lost it is refused
by both, and stops quietly.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

import msgspec
import structlog
from msgspec import Struct
from msgspec.structs import replace
from redis.exceptions import RedisError

from app.domain.context import waits_for_client
from app.domain.lifecycle import IN_FLIGHT, Outcome, close_response, open_response
from app.domain.recovery import Recovered, recover
from app.domain.sealed import Seal
from app.errors import (
    ApiError,
    DatabaseUnavailable,
    Fenced,
    ResponseNotFound,
    RunTooLong,
    ServerError,
    TooManyRequests,
)
from app.ids import new_id
from app.outbound.catalog import Catalog
from app.outbound.guard import Guard
from app.outbound.mcp import ToolPrograms
from app.runs.aside import aside
from app.runs.ended import log_ended
from app.runs.executor import Caller
from app.runs.loop import Loop
from app.runs.recorder import Recorder
from app.runs.rooms import Room
from app.runs.task import Task, Tasks
from app.runs.tools import Tools
from app.settings import Settings
from app.storage import approvals, journal, queue, responses
from app.storage.backlog import Backlog, pages_of, size_of
from app.storage.database import Database
from app.storage.journal import Kept
from app.storage.queue import Claim, Hold, Owner, Queued
from app.storage.redishub import Batch, Reader
from app.storage.redislog import RedisLogs, RunLog
from app.wire.events import Created, Entry, InProgress, encode_event
from app.wire.events import Queued as QueuedEvent
from app.wire.items import AnyItem, decode_stored_item, encode_items
from app.wire.requests import CreateResponse, ToolSecrets, decode_create, with_secrets, without_secrets
from app.wire.resources import Response, Usage

log = structlog.get_logger()

GAP_PAUSE_S = 0.05
"""Before a reader looks again for events that are missing everywhere: their writer is sending them once more."""

CANCEL = "cancel "
"""Before the id of a run whose owner is asked to end it."""

FENCED = "Somebody else has taken this response over."

OWNER_WAIT_S = 0.5
"""How long a cancel waits for the owner of a run without a stream to end it, with what was said."""

COMMIT_PAUSE_S = 0.005
"""Before a cancel looks again whether a commit is over."""

CANCEL_WAIT_S = 2.0
"""How long a cancel waits for the response to end elsewhere, when it lost the race."""


class Work:
    """One claimed run of this process."""

    def __init__(self, claim: Claim) -> None:
        self.claim = claim
        self.recorder: Recorder | None = None
        self.log: RunLog | None = None
        self.tools: Tools | None = None
        self.task: asyncio.Task[None] | None = None
        self.loop: Loop | None = None
        """As long as it is being made, and its outcome is open."""
        self.cancelled = False
        self.stopped = False

    def cancel(self) -> None:
        """End it as cancelled, with what was said. What is being committed is committed first; calls under way are left to
        whoever takes the run, as if this process had died: it says that their outcome is unknown."""
        if not (self.loop and self.task and self.recorder) or self.loop.is_calling or self.stopped:
            return
        if self.recorder.is_committing:
            asyncio.get_running_loop().call_later(COMMIT_PAUSE_S, self.cancel)
            return
        self.cancelled, self.loop = True, None
        self.task.cancel()

    def stop(self) -> None:
        """Break it off without a word: somebody else goes on with it."""
        self.stopped = True
        if self.recorder:
            self.recorder.stop()
        if self.log:
            self.log.fenced = True
        if self.task:
            self.task.cancel()

    @property
    def hold(self) -> Hold:
        """What the next heartbeat says of it."""
        number = self.recorder.next_number if self.recorder else self.claim.number_ceiling
        claim = self.claim
        return Hold(
            claim.tenant_id,
            claim.response_id,
            claim.lease,
            number + queue.NUMBERS_AHEAD,
            redis_run=self.log.life if self.log else None,
        )


class Enqueued(Struct, frozen=True):
    """A response that waits for its run, with its first events; `left_out` are tools that nobody here runs."""

    response: Response
    entries: list[Entry]
    left_out: tuple[str, ...]


class Secrets(Struct, frozen=True):
    """What a run must know and no table may hold in plain."""

    key: str | None = None
    """The caller's own, for the upstream."""
    tools: dict[str, ToolSecrets] = {}
    """Those of MCP servers, by label."""


class Found(Struct, frozen=True):
    """What the earlier owners of a run have left."""

    response: Response
    said: list[Entry]
    """Every event that is known."""
    unkept: list[Entry]
    """Those of them that are in no journal."""
    life: str | None
    """The life of the stream from now on; None while Redis is away."""
    lost: bool
    """Whether others may have been sent, and lost with Redis."""


class Background:
    """Every background run, as any process sees it."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        tasks: Tasks,
        catalog: Catalog,
        seal: Seal,
        guard: Guard,
        programs: ToolPrograms,
        logs: RedisLogs,
    ) -> None:
        self._settings, self._database, self._tasks = settings, database, tasks
        self._guard, self._programs = guard, programs
        self._catalog, self._seal, self._logs = catalog, seal, logs
        self._looks: dict[tuple[str, int], asyncio.Future[Kept]] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._released = False

    # -- Beginning --------------------------------------------------------------------------------------------------------

    async def enqueue(self, caller: Caller, request: CreateResponse, raw: bytes) -> Enqueued:
        """Store a response with its place in the queue, in one commit. Raises ApiError."""
        work = await self._tasks.prepare(caller.tenant_id, caller.key, request)
        try:
            return await self._enqueue(caller, request, raw, work)
        finally:
            work.room.release()

    async def _enqueue(self, caller: Caller, request: CreateResponse, raw: bytes, work: Task) -> Enqueued:
        await aside(work.size, work.refuse_unanswerable)
        response = open_response(
            request, id=new_id("resp"), created_at=int(time.time()), left_out=work.context.toolbox.left_out
        )
        entries = [
            encode_event(Created(response=response)),
            encode_event(QueuedEvent(response=response, sequence_number=1)),
        ]
        stored, tool_secrets = without_secrets(raw, request)
        queued = Queued(
            request=stored,
            secrets=self._sealed(Secrets(caller.key, tool_secrets)),
            streamed=request.stream,
            frames=b"".join(entry.frame for entry in entries),
        )
        # An approval must not be used up for nothing, so with one this is tried again whatever has happened.
        database = self._database
        async for attempt in database.retrying() if work.context.decisions else database.settling():
            with attempt:
                await self._store(caller.tenant_id, work, response, queued, again=attempt.num > 1)
        self._logs.tell("wake")
        return Enqueued(response, entries, work.context.toolbox.left_out)

    async def _store(self, tenant_id: str, work: Task, response: Response, queued: Queued, *, again: bool) -> None:
        """`again` if an earlier attempt may have stored it: then it has its place."""
        items = await aside(work.size, encode_items, work.context.input)
        settings = self._settings
        async with self._database.begin() as tx:
            if not again and await queue.is_full(
                tx, tenant_id, tenant_max=settings.queued_runs_tenant_max, all_max=settings.queued_runs_max
            ):
                raise TooManyRequests("The queue of background responses is full.", headers={"Retry-After": "5"})
            await responses.insert_response(
                tx, tenant_id, response, items, parent=work.parent, earlier_bytes=work.earlier_bytes, run=queued
            )
            await approvals.answer_requests(tx, tenant_id, response.id, work.context.decisions)

    def _sealed(self, secrets: Secrets) -> str | None:
        return self._seal.close(msgspec.json.encode(secrets).decode()) if secrets.key or secrets.tools else None

    def _opened(self, claim: Claim) -> Secrets:
        """The secrets of a claimed run. Raises ServerError if they were sealed with another key."""
        if claim.secrets is None:
            return Secrets()
        opened = self._seal.open(claim.secrets)
        if opened is None:
            raise ServerError("The secrets of this response can't be opened: the server's secret key has changed.")
        return msgspec.json.decode(opened, type=Secrets)

    # -- Following --------------------------------------------------------------------------------------------------------

    async def kept(self, tenant_id: str, response_id: str, after: int) -> Kept:
        """What Postgres knows of a response's events behind a number, a page of it. Raises NotFound."""
        async with self._database.autocommit() as tx:
            kept = await journal.read(tx, tenant_id, response_id, after)
        if kept is None:
            raise ResponseNotFound(response_id)
        return kept

    async def follow(
        self, tenant_id: str, response_id: str, after: int, kept: Kept, backlog: Backlog, *, silence_s: float
    ) -> AsyncIterator[Sequence[Entry]]:
        """Events with a greater sequence number: what is kept, what Redis still holds, what comes; to the terminal one.

        Numbers are trusted, not transport: whatever does not follow the last number is looked up in Postgres, and so is a
        stream that is silent or away. An empty batch comes after so much silence. A client that takes its time costs no more
        than its backlog and a page: what does not fit is read again.
        """
        cursor, silent_s = after, 0.0
        fresh, ended = kept.entries, kept.archived
        begins = max(after, _last(fresh))
        del kept  # it may be large, and a follower may stay for long
        async with self._logs.reading(response_id, begins, backlog, silence_s=self._settings.poll_s) as reader:
            fresh = reader.hand_out(fresh)
            while fresh or not ended:
                if fresh:
                    cursor, silent_s, ends = fresh[-1].sequence_number, 0.0, fresh[-1].is_terminal
                    for page in pages_of(fresh, reader.given):
                        yield page
                    fresh = page = []  # what comes next may be far away
                    if ends:
                        return
                self._check_released()
                if ended:
                    fresh, ended = await self._look_again(reader, tenant_id, response_id, cursor)
                    continue
                came = await self._next(reader)
                fresh, gap = _contiguous(came, cursor)
                if fresh or (came and not gap):
                    if gap:
                        reader.rewind(fresh[-1].sequence_number)
                    continue
                fresh, ended = await self._look_again(reader, tenant_id, response_id, cursor)
                if gap:
                    await asyncio.sleep(0 if fresh else GAP_PAUSE_S)
                    reader.rewind(_last(fresh) if fresh else cursor)
                    continue
                silent_s += self._settings.poll_s
                if silent_s >= silence_s:
                    silent_s = 0.0
                    yield []

    def _check_released(self) -> None:
        if self._released:
            raise ServerError("The server is shutting down.")

    def release(self) -> None:
        """Followers shall go elsewhere: their streams break off, and they resume."""
        self._released = True

    async def _next(self, reader: Reader) -> list[Batch]:
        try:
            return await reader.next()
        except (RedisError, OSError):
            await asyncio.sleep(self._settings.poll_s)  # Redis is away: Postgres is asked, no faster than this
            return []

    async def _look_again(
        self, reader: Reader, tenant_id: str, response_id: str, cursor: int
    ) -> tuple[list[Entry], bool]:
        """What Postgres knows by now behind the cursor, a page of it, and whether all is there; while it is away, nothing.
        Readers at one place share an answer for a while."""
        place = (response_id, cursor)
        look = self._looks.get(place)
        if look is None:
            look = self._looks[place] = asyncio.ensure_future(self.kept(tenant_id, response_id, cursor))
            asyncio.get_running_loop().call_later(self._settings.poll_s / 2, self._looks.pop, place, None)
        try:
            kept = await asyncio.shield(look)
        except ServerError:
            return [], False
        return reader.hand_out(kept.entries), kept.archived

    # -- Cancelling -------------------------------------------------------------------------------------------------------

    async def cancel(self, tenant_id: str, response_id: str, owner: Owner) -> Response:
        """End a background response as cancelled; an ended one is given as it is. Raises NotFound."""
        await self._ask_owner(tenant_id, response_id)
        claim: Claim | None = None
        async for attempt in self._database.settling():
            with attempt:
                async with self._database.autocommit() as tx:
                    claim = await queue.cancel(tx, tenant_id, response_id, owner, again=attempt.num > 1)
        if claim is not None:
            self._logs.tell(response_id)
            await self._end_cancelled(Work(claim))
        deadline = time.monotonic() + CANCEL_WAIT_S
        while True:
            async with self._database.autocommit() as tx:
                response = responses.response_of(await responses.get_response(tx, tenant_id, response_id))
            if response.status not in IN_FLIGHT or time.monotonic() > deadline:
                return response
            await asyncio.sleep(0.02)

    async def _ask_owner(self, tenant_id: str, response_id: str) -> None:
        """Of a run without a stream only its owner knows what is being said: it may end it, for a moment."""
        deadline = time.monotonic() + OWNER_WAIT_S
        asked = False
        while time.monotonic() < deadline:
            try:
                async with self._database.autocommit() as tx:
                    if not await queue.runs_silently(tx, tenant_id, response_id):
                        return
            except DatabaseUnavailable:
                return
            if not asked:
                self._logs.tell(f"{CANCEL}{response_id}")
                asked = True
            await asyncio.sleep(0.02)

    async def _end_cancelled(self, work: Work) -> None:
        """Wait for the end of what is decided, no longer than Postgres may be away; whoever asked need not wait for it."""
        ending = asyncio.create_task(self.execute(work), name=work.claim.response_id)
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)
        await asyncio.wait({ending}, timeout=self._settings.database_retry_s)
        if ending.done():
            ending.result()

    # -- Making -----------------------------------------------------------------------------------------------------------

    async def execute(self, work: Work) -> None:
        """Make what was claimed, or end it: the first time, after a crash, or because it is cancelled."""
        claim = work.claim
        with structlog.contextvars.bound_contextvars(response_id=claim.response_id, tenant_id=claim.tenant_id):
            try:
                if claim.state == "sealed":
                    await self._publish_rest(claim)
                elif claim.request_bytes is None:
                    await self._end_abandoned(claim)
                else:
                    with self._tasks.room() as room:
                        if claim.state != "cancelled":  # whoever has cancelled it waits
                            await room.take(claim.request_bytes + claim.context_bytes, wait_s=None)
                        await self._make(work, room)
            except Fenced:
                log.info(FENCED, action="run_fenced", lease=claim.lease)
            finally:
                if work.tools:
                    await work.tools.close()

    async def _make(self, work: Work, room: Room) -> None:
        claim = work.claim
        found = await self._find(claim)
        if work.stopped:
            raise Fenced
        recovered = await aside(sum(len(entry.frame) for entry in found.said), recover, found.said)
        number = recovered.next_number
        if claim.streamed:
            anew = found.lost and found.life is None
            work.log = RunLog(self._logs, claim.response_id, claim.lease, found.said, life=found.life, anew=anew)
        recorder = work.recorder = Recorder(
            replace(found.response, status="in_progress", output=recovered.done),
            work.log,
            bytes_max=self._settings.run_output_bytes_max,
            events_max=self._settings.run_events_max,
            next_number=max(number, claim.number_ceiling) if found.lost else number,
            usage=msgspec.json.decode(claim.usage, type=Usage | None) if claim.usage else None,
            said=found.said,
            unkept=found.unkept,
            keep=lambda entries: self._keep(claim, entries, recorder.usage),
        )
        try:
            outcome = await self._resume(work, recorder, recovered, found)
        except RunTooLong as error:  # so the former owner has met, and died before it could say so
            outcome = self._end(claim) or Outcome("failed", error=error)
        if outcome is None:
            outcome = await self._outcome(work, recorder, recovered, room, skip=found.lost)
        closed = close_response(recorder.response, outcome, usage=recorder.usage, now=int(time.time()))
        await recorder.finish(closed, lambda ended, entries: self._seal_response(claim, ended, entries))
        log_ended(closed, recorder, attempts=claim.lease - claim.handed_over)
        await self._end_log(claim, work.log)

    async def _find(self, claim: Claim) -> Found:
        """What earlier owners have left. From now on Redis refuses their events, as Postgres does since the claim."""
        async with self._database.autocommit() as tx:
            stored = await responses.get_response(tx, claim.tenant_id, claim.response_id)
            kept = await journal.read_all(tx, claim.tenant_id, claim.response_id)
        life: str | None = None
        tail: list[Entry] = []
        if claim.streamed:
            try:
                life, held = await self._logs.take(claim.response_id, claim.lease, claim.redis_run)
                tail = [entry for entry in held if entry.sequence_number > _last(kept)]
            except (RedisError, OSError):
                log.warning("Redis is unavailable; a run begins without it.", action="redis_down")
        return Found(
            response=responses.response_of(stored),
            said=[*kept, *tail],
            unkept=tail,
            life=life,
            # Before it has begun nothing is sent that is not kept.
            lost=claim.streamed and stored.status != "queued" and (life is None or life != claim.redis_run),
        )

    async def _resume(self, work: Work, recorder: Recorder, recovered: Recovered, found: Found) -> Outcome | None:
        """Say what lies between the former owner's last word and ours; the outcome, if the run ends with that."""
        claim = work.claim
        end = self._end(claim)
        begun_from = replace(recorder.response, output=recovered.output)
        if found.lost:
            # Kept, so that no later owner goes back to the numbers that are given up here. Nobody may have heard of items that
            # were open, but for calls: they are kept from their beginning, and so are ended.
            said = recovered.done if end or recovered.ending else recovered.output
            snapshot = replace(recorder.response, output=said)
            await recorder.record([InProgress(response=snapshot), *recovered.ending], keep=True)
        elif end:
            await recorder.record(recovered.closing, keep=True)
        elif recovered.closing:
            # In one commit with what leaves them out: else a later owner would take them for done.
            await recorder.record([*recovered.closing, InProgress(response=begun_from)], keep=True)
        if end:
            return end
        async with self._database.autocommit() as tx:
            if not await responses.begin_response(tx, claim.tenant_id, claim.response_id, claim.lease, found.life):
                raise Fenced
        if not found.lost and not recovered.closing:
            await recorder.record([InProgress(response=begun_from)])
        return None

    def _end(self, claim: Claim) -> Outcome | None:
        """How a run ends that is not made any further."""
        if claim.state == "cancelled":
            return Outcome("cancelled")
        if claim.lease - claim.handed_over > self._settings.run_attempts_max:
            return Outcome("failed", error=ServerError("The response could not be made: every attempt broke off."))
        return None

    async def _outcome(
        self, work: Work, recorder: Recorder, recovered: Recovered, room: Room, *, skip: bool
    ) -> Outcome:
        claim = work.claim
        made: list[AnyItem] = [decode_stored_item(bytes(raw)) for raw in recovered.output]
        if any(waits_for_client(item) for item in made):
            return Outcome("completed")  # what the former owner has handed over stands
        try:
            secrets = self._opened(claim)
            request = with_secrets(await self._request(claim), secrets.tools)
            task = await self._tasks.restore(claim.tenant_id, claim.response_id, secrets.key, request, made, room)
        except DatabaseUnavailable:
            raise
        except ApiError as error:
            return Outcome("failed", error=error)
        # An index that a lost event may have used is not used again.
        index = recovered.next_output_index + (1 if skip else 0)
        try:
            work.tools = Tools(task, self._guard, self._programs, self._settings)
            loop = work.loop = Loop(
                task,
                recorder,
                work.tools,
                turns_max=self._settings.turns_max,
                calls_max=self._settings.turn_calls_max,
                output_index=index,
                call_ids=recovered.call_ids,
            )
            return await loop.outcome(None, self._settings.run_duration_max_s)
        except asyncio.CancelledError:
            if not work.cancelled or work.stopped:
                raise
            assert work.task
            work.task.uncancel()
            return Outcome("cancelled")
        finally:
            work.loop = None
            task.room.release()

    async def _request(self, claim: Claim) -> CreateResponse:
        """What is to be made. Raises Fenced, ApiError."""
        async with self._database.autocommit() as tx:
            stored = await queue.load_request(tx, claim)
        if stored is None:
            raise Fenced
        return await aside(len(stored), decode_create, stored.encode(), self._catalog.passed_on)

    # -- Storing ----------------------------------------------------------------------------------------------------------

    async def _keep(self, claim: Claim, entries: Sequence[Entry], usage: Usage | None) -> None:
        """Commit entries to the journal, however long Postgres is away: as long as it is, no other worker can go on either, and
        what only we know would be lost. Raises Fenced."""
        pages = await aside(size_of(entries), journal.paged, list(entries))
        async for attempt in self._database.retrying(for_ever=True):
            with attempt:
                async with self._database.begin() as tx:
                    if not await journal.append(tx, claim.tenant_id, claim.response_id, claim.lease, pages, usage):
                        raise Fenced

    async def _seal_response(self, claim: Claim, closed: Response, entries: Sequence[Entry]) -> Response:
        archive = await asyncio.to_thread(journal.archive, list(entries)) if claim.streamed else []
        async for attempt in self._database.retrying(for_ever=True):
            with attempt:
                async with self._database.begin() as tx:
                    if not await responses.seal_response(tx, claim.tenant_id, closed, claim.lease, archive):
                        raise Fenced
        return closed

    async def _end_log(self, claim: Claim, run_log: RunLog | None) -> None:
        """The last event is out, or Redis is away and readers ask Postgres: nothing is left to do."""
        if run_log:
            await run_log.flush()
            await self._logs.expire(run_log)
        async with self._database.autocommit() as tx:
            await queue.forget(tx, claim.tenant_id, claim.response_id, claim.lease)

    async def _publish_rest(self, claim: Claim) -> None:
        """The former owner died between the commit and the last event."""
        if not claim.streamed:
            await self._end_log(claim, None)
            return
        async with self._database.autocommit() as tx:
            kept = await journal.read_all(tx, claim.tenant_id, claim.response_id)
        # Of one that was deleted meanwhile nothing is kept.
        run_log = RunLog(self._logs, claim.response_id, claim.lease, kept) if kept else None
        await self._end_log(claim, run_log)

    async def _end_abandoned(self, claim: Claim) -> None:
        """A foreground run whose process is gone: nobody can go on with it."""
        async with self._database.autocommit() as tx:
            body = await responses.load_body(tx, claim.tenant_id, claim.response_id)
            if body is not None:
                error = ServerError("The server that made this response has died.")
                closed = close_response(body, Outcome("failed", error=error), usage=None, now=int(time.time()))
                await responses.finish_response(tx, claim.tenant_id, closed)
        log.warning("An abandoned response was ended.", action="run_abandoned")


def _last(entries: Sequence[Entry]) -> int:
    return entries[-1].sequence_number if entries else -1


def _contiguous(batches: Sequence[Batch], cursor: int) -> tuple[list[Entry], bool]:
    """The entries behind the cursor as far as they follow each other, and whether something is missing behind them."""
    fresh: list[Entry] = []
    for batch in batches:
        for entry in batch.entries:
            if entry.sequence_number <= cursor:
                continue
            jumps = batch.jump is not None and entry is batch.entries[0] and cursor >= batch.jump
            if entry.sequence_number != cursor + 1 and not jumps:
                return fresh, True
            fresh.append(entry)
            cursor = entry.sequence_number
    return fresh, False
