"""`reprise serve | worker | migrate | keys | tenants | usage | rekey | doctor | connect`.

Each command imports what it needs: importing everything takes seconds.
"""

import asyncio
import errno
import os
import sys
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, date, datetime
from typing import TypeVar, get_args

import click

import app
from app import setup
from app.clients import CLIENTS
from app.domain.rights import ORDINARY, SCOPES
from app.embedded import POSTGRES, EmbeddedError
from app.errors import ApiError
from app.settings import DEFAULT_TENANT, Settings, SettingsError, load
from app.telemetry import log_loop_fault, start_logging
from app.wire.admin import LIMIT_MAX, STORED_BYTES_MAX, OwnLimits, Scope, UpdateKey
from app.wire.usage import Group

T = TypeVar("T")

JUST_POSTGRES = frozenset({POSTGRES})

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


@click.version_option(app.__version__, message="reprise %(version)s")
@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    help="A persistent, stateful Responses API server in front of any Chat Completions upstream.",
)
def reprise() -> None:
    """The console script."""


def main() -> None:
    """Run the command line; an error of the configuration is one line."""
    try:
        "".join(sys.argv).encode()
    except UnicodeEncodeError:
        click.echo("reprise: an argument is not valid UTF-8.", err=True)
        sys.exit(2)
    try:
        reprise.main(standalone_mode=True, prog_name="reprise")
    except (SettingsError, EmbeddedError, ApiError) as error:
        click.echo(f"reprise: {error}", err=True)
        sys.exit(1)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        click.echo(f"reprise: no more can be written: {error.strerror}.", err=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes the rest of it at the exit
        sys.exit(1)


def _settings() -> Settings:
    settings = load(os.environ)
    start_logging(settings.log_level)
    return settings


def _run(main: Awaitable[T]) -> T:
    async def awaited() -> T:
        asyncio.get_running_loop().set_exception_handler(log_loop_fault)
        return await main

    if sys.platform == "win32":
        return asyncio.run(awaited())
    import uvloop

    return uvloop.run(awaited())


def _limit_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that set limits; 0 is no limit."""
    for name, what, most in (
        ("stored-bytes", "bytes of what is stored", STORED_BYTES_MAX),
        ("concurrent-runs", "runs at once", LIMIT_MAX),
        ("tokens-per-minute", "tokens in a minute", LIMIT_MAX),
        ("requests-per-minute", "requests in a minute", LIMIT_MAX),
    ):
        given = click.IntRange(0, most)
        command = click.option(f"--{name}", type=given, help=f"How many {what}; 0: no limit.")(command)
    return command


# -- serve ------------------------------------------------------------------------------------------------------------------


@reprise.command()
def serve() -> None:
    """Serve the API; embed Postgres or Valkey where DATABASE_URL or REDIS_URL is not set."""
    settings = _settings()
    embedded = setup.missing_servers(settings)
    settings = setup.with_servers(settings, create_database=True)
    from app import migrate, serving

    if POSTGRES in embedded:
        migrate.upgrade(settings.database_url)
    _run(serving.serve(settings, embedded))


# -- worker, migrate --------------------------------------------------------------------------------------------------------


@reprise.command()
def worker() -> None:
    """Make background responses, and end those of dead processes, without serving the API."""
    settings = setup.with_servers(_settings())
    from app import serving

    _run(serving.work(settings))


@reprise.command("migrate")
@click.option(
    "--back-to",
    metavar="REVISION",
    help="Go back to the schema of an earlier version; what only later ones keep is deleted.",
)
def migrate_command(back_to: str | None) -> None:
    """Migrate the database to the schema of this version."""
    settings = setup.with_servers(_settings(), JUST_POSTGRES, create_database=True)
    from app import migrate

    if back_to is None:
        migrate.upgrade(settings.database_url)
        click.echo("The schema is that of this version.")
    else:
        migrate.downgrade(settings.database_url, back_to)
        click.echo(f"The schema is {back_to}, which this version does not serve.")


# -- keys -------------------------------------------------------------------------------------------------------------------


@reprise.group()
def keys() -> None:
    """API keys. As soon as there is one, every request needs one."""


def _existing() -> Settings:
    """The settings with a database that exists and has this version's schema."""
    settings = setup.with_servers(_settings(), JUST_POSTGRES)
    from app import migrate

    _run(migrate.demand(settings))
    return settings


@keys.command("create")
@click.option("--tenant", default=DEFAULT_TENANT, show_default=True, help="The tenant whose data the key opens.")
@click.option("--user", help="Bind the key to a user of the tenant: it opens that user's data only.")
@click.option("--name", default="", help="A note for yourself.")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice(SCOPES),
    help="What the key may do; may be given several times. By default it reads and writes.",
)
@click.option(
    "--model", "models", multiple=True, help="A model that it may use, or a pattern with `*`; by default every model."
)
@_limit_options
@click.option("--expires", type=click.DateTime(("%Y-%m-%d", "%Y-%m-%dT%H:%M:%S")), help="When it expires, in UTC.")
def create_key(
    tenant: str,
    user: str | None,
    name: str,
    scopes: tuple[Scope, ...],
    models: tuple[str, ...],
    expires: datetime | None,
    **limits: int | None,
) -> None:
    """Make a key and print it, this once."""
    if user == "":  # as of a variable that is not set: without a user the key would open the tenant's own data
        raise click.BadParameter("a user has a name.", param_hint="'--user'")
    settings = _existing()
    from app.storage import audit, keys
    from app.storage.database import opened

    key = keys.new_key(
        tenant,
        user=user or "",
        name=name,
        scopes=frozenset(scopes) or ORDINARY,
        models=models or None,
        limits=OwnLimits(**limits),
        expires_at=int(expires.replace(tzinfo=UTC).timestamp()) if expires else None,
    )
    secret = keys.new_secret()

    async def create() -> list[str]:
        async with opened(settings) as database, database.begin() as tx:
            new = await keys.create_key(tx, key, secret, by=None)
            await audit.write(tx, tenant, audit.entry(None, "key.created", key.id))
            return new

    new = _run(create())
    click.echo(secret)
    of_user = f", user {user}" if user else ""
    click.echo(f"{key.id} for tenant {tenant}{of_user}; keep it: only its hash is stored.", err=True)
    for what in new:
        if (what, tenant) != ("tenant", DEFAULT_TENANT):
            click.echo(f"The {what} is new.", err=True)


@keys.command("list")
def list_keys() -> None:
    """Every key: id, tenant, user, name, scopes, models, when it was made, whether it is valid, and limits of its own."""
    settings = _existing()
    from app.storage import keys
    from app.storage.database import opened

    async def listed() -> list[keys.Key]:
        async with opened(settings) as database, database.autocommit() as tx:
            return await keys.all_keys(tx)

    for key in _run(listed()):
        state = "valid"
        if key.revoked_at:
            state = f"revoked {_time(key.revoked_at)}"
        elif key.expires_at:
            word = "expired" if key.expires_at <= time.time() else "valid until"
            state = f"{word} {_time(key.expires_at)}"
        scopes, models = ",".join(sorted(key.scopes)), ",".join(key.models or ("*",))
        made = _time(key.created_at)
        named = (key.id, key.tenant, key.user or "-", key.name or "-")
        click.echo("\t".join((*named, scopes, models, made, state, _listed(key.limits))))


def _listed(limits: OwnLimits) -> str:
    given = {name: getattr(limits, name) for name in limits.__struct_fields__}
    return ",".join(f"{name}={value}" for name, value in given.items() if value is not None) or "-"


def _time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


@keys.command("limit")
@click.argument("key_id")
@_limit_options
def limit_key(key_id: str, **limits: int | None) -> None:
    """Set the limits of a key; one that is not given is that of the settings."""
    settings = _existing()
    from app.storage import audit, keys
    from app.storage.database import opened

    async def limit() -> None:
        async with opened(settings) as database, database.begin() as tx:
            tenant = await keys.tenant_of_key(tx, key_id)
            await keys.update_key(tx, tenant, key_id, UpdateKey(limits=OwnLimits(**limits)))
            await audit.write(tx, tenant, audit.entry(None, "key.updated", key_id))

    _run(limit())
    click.echo(f"{key_id} has new limits; servers notice within {settings.key_cache_s:g} s.")


@keys.command("rotate")
@click.argument("key_id")
@click.option("--overlap-s", type=click.FloatRange(0), help="How long earlier secrets stay valid, in seconds.")
def rotate_key(key_id: str, overlap_s: float | None) -> None:
    """Give a key a new secret and print it, this once."""
    settings = _existing()
    from app.storage import audit, keys
    from app.storage.database import opened

    secret = keys.new_secret()
    overlap_s = settings.key_overlap_s if overlap_s is None else overlap_s

    async def rotate() -> None:
        async with opened(settings) as database, database.begin() as tx:
            tenant = await keys.tenant_of_key(tx, key_id)
            await keys.rotate_key(tx, tenant, key_id, secret, overlap_s=overlap_s)
            await audit.write(tx, tenant, audit.entry(None, "key.rotated", key_id))

    _run(rotate())
    click.echo(secret)
    click.echo(f"{key_id} has a new secret; earlier ones are valid for {overlap_s:g} s.", err=True)


@keys.command("revoke")
@click.argument("key_id")
def revoke_key(key_id: str) -> None:
    """Revoke a key by its id."""
    settings = _existing()
    from app.storage import audit, keys
    from app.storage.database import opened

    async def revoke() -> None:
        async with opened(settings) as database, database.begin() as tx:
            tenant = await keys.tenant_of_key(tx, key_id)
            await keys.revoke_key(tx, tenant, key_id)
            await audit.write(tx, tenant, audit.entry(None, "key.revoked", key_id))

    _run(revoke())
    click.echo(f"{key_id} is revoked; servers notice within {settings.key_cache_s:g} s.")


# -- tenants ----------------------------------------------------------------------------------------------------------------


@reprise.group()
def tenants() -> None:
    """Tenants, and their limits."""


@tenants.command("list")
def list_tenants() -> None:
    """Every tenant: its name, how many valid keys it has, how many users, and limits of its own."""
    settings = _existing()
    from app.storage import tenants
    from app.storage.database import opened

    async def listed() -> list[tenants.Tenant]:
        async with opened(settings) as database, database.autocommit() as tx:
            return await tenants.all_tenants(tx)

    for tenant in _run(listed()):
        click.echo("\t".join((tenant.id, str(tenant.keys), str(tenant.users), _listed(tenant.limits))))


@tenants.command("limit")
@click.argument("tenant")
@_limit_options
@click.option("--create", is_flag=True, help="Make the tenant if there is none of this name.")
def limit_tenant(tenant: str, *, create: bool, **limits: int | None) -> None:
    """Set the limits of a tenant, which hold for all its keys and users together; one that is not given is that of the settings."""
    settings = _existing()
    from app.storage import audit, tenants
    from app.storage.database import opened

    async def limit() -> None:
        async with opened(settings) as database, database.begin() as tx:
            is_new = await tenants.set_limits(tx, tenant, OwnLimits(**limits), create=create)
            await audit.write(tx, tenant, audit.entry(None, "tenant.created" if is_new else "tenant.updated", tenant))

    _run(limit())
    click.echo(f"{tenant} has new limits; servers notice within {settings.key_cache_s:g} s.")


# -- usage ------------------------------------------------------------------------------------------------------------------


@reprise.command()
@click.option("--tenant", help="Of this tenant only.")
@click.option("--since", type=click.DateTime(("%Y-%m-%d",)), help="The first day, in UTC.")
@click.option("--until", type=click.DateTime(("%Y-%m-%d",)), help="The last day, in UTC.")
@click.option(
    "--by", "groups", multiple=True, type=click.Choice(get_args(Group)), help="Group by it; may be given several times."
)
@click.option("--csv", "format", flag_value="csv", help="As CSV.")
@click.option("--json", "format", flag_value="json", help="As JSON, an object on each line.")
def usage(
    tenant: str | None, since: datetime | None, until: datetime | None, groups: tuple[Group, ...], format: str | None
) -> None:
    """What each tenant has used: runs, tokens, cost."""
    if since and until and until < since:
        raise click.BadParameter("it is before '--since'.", param_hint="'--until'")
    settings = _existing()
    from app.domain.usage_report import as_csv, as_table
    from app.storage import usage
    from app.storage.database import opened
    from app.wire.resources import encode

    filter = usage.Filter(first_day=since.date() if since else date.min, last_day=until.date() if until else date.max)

    async def report() -> list[usage.Used]:
        async with opened(settings) as database, database.autocommit() as tx:
            return await usage.report_all(tx, tenant, filter, groups)

    shown = [one.shown(groups, with_tenant=True) for one in _run(report())]
    if format == "json":
        for one in shown:
            click.echo(encode(one))
    else:
        click.echo(as_csv(shown) if format == "csv" else as_table(shown), nl=format != "csv")


@reprise.command()
def rekey() -> None:
    """Accept the configured secret key, and seal the credentials of tool servers and the secrets of agents with it. What is sealed with
    a key that is not configured, as an old one is, is lost."""
    settings = _existing()
    seal = setup.open_seal(settings)
    from app.storage import agents, key_fingerprint, sealed_rows, tool_credentials
    from app.storage.database import opened

    async def accept() -> dict[str, sealed_rows.Resealed]:
        async with opened(settings) as database:
            await key_fingerprint.accept_key(database, seal.fingerprints, anyway=True)
            return {
                "Tool credentials": await tool_credentials.reseal_all(database, seal),
                "Agents": await agents.reseal_all(database, seal),
            }

    made = _run(accept())
    click.echo("The database accepts this secret key now.")
    for what, done in made.items():
        click.echo(f"{what}: {done.resealed} sealed with it, {done.unopened} that none of the keys opens.")


# -- doctor -----------------------------------------------------------------------------------------------------------------


@reprise.command()
def doctor() -> None:
    """Check the configuration and its servers; the exit status is 1 if anything is wrong."""
    start_logging("error")
    sys.exit(0 if _run(_examine()) else 1)


async def _examine() -> bool:
    from app.doctor import examine
    from app.domain.usage_report import printable

    healthy = True
    async for finding in examine(os.environ):
        click.echo(printable(f"{'ok  ' if finding.ok else 'BAD '} {finding.part}: {finding.text}"))
        healthy = healthy and finding.ok
    return healthy


# -- connect ----------------------------------------------------------------------------------------------------------------


@reprise.command()
@click.argument("client", type=click.Choice(sorted(CLIENTS)))
@click.option("--url", help="The server's, with /v1 at its end. By default that of `serve` with the same settings.")
@click.option("--model", default="echo", show_default=True, help="The model to use.")
@click.option("--key", default="none", show_default=True, help="The key to use; without keys any will do.")
def connect(client: str, url: str | None, model: str, key: str) -> None:
    """Print the lines that connect a client to this server."""
    if url is None:
        settings = load(os.environ)
        url = f"http://{settings.host}:{settings.port}/v1"
    chosen = CLIENTS[client]
    click.echo(f"{chosen.file}, then: {chosen.command(key)}", err=True)
    click.echo(chosen.lines(url, model, key))
