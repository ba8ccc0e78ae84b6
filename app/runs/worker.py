"""Leases: this process prolongs its own, and ends what dead processes left behind."""

import asyncio
import time

import msgspec
import structlog

from app.domain.lifecycle import NO_USAGE, Outcome, close_response
from app.errors import DatabaseUnavailable, ServerError
from app.ids import new_id
from app.settings import Settings
from app.storage import leases, responses
from app.storage.database import Database
from app.wire.resources import Response

log = structlog.get_logger()

BEATS_PER_LEASE = 3
TAKE_OVER_MAX = 100
"""Abandoned responses that are ended in one beat."""


class Worker:
    """One process's right to write. `lease` is what a new response's row gets."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self.lease = responses.Lease(worker=new_id("worker"), seconds=settings.lease_s)
        self._database = database

    async def beat_for_ever(self) -> None:
        """Prolong and take over, a few times per lease; an absent database is waited for."""
        while True:
            try:
                await self.beat()
            except DatabaseUnavailable:
                log.warning("The database is unavailable; leases are not prolonged.", action="beat_failed")
            await asyncio.sleep(self.lease.seconds / BEATS_PER_LEASE)

    async def beat(self) -> None:
        """Prolong our leases; end responses whose process is gone."""
        async with self._database.autocommit() as tx:
            await leases.prolong(tx, self.lease.worker, self.lease.seconds)
            abandoned = await leases.take_over(tx, self.lease.worker, self.lease.seconds, limit=TAKE_OVER_MAX)
            for tenant_id, response_id in abandoned:
                body = await leases.load_body(tx, tenant_id, response_id)
                if body is not None:
                    await responses.finish_response(tx, tenant_id, _failed(body))
                log.warning("An abandoned response was ended.", action="run_abandoned", response_id=response_id)


def _failed(body: str) -> Response:
    response = msgspec.json.decode(body, type=Response)
    error = ServerError("The server that made this response has died.")
    return close_response(response, Outcome("failed", error=error), usage=NO_USAGE, now=int(time.time()))
