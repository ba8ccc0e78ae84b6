"""What every process does now and then: it adds the usage of runs to that of their days, and deletes old entries of the audit log."""

import asyncio
from collections.abc import Awaitable, Callable

import structlog
from msgspec import Struct

from app.errors import DatabaseUnavailable
from app.settings import Settings
from app.storage import audit, usage
from app.storage.database import Database, Tx
from app.storage.redisclient import break_off

log = structlog.get_logger()

TIMES_PER_AGE = 10
"""How often it is looked while rows of the ledger become old enough."""

AUDIT_INTERVAL_S = 3_600.0
"""Between two looks for entries that are old enough."""

ROWS_MAX = 5_000
"""Of one statement."""


class _Task(Struct, frozen=True):
    """What is done at intervals; `step` takes up to ROWS_MAX rows, and says how many there were."""

    action: str
    first_after_s: float
    interval_s: float
    step: Callable[[Tx], Awaitable[int]]


class Maintenance:
    """What is in the ledger for REPRISE_USAGE_LEDGER_S is rolled up; entries that are older than REPRISE_AUDIT_DAYS are deleted."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._database = database
        self._ledger_s, self._audit_days = settings.usage_ledger_s, settings.audit_days
        self._running: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Start to look."""
        interval_s = self._ledger_s / TIMES_PER_AGE
        tasks = [_Task("roll_up", interval_s, interval_s, self._roll_up)]
        if self._audit_days:
            tasks.append(_Task("audit_deletion", 0, AUDIT_INTERVAL_S, self._delete_entries))
        self._running = [asyncio.create_task(self._repeat(task)) for task in tasks]

    async def close(self) -> None:
        """Stop."""
        await break_off(self._running)

    async def _roll_up(self, tx: Tx) -> int:
        return await usage.roll_up(tx, after_s=self._ledger_s, limit=ROWS_MAX)

    async def _delete_entries(self, tx: Tx) -> int:
        deleted = await audit.delete_old(tx, days=self._audit_days, limit=ROWS_MAX)
        if deleted:
            log.info("Old entries of the audit log are deleted.", action="audit_deletion", entries=deleted)
        return deleted

    async def _repeat(self, task: _Task) -> None:
        await asyncio.sleep(task.first_after_s)
        while True:
            try:
                rows = ROWS_MAX
                while rows == ROWS_MAX:
                    async with self._database.autocommit() as tx:
                        rows = await task.step(tx)
            except DatabaseUnavailable:
                log.warning("The database is unavailable; this is done later.", action=f"{task.action}_failed")
            except Exception:
                log.exception("Maintenance failed because of a bug.", action=f"{task.action}_failed")
            await asyncio.sleep(task.interval_s)
