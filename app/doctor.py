"""`reprise doctor`: tries each part of a configuration, one line for each. Creates, migrates and changes nothing."""

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from typing import Any

import redis.asyncio
from msgspec import Struct
from msgspec.structs import replace
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from app import assembly, echo, migrate, setup
from app.embedded import POSTGRES, VALKEY, EmbeddedError
from app.errors import ApiError
from app.outbound.catalog import Catalog
from app.outbound.catalog_file import load_catalog
from app.outbound.downloads import NotFetched
from app.outbound.guard import Guard
from app.outbound.issuer_keys import IssuerKeys
from app.outbound.masking import Mask
from app.outbound.mcp import ToolSessions
from app.outbound.toolserver import ToolFailure
from app.outbound.upstream import Upstream
from app.runs.agents import Agents
from app.settings import Settings, SettingsError, load
from app.storage import key_fingerprint, keys, readiness, sealed_rows, tool_credentials
from app.storage.database import Database, opened
from app.storage.urls import redis_address

NAMES = {POSTGRES: "Postgres", VALKEY: "Redis"}

WAIT_MAX_S = 5.0
"""The longest wait for one answer."""

POSTGRES_MIN = 14
REDIS_MIN = (6, 2)
"""The oldest versions with the features in use; every Valkey has them."""

MODELS_NAMED_MAX = 5
FAULTS_NAMED_MAX = 20

ROWS_MAX = 10_000
"""How many rows of a kind are looked at."""

READ_WITH = ("Postgres", "schema", "secret key")
"""Without these parts nothing is known of what is stored."""

FORMER_KEY = "add the one that sealed them to REPRISE_OLD_SECRET_KEYS"


class Finding(Struct, frozen=True):
    """One part of the configuration, and its state."""

    part: str
    ok: bool
    text: str


async def examine(environ: Mapping[str, str]) -> AsyncIterator[Finding]:
    """Try the parts one after the other; a part that depends on a bad one is skipped."""
    try:
        settings = _with_short_waits(load(environ))
        setup.compaction_prompt(settings)
        setup.reasoning_summary_prompt(settings)
    except SettingsError as error:
        yield Finding("settings", False, str(error))
        return
    yield Finding("settings", True, "every name and value is valid")
    missing = setup.missing_servers(settings)
    try:
        made = frozenset(server for server in missing if setup.has_embedded(settings, server))
        settings = await asyncio.to_thread(setup.with_servers, settings, made)
    except EmbeddedError as error:
        yield Finding("embedded servers", False, str(error))
        return
    for server in sorted(missing - made):
        yield Finding(NAMES[server], True, f"none yet; `reprise serve` embeds one in {settings.data_path}")
    failed: set[str] = set()
    for part in (_postgres, _redis):
        async for finding in part(settings):
            failed |= set() if finding.ok else {finding.part}
            yield finding
    is_readable = bool(settings.database_url) and setup.has_secret_key(settings)
    async for finding in _catalog(settings, with_agents=is_readable and failed.isdisjoint(READ_WITH)):
        yield finding


def _with_short_waits(settings: Settings) -> Settings:
    names = (
        "database_timeout_s",
        "redis_timeout_s",
        "tool_connect_timeout_s",
        "tool_list_timeout_s",
        "models_wait_s",
        "jwks_timeout_s",
    )
    return replace(settings, **{name: min(getattr(settings, name), WAIT_MAX_S) for name in names})


# -- Postgres ---------------------------------------------------------------------------------------------------------------


async def _postgres(settings: Settings) -> AsyncIterator[Finding]:
    if not settings.database_url:
        yield await _secret_key(settings, None)
        return
    database = Database(settings)
    try:
        async with database.autocommit() as tx:
            server = await readiness.describe_server(tx)
        yield _version("Postgres", server["version"], (server["major"],), (POSTGRES_MIN,))
        if server["read_only"]:
            yield Finding(
                "Postgres writes", False, "it is read-only: a standby, or default_transaction_read_only is on"
            )
        if fault := await migrate.fault(settings.database_url, timeout_s=settings.database_timeout_s):
            yield Finding("schema", False, fault)
            return
        yield Finding("schema", True, "is that of this version")
        async with database.autocommit() as tx:
            yield _keys(settings, in_use=_has_issuers(settings) or await keys.keys_in_use(tx))
            yield _workers(settings, connected=await readiness.is_connected(tx, assembly.WORKER_CONNECTION))
        key = await _secret_key(settings, database)
        yield key
        if key.ok and setup.has_secret_key(settings):
            for finding in await _sealed(settings, database):
                yield finding
    except SettingsError as error:
        yield Finding("Postgres", False, str(error))
    except ApiError as error:
        yield Finding("Postgres", False, f"{error.message} {error.__cause__}")
    finally:
        await database.close()


def _version(name: str, version: str, number: tuple[int, ...], minimum: tuple[int, ...]) -> Finding:
    least = ".".join(map(str, minimum))
    return Finding(name, number >= minimum, f"answers; it is version {version}, at least {least} is needed")


def _has_issuers(settings: Settings) -> bool:
    """Whether tokens are taken; a catalog with a fault, which has a finding of its own, takes none."""
    try:
        return bool(settings.catalog and load_catalog(settings, os.environ).issuers)
    except SettingsError:
        return False


def _keys(settings: Settings, *, in_use: bool) -> Finding:
    open_to_all = not in_use and settings.host not in assembly.LOOPBACK
    state = (
        "every request needs one" if in_use else f"there are none: every client that reaches {settings.host} may call"
    )
    return Finding("keys", not open_to_all, state)


def _workers(settings: Settings, *, connected: bool) -> Finding:
    if settings.workers_in_api:
        return Finding("workers", True, "`reprise serve` makes background responses itself")
    if connected:
        return Finding("workers", True, "at least one is connected to the database")
    if "application_name=" in settings.database_url:
        return Finding("workers", True, "can't be recognized, since DATABASE_URL sets application_name")
    return Finding(
        "workers", False, "REPRISE_WORKERS_IN_API is off, and no `reprise worker` is connected to the database"
    )


async def _secret_key(settings: Settings, database: Database | None) -> Finding:
    path = setup.secret_key_path(settings)
    if not setup.has_secret_key(settings):
        if database is None or await key_fingerprint.is_known(database, []):
            return Finding("secret key", True, f"none yet; `reprise serve` makes one, {path}")
        return Finding("secret key", False, f"there is no {path}, but the database knows one; set REPRISE_SECRET_KEY")
    try:
        fingerprints = setup.open_seal(settings).fingerprints
    except SettingsError as error:
        return Finding("secret key", False, str(error))
    if database and not await key_fingerprint.is_known(database, fingerprints):
        return Finding("secret key", False, setup.OTHER_KEY)
    return Finding(
        "secret key", True, f"{'REPRISE_SECRET_KEY' if settings.secret_key else path}; replicas must share it"
    )


async def _sealed(settings: Settings, database: Database) -> list[Finding]:
    """What is stored sealed, and whether a key opens it; those of agents have findings of their own."""
    seal = setup.open_seal(settings)
    tried = {
        "tool credentials": await tool_credentials.try_all(database, seal, most=ROWS_MAX),
        "secrets of runs": await sealed_rows.try_runs(database, seal, most=ROWS_MAX),
        "compaction items": await sealed_rows.try_compactions(database, seal, most=ROWS_MAX),
    }
    return [
        Finding(
            what,
            not found.unopened,
            f"of {found.rows} looked at, {found.unopened} open with none of the keys; {FORMER_KEY}"
            if found.unopened
            else f"{found.rows} looked at, and opened",
        )
        for what, found in tried.items()
        if found.rows
    ]


# -- Redis ------------------------------------------------------------------------------------------------------------------


async def _redis(settings: Settings) -> AsyncIterator[Finding]:
    if not settings.redis_url:
        return
    try:
        client = redis.asyncio.from_url(
            redis_address(settings.redis_url),
            socket_connect_timeout=settings.redis_timeout_s,
            socket_timeout=settings.redis_timeout_s,
            retry=Retry(NoBackoff(), 0),
        )
    except SettingsError as error:
        yield Finding("Redis", False, str(error))
        return
    try:
        about: dict[str, Any] = await client.info()
        for finding in _about_redis(about):
            yield finding
        await _try_writing(client, settings.redis_prefix)
    except (RedisError, OSError) as error:
        refuses = isinstance(error, redis.exceptions.ResponseError)
        yield Finding(
            "Redis writes" if refuses else "Redis", False, f"{'refused' if refuses else 'does not answer'}: {error}"
        )
    finally:
        await client.aclose()


def _about_redis(about: Mapping[str, Any]) -> list[Finding]:
    version = str(about.get("redis_version", "0"))
    number = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    valkey = about.get("valkey_version")
    found = [_version("Redis", f"{version} (Valkey {valkey})" if valkey else version, number, REDIS_MIN)]
    if about.get("role", "master") != "master":
        found.append(Finding("Redis role", False, "it is a replica, which takes no writes"))
    if int(about.get("cluster_enabled", 0)):
        found.append(Finding("Redis cluster", False, "it is a node of a cluster, and Reprise would use this node only"))
    policy = str(about.get("maxmemory_policy", "noeviction"))
    if policy != "noeviction" and int(about.get("maxmemory", 0)):
        found.append(
            Finding(
                "Redis eviction",
                False,
                f"maxmemory-policy is {policy}: Redis may evict events of running responses; set noeviction",
            )
        )
    return found


async def _try_writing(client: redis.asyncio.Redis, prefix: str) -> None:
    """The commands of a run's stream. Raises RedisError."""
    key = f"{prefix}:doctor"
    await client.xadd(key, {"m": "doctor"})
    await client.pexpire(key, int(WAIT_MAX_S * 1000))
    await client.xrange(key, count=1)
    await client.delete(key)
    await client.publish(key, "doctor")


# -- Upstreams and tools ----------------------------------------------------------------------------------------------------


async def _catalog(settings: Settings, *, with_agents: bool) -> AsyncIterator[Finding]:
    demo = None if settings.catalog or settings.openai_base_url else await echo.serve()
    try:
        catalog = load_catalog(settings, os.environ, demo_url=demo.base_url if demo else "")
        listed: dict[str, list[str]] = {}
        parts = [_upstreams(settings, catalog, listed), _agents(catalog, listed)]
        parts += [_stored_agents(settings, catalog, listed)] if with_agents else []
        for part in (*parts, _tool_servers(settings, catalog), _issuers(settings, catalog)):
            async for finding in part:
                yield finding
    except SettingsError as error:
        yield Finding("catalog", False, str(error))
    finally:
        if demo:
            await demo.close()


async def _upstreams(settings: Settings, catalog: Catalog, models: dict[str, list[str]]) -> AsyncIterator[Finding]:
    """Each upstream; those that answer leave the models that they list."""
    for name, entry in catalog.upstreams.items():
        upstream = Upstream(name, entry, settings)
        try:
            async with asyncio.timeout(settings.models_wait_s):
                listed = await upstream.list_models(None)
        except TimeoutError:
            yield Finding(
                f"upstream {name}", False, f"{entry.address} lists no models within {settings.models_wait_s:g} s"
            )
        except ApiError as error:
            yield Finding(f"upstream {name}", False, f"{entry.address}: {error.message}")
        else:
            upstream.recognize(listed)
            state = f"{entry.address} lists {len(listed)} model{'' if len(listed) == 1 else 's'}; dialect: {upstream.dialect_name}"
            yield Finding(f"upstream {name}", True, state)
            models[name] = [model.id for model in listed]
            for finding in _routed_models(catalog, name, models[name]):
                yield finding
        finally:
            await upstream.close()


async def _agents(catalog: Catalog, listed: Mapping[str, list[str]]) -> AsyncIterator[Finding]:
    """The agents of the catalog whose model is not there."""
    for name, agent in catalog.agents.items():
        if fault := _unlisted(catalog, agent.model, listed):
            yield Finding(f"agent {name}", False, fault)


def _unlisted(catalog: Catalog, model: str, listed: Mapping[str, list[str]]) -> str:
    """What is wrong with an agent's model: an upstream does not list it, and lists others. `listed` are the models of upstreams that
    have answered; those that the catalog names have findings of their own."""
    if model in {entry.name for entry in catalog.models}:
        return ""
    for route in catalog.routes(model):
        if listed.get(route.upstream) and route.model not in listed[route.upstream]:
            return f"upstream '{route.upstream}' does not list '{route.model}'"
    return ""


async def _stored_agents(
    settings: Settings, catalog: Catalog, listed: Mapping[str, list[str]]
) -> AsyncIterator[Finding]:
    """The agents that tenants have made, and whether the catalog has what they need."""
    tried = faults = 0
    try:
        async with opened(settings) as database:
            stored = Agents(settings, database, catalog, setup.open_seal(settings))
            async for tenant, agent, error in stored.try_all(ROWS_MAX):
                tried += 1
                fault = error.with_path if error else _unlisted(catalog, agent.model, listed)
                faults += bool(fault)
                if fault and faults <= FAULTS_NAMED_MAX:
                    yield Finding(f"agent {agent.name} of {tenant}", False, fault)
    except ApiError as error:
        yield Finding("agents", False, error.message)
        return
    if tried:
        state = f"{tried} looked at that tenants have made"
        yield Finding("agents", not faults, f"{state}, {faults} of which can't answer" if faults else state)


def _routed_models(catalog: Catalog, upstream: str, listed: list[str]) -> list[Finding]:
    """The models that routes name at an upstream and that it does not list, if it lists any."""
    known = f"{', '.join(listed[:MODELS_NAMED_MAX])}{', …' if len(listed) > MODELS_NAMED_MAX else ''}"
    return [
        Finding(f"model {entry.name}", False, f"upstream '{upstream}' does not list '{wanted}'; it lists {known}")
        for entry in catalog.models
        for route in entry.routes
        if route.upstream == upstream
        and (wanted := catalog.name_at(route, entry, entry.name) if entry.name in catalog.model_names else route.model)
        and listed
        and wanted not in listed
    ]


async def _tool_servers(settings: Settings, catalog: Catalog) -> AsyncIterator[Finding]:
    """Each of the operator's tool servers, and whether it has the tools that hosted types need."""
    servers = {name: server for name in catalog.tool_servers if (server := catalog.tool_server(name))}
    mask = Mask(secret for server in servers.values() for secret in server.secrets)
    async with ToolSessions(Guard.from_settings(settings), settings, mask) as sessions:
        for name, server in servers.items():
            try:
                listed = {tool.name for tool in await sessions.list_tools(server)}
            except ToolFailure as error:
                yield Finding(f"tool server {name}", False, error.message)
                continue
            yield Finding(f"tool server {name}", True, f"lists {len(listed)} tools")
            for kind, route in catalog.hosted.items():
                if route.server == name and route.tool not in listed:
                    yield Finding(f"hosted {kind}", False, f"{name} has no tool '{route.tool}'")


async def _issuers(settings: Settings, catalog: Catalog) -> AsyncIterator[Finding]:
    """Each issuer of tokens, and whether its keys can be fetched."""
    guard = Guard.from_settings(settings)
    for name, issuer in catalog.issuers.items():
        try:
            number = await IssuerKeys(name, issuer, settings, guard).check()
        except NotFetched as error:
            yield Finding(f"issuer {name}", False, str(error))
            continue
        source = "the secret" if issuer.secret else f"{number} key{'' if number == 1 else 's'}"
        yield Finding(f"issuer {name}", True, f"{source} for {', '.join(issuer.algorithms)}")
