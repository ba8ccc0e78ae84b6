"""Request → plan: what making a response takes is looked up, resolved and checked."""

from collections.abc import Awaitable, Callable, Mapping, Sequence

from msgspec import Struct
from msgspec.structs import replace

from app.domain import files, limits
from app.domain.agents import with_messages
from app.domain.compaction import context_tokens, counted_tokens, estimated_tokens, newest_compaction
from app.domain.context import Context, LeftOut, answered_requests, resolve, restore
from app.domain.files import NO_FILES, Files, Gone
from app.domain.item_builders import OutputOptions
from app.domain.rights import Rights
from app.domain.run_limits import lower, refuse_approved, refuse_higher
from app.domain.sealed import Seal, TenantSeal
from app.errors import InvalidParameter, InvalidRequest
from app.ids import new_id
from app.offload import offload
from app.outbound.catalog import Catalog, Route
from app.outbound.declared import DeclaredTools
from app.outbound.mcp import ToolServer
from app.outbound.upstream import Upstream
from app.rooms import Room
from app.runs.agents import Agents
from app.runs.credentials import Credentials
from app.runs.files import FileReading, sizes
from app.runs.plan import RunPlan
from app.runs.stored import Stored, StoredContexts
from app.settings import Settings
from app.storage.contexts import Parent, StoredItem
from app.storage.database import Database
from app.storage.tables import OUTPUT_POSITION
from app.wire.items import AnyItem, decode_stored_item
from app.wire.requests import CreateResponse
from app.wire.resources import Usage

Routes = Sequence[tuple[Upstream, Route]]


class _Resolved(Struct):
    """The context of a run, and what it was resolved from."""

    request: CreateResponse
    """With the messages of its agent."""
    context: Context
    size: int
    """Bytes of the request, of what it continues, and of the files."""
    own: frozenset[str]
    """Ids of the request's own items."""
    continued: str | None
    """The response that this one continues."""
    turn: int | None
    """That of the response that this one continues."""
    earlier: Sequence[StoredItem]
    """What is stored of the context."""
    earlier_bytes: int = 0
    parent: Parent | None = None
    files: Files = NO_FILES


class Planner:
    """Plans runs."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        catalog: Catalog,
        upstreams: Mapping[str, Upstream],
        seal: Seal,
        file_reading: FileReading,
        agents: Agents,
    ) -> None:
        self._settings, self._catalog, self._agents = settings, catalog, agents
        self._stored, self._files = StoredContexts(settings, database), file_reading
        self._upstreams, self._seal = upstreams, seal
        self._declared = DeclaredTools(settings, catalog)
        self._credentials = Credentials(settings, database, seal)

    def room(self) -> Room:
        """Room for a context, to be taken and released."""
        return self._stored.room()

    async def plan(self, tenant_id: str, caller_key: str | None, request: CreateResponse, *, rights: Rights) -> RunPlan:
        """The plan of a new request. Raises ApiError for everything that can be known before the upstream is asked."""
        if len(request.input) > self._settings.input_items_max:
            raise InvalidParameter(f"'input' has more than {self._settings.input_items_max} items.", param="input")
        request, agent = await self._agents.applied(rights, request)
        limits.check(
            request,
            tools_max=self._settings.tools_max,
            names_max=self._settings.tools_named_max,
            listed_max=self._settings.tools_listed_max,
        )
        # An agent's own model need not be one that the caller may name.
        routes = await self._routes(request.model, caller_key, None if request.agent else rights, agent=request.agent)
        _refuse_untaken(request, [upstream for upstream, _ in routes])
        most = self._catalog.run_limits(request.model)
        if not (request.agent or request.body.prompt):  # whose limits are no mistake of the client's
            refuse_higher(request.body.run_limits, most)
        run_limits = lower(request.body.run_limits, most)
        self._catalog.refuse_unpriced(run_limits, request.model, is_summarized=request.asks_for_summary)
        servers = self._declared.servers(request)
        self._declared.refuse_hosted(request)
        room, seal = self.room(), self._seal.of(tenant_id)

        async def look(beside: int) -> _Resolved:
            stored = await self._stored.of_request(tenant_id, request, room, beside)
            size = request.size + stored.bytes + beside
            whole = request
            if agent:  # whose messages are made once there is room for them
                whole = await offload(size, with_messages, agent, request, bytes_max=self._settings.body_bytes_max)
            context = await offload(size, self._resolve, seal, servers, whole, stored)
            refuse_approved(len(context.approved), run_limits)
            slot = stored.parent.conversation if stored.parent else None
            return _Resolved(
                whole,
                context,
                size,
                own=frozenset(item.id for item in context.input),
                continued=slot.writer if slot else request.body.previous_response_id,
                turn=stored.parent.place.turn if stored.parent else None,
                earlier=stored.earlier,
                earlier_bytes=stored.earlier_bytes,
                parent=stored.parent,
            )

        wait_s = self._settings.context_wait_s
        return await self._plan(
            tenant_id, rights.key_id, request, caller_key, routes, servers, room, look, wait_s=wait_s
        )

    def _resolve(
        self, seal: TenantSeal, servers: Mapping[str, ToolServer], request: CreateResponse, stored: Stored
    ) -> Context:
        return resolve(
            request,
            _decoded(stored.earlier),
            {id: decode_stored_item(body.encode()) for id, body in stored.referenced.items()},
            new_id,
            seal=seal,
            requests=stored.requests,
            hosted=frozenset(self._catalog.hosted),
            origins=_origins(servers, seal),
        )

    async def restore(
        self,
        tenant_id: str,
        response_id: str,
        key_id: str | None,
        caller_key: str | None,
        request: CreateResponse,
        made: Sequence[AnyItem],
        room: Room,
    ) -> RunPlan:
        """The plan of a stored response, with the items that earlier owners have made. It waits for `room` as long as that takes.
        Raises ApiError."""
        routes = await self._routes(request.model, caller_key, agent=request.agent)
        run_limits = lower(request.body.run_limits, self._catalog.run_limits(request.model))
        # The catalog may be another one than at admission.
        self._catalog.refuse_unpriced(run_limits, request.model, is_summarized=request.asks_for_summary)
        servers = self._declared.servers(request)
        seal, hosted = self._seal.of(tenant_id), frozenset(self._catalog.hosted)
        origins = _origins(servers, seal)

        async def look(beside: int) -> _Resolved:
            chain = await self._stored.of_response(tenant_id, response_id, request, room, beside)
            rows, turn, size = chain.items or [], chain.parent.place.turn, request.size + chain.bytes + beside
            stored = await offload(size, _decoded, rows)
            own = [item for item, row in zip(stored, rows, strict=True) if row.turn == turn]
            requests = await self._stored.requests(tenant_id, answered_requests(own), {row.id for row in rows})
            context = await offload(
                size, restore, request, stored, own, made, seal=seal, requests=requests, hosted=hosted, origins=origins
            )
            return _Resolved(
                request,
                context,
                size,
                own=frozenset(item.id for item in own),
                continued=request.body.previous_response_id,
                turn=turn - 1,
                earlier=rows,
            )

        plan = await self._plan(tenant_id, key_id, request, caller_key, routes, servers, room, look, wait_s=None)
        return await self.authorized(plan)

    async def authorized(self, plan: RunPlan) -> RunPlan:
        """The plan of a run that is made now, with the stored credentials of its tool servers. Raises as `Credentials.added_to`."""
        try:
            return await self._credentials.added_to(plan)
        except BaseException:
            plan.room.release()
            raise

    async def _with_files(
        self,
        tenant_id: str,
        request: CreateResponse,
        routes: Routes,
        room: Room,
        look: Callable[[int], Awaitable[_Resolved]],
        *,
        wait_s: float | None,
    ) -> _Resolved:
        """What `look` finds, with the files that its context refers to. It looks again, without having kept anything, where these need
        room beside the rest. Raises InvalidRequest, also for what the first upstream takes in no form; TooManyRequests, unless `wait_s`
        is None."""
        unseal, beside = self._seal.of(tenant_id).open, 0
        dialects = [upstream.dialect_for(route) for upstream, route in routes]
        needs = files.Needs.of(dialects)
        while True:
            made = await look(beside)
            places = await offload(made.size, files.places, request, made.context, made.own, unseal)
            if not places:
                return made
            wanted = await offload(made.size, files.wanted, places, needs)
            found = await self._files.find(tenant_id, wanted, needs, made.size - beside)
            if found.bytes > beside:
                del made, places, wanted
                beside = found.bytes
                continue
            if wanted:
                made.files = await self._files.read(tenant_id, wanted, found, dialects, wait_s=wait_s)
                made.size += sizes(made.files, wanted) - beside
                room.shrink(made.size)
            await offload(made.size, files.check, places, made.files, dialects[0])
            return made

    async def _tokens(self, tenant_id: str, request: CreateResponse, made: _Resolved) -> int:
        """The tokens of a context; 0 if it is not to be compacted."""
        if not request.body.context_management:
            return 0
        usage = await self._stored.usage(tenant_id, made.continued) if made.continued else None
        return await offload(made.size, _known_tokens, request, made, usage)

    async def _routes(
        self, model: str, caller_key: str | None, rights: Rights | None = None, *, agent: str = ""
    ) -> Routes:
        """The ways to a model, each to an upstream whose dialect is known as far as it can be. Raises NotFound, ModelNotAllowed."""
        routes = [(self._upstreams[route.upstream], route) for route in self._catalog.routes(model, agent=agent)]
        if rights:
            rights.demand_model(model)
        for upstream, _ in routes:
            await upstream.find_dialect(caller_key)
        return routes

    async def _plan(
        self,
        tenant_id: str,
        key_id: str | None,
        request: CreateResponse,
        caller_key: str | None,
        routes: Routes,
        servers: Mapping[str, ToolServer],
        room: Room,
        look: Callable[[int], Awaitable[_Resolved]],
        *,
        wait_s: float | None,
    ) -> RunPlan:
        """The plan of a run whose context is what `look` finds."""
        seal = self._seal.of(tenant_id)
        summary = self._catalog.reasoning_summary(request.model) if request.asks_for_summary else "off"
        try:
            made = await self._with_files(tenant_id, request, routes, room, look, wait_s=wait_s)
            request = made.request
            tokens = await self._tokens(tenant_id, request, made)
            left_out = await offload(made.size, _left_out, made.context, made.files)
            summary_routes = () if isinstance(summary, str) else await self._routes(summary.model, caller_key)
        except BaseException:
            room.release()
            raise
        management = request.body.context_management or ()
        # A client that keeps the history itself has to keep the reasoning, too.
        is_sealed = not request.store or "reasoning.encrypted_content" in request.include
        options = OutputOptions(
            summarize=summary == "verbatim",
            summary_follows=bool(summary_routes),
            seal=seal.close if is_sealed else None,
        )
        return RunPlan(
            tenant_id=tenant_id,
            key_id=key_id,
            currency=self._catalog.currency,
            request=request,
            context=made.context,
            routes=routes,
            caller_key=caller_key,
            seal=seal,
            options=options,
            parent=made.parent,
            earlier_bytes=made.earlier_bytes,
            room=room,
            servers=servers,
            hosted=self._catalog.hosted,
            tool_servers=self._declared.operators,
            size=made.size,
            left_out=left_out,
            files=made.files,
            compact_threshold=min(
                (one.compact_threshold or self._settings.compact_threshold_tokens for one in management), default=None
            ),
            context_tokens=tokens,
            summary_routes=summary_routes,
            limits=lower(request.body.run_limits, self._catalog.run_limits(request.model)),
        )


def _refuse_untaken(request: CreateResponse, upstreams: Sequence[Upstream]) -> None:
    """A parameter beyond the API must mean something to an upstream that may answer."""
    for name in request.extra:
        if not any(upstream.entry.takes(name) for upstream in upstreams):
            raise InvalidRequest(f"Unknown parameter: '{name}'.", param=name, code="unknown_parameter")


def _origins(servers: Mapping[str, ToolServer], seal: TenantSeal) -> dict[str, str]:
    """For each label a signature of its server's address, which may hold secrets: another server under the label has another."""
    return {label: seal.sign("list", server.url, *server.command) for label, server in servers.items()}


def _decoded(items: Sequence[StoredItem]) -> list[AnyItem]:
    return [decode_stored_item(item.body.encode()) for item in items]


def _left_out(context: Context, read: Files) -> LeftOut:
    """What a context leaves out, and its files that are gone."""
    gone = tuple(key for key, file in read.items() if isinstance(file, Gone))
    return replace(context.left_out, files=gone)


def _known_tokens(request: CreateResponse, made: _Resolved, usage: Usage | None) -> int:
    """The tokens of a context: as counted for the response that it continues, and estimated for what has been added; or else all are
    estimated."""
    items = made.context.items
    last = {row.id for row in made.earlier if row.turn == made.turn and row.position >= OUTPUT_POSITION}
    places = [at for at, item in enumerate(items) if item.id in last]
    counted = counted_tokens(usage, [items[at] for at in places])
    if counted is None or newest_compaction(items) > places[-1]:
        return context_tokens(request, [item for _, item in made.context.visible])
    return counted + estimated_tokens(items[places[-1] + 1 :])
