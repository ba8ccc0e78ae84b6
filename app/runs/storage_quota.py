"""The quotas of what is stored: known as it was measured last, and enforced before anything more is stored."""

import asyncio
import time
from collections.abc import Sequence

import structlog

from app.domain.quotas import StorageLimit
from app.domain.rights import logged
from app.errors import DatabaseUnavailable
from app.settings import Settings
from app.storage import stored_bytes
from app.storage.database import Database
from app.storage.redisclient import break_off

log = structlog.get_logger()

REMEMBERED_MAX = 10_000
"""Owners."""

MEASURED_AT_ONCE_MAX = 1_000
"""Owners that one process measures, in turns; others wait until their size is asked for again."""


class StorageQuota:
    """What this process knows of owners whose stored bytes are limited."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._database, self._age_s, self._cache_s = database, settings.stored_bytes_age_s, settings.key_cache_s
        self._known: dict[str, tuple[float, int | None]] = {}
        self._measuring: dict[str, asyncio.Task[None]] = {}
        self._turns = asyncio.Lock()

    async def close(self) -> None:
        """Measure no more."""
        await break_off(list(self._measuring.values()))

    async def demand_room(self, limits: Sequence[StorageLimit]) -> None:
        """Raises StorageQuotaExceeded where a limit is reached."""
        for limit in limits:
            size = await self._size(limit.owner)
            if size is not None:
                limit.demand_room(size)

    async def _size(self, owner: str) -> int | None:
        """What an owner has stored; None if that was never measured."""
        asked_at = time.monotonic()
        until, size = self._known.get(owner, (0.0, None))
        if asked_at < until:
            return size
        async with self._database.autocommit() as tx:
            measured = await stored_bytes.read(tx, owner, age_s=self._age_s)
        self._known.pop(owner, None)
        while len(self._known) >= REMEMBERED_MAX:
            del self._known[next(iter(self._known))]
        self._known[owner] = (asked_at + self._cache_s, measured.bytes)
        if measured.is_due and owner not in self._measuring and len(self._measuring) < MEASURED_AT_ONCE_MAX:
            measuring = asyncio.create_task(self._measure(owner))
            self._measuring[owner] = measuring
            measuring.add_done_callback(lambda _: self._measuring.pop(owner, None))
        return measured.bytes

    async def _measure(self, owner: str) -> None:
        try:
            await stored_bytes.measure(self._database, owner, age_s=self._age_s, turns=self._turns)
        except DatabaseUnavailable:
            log.warning("What is stored can't be measured.", action="measuring_failed", **logged(owner))
        except Exception:
            log.exception("Measuring failed because of a bug.", action="measuring_failed", **logged(owner))
