"""One completion of an upstream after the other: routes and failover, truncation, chunks to events.

`ModelTurns` is the only owner of the upstream's stream: it opens, reads and closes it.
"""

import asyncio
from collections.abc import Collection

from msgspec.structs import replace

from app.domain.citations import NO_SOURCES, sources_of
from app.domain.context import Context
from app.domain.lifecycle import add_usage, outcome_of
from app.domain.prompt import chat_request
from app.domain.think import ThinkSplitter
from app.domain.turn import Turn
from app.errors import (
    ApiError,
    UpstreamBusy,
    UpstreamGarbled,
    UpstreamRefused,
    UpstreamStalled,
    UpstreamUnavailable,
)
from app.ids import new_id, siblings
from app.offload import offload
from app.outbound.failures import CONTEXT_TOO_LONG
from app.outbound.upstream import ChunkStream, Upstream
from app.runs.plan import RunPlan
from app.runs.recorder import Recorder
from app.storage.backlog import Backlog
from app.wire.items import ItemStatus, call_id_of

TRUNCATIONS_MAX = 20
"""Halvings of a context before giving up; more than any context can take."""


class ModelTurns:
    """The model's turns in one run."""

    def __init__(
        self,
        plan: RunPlan,
        recorder: Recorder,
        *,
        calls_max: int,
        call_ids: Collection[str] = (),
        reader: Backlog | None = None,
    ) -> None:
        """`calls_max` limits the calls of one turn; `call_ids` are taken already. The run waits for its `reader`, if it has one
        that can't read later."""
        self._plan, self._recorder, self._reader = plan, recorder, reader
        self._calls_max = calls_max
        # Clients distinguish calls by their ids, along the whole chain.
        self._call_ids = {*call_ids, *filter(None, map(call_id_of, plan.context.items))}
        self.opening: asyncio.Task[ChunkStream] | None = None
        """The upstream's answer to the next turn, if it is requested already."""

    @property
    def tokens_left(self) -> int | None:
        """What `max_output_tokens` leaves for further turns; None for no limit."""
        most, usage = self._plan.request.body.max_output_tokens, self._recorder.usage
        return most - usage.output_tokens if most and usage else most

    @property
    def is_spent(self) -> bool:
        """Whether `max_output_tokens` leaves nothing."""
        return self.tokens_left is not None and self.tokens_left <= 0

    def open(self, context: Context) -> "asyncio.Task[ChunkStream]":
        """Request the next turn. The task raises ApiError."""
        if self.opening is None:
            self.opening = asyncio.create_task(self._open(context))
        return self.opening

    async def close(self) -> None:
        """Close the upstream's answer, or stop waiting for it."""
        if self.opening is None:
            return
        self.opening.cancel()
        for result in await asyncio.gather(self.opening, return_exceptions=True):
            if isinstance(result, ChunkStream):
                await result.close()

    async def _open(self, context: Context) -> ChunkStream:
        """The answer of the first route whose upstream is in order."""
        failed: ApiError | None = None
        for upstream, route in self._plan.routes:
            try:
                return await self._open_route(context, upstream, route.model)
            except (UpstreamUnavailable, UpstreamBusy, UpstreamGarbled, UpstreamStalled) as error:
                failed = error
        assert failed is not None
        raise failed

    async def _open_route(self, context: Context, upstream: Upstream, model: str) -> ChunkStream:
        """With `truncation: auto`, a context that is too long loses its older half until the upstream takes it."""
        plan = self._plan
        taken = {name: value for name, value in plan.request.extra.items() if upstream.entry.takes(name)}
        refused: UpstreamRefused | None = None
        for halvings in range(TRUNCATIONS_MAX):
            body = await offload(
                plan.size,
                chat_request,
                replace(plan.request, extra=taken),
                context,
                model=model,
                dialect=upstream.dialect_for(model),
                unseal=plan.seal.open,
                output_tokens_max=self.tokens_left,
                halvings=halvings,
            )
            if body is None:
                break
            try:
                return await upstream.open(model, body, plan.caller_key)
            except UpstreamRefused as error:
                if plan.request.body.truncation != "auto" or error.code != CONTEXT_TOO_LONG:
                    raise
                refused = error
        assert refused is not None
        raise refused

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
            stream.upstream.record_reasoning_form(stream.model, turn.reasoning_form)
            self._recorder.next_output_index = turn.output_index
            self._recorder.usage = add_usage(self._recorder.usage, turn.usage)
            self.opening = None
            await asyncio.shield(stream.close())
        return turn

    async def _read(self, stream: ChunkStream, turn: Turn) -> None:
        status: ItemStatus = "incomplete"
        try:
            async for chunks in stream:
                if chunks:
                    await self._recorder.record([event for chunk in chunks for event in turn.feed(chunk)])
                self._recorder.count_upstream(stream.read_bytes)
                if turn.has_too_many_calls:
                    raise UpstreamGarbled(f"The upstream sent more than {self._calls_max} calls in one turn.")
                if self._reader and self._reader.is_full:
                    await self._reader.room()
            if outcome_of(turn.finish_reason).status == "completed":
                status = "completed"
        finally:
            await self._recorder.record(turn.close(status), ends_turn=True)
