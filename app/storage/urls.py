"""DATABASE_URL and REDIS_URL, as libpq, SQLAlchemy and Valkey's own tools write them."""

import math
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit

import asyncpg
from redis.asyncio.connection import Connection, parse_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from app.settings import SettingsError

CONNECT_TIMEOUT_S = 10.0
"""Unless something else is given."""

Connector = Callable[[], Awaitable[asyncpg.Connection]]

_ESCAPED = "with % and two digits for characters such as / # ? @"
_EXPECTED = f"expected postgresql://USER:PASSWORD@HOST/NAME, {_ESCAPED}"
_DRIVER_DECIDES = frozenset(
    "channel_binding client_encoding connect_timeout fallback_application_name gssencmode keepalives keepalives_count "
    "keepalives_idle keepalives_interval load_balance_hosts requirepeer sslcompression sslsni tcp_user_timeout".split()
)
"""Parameters of libpq that are no settings of the server, and that asyncpg does not know."""

_REDIS_SCHEMES = {"valkey": "redis", "valkeys": "rediss"}


def connector(database_url: str, *, timeout_s: float | None = None, **settings: str) -> Connector:
    """Opens connections to the database of a URL.

    `timeout_s` bounds connecting, and each statement; without it CONNECT_TIMEOUT_S bounds connecting. The URL's `connect_timeout`
    counts before both. `settings` are the server's; those of the URL count before them. Raises SettingsError.
    """
    parts, query = _parse(database_url)
    connect_timeout_s = float(query.get("connect_timeout") or 0) or timeout_s or CONNECT_TIMEOUT_S
    kept = {name: value for name, value in query.items() if name not in _DRIVER_DECIDES}
    if "ssl" in kept:  # SQLAlchemy's name for it
        ssl = kept.pop("ssl")
        kept["sslmode"] = {"true": "require", "false": "disable"}.get(ssl, ssl)
    dsn = parts._replace(scheme="postgresql", query=urlencode(kept)).geturl()
    options: dict[str, Any] = {
        "timeout": connect_timeout_s,
        "command_timeout": timeout_s,
        "server_settings": {name: value for name, value in settings.items() if name not in kept},
    }

    async def connect() -> asyncpg.Connection:
        try:
            return await asyncpg.connect(dsn, **options)
        except asyncpg.InterfaceError:
            raise
        except ValueError:  # it quotes what it can't read, which may be a piece of a password
            raise SettingsError(f"DATABASE_URL is not valid: {_EXPECTED}.") from None

    return connect


def unpooled_engine(database_url: str) -> AsyncEngine:
    """An engine for a few statements of a command. Raises SettingsError."""
    return create_async_engine("postgresql+asyncpg://", async_creator=connector(database_url), poolclass=NullPool)


def _parse(database_url: str) -> tuple[SplitResult, dict[str, str]]:
    try:
        parts = urlsplit(database_url)
        query = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
    except ValueError:  # it quotes what it can't read, as the driver does
        raise SettingsError(f"DATABASE_URL is not valid: {_EXPECTED}.") from None
    if parts.scheme.partition("+")[0] not in {"postgres", "postgresql"} or not (
        parts.netloc or parts.path.strip("/") or "host" in query
    ):
        raise SettingsError(f"DATABASE_URL is not valid: {_EXPECTED}.")
    if "@" in parts.netloc.rpartition("@")[0]:  # the driver takes the first one for the end of the password
        raise SettingsError(f"DATABASE_URL is not valid: {_EXPECTED}.")
    if not _is_duration(query.get("connect_timeout") or "0"):
        raise SettingsError("DATABASE_URL is not valid: connect_timeout is a number of seconds.")
    if query.get("channel_binding") == "require":
        raise SettingsError("DATABASE_URL asks for channel_binding=require, which the driver can't do; leave it out.")
    return parts, query


def _is_duration(text: str) -> bool:
    try:
        return 0 <= float(text) < math.inf
    except ValueError:
        return False


def redis_address(redis_url: str) -> str:
    """REDIS_URL as redis-py takes it. Raises SettingsError."""
    scheme, colon, rest = redis_url.partition("://")
    address = f"{_REDIS_SCHEMES.get(scheme.lower(), scheme.lower())}{colon}{rest}"
    try:
        options: dict[str, Any] = {**parse_url(address)}
    except ValueError:  # it quotes what it can't read
        raise SettingsError(
            f"REDIS_URL is not valid: expected redis://:PASSWORD@HOST:PORT/NUMBER, {_ESCAPED}."
        ) from None
    try:
        connection_class: Any = options.pop("connection_class", Connection)
        connection_class(**options)
    except TypeError:
        raise SettingsError("REDIS_URL is not valid: it has a parameter that is not known.") from None
    return address
