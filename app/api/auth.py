"""Bearer key → caller. Without any key every caller is the default tenant, and the server listens on loopback only."""

import hashlib
import time

from app.api.sites import Headers, refuse_foreign
from app.errors import AuthenticationFailed
from app.outbound.catalog import KEY
from app.runs.admission import Caller
from app.settings import DEFAULT_TENANT, Settings
from app.storage import tenants
from app.storage.database import Database

CACHED_KEYS_MAX = 10_000


class Auth:
    """Caches keys for REPRISE_KEY_CACHE_S, so that a request costs no query."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._database = database
        self._cache_s = settings.key_cache_s
        self._per_caller = settings.upstream_auth == "caller"
        self._known: dict[bytes, tuple[float, str | None]] = {}
        self._in_use: tuple[float, bool] = (0.0, False)

    async def caller(self, headers: Headers, *, http_version: str) -> Caller:
        """The caller of a request. Raises AuthenticationFailed, and ForeignSite where there are no keys."""
        sent = next((value for name, value in headers if name == b"authorization"), b"")
        scheme, _, key = sent.decode("latin-1").partition(" ")
        key = key.strip() if scheme.lower() == "bearer" else ""
        if not await self._keys_in_use():
            refuse_foreign(headers, http_version=http_version)
            return await self._open_caller(key or None)
        if not key:
            raise _missing()
        tenant_id = await self._tenant(key)
        if tenant_id is None:
            raise _incorrect(key)
        return Caller(tenant_id, None)  # a key of this server goes to no upstream

    async def _keys_in_use(self) -> bool:
        until, in_use = self._in_use
        if in_use or time.monotonic() < until:
            return in_use
        async with self._database.autocommit() as tx:
            in_use = await tenants.keys_in_use(tx)
        self._in_use = (time.monotonic() + self._cache_s, in_use)
        return in_use

    async def _open_caller(self, key: str | None) -> Caller:
        """With REPRISE_UPSTREAM_AUTH=caller each key is a tenant. Raises AuthenticationFailed."""
        if self._per_caller:
            if not key:
                raise _missing()
            if not KEY.fullmatch(key):  # it can't be sent in a header
                raise _incorrect(key)
            return Caller(f"caller_{hashlib.sha256(key.encode()).hexdigest()[:32]}", key)
        return Caller(DEFAULT_TENANT, key)

    async def _tenant(self, key: str) -> str | None:
        digest = tenants.digest(key)
        until, tenant_id = self._known.get(digest, (0.0, None))
        if time.monotonic() < until:
            return tenant_id
        async with self._database.autocommit() as tx:
            tenant_id = await tenants.find_tenant(tx, key)
        if len(self._known) >= CACHED_KEYS_MAX:
            self._known.clear()
        self._known[digest] = (time.monotonic() + self._cache_s, tenant_id)
        return tenant_id


def _missing() -> AuthenticationFailed:
    return AuthenticationFailed(
        "You didn't provide an API key. Send it as 'Authorization: Bearer KEY'.", code="missing_api_key"
    )


def _incorrect(key: str) -> AuthenticationFailed:
    return AuthenticationFailed(f"Incorrect API key provided: {_masked(key)}.")


def _masked(key: str) -> str:
    return f"{key[:7]}***{key[-4:]}" if len(key) > 20 else "***"
