"""Request → task: everything that making one response takes, looked up and resolved."""

from collections.abc import Mapping, Sequence

from msgspec import Struct

from app.domain.context import Context, Unseal, check_parent, references, resolve, restore
from app.domain.groups import Manner
from app.domain.sealed import Seal
from app.errors import InvalidParameter, InvalidRequest
from app.ids import new_id
from app.outbound.catalog import Catalog, Route
from app.outbound.upstream import Upstream
from app.settings import Settings
from app.storage import responses
from app.storage.database import Database
from app.storage.responses import Place
from app.wire.items import AnyItem, decode_item
from app.wire.requests import CreateResponse


class Task(Struct, frozen=True):
    """Everything that making one response takes."""

    request: CreateResponse
    context: Context
    routes: Sequence[tuple[Upstream, Route]]
    caller_key: str | None
    unseal: Unseal
    manner: Manner
    parent: Place | None


class Tasks:
    """Makes tasks of requests."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        catalog: Catalog,
        upstreams: Mapping[str, Upstream],
        seal: Seal,
    ) -> None:
        self._settings, self._database, self._catalog = settings, database, catalog
        self._upstreams, self._seal = upstreams, seal

    async def prepare(self, tenant_id: str, caller_key: str | None, request: CreateResponse) -> Task:
        """The task of a new request. Raises ApiError for everything that can be seen to be wrong by now."""
        if len(request.input) > self._settings.input_items_max:
            raise InvalidParameter(f"'input' has more than {self._settings.input_items_max} items.", param="input")
        routes = self._routes(request)
        _refuse_untaken(request, [upstream for upstream, _ in routes])
        previous, wanted = request.body.previous_response_id, references(request)
        earlier: list[AnyItem] = []
        referenced: dict[str, AnyItem] = {}
        parent: Place | None = None
        if previous is not None or wanted:
            async with self._database.autocommit() as tx:
                if previous is not None:
                    chain = await responses.load_chain(
                        tx, tenant_id, previous, items_max=self._settings.context_items_max
                    )
                    check_parent(previous, chain.status)
                    parent = chain.place
                    earlier = [decode_item(item.body.encode()) for item in chain.items]
                if wanted:
                    found = await responses.find_items(tx, tenant_id, wanted)
                    referenced = {id: decode_item(body.encode()) for id, body in found.items()}
        context = resolve(request, earlier, referenced, new_id)
        return self._task(request, context, routes, caller_key, parent)

    async def restore(
        self, tenant_id: str, response_id: str, caller_key: str | None, request: CreateResponse, said: Sequence[AnyItem]
    ) -> Task:
        """The task of a response that is stored already, with what earlier owners have made of it. Raises ApiError."""
        async with self._database.autocommit() as tx:
            chain = await responses.load_chain(tx, tenant_id, response_id, items_max=self._settings.context_items_max)
        stored = [decode_item(item.body.encode()) for item in chain.items]
        context = restore(request, (*stored, *said))
        return self._task(request, context, self._routes(request), caller_key, None)

    def _routes(self, request: CreateResponse) -> list[tuple[Upstream, Route]]:
        return [(self._upstreams[route.upstream], route) for route in self._catalog.routes(request.model)]

    def _task(
        self,
        request: CreateResponse,
        context: Context,
        routes: list[tuple[Upstream, Route]],
        caller_key: str | None,
        parent: Place | None,
    ) -> Task:
        reasoning = request.body.reasoning
        manner = Manner(
            summarize=bool(reasoning and (reasoning.summary or reasoning.generate_summary)),
            seal=self._seal.close if "reasoning.encrypted_content" in request.include else None,
        )
        return Task(request, context, routes, caller_key, self._seal.open, manner, parent)


def _refuse_untaken(request: CreateResponse, upstreams: Sequence[Upstream]) -> None:
    """A parameter beyond the API must mean something to an upstream that may answer."""
    for name in request.extra:
        if not any(name in upstream.entry.passed_on for upstream in upstreams):
            raise InvalidRequest(f"Unknown parameter: '{name}'.", param=name, code="unknown_parameter")
