"""`/v1/agents`: what clients get of an agent."""

from typing import Any, Literal

from msgspec import UNSET, UnsetType

from app.wire.requests import PromptParameters

FIRST = ("id", "object", "created_at", "updated_at", "name", "model")
"""The fields that stand first in JSON."""


class Agent(PromptParameters, kw_only=True):
    """An agent without the secrets of its tools. Parameters that it does not set are null."""

    id: str
    object: Literal["agent"] = "agent"
    name: str
    created_at: int
    updated_at: int
    description: str
    model: str
    """A model of the catalog or of an upstream, no agent."""
    instructions: Any
    """A text, or messages."""
    variables: dict[str, str]
    tools: Any
    tool_choice: Any
    overrides: str | list[str]
    users: list[str] | UnsetType | None = UNSET
    """Shown to administrators."""

    @property
    def in_order(self) -> dict[str, Any]:
        """Its fields, in the order of JSON."""
        fields = {name: getattr(self, name) for name in (*FIRST, *self.__struct_fields__)}
        return {name: value for name, value in fields.items() if value is not UNSET}
