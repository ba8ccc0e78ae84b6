"""An agent against the catalog: its model, its tools, and what would be wrong in every request."""

from collections.abc import Collection

from msgspec.structs import replace

from app.domain import limits
from app.domain.agents import NamedAgent, check_overrides
from app.domain.client_tools import client_tool_of
from app.domain.rights import NAME_RULE, is_name
from app.domain.toolbox import open_toolbox
from app.domain.tools.table import kind_of, missing_server
from app.errors import InvalidParameter, NotFound, UnsupportedParameter
from app.outbound.catalog import Catalog
from app.outbound.declared import DeclaredTools
from app.settings import Settings
from app.wire.requests import CreateResponse, is_model_name
from app.wire.tools import REDACTED, HostedTool, McpTool


def check(named: NamedAgent, catalog: Catalog, settings: Settings, known: Collection[str]) -> None:
    """`known` are the names of agents that can't be its model. Raises InvalidRequest, with the parameter's path."""
    agent = named.agent
    fault = next(agent.faults(), None)
    if fault:
        raise InvalidParameter(f"Invalid value for 'instructions': {fault}.", param="instructions")
    if "\0" in agent.description:
        raise InvalidParameter("'description' may not contain NUL characters.", param="description")
    for index, user in enumerate(agent.users or ()):
        if not is_name(user):
            raise InvalidParameter(f"Invalid value for 'users[{index}]': {NAME_RULE}.", param=f"users[{index}]")
    check_overrides(agent, catalog.passed_on)
    _check_model(agent.model, catalog, known)
    request = replace(agent.as_request(), tools=named.tools)
    catalog.refuse_unpriced(agent.run_limits, agent.model, is_summarized=request.asks_for_summary)
    _check_tools(request, catalog, settings)


def _check_model(model: str, catalog: Catalog, known: Collection[str]) -> None:
    if not is_model_name(model):
        raise InvalidParameter("Invalid value for 'model'.", param="model")
    if model in known:
        raise InvalidParameter(f"'{model}' is an agent; the model of an agent can't be one.", param="model")
    try:
        catalog.routes(model)
    except NotFound as error:
        raise InvalidParameter(error.message, param="model", code="model_not_found") from None


def _check_tools(request: CreateResponse, catalog: Catalog, settings: Settings) -> None:
    limits.check(
        request,
        tools_max=settings.tools_max,
        names_max=settings.tools_named_max,
        listed_max=settings.tools_listed_max,
    )
    for index, tool in enumerate(request.tools):
        if isinstance(tool, HostedTool):
            _check_hosted(tool, f"tools[{index}].type", catalog)
        if isinstance(tool, McpTool) and REDACTED in (tool.server_url or ""):
            path = f"tools[{index}].server_url"
            raise InvalidParameter(f"'{path}' is as agents are shown; give the whole address.", param=path)
    declared = DeclaredTools(settings, catalog)
    declared.refuse_hosted(request)
    declared.servers(request)
    open_toolbox(request.tools, (), request.tool_choice, hosted=frozenset(catalog.hosted))


def _check_hosted(tool: HostedTool, at: str, catalog: Catalog) -> None:
    """Raises UnsupportedParameter for one that is not served: an agent is not to lack it silently."""
    if client_tool_of(tool):
        return
    kind = kind_of(tool)
    if kind is None:
        raise UnsupportedParameter(f"Tools of type '{tool.type}' are not supported by this server.", param=at)
    if kind not in catalog.hosted:
        raise missing_server(tool.type, at)
