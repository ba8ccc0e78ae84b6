"""Background runs: any worker makes them, and another continues where it stopped.

Postgres is the record, Redis only transport. The epoch of a claim fences every write: both refuse a worker that has lost its
lease, and it stops without a word.
"""

import asyncio
import time
from collections.abc import Sequence

import structlog
from msgspec import Struct
from msgspec.structs import replace
from redis.exceptions import RedisError

from app.domain.compaction import newest_compaction
from app.domain.context import waits_for_client
from app.domain.lifecycle import Outcome, close_response
from app.domain.quotas import holder_of, used_tokens
from app.domain.recovery import Recovered, recover
from app.domain.rights import logged
from app.domain.sealed import Seal
from app.domain.secrets import open_secrets
from app.domain.spending import NOTHING_SPENT, Spent
from app.errors import ApiError, DatabaseUnavailable, Fenced, RunTooLong, ServerError
from app.offload import offload
from app.outbound.catalog import Catalog
from app.rooms import Room
from app.runs.pipeline import Pipeline, Turns
from app.runs.planning import Planner
from app.runs.quotas import Grant, Quotas
from app.runs.recorder import Recorder
from app.runs.tools import Tools
from app.storage import endings, journal, queue, responses
from app.storage.database import Database
from app.storage.journal import RunJournal
from app.storage.queue import Claim, Heartbeat
from app.storage.redislog import RedisLog, RedisLogs
from app.storage.usage import Charge
from app.wire.events import Entry, InProgress
from app.wire.items import AnyItem, decode_stored_item
from app.wire.requests import CreateResponse, decode_create, with_secrets
from app.wire.resources import Response

log = structlog.get_logger()

COMMIT_PAUSE_S = 0.005
"""Between looks whether a checkpoint is over, before a run is cancelled."""

FENCED = "Another worker owns this run."


class Found(Struct, frozen=True):
    """What earlier owners of a run have left."""

    response: Response
    recorded: list[Entry]
    """Every event that is known."""
    pending: list[Entry]
    """Those of them that are not checkpointed yet."""
    stream_token: str | None
    """That of the stream from now on; None while Redis is unavailable."""
    has_lost_events: bool
    """Whether others may have been sent, and lost with Redis."""


class BackgroundRuns(Struct, frozen=True):
    """What a background run needs."""

    database: Database
    planner: Planner
    catalog: Catalog
    seal: Seal
    pipeline: Pipeline
    logs: RedisLogs
    quotas: Quotas

    def claimed(self, claim: Claim) -> "BackgroundRun":
        """The run of a claim."""
        return BackgroundRun(self, claim)


class BackgroundRun:
    """One claimed run of this process."""

    def __init__(self, runs: BackgroundRuns, claim: Claim) -> None:
        self._runs, self._settings = runs, runs.pipeline.settings
        self.claim = claim
        self.attempts = claim.epoch - claim.handed_over
        self.log: RedisLog | None = None
        self.task: asyncio.Task[None] | None = None
        self.turns: Turns | None = None
        self.outcome: Outcome | None = None
        self.is_stopped = False
        self._is_cancelled = False
        self._recorder: Recorder | None = None
        self._tools: Tools | None = None
        self._room: Room | None = None

    @property
    def recorder(self) -> Recorder:
        """There is one since `begin`."""
        assert self._recorder
        return self._recorder

    def cancel(self) -> None:
        """End it as cancelled, with its events so far. A checkpoint under way is waited for. Calls under way are left to the worker
        that takes the run over, as after a crash: it records that their outcome is unknown."""
        if not (self.turns and self.task) or self.turns.rounds.is_calling or self.is_stopped:
            return
        if self.recorder.is_committing:
            asyncio.get_running_loop().call_later(COMMIT_PAUSE_S, self.cancel)
            return
        self._is_cancelled, self.turns = True, None
        self.task.cancel()

    def stop(self) -> None:
        """Stop at once, because another worker continues."""
        self.is_stopped = True
        if self._recorder:
            self._recorder.stop()
        if self.log:
            self.log.fenced = True
        if self.task:
            self.task.cancel()

    @property
    def heartbeat(self) -> Heartbeat:
        """Its next heartbeat."""
        claim = self.claim
        number = self._recorder.next_number if self._recorder else claim.number_ceiling
        return Heartbeat(
            claim.tenant_id,
            claim.response_id,
            claim.epoch,
            number + queue.NUMBERS_AHEAD,
            stream_token=self.log.complete_token if self.log else None,
        )

    async def make(self) -> None:
        """Make what was claimed, or end it: the first time, after a crash, or because it is cancelled."""
        claim = self.claim
        fields = {"response_id": claim.response_id, **logged(claim.tenant_id, claim.key_id)}
        with structlog.contextvars.bound_contextvars(**fields):
            try:
                if claim.state == "sealed":
                    await self._publish_rest()
                elif claim.request_bytes is None:
                    await self._end_abandoned()
                else:
                    with self._runs.planner.room() as self._room:
                        if claim.state != "cancelled":  # a cancellation has a client that waits
                            size = max(claim.request_bytes, claim.response_bytes) + claim.context_bytes
                            await self._room.take(size, wait_s=None)
                        await self._runs.pipeline.make(self)
            except Fenced:
                log.info(FENCED, action="run_fenced", epoch=claim.epoch)
            finally:
                if self._tools:
                    await self._tools.close()

    # -- The steps of the pipeline ----------------------------------------------------------------------------------------

    async def begin(self) -> Turns | Outcome:
        """Recover what earlier owners recorded, and continue after it."""
        claim = self.claim
        found = await self._find()
        if self.is_stopped:
            raise Fenced
        recovered = await offload(sum(len(entry.frame) for entry in found.recorded), recover, found.recorded)
        number, lost = recovered.next_number, found.has_lost_events
        if claim.streamed:
            self.log = RedisLog(
                self._runs.logs,
                claim.response_id,
                claim.epoch,
                found.recorded,
                token=found.stream_token,
                recreate=lost and found.stream_token is None,
            )
        self._recorder = Recorder(
            replace(found.response, status="in_progress", output=recovered.done),
            self.log,
            bytes_max=self._settings.run_output_bytes_max,
            events_max=self._settings.run_events_max,
            next_number=max(number, claim.number_ceiling) if lost else number,
            # An index that a lost event may have used is not used again.
            next_output_index=recovered.next_output_index + (1 if lost else 0),
            spent=journal.read_spent(claim.usage),
            recorded=found.recorded,
            pending=found.pending,
            journal=RunJournal(self._runs.database, claim.tenant_id, claim.response_id, claim.epoch),
        )
        # Whether the former owner has asked an upstream, it alone knew.
        self._recorder.is_asking = found.response.status != "queued"
        try:
            outcome = await self._record_recovery(recovered, found)
        except RunTooLong as error:  # which the former owner met, and died before it could record it
            outcome = self._decided() or Outcome("failed", error=error)
        return outcome or await self._plan_turns(recovered)

    async def _find(self) -> Found:
        """Read what earlier owners have left. From now on Redis refuses their events, as Postgres does since the claim."""
        claim = self.claim
        async with self._runs.database.autocommit() as tx:
            stored = await responses.get_response(tx, claim.tenant_id, claim.response_id)
            checkpointed = await journal.read_all(tx, claim.tenant_id, claim.response_id)
        token: str | None = None
        tail: list[Entry] = []
        if claim.streamed:
            try:
                token, sent = await self._runs.logs.take_over(claim.response_id, claim.epoch, claim.stream_token)
                last = checkpointed[-1].sequence_number if checkpointed else -1
                tail = [entry for entry in sent if entry.sequence_number > last]
            except (RedisError, OSError):
                log.warning("Redis is unavailable; a run begins without it.", action="redis_down")
        return Found(
            response=responses.response_of(stored),
            recorded=[*checkpointed, *tail],
            pending=tail,
            stream_token=token,
            # Before it has begun nothing is sent that is not checkpointed.
            has_lost_events=claim.streamed
            and stored.status != "queued"
            and (token is None or token != claim.stream_token),
        )

    async def _record_recovery(self, recovered: Recovered, found: Found) -> Outcome | None:
        """Record what leads from the former owner's last event to the next turn. Returns the outcome of a run that ends here."""
        claim, recorder = self.claim, self.recorder
        decided = self._decided()
        snapshot = replace(recorder.response, output=recovered.output)
        if found.has_lost_events:
            # Checkpointed, so that no later owner goes back to the numbers that are given up here. Clients may not know of items
            # that were open, except for calls: those are checkpointed from their beginning, and end here.
            output = recovered.done if decided or recovered.ending else recovered.output
            snapshot = replace(recorder.response, output=output)
            await recorder.record([InProgress(response=snapshot), *recovered.ending], checkpoint=True)
        elif decided:
            await recorder.record(recovered.closing, checkpoint=True)
        elif recovered.closing:
            # In one commit with the snapshot that leaves them out: otherwise a later owner would take them for done.
            await recorder.record([*recovered.closing, InProgress(response=snapshot)], checkpoint=True)
        if decided:
            return decided
        async with self._runs.database.autocommit() as tx:
            if not await responses.begin_response(
                tx, claim.tenant_id, claim.response_id, claim.epoch, found.stream_token
            ):
                raise Fenced
        if not found.has_lost_events and not recovered.closing:
            await recorder.record([InProgress(response=snapshot)])
        return None

    def _decided(self) -> Outcome | None:
        """The outcome of a run that takes no more turns."""
        if self.claim.state == "cancelled":
            return Outcome("cancelled")
        if self.attempts > self._settings.run_attempts_max:
            return Outcome("failed", error=ServerError("The response could not be made: every attempt broke off."))
        return None

    async def _plan_turns(self, recovered: Recovered) -> Turns | Outcome:
        claim = self.claim
        made: list[AnyItem] = [decode_stored_item(bytes(raw)) for raw in recovered.output]
        if any(waits_for_client(item) for item in made):
            return Outcome("completed")  # the calls that the former owner handed to the client stand
        assert self._room
        try:
            secrets = open_secrets(self._runs.seal, claim.secrets)
            request = await self._request()
            request = replace(request, tools=with_secrets(request.tools, secrets.tools))
            if request.compacts and newest_compaction(made) >= 0:
                return Outcome("completed")  # the former owner died before it could record that
            plan = await self._runs.planner.restore(
                claim.tenant_id, claim.response_id, claim.key_id, secrets.key, request, made, self._room
            )
        except DatabaseUnavailable:
            raise
        except ApiError as error:
            return Outcome("failed", error=error)
        turns = self._runs.pipeline.turns(plan, self.recorder, call_ids=recovered.call_ids)
        self._tools = turns.tools
        return turns

    async def _request(self) -> CreateResponse:
        """The request of the run. Raises Fenced, ApiError."""
        async with self._runs.database.autocommit() as tx:
            stored = await queue.load_request(tx, self.claim)
        if stored is None:
            raise Fenced
        response = self.recorder.response
        prompted = response.instructions if isinstance(response.instructions, list) else []
        request = await offload(
            len(stored),
            decode_create,
            stored.encode(),
            self._runs.catalog.passed_on,
            lambda body: (body, prompted),  # as at admission, whatever the catalog and the agent have now
        )
        agent = response.model if response.model != request.model else ""
        return replace(
            request,
            agent=agent,
            items_add_tools=not agent or request.body.agent is not None,
            prompted=prompted,
            size=max(request.size, self.claim.response_bytes),
        )

    def interrupted(self) -> Outcome | None:
        """The outcome of a run that is cancelled now; None if another worker continues it."""
        return Outcome("cancelled") if self._is_cancelled and not self.is_stopped else None

    async def commit(self, closed: Response, entries: Sequence[Entry]) -> Response:
        """Commit the end of the response, however long Postgres is unavailable. Raises Fenced."""
        assert self._room
        self._room.release()
        claim = self.claim
        archive = await asyncio.to_thread(journal.archive, list(entries), closed) if claim.streamed else []
        async for attempt in self._runs.database.retrying(forever=True):
            with attempt:
                async with self._runs.database.begin() as tx:
                    if not await endings.end_background(
                        tx, claim.tenant_id, closed, claim.epoch, archive, self._charge(self.recorder.spent)
                    ):
                        raise Fenced
        await self._settle_quotas(closed)
        return closed

    def _charge(self, spent: Spent) -> Charge:
        return Charge(self.claim.key_id, self._runs.catalog.currency, spent)

    async def _settle_quotas(self, closed: Response) -> None:
        if grant := self._grant:
            await self._runs.quotas.settle(grant, self.recorder.used_tokens(closed, grant.tokens))

    @property
    def _grant(self) -> Grant | None:
        """What it has taken of quotas."""
        claim = self.claim
        if claim.reserved_tokens is None:
            return None
        return Grant(holder_of(claim.tenant_id, claim.key_id), claim.response_id, claim.reserved_tokens)

    async def publish(self) -> None:
        """Wait until Redis holds the terminal event, or is unavailable: then readers find it in Postgres. Nothing else is left."""
        claim = self.claim
        if self.log:
            await self.log.flush()
            await self._runs.logs.expire(self.log)
        async with self._runs.database.autocommit() as tx:
            await queue.remove(tx, claim.tenant_id, claim.response_id, claim.epoch)

    # -- Other ends -------------------------------------------------------------------------------------------------------

    async def _publish_rest(self) -> None:
        """The former owner died between the commit and the terminal event."""
        claim = self.claim
        if grant := self._grant:
            async with self._runs.database.autocommit() as tx:
                body = await responses.load_body(tx, claim.tenant_id, claim.response_id)
            used = used_tokens(body.status, body.usage, was_asked=True, reserved=grant.tokens) if body else None
            await self._runs.quotas.settle(grant, used)
        if claim.streamed:
            async with self._runs.database.autocommit() as tx:
                archived = await journal.read_all(tx, claim.tenant_id, claim.response_id)
            if archived:  # it may be deleted
                self.log = RedisLog(self._runs.logs, claim.response_id, claim.epoch, archived)
        await self.publish()

    async def _end_abandoned(self) -> None:
        """A foreground run whose process died: it can't be continued."""
        claim = self.claim
        async with self._runs.database.autocommit() as tx:
            body = await responses.load_body(tx, claim.tenant_id, claim.response_id)
            if body is not None:
                error = ServerError("The server that made this response has died.")
                closed = close_response(body, Outcome("failed", error=error), usage=None, now=int(time.time()))
                await endings.end_foreground(tx, claim.tenant_id, closed, self._charge(NOTHING_SPENT))
        log.warning("An abandoned response was ended.", action="run_abandoned")
