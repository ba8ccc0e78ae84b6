"""`/v1/agents`: what clients get of an agent."""

from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType

from app.wire.requests import ReasoningConfig, TextConfig


class Agent(Struct, kw_only=True):
    """An agent without the secrets of its tools. Parameters that it does not set are null."""

    id: str
    object: Literal["agent"] = "agent"
    name: str
    created_at: int
    updated_at: int
    description: str
    model: str
    instructions: Any
    """A text, or messages."""
    variables: dict[str, str]
    tools: list[Any]
    tool_choice: Any
    parallel_tool_calls: bool | None
    max_tool_calls: int | None
    max_output_tokens: int | None
    temperature: float | None
    top_p: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    top_logprobs: int | None
    text: TextConfig | None
    reasoning: ReasoningConfig | None
    truncation: str | None
    overrides: str | list[str]
    users: list[str] | UnsetType | None = UNSET
    """Shown to administrators."""
