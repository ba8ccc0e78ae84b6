"""Adds the usage of runs to that of their days, in any process, now and then."""

import asyncio

import structlog

from app.errors import DatabaseUnavailable
from app.settings import Settings
from app.storage import usage
from app.storage.database import Database
from app.storage.redisclient import break_off

log = structlog.get_logger()

TIMES_PER_AGE = 10
"""How often it is looked while rows become old enough."""

ROWS_MAX = 5_000
"""Of one statement."""


class RollUp:
    """Rolls up what is in the ledger for REPRISE_USAGE_LEDGER_S."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._database, self._after_s = database, settings.usage_ledger_s
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Start to look."""
        self._tasks = [asyncio.create_task(self._roll_up_forever())]

    async def close(self) -> None:
        """Stop."""
        await break_off(self._tasks)

    async def _roll_up_forever(self) -> None:
        while True:
            await asyncio.sleep(self._after_s / TIMES_PER_AGE)
            try:
                await self._roll_up()
            except DatabaseUnavailable:
                log.warning("The database is unavailable; usage is rolled up later.", action="roll_up_failed")
            except Exception:
                log.exception("Usage could not be rolled up because of a bug.", action="roll_up_failed")

    async def _roll_up(self) -> None:
        rows = ROWS_MAX
        while rows == ROWS_MAX:
            async with self._database.autocommit() as tx:
                rows = await usage.roll_up(tx, after_s=self._after_s, limit=ROWS_MAX)
