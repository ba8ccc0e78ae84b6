"""`/v1/models`: what the catalog names, agents, and what the upstreams list."""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import structlog
from litestar import Controller, Request, Response, get
from msgspec.structs import replace

from app.api.connected import while_connected
from app.api.replies import json_reply, small_reply
from app.api.services import Services
from app.domain.agents import NamedAgent
from app.errors import ApiError, NotFound, UpstreamError, UpstreamStalled
from app.offload import offload
from app.outbound.catalog import Route
from app.outbound.upstream import Upstream
from app.runs.admission import Caller
from app.storage.agents import Summary
from app.telemetry import describe
from app.wire.chat import ModelEntry
from app.wire.requests import is_model_name
from app.wire.resources import Model, Models, encode

log = structlog.get_logger()

Listed = Mapping[str, Sequence[ModelEntry]]
"""What upstreams list, by their names."""

ENTRY_BYTES = 256
"""What a listed model takes, about."""


class ModelsController(Controller):
    """Models and agents that can be asked for by name."""

    path = "/v1/models"
    opt = {"scope": None}  # any key may ask what it may use

    @get()
    async def list(self, request: Request[Any, Any, Any], caller: Caller, services: Services) -> Response[Any]:
        """Every model and agent that the key may use, those of the catalog first."""
        body = await while_connected(request.receive, _models(caller, services))
        return json_reply(body, services.backlogs)

    @get("/{model_id:path}")
    async def retrieve(
        self, request: Request[Any, Any, Any], model_id: str, caller: Caller, services: Services
    ) -> Response[bytes]:
        """One model or agent, by any name that a request may give it; it may contain slashes."""
        name = str(model_id).removeprefix("/")
        if not is_model_name(name):
            raise NotFound(f"The model '{name}' does not exist.", param="model", code="model_not_found")
        model = await while_connected(request.receive, _model(name, caller, services))
        return small_reply(model)


async def _model(name: str, caller: Caller, services: Services) -> Model:
    """As its upstream lists it. An upstream may serve models that it does not list, so those are found too.

    Raises NotFound if no upstream would be asked, ModelNotAllowed.
    """
    agent = await services.agents.find(caller.rights, name)
    route = (services.catalog.routes(agent.agent.model, agent=name) if agent else services.catalog.routes(name))[0]
    if agent is None:
        caller.rights.demand_model(name)
    listed: Listed = {}
    if _configured_size(route, services) is None or not (agent or name in services.catalog.model_names):
        upstream = services.upstreams[route.upstream]
        try:
            listed = {upstream.name: await _listed(upstream, caller, services.settings.models_wait_s)}
        except UpstreamError as error:
            _warn(upstream, error)
    if agent:
        return _of_agent(agent, caller, services, listed)
    if name in services.catalog.model_names:
        return _of_catalog(name, services, listed)
    entry = _entry(route, listed) or ModelEntry(route.model)
    model = replace(_of_upstream(entry, services.upstreams[route.upstream]), id=name, name=name)
    return replace(
        model,
        description=services.catalog.description(name) or None,
        context_window=_configured_size(route, services) or model.context_window,
    )


async def _listed(upstream: Upstream, caller: Caller, wait_s: float) -> list[ModelEntry]:
    try:
        async with asyncio.timeout(wait_s):
            return await upstream.list_models(caller.key)
    except TimeoutError:
        raise UpstreamStalled(f"Upstream '{upstream.name}' did not list its models in time.") from None


async def _models(caller: Caller, services: Services) -> bytes:
    """Those of the catalog, agents, then those of the upstreams, by UPSTREAM@NAME if there are several. An upstream that does not
    answer lists nothing."""
    upstreams = services.upstreams
    answers: list[Any] = await asyncio.gather(
        *(_listed(upstream, caller, services.settings.models_wait_s) for upstream in upstreams.values()),
        return_exceptions=True,
    )
    listed: dict[str, Sequence[ModelEntry]] = {}
    for upstream, answer in zip(upstreams.values(), answers, strict=True):
        if isinstance(answer, ApiError):
            _warn(upstream, answer)
        elif isinstance(answer, BaseException):
            raise answer
        else:
            listed[upstream.name] = answer
    agents = await services.agents.all(caller.rights)
    failed = None if listed or not answers else answers[0]
    size = sum(agent.bytes for agent, _ in agents) + ENTRY_BYTES * sum(map(len, listed.values()))
    return await offload(size, _encoded, caller, services, agents, listed, failed)


def _encoded(
    caller: Caller,
    services: Services,
    agents: Sequence[tuple[NamedAgent | Summary, bool]],
    listed: Listed,
    failed: ApiError | None,
) -> bytes:
    """The list. Raises `failed` where there is nothing else to say."""
    named = [_of_catalog(name, services, listed) for name in services.catalog.model_names]
    for agent, usable in agents:
        with suppress(NotFound):  # as a request that names it would be answered
            named += [_of_agent(agent, caller, services, listed)] if usable else []
    if failed and not named:
        raise failed
    known = {model.id for model in named} | {agent.name for agent, _ in agents}
    others = [model for model in _of_upstreams(services, listed) if model.id not in known]
    return encode(Models([one for one in named + others if one.is_agent or caller.rights.may_use(one.id)]))


def _of_upstreams(services: Services, listed: Listed) -> list[Model]:
    models = []
    for name, entries in listed.items():
        upstream = services.upstreams[name]
        prefix = "" if len(services.upstreams) == 1 else f"{name}@"
        for entry in entries:
            model = _of_upstream(entry, upstream)
            id = prefix + model.id
            size = upstream.entry.context_tokens or model.context_window
            models.append(replace(model, id=id, name=id, context_window=size))
    return models


def _of_catalog(name: str, services: Services, listed: Listed) -> Model:
    size = _size(services.catalog.routes(name)[0], services, listed)
    return Model(id=name, name=name, description=services.catalog.description(name) or None, context_window=size)


def _of_agent(agent: NamedAgent | Summary, caller: Caller, services: Services, listed: Listed) -> Model:
    """An agent, with the context of its model. Raises NotFound if the catalog has no such model any more."""
    definition = agent if isinstance(agent, Summary) else agent.agent
    return Model(
        id=agent.name,
        created=agent.created_at,
        owned_by=caller.rights.tenant if agent.created_at else "reprise",
        name=agent.name,
        description=definition.description or None,
        context_window=_size(services.catalog.routes(definition.model)[0], services, listed),
        is_agent=True,
    )


def _of_upstream(entry: ModelEntry, upstream: Upstream) -> Model:
    return Model(
        id=entry.id,
        created=entry.created or 0,
        owned_by=entry.owned_by or upstream.name,
        name=entry.id,
        context_window=entry.context_window,
    )


def _size(route: Route, services: Services, listed: Listed) -> int | None:
    """The tokens of the context of a route's model: by the catalog, or else as its upstream lists them."""
    entry = _entry(route, listed)
    return _configured_size(route, services) or (entry.context_window if entry else None)


def _configured_size(route: Route, services: Services) -> int | None:
    return route.context_tokens or services.catalog.upstreams[route.upstream].context_tokens


def _entry(route: Route, listed: Listed) -> ModelEntry | None:
    return next((entry for entry in listed.get(route.upstream, ()) if entry.id == route.model), None)


def _warn(upstream: Upstream, error: ApiError) -> None:
    log.warning(
        "An upstream does not list its models.",
        action="models_not_listed",
        upstream=upstream.name,
        error=describe(error),
    )
