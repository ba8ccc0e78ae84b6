"""Bearer JWT → rights. A token's issuer selects an entry of the catalog, and its header a key, before anything is verified."""

import binascii
import re
import time
from base64 import urlsafe_b64decode
from collections.abc import Mapping
from typing import Any

import jwt
import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from app.domain.issuers import LABEL, Issuer, rights_of
from app.domain.rights import Rights
from app.errors import AuthenticationFailed
from app.outbound.guard import Guard
from app.outbound.issuer_keys import IssuerKeys, Key
from app.settings import Settings
from app.storage import keys
from app.storage.database import Database

CACHED_TOKENS_MAX = 10_000
CACHED_OWNERS_MAX = 10_000

_SHAPE = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*")
"""Keys of this server have no dots."""

_REQUIRED = ["exp", "iat", "iss", "aud"]


class _Header(Struct):
    alg: str
    kid: str | None = None
    crit: Raw | UnsetType = UNSET


class _Unverified(Struct):
    iss: str


class _Times(Struct):
    exp: float
    iat: float


class _Verified(Struct, frozen=True):
    """A token that was found valid."""

    rights: Rights
    key: Key
    issuer: str
    until: float
    """By the monotonic clock."""


_HEADER = msgspec.json.Decoder(_Header)
_UNVERIFIED = msgspec.json.Decoder(_Unverified)


def is_token(text: str) -> bool:
    """Whether a text has the form of a JWT."""
    return _SHAPE.fullmatch(text) is not None


class BearerTokens:
    """Verifies tokens. A valid one is remembered until it expires, or its key is withdrawn."""

    def __init__(self, settings: Settings, database: Database, issuers: Mapping[str, Issuer], guard: Guard) -> None:
        self._database, self._bytes_max, self._issuers = database, settings.jwt_bytes_max, issuers
        self._keys = {name: IssuerKeys(name, issuer, settings, guard) for name, issuer in issuers.items()}
        self._names = {issuer.issuer: name for name, issuer in issuers.items()}
        self._known: dict[bytes, _Verified] = {}
        self._owners: dict[str, None] = {}
        """Owners that the database has."""

    @property
    def in_use(self) -> bool:
        """Whether the catalog has issuers."""
        return bool(self._issuers)

    async def rights(self, token: str) -> Rights:
        """What a token gives. Raises AuthenticationFailed, IssuerUnavailable, DatabaseUnavailable."""
        if len(token) > self._bytes_max:
            raise AuthenticationFailed("The token is longer than this server takes (REPRISE_JWT_BYTES_MAX).")
        digest = keys.digest(token)
        known = self._known.get(digest)
        if known and time.monotonic() < known.until and await self._keys[known.issuer].holds(known.key):
            return known.rights
        self._known.pop(digest, None)
        found = await self._verified(token)
        _remember(self._known, CACHED_TOKENS_MAX, digest, found)
        return found.rights

    async def close(self) -> None:
        """Break off fetches of keys."""
        for one in self._keys.values():
            await one.close()

    async def _verified(self, token: str) -> _Verified:
        try:
            header, claimed = (_HEADER.decode(_part(token, 0)), _UNVERIFIED.decode(_part(token, 1)))
        except (binascii.Error, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise AuthenticationFailed("The token is no JWT with an algorithm and an issuer.") from None
        name = self._names.get(claimed.iss)
        if name is None:
            raise AuthenticationFailed("The token is from an issuer that this server does not know.")
        issuer, asked_at, now = self._issuers[name], time.monotonic(), time.time()
        key = await self._key(name, issuer, header)
        claims = _claims(name, issuer, key, token)
        rights = rights_of(name, issuer, claims)
        await self._demand_owner(name, issuer, rights)
        return _Verified(rights, key, name, asked_at + claims["exp"] + issuer.leeway_s - now)

    async def _key(self, name: str, issuer: Issuer, header: _Header) -> Key:
        if header.alg not in issuer.algorithms or header.crit is not UNSET:
            raise _refused(name, "The token is signed in a way that this server does not take from its issuer.")
        key = await self._keys[name].find(header.kid, header.alg)
        if key is None:
            raise _refused(name, "The token's issuer has no such key.")
        return key

    async def _demand_owner(self, name: str, issuer: Issuer, rights: Rights) -> None:
        """See that the database has the tenant, and its user if there is one. Raises AuthenticationFailed."""
        if rights.owner in self._owners:
            return
        async with self._database.begin() as tx:
            is_there = await keys.have_owner(tx, rights, makes_tenant=issuer.makes_tenants)
        if not is_there:
            raise _refused(name, "The token's tenant does not exist.")
        _remember(self._owners, CACHED_OWNERS_MAX, rights.owner, None)


def _remember(known: dict[Any, Any], most: int, key: Any, value: Any) -> None:
    """Add an entry, and forget the oldest ones if there are too many."""
    known.pop(key, None)
    while len(known) >= most:
        del known[next(iter(known))]
    known[key] = value


def _part(token: str, number: int) -> bytes:
    part = token.split(".")[number]
    return urlsafe_b64decode(part + "=" * (-len(part) % 4))


def _claims(name: str, issuer: Issuer, key: Key, token: str) -> dict[str, Any]:
    """The claims of a token whose signature, issuer, audience and times are valid. Raises AuthenticationFailed."""
    try:
        claims = jwt.decode(
            token,
            key,
            algorithms=issuer.algorithms,
            issuer=issuer.issuer,
            audience=issuer.audiences,
            leeway=issuer.leeway_s,
            options={"require": _REQUIRED, "enforce_minimum_key_length": True},
        )
        times = msgspec.convert(claims, _Times)
    except jwt.ExpiredSignatureError:
        raise _refused(name, "The token is expired.", code="token_expired") from None
    except jwt.ImmatureSignatureError:
        raise _refused(name, "The token is not valid yet.") from None
    except jwt.MissingRequiredClaimError as error:
        raise _refused(name, f"The token has no claim '{error.claim}'.") from None
    except jwt.InvalidAudienceError:
        raise _refused(name, "The token is for another audience.") from None
    except jwt.InvalidSignatureError:
        raise _refused(name, "The token's signature is not valid.") from None
    except (jwt.PyJWTError, msgspec.ValidationError, ValueError):
        raise _refused(name, "The token is not valid.") from None
    if times.exp - times.iat > issuer.lifetime_max_s:
        raise _refused(name, "The token is valid for longer than this server takes.")
    return claims


def _refused(name: str, message: str, *, code: str | None = None) -> AuthenticationFailed:
    return AuthenticationFailed(message, code=code, key_id=f"{LABEL}{name}")
