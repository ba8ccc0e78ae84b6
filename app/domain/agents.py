"""Agents: models with instructions, tools and parameters of their own, which requests name as they name a model.

    [agents.greeter]
    model = "qwen3"
    instructions = "Greet {{name}}."
    variables = { name = "string" }
    tools = [{ type = "mcp", server_label = "people" }]
    overrides = ["temperature"]
    users = ["ada"]

An agent is applied to the request that names it, and from then on the request is like any other.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, Raw, Struct
from msgspec.structs import fields, replace

from app.domain.chat_request import refuse_uncarried
from app.domain.client_tools import is_found_by
from app.domain.prompt_templates import Template, VariableType, is_absent, left_out
from app.domain.rights import Rights
from app.domain.run_limits import lower, refuse_higher
from app.errors import InvalidParameter, UnsupportedParameter
from app.wire.admin import ModelName, Name
from app.wire.decoding import decode, not_among
from app.wire.items import tools_added_by
from app.wire.requests import (
    NOTHING,
    CreateResponse,
    PromptParameters,
    ToolSecrets,
    secrets_of,
    with_secrets,
    without_secrets,
)
from app.wire.tools import AnyTool, decode_tool_choice, decode_tools

DESCRIPTION_CHARS_MAX = 2_000
USERS_MAX = 100
VARIABLES_MAX = 100
"""A name that a request misspells is compared with each."""
OVERRIDES_MAX = 200

_NAME = r"(?!agent_)[a-zA-Z0-9][a-zA-Z0-9._:-]{0,63}"
NAME = re.compile(_NAME)
"""An agent's name: no id of one, and no model at a named upstream."""

NAME_RULE = "1 to 64 letters, digits and '._:-', the first a letter or a digit, and not 'agent_' at the beginning"

OVERRIDABLE = (
    "instructions",
    "context_management",
    *(name for name in PromptParameters.__struct_fields__ if name != "model"),
)
"""What an agent may let requests set, beside the parameters of the engines."""

Overrides = Literal["all", "none"] | Annotated[list[str], Meta(max_length=OVERRIDES_MAX)]


class Agent(Template, kw_only=True, forbid_unknown_fields=True):
    """`[agents.NAME]`, or what was made of one by API."""

    model: ModelName
    """A model of the catalog or of an upstream, no agent."""
    description: Annotated[str, Meta(max_length=DESCRIPTION_CHARS_MAX)] = ""
    variables: Annotated[dict[str, VariableType], Meta(max_length=VARIABLES_MAX)] = {}
    overrides: Overrides = "none"
    """The parameters that a request may set itself."""
    users: Annotated[list[Annotated[Name, Meta(min_length=1)]], Meta(max_length=USERS_MAX)] | None = None
    """Whose keys may use it; null for all."""

    def lets_set(self, parameter: str) -> bool:
        """Whether a request may set a parameter."""
        return self.overrides == "all" or parameter in self.overrides

    def admits(self, rights: Rights) -> bool:
        """Whether it is for this caller's user."""
        return self.users is None or rights.user in self.users

    def is_for(self, tenant: str) -> bool:
        """Whether it is for this tenant; to others it is unknown."""
        return True


class CatalogAgent(Agent, kw_only=True, forbid_unknown_fields=True):
    """`[agents.NAME]`."""

    tenants: list[str] | None = None
    """Whose keys know it; None for all."""

    def is_for(self, tenant: str) -> bool:
        """Whether it is for this tenant."""
        return self.tenants is None or tenant in self.tenants


class CreateAgent(Agent, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/agents`."""

    name: Annotated[str, Meta(extra_json_schema={"pattern": f"^{_NAME}$"})]
    """The name by which requests name it as their model."""


class NamedAgent(Struct, frozen=True):
    """An agent by its name."""

    name: str
    agent: Agent
    """Of one that is made by API, without the secrets of its tools."""
    bytes: int
    """As JSON, with the secrets."""
    secrets: Mapping[str, ToolSecrets] = {}
    """Those, by label."""
    id: str = ""
    """Of one of the catalog its name."""
    created_at: int = 0
    updated_at: int = 0

    def may_be_used(self, rights: Rights) -> bool:
        """Whether requests of this caller may name it."""
        return rights.may_use(self.name) and self.agent.admits(rights)

    @property
    def tools(self) -> list[AnyTool]:
        """Its tools, with their secrets."""
        return with_secrets(decode_tools(self.agent.tools or []), self.secrets)


CREATE = msgspec.json.Decoder(CreateAgent)
UPDATE = msgspec.json.Decoder(dict[str, Raw])
"""The parameters that `POST /v1/agents/{id}` replaces; null for what they are by default."""
_KEYS = msgspec.json.Decoder(dict[str, Raw])


def new_agent(asked: CreateAgent, *, id: str, now: int) -> NamedAgent:
    """The agent that is asked for. Raises InvalidParameter."""
    return _named(asked, NamedAgent("", asked, 0, id=id, created_at=now), now)


def updated(agent: NamedAgent, given: Mapping[str, Raw], *, now: int) -> NamedAgent:
    """An agent with other parameters. Tools that are replaced leave nothing of their secrets. Raises InvalidParameter."""
    before = {**_KEYS.decode(msgspec.json.encode(agent.agent)), "name": Raw(msgspec.json.encode(agent.name))}
    keys = {name: value for name, value in {**before, **given}.items() if value != NOTHING}
    asked = decode(CREATE, msgspec.json.encode(keys))
    return _named(asked, replace(agent, secrets={}) if "tools" in given else agent, now)


def _named(asked: CreateAgent, before: NamedAgent, now: int) -> NamedAgent:
    if not is_agent_name(asked.name):
        raise InvalidParameter(f"Invalid value for 'name': expected {NAME_RULE}.", param="name")
    tools = with_secrets(decode_tools(asked.tools or []), before.secrets)
    secrets = secrets_of(tools)
    agent = Agent(**{name: getattr(asked, name) for name in Agent.__struct_fields__})
    if agent.tools:
        agent.tools = without_secrets(tools, agent.tools)
    size = len(msgspec.json.encode(agent)) + len(msgspec.json.encode(secrets))
    return replace(before, name=asked.name, agent=agent, bytes=size, secrets=secrets, updated_at=now)


def is_agent_name(text: str) -> bool:
    """Whether an agent can have this name."""
    return NAME.fullmatch(text) is not None


def apply(named: NamedAgent, request: CreateResponse, *, bytes_max: int) -> CreateResponse:
    """The request as it is made: with the agent's model, tools and parameters. Its messages are counted, and `with_messages` adds them.

    Raises InvalidParameter for a parameter that the agent does not let requests set, and for a variable; BodyTooLarge for messages of
    more than `bytes_max`; UnsupportedParameter for tools that Chat Completions can't carry.
    """
    agent, body = named.agent, request.body
    _refuse_overrides(named, request)
    filled_bytes = agent.filled_bytes(_variables(request), "agent.variables", bytes_max=bytes_max)
    tools, choice = request.tools, request.tool_choice
    brings_tools = bool(tools) or (body.tools is not None and agent.lets_set("tools"))
    if not brings_tools:
        body = replace(body, tools=None)
        tools = named.tools
        if request.is_chat:
            _refuse_uncarried(named, tools)
    given = left_out(body, agent) | {"model": agent.model}
    if body.run_limits and agent.run_limits:  # those of an agent can be lowered, not raised
        refuse_higher(body.run_limits, agent.run_limits)
        given["run_limits"] = lower(body.run_limits, agent.run_limits)
    if brings_tools:
        given.pop("tools", None)
        given.pop("tool_choice", None)  # which is about the agent's tools
    elif is_absent(body.tool_choice):
        choice = decode_tool_choice(agent.tool_choice)
    return replace(
        request,
        body=replace(body, **given),
        model=agent.model,
        agent=named.name,
        items_add_tools=agent.lets_set("tools"),
        tools=tools,
        tool_choice=choice,
        size=request.size + named.bytes + filled_bytes,
    )


def with_messages(named: NamedAgent, request: CreateResponse, *, bytes_max: int) -> CreateResponse:
    """A request that the agent is applied to, with the agent's messages; not beside those of a prompt. Raises as `apply`."""
    if request.prompted:
        return request
    messages = named.agent.filled(_variables(request), "agent.variables", bytes_max=bytes_max)
    if request.is_chat:  # whose upstreams get the roles as they are given, and may not know this one
        messages = [replace(one, role="system") if one.role == "developer" else one for one in messages]
    return replace(request, prompted=messages)


def _variables(request: CreateResponse) -> Mapping[str, Raw]:
    given = request.body.agent
    return (given and given.variables) or {}


def _refuse_overrides(named: NamedAgent, request: CreateResponse) -> None:
    """Raises InvalidParameter."""
    for name, path in (*_given(request), *_added(named, request)):
        if not named.agent.lets_set(name):
            raise InvalidParameter(
                f"The agent '{named.name}' does not let requests set '{path}'.", param=path, code="not_overridable"
            )


def _given(request: CreateResponse) -> Iterator[tuple[str, str]]:
    """The parameters that a request sets, and their paths."""
    body = request.body
    if body.prompt:
        yield "prompt", "prompt"  # which no list of an agent has: it is a template, too
    if body.instructions is not None:
        yield "instructions", "instructions"
    if body.context_management:
        yield "context_management", "context_management"
    for name in PromptParameters.__struct_fields__:
        value = getattr(body, name)
        if name not in {"model", "tools"} and not is_absent(value) and (path := _path(name, value)):
            yield name, path
    if request.tools:
        yield (
            "tools",
            "tools" if body.tools else "tools[0]",
        )  # which `web_search_options` of Chat Completions has become
    for name in request.extra:
        yield name, name


def _added(named: NamedAgent, request: CreateResponse) -> Iterator[tuple[str, str]]:
    """The items that add tools, and their paths."""
    items = [(index, item) for index, item in enumerate(request.input) if tools_added_by(item)]
    tools = named.tools if items else ()
    for index, item in items:
        if not is_found_by(tools, item):
            yield "tools", f"input[{index}]"


def _path(name: str, value: object) -> str | None:
    """The path of what a parameter sets. Clients send objects that set nothing."""
    if not isinstance(value, Struct):
        return name
    return next((f"{name}.{key.name}" for key in fields(value) if getattr(value, key.name) not in (None, UNSET)), None)


def _refuse_uncarried(named: NamedAgent, tools: list[AnyTool]) -> None:
    for index, tool in enumerate(tools):
        try:
            refuse_uncarried(tool, f"tools[{index}]")
        except UnsupportedParameter as error:
            raise UnsupportedParameter(f"The agent '{named.name}': {error.message}", param="model") from None


def check_overrides(agent: Agent, passed_on: frozenset[str]) -> None:
    """Raises InvalidParameter for names that are no parameters; `passed_on` are those beyond the API."""
    for index, name in enumerate(agent.overrides if isinstance(agent.overrides, list) else ()):
        if name not in OVERRIDABLE and name not in passed_on:
            raise not_among(f"overrides[{index}]", name, OVERRIDABLE)
