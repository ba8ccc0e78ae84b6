"""How the Chat Completions of upstreams differ."""

from collections.abc import Iterable
from typing import Literal, get_args

from msgspec import Struct
from msgspec.structs import replace

from app.errors import UnsupportedParameter

Lack = Literal[
    "stream_options",
    "parallel_tool_calls",
    "tool_choice_required",
    "tool_choice_named",
    "json_schema",
    "json_object",
    "reasoning_effort",
    "content_parts",
    "later_system_messages",
    "repeated_roles",
    "parallel_calls_in_history",
    "strict",
    "images",
    "image_urls",
    "audio",
]
ReasoningForm = Literal["reasoning_content", "reasoning", "think", "parts"]
"""Where a message holds its reasoning: under one of two keys, in its content between `<think>` tags or as a part of it."""

Counter = Literal["input_tokens", "tokenize", "apply_template", "usage"]
"""What counts the tokens of a chat request: `POST /chat/completions/input_tokens` below the base URL, `POST /tokenize` or
`POST /apply-template` beside its `/v1` (`app/outbound/tokens.py`), or the usage of a completion of one token."""

PassedOn = Literal["prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "user"]


class Dialect(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How an upstream's Chat Completions differ; the defaults suit vLLM, llama.cpp and Ollama."""

    lacks: frozenset[Lack] = frozenset()
    """What must not be sent: options are left out, what can't be left out is refused. Without `tool_choice_named` the tool of
    that name is the only one that is declared, and some tool is required. Without `image_urls` this server fetches
    images."""
    developer_role: bool | None = None
    """It knows the role `developer`; otherwise these messages become `system` ones. Where that is not known, those of Chat Completions
    are sent as they came."""
    refusals: bool = False
    """It knows `refusal` in assistant messages; otherwise a refusal is text."""
    files: Literal["native", "text", "none"] = "text"
    """Files other than images and sounds: sent as `file` parts, which hosted services know; as their text, since engines refuse
    such parts; or refused."""
    tool_images: bool = False
    """Its models see images that MCP tools answer with; otherwise they read that there was one."""
    allowed_tools: bool = False
    """It takes `allowed_tools` as tool choice: all tools stay declared, which keeps its cache of the prompt."""
    verbosity: bool = False
    """It takes `verbosity`."""
    takes: frozenset[PassedOn] = frozenset()
    """Parameters about caches, callers and tiers that it takes; the response echoes them either way."""
    max_tokens: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    reasoning: Literal["none", "same"] | ReasoningForm = "same"
    """How earlier reasoning is sent back; by default in the form of the upstream's own answers."""
    think: Literal["start", "thinking", "text", "anywhere"] = "start"
    """`<think>` in content: looked for at its start; already open; left alone; looked for anywhere in it."""
    custom_tools: Literal["function", "describe", "native"] = "describe"
    """Custom tools are wrapped as functions and grammars refused; the grammar goes into the description, unenforced; both are
    passed on as they are."""
    call_id_format: Literal["any", "nine_alphanumerics"] = "any"
    """What the ids of calls in the history look like."""
    count_tokens: tuple[Counter, ...] = ("usage",)
    """What counts the tokens of a request: the first that can. Without `usage` nothing is generated for a count."""

    def keeping_roles(self) -> "Dialect":
        """The dialect for a client that speaks Chat Completions itself: roles stay, unless the upstream is known to lack them."""
        is_open = self.developer_role is None and "later_system_messages" not in self.lacks
        return replace(self, developer_role=True) if is_open else self

    def demand(self, feature: Lack, param: str) -> None:
        """Raises UnsupportedParameter if this upstream lacks what the parameter needs."""
        if feature in self.lacks:
            raise UnsupportedParameter(
                f"Unsupported parameter: '{param}' is not supported with this model.", param=param
            )


HOSTED = Dialect(
    developer_role=True,
    refusals=True,
    files="native",
    tool_images=True,
    allowed_tools=True,
    verbosity=True,
    takes=frozenset(get_args(PassedOn)),
    max_tokens="max_completion_tokens",
    reasoning="none",
    custom_tools="native",
)
"""The hosted API's own dialect."""

Preset = Literal["plain", "openai", "vllm", "llama.cpp", "sglang", "ollama", "mistral", "openrouter", "deepseek"]

PRESETS: dict[Preset, Dialect] = {
    "plain": Dialect(),
    "openai": HOSTED,
    "vllm": Dialect(reasoning="reasoning", count_tokens=("tokenize", "usage")),
    "llama.cpp": Dialect(
        reasoning="reasoning_content",
        lacks=frozenset({"tool_choice_named"}),
        count_tokens=("input_tokens", "apply_template", "usage"),
    ),
    "sglang": Dialect(reasoning="reasoning_content"),
    "ollama": Dialect(
        reasoning="reasoning", lacks=frozenset({"tool_choice_required", "parallel_tool_calls", "image_urls"})
    ),
    "mistral": Dialect(
        developer_role=False,
        reasoning="parts",
        call_id_format="nine_alphanumerics",
        lacks=frozenset({"stream_options", "later_system_messages", "repeated_roles"}),
    ),
    "openrouter": Dialect(reasoning="reasoning", files="native", takes=frozenset({"user", "prompt_cache_key"})),
    "deepseek": Dialect(developer_role=False, reasoning="reasoning_content", lacks=frozenset({"json_schema"})),
}
"""The dialects of known engines and services."""

_HOSTS: dict[str, Preset] = {
    "api.openai.com": "openai",
    "api.mistral.ai": "mistral",
    "openrouter.ai": "openrouter",
    "api.deepseek.com": "deepseek",
}
_HOSTED_SUFFIXES = (".api.openai.com", ".openai.azure.com")
"""The hosted API's regions, and its resources at Azure."""

_OWNERS: dict[str, Preset] = {
    "vllm": "vllm",
    "llamacpp": "llama.cpp",
    "sglang": "sglang",
    "library": "ollama",
    "mistralai": "mistral",
    "deepseek": "deepseek",
}


def preset_of_host(host: str | None) -> Preset | None:
    """The dialect of a service, by the host of its address."""
    if host and host.endswith(_HOSTED_SUFFIXES):
        return "openai"
    return _HOSTS.get(host or "")


def preset_of_owners(owners: Iterable[str | None]) -> Preset | None:
    """The dialect of an engine, by the owners of its models; None where they are of several engines."""
    found = {_OWNERS[owner] for owner in owners if owner in _OWNERS}
    return found.pop() if len(found) == 1 else None


WRAPPED_INPUT = "input"
"""The one argument of a custom tool that is wrapped as a function."""
