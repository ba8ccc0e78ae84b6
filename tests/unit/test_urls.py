"""Addresses of Postgres and Redis: every usual form is taken, and any other is refused in one line."""

import asyncpg
import pytest

from app.settings import SettingsError
from app.storage.urls import connector, redis_address


@pytest.fixture
def connected(monkeypatch):
    """What asyncpg is asked for; no server is needed to know that."""
    asked = {}

    async def connect(dsn, **options):
        asked.update(options, dsn=dsn)

    monkeypatch.setattr(asyncpg, "connect", connect)
    return asked


@pytest.mark.parametrize(
    ("url", "dsn"),
    [
        ("postgres://u:p@h/d", "postgresql://u:p@h/d"),
        ("postgresql+psycopg://u:p%40@h:5433/d", "postgresql://u:p%40@h:5433/d"),
        ("postgresql://u@h1:5432,h2:5433/d", "postgresql://u@h1:5432,h2:5433/d"),
        ("postgresql://u@/d?host=%2Frun&port=5432", "postgresql://u@/d?host=%2Frun&port=5432"),
        ("postgresql://h/d?sslmode=require&channel_binding=prefer", "postgresql://h/d?sslmode=require"),
        ("postgresql+asyncpg://h/d?ssl=verify-full", "postgresql://h/d?sslmode=verify-full"),
        ("postgresql+asyncpg://h/d?ssl=true", "postgresql://h/d?sslmode=require"),
        ("postgresql://h/d?target_session_attrs=read-write", "postgresql://h/d?target_session_attrs=read-write"),
        ("postgresql://h/d?options=-c%20lock_timeout%3D5s", "postgresql://h/d?options=-c+lock_timeout%3D5s"),
        ("postgresql://h/d?keepalives=1&keepalives_idle=30&gssencmode=disable", "postgresql://h/d"),
    ],
)
async def test_a_usual_database_url_is_taken(connected, url, dsn):
    await connector(url)()
    assert connected["dsn"] == dsn


async def test_what_a_url_says_counts_before_our_own(connected):
    await connector("postgresql://h/d", timeout_s=10, application_name="reprise", jit="off")()
    assert connected["server_settings"] == {"application_name": "reprise", "jit": "off"}
    assert (connected["timeout"], connected["command_timeout"]) == (10, 10)
    await connector(
        "postgresql://h/d?application_name=mine&connect_timeout=3", timeout_s=10, application_name="reprise"
    )()
    assert connected["server_settings"] == {}
    assert (connected["dsn"], connected["timeout"]) == ("postgresql://h/d?application_name=mine", 3)


@pytest.mark.parametrize(
    "url",
    [
        "nonsense",
        "mysql://h/d",
        "postgresql://",
        "postgresql://[::1/d",
        "postgresql://h/d?sslmode",
        "postgresql://h/d?connect_timeout=soon",
        "postgresql://h/d?connect_timeout=nan",
        "postgresql://h/d?connect_timeout=-1",
        "postgresql://h/d?channel_binding=require",
    ],
)
def test_any_other_database_url_is_refused_in_one_line(url):
    with pytest.raises(SettingsError, match=r"^DATABASE_URL [^\n]+\.$"):
        connector(url)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://h:6379/0", "redis://h:6379/0"),
        ("rediss://:p@h/1?ssl_cert_reqs=none", "rediss://:p@h/1?ssl_cert_reqs=none"),
        ("valkey://h/0", "redis://h/0"),
        ("valkeys://h", "rediss://h"),
        ("unix:///run/valkey.sock?db=1", "unix:///run/valkey.sock?db=1"),
    ],
)
def test_a_usual_redis_url_is_taken(url, address):
    assert redis_address(url) == address


@pytest.mark.parametrize(
    "url", ["nonsense", "http://h", "redis://h:port", "redis://h?db=x", "redis://h?foo=1", "unix:///s?foo=1"]
)
def test_any_other_redis_url_is_refused_in_one_line(url):
    with pytest.raises(SettingsError, match=r"^REDIS_URL [^\n]+\.$"):
        redis_address(url)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:p#ss@127.0.0.1:1/d",
        "postgresql://u:p@ss:w/rd@h",
        "postgresql://h:abc/d",
        "postgresql://u:abc?w/rd@h/d",
        "postgresql://u:abc\u2100w/rd@h/d",
        "postgresql://u:abc@[w/rd]@h/d",
        "postgresql://u:abc@[::1]ss@h/d",
        "postgresql://u@h/d?connect_timeout=abc",
    ],
)
async def test_a_database_url_is_refused_without_a_quotation(url):
    with pytest.raises(SettingsError, match=r"^DATABASE_URL [^\n]+\.$") as caught:
        await connector(url)()
    assert not any(piece in str(caught.value) for piece in ("ss@", "w/rd", "abc", "'p'"))


@pytest.mark.parametrize(
    "url",
    ["redis://:secret/x@h", "redis://:secret\u2100x@h", "redis://:[secret@h", "redis://u:secret?x@h", "secret://h"],
)
def test_a_redis_url_is_refused_without_a_quotation(url):
    with pytest.raises(SettingsError, match=r"^REDIS_URL [^\n]+\.$") as caught:
        redis_address(url)
    assert "secret" not in str(caught.value)
