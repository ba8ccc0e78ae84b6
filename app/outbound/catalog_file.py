"""Reads the catalog's file. An error is one line with the file, the entry and the values that are allowed."""

import re
import tomllib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import msgspec
from msgspec.structs import replace

from app.domain.agents import NAME_RULE, CatalogAgent, NamedAgent, is_agent_name
from app.domain.dialect import PRESETS, Dialect
from app.domain.hosted import HostedRoute, Kind
from app.domain.issuers import Issuer
from app.domain.prices import Prices
from app.domain.prompt_templates import Prompt, PromptVersion
from app.domain.tools.table import HOSTED, KINDS
from app.errors import ApiError
from app.outbound.agents import check
from app.outbound.catalog import KEY, Catalog, ModelEntry, SummaryModel, ToolServerEntry, UpstreamEntry
from app.outbound.issuer_keys import UNSAFE, is_safe
from app.outbound.toolserver import http_url
from app.settings import SWITCHES, Settings, SettingsError
from app.wire.keys import choices, nearest, suggestion

_AT = re.compile(r" - at `(?:key` in `)?\$(?P<path>[^`]*)`$")
_UNKNOWN_KEY = re.compile(r"unknown field `(?P<name>[^`]*)`")
_UPSTREAM_NAME = re.compile(r"[^\s@]{1,64}")
_LABEL = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e]*")
_OF_CONNECTIONS = frozenset({"connection", "content-length", "host", "transfer-encoding"})
_VARIABLE = re.compile(r"\$\{\w")
"""A variable of a shell or of Compose, which a catalog does not expand."""
_PLACEHOLDER = re.compile(r"\$\{?(?P<name>\w*)")

NO_URL = "is no http:// or https:// URL"


def load_catalog(settings: Settings, environ: Mapping[str, str], *, demo_url: str = "") -> Catalog:
    """The file of REPRISE_CATALOG; without it one upstream from OPENAI_BASE_URL, or the demo at `demo_url`.

    Raises SettingsError.
    """
    if not settings.catalog:
        if settings.openai_base_url:
            if fault := _fault_of_url(settings.openai_base_url):
                raise SettingsError(f"OPENAI_BASE_URL {fault}.")
            if not KEY.fullmatch(settings.openai_api_key):
                raise SettingsError("OPENAI_API_KEY holds characters that no key has.")
            entry = UpstreamEntry(base_url=settings.openai_base_url, key=settings.openai_api_key)
            return Catalog(upstreams={"default": entry})
        return Catalog(upstreams={"echo": UpstreamEntry(base_url=demo_url, dialect="plain")})
    catalog = _read(Path(settings.catalog))
    fault = next(chain(_faults(catalog, settings), _faults_of_issuers(catalog, settings)), None)
    if fault:
        raise SettingsError(f"{settings.catalog}: {fault}.")
    return _with_secrets(settings.catalog, catalog, environ)


# -- Reading ----------------------------------------------------------------------------------------------------------------


def _read(path: Path) -> Catalog:
    try:
        raw = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise SettingsError(f"REPRISE_CATALOG={str(path)!r} can't be read: {error.strerror}.") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"{path}: {error}") from None
    _read_switches(raw)
    _fill_in_presets(path, raw)
    _encode_tools(raw)
    _refuse_unknown_kinds(path, raw)
    for entry, value, type_ in _entries(raw):
        _convert(path, value, type_, entry)
    catalog: Catalog = _convert(path, raw, Catalog, "")
    return catalog


def _of(raw: Mapping[str, Any], section: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The entries of a section that are tables, by name."""
    entries = raw.get(section)
    for name, entry in entries.items() if isinstance(entries, dict) else ():
        if isinstance(entry, dict):
            yield name, entry


def _read_switches(raw: dict[str, Any]) -> None:
    """Accept the spellings of booleans that the settings accept."""
    tables: list[tuple[Any, Any]] = [
        (raw, Catalog),
        *((one.get("dialect"), Dialect) for _, one in _of(raw, "upstreams")),
        *((one, Issuer) for _, one in _of(raw, "issuers")),
    ]
    for table, type_ in tables:
        for field in msgspec.structs.fields(type_) if isinstance(table, dict) else ():
            if field.name in table and bool in (field.type, *get_args(field.type)):
                table[field.name] = SWITCHES.get(str(table[field.name]).strip().lower(), table[field.name])


def _fill_in_presets(path: Path, raw: Mapping[str, Any]) -> None:
    """Merge a dialect with its preset; `lacks` and `takes` are added to the preset's."""
    for name, upstream in _of(raw, "upstreams"):
        dialect = upstream.get("dialect")
        if isinstance(dialect, str):
            upstream["dialect"] = dialect.lower()
        if not isinstance(dialect, dict) or "preset" not in dialect:
            continue
        preset = str(dialect.pop("preset")).lower()
        if preset not in PRESETS:
            raise SettingsError(
                f"{path}: [upstreams.{name}]: there is no preset {preset!r}; it may be {', '.join(PRESETS)}"
            )
        base = msgspec.to_builtins(PRESETS[preset])
        added = {key: [*base[key], *dialect[key]] for key in ("lacks", "takes") if isinstance(dialect.get(key), list)}
        upstream["dialect"] = {**base, **dialect, **added}


def _encode_tools(raw: Mapping[str, Any]) -> None:
    """The tools of prompts and agents become JSON, which the API's own decoder reads."""
    agents = raw.get("agents")
    tabled = [one for one in agents.values() if isinstance(one, dict)] if isinstance(agents, dict) else []
    for version in (*(version for _, version in _versions(raw)), *tabled):
        if isinstance(version.get("tools"), list):
            version["tools"] = [msgspec.Raw(msgspec.json.encode(tool)) for tool in version["tools"]]
        if "tool_choice" in version:
            version["tool_choice"] = msgspec.Raw(msgspec.json.encode(version["tool_choice"]))


def _versions(raw: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each version of a prompt, and the name of its entry."""
    prompts = raw.get("prompts")
    for id, prompt in prompts.items() if isinstance(prompts, dict) else ():
        versions = prompt.get("versions") if isinstance(prompt, dict) else None
        for number, version in versions.items() if isinstance(versions, dict) else ():
            if isinstance(version, dict):
                yield f"[prompts.{id}.versions.{number}]", version


def _refuse_unknown_kinds(path: Path, raw: Mapping[str, Any]) -> None:
    hosted, known = raw.get("hosted"), HOSTED.keys()
    for kind in hosted if isinstance(hosted, dict) else ():
        if kind not in known:
            near = KINDS.get(kind) or nearest(kind, known)
            hint = f"; did you mean `{near}`?" if near else ""
            raise SettingsError(
                f"{path}: [hosted.{kind}]: there is no such tool; it may be {', '.join(sorted(known))}{hint}"
            )


def _entries(raw: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Each entry with its type: errors of the whole catalog do not name the entry."""
    yield from ((entry, version, PromptVersion) for entry, version in _versions(raw))
    types = {field.name: field.type for field in msgspec.structs.fields(Catalog)}
    sections = {
        "upstreams": UpstreamEntry,
        "tool_servers": ToolServerEntry,
        "hosted": types["hosted"].__args__[1],
        "prompts": Prompt,
        "issuers": Issuer,
        "agents": CatalogAgent,
    }
    for section, type_ in sections.items():
        entries = raw.get(section)
        for name, value in entries.items() if isinstance(entries, dict) else ():
            yield f"[{section}.{name}]", value, type_
    models = raw.get("models")
    for number, value in enumerate(models if isinstance(models, list) else (), 1):
        name = value.get("name") if isinstance(value, dict) else None
        yield f"[[models]] {name!r}" if isinstance(name, str) else f"[[models]] number {number}", value, ModelEntry


def _convert(path: Path, value: Any, type_: Any, entry: str) -> Any:
    try:
        return msgspec.convert(value, type_)
    except msgspec.ValidationError as error:
        message = f"{entry}: {error}" if entry else str(error)
        raise SettingsError(f"{path}: {message}{_hint(str(error), type_)}") from None


def _hint(message: str, type_: Any) -> str:
    """What may stand where the value is wrong."""
    at = _AT.search(message)
    path = at["path"] if at else ""
    if unknown := _UNKNOWN_KEY.search(message):
        near = suggestion(type_, path, unknown["name"])
        return f"; did you mean `{near}`?" if near else ""
    known = choices(type_, path) if "enum value" in message else []
    return f"; it may be {', '.join(known)}" if known else ""


# -- Checking ---------------------------------------------------------------------------------------------------------------


def _faults(catalog: Catalog, settings: Settings) -> Iterator[str]:
    yield from _faults_of_names(catalog)
    yield from _faults_of_variables(catalog)
    yield from _faults_of_urls(catalog)
    yield from _faults_of_models(catalog)
    yield from _faults_of_prices(catalog)
    yield from _faults_of_headers(catalog)
    yield from _faults_of_tools(catalog)
    yield from _faults_of_prompts(catalog)
    yield from _faults_of_agents(catalog, settings)


def _faults_of_names(catalog: Catalog) -> Iterator[str]:
    for name in catalog.upstreams:
        if not _UPSTREAM_NAME.fullmatch(name):
            yield f"[upstreams.{name!r}]: a name has up to 64 characters, and neither spaces nor '@'"
    for name in catalog.tool_servers:
        if not _LABEL.fullmatch(name):
            yield f"[tool_servers.{name!r}]: a name has up to 64 letters, digits, '_' and '-'"
    if catalog.default and catalog.default not in catalog.upstreams:
        yield f"'default' names an unknown upstream '{catalog.default}'; there are {', '.join(catalog.upstreams)}"


def _faults_of_variables(catalog: Catalog) -> Iterator[str]:
    for name, upstream in catalog.upstreams.items():
        if any(map(_VARIABLE.search, (upstream.base_url, upstream.key, *upstream.headers.values()))):
            yield f"[upstreams.{name}]: ${{…}} is not filled in; 'key_env' names the environment variable of a key"
    for name, server in catalog.tool_servers.items():
        if any(map(_VARIABLE.search, (server.url, server.authorization, *server.headers.values()))):
            yield f"[tool_servers.{name}]: ${{…}} is not filled in; 'authorization_env' names an environment variable"


def _faults_of_urls(catalog: Catalog) -> Iterator[str]:
    for name, upstream in catalog.upstreams.items():
        if fault := _fault_of_url(upstream.base_url):
            yield f"[upstreams.{name}]: 'base_url' {fault}"
    for name, server in catalog.tool_servers.items():
        if server.url and http_url(server.url) is None:
            yield f"[tool_servers.{name}]: 'url' {NO_URL}"


def _fault_of_url(text: str) -> str | None:
    """What is wrong with an upstream's URL. It is not quoted: with two variables swapped it is a key."""
    url = http_url(text)
    if url is None:
        return NO_URL
    if url.userinfo:
        return "holds a user or a password, which a catalog's 'headers' may send as 'authorization'"
    return None


def _faults_of_models(catalog: Catalog) -> Iterator[str]:
    for index, model in enumerate(catalog.models):
        for route in model.routes:
            if route.upstream not in catalog.upstreams:
                known = ", ".join(catalog.upstreams)
                yield f"model '{model.name}' names an unknown upstream '{route.upstream}'; there are {known}"
        if isinstance(model.reasoning_summary, SummaryModel):
            try:
                catalog.routes(model.reasoning_summary.model)
            except ApiError as error:
                yield f"model '{model.name}': 'reasoning_summary': {error.message.removesuffix('.')}"
        for earlier in catalog.models[:index]:
            if fnmatchcase(model.name, earlier.name):
                yield f"model '{model.name}' is never reached: '{earlier.name}' stands before it and matches"


def _faults_of_prices(catalog: Catalog) -> Iterator[str]:
    priced: list[tuple[str, Prices | None]] = [
        (f"[upstreams.{name}]", one.prices) for name, one in catalog.upstreams.items()
    ]
    for entry, prices in priced:
        yield from (f"{entry}: {fault}" for fault in (prices.faults() if prices else ()))
    for model in catalog.models:
        of_model = {"prices": model.prices} | {
            f"routes[{at}].prices": one.prices for at, one in enumerate(model.routes)
        }
        for path, prices in of_model.items():
            yield from (f"model '{model.name}': {fault}" for fault in (prices.faults(path) if prices else ()))
        if model.run_limits and model.run_limits.cost is not None:
            needs = f"model '{model.name}': 'run_limits.cost' needs prices, and"
            for at, route in enumerate(catalog.priced(model)):
                if not route.prices:
                    yield f"{needs} 'routes[{at}]' has none"
            summary = model.reasoning_summary
            if isinstance(summary, SummaryModel) and not catalog.is_priced(summary.model, is_summarized=False):
                yield f"{needs} the model of 'reasoning_summary' has none"


def _faults_of_headers(catalog: Catalog) -> Iterator[str]:
    entries = {f"[upstreams.{name}]": entry.headers for name, entry in catalog.upstreams.items()}
    entries |= {f"[tool_servers.{name}]": entry.headers for name, entry in catalog.tool_servers.items()}
    for entry, headers in entries.items():
        for name, value in headers.items():
            if not _HEADER_NAME.fullmatch(name):
                yield f"{entry}: {name!r} is no name of a header"
            if name.lower() in _OF_CONNECTIONS:
                yield f"{entry}: header '{name}' is the connection's own and can't be set"
            if not _HEADER_VALUE.fullmatch(value):
                yield f"{entry}: the value of header '{name}' holds characters that no header may"


def _faults_of_tools(catalog: Catalog) -> Iterator[str]:
    for name, server in catalog.tool_servers.items():
        if bool(server.url) == bool(server.command):
            yield f"tool server '{name}' needs either 'url' or 'command'"
    for kind, route in catalog.hosted.items():
        if route.server not in catalog.tool_servers:
            known = ", ".join(catalog.tool_servers) or "none"
            yield f"hosted '{kind}' names an unknown tool server '{route.server}'; there are {known}"
        yield from _faults_of_arguments(kind, route)
        for name in route.fields:
            if name not in HOSTED[kind].result_keys:
                known = ", ".join(HOSTED[kind].result_keys) or "none"
                yield f"hosted '{kind}': there is no field '{name}'; there are {known}"


def _faults_of_arguments(kind: Kind, route: HostedRoute) -> Iterator[str]:
    known = HOSTED[kind].placeholders
    for name, value in route.arguments.items():
        if isinstance(value, str) and value.startswith("$"):
            if value[1:] not in known:
                yield f"hosted '{kind}': there is no '{value}'; there are {', '.join(f'${one}' for one in sorted(known))}"
            continue
        for text in _texts(value):
            if text.startswith("$") or any(one["name"] in known for one in _PLACEHOLDER.finditer(text)):
                yield f"hosted '{kind}': '{text}' in '{name}' is not filled in: a placeholder is a whole argument"


def _faults_of_prompts(catalog: Catalog) -> Iterator[str]:
    for id, prompt in catalog.prompts.items():
        if prompt.default and prompt.default not in prompt.versions:
            yield f"[prompts.{id}]: 'default' names an unknown version '{prompt.default}'; there are {', '.join(prompt.versions)}"
        for number, version in prompt.versions.items():
            try:
                if version.model is not None:
                    yield from _faults_of_model(catalog, f"[prompts.{id}.versions.{number}]", version.model)
                yield from (f"[prompts.{id}.versions.{number}]: {fault}" for fault in version.faults())
                request = version.as_request()
                if version.model is not None:
                    agent = catalog.agents.get(version.model)
                    model = agent.model if agent else version.model
                    catalog.refuse_unpriced(version.run_limits, model, is_summarized=request.asks_for_summary)
            except ApiError as error:
                yield f"[prompts.{id}.versions.{number}]: {error.with_path}"


def _faults_of_issuers(catalog: Catalog, settings: Settings) -> Iterator[str]:
    issuers = list(catalog.issuers.items())
    for number, (name, issuer) in enumerate(issuers):
        entry = f"[issuers.{name}]"
        if not _LABEL.fullmatch(name):
            yield f"[issuers.{name!r}]: a name has up to 64 letters, digits, '_' and '-'"
        yield from (f"{entry}: {fault}" for fault in issuer.faults())
        address = issuer.jwks_url or ("" if issuer.jwks_file or issuer.secret_env else issuer.issuer)
        if address and not is_safe(address, settings):
            yield f"{entry}: {UNSAFE[0].lower()}{UNSAFE[1:-1]}"
        if others := [other for other, earlier in issuers[:number] if earlier.issuer == issuer.issuer]:
            yield f"{entry}: [issuers.{others[0]}] has the same issuer"


def _faults_of_model(catalog: Catalog, entry: str, name: str) -> Iterator[str]:
    """Raises NotFound."""
    agent = catalog.agents.get(name)
    if agent is None:
        catalog.routes(name)
    elif agent.overrides != "all":
        yield f"{entry}: 'model' names the agent '{name}', whose 'overrides' would have to be \"all\""


def _faults_of_agents(catalog: Catalog, settings: Settings) -> Iterator[str]:
    for name, agent in catalog.agents.items():
        if not is_agent_name(name):
            yield f"[agents.{name!r}]: a name has {NAME_RULE}"
        if name in catalog.model_names:
            yield f"[agents.{name}]: a model of [[models]] has this name"
        try:
            check(NamedAgent(name, agent, 0), catalog, settings, catalog.agents)
        except ApiError as error:
            yield f"[agents.{name}]: {error.with_path}"


def _texts(value: Any) -> Iterator[str]:
    """The strings in a TOML value, at any depth."""
    match value:
        case str():
            yield value
        case dict():
            for one in value.values():
                yield from _texts(one)
        case list():
            for one in value:
                yield from _texts(one)


# -- Secrets ----------------------------------------------------------------------------------------------------------------


def _with_secrets(path: str, catalog: Catalog, environ: Mapping[str, str]) -> Catalog:
    upstreams = {}
    for name, upstream in catalog.upstreams.items():
        key = _secret(path, f"upstream '{name}'", upstream.key_env, environ) or upstream.key
        if not KEY.fullmatch(key):
            raise SettingsError(f"{path}: the key of upstream '{name}' holds characters that no key has.")
        upstreams[name] = replace(upstream, key=key)
    tool_servers = {}
    for name, server in catalog.tool_servers.items():
        token = _secret(path, f"tool server '{name}'", server.authorization_env, environ)
        tool_servers[name] = replace(server, authorization=token or server.authorization)
    issuers = {name: _with_keys(path, name, issuer, environ) for name, issuer in catalog.issuers.items()}
    return replace(catalog, upstreams=upstreams, tool_servers=tool_servers, issuers=issuers)


def _with_keys(path: str, name: str, issuer: Issuer, environ: Mapping[str, str]) -> Issuer:
    """An issuer with the secret that it names, and with its file of keys, which is named from where the catalog is."""
    made = replace(
        issuer,
        secret=_secret(path, f"issuer '{name}'", issuer.secret_env, environ),
        jwks_file=str(Path(path).parent / issuer.jwks_file) if issuer.jwks_file else "",
    )
    if fault := next(made.faults_of_secret(), None):
        raise SettingsError(f"{path}: [issuers.{name}]: {fault}.")
    if made.jwks_file and not Path(made.jwks_file).is_file():
        raise SettingsError(f"{path}: [issuers.{name}]: there is no file {made.jwks_file}.")
    return made


def _secret(path: str, of: str, name: str, environ: Mapping[str, str]) -> str:
    """The value of the environment variable that an entry names, or an empty string."""
    if name and not environ.get(name):
        raise SettingsError(f"{path}: {of} needs the environment variable {name}.")
    return environ[name] if name else ""
