"""`/v1/models`: what the catalog names, and what the upstreams list."""

import asyncio
from collections.abc import Sequence
from typing import Any

import structlog
from litestar import Controller, Request, Response, get
from litestar.enums import MediaType
from msgspec.structs import replace

from app.api.connected import while_connected
from app.api.parts import Parts
from app.errors import NotFound, UpstreamError, UpstreamStalled
from app.outbound.catalog import Catalog
from app.outbound.upstream import Upstream
from app.runs.executor import Caller
from app.telemetry import describe
from app.wire.chat import ModelEntry
from app.wire.resources import Model, Models, encode

log = structlog.get_logger()


class ModelsController(Controller):
    """Models that can be asked for by name."""

    path = "/v1/models"

    @get()
    async def list(self, request: Request[Any, Any, Any], caller: Caller, parts: Parts) -> Response[bytes]:
        """Every model, those of the catalog first."""
        models = await while_connected(request.receive, _models(caller, parts))
        return Response(encode(Models(models)), media_type=MediaType.JSON)

    @get("/{model_id:path}")
    async def retrieve(
        self, request: Request[Any, Any, Any], model_id: str, caller: Caller, parts: Parts
    ) -> Response[bytes]:
        """One model, by any name that a request may give it; it may contain slashes."""
        wanted = str(model_id).removeprefix("/")
        models = await while_connected(request.receive, _models(caller, parts))
        found = next((model for model in models if model.id == wanted), None) or _routed(wanted, models, parts.catalog)
        if found is None:
            raise NotFound(f"The model '{wanted}' does not exist.", param="model", code="model_not_found")
        return Response(encode(found), media_type=MediaType.JSON)


def _routed(wanted: str, models: Sequence[Model], catalog: Catalog) -> Model | None:
    """A model that is listed under another name: by a pattern of the catalog, its upstream's name, or the default upstream's."""
    routes = catalog.routes(wanted)
    if catalog.is_named(wanted):
        return Model(id=wanted, owned_by=routes[0].upstream)
    names = {name for route in routes for name in (f"{route.upstream}@{route.model}", route.model)}
    listed = next((model for model in models if model.id in names), None)
    return listed and replace(listed, id=wanted)


async def _listed(upstream: Upstream, caller: Caller, wait_s: float) -> list[ModelEntry]:
    try:
        async with asyncio.timeout(wait_s):
            return await upstream.list_models(caller.key)
    except TimeoutError:
        raise UpstreamStalled(f"Upstream '{upstream.name}' did not list its models in time.") from None


async def _models(caller: Caller, parts: Parts) -> list[Model]:
    """Upstreams that lie under a single name are listed by their own; an upstream that does not answer lists nothing."""
    upstreams = parts.upstreams
    named = [Model(id=name) for name in parts.catalog.model_names]
    answers: list[Any] = await asyncio.gather(
        *(_listed(upstream, caller, parts.settings.models_wait_s) for upstream in upstreams.values()),
        return_exceptions=True,
    )
    listed: list[Model] = []
    for upstream, answer in zip(upstreams.values(), answers, strict=True):
        if isinstance(answer, UpstreamError):
            log.warning(
                "An upstream does not list its models.",
                action="models_not_listed",
                upstream=upstream.name,
                error=describe(answer),
            )
        elif isinstance(answer, BaseException):
            raise answer
        else:
            prefix = "" if len(upstreams) == 1 else f"{upstream.name}@"
            listed += [
                Model(id=prefix + one.id, created=one.created or 0, owned_by=one.owned_by or upstream.name)
                for one in answer
            ]
    if not named and not listed and answers and all(isinstance(answer, UpstreamError) for answer in answers):
        raise answers[0]
    known = {model.id for model in named}
    return named + [model for model in listed if model.id not in known]
