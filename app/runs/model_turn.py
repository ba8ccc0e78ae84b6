"""One completion of an upstream after the other: routes and failover, chunks to events.

`ModelTurns` is the only owner of the upstream's stream: it opens, reads and closes it.
"""

import asyncio
from collections.abc import Collection

from msgspec.structs import replace

from app.domain.citations import NO_SOURCES, sources_of
from app.domain.context import Context
from app.domain.lifecycle import Outcome, outcome_of
from app.domain.prices import Prices
from app.domain.prompt import compaction_turn
from app.domain.run_limits import Cap, cap, reached
from app.domain.think import ThinkSplitter
from app.domain.turn import Turn, texts_of
from app.errors import ApiError, UpstreamGarbled
from app.ids import new_id, siblings
from app.outbound.catalog import Route
from app.outbound.tokens import TokenCounter
from app.outbound.upstream import ChunkStream, Upstream
from app.runs.fitting import Fitting
from app.runs.plan import RunPlan
from app.runs.recorder import Recorder
from app.runs.summaries import Summaries
from app.storage.backlog import Backlog
from app.wire.chat import ChatUsage
from app.wire.items import ItemStatus, call_id_of
from app.wire.requests import CreateResponse
from app.wire.resources import Reason


class ModelTurns:
    """The model's turns in one run."""

    def __init__(
        self,
        plan: RunPlan,
        recorder: Recorder,
        counter: TokenCounter,
        *,
        calls_max: int,
        compaction_prompt: str,
        summaries: Summaries,
        call_ids: Collection[str] = (),
        reader: Backlog | None = None,
    ) -> None:
        """`calls_max` limits the calls of one turn; `summaries` are those of reasoning; `call_ids` are taken already. The run waits for
        its `reader`, if it has one that can't read later."""
        self._plan, self._recorder, self._reader = plan, recorder, reader
        self._fitting = Fitting(plan, counter)
        self._calls_max, self._compaction_prompt, self._summaries = calls_max, compaction_prompt, summaries
        # Clients distinguish calls by their ids, along the whole chain.
        self._call_ids = {*call_ids, *filter(None, map(call_id_of, plan.context.items))}
        self._prices: Prices | None = None
        """Of the route that has answered last."""
        self._cap: Cap | None = None
        """What limits the output of that answer."""
        self._repeated: ChatUsage | None = None
        """The usage of the turn before."""
        self.opening: asyncio.Task[ChunkStream] | None = None
        """The upstream's answer to the next turn, if it is requested already."""

    @property
    def tokens_left(self) -> int | None:
        """What `max_output_tokens` leaves for further turns; None for no limit. Compactions and summaries of reasoning do not
        count."""
        most, spent = self._plan.request.body.max_output_tokens, self._recorder.spent
        return most - spent.usage.output_tokens + spent.unlimited_output_tokens if most and spent.usage else most

    @property
    def spent(self) -> Outcome | None:
        """The outcome of a run whose limits leave nothing for another turn; None if there is none."""
        reason = self._spent_reason
        return Outcome("incomplete", reason=reason) if reason else None

    @property
    def _spent_reason(self) -> Reason | None:
        if self.tokens_left is not None and self.tokens_left <= 0:
            return "max_output_tokens"
        plan, spent = self._plan, self._recorder.spent
        if reason := reached(plan.limits, spent):
            return reason
        caps = [cap(plan.limits, spent, self._repeated, route.prices) for _, route in plan.routes[:1]]
        return next((one.reason for one in caps if one and not one.tokens), None)

    def open_first(self) -> "asyncio.Task[ChunkStream]":
        """Request the first turn of the plan, which may be a compaction. The task raises ApiError."""
        plan = self._plan
        return self.open_compaction(plan.context) if plan.compacts_first else self.open(plan.context)

    def open(self, context: Context) -> "asyncio.Task[ChunkStream]":
        """Request the next turn. The task raises ApiError."""
        return self._begin(self._plan.request, context, is_limited=True)

    def open_compaction(self, context: Context) -> "asyncio.Task[ChunkStream]":
        """Request the turn that makes the summary of a compaction. The task raises ApiError."""
        return self._begin(*compaction_turn(self._plan.request, context, self._compaction_prompt), is_limited=False)

    def _begin(self, request: CreateResponse, context: Context, *, is_limited: bool) -> "asyncio.Task[ChunkStream]":
        if self.opening is None:
            self.opening = asyncio.create_task(self._open(request, context, is_limited=is_limited))
        return self.opening

    async def close(self) -> None:
        """Close the upstream's answer, or stop waiting for it."""
        if self.opening is None:
            return
        self.opening.cancel()
        for result in await asyncio.gather(self.opening, return_exceptions=True):
            if isinstance(result, ChunkStream):
                await result.close()

    async def _open(self, request: CreateResponse, context: Context, *, is_limited: bool) -> ChunkStream:
        """The answer of the first route whose upstream is in order."""

        async def ask(upstream: Upstream, route: Route) -> ChunkStream:
            cap = self._cap_of(route, is_limited=is_limited)
            self._recorder.is_asking = True
            try:
                stream = await self._fitting.open(
                    request, context, max(cap.tokens, 1) if cap else None, upstream, route
                )
            except ApiError:
                self._recorder.is_asking = False
                raise
            self._prices, self._cap = route.prices, cap
            return stream

        return await self._plan.first_in_order(ask)

    def _cap_of(self, route: Route, *, is_limited: bool) -> Cap | None:
        """What limits the output of the next turn most; `max_output_tokens` only if it `is_limited`."""
        left = self.tokens_left if is_limited else None
        caps = [
            None if left is None else Cap(left, "max_output_tokens"),
            cap(self._plan.limits, self._recorder.spent, self._repeated, route.prices),
        ]
        return min((one for one in caps if one), key=lambda one: one.tokens, default=None)

    def outcome_of(self, turn: Turn) -> Outcome:
        """The outcome of a turn. One that was cut off at its cap has reached the limit which that comes from."""
        outcome, cap = outcome_of(turn.finish_reason), self._cap
        if outcome.reason != "max_output_tokens" or cap is None:
            return outcome
        made = turn.usage.completion_tokens if turn.usage else None
        return outcome if made is not None and made < cap.tokens else replace(outcome, reason=cap.reason)

    async def follow(self, context: Context) -> Turn:
        """Record one turn of the model from its first chunk to its last. Raises ApiError, Fenced, DatabaseUnavailable."""
        stream = await self.open(context)
        self._recorder.upstream = stream.upstream.name
        turn = Turn(
            context.toolbox,
            new_id,
            output_index=self._recorder.next_output_index,
            options=self._plan.options,
            splitter=ThinkSplitter(stream.upstream.dialect.think),
            call_ids=self._call_ids,
            sources=sources_of(context.items) if context.hosted else NO_SOURCES,
            calls_max=self._calls_max,
            call_items=siblings(),
        )
        try:
            await self._read(stream, turn)
        finally:
            self._recorder.next_output_index = turn.output_index
            await self._end(stream, turn)
        return turn

    async def compact(self, context: Context, bytes_max: int) -> tuple[str, Turn]:
        """One turn of the model, which is not recorded, but for its usage: its text, and the turn. Raises ApiError; UpstreamGarbled
        for a longer text."""
        stream = await self.open_compaction(context)
        self._recorder.upstream = stream.upstream.name
        turn = Turn(
            context.toolbox,
            new_id,
            splitter=ThinkSplitter(stream.upstream.dialect.think),
            calls_max=self._calls_max,
        )
        texts: list[str] = []
        left = bytes_max
        try:
            async for chunks in stream:
                texts += (more := texts_of(event for chunk in chunks for event in turn.feed(chunk)))
                self._recorder.count_upstream(stream.read_bytes)
                left -= sum(len(text.encode()) for text in more)
                if left < 0:
                    raise UpstreamGarbled(f"The upstream made a summary of more than {bytes_max} bytes.")
            texts += texts_of(turn.close())
        finally:
            await self._end(stream, turn, is_limited=False)
        return "".join(texts), turn

    async def _end(self, stream: ChunkStream, turn: Turn, *, is_limited: bool = True) -> None:
        stream.upstream.record_reasoning_form(stream.model, turn.reasoning_form)
        self._recorder.spend(turn.usage, self._prices, is_limited=is_limited)
        self._repeated = turn.usage if is_limited else None  # after a compaction the next prompt is another
        self.opening = None
        await asyncio.shield(stream.close())

    async def _read(self, stream: ChunkStream, turn: Turn) -> None:
        status: ItemStatus = "incomplete"
        try:
            async for chunks in stream:
                if chunks:
                    await self._recorder.record([event for chunk in chunks for event in turn.feed(chunk)])
                self._recorder.count_upstream(stream.read_bytes)
                if turn.unsummarized is not None:
                    await self._summarize(turn)
                if turn.has_too_many_calls:
                    raise UpstreamGarbled(f"The upstream sent more than {self._calls_max} calls in one turn.")
                if self._reader and self._reader.is_full:
                    await self._reader.room()
            if outcome_of(turn.finish_reason).status == "completed":
                if self._plan.options.summary_follows:
                    await self._recorder.record(turn.settle())
                    await self._summarize(turn)
                status = "completed"
        finally:
            await self._recorder.record(turn.close(status), ends_turn=True)

    async def _summarize(self, turn: Turn) -> None:
        """Give the turn's reasoning its summaries; meanwhile the upstream's answer is not read."""
        while turn.unsummarized is not None:
            await self._recorder.record(turn.summarize(await self._summaries.of(turn.unsummarized)))
