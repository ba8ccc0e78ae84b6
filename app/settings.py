"""Settings: one frozen Struct from the environment.

Each field is an environment variable: `REPRISE_` and its name in capitals, but for the names that every deployment knows
(`DATABASE_URL`, `REDIS_URL`, `OPENAI_BASE_URL`, `OPENAI_API_KEY`). Every limit is here, with its unit in its name. The
table of docs/settings.md is made from this file.
"""

import difflib
import math
import re
from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
from msgspec import Meta

PLAIN_NAMES = {
    "database_url": "DATABASE_URL",
    "redis_url": "REDIS_URL",
    "openai_base_url": "OPENAI_BASE_URL",
    "openai_api_key": "OPENAI_API_KEY",
}

DEFAULT_TENANT = "default"
"""Whose data it is while a server has no keys."""

DATA_DIR = ".data"
PROJECT = Path(__file__).resolve().parent.parent
"""Where the code lies: a checkout, unless it was installed as a package."""


class SettingsError(Exception):
    """A setting is unknown or has a bad value; the message is one clear line."""


def _about(text: str, *, ge: float | None = None, gt: float | None = None, le: float | None = None) -> Meta:
    limits = {"ge": ge, "gt": gt, "le": le}
    given: dict[str, Any] = {name: value for name, value in limits.items() if value is not None}
    return Meta(description=text, **given)


class Allowed(msgspec.Struct, frozen=True):
    """What REPRISE_OUTBOUND_ALLOW says: host names in small letters without a last dot, and networks."""

    hosts: frozenset[str] = frozenset()
    networks: tuple[IPv4Network | IPv6Network, ...] = ()


def parse_allowed(text: str) -> Allowed:
    """Read hosts, addresses and networks, separated by commas. Raises ValueError."""
    hosts, networks = set(), []
    for entry in filter(None, (part.strip().lower().rstrip(".") for part in text.split(","))):
        if "/" in entry or ":" in entry or entry.replace(".", "").isdigit():
            networks.append(ip_network(entry))
        elif re.fullmatch(r"[a-z0-9_][a-z0-9_-]*(\.[a-z0-9_-]+)*", entry):
            hosts.add(entry)
        else:
            raise ValueError(f"{entry!r} is neither a host name (in ASCII, without port) nor a network")
    return Allowed(frozenset(hosts), tuple(networks))


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """All settings. Empty strings mean "not set"."""

    host: Annotated[str, _about("address to listen on; without keys only a loopback one")] = "127.0.0.1"
    port: Annotated[int, _about("port to listen on", ge=0, le=65535)] = 8000
    reuse_port: Annotated[
        bool, _about("whether another process may listen on the same port, for a restart without a gap")
    ] = False
    data_dir: Annotated[
        str, _about("where the embedded servers and the secret key live; the default is that of the project")
    ] = DATA_DIR
    catalog: Annotated[str, _about("TOML file of upstreams and models")] = ""
    database_url: Annotated[str, _about("Postgres; not set: an embedded one")] = ""
    redis_url: Annotated[str, _about("Redis or Valkey; not set: an embedded one")] = ""
    durable: Annotated[bool, _about("whether the embedded Postgres waits for the disk; off only for tests")] = True
    openai_base_url: Annotated[str, _about("the upstream, when there is no catalog; not set: the demo `echo`")] = ""
    openai_api_key: Annotated[str, _about("the upstream's key")] = ""
    upstream_auth: Annotated[
        Literal["configured", "caller"], _about("whose key the upstream gets: the configured one, or the caller's own")
    ] = "configured"
    secret_key: Annotated[
        str, _about("seals reasoning; 32 bytes in base64; not set: made once in the data directory")
    ] = ""
    old_secret_keys: Annotated[
        str, _about("former secret keys, and future ones: what they seal can be opened; comma-separated")
    ] = ""
    on_disconnect: Annotated[
        Literal["cancel", "finish"], _about("a stored foreground run whose client has gone is cancelled, or finished")
    ] = "cancel"
    log_level: Annotated[
        Literal["debug", "info", "warning", "error", "critical"], _about("the least that is logged")
    ] = "info"

    connections_max: Annotated[
        int,
        _about("open connections of one process, or as many as its limit of open files allows; beyond: 503", ge=1),
    ] = 4_096
    head_bytes_max: Annotated[
        int, _about("a request's line and headers; longer: 431, or 414 if the line alone is", ge=1024)
    ] = 32 * 1024
    headers_max: Annotated[int, _about("headers of one request; beyond: 431", ge=1)] = 100
    head_timeout_s: Annotated[
        float, _about("from a request's first byte to the end of its headers; longer: 408", gt=0)
    ] = 10.0
    idle_timeout_s: Annotated[float, _about("a connection's wait for its next request", gt=0)] = 75.0
    body_timeout_s: Annotated[
        float,
        _about(
            "a request's body, which gets longer with what has come at the least rate, but not for silence; then 408",
            gt=0,
        ),
    ] = 30.0
    body_bytes_per_s_min: Annotated[int, _about("that least rate", ge=1)] = 16 * 1024
    body_bytes_max: Annotated[int, _about("size of a request body; larger: 413", ge=1024)] = 64 * 1024 * 1024
    bodies_bytes_max: Annotated[
        int,
        _about(
            "the bodies of one process that are arriving or wait for room, at least one; beyond, those that have arrived "
            "for longer than REPRISE_BODY_TIMEOUT_S are given up, then new ones refused: 429",
            ge=1024,
        ),
    ] = 256 * 1024 * 1024
    input_items_max: Annotated[int, _about("items in one request's input", ge=1, le=999_999)] = 10_000
    context_items_max: Annotated[int, _about("items of a chain and its new input together", ge=1)] = 100_000
    context_bytes_max: Annotated[
        int, _about("items of a chain and its new input together, as JSON; longer: 400", ge=1024)
    ] = 128 * 1024 * 1024
    contexts_bytes_max: Annotated[
        int,
        _about(
            "contexts that one process holds at once; in memory they are several times as large; more wait", ge=1024
        ),
    ] = 256 * 1024 * 1024
    context_wait_s: Annotated[
        float, _about("how long a request waits for the room that its context, or its reply, needs; longer: 429", gt=0)
    ] = 30.0
    page_bytes_max: Annotated[
        int, _about("a page of a list, unless its first entry alone is larger; a longer page ends early", ge=1024)
    ] = 16 * 1024 * 1024
    reads_bytes_max: Annotated[
        int, _about("what one process reads at once of stored responses and items for replies; more wait", ge=1024)
    ] = 32 * 1024 * 1024
    foreground_runs_max: Annotated[int, _about("foreground runs at once in one process; beyond: 429", ge=1)] = 1_000
    turns_max: Annotated[int, _about("upstream completions in one run", ge=1)] = 32
    run_duration_max_s: Annotated[float, _about("a run's whole duration", gt=0)] = 3_600.0
    turn_calls_max: Annotated[int, _about("calls in one completion; more: the run fails", ge=1)] = 1_000
    run_output_bytes_max: Annotated[
        int, _about("what a run says, as encoded events; and as much may its upstream send", ge=1024)
    ] = 64 * 1024 * 1024
    run_events_max: Annotated[int, _about("what a run says, counted in events", ge=10)] = 500_000
    stream_head_wait_s: Annotated[
        float,
        _about("how long a stream's head waits for the upstream's answer, so that its refusal is an HTTP status", ge=0),
    ] = 10.0
    stream_backlog_bytes_max: Annotated[
        int,
        _about(
            "what one client may leave unread of its stream; beyond, a background stream is read again later, "
            "and a foreground run waits",
            ge=1024,
        ),
    ] = 1024 * 1024
    stream_wait_s: Annotated[
        float, _about("how long a foreground run waits so; then it ends as if its client had gone", gt=0)
    ] = 60.0
    unread_bytes_max: Annotated[
        int,
        _about(
            "what the clients of one process may leave unread together; beyond, those are disconnected that have taken "
            "nothing for the longest",
            ge=1024,
        ),
    ] = 256 * 1024 * 1024
    send_timeout_s: Annotated[
        float, _about("a client that takes nothing for so long of what is sent to it is disconnected", gt=0)
    ] = 30.0
    keepalive_s: Annotated[float, _about("an SSE comment after so much silence", gt=0)] = 15.0
    keepalive_events: Annotated[
        bool, _about("whether it is a `keepalive` event instead, for clients and proxies that count events only")
    ] = False
    upstream_attempts_max: Annotated[int, _about("attempts at one upstream before anything was sent", ge=1)] = 3
    upstream_retry_after_max_s: Annotated[float, _about("a longer Retry-After is passed on at once", ge=0)] = 5.0
    upstream_connect_timeout_s: Annotated[float, _about("connecting to an upstream", gt=0)] = 5.0
    upstream_answer_timeout_s: Annotated[float, _about("an upstream's first word", gt=0)] = 600.0
    upstream_idle_timeout_s: Annotated[float, _about("silence of an upstream in mid-stream", gt=0)] = 120.0
    models_wait_s: Annotated[float, _about("how long a list of models waits for an upstream's", gt=0)] = 5.0
    upstream_line_bytes_max: Annotated[
        int, _about("one line of an upstream's stream, or its answer where that is no stream", ge=1024)
    ] = 4 * 1024 * 1024
    upstream_error_bytes_max: Annotated[int, _about("an upstream's error; longer: cut off", ge=1024)] = 64 * 1024
    upstream_connections_max: Annotated[int, _about("open connections to one upstream", ge=1)] = 2_000
    outbound_allow: Annotated[
        str, _about("private hosts and networks that may be called for clients all the same; comma-separated")
    ] = ""
    tool_connect_timeout_s: Annotated[float, _about("connecting to a tool server, and its greeting", gt=0)] = 10.0
    tool_list_timeout_s: Annotated[float, _about("a tool server's whole list", gt=0)] = 30.0
    tool_call_timeout_s: Annotated[float, _about("one call of a tool", gt=0)] = 120.0
    tool_servers_max: Annotated[int, _about("MCP servers that one request may declare", ge=1)] = 32
    tool_headers_max: Annotated[int, _about("headers of one MCP server that a request declares", ge=1)] = 64
    tool_headers_bytes_max: Annotated[
        int, _about("headers and `authorization`s of all MCP servers that a request declares", ge=64)
    ] = 64 * 1024
    tool_calls_at_once_max: Annotated[int, _about("calls of one run at once; more wait", ge=1)] = 8
    tool_answer_bytes_max: Annotated[
        int,
        _about(
            "a tool server's answer as it travels, images included, over HTTP+SSE at most 1 MiB; longer: the call fails",
            ge=1024,
        ),
    ] = 8 * 1024 * 1024
    tool_arguments_bytes_max: Annotated[
        int, _about("the arguments of a call that this server makes; longer: the call fails", ge=1024)
    ] = 1024 * 1024
    tool_output_bytes_max: Annotated[int, _about("a call's text; longer: cut off, with a note", ge=1024)] = 1024 * 1024
    tool_programs_max: Annotated[
        int, _about("programs of one tool server with a `command` in one process; more tenants, or runs, wait", ge=1)
    ] = 16
    tool_program_idle_s: Annotated[float, _about("how long a program that no run uses is kept", ge=0)] = 300.0
    tools_max: Annotated[
        int, _about("tools of one request, with those inside namespaces and those that its input adds", ge=1)
    ] = 1_000
    tools_named_max: Annotated[
        int, _about("names in one list of an MCP server's tools, such as `allowed_tools`", ge=1)
    ] = 1_000
    tool_list_bytes_max: Annotated[
        int, _about("a tool server's whole list, all pages together; longer: it can't be listed", ge=1024)
    ] = 4 * 1024 * 1024
    tool_list_pages_max: Annotated[int, _about("pages of such a list", ge=1)] = 100
    tools_listed_max: Annotated[int, _about("tools of one server; more: it can't be listed", ge=1)] = 1_000
    database_pool_size: Annotated[
        int, _about("Postgres connections of one process, beside one for heartbeats", ge=1)
    ] = 10
    database_timeout_s: Annotated[float, _about("connecting, waiting for a connection, one statement", gt=0)] = 10.0
    database_retry_s: Annotated[
        float, _about("how long a finished run tries to be stored while Postgres is away", gt=0)
    ] = 30.0
    workers_in_api: Annotated[
        bool, _about("whether `serve` makes background responses itself, beside `worker` processes")
    ] = True
    worker_runs_max: Annotated[int, _about("background runs at once in one process", ge=1)] = 200
    queued_runs_tenant_max: Annotated[int, _about("queued background runs of one tenant; beyond: 429", ge=1)] = 10_000
    queued_runs_max: Annotated[int, _about("queued background runs in all; beyond: 429", ge=1)] = 100_000
    run_attempts_max: Annotated[
        int, _about("attempts at a background run; it fails when so many owners have died", ge=1)
    ] = 5
    event_ttl_s: Annotated[
        float, _about("how long Redis keeps the events of an ended run; Postgres keeps them longer", gt=0)
    ] = 60.0
    poll_s: Annotated[float, _about("how often the queue, and a silent run's record, are looked at", gt=0)] = 1.0
    redis_timeout_s: Annotated[float, _about("connecting to Redis, one command", gt=0)] = 2.0
    redis_prefix: Annotated[str, _about("what the names of our keys in Redis begin with")] = "reprise"
    lease_s: Annotated[float, _about("a process that is silent for longer loses its runs", gt=0)] = 15.0
    key_cache_s: Annotated[float, _about("how long a revoked key may still be accepted", ge=0)] = 5.0
    shutdown_grace_s: Annotated[float, _about("how long running requests may finish after SIGTERM", ge=0)] = 10.0
    shutdown_delay_s: Annotated[
        float,
        _about("the part of it in which new connections are still taken, while `/readyz` is 503 already", ge=0),
    ] = 1.0

    @property
    def data_path(self) -> Path:
        """The data directory, absolute; the default one is found from wherever a command is run."""
        if self.data_dir == DATA_DIR and (PROJECT / "pyproject.toml").exists():
            return PROJECT / DATA_DIR
        return Path(self.data_dir).expanduser().absolute()


def variable(field: str) -> str:
    """The environment variable of a field."""
    return PLAIN_NAMES.get(field) or f"REPRISE_{field.upper()}"


SWITCHES = dict.fromkeys(("true", "t", "yes", "y", "on", "1"), True) | dict.fromkeys(
    ("false", "f", "no", "n", "off", "0"), False
)
"""The usual spellings of a boolean, in small letters."""

_LEVELS = {"warn": "warning", "fatal": "critical"}


def _spelt(text: str, plain: Any) -> str | bool:
    """A switch by its value, a choice by its usual name; spaces and capitals mean something in a text only."""
    if plain is str:
        return text
    small = text.strip().lower()
    return SWITCHES.get(small, small) if plain is bool else _LEVELS.get(small, small)


def _choices(plain: Any) -> str:
    """What may stand where only a few values may."""
    if plain is bool:
        return "; it may be true or false"
    return f"; it may be {', '.join(get_args(plain))}" if get_origin(plain) is Literal else ""


def load(environ: Mapping[str, str]) -> Settings:
    """Settings from the environment. Raises SettingsError for an unknown `REPRISE_` name or a bad value."""
    fields = {variable(field.name): field for field in msgspec.structs.fields(Settings)}
    for name in environ:
        if name.startswith("REPRISE_") and name not in fields:
            short = {known.removeprefix("REPRISE_"): known for known in fields}
            near = difflib.get_close_matches(name.removeprefix("REPRISE_"), short, n=1)
            hint = f"; did you mean {short[near[0]]}?" if near else "."
            raise SettingsError(f"{name} is no setting of Reprise{hint}")
    given = {name: environ[name] for name in fields if environ.get(name, "") != ""}
    values = {}
    for name, text in given.items():
        field = fields[name]
        plain = getattr(field.type, "__origin__", field.type)
        try:
            values[field.name] = msgspec.convert(_spelt(text, plain), field.type, strict=False)
        except msgspec.ValidationError as error:
            raise SettingsError(f"{name}={text!r} is not valid: {error}{_choices(plain)}") from None
        if values[field.name] == math.inf:
            raise SettingsError(f"{name}={text!r} is not valid: expected a number that ends")
    try:
        parse_allowed(values.get("outbound_allow", ""))
    except ValueError as error:
        raise SettingsError(f"REPRISE_OUTBOUND_ALLOW={values['outbound_allow']!r} is not valid: {error}.") from None
    return Settings(**values)
