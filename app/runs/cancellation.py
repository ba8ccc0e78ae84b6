"""Cancelling a background response, from any process."""

import asyncio
import time

from app.domain.lifecycle import IN_FLIGHT
from app.errors import DatabaseUnavailable
from app.runs.background import BackgroundRun, BackgroundRuns
from app.settings import Settings
from app.storage import queue, responses
from app.storage.database import Database
from app.storage.notifications import CancelRequested, OwnerChanged
from app.storage.queue import Claim, Owner
from app.storage.redislog import RedisLogs
from app.wire.resources import Response

OWNER_WAIT_S = 0.5
"""How long the owner of a run without a stream may take to end it, with its events so far."""

CANCEL_WAIT_S = 2.0
"""How long a client waits for a response that ends elsewhere at the same moment."""

LOOK_SPACING_S = 0.02


class Cancellation:
    """Cancels background responses."""

    def __init__(
        self, settings: Settings, database: Database, logs: RedisLogs, background: BackgroundRuns, owner: Owner
    ) -> None:
        self._database, self._logs, self._background, self._owner = database, logs, background, owner
        self._retry_s = settings.database_retry_s
        self._ending: set[asyncio.Task[None]] = set()

    async def cancel(self, tenant_id: str, response_id: str) -> Response:
        """End a response as cancelled; one that has ended is returned as it is. Raises ResponseNotFound."""
        await self._ask_owner(tenant_id, response_id)
        claim: Claim | None = None
        async for attempt in self._database.settling():
            with attempt:
                async with self._database.autocommit() as tx:
                    claim = await queue.cancel(tx, tenant_id, response_id, self._owner, again=attempt.num > 1)
        if claim is not None:
            self._logs.notify(OwnerChanged(response_id))
            await self._end(self._background.claimed(claim))
        deadline = time.monotonic() + CANCEL_WAIT_S
        while True:
            async with self._database.autocommit() as tx:
                response = responses.response_of(await responses.get_response(tx, tenant_id, response_id))
            if response.status not in IN_FLIGHT or time.monotonic() > deadline:
                return response
            await asyncio.sleep(LOOK_SPACING_S)

    async def _ask_owner(self, tenant_id: str, response_id: str) -> None:
        """Only its owner knows the events of a run without a stream: for a moment it may end the run itself."""
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
                self._logs.notify(CancelRequested(response_id))
                asked = True
            await asyncio.sleep(LOOK_SPACING_S)

    async def _end(self, run: BackgroundRun) -> None:
        """Record the end, which is decided. The client waits no longer for it than Postgres may be unavailable."""
        ending = asyncio.create_task(run.make(), name=run.claim.response_id)
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)
        await asyncio.wait({ending}, timeout=self._retry_s)
        if ending.done():
            ending.result()
