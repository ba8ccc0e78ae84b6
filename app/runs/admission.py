"""The one door for new responses: limits, the plan, the approvals that are used up, the insert."""

import asyncio
import time

from msgspec import Struct

from app.domain.context import LeftOut
from app.domain.lifecycle import open_response
from app.domain.quotas import Holder, Limits, StorageLimit, holder_of, reserved_tokens
from app.domain.rights import Rights
from app.domain.sealed import Seal
from app.domain.secrets import Secrets, seal_secrets
from app.errors import DatabaseUnavailable, ServerUnavailable, TooManyRequests
from app.ids import new_id
from app.offload import offload
from app.runs.foreground import ForegroundRun, ForegroundRuns
from app.runs.insert import insert
from app.runs.plan import RunPlan
from app.runs.planning import Planner
from app.runs.quotas import Grant, Quotas
from app.runs.storage_quota import StorageQuota
from app.settings import Settings
from app.storage import queue
from app.storage.backlog import Backlogs
from app.storage.database import Database, Tx
from app.storage.notifications import RunQueued
from app.storage.queue import Queued
from app.storage.redislog import RedisLogs
from app.wire.events import Created, Entry, encode_event
from app.wire.events import Queued as QueuedEvent
from app.wire.requests import CreateResponse, as_stored
from app.wire.resources import Response


class Caller(Struct, frozen=True):
    """Who asks: the key that was sent, unless it is one of ours, and what the caller may do."""

    key: str | None
    rights: Rights
    limits: tuple[Limits, ...] = ()
    """The quotas of its tenant and, if there is one, of its key; none where nothing is limited."""
    storage_limits: tuple[StorageLimit, ...] = ()
    """What its tenant and its key may have stored; none where that is not limited."""
    reply_headers: dict[str, str] = {}
    """What the reply says of quotas, since its admission."""

    @property
    def holder(self) -> Holder:
        """For whom its requests count."""
        return holder_of(self.rights.owner, self.rights.key_id)

    @property
    def tenant_id(self) -> str:
        """The owner of the data."""
        return self.rights.owner


class Enqueued(Struct, frozen=True):
    """A background response that is stored with its place in the queue, and its first events."""

    response: Response
    entries: list[Entry]
    left_out: LeftOut


class Admission:
    """Admits responses of this process."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        planner: Planner,
        seal: Seal,
        foreground: ForegroundRuns,
        logs: RedisLogs,
        backlogs: Backlogs,
        quotas: Quotas,
        storage_quota: StorageQuota,
    ) -> None:
        self._settings, self._database, self._planner, self._seal = settings, database, planner, seal
        self._foreground, self._logs, self._backlogs, self._quotas = foreground, logs, backlogs, quotas
        self._storage_quota = storage_quota
        self._planning = 0

    async def start(self, caller: Caller, request: CreateResponse) -> ForegroundRun:
        """Start a foreground run. Raises ApiError for everything that can be known before the upstream is asked."""
        self._refuse_when_closing()
        if request.store:
            await self._storage_quota.demand_room(caller.storage_limits)
        self._quotas.refuse_early(caller.holder, caller.limits)
        if len(self._foreground) + self._planning >= self._settings.foreground_runs_max:
            raise TooManyRequests("Too many responses are being made; please try again.", headers={"Retry-After": "1"})
        self._planning += 1
        try:
            plan = await self._planner.plan(caller.tenant_id, caller.key, request, rights=caller.rights)
            plan = await self._planner.authorized(plan)
        finally:
            self._planning -= 1
        response, grant = _open(plan), None
        try:
            grant = await self._grant(caller, plan, response.id)
            self._refuse_when_closing()
        except BaseException:
            plan.room.release()
            if grant:
                self._quotas.settle_soon(grant, 0)
            raise
        return self._foreground.start(plan, response, self._backlogs.open() if request.stream else None, grant)

    async def _grant(self, caller: Caller, plan: RunPlan, run: str, *, is_background: bool = False) -> Grant | None:
        """Take what a run needs of the caller's quotas. Raises RateLimited, RequestTooLarge, ServerUnavailable."""
        limits = caller.limits
        if not limits:
            return None
        visible, output_tokens = [item for _, item in plan.context.visible], self._settings.quota_output_tokens
        tokens = await offload(plan.size, reserved_tokens, limits, plan.request, visible, output_tokens)
        admitted = await self._quotas.admit(caller.holder, limits, run, tokens=tokens, is_background=is_background)
        caller.reply_headers.update(admitted.headers)
        return admitted.grant

    def _refuse_when_closing(self) -> None:
        if self._foreground.is_closing:
            raise ServerUnavailable("The server is shutting down.")

    async def enqueue(self, caller: Caller, request: CreateResponse, raw: bytes) -> Enqueued:
        """Store a background response with its place in the queue, in one commit. Raises ApiError."""
        await self._storage_quota.demand_room(caller.storage_limits)
        self._quotas.refuse_early(caller.holder, caller.limits)
        plan = await self._planner.plan(caller.tenant_id, caller.key, request, rights=caller.rights)
        try:
            await offload(plan.size, plan.refuse_unanswerable)
            response = _open(plan)
            grant = await self._grant(caller, plan, response.id, is_background=True)
            try:
                return await self._enqueue(caller, plan, raw, response, grant)
            except BaseException as error:
                if grant:
                    await self._give_back(grant, error)
                raise
        finally:
            plan.room.release()

    async def _give_back(self, grant: Grant, error: BaseException) -> None:
        """Give back what a run has taken that was not stored because of this error. If it may be, Postgres is asked."""
        may_be_stored = isinstance(error, asyncio.CancelledError) or (
            isinstance(error, DatabaseUnavailable) and error.is_unknown
        )
        if may_be_stored:
            await self._quotas.doubt(grant)
        else:
            await self._quotas.settle(grant, 0)

    async def _enqueue(
        self, caller: Caller, plan: RunPlan, raw: bytes, response: Response, grant: Grant | None
    ) -> Enqueued:
        entries = [
            encode_event(Created(response=response)),
            encode_event(QueuedEvent(response=response, sequence_number=1)),
        ]
        stored, tool_secrets = as_stored(raw, plan.request)
        queued = Queued(
            request=stored,
            secrets=seal_secrets(self._seal, Secrets(caller.key, tool_secrets)),
            streamed=plan.request.stream,
            frames=b"".join(entry.frame for entry in entries),
            reserved_tokens=grant.tokens if grant else None,
        )

        async def refuse(tx: Tx) -> None:
            settings = self._settings
            if await queue.is_full(
                tx, caller.tenant_id, tenant_max=settings.queued_runs_tenant_max, all_max=settings.queued_runs_max
            ):
                raise TooManyRequests("The queue of background responses is full.", headers={"Retry-After": "5"})

        await insert(self._database, plan, response.id, response, queued, refuse=refuse)
        self._logs.notify(RunQueued())
        return Enqueued(response, entries, plan.left_out)


def _open(plan: RunPlan) -> Response:
    return open_response(
        plan.request, id=new_id("resp"), created_at=int(time.time()), left_out=plan.context.toolbox.left_out
    )
