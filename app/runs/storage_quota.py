"""The quota of what a tenant stores: known as it was measured last, and enforced before anything more is stored."""

import asyncio
import time

import structlog

from app.domain.rights import Rights
from app.errors import DatabaseUnavailable, StorageQuotaExceeded
from app.settings import Settings
from app.storage import stored_bytes
from app.storage.database import Database
from app.storage.redisclient import break_off

log = structlog.get_logger()

REMEMBERED_MAX = 10_000


class StorageQuota:
    """What this process knows of tenants that have a limit."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._database, self._age_s, self._cache_s = database, settings.stored_bytes_age_s, settings.key_cache_s
        self._known: dict[str, tuple[float, int | None]] = {}
        self._measuring: dict[str, asyncio.Task[None]] = {}

    async def close(self) -> None:
        """Measure no more."""
        await break_off(list(self._measuring.values()))

    async def demand_room(self, rights: Rights, stored_max: int) -> None:
        """Raises StorageQuotaExceeded for a tenant that has stored so much; 0 is no limit."""
        if not stored_max:
            return
        tenant, asked_at = rights.tenant, time.monotonic()
        until, size = self._known.get(tenant, (0.0, None))
        if asked_at >= until:
            async with self._database.autocommit() as tx:
                measured = await stored_bytes.read(tx, tenant, age_s=self._age_s)
            size = measured.bytes
            self._known.pop(tenant, None)
            while len(self._known) >= REMEMBERED_MAX:
                del self._known[next(iter(self._known))]
            self._known[tenant] = (asked_at + self._cache_s, size)
            if measured.is_due and tenant not in self._measuring:
                measuring = asyncio.create_task(self._measure(tenant))
                self._measuring[tenant] = measuring
                measuring.add_done_callback(lambda _: self._measuring.pop(tenant, None))
        if size is not None and size >= stored_max:
            raise StorageQuotaExceeded(size, stored_max)

    async def _measure(self, tenant: str) -> None:
        try:
            await stored_bytes.measure(self._database, tenant, age_s=self._age_s)
        except DatabaseUnavailable:
            log.warning("What a tenant has stored can't be measured.", action="measuring_failed", tenant_id=tenant)
        except Exception:
            log.exception("Measuring failed because of a bug.", action="measuring_failed", tenant_id=tenant)
