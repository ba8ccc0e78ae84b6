"""Bearer key or token → caller. Without any key or issuer every caller is the default tenant, and the server listens on loopback only."""

import hashlib
import time
from typing import TypeVar

from msgspec.structs import replace

from app.api.bearer import BearerTokens, is_token
from app.api.sites import Headers, refuse_foreign
from app.domain.quotas import Limits, limits_of, storage_limits
from app.domain.rights import Rights
from app.errors import AuthenticationFailed
from app.outbound.catalog import KEY
from app.runs.admission import Caller
from app.settings import DEFAULT_TENANT, Settings
from app.storage import keys, tenants
from app.storage.database import Database
from app.storage.keys import Proof

CACHED_MAX = 10_000
"""Secrets, and tenants, that are remembered."""

K = TypeVar("K")
V = TypeVar("V")


class Auth:
    """Caches what secrets prove for REPRISE_KEY_CACHE_S, so that a request costs no query."""

    def __init__(self, settings: Settings, database: Database, tokens: BearerTokens) -> None:
        self._database, self._tokens = database, tokens
        self._cache_s = settings.key_cache_s
        self._per_caller = settings.upstream_auth == "caller"
        self._tenant_default = Limits(
            settings.tenant_requests_per_minute,
            settings.tenant_tokens_per_minute,
            settings.tenant_concurrent_runs,
            settings.tenant_stored_bytes,
        )
        self._key_default = Limits(
            settings.key_requests_per_minute,
            settings.key_tokens_per_minute,
            settings.key_concurrent_runs,
            settings.key_stored_bytes,
        )
        self._tenants: dict[str, tuple[float, Limits]] = {}
        self._known: dict[bytes, tuple[float, Proof | None]] = {}
        self._in_use: tuple[float, bool] = (0.0, False)

    async def caller(self, headers: Headers, *, http_version: str) -> Caller:
        """The caller of a request, with its quotas. Raises AuthenticationFailed, IssuerUnavailable, and ForeignSite where there are no
        keys."""
        caller = await self._authenticated(headers, http_version=http_version)
        rights = caller.rights
        limits = [await self._limits_of_tenant(rights.tenant)]
        if rights.key_id:
            limits.append(limits_of(rights.limits, self._key_default))
        counted = tuple(limits) if any(one.are_counted for one in limits) else ()
        return replace(caller, limits=counted, storage_limits=storage_limits(rights, limits))

    async def _authenticated(self, headers: Headers, *, http_version: str) -> Caller:
        sent = next((value for name, value in headers if name == b"authorization"), b"")
        scheme, _, key = sent.decode("latin-1").partition(" ")
        key = key.strip() if scheme.lower() == "bearer" else ""
        if not await self._keys_in_use():
            refuse_foreign(headers, http_version=http_version)
            return await self._open_caller(key or None)
        if not key:
            raise _missing()
        is_of_issuer = self._tokens.in_use and is_token(key)
        rights = await (self._tokens.rights(key) if is_of_issuer else self._rights(key))
        return Caller(None, rights)  # a key of this server goes to no upstream

    async def close(self) -> None:
        """Break off what is asked of issuers."""
        await self._tokens.close()

    async def _limits_of_tenant(self, tenant: str) -> Limits:
        """The quotas of a tenant."""
        until, limits = self._tenants.get(tenant, (0.0, self._tenant_default))
        asked_at = time.monotonic()
        if asked_at < until:
            return limits
        async with self._database.autocommit() as tx:
            limits = limits_of(await tenants.find_limits(tx, tenant), self._tenant_default)
        _remember(self._tenants, tenant, asked_at + self._cache_s, limits)
        return limits

    async def _keys_in_use(self) -> bool:
        until, in_use = self._in_use
        if self._tokens.in_use:
            return True
        if in_use or time.monotonic() < until:
            return in_use
        async with self._database.autocommit() as tx:
            in_use = await keys.keys_in_use(tx)
        self._in_use = (time.monotonic() + self._cache_s, in_use)
        return in_use

    async def _open_caller(self, key: str | None) -> Caller:
        """With REPRISE_UPSTREAM_AUTH=caller each key is a tenant. Raises AuthenticationFailed."""
        tenant = DEFAULT_TENANT
        if self._per_caller:
            if not key:
                raise _missing()
            if not KEY.fullmatch(key):  # it can't be sent in a header
                raise _incorrect(key)
            tenant = f"caller_{hashlib.sha256(key.encode()).hexdigest()[:32]}"
        return Caller(key, Rights(tenant, keyless=True))

    async def _rights(self, key: str) -> Rights:
        """Raises AuthenticationFailed."""
        proof = await self._proof(keys.digest(key))
        if proof is None:
            raise _incorrect(key)
        if proof.is_revoked:
            raise AuthenticationFailed("The API key is revoked.", key_id=proof.rights.key_id)
        if proof.left_s is not None and proof.left_s <= 0:
            raise AuthenticationFailed("The API key is expired.", key_id=proof.rights.key_id)
        return proof.rights

    async def _proof(self, digest: bytes) -> Proof | None:
        until, proof = self._known.get(digest, (0.0, None))
        asked_at = time.monotonic()  # a key that is revoked while the answer arrives is accepted no longer than others
        if asked_at < until:
            return proof
        async with self._database.autocommit() as tx:
            proof = await keys.find_proof(tx, digest)
        cache_s = self._cache_s
        if proof and proof.left_s is not None and proof.left_s > 0:
            cache_s = min(cache_s, proof.left_s)
        _remember(self._known, digest, asked_at + cache_s, proof)
        return proof


def _remember(cache: dict[K, tuple[float, V]], key: K, until: float, value: V) -> None:
    """What was remembered first is forgotten first: what is out of date, as a key may have long lists of models, and what is too much."""
    cache.pop(key, None)
    now = time.monotonic()
    while cache and (len(cache) >= CACHED_MAX or next(iter(cache.values()))[0] <= now):
        del cache[next(iter(cache))]
    cache[key] = until, value


def _missing() -> AuthenticationFailed:
    return AuthenticationFailed(
        "You didn't provide an API key. Send it as 'Authorization: Bearer KEY'.", code="missing_api_key"
    )


def _incorrect(key: str) -> AuthenticationFailed:
    return AuthenticationFailed(f"Incorrect API key provided: {_masked(key)}.")


def _masked(key: str) -> str:
    return f"{key[:7]}***{key[-4:]}" if len(key) > 20 and not is_token(key) else "***"
