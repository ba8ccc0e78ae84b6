"""The one door for new responses: limits, the plan, the approvals that are used up, the insert."""

import time

from msgspec import Struct

from app.domain.context import LeftOut
from app.domain.lifecycle import open_response
from app.domain.rights import Rights
from app.domain.sealed import Seal
from app.domain.secrets import Secrets, seal_secrets
from app.errors import ServerUnavailable, TooManyRequests
from app.ids import new_id
from app.offload import offload
from app.runs.foreground import ForegroundRun, ForegroundRuns
from app.runs.insert import insert
from app.runs.plan import RunPlan
from app.runs.planning import Planner
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
    ) -> None:
        self._settings, self._database, self._planner, self._seal = settings, database, planner, seal
        self._foreground, self._logs, self._backlogs = foreground, logs, backlogs
        self._planning = 0

    async def start(self, caller: Caller, request: CreateResponse) -> ForegroundRun:
        """Start a foreground run. Raises ApiError for everything that can be known before the upstream is asked."""
        self._refuse_when_closing()
        if len(self._foreground) + self._planning >= self._settings.foreground_runs_max:
            raise TooManyRequests("Too many responses are being made; please try again.", headers={"Retry-After": "1"})
        self._planning += 1
        try:
            plan = await self._planner.plan(caller.tenant_id, caller.key, request, rights=caller.rights)
            plan = await self._planner.authorized(plan)
        finally:
            self._planning -= 1
        try:
            self._refuse_when_closing()
        except ServerUnavailable:
            plan.room.release()
            raise
        return self._foreground.start(plan, _open(plan), self._backlogs.open() if request.stream else None)

    def _refuse_when_closing(self) -> None:
        if self._foreground.is_closing:
            raise ServerUnavailable("The server is shutting down.")

    async def enqueue(self, caller: Caller, request: CreateResponse, raw: bytes) -> Enqueued:
        """Store a background response with its place in the queue, in one commit. Raises ApiError."""
        plan = await self._planner.plan(caller.tenant_id, caller.key, request, rights=caller.rights)
        try:
            await offload(plan.size, plan.refuse_unanswerable)
            return await self._enqueue(caller, plan, raw)
        finally:
            plan.room.release()

    async def _enqueue(self, caller: Caller, plan: RunPlan, raw: bytes) -> Enqueued:
        response = _open(plan)
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
