"""What is wrong with a set-up: each part is tried, and says one line."""

import asyncio
import os
from collections.abc import Mapping

import redis.asyncio
from msgspec import Struct
from redis.exceptions import RedisError

from app import assembly, echo, migrate
from app.embedded import EmbeddedError
from app.errors import ApiError
from app.outbound.catalog import Catalog
from app.outbound.catalog_file import load_catalog
from app.outbound.guard import Guard
from app.outbound.masking import Mask
from app.outbound.mcp import ToolSessions
from app.outbound.toolserver import ToolFailure
from app.outbound.upstream import Upstream
from app.settings import Settings, SettingsError, load
from app.storage import tenants
from app.storage.addresses import redis_address
from app.storage.database import Database


class Finding(Struct, frozen=True):
    """One part of the set-up, and how it is."""

    what: str
    ok: bool
    said: str


async def examine(environ: Mapping[str, str]) -> list[Finding]:
    """Try every part; later parts are left out when an earlier one that they need is bad."""
    try:
        settings = load(environ)
    except SettingsError as error:
        return [Finding("settings", False, str(error))]
    findings = [Finding("settings", True, "every name and value is valid")]
    try:
        settings = await asyncio.to_thread(assembly.with_servers, settings)
    except EmbeddedError as error:
        return [*findings, Finding("embedded servers", False, str(error))]
    return [*findings, *await _postgres(settings), await _redis(settings), *await _upstreams(settings), _seal(settings)]


async def _postgres(settings: Settings) -> list[Finding]:
    database = Database(settings)
    try:
        async with database.autocommit():
            findings = [Finding("Postgres", True, "answers")]
        if not await migrate.is_current(settings.database_url):
            return [*findings, Finding("schema", False, "not that of this version: run `reprise migrate`")]
        async with database.autocommit() as tx:
            in_use = await tenants.keys_in_use(tx)
    except ApiError as error:
        return [Finding("Postgres", False, f"{error.message} {error.__cause__}")]
    finally:
        await database.close()
    open_to_all = not in_use and settings.host not in assembly.LOOPBACK
    said = "every request needs one" if in_use else f"there are none: anybody who reaches {settings.host} may call"
    return [*findings, Finding("schema", True, "is that of this version"), Finding("keys", not open_to_all, said)]


async def _redis(settings: Settings) -> Finding:
    try:
        client = redis.asyncio.from_url(redis_address(settings.redis_url))
    except SettingsError as error:
        return Finding("Redis", False, str(error))
    try:
        await client.ping()
        return Finding("Redis", True, "answers")
    except (RedisError, OSError) as error:
        return Finding("Redis", False, f"does not answer: {error}")
    finally:
        await client.aclose()


async def _upstreams(settings: Settings) -> list[Finding]:
    demo = None if settings.catalog or settings.openai_base_url else await echo.serve()
    findings = []
    try:
        catalog = load_catalog(settings, os.environ, demo_url=demo.base_url if demo else "")
        for name, entry in catalog.upstreams.items():
            upstream = Upstream(name, entry, settings)
            try:
                models = await upstream.list_models(None)
                findings.append(Finding(f"upstream {name}", True, f"{entry.base_url} lists {len(models)} models"))
            except ApiError as error:
                findings.append(Finding(f"upstream {name}", False, f"{entry.base_url}: {error.message}"))
            finally:
                await upstream.close()
        findings += await _tool_servers(settings, catalog)
    except SettingsError as error:
        findings.append(Finding("catalog", False, str(error)))
    finally:
        if demo:
            await demo.close()
    return findings


async def _tool_servers(settings: Settings, catalog: Catalog) -> list[Finding]:
    """Each of the operator's tool servers, and whether it has the tools that hosted types need."""
    findings = []
    servers = {name: server for name in catalog.tool_servers if (server := catalog.tool_server(name))}
    mask = Mask(secret for server in servers.values() for secret in server.secrets)
    async with ToolSessions(Guard.from_settings(settings), settings, mask) as sessions:
        for name, server in servers.items():
            try:
                listed = {tool.name for tool in await sessions.list_tools(server)}
            except ToolFailure as error:
                findings.append(Finding(f"tool server {name}", False, error.message))
                continue
            findings.append(Finding(f"tool server {name}", True, f"lists {len(listed)} tools"))
            for kind, route in catalog.hosted.items():
                if route.server == name and route.tool not in listed:
                    findings.append(Finding(f"hosted {kind}", False, f"{name} has no tool '{route.tool}'"))
    return findings


def _seal(settings: Settings) -> Finding:
    try:
        assembly.open_seal(settings)
    except SettingsError as error:
        return Finding("secret key", False, str(error))
    where = "REPRISE_SECRET_KEY" if settings.secret_key else f"{settings.data_path}/secret.key; replicas must share it"
    return Finding("secret key", True, where)
