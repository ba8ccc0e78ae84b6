"""Request → plan: everything that making one response takes, looked up and resolved."""

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from functools import partial
from typing import TypeVar

from msgspec import Struct
from msgspec.structs import replace

from app.domain import files, limits
from app.domain.approvals import signing
from app.domain.compaction import can_compact, context_tokens, counted_tokens, estimated_tokens, newest_compaction
from app.domain.context import Context, LeftOut, answered_requests, check_parent, references, resolve, restore
from app.domain.dialect import Dialect
from app.domain.files import NO_FILES, Files, Gone
from app.domain.hosted import HostedRoute, Kind
from app.domain.item_builders import OutputOptions
from app.domain.lifecycle import APPENDED, IN_FLIGHT
from app.domain.prompt import chat_request
from app.domain.rights import Rights
from app.domain.sealed import Seal, TenantSeal
from app.errors import (
    ApiError,
    ConversationLocked,
    InvalidParameter,
    InvalidRequest,
    UpstreamBusy,
    UpstreamGarbled,
    UpstreamStalled,
    UpstreamUnavailable,
)
from app.ids import NewId, new_id
from app.offload import offload
from app.outbound.catalog import Catalog, Route
from app.outbound.declared import DeclaredTools
from app.outbound.mcp import ToolServer
from app.outbound.upstream import Upstream
from app.rooms import Room, Rooms
from app.runs.files import FileReading, sizes
from app.settings import Settings
from app.storage import approvals, contexts, responses
from app.storage.contexts import Chain, Parent, StoredItem
from app.storage.database import Database, Tx
from app.storage.tables import OUTPUT_POSITION
from app.wire.items import AnyItem, McpApprovalRequest, decode_stored_item
from app.wire.requests import CreateResponse
from app.wire.resources import Usage

T = TypeVar("T")


class RunPlan(Struct, frozen=True):
    """Everything that making one response takes."""

    tenant_id: str
    request: CreateResponse
    context: Context
    routes: Sequence[tuple[Upstream, Route]]
    caller_key: str | None
    seal: TenantSeal
    options: OutputOptions
    parent: Parent | None
    earlier_bytes: int
    """What the items of the parent's context take."""
    room: Room
    """To be released as soon as the context is not needed any more."""
    servers: Mapping[str, ToolServer]
    """The MCP servers that the request declares, by label."""
    hosted: Mapping[Kind, HostedRoute]
    tool_servers: Mapping[str, ToolServer]
    """The operator's, by name."""
    size: int
    """Bytes of the request, of what it continues, and of the files."""
    files: Files = NO_FILES
    """Those that the context refers to."""
    compact_threshold: int | None = None
    """Tokens of a context that is compacted before the next turn; None for none."""
    context_tokens: int = 0
    """Those of the context, where there is a threshold."""
    summary_routes: Sequence[tuple[Upstream, Route]] = ()
    """The ways to the model that makes summaries of reasoning, where there is one and the request asks for them."""

    def refuse_unanswerable(self) -> None:
        """Raises UnsupportedParameter for what the first upstream can't be asked: before a run is queued for it."""
        upstream, route = self.routes[0]
        self.chat_request(self.request, self.context, upstream, route)

    def chat_request(
        self,
        request: CreateResponse,
        context: Context,
        upstream: Upstream,
        route: Route,
        *,
        output_tokens_max: int | None = None,
    ) -> bytes:
        """The body of a request to an upstream, in its dialect (`domain/prompt.py`). Raises UnsupportedParameter."""
        dialect = _dialect(upstream, route)
        taken = {name: value for name, value in request.extra.items() if upstream.entry.takes(name)}
        return chat_request(
            replace(request, extra=taken),
            context,
            model=route.model,
            dialect=dialect.keeping_roles() if request.is_chat else dialect,
            unseal=self.seal.open,
            output_tokens_max=output_tokens_max,
            files=self.files,
        )

    async def first_in_order(
        self, ask: Callable[[Upstream, Route], Awaitable[T]], routes: Sequence[tuple[Upstream, Route]] = ()
    ) -> T:
        """What `ask` gets from the upstream of the first route that is in order; by default of the routes to the model. Raises
        ApiError."""
        failed: ApiError | None = None
        for upstream, route in routes or self.routes:
            try:
                return await ask(upstream, route)
            except (UpstreamUnavailable, UpstreamBusy, UpstreamGarbled, UpstreamStalled) as error:
                failed = error
        assert failed is not None
        raise failed

    def ids_of_requests(self, new_id: NewId, label: str, name: str, arguments: str) -> NewId:
        """Gives an id to the request to approve this call: a signed one, where the request is not stored."""
        return new_id if self.request.store else signing(new_id, self.seal, label, name, arguments)

    def ids_of_lists(self, label: str) -> NewId:
        """Gives an id to the list of this server's tools, which says whose it is."""
        origin = self.context.origins[label]
        return lambda prefix: new_id(prefix) + origin

    @property
    def left_out(self) -> LeftOut:
        """What the model does not see of what it would see in the hosted API, and files that are gone."""
        gone = tuple(key for key, file in self.files.items() if isinstance(file, Gone))
        return replace(self.context.left_out, files=gone)

    @property
    def begins_with_upstream(self) -> bool:
        """Whether nothing is to be listed or called before the first turn."""
        unlisted = self.context.toolbox.unlisted and not self.request.compacts
        return self.request.generate and not (unlisted or self.context.approved)

    @property
    def compacts_first(self) -> bool:
        """Whether the first turn makes a summary."""
        return self.request.compacts or self.is_over(self.context, self.context_tokens)

    def is_over(self, context: Context, tokens: int) -> bool:
        """Whether a context of so many tokens is to be compacted."""
        return self.compact_threshold is not None and tokens > self.compact_threshold and can_compact(context.items)


class _Found(Struct):
    """What is stored of a request's context."""

    bytes: int = 0
    """What all of it takes."""
    parent: Parent | None = None
    earlier: list[StoredItem] = []
    earlier_bytes: int = 0
    referenced: dict[str, str] = {}
    requests: dict[str, McpApprovalRequest] = {}
    tokens: int = 0
    """Those of the context, where it may be compacted."""
    own: frozenset[str] = frozenset()
    """Ids of the request's own items."""
    files: Files = NO_FILES
    summary_routes: Sequence[tuple[Upstream, Route]] = ()


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
    ) -> None:
        self._settings, self._database, self._catalog = settings, database, catalog
        self._files = file_reading
        self._upstreams, self._seal = upstreams, seal
        self._items_max = settings.context_items_max
        self._rooms = Rooms(settings.contexts_bytes_max, waiting_max=settings.foreground_runs_max)
        self._declared = DeclaredTools(settings, catalog)

    async def plan(self, tenant_id: str, caller_key: str | None, request: CreateResponse, *, rights: Rights) -> RunPlan:
        """The plan of a new request. Raises ApiError for everything that can be known before the upstream is asked."""
        if len(request.input) > self._settings.input_items_max:
            raise InvalidParameter(f"'input' has more than {self._settings.input_items_max} items.", param="input")
        limits.check(
            request,
            tools_max=self._settings.tools_max,
            names_max=self._settings.tools_named_max,
            listed_max=self._settings.tools_listed_max,
        )
        routes = await self._routes(request.model, caller_key, rights)
        _refuse_untaken(request, [upstream for upstream, _ in routes])
        servers = self._declared.servers(request)
        self._declared.refuse_hosted(request)
        room = self.room()
        try:
            found, context, size = await self._with_files(
                tenant_id,
                request,
                routes,
                room,
                partial(self._found, tenant_id, request, servers, room),
                wait_s=self._settings.context_wait_s,
            )
            slot = found.parent.conversation if found.parent else None
            usage = await self._usage(tenant_id, request, slot.writer if slot else request.body.previous_response_id)
            turn = found.parent.place.turn if found.parent else None
            found.tokens = await _tokens(size, request, context, turn, found.earlier, usage)
            found.summary_routes = await self._summary_routes(request, caller_key)
        except BaseException:
            room.release()
            raise
        return self._plan(tenant_id, request, context, routes, caller_key, servers, size, room, found)

    async def _found(
        self, tenant_id: str, request: CreateResponse, servers: Mapping[str, ToolServer], room: Room, beside: int
    ) -> tuple["_Found", Context, int]:
        """What is stored of a new request's context, the context, and its size, once there is room for it beside so many bytes."""
        found = await self._find(tenant_id, request, room, beside)
        size = request.size + found.bytes + beside
        context = await offload(size, self._resolve, self._seal.of(tenant_id), servers, request, found)
        found.own = frozenset(item.id for item in context.input)
        return found, context, size

    async def _with_files(
        self,
        tenant_id: str,
        request: CreateResponse,
        routes: Sequence[tuple[Upstream, Route]],
        room: Room,
        look: Callable[[int], Awaitable[tuple["_Found", Context, int]]],
        *,
        wait_s: float | None,
    ) -> tuple["_Found", Context, int]:
        """What `look` finds, with the files that its context refers to. It looks again, without having kept anything, where these need
        room beside the rest. Raises InvalidRequest, also for what the first upstream takes in no form; TooManyRequests, unless `wait_s`
        is None."""
        unseal, beside = self._seal.of(tenant_id).open, 0
        dialects = [_dialect(upstream, route) for upstream, route in routes]
        needs = files.Needs.of(dialects)
        while True:
            found, context, size = await look(beside)
            places = await offload(size, files.places, request, context, found.own, unseal)
            wanted = await offload(size, files.wanted, places, needs)
            stored = await self._files.find(tenant_id, wanted, needs, size - beside)
            if stored.bytes > beside:
                del found, context, places, wanted
                beside = stored.bytes
                continue
            if wanted:
                found.files = await self._files.read(tenant_id, wanted, stored, dialects, wait_s=wait_s)
                size += sizes(found.files) - beside
                room.shrink(size)
            await offload(size, files.check, places, found.files, dialects[0])
            return found, context, size

    def _resolve(
        self, seal: TenantSeal, servers: Mapping[str, ToolServer], request: CreateResponse, found: "_Found"
    ) -> Context:
        return resolve(
            request,
            _decoded(found.earlier),
            {id: decode_stored_item(body.encode()) for id, body in found.referenced.items()},
            new_id,
            seal=seal,
            requests=found.requests,
            hosted=frozenset(self._catalog.hosted),
            origins=_origins(servers, seal),
        )

    def room(self) -> Room:
        """Room for a context, to be taken and released."""
        return Room(self._rooms)

    async def restore(
        self,
        tenant_id: str,
        response_id: str,
        caller_key: str | None,
        request: CreateResponse,
        made: Sequence[AnyItem],
        room: Room,
    ) -> RunPlan:
        """The plan of a stored response, with the items that earlier owners have made. It waits for `room` as long as that takes.
        Raises ApiError."""

        async def read(bytes_max: int) -> tuple[int, Chain | None]:
            async with self._database.autocommit() as tx:
                chain = await contexts.load_chain(
                    tx, tenant_id, response_id, bytes_max=bytes_max, items_max=self._items_max
                )
            return chain.bytes, None if chain.items is None else chain

        async def look(beside: int) -> tuple[_Found, Context, int]:
            chain = await self._fitting(room, read, request.size + beside, given=beside, wait_s=None)
            rows, size = chain.items or [], request.size + chain.bytes + beside
            stored = await offload(size, _decoded, rows)
            own = [item for item, row in zip(stored, rows, strict=True) if row.turn == chain.parent.place.turn]
            requests: dict[str, McpApprovalRequest] = {}
            if answered := answered_requests(own):
                async with self._database.autocommit() as tx:
                    requests = await _requests(tx, tenant_id, answered, {row.id for row in rows})
            context = await offload(
                size, restore, request, stored, own, made, seal=seal, requests=requests, hosted=hosted, origins=origins
            )
            usage = await self._usage(tenant_id, request, request.body.previous_response_id)
            tokens = await _tokens(size, request, context, chain.parent.place.turn - 1, rows, usage)
            return _Found(tokens=tokens, own=frozenset(item.id for item in own)), context, size

        try:
            hosted = frozenset(self._catalog.hosted)
            routes, servers = await self._routes(request.model, caller_key), self._declared.servers(request)
            seal = self._seal.of(tenant_id)
            origins = _origins(servers, seal)
            found, context, size = await self._with_files(tenant_id, request, routes, room, look, wait_s=None)
            found.summary_routes = await self._summary_routes(request, caller_key)
        except BaseException:
            room.release()
            raise
        return self._plan(tenant_id, request, context, routes, caller_key, servers, size, room, found)

    async def _find(self, tenant_id: str, request: CreateResponse, room: Room, beside: int) -> "_Found":
        """What is stored of a new request's context, once there is room for all of it, and for so many bytes beside it."""
        previous, conversation = request.body.previous_response_id, request.conversation_id
        wanted = references(request.input)
        answered = answered_requests(request.input)

        async def read(bytes_max: int) -> tuple[int, _Found | None]:
            found = _Found()
            async with self._database.autocommit() as tx:
                if chain := await self._continued(tx, tenant_id, request, bytes_max):
                    found.parent, found.earlier = chain.parent, chain.items or []
                    found.bytes = found.earlier_bytes = chain.bytes
                if wanted:
                    left = bytes_max - found.bytes
                    taken, bodies = await contexts.find_items(tx, tenant_id, wanted, bytes_max=left)
                    found.referenced = bodies or {}
                    found.bytes += taken
                if found.bytes > bytes_max:
                    return found.bytes, None
                if answered:
                    known = {*wanted, *(item.id for item in found.earlier), *(item.id for item in request.input)}
                    found.requests = await _requests(tx, tenant_id, answered, known)
            return found.bytes, found

        given = len(bytes(request.body.input)) + beside
        wait_s = self._settings.context_wait_s
        if previous is None and conversation is None and not wanted and not answered:
            self._check(given)
            await room.take(request.size + beside, wait_s=wait_s)
            return _Found()
        return await self._fitting(room, read, request.size + beside, given=given, wait_s=wait_s)

    async def _usage(self, tenant_id: str, request: CreateResponse, parent_id: str | None) -> Usage | None:
        """The usage of the response that a request continues, where the context may be compacted."""
        if parent_id is None or not request.body.context_management:
            return None
        async with self._database.autocommit() as tx:
            parent = await responses.load_body(tx, tenant_id, parent_id)
        # In a conversation one that has failed is no parent.
        is_known = parent and (parent.conversation is None or parent.status in APPENDED)
        return parent.usage if parent and is_known else None

    async def _fitting(
        self,
        room: Room,
        read: Callable[[int], Awaitable[tuple[int, T | None]]],
        size: int,
        *,
        given: int = 0,
        wait_s: float | None,
    ) -> T:
        """What `read` finds, when there is room for it beside a request of this size, of whose context so much is given."""

        async def look(bytes_max: int) -> tuple[int, T | None]:
            needed, found = await read(min(bytes_max - size, self._settings.context_bytes_max - given))
            self._check(given + needed)
            return size + needed, found

        self._check(given)
        return await room.read(look, least=size, wait_s=wait_s)

    def _check(self, size: int) -> None:
        """Raises InvalidRequest for a context that is too long."""
        most = self._settings.context_bytes_max
        if size > most:
            raise InvalidRequest(
                f"The context takes {size} bytes; more than {most} are not possible.",
                param="input",
                code="context_length_exceeded",
            )

    async def _continued(self, tx: Tx, tenant_id: str, request: CreateResponse, bytes_max: int) -> Chain | None:
        """What a new response continues. Raises ConversationLocked, unless it only reads the conversation."""
        if (previous := request.body.previous_response_id) is not None:
            chain = await contexts.load_chain(
                tx, tenant_id, previous, items_max=self._items_max, bytes_max=bytes_max, in_flight=False
            )
            check_parent(previous, chain.status)
            return chain
        if (conversation := request.conversation_id) is not None:
            chain = await contexts.load_conversation(
                tx,
                tenant_id,
                conversation,
                items_max=self._items_max,
                bytes_max=bytes_max,
                in_flight=not request.store,
            )
            if request.store and chain.status in IN_FLIGHT:
                raise ConversationLocked
            return chain
        return None

    async def _summary_routes(self, request: CreateResponse, caller_key: str | None) -> list[tuple[Upstream, Route]]:
        """The ways to the model that makes the summaries of reasoning that a request asks for, if there is one."""
        form = self._catalog.reasoning_summary(request.model)
        if isinstance(form, str) or not _asks_for_summary(request):
            return []
        return await self._routes(form.model, caller_key)

    async def _routes(
        self, model: str, caller_key: str | None, rights: Rights | None = None
    ) -> list[tuple[Upstream, Route]]:
        """The ways to a model, each to an upstream whose dialect is known as far as it can be. Raises NotFound, ModelNotAllowed."""
        routes = [(self._upstreams[route.upstream], route) for route in self._catalog.routes(model)]
        if rights:
            rights.demand_model(model)
        for upstream, _ in routes:
            await upstream.find_dialect(caller_key)
        return routes

    def _plan(
        self,
        tenant_id: str,
        request: CreateResponse,
        context: Context,
        routes: list[tuple[Upstream, Route]],
        caller_key: str | None,
        servers: dict[str, ToolServer],
        size: int,
        room: Room,
        found: "_Found",
    ) -> RunPlan:
        seal = self._seal.of(tenant_id)
        management = request.body.context_management or ()
        # A client that keeps the history itself has to keep the reasoning, too.
        is_sealed = not request.store or "reasoning.encrypted_content" in request.include
        options = OutputOptions(
            summarize=_asks_for_summary(request) and self._catalog.reasoning_summary(request.model) == "verbatim",
            summary_follows=bool(found.summary_routes),
            seal=seal.close if is_sealed else None,
        )
        return RunPlan(
            tenant_id=tenant_id,
            request=request,
            context=context,
            routes=routes,
            caller_key=caller_key,
            seal=seal,
            options=options,
            parent=found.parent,
            earlier_bytes=found.earlier_bytes,
            room=room,
            servers=servers,
            hosted=self._catalog.hosted,
            tool_servers=self._declared.operators,
            size=size,
            compact_threshold=min(
                (one.compact_threshold or self._settings.compact_threshold_tokens for one in management), default=None
            ),
            context_tokens=found.tokens,
            files=found.files,
            summary_routes=found.summary_routes,
        )


def _dialect(upstream: Upstream, route: Route) -> Dialect:
    """The dialect of a route's model."""
    dialect = upstream.dialect_for(route.model)
    return replace(dialect, lacks=dialect.lacks | route.lacks) if route.lacks else dialect


def _asks_for_summary(request: CreateResponse) -> bool:
    reasoning = request.body.reasoning
    return bool(reasoning and (reasoning.summary or reasoning.generate_summary))


async def _requests(
    tx: Tx, tenant_id: str, ids: Sequence[str], known: Collection[str | None]
) -> dict[str, McpApprovalRequest]:
    """Those of the approval requests that we have made; what is not in the context is not even read."""
    found = await approvals.find_requests(tx, tenant_id, [id for id in ids if id in known])
    items = [decode_stored_item(body.encode()) for body in found]
    return {item.id: item for item in items if isinstance(item, McpApprovalRequest)}


def _origins(servers: Mapping[str, ToolServer], seal: TenantSeal) -> dict[str, str]:
    """For each label a signature of its server's address, which may hold secrets: another server under the label has another."""
    return {label: seal.sign("list", server.url, *server.command) for label, server in servers.items()}


def _decoded(items: Sequence[StoredItem]) -> list[AnyItem]:
    return [decode_stored_item(item.body.encode()) for item in items]


async def _tokens(
    size: int,
    request: CreateResponse,
    context: Context,
    turn: int | None,
    earlier: Sequence[StoredItem],
    usage: Usage | None,
) -> int:
    """The tokens of a context of so many bytes; 0 if it is not to be compacted."""
    if not request.body.context_management:
        return 0
    return await offload(size, _known_tokens, request, context, turn, earlier, usage)


def _known_tokens(
    request: CreateResponse, context: Context, turn: int | None, earlier: Sequence[StoredItem], usage: Usage | None
) -> int:
    """The tokens of a context: as counted for its parent, which was at this turn, and estimated for what has been added; or else
    all are estimated."""
    last = {row.id for row in earlier if row.turn == turn and row.position >= OUTPUT_POSITION}
    places = [at for at, item in enumerate(context.items) if item.id in last]
    counted = counted_tokens(usage, [context.items[at] for at in places])
    if counted is None or newest_compaction(context.items) > places[-1]:
        return context_tokens(request, [item for _, item in context.visible])
    return counted + estimated_tokens(context.items[places[-1] + 1 :])


def _refuse_untaken(request: CreateResponse, upstreams: Sequence[Upstream]) -> None:
    """A parameter beyond the API must mean something to an upstream that may answer."""
    for name in request.extra:
        if not any(upstream.entry.takes(name) for upstream in upstreams):
            raise InvalidRequest(f"Unknown parameter: '{name}'.", param=name, code="unknown_parameter")
