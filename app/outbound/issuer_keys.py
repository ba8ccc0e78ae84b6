"""The keys with which an issuer signs its tokens.

They are fetched through the guard when the first token arrives, and again in the background before they get old, or when a token names
a key that is not among them: once at a time, and not again within a cooldown, so that tokens that clients make up cause no requests.
While the issuer can't be reached, the keys that it had stay in use for some time.
"""

import asyncio
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx2
import jwt
import msgspec
import structlog
from cryptography.exceptions import UnsupportedAlgorithm
from msgspec import Raw, Struct

from app.domain.issuers import Issuer
from app.errors import IssuerUnavailable
from app.outbound.downloads import Allowance, NotFetched, fetch
from app.outbound.guard import Guard
from app.settings import Settings, parse_allowed

log = structlog.get_logger()

Key = jwt.PyJWK | bytes
"""A public key, bound to one algorithm; or a secret."""

KEYS_MAX = 100
"""Of one issuer; more are left out."""

RSA_BITS_MIN, RSA_BITS_MAX = 2048, 8192

RETRY_S = 1.0
"""The first wait after a failed fetch; each further one doubles it, up to the cooldown."""

DISCOVERY = "/.well-known/openid-configuration"

_TYPES = {"RS": "RSA", "PS": "RSA", "ES": "EC", "Ed": "OKP"}
"""The type of the keys of an algorithm, by how its name begins."""


class _KeySet(Struct):
    keys: list[Raw]


class _Described(Struct):
    """What a key states of itself; `d` is of private keys."""

    kty: str
    kid: str | None = None
    use: str | None = None
    alg: str | None = None
    key_ops: list[str] | None = None
    d: Any = None

    def serves(self, algorithm: str) -> bool:
        """Whether it is a public key that verifies with this algorithm."""
        return (
            self.kty == _TYPES[algorithm[:2]]
            and self.d is None
            and self.use in {None, "sig"}
            and self.alg in {None, algorithm}
            and (self.key_ops is None or "verify" in self.key_ops)
        )


class _Discovered(Struct):
    issuer: str
    jwks_uri: str


_DISCOVERED = msgspec.json.Decoder(_Discovered)
_KEY_SET = msgspec.json.Decoder(_KeySet)
_DESCRIBED = msgspec.json.Decoder(_Described)

_Named = tuple[str | None, str]
"""A key's id and the algorithm."""

_Keys = Mapping[_Named, tuple[bytes, jwt.PyJWK]]
"""Each with its JSON."""


class IssuerKeys:
    """The keys of one issuer."""

    def __init__(
        self,
        name: str,
        issuer: Issuer,
        settings: Settings,
        guard: Guard,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name, self._issuer, self._settings, self._guard, self._clock = name, issuer, settings, guard, clock
        self._secret = issuer.secret.encode()
        self._keys: _Keys = {}
        self._held: frozenset[Key] = frozenset({self._secret} if self._secret else ())
        self._fetched_at = -math.inf
        self._not_before = -math.inf
        self._failures = 0
        self._fetching: asyncio.Task[None] | None = None

    async def find(self, kid: str | None, algorithm: str) -> Key | None:
        """The key that a token names; without a name the only one of the algorithm. None if the issuer has no such key. Raises
        IssuerUnavailable."""
        if self._secret:
            return self._secret
        await self._renew()
        key = self._find(kid, algorithm)
        if key is None:
            await self._refresh()
            key = self._find(kid, algorithm)
            if key is None and self._failures:
                raise self._unavailable()
        return key

    async def holds(self, key: Key) -> bool:
        """Whether a key that was found earlier is still one of the issuer's. Raises IssuerUnavailable."""
        if not self._secret:
            await self._renew()
        return key in self._held

    async def check(self) -> int:
        """Fetch the keys, and count them. Raises NotFetched."""
        return 1 if self._secret else len({kid for kid, _ in await self._fetch()})

    async def close(self) -> None:
        """Break off what is being fetched."""
        if self._fetching is not None:
            self._fetching.cancel()
            await asyncio.wait([self._fetching])

    # -- When ---------------------------------------------------------------------------------------------------------------

    async def _renew(self) -> None:
        """Have keys that are not too old. Raises IssuerUnavailable."""
        age_s, cache_s = self._clock() - self._fetched_at, self._settings.jwks_cache_s
        if age_s < cache_s / 2:
            return
        if age_s < cache_s or (self._failures and age_s < cache_s + self._settings.jwks_stale_s):
            self._begin()
            return
        await self._refresh()
        if self._clock() - self._fetched_at >= cache_s + self._settings.jwks_stale_s:
            raise self._unavailable()

    async def _refresh(self) -> None:
        """Fetch the keys, unless that was tried a short time ago."""
        if task := self._begin():
            await asyncio.wait([task])  # a client that disconnects cancels its own wait only

    def _begin(self) -> asyncio.Task[None] | None:
        if self._fetching is None and self._clock() >= self._not_before:
            self._fetching = asyncio.create_task(self._try(), name="issuer-keys")
            self._fetching.add_done_callback(self._end)
        return self._fetching

    def _end(self, _: asyncio.Task[None]) -> None:
        self._fetching = None

    def _unavailable(self) -> IssuerUnavailable:
        return IssuerUnavailable(max(1, math.ceil(self._not_before - self._clock())))

    async def _try(self) -> None:
        cooldown_s = self._settings.jwks_cooldown_s
        try:
            self._keys = await self._fetch()
        except NotFetched as error:
            wait_s = min(cooldown_s, RETRY_S * 2**self._failures)
            self._failures = min(self._failures + 1, 32)
            log.warning(
                "The keys of an issuer were not fetched.",
                action="issuer_keys_not_fetched",
                issuer=self._name,
                error=str(error),
            )
        else:
            wait_s, self._failures = cooldown_s, 0
            self._fetched_at = self._clock()
            self._held = frozenset(key for _, key in self._keys.values())
        self._not_before = self._clock() + wait_s

    # -- What ---------------------------------------------------------------------------------------------------------------

    def _find(self, kid: str | None, algorithm: str) -> jwt.PyJWK | None:
        if kid is not None:
            found = self._keys.get((kid, algorithm))
            return found[1] if found else None
        usable = [key for (_, of), (_, key) in self._keys.items() if of == algorithm]
        return usable[0] if len(usable) == 1 else None

    async def _fetch(self) -> _Keys:
        """Raises NotFetched."""
        body = await self._read_file() if self._issuer.jwks_file else await self._download()
        try:
            listed = _KEY_SET.decode(body).keys
        except (msgspec.MsgspecError, RecursionError):
            raise NotFetched("The answer is no set of keys.") from None
        # Keys that have not changed stay the same objects, by which `holds` knows them.
        before = self._keys
        keys = {
            named: before[named] if before.get(named, (b"",))[0] == raw else (raw, key)
            for named, raw, key in self._usable(listed[:KEYS_MAX])
        }
        if not keys:
            raise NotFetched("None of the issuer's keys can be used with the algorithms of the catalog.")
        return keys

    def _usable(self, listed: list[Raw]) -> Iterator[tuple[_Named, bytes, jwt.PyJWK]]:
        for one in listed:
            raw = bytes(one)
            try:
                described, whole = _DESCRIBED.decode(raw), msgspec.json.decode(raw)
            except (msgspec.MsgspecError, RecursionError):
                continue
            for algorithm in self._issuer.algorithms:
                if described.serves(algorithm) and (key := _made(whole, algorithm)):
                    yield (described.kid, algorithm), raw, key

    async def _download(self) -> bytes:
        settings = self._settings
        allowance = Allowance(settings.jwks_bytes_max, settings.jwks_timeout_s, TOO_LARGE, redirects=0)
        url = self._issuer.jwks_url
        if not url:
            found = await fetch(self._guard, "", self._issuer.issuer.rstrip("/") + DISCOVERY, allowance)
            url = self._discovered(found.content)
        return (await fetch(self._guard, "", url, allowance)).content

    def _discovered(self, configuration: bytes) -> str:
        """The address of the keys, by the issuer's OpenID configuration. Raises NotFetched."""
        try:
            found = _DISCOVERED.decode(configuration)
        except (msgspec.MsgspecError, RecursionError):
            raise NotFetched("The issuer's OpenID configuration names no 'jwks_uri'.") from None
        if found.issuer != self._issuer.issuer:
            raise NotFetched("The OpenID configuration is that of another issuer.")
        if not is_safe(found.jwks_uri, self._settings):
            raise NotFetched(UNSAFE)
        return found.jwks_uri

    async def _read_file(self) -> bytes:
        bytes_max = self._settings.jwks_bytes_max

        def read() -> bytes:
            with Path(self._issuer.jwks_file).open("rb") as file:
                return file.read(bytes_max + 1)

        try:
            content = await asyncio.to_thread(read)
        except OSError as error:
            raise NotFetched(f"{self._issuer.jwks_file} can't be read: {error.strerror}.") from None
        if len(content) > bytes_max:
            raise NotFetched(TOO_LARGE)
        return content


TOO_LARGE = "The keys are larger than REPRISE_JWKS_BYTES_MAX."
UNSAFE = "Keys are fetched by https, or by http from a host that REPRISE_OUTBOUND_ALLOW names."


def is_safe(url: str, settings: Settings) -> bool:
    """Whether keys that are fetched from this address are those of its host: by https, or in the operator's own network."""
    try:
        parsed = httpx2.URL(url)
    except (httpx2.InvalidURL, ValueError):
        return False
    if parsed.scheme == "https":
        return bool(parsed.host)
    allowed = parse_allowed(settings.outbound_allow)
    return parsed.scheme == "http" and allowed.names(parsed.host)


def _made(data: Any, algorithm: str) -> jwt.PyJWK | None:
    """The key for an algorithm; None if it is none that is safe."""
    try:
        key = jwt.PyJWK(data, algorithm)
    except (jwt.PyJWTError, UnsupportedAlgorithm, ValueError, TypeError, KeyError):
        return None
    bits = getattr(key.key, "key_size", RSA_BITS_MIN) if algorithm[:2] in {"RS", "PS"} else RSA_BITS_MIN
    return key if RSA_BITS_MIN <= bits <= RSA_BITS_MAX else None
