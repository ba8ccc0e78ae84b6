"""Prompts that fit into a model's context. With `truncation: auto`, a context that is too long begins later.

The upstream's refusal decides, with its counts. Where the size of the model's context is known, from the catalog or an earlier refusal,
a long prompt is counted before it is sent, if an endpoint does that without generating; if none does, a size from the catalog is
compared with an estimate. Upstreams that cut prompts silently refuse none: without `truncation: auto`, what is longer than a size from the
catalog is refused here.
"""

from app.domain.context import Context
from app.domain.truncation import BYTES_PER_TOKEN_MIN, estimated_prompt, later_start, truncated
from app.errors import ContextTooLong
from app.offload import offload
from app.outbound.catalog import Route
from app.outbound.tokens import ChatRequest, TokenCounter
from app.outbound.upstream import ChunkStream, Upstream
from app.runs.plan import RunPlan
from app.wire.requests import CreateResponse

LATER_MAX = 20
"""How often a context may begin later."""

COUNTED_MAX = 3
"""How often counts decide how much is left out; then it is half each time, as the counts have not sufficed."""


class Fitting:
    """Opens an upstream with a prompt that it takes."""

    def __init__(self, plan: RunPlan, counter: TokenCounter) -> None:
        self._plan, self._counter = plan, counter
        self._starts: dict[tuple[str, str], int] = {}
        """Upstream and model → the position at which the context begins that they take."""
        self._sizes: dict[tuple[str, str], int] = {}
        """Upstream and model → the size of the context, if a refusal has named it."""

    async def open(
        self, request: CreateResponse, context: Context, tokens_max: int | None, upstream: Upstream, route: Route
    ) -> ChunkStream:
        """The upstream's answer. What did not fit in an earlier turn is not sent again. Raises ApiError."""
        plan, at = self._plan, (upstream.name, route.model)
        is_auto = request.body.truncation == "auto"
        for later in range(LATER_MAX + 1):
            begun = await self._begun(context, self._starts.get(at, 0))
            body = await offload(
                plan.size, plan.chat_request, request, begun, upstream, route, output_tokens_max=tokens_max
            )
            if not is_auto:
                await self._refuse_longer(request, begun, body, upstream, route)
            share = await self._share_over(request, begun, body, tokens_max, upstream, route) if is_auto else None
            is_counted = later < COUNTED_MAX
            if (
                share
                and later < LATER_MAX
                and await self._begin_later(at, request, context, share if is_counted else None)
            ):
                continue
            try:
                return await upstream.open(route.model, body, plan.caller_key)
            except ContextTooLong as error:
                if not is_auto or later == LATER_MAX:
                    raise
                self._learn(at, upstream, error, tokens_max)
                share = error.share_over or await self._share_over(request, begun, body, tokens_max, upstream, route)
                if not await self._begin_later(at, request, context, share if is_counted else None):
                    raise
        raise AssertionError("the last one is sent, and taken or refused")

    def _learn(self, at: tuple[str, str], upstream: Upstream, error: ContextTooLong, tokens_max: int | None) -> None:
        """Remember the size that a refusal names: in this run; in later ones, too, unless the request had a limit for its output, which
        some engines subtract."""
        if error.tokens_max:
            self._sizes[at] = error.tokens_max
        if tokens_max is None:
            upstream.record_context_tokens(at[1], error.tokens_max)

    async def _begun(self, context: Context, start: int) -> Context:
        return await offload(self._plan.size, truncated, context, start) if start else context

    async def _begin_later(
        self, at: tuple[str, str], request: CreateResponse, context: Context, share: float | None
    ) -> bool:
        """Leave out this share of the prompt, or half of what can be; returns whether anything is left out."""
        start = self._starts.get(at, 0)
        later = await offload(self._plan.size, later_start, request, context, start, share)
        if later is not None:
            self._starts[at] = later
        return later is not None

    async def _share_over(
        self,
        request: CreateResponse,
        context: Context,
        body: bytes,
        tokens_max: int | None,
        upstream: Upstream,
        route: Route,
    ) -> float | None:
        """How much of a prompt is too much, from 0 to 1; None if that is nothing, or unknown."""
        given = _given_size(upstream, route)
        size = given or self._sizes.get((upstream.name, route.model)) or upstream.context_tokens(route.model)
        if size is None:
            return None
        tokens, _ = await self._tokens(request, context, body, upstream, route, size, may_estimate=given is not None)
        room = max(size - (tokens_max or 0), size // 2)
        return (tokens - room) / tokens if tokens > room else None

    async def _refuse_longer(
        self, request: CreateResponse, context: Context, body: bytes, upstream: Upstream, route: Route
    ) -> None:
        """Raises ContextTooLong for a prompt that is longer than the size from the catalog."""
        size = _given_size(upstream, route)
        if size is None:
            return
        tokens, is_estimate = await self._tokens(request, context, body, upstream, route, size, may_estimate=True)
        if tokens > size:
            about = "about " if is_estimate else ""
            raise ContextTooLong(
                f"The context of this model has {size} tokens, but the prompt has {about}{tokens}. Send less, or 'truncation': 'auto'.",
                tokens_max=size,
            )

    async def _tokens(
        self,
        request: CreateResponse,
        context: Context,
        body: bytes,
        upstream: Upstream,
        route: Route,
        size: int,
        *,
        may_estimate: bool,
    ) -> tuple[int, bool]:
        """The tokens of a prompt, and whether they are estimated; 0 where that is not known, or they fit into `size` by all odds."""
        if len(body) <= size * BYTES_PER_TOKEN_MIN:
            return 0, False
        asked = ChatRequest(upstream, route.model, body, self._plan.caller_key)
        counted = await self._counter.count_without_output(self._plan.tenant_id, asked)
        if counted is None and may_estimate:
            return await offload(self._plan.size, estimated_prompt, request, context), True
        return counted or 0, False


def _given_size(upstream: Upstream, route: Route) -> int | None:
    """The size of a model's context by the catalog."""
    return route.context_tokens or upstream.entry.context_tokens
