"""Settings: one frozen Struct from the environment.

Each field is an environment variable: `REPRISE_` and its name in capitals, but for the names that every deployment knows
(`DATABASE_URL`, `REDIS_URL`, `OPENAI_BASE_URL`, `OPENAI_API_KEY`). Every limit is here, with its unit in its name. The
table of docs/settings.md is made from this file.
"""

import difflib
import math
import re
from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
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
"""The tenant of all data while a server has no keys."""

DATA_DIR = ".data"
PROJECT = Path(__file__).resolve().parent.parent
"""The directory of the code: a checkout, unless Reprise is installed as a package."""


class SettingsError(Exception):
    """A setting is unknown or has a bad value; the message is one clear line."""


def _about(text: str, *, ge: float | None = None, gt: float | None = None, le: float | None = None) -> Meta:
    limits = {"ge": ge, "gt": gt, "le": le}
    given: dict[str, Any] = {name: value for name, value in limits.items() if value is not None}
    return Meta(description=text, **given)


class Allowed(msgspec.Struct, frozen=True):
    """REPRISE_OUTBOUND_ALLOW, parsed: host names in lower case without a trailing dot, and networks."""

    hosts: frozenset[str] = frozenset()
    networks: tuple[IPv4Network | IPv6Network, ...] = ()

    def names(self, host: str) -> bool:
        """Whether a host is named, or an address is in a named network."""
        if host.lower().rstrip(".") in self.hosts:
            return True
        try:
            address = ip_address(host)
        except ValueError:
            return False
        return any(address in network for network in self.networks)


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


KEY_OVERLAP_S_MAX = 31_536_000
"""A year: so long at most a rotation leaves earlier secrets valid."""

LIMIT_MAX = 1_000_000_000
"""Of what a quota may allow in a minute, or at once."""

Networks = tuple[IPv4Network | IPv6Network, ...]


def parse_networks(text: str) -> Networks:
    """Read addresses and networks, separated by commas. Raises ValueError."""
    return tuple(ip_network(part.strip()) for part in text.split(",") if part.strip())


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """All settings. Empty strings mean "not set"."""

    host: Annotated[str, _about("address to listen on; without keys only a loopback one")] = "127.0.0.1"
    port: Annotated[int, _about("port to listen on", ge=0, le=65535)] = 8000
    reuse_port: Annotated[
        bool, _about("whether another process may listen on the same port, for a restart without a gap")
    ] = False
    data_dir: Annotated[
        str, _about("directory of the embedded servers and the secret key; the default is in the project's")
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
        str, _about("seals reasoning and compactions; 32 bytes in base64; not set: made once in the data directory")
    ] = ""
    compaction_prompt: Annotated[
        str, _about("file with the text that asks a model for the summary of a compaction; not set: the project's own")
    ] = ""
    reasoning_summary_prompt: Annotated[
        str, _about("file with the text that asks a model for a summary of reasoning; not set: the project's own")
    ] = ""
    old_secret_keys: Annotated[
        str, _about("former secret keys, and future ones: what they seal can be opened; comma-separated")
    ] = ""
    on_disconnect: Annotated[
        Literal["cancel", "finish"],
        _about("whether a stored foreground run is cancelled or finished when its client disconnects"),
    ] = "cancel"
    log_level: Annotated[
        Literal["debug", "info", "warning", "error", "critical"], _about("the lowest level that is logged")
    ] = "info"

    connections_max: Annotated[
        int,
        _about("open connections of one process, or fewer if its limit of open files is low; beyond: 503", ge=1),
    ] = 4_096
    head_bytes_max: Annotated[
        int, _about("request line and headers; longer: 431, or 414 if the line alone is", ge=1024)
    ] = 32 * 1024
    headers_max: Annotated[int, _about("headers of one request; beyond: 431", ge=1)] = 100
    head_timeout_s: Annotated[
        float, _about("from a request's first byte to the end of its headers; longer: 408", gt=0)
    ] = 10.0
    idle_timeout_s: Annotated[float, _about("how long a connection stays open without a request", gt=0)] = 75.0
    body_timeout_s: Annotated[
        float,
        _about(
            "time for a request's body, extended while it arrives at REPRISE_BODY_BYTES_PER_S_MIN; longer, or silent for so long: 408",
            gt=0,
        ),
    ] = 30.0
    body_bytes_per_s_min: Annotated[int, _about("the lowest rate at which a body may arrive", ge=1)] = 16 * 1024
    body_bytes_max: Annotated[int, _about("size of a request body; larger: 413", ge=1024)] = 64 * 1024 * 1024
    bodies_bytes_max: Annotated[
        int,
        _about(
            "request bodies of one process that are arriving or wait for room, at least one; beyond: 429, first for those that "
            "have been arriving for longer than REPRISE_BODY_TIMEOUT_S, then for new ones",
            ge=1024,
        ),
    ] = 256 * 1024 * 1024
    file_bytes_max: Annotated[int, _about("size of an uploaded file; larger: 413", ge=1024)] = 64 * 1024 * 1024
    files_tenant_bytes_max: Annotated[
        int, _about("files of one tenant together; an upload beyond that: 400", ge=1024)
    ] = 10 * 1024 * 1024 * 1024
    files_tenant_max: Annotated[int, _about("files of one tenant; an upload beyond that: 400", ge=1)] = 10_000
    input_items_max: Annotated[int, _about("items in one request's input", ge=1, le=999_999)] = 10_000
    context_items_max: Annotated[int, _about("items of a chain and its new input together", ge=1)] = 100_000
    context_bytes_max: Annotated[
        int, _about("items of a chain and its new input together, as JSON; longer: 400", ge=1024)
    ] = 128 * 1024 * 1024
    context_files_max: Annotated[int, _about("files that one context refers to; more: 400", ge=1)] = 500
    context_fetched_files_max: Annotated[
        int,
        _about(
            "files of one context that are fetched; more in a request: 400; of earlier items the newest are fetched",
            ge=1,
        ),
    ] = 32
    file_fetch_bytes_max: Annotated[
        int, _about("files that one context refers to by their addresses, together; larger: 400", ge=1024)
    ] = 32 * 1024 * 1024
    file_fetch_timeout_s: Annotated[float, _about("fetching the files of one context, together; longer: 400", gt=0)] = (
        30.0
    )
    file_text_bytes_max: Annotated[
        int, _about("text that is extracted from the files of one context, together; longer: 400", ge=1024)
    ] = 4 * 1024 * 1024
    file_text_cpu_s: Annotated[
        float, _about("CPU time for extracting texts from the files of one context, together; longer: 400", gt=0)
    ] = 20.0
    file_text_memory_bytes_max: Annotated[
        int, _about("memory of a process that extracts the text of a file; more: 400", ge=1024)
    ] = 512 * 1024 * 1024
    file_programs_max: Annotated[
        int,
        _about(
            "child processes of one process that extract texts, for one tenant all but one at most; more files wait for "
            "REPRISE_CONTEXT_WAIT_S",
            ge=1,
        ),
    ] = 2
    file_texts_cached_bytes_max: Annotated[int, _about("extracted texts that one process remembers", ge=0)] = (
        64 * 1024 * 1024
    )
    contexts_bytes_max: Annotated[
        int,
        _about(
            "contexts in one process at once, as JSON; in memory they take several times as much; more wait", ge=1024
        ),
    ] = 256 * 1024 * 1024
    context_wait_s: Annotated[
        float, _about("how long a request waits for room for its context or its reply; longer: 429", gt=0)
    ] = 30.0
    page_bytes_max: Annotated[
        int, _about("size of a list's page; a longer one ends early, but has at least one entry", ge=1024)
    ] = 16 * 1024 * 1024
    reads_bytes_max: Annotated[
        int, _about("stored responses and items that one process reads for replies at once; more wait", ge=1024)
    ] = 32 * 1024 * 1024
    foreground_runs_max: Annotated[int, _about("concurrent foreground runs of one process; beyond: 429", ge=1)] = 1_000
    token_counts_max: Annotated[
        int, _about("concurrent counts of one process by `/v1/responses/input_tokens`; beyond: 429", ge=1)
    ] = 100
    token_counts_cached_max: Annotated[int, _about("counts that one process remembers", ge=0)] = 10_000
    token_counts_cached_s: Annotated[float, _about("how long a count is remembered", ge=0)] = 3_600.0
    token_count_bytes_max: Annotated[
        int,
        _about(
            "an upstream's list of a prompt's tokens, or its prompt as text; longer: they are counted in another way",
            ge=1024,
        ),
    ] = 8 * 1024 * 1024
    turns_max: Annotated[int, _about("upstream completions in one run, without those of compactions", ge=1)] = 32
    compact_threshold_tokens: Annotated[
        int,
        _about(
            "tokens of a context beyond which `context_management` compacts, unless the request has its own", ge=1000
        ),
    ] = 100_000
    compaction_bytes_max: Annotated[
        int,
        _about(
            "a compaction's summary; longer: the run fails",
            ge=1024,
            le=1024 * 1024,
        ),
    ] = 512 * 1024
    reasoning_summaries_max: Annotated[
        int, _about("summaries of reasoning that a model makes in one run; reasoning after that has none", ge=0)
    ] = 32
    reasoning_summary_timeout_s: Annotated[
        float, _about("how long the answer waits for a summary of reasoning by a model; longer: there is none", gt=0)
    ] = 20.0
    reasoning_summary_bytes_max: Annotated[
        int, _about("what a model may send for one summary of reasoning; more: there is none", ge=1024)
    ] = 4 * 1024 * 1024
    run_duration_max_s: Annotated[float, _about("duration of a run", gt=0)] = 3_600.0
    turn_calls_max: Annotated[int, _about("calls in one completion; more: the run fails", ge=1)] = 1_000
    run_output_bytes_max: Annotated[
        int, _about("output of a run, as encoded events; the same limit holds for what its upstream sends", ge=1024)
    ] = 64 * 1024 * 1024
    run_events_max: Annotated[int, _about("output of a run, in events", ge=10)] = 500_000
    stream_head_wait_s: Annotated[
        float,
        _about(
            "how long a stream's response headers wait for the upstream, so that its refusal is an HTTP status", ge=0
        ),
    ] = 10.0
    stream_backlog_bytes_max: Annotated[
        int,
        _about(
            "backlog of one client's stream; beyond, a foreground run waits, and a background stream is read again later",
            ge=1024,
        ),
    ] = 1024 * 1024
    stream_wait_s: Annotated[
        float,
        _about("how long a foreground run waits for its client; then it ends as if the client had disconnected", gt=0),
    ] = 60.0
    unread_bytes_max: Annotated[
        int,
        _about(
            "backlog of all clients of one process; beyond, those that have read nothing for the longest time are "
            "disconnected",
            ge=1024,
        ),
    ] = 256 * 1024 * 1024
    send_timeout_s: Annotated[
        float, _about("how long a client may read nothing of what is sent to it; then it is disconnected", gt=0)
    ] = 30.0
    keepalive_s: Annotated[float, _about("silence of a stream after which an SSE comment is sent", gt=0)] = 15.0
    keepalive_events: Annotated[
        bool, _about("whether a `keepalive` event is sent instead, for clients and proxies that count events only")
    ] = False
    upstream_attempts_max: Annotated[int, _about("attempts at one upstream before its first chunk", ge=1)] = 3
    upstream_retry_after_max_s: Annotated[
        float, _about("longest Retry-After that is waited for; a longer one is passed on", ge=0)
    ] = 5.0
    upstream_connect_timeout_s: Annotated[float, _about("connecting to an upstream", gt=0)] = 5.0
    upstream_answer_timeout_s: Annotated[
        float, _about("an upstream's first token, or its whole answer if it does not stream", gt=0)
    ] = 600.0
    upstream_idle_timeout_s: Annotated[float, _about("silence of an upstream within a stream", gt=0)] = 120.0
    models_wait_s: Annotated[float, _about("how long `/v1/models` waits for an upstream's list", gt=0)] = 5.0
    upstream_line_bytes_max: Annotated[
        int, _about("one line of an upstream's stream, or its whole answer if it does not stream", ge=1024)
    ] = 4 * 1024 * 1024
    upstream_error_bytes_max: Annotated[int, _about("body of an upstream's error; longer: truncated", ge=1024)] = (
        64 * 1024
    )
    upstream_connections_max: Annotated[int, _about("open connections to one upstream", ge=1)] = 2_000
    outbound_allow: Annotated[
        str, _about("private hosts and networks that may be called on behalf of clients; comma-separated")
    ] = ""
    tool_connect_timeout_s: Annotated[float, _about("connecting to a tool server, with the MCP handshake", gt=0)] = 10.0
    tool_list_timeout_s: Annotated[float, _about("listing a tool server's tools, all pages", gt=0)] = 30.0
    tool_call_timeout_s: Annotated[float, _about("one tool call", gt=0)] = 120.0
    tool_servers_max: Annotated[int, _about("MCP servers that one request may declare", ge=1)] = 32
    tool_headers_max: Annotated[int, _about("headers of one MCP server that a request declares", ge=1)] = 64
    tool_headers_bytes_max: Annotated[
        int, _about("headers and `authorization`s of all MCP servers that a request declares", ge=64)
    ] = 64 * 1024
    tool_credentials_tenant_max: Annotated[
        int, _about("stored credentials for tool servers of one tenant; beyond: 400", ge=0)
    ] = 10_000
    tool_credentials_holder_max: Annotated[
        int, _about("those of them that are for one user, or one key; beyond: 400", ge=0)
    ] = 100
    tool_credential_bytes_max: Annotated[
        int, _about("`authorization` and headers of one stored credential; longer: 400", ge=64)
    ] = 8 * 1024
    tool_calls_at_once_max: Annotated[int, _about("concurrent tool calls of one run; more wait", ge=1)] = 8
    tool_answer_bytes_max: Annotated[
        int,
        _about(
            "a tool server's answer on the wire, images included, over HTTP+SSE at most 1 MiB; longer: the call fails",
            ge=1024,
        ),
    ] = 8 * 1024 * 1024
    tool_arguments_bytes_max: Annotated[
        int, _about("the arguments of a call that this server makes; longer: the call fails", ge=1024)
    ] = 1024 * 1024
    tool_output_bytes_max: Annotated[
        int, _about("text of a tool's result; longer: truncated, with a note", ge=1024)
    ] = 1024 * 1024
    tool_programs_max: Annotated[
        int, _about("child processes of one tool server with a `command`; more tenants, or runs, wait", ge=1)
    ] = 16
    tool_program_idle_s: Annotated[float, _about("how long a child process that no run uses is kept", ge=0)] = 300.0
    tools_max: Annotated[
        int, _about("tools of one request, with those inside namespaces and those that its input adds", ge=1)
    ] = 1_000
    tools_named_max: Annotated[
        int, _about("names in one list of an MCP server's tools, such as `allowed_tools`", ge=1)
    ] = 1_000
    tool_list_bytes_max: Annotated[
        int, _about("a tool server's list of tools, all pages; longer: listing it fails", ge=1024)
    ] = 4 * 1024 * 1024
    tool_list_pages_max: Annotated[int, _about("pages of a tool server's list of tools", ge=1)] = 100
    tools_listed_max: Annotated[int, _about("tools of one tool server; more: listing it fails", ge=1)] = 1_000
    database_pool_size: Annotated[int, _about("Postgres connections of one process, plus one for heartbeats", ge=1)] = (
        10
    )
    database_timeout_s: Annotated[float, _about("connecting, waiting for a connection, one statement", gt=0)] = 10.0
    database_retry_s: Annotated[
        float, _about("how long the commit of a finished run is retried while Postgres is unavailable", gt=0)
    ] = 30.0
    workers_in_api: Annotated[
        bool, _about("whether `serve` makes background responses too, not only `worker` processes")
    ] = True
    worker_runs_max: Annotated[int, _about("concurrent background runs of one process", ge=1)] = 200
    queued_runs_tenant_max: Annotated[int, _about("queued background runs of one tenant; beyond: 429", ge=1)] = 10_000
    queued_runs_max: Annotated[int, _about("queued background runs in all; beyond: 429", ge=1)] = 100_000
    run_attempts_max: Annotated[
        int, _about("attempts at a background run; it fails if the worker of the last one dies", ge=1)
    ] = 5
    event_ttl_s: Annotated[
        float, _about("how long Redis keeps the events of a run after its end; Postgres keeps them longer", gt=0)
    ] = 60.0
    poll_s: Annotated[float, _about("interval at which the queue, and the rows of silent runs, are polled", gt=0)] = 1.0
    redis_timeout_s: Annotated[float, _about("connecting to Redis, one command", gt=0)] = 2.0
    redis_prefix: Annotated[str, _about("prefix of this server's keys in Redis")] = "reprise"
    lease_s: Annotated[float, _about("how long a process keeps its runs without a heartbeat", gt=0)] = 15.0
    usage_ledger_s: Annotated[
        float,
        _about("how long the usage of each run is kept by itself, before it is added to that of its day", ge=1),
    ] = 3_600.0
    audit_days: Annotated[
        int, _about("how long entries of the audit log are kept; 0: no limit", ge=0, le=1_000_000)
    ] = 0
    key_cache_s: Annotated[float, _about("how long a revoked key may still be accepted", ge=0)] = 5.0
    jwt_bytes_max: Annotated[int, _about("a bearer JWT; longer: 401", ge=256)] = 16 * 1024
    jwks_cache_s: Annotated[float, _about("how long an issuer's keys are used before they are fetched again", gt=0)] = (
        300.0
    )
    jwks_stale_s: Annotated[
        float, _about("how much longer they are used while the issuer can't be reached; then: 503", ge=0)
    ] = 3_600.0
    jwks_cooldown_s: Annotated[
        float, _about("the shortest time between two fetches of an issuer's keys, whatever keys tokens name", ge=1)
    ] = 30.0
    jwks_timeout_s: Annotated[float, _about("fetching an issuer's keys", gt=0)] = 5.0
    jwks_bytes_max: Annotated[int, _about("an issuer's keys, as JSON; longer: they are not fetched", ge=1024)] = (
        256 * 1024
    )
    agents_tenant_max: Annotated[int, _about("agents of one tenant; more: 400", ge=1)] = 1_000
    agent_bytes_max: Annotated[int, _about("an agent's definition, as JSON; longer: 413", ge=1024)] = 1024 * 1024
    agent_cache_s: Annotated[
        float, _about("how long a request may still get an agent as it was before a change by another process", ge=0)
    ] = 5.0
    agents_cached_bytes_max: Annotated[int, _about("agents that one process remembers", ge=0)] = 32 * 1024 * 1024
    auth_attempts_per_minute: Annotated[
        int,
        _about("failed attempts to authenticate of one client address in a minute; the replies to more wait", ge=1),
    ] = 60
    auth_delay_max_s: Annotated[float, _about("how long the reply to a failed attempt waits at most", ge=0)] = 5.0
    proxies: Annotated[
        str,
        _about("addresses and networks of proxies whose `X-Forwarded-For` names the client; comma-separated"),
    ] = ""
    key_overlap_s: Annotated[
        float,
        _about(
            "how long earlier secrets of a rotated key stay valid at most, unless the rotation states it",
            ge=0,
            le=KEY_OVERLAP_S_MAX,
        ),
    ] = 86_400.0
    tenant_requests_per_minute: Annotated[
        int,
        _about(
            "requests of one tenant in a minute, unless it has a limit of its own; beyond: 429; 0: no limit",
            ge=0,
            le=LIMIT_MAX,
        ),
    ] = 0
    tenant_tokens_per_minute: Annotated[
        int,
        _about(
            "tokens of one tenant in a minute, unless it has a limit of its own; beyond: 429; 0: no limit",
            ge=0,
            le=LIMIT_MAX,
        ),
    ] = 0
    tenant_concurrent_runs: Annotated[
        int,
        _about(
            "runs of one tenant at once, background runs that wait included; beyond: 429; 0: no limit",
            ge=0,
            le=LIMIT_MAX,
        ),
    ] = 0
    tenant_stored_bytes: Annotated[
        int,
        _about(
            "what one tenant may store, unless it has a limit of its own; beyond: 403; 0: no limit", ge=0, le=10**15
        ),
    ] = 0
    stored_bytes_age_s: Annotated[
        float, _about("how old the measurement of what is stored may become, where that is limited", gt=0)
    ] = 60.0
    key_requests_per_minute: Annotated[
        int, _about("requests of one key in a minute, unless it has a limit of its own", ge=0, le=LIMIT_MAX)
    ] = 0
    key_tokens_per_minute: Annotated[
        int, _about("tokens of one key in a minute, unless it has a limit of its own", ge=0, le=LIMIT_MAX)
    ] = 0
    key_concurrent_runs: Annotated[
        int, _about("runs of one key at once, unless it has a limit of its own", ge=0, le=LIMIT_MAX)
    ] = 0
    key_stored_bytes: Annotated[
        int,
        _about(
            "what the user of one key may store, or without one its tenant, unless the key has a limit of its own; beyond: 403",
            ge=0,
            le=10**15,
        ),
    ] = 0
    quota_output_tokens: Annotated[
        int, _about("output that a request without `max_output_tokens` reserves of a limit of tokens", ge=0)
    ] = 1_024
    quota_timeout_s: Annotated[
        float, _about("how long a request, or the end of a run, waits for Redis to count it", gt=0)
    ] = 0.5
    quota_outage: Annotated[
        Literal["allow", "refuse"],
        _about("whether requests that have limits are let through, or refused with 503, while Redis does not answer"),
    ] = "allow"
    shutdown_grace_s: Annotated[float, _about("how long running requests may finish after SIGTERM", ge=0)] = 10.0
    shutdown_delay_s: Annotated[
        float,
        _about("the part of it in which new connections are still accepted, while `/readyz` is already 503", ge=0),
    ] = 1.0

    @property
    def data_path(self) -> Path:
        """The data directory, absolute; the default one does not depend on the working directory."""
        if self.data_dir == DATA_DIR and (PROJECT / "pyproject.toml").exists():
            return PROJECT / DATA_DIR
        return Path(self.data_dir).expanduser().absolute()


def variable(field: str) -> str:
    """The environment variable of a field."""
    return PLAIN_NAMES.get(field) or f"REPRISE_{field.upper()}"


SWITCHES = dict.fromkeys(("true", "t", "yes", "y", "on", "1"), True) | dict.fromkeys(
    ("false", "f", "no", "n", "off", "0"), False
)
"""The usual spellings of a boolean, in lower case."""

_LEVELS = {"warn": "warning", "fatal": "critical"}


def _spelt(text: str, plain: Any) -> str | bool:
    """Booleans and choices in their usual spelling; only in other texts do spaces and capitals matter."""
    if plain is str:
        return text
    small = text.strip().lower()
    return SWITCHES.get(small, small) if plain is bool else _LEVELS.get(small, small)


def _choices(plain: Any) -> str:
    """The allowed values, where there are few."""
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
            raise SettingsError(f"{name} is not a setting of Reprise{hint}")
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
            raise SettingsError(f"{name}={text!r} is not valid: expected a finite number")
    for name, parse in (("outbound_allow", parse_allowed), ("proxies", parse_networks)):
        try:
            parse(values.get(name, ""))
        except ValueError as error:
            raise SettingsError(f"{variable(name)}={values[name]!r} is not valid: {error}.") from None
    return Settings(**values)
