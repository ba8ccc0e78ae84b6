"""`/v1/models`: what the catalog names, and what the upstreams list."""

import asyncio
from typing import Any

import structlog
from litestar import Controller, Request, Response, get
from msgspec.structs import replace

from app.api.connected import while_connected
from app.api.replies import small_reply
from app.api.services import Services
from app.errors import ApiError, NotFound, UpstreamError, UpstreamStalled
from app.outbound.upstream import Upstream
from app.runs.admission import Caller
from app.telemetry import describe
from app.wire.chat import ModelEntry
from app.wire.requests import is_model_name
from app.wire.resources import Model, Models

log = structlog.get_logger()


class ModelsController(Controller):
    """Models that can be asked for by name."""

    path = "/v1/models"
    opt = {"scope": None}  # any key may ask what it may use

    @get()
    async def list(self, request: Request[Any, Any, Any], caller: Caller, services: Services) -> Response[bytes]:
        """Every model that the key may use, those of the catalog first."""
        models = await while_connected(request.receive, _models(caller, services))
        return small_reply(Models(models))

    @get("/{model_id:path}")
    async def retrieve(
        self, request: Request[Any, Any, Any], model_id: str, caller: Caller, services: Services
    ) -> Response[bytes]:
        """One model, by any name that a request may give it; it may contain slashes."""
        name = str(model_id).removeprefix("/")
        if not is_model_name(name):
            raise NotFound(f"The model '{name}' does not exist.", param="model", code="model_not_found")
        model = await while_connected(request.receive, _model(name, caller, services))
        return small_reply(model)


async def _model(name: str, caller: Caller, services: Services) -> Model:
    """As its upstream lists it. An upstream may serve models that it does not list, so those are found too.

    Raises NotFound if no upstream would be asked, ModelNotAllowed.
    """
    route = services.catalog.routes(name)[0]
    caller.rights.demand_model(name)
    if name in services.catalog.model_names:
        return Model(id=name)
    upstream = services.upstreams[route.upstream]
    try:
        entries = await _listed(upstream, caller, services.settings.models_wait_s)
    except UpstreamError as error:
        _warn(upstream, error)
        entries = []
    listed = next((_as_model(entry, upstream) for entry in entries if entry.id == route.model), None)
    return replace(listed, id=name) if listed else Model(id=name, owned_by=upstream.name)


async def _listed(upstream: Upstream, caller: Caller, wait_s: float) -> list[ModelEntry]:
    try:
        async with asyncio.timeout(wait_s):
            return await upstream.list_models(caller.key)
    except TimeoutError:
        raise UpstreamStalled(f"Upstream '{upstream.name}' did not list its models in time.") from None


async def _models(caller: Caller, services: Services) -> list[Model]:
    """Those of the catalog, then those of the upstreams, by UPSTREAM@NAME if there are several. An upstream that does not
    answer lists nothing."""
    upstreams = services.upstreams
    named = [Model(id=name) for name in services.catalog.model_names]
    answers: list[Any] = await asyncio.gather(
        *(_listed(upstream, caller, services.settings.models_wait_s) for upstream in upstreams.values()),
        return_exceptions=True,
    )
    listed: list[Model] = []
    for upstream, answer in zip(upstreams.values(), answers, strict=True):
        if isinstance(answer, ApiError):
            _warn(upstream, answer)
        elif isinstance(answer, BaseException):
            raise answer
        else:
            prefix = "" if len(upstreams) == 1 else f"{upstream.name}@"
            listed += [replace(model, id=prefix + model.id) for model in (_as_model(one, upstream) for one in answer)]
    if not named and not listed and answers and all(isinstance(answer, ApiError) for answer in answers):
        raise answers[0]
    known = {model.id for model in named}
    every = named + [model for model in listed if model.id not in known]
    return [model for model in every if caller.rights.may_use(model.id)]


def _as_model(entry: ModelEntry, upstream: Upstream) -> Model:
    return Model(id=entry.id, created=entry.created or 0, owned_by=entry.owned_by or upstream.name)


def _warn(upstream: Upstream, error: ApiError) -> None:
    log.warning(
        "An upstream does not list its models.",
        action="models_not_listed",
        upstream=upstream.name,
        error=describe(error),
    )
