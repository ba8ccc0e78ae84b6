"""The catalog: the operator's TOML file of upstreams and models.

    [upstreams.local]
    base_url = "http://127.0.0.1:8001/v1"
    key_env = "LOCAL_KEY"                      # the environment variable that holds the key
    dialect = { preset = "vllm", lacks = ["json_object"] }   # or "vllm" alone; detected if absent

    [[models]]
    name = "qwen*"                             # a name or a pattern; the first that matches is used
    routes = [{ upstream = "local" }, { upstream = "spare", model = "qwen3-8b" }]   # in order, for failover
    prices = { input = 0.1, output = 0.4 }     # of a million tokens; a route and an upstream may have their own

    [tool_servers.search]                      # an MCP server; clients may name it by its label, without a URL
    url = "http://127.0.0.1:9000/mcp"          # or a program: command = ["python", "-m", "app.toolservers.sandbox"]
    authorization_env = "SEARCH_TOKEN"

    [hosted.web_search]                        # the tool that serves a hosted type; app/domain/hosted.py maps it
    server = "search"
    tool = "search"
    arguments = { q = "$query", limit = 10 }

    [prompts.greeting.versions.1]              # a template for requests; app/domain/prompt_templates.py fills it in
    instructions = "Greet {{name}}."
    variables = { name = "string" }

    [issuers.company]                          # whose bearer JWTs are taken; app/domain/issuers.py
    issuer = "https://login.example.com"
    audience = "reprise"
    algorithms = ["RS256"]
    tenant = "acme"
    claims = { user = "sub", scopes = "scope" }

    [agents.greeter]                           # a model with instructions, tools and parameters; app/domain/agents.py
    model = "qwen3"
    instructions = "Greet people."

A model that no entry names goes to the `default` upstream, or to the only one; `local@qwen3` names an upstream directly.
"""

import re
import sys
from fnmatch import fnmatchcase
from typing import Annotated, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import replace

from app.domain.agents import CatalogAgent
from app.domain.dialect import PRESETS, Dialect, Lack, Preset, preset_of_host
from app.domain.hosted import HostedRoute, Kind
from app.domain.issuers import Issuer
from app.domain.prices import Prices
from app.domain.prompt_templates import Prompt
from app.errors import InvalidParameter, NotFound
from app.outbound.toolserver import Shared, ToolServer
from app.wire.run_limits import RunLimits

ENGINE_PARAMETERS = frozenset(
    # sampling and stopping, common to the engines
    "top_k min_p top_a typical_p repetition_penalty length_penalty no_repeat_ngram_size seed stop stop_token_ids "
    "include_stop_str_in_output ignore_eos min_tokens logit_bias skip_special_tokens spaces_between_special_tokens "
    "truncate_prompt_tokens bad_words prompt_logprobs allowed_token_ids repetition_detection "
    # templates and reasoning
    "chat_template chat_template_kwargs add_generation_prompt continue_final_message add_special_tokens documents "
    "enable_thinking thinking thinking_budget thinking_token_budget think include_reasoning separate_reasoning "
    "stream_reasoning reasoning_format reasoning_budget_tokens thinking_forced_open parse_tool_calls mm_processor_kwargs "
    "media_io_kwargs "
    # guided decoding
    "guided_json guided_regex guided_choice guided_grammar guided_decoding_backend guided_whitespace_pattern "
    "structured_outputs grammar json_schema regex ebnf "
    # scheduling and caching
    "priority cache_salt cache_prompt id_slot keep_alive num_ctx kv_transfer_params lora_path lora vllm_xargs n_keep "
    "n_cache_reuse t_max_predict_ms return_token_ids return_tokens_as_token_ids "
    # llama.cpp's samplers
    "repeat_penalty repeat_last_n mirostat mirostat_tau mirostat_eta dynatemp_range dynatemp_exponent xtc_probability "
    "xtc_threshold dry_multiplier dry_base dry_allowed_length dry_penalty_last_n dry_sequence_breakers top_n_sigma "
    "adaptive_target adaptive_decay min_keep samplers".split()
)
"""Parameters beyond the API that vLLM, SGLang, llama.cpp and Ollama take; an upstream's `pass` adds to them."""

KEY = re.compile(r"[\x21-\x7e]*")
"""The characters that an upstream's key may have."""


Seconds = Annotated[float, Meta(gt=0, le=sys.float_info.max)]


class UpstreamEntry(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[upstreams.NAME]`; times in seconds; the settings are the defaults."""

    base_url: Annotated[str, Meta(pattern="^https?://")]
    key_env: str = ""
    key: str = ""
    headers: dict[str, str] = {}
    dialect: Dialect | Preset | None = None
    also_passed_on: frozenset[str] = msgspec.field(default=frozenset(), name="pass")
    connect_timeout_s: Seconds | None = None
    answer_timeout_s: Seconds | None = None
    idle_timeout_s: Seconds | None = None
    attempts_max: Annotated[int, Meta(ge=1)] | None = None
    context_tokens: Annotated[int, Meta(ge=1)] | None = None
    """The size of its models' context, if it does not refuse what is longer."""
    prices: Prices | None = None
    """Those of its models that have none."""

    def takes(self, parameter: str) -> bool:
        """Whether a parameter beyond the API goes to this upstream."""
        return parameter in ENGINE_PARAMETERS or parameter in self.also_passed_on

    @property
    def address(self) -> str:
        """The base URL without its query, which may hold a key."""
        return self.base_url.partition("?")[0]

    @property
    def speaks(self) -> Dialect:
        """The dialect by the catalog or the host, else the plain one."""
        if isinstance(self.dialect, Dialect):
            return self.dialect
        preset = self.dialect or preset_of_host(urlsplit(self.base_url).hostname)
        return PRESETS[preset] if preset else Dialect()

    @property
    def dialect_name(self) -> str | None:
        """The name of the dialect; None if it must be detected."""
        if isinstance(self.dialect, Dialect):
            return "the catalog's own"
        return self.dialect or preset_of_host(urlsplit(self.base_url).hostname)


class Route(Struct, frozen=True, forbid_unknown_fields=True):
    """An upstream, the model's name there (default: the requested name), the size of its context (default: the upstream's), what
    this model lacks beyond its upstream's dialect, and its prices (default: the model's, then the upstream's)."""

    upstream: str
    model: str = ""
    context_tokens: Annotated[int, Meta(ge=1)] | None = None
    lacks: frozenset[Lack] = frozenset()
    prices: Prices | None = None


class SummaryModel(Struct, frozen=True, forbid_unknown_fields=True):
    """The model that makes the summaries of reasoning, by its name in the catalog."""

    model: Annotated[str, Meta(min_length=1)]


ReasoningSummary = Literal["verbatim", "off"] | SummaryModel
"""What `reasoning.summary` gives: the reasoning word for word, nothing, or what a model makes of it."""


class ModelEntry(Struct, frozen=True, forbid_unknown_fields=True):
    """`[[models]]`."""

    name: Annotated[str, Meta(min_length=1)]
    routes: Annotated[list[Route], Meta(min_length=1)]
    reasoning_summary: ReasoningSummary = "verbatim"
    description: str = ""
    run_limits: RunLimits | None = None
    """Those of requests without their own, and the most that a request may have."""
    prices: Prices | None = None


class ToolServerEntry(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[tool_servers.NAME]`: an MCP server at a URL, or a program that is started on first use, and shared. It is trusted:
    REPRISE_OUTBOUND_ALLOW does not apply."""

    url: Annotated[str, Meta(pattern="^https?://")] = ""
    command: tuple[str, ...] = ()
    shared: Shared = "tenant"
    """Which runs share the program, and its state between calls: all, those of a tenant, or none."""
    environment: dict[str, str] = {}
    headers: dict[str, str] = {}
    authorization: str = ""
    authorization_env: str = ""


class Catalog(Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    upstreams: Annotated[dict[str, UpstreamEntry], Meta(min_length=1)]
    models: list[ModelEntry] = []
    default: str = ""
    currency: Annotated[str, Meta(pattern=r"^[A-Za-z]{1,16}$")] = "USD"
    """Of all prices."""
    tool_servers: dict[str, ToolServerEntry] = {}
    hosted: dict[Kind, HostedRoute] = {}
    prompts: dict[str, Prompt] = {}
    issuers: dict[str, Issuer] = {}
    agents: dict[str, CatalogAgent] = {}
    refuse_missing_tools: bool | None = None
    """Whether a hosted tool without a `[hosted]` entry is a 400, or hidden from the model. Default: a 400 if the answer depends on it,
    else hidden."""

    def routes(self, model: str, *, agent: str = "") -> list[Route]:
        """The routes to a model, in order. Raises NotFound; with the name of the agent whose model it is, which callers need not know."""
        if entry := self._entry(model):
            return [replace(one, model=self.name_at(one, entry, model)) for one in self.priced(entry)]
        upstream, at, name = model.partition("@")
        direct = Route(upstream, name) if at and upstream in self.upstreams else None
        default = self.default or (next(iter(self.upstreams)) if len(self.upstreams) == 1 else "")
        if route := direct or (Route(default, model) if default else None):
            return [replace(route, prices=self._prices(route))]
        raise NotFound(
            f"The model of the agent '{agent}' does not exist any more."
            if agent
            else f"The model '{model}' does not exist or you do not have access to it.",
            code="model_not_found",
            param="model",
        )

    def name_at(self, route: Route, entry: ModelEntry, model: str) -> str:
        """What a route of an entry calls the model that a request names: `UPSTREAM@` is no part of it, at that upstream, nor at the others
        of an entry for `UPSTREAM@…`."""
        upstream, at, name = model.partition("@")
        is_direct = at and upstream in self.upstreams
        is_for_it = route.upstream == upstream or entry.name.startswith(f"{upstream}@")
        return route.model or (name if is_direct and is_for_it else model)

    def priced(self, entry: ModelEntry) -> list[Route]:
        """The routes of an entry, with their prices."""
        return [replace(one, prices=one.prices or entry.prices or self._prices(one)) for one in entry.routes]

    def refuse_unpriced(self, limits: RunLimits | None, model: str, *, is_summarized: bool) -> None:
        """Raises InvalidParameter for a limit of cost that would not hold; NotFound."""
        if limits and limits.cost is not None and not self.is_priced(model, is_summarized=is_summarized):
            raise InvalidParameter(
                "'run_limits.cost' can't be kept: a model that may answer has no prices in the catalog.",
                param="run_limits.cost",
            )

    def is_priced(self, model: str, *, is_summarized: bool) -> bool:
        """Whether every route that may answer has prices, and every one to the model of the summaries, if there are any. Raises
        NotFound."""
        summary = self.reasoning_summary(model) if is_summarized else "off"
        models = [model, summary.model] if isinstance(summary, SummaryModel) else [model]
        return all(route.prices for one in models for route in self.routes(one))

    def run_limits(self, model: str) -> RunLimits | None:
        """The limits of a model's runs."""
        entry = self._entry(model)
        return entry.run_limits if entry else None

    def _prices(self, route: Route) -> Prices | None:
        upstream = self.upstreams.get(route.upstream)
        return upstream.prices if upstream else None

    def reasoning_summary(self, model: str) -> ReasoningSummary:
        """What a model's summaries of reasoning are."""
        entry = self._entry(model)
        return entry.reasoning_summary if entry else "verbatim"

    def description(self, model: str) -> str:
        """What the catalog says of a model."""
        entry = self._entry(model)
        return entry.description if entry else ""

    def _entry(self, model: str) -> ModelEntry | None:
        return next((entry for entry in self.models if fnmatchcase(model, entry.name)), None)

    def tool_server(self, name: str) -> ToolServer | None:
        """The operator's tool server of this name."""
        entry = self.tool_servers.get(name)
        if entry is None:
            return None
        return ToolServer(
            label=name,
            url=entry.url,
            command=entry.command,
            shared=entry.shared,
            environment=entry.environment,
            headers=entry.headers,
            authorization=entry.authorization,
            trusted=True,
        )

    def nameable_server(self, label: str) -> ToolServer | None:
        """The operator's tool server of this name, if requests may name it."""
        # The server of a hosted tool trusts the tenant's name that it receives, and is called by us alone.
        if any(route.server == label for route in self.hosted.values()):
            return None
        return self.tool_server(label)

    @property
    def passed_on(self) -> frozenset[str]:
        """Every parameter beyond the API that any upstream takes."""
        return ENGINE_PARAMETERS.union(*(entry.also_passed_on for entry in self.upstreams.values()))

    @property
    def model_names(self) -> list[str]:
        """Models with a full name, not a pattern."""
        return [entry.name for entry in self.models if not set("*?[") & set(entry.name)]
