"""How the Chat Completions of upstreams differ."""

from typing import Literal, get_args

from msgspec import Struct

from app.errors import UnsupportedParameter

Lack = Literal[
    "stream_options",
    "parallel_tool_calls",
    "tool_choice_required",
    "json_schema",
    "json_object",
    "reasoning_effort",
    "content_parts",
    "later_system_messages",
    "strict",
]


PassedOn = Literal["prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "user"]


class Dialect(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How an upstream's Chat Completions differ; the defaults suit vLLM, llama.cpp and Ollama."""

    lacks: frozenset[Lack] = frozenset()
    """What must not be sent: options are left out, what can't be left out is refused."""
    developer_role: bool = False
    """It knows the role `developer`; otherwise such messages are `system` ones."""
    refusals: bool = False
    """It knows `refusal` in assistant messages; otherwise a refusal is text."""
    tool_images: bool = False
    """Its models see images that MCP tools answer with; otherwise they read that there was one."""
    allowed_tools: bool = False
    """It takes `allowed_tools` as tool choice: all tools stay declared, which keeps its cache of the prompt."""
    verbosity: bool = False
    """It takes `verbosity`."""
    takes: frozenset[PassedOn] = frozenset()
    """Parameters about caches, callers and tiers that it takes; the response echoes them either way."""
    max_tokens: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    reasoning: Literal["none", "reasoning_content", "reasoning"] = "none"
    """The key under which earlier reasoning is passed back."""
    think: Literal["start", "thinking", "text", "anywhere"] = "start"
    """`<think>` in content: looked for at its start; already open; left alone; looked for anywhere in it."""
    custom_tools: Literal["function", "describe", "native"] = "function"
    """Custom tools are wrapped as functions and grammars refused; the grammar goes into the description, unenforced; both are
    passed on as they are."""

    def demand(self, feature: Lack, param: str) -> None:
        """Raises UnsupportedParameter if this upstream lacks what the parameter needs."""
        if feature in self.lacks:
            raise UnsupportedParameter(
                f"Unsupported parameter: '{param}' is not supported with this model.", param=param
            )


HOSTED = Dialect(
    developer_role=True,
    refusals=True,
    tool_images=True,
    allowed_tools=True,
    verbosity=True,
    takes=frozenset(get_args(PassedOn)),
    max_tokens="max_completion_tokens",
    custom_tools="native",
)
"""The hosted API's own dialect."""

WRAPPED_INPUT = "input"
"""The one argument of a custom tool that is wrapped as a function."""
