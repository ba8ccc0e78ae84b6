"""`/v1/agents`: what clients get of an agent."""

from typing import Any, Literal

from msgspec import UNSET, UnsetType

from app.wire.requests import PromptParameters


class Agent(PromptParameters, kw_only=True):
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
    tools: Any
    tool_choice: Any
    overrides: str | list[str]
    users: list[str] | UnsetType | None = UNSET
    """Shown to administrators."""
