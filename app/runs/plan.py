"""The plan of a run: everything that making one response takes."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

from msgspec import Struct
from msgspec.structs import replace

from app.domain.approvals import signing
from app.domain.compaction import can_compact
from app.domain.context import Context, LeftOut
from app.domain.files import NO_FILES, Files
from app.domain.hosted import HostedRoute, Kind
from app.domain.item_builders import OutputOptions
from app.domain.prompt import chat_request
from app.domain.run_limits import NO_LIMITS
from app.domain.sealed import TenantSeal
from app.domain.spending import Spent
from app.errors import ApiError, UpstreamBusy, UpstreamGarbled, UpstreamStalled, UpstreamUnavailable
from app.ids import NewId, new_id
from app.outbound.catalog import Route
from app.outbound.mcp import ToolServer
from app.outbound.upstream import Upstream
from app.rooms import Room
from app.storage.contexts import Parent
from app.storage.usage import Charge
from app.wire.requests import CreateResponse
from app.wire.run_limits import RunLimits

T = TypeVar("T")


class RunPlan(Struct, frozen=True):
    """Everything that making one response takes."""

    tenant_id: str
    key_id: str | None
    """Of the key that asked; None without one."""
    currency: str
    """Of the routes' prices."""
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
    left_out: LeftOut
    """What the model does not see of what it would see in the hosted API, and files that are gone."""
    files: Files = NO_FILES
    """Those that the context refers to."""
    compact_threshold: int | None = None
    """Tokens of a context that is compacted before the next turn; None for none."""
    context_tokens: int = 0
    """Those of the context, where there is a threshold."""
    limits: RunLimits = NO_LIMITS
    """Of the run: those of the request, or the catalog's."""
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
        dialect = upstream.dialect_for(route)
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

    def charge(self, spent: Spent) -> Charge:
        """Whom the run is counted for, with what it has used."""
        return Charge(self.key_id, self.currency, spent)

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
