"""Background runs: enqueue, follow, cancel from any process; make one that this process has claimed.

Postgres decides and remembers, Redis only carries. A claim's lease number guards every write: whoever has lost it is refused
by both, and stops quietly.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

import structlog
from redis.exceptions import RedisError

from app.domain.lifecycle import NO_USAGE, Outcome, close_response, open_response
from app.domain.recovery import Recovered, recover
from app.domain.sealed import Seal
from app.errors import ApiError, Fenced, ServerError, TooManyRequests
from app.ids import new_id
from app.outbound.catalog import Catalog
from app.runs.executor import Caller
from app.runs.loop import Loop
from app.runs.recorder import Recorder
from app.runs.task import Tasks
from app.settings import Settings
from app.storage import journal, queue, responses
from app.storage.database import Database
from app.storage.journal import Kept
from app.storage.queue import Claim, Claimant, Hold, Queued
from app.storage.redislog import Batch, Reader, RedisLogs, RunLog
from app.wire.events import Created, Entry, InProgress, encode_event
from app.wire.events import Queued as QueuedEvent
from app.wire.items import AnyItem, decode_item, encode_item
from app.wire.requests import CreateResponse, decode_create
from app.wire.resources import Response, Usage

log = structlog.get_logger()

GAP_PAUSE_S = 0.05
"""Before a reader looks again for events that are missing everywhere: their writer is sending them once more."""

CANCEL_WAIT_S = 2.0
"""How long a cancel waits for the response to end elsewhere, when it lost the race."""


class Work:
    """One claimed run of this process."""

    def __init__(self, claim: Claim) -> None:
        self.claim = claim
        self.recorder: Recorder | None = None
        self.log: RunLog | None = None
        self.task: asyncio.Task[None] | None = None

    def stop(self) -> None:
        """Break it off without a word: somebody else goes on with it."""
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
        return Hold(claim.tenant_id, claim.response_id, claim.lease, number + queue.NUMBERS_AHEAD)


class Background:
    """Every background run, as any process sees it."""

    def __init__(
        self, settings: Settings, database: Database, tasks: Tasks, catalog: Catalog, seal: Seal, logs: RedisLogs
    ) -> None:
        self._settings, self._database, self._tasks = settings, database, tasks
        self._catalog, self._seal, self._logs = catalog, seal, logs

    # -- Beginning --------------------------------------------------------------------------------------------------------

    async def enqueue(self, caller: Caller, request: CreateResponse, raw: bytes) -> tuple[Response, list[Entry]]:
        """Store a response with its place in the queue, in one commit; gives it with its first events. Raises ApiError."""
        work = await self._tasks.prepare(caller.tenant_id, caller.key, request)
        response = open_response(request, id=new_id("resp"), created_at=int(time.time()))
        entries = [
            encode_event(Created(response=response)),
            encode_event(QueuedEvent(response=response, sequence_number=1)),
        ]
        queued = Queued(
            request=raw,
            caller_key=self._seal.close(caller.key) if caller.key else None,
            streamed=request.stream,
            frames=b"".join(entry.frame for entry in entries),
        )
        items = [(item.id, encode_item(item)) for item in work.context.input]
        async with self._database.begin() as tx:
            settings = self._settings
            if await queue.is_full(
                tx, caller.tenant_id, tenant_max=settings.queue_tenant_max, all_max=settings.queue_max
            ):
                raise TooManyRequests("The queue of background responses is full.", headers={"Retry-After": "5"})
            await responses.insert_response(tx, caller.tenant_id, response, items, parent=work.parent, run=queued)
        await self._logs.tell("wake")
        return response, entries

    # -- Following --------------------------------------------------------------------------------------------------------

    async def kept(self, tenant_id: str, response_id: str) -> Kept:
        """What Postgres knows of a response's events. Raises NotFound."""
        async with self._database.autocommit() as tx:
            kept = await journal.read(tx, tenant_id, response_id)
        if kept is None:
            raise responses.not_found(response_id)
        return kept

    async def follow(
        self, tenant_id: str, response_id: str, after: int, kept: Kept, *, silence_s: float
    ) -> AsyncIterator[list[Entry]]:
        """Events with a greater sequence number: what is kept, what Redis still holds, what comes; to the terminal one.

        Numbers are trusted, not transport: whatever does not follow the last number is looked up in Postgres, and so is a
        stream that is silent or away. An empty batch comes after so much silence.
        """
        cursor = after
        silent_s = 0.0
        async with self._logs.reading(response_id, max(after, _last(kept.entries))) as reader:
            while True:
                batch = [entry for entry in kept.entries if entry.sequence_number > cursor]
                if batch:
                    cursor, silent_s = batch[-1].sequence_number, 0.0
                    yield batch
                if kept.archived or (batch and batch[-1].is_terminal):
                    return
                while True:
                    came = await self._next(reader)
                    fresh, gap = _contiguous(came, cursor)
                    if fresh:
                        cursor, silent_s = fresh[-1].sequence_number, 0.0
                        yield fresh
                        if fresh[-1].is_terminal:
                            return
                    if gap or not came:
                        break
                silent_s += 0.0 if gap else self._settings.poll_s
                if silent_s >= silence_s:
                    silent_s = 0.0
                    yield []
                kept = await self._look_again(tenant_id, response_id, kept)
                if gap and _last(kept.entries) <= cursor:
                    reader.rewind(cursor)
                    await asyncio.sleep(GAP_PAUSE_S)

    async def _next(self, reader: Reader) -> list[Batch]:
        try:
            return await reader.next(self._settings.poll_s)
        except (RedisError, OSError):
            await asyncio.sleep(self._settings.poll_s)  # Redis is away: Postgres is asked, no faster than this
            return []

    async def _look_again(self, tenant_id: str, response_id: str, kept: Kept) -> Kept:
        """What Postgres knows by now; while it is away, what it knew."""
        try:
            return await self.kept(tenant_id, response_id)
        except ServerError:
            return kept

    # -- Cancelling -------------------------------------------------------------------------------------------------------

    async def cancel(self, tenant_id: str, response_id: str, claimant: Claimant) -> Response:
        """End a background response as cancelled; an ended one is given as it is. Raises NotFound."""
        async with self._database.autocommit() as tx:
            claim = await queue.cancel(tx, tenant_id, response_id, claimant)
        if claim is not None:
            await self._logs.tell(response_id)
            await asyncio.shield(asyncio.ensure_future(self.execute(Work(claim), cancelled=True)))
        deadline = time.monotonic() + CANCEL_WAIT_S
        while True:
            async with self._database.autocommit() as tx:
                response = responses.response_of(await responses.get_response(tx, tenant_id, response_id))
            if response.status not in {"queued", "in_progress"} or time.monotonic() > deadline:
                return response
            await asyncio.sleep(0.02)

    # -- Making -----------------------------------------------------------------------------------------------------------

    async def execute(self, work: Work, *, cancelled: bool = False) -> None:
        """Make what was claimed, or end it: the first time, after a crash, or because it is cancelled."""
        claim = work.claim
        with structlog.contextvars.bound_contextvars(response_id=claim.response_id, tenant_id=claim.tenant_id):
            try:
                if claim.state == "sealed":
                    await self._publish_rest(claim)
                elif claim.request is None:
                    await self._end_abandoned(claim)
                else:
                    await self._make(work, cancelled=cancelled)
            except Fenced:
                log.info("Somebody else has taken this response over.", action="run_fenced", lease=claim.lease)

    async def _make(self, work: Work, *, cancelled: bool) -> None:
        claim = work.claim
        assert claim.request is not None
        response, said, unkept, lost = await self._state(claim)
        recovered = recover(said)
        number = recovered.next_number
        if lost:
            number = max(number, claim.number_ceiling)
        if claim.streamed:
            work.log = RunLog(self._logs, claim.response_id, claim.lease, said)
        recorder = work.recorder = Recorder(
            response,
            work.log,
            bytes_max=self._settings.run_output_bytes_max,
            next_number=number,
            said=said,
            unkept=unkept,
            keep=lambda entries: self._keep(claim, entries),
        )
        outcome = await self._resume(work, recorder, recovered, jumped=lost, cancelled=cancelled)
        usage = NO_USAGE
        if outcome is None:
            outcome, usage = await self._outcome(work, recorder, recovered, skip=lost)
        closed = close_response(recorder.response, outcome, usage=usage, now=int(time.time()))
        await recorder.finish(closed, lambda ended, entries: self._seal_response(claim, ended, entries))
        log.info("A response has ended.", action="run_ended", status=closed.status, lease=claim.lease)
        await self._end_log(claim, work.log)

    async def _state(self, claim: Claim) -> tuple[Response, list[Entry], list[Entry], bool]:
        """The response, its events that are known, those of them that are in no journal, and whether others may have been
        sent that are lost with Redis."""
        async with self._database.autocommit() as tx:
            stored = await responses.get_response(tx, claim.tenant_id, claim.response_id)
            kept = await journal.read(tx, claim.tenant_id, claim.response_id)
        assert kept is not None
        tail: list[Entry] = []
        lost = False
        if claim.streamed and claim.lease > 1:
            try:
                await self._logs.fence(claim.response_id, claim.lease)
                tail = _tail(await self._logs.read_all(claim.response_id), _last(kept.entries))
                lost = claim.redis_run is not None and await self._logs.life() != claim.redis_run
            except (RedisError, OSError):
                lost = True
        return responses.response_of(stored), [*kept.entries, *tail], tail, lost

    async def _resume(
        self, work: Work, recorder: Recorder, recovered: Recovered, *, jumped: bool, cancelled: bool
    ) -> Outcome | None:
        """Say what lies between the former owner's last word and ours; the outcome, if the run ends with that."""
        claim = work.claim
        if recovered.closing and not jumped:
            await recorder.record(recovered.closing)
        snapshot = recorder.snapshot(recovered.output)
        if cancelled:
            recorder.response = snapshot
            return Outcome("cancelled")
        if claim.lease > self._settings.run_attempts_max:
            recorder.response = snapshot
            return Outcome("failed", error=ServerError("The response could not be made: every attempt broke off."))
        async with self._database.autocommit() as tx:
            await responses.begin_response(tx, claim.tenant_id, claim.response_id, claim.lease)
        if jumped and work.log:
            work.log.jumps(recovered.next_number - 1, recorder.next_number)
        await recorder.record([InProgress(response=snapshot)])
        return None

    async def _outcome(
        self, work: Work, recorder: Recorder, recovered: Recovered, *, skip: bool
    ) -> tuple[Outcome, Usage]:
        claim = work.claim
        assert claim.request is not None
        request = decode_create(claim.request.encode(), self._catalog.passed_on)
        key = self._seal.open(claim.caller_key) if claim.caller_key else None
        made: list[AnyItem] = [decode_item(bytes(raw)) for raw in recovered.output]
        try:
            task = await self._tasks.restore(claim.tenant_id, claim.response_id, key, request, made)
        except ApiError as error:
            return Outcome("failed", error=error), NO_USAGE
        # An index that a lost event may have used is not used again.
        index = recovered.next_output_index + (1 if skip else 0)
        loop = Loop(task, recorder, turns_max=self._settings.turns_max, output_index=index)
        opening = asyncio.create_task(loop.open()) if request.generate else None
        outcome = await loop.outcome(opening, self._settings.run_duration_max_s)
        return outcome, loop.usage

    # -- Storing ----------------------------------------------------------------------------------------------------------

    async def _keep(self, claim: Claim, entries: Sequence[Entry]) -> None:
        """Commit entries to the journal. Raises Fenced."""
        frames = b"".join(entry.frame for entry in entries)
        async for attempt in self._database.retrying():
            with attempt:
                async with self._database.begin() as tx:
                    if not await journal.append(
                        tx, claim.tenant_id, claim.response_id, claim.lease, entries[0].sequence_number, frames
                    ):
                        raise Fenced

    async def _seal_response(self, claim: Claim, closed: Response, entries: Sequence[Entry]) -> Response:
        frames = b"".join(entry.frame for entry in entries)
        archive = await asyncio.to_thread(journal.pack, frames) if claim.streamed else None
        async for attempt in self._database.retrying():
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
        kept = await self.kept(claim.tenant_id, claim.response_id)
        run_log = RunLog(self._logs, claim.response_id, claim.lease, kept.entries)
        await self._end_log(claim, run_log)

    async def _end_abandoned(self, claim: Claim) -> None:
        """A foreground run whose process is gone: nobody can go on with it."""
        async with self._database.autocommit() as tx:
            body = await responses.load_body(tx, claim.tenant_id, claim.response_id)
            if body is not None:
                error = ServerError("The server that made this response has died.")
                closed = close_response(body, Outcome("failed", error=error), usage=NO_USAGE, now=int(time.time()))
                await responses.finish_response(tx, claim.tenant_id, closed)
        log.warning("An abandoned response was ended.", action="run_abandoned")


def _last(entries: Sequence[Entry]) -> int:
    return entries[-1].sequence_number if entries else -1


def _tail(batches: Sequence[Batch], last: int) -> list[Entry]:
    """What Redis holds beyond the journal."""
    tail: list[Entry] = []
    for batch in batches:
        for entry in batch.entries:
            if entry.sequence_number > last:
                tail.append(entry)
                last = entry.sequence_number
    return tail


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
