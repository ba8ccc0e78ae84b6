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
        self._abandoned: list[tuple[str, str]] = []
        self._late: list[tuple[str, Response]] = []

    def end_later(self, tenant_id: str, response: Response) -> None:
        """A response of ours has ended while the database was away: a beat stores that once it is back."""
        self._late.append((tenant_id, response))

    async def beat_for_ever(self) -> None:
        """Prolong and take over, a few times per lease; an absent database is waited for."""
        while True:
            try:
                await self.beat()
            except DatabaseUnavailable:
                log.warning("The database is unavailable; leases are not prolonged.", action="beat_failed")
            except Exception:
                log.exception("A beat failed by our own mistake.", action="beat_failed")
            await asyncio.sleep(self.lease.seconds / BEATS_PER_LEASE)

    async def beat(self) -> None:
        """Prolong our leases; end responses whose process is gone."""
        async with self._database.autocommit() as tx:
            await leases.prolong(tx, self.lease.worker, self.lease.seconds)
            # What is ours now stays ours until it is ended, even if the database goes away in between.
            self._abandoned += await leases.take_over(tx, self.lease.worker, self.lease.seconds, limit=TAKE_OVER_MAX)
            while self._abandoned:
                tenant_id, response_id = self._abandoned[0]
                body = await leases.load_body(tx, tenant_id, response_id)
                if body is not None:
                    await responses.finish_response(tx, tenant_id, _failed(body))
                log.warning("An abandoned response was ended.", action="run_abandoned", response_id=response_id)
                self._abandoned.pop(0)
            while self._late:
                await responses.finish_response(tx, *self._late[0])
                self._late.pop(0)


def _failed(body: str) -> Response:
    response = msgspec.json.decode(body, type=Response)
    error = ServerError("The server that made this response has died.")
    return close_response(response, Outcome("failed", error=error), usage=NO_USAGE, now=int(time.time()))
