"""Making a response: (prompt → upstream → turn)* → outcome.

A turn that ends in calls for the client ends the run. A turn whose only calls were refused is followed by another, in which
the model reads why.
"""

import asyncio
from collections.abc import Sequence

from msgspec import Struct
from msgspec.structs import replace

from app.domain.context import Context, Unseal
from app.domain.groups import Manner
from app.domain.lifecycle import NO_USAGE, Outcome, add_usage, outcome_of
from app.domain.prompt import chat_request, refused_calls
from app.domain.think import ThinkSplitter
from app.domain.turn import Turn
from app.errors import ApiError, RunTooLong, UpstreamBusy, UpstreamRefused, UpstreamUnavailable
from app.ids import new_id
from app.outbound.catalog import Route
from app.outbound.upstream import CONTEXT_TOO_LONG, ChunkStream, Upstream
from app.runs.recorder import Recorder
from app.wire.chat import ChatMessage
from app.wire.items import ItemStatus, Message, OutputText, decode_item
from app.wire.requests import CreateResponse
from app.wire.resources import Usage

TRUNCATIONS_MAX = 20
"""Halvings of a context before giving up; more than any context can take."""


class Task(Struct):
    """Everything that making one response takes."""

    request: CreateResponse
    context: Context
    routes: Sequence[tuple[Upstream, Route]]
    caller_key: str | None
    unseal: Unseal
    manner: Manner
    turns_max: int


class Loop:
    """One run. `open()` first: until it has returned nothing is recorded; then `make()`."""

    def __init__(self, task: Task, recorder: Recorder) -> None:
        self.usage: Usage = NO_USAGE
        self._task = task
        self._recorder = recorder
        self._turn: Turn | None = None
        self._more: list[ChatMessage] = []

    async def open(self) -> ChunkStream:
        """The upstream's answer to the next turn; other routes are tried where one is out of order. Raises ApiError."""
        failed: ApiError | None = None
        for upstream, route in self._task.routes:
            try:
                return await self._open(upstream, route.model)
            except (UpstreamUnavailable, UpstreamBusy) as error:
                failed = error
        assert failed is not None
        raise failed

    async def _open(self, upstream: Upstream, model: str) -> ChunkStream:
        """With `truncation: auto`, a context that is too long loses its older half until the upstream takes it."""
        task = self._task
        taken = {name: value for name, value in task.request.extra.items() if name in upstream.entry.passed_on}
        refused: UpstreamRefused | None = None
        for halvings in range(TRUNCATIONS_MAX):
            body = chat_request(
                replace(task.request, extra=taken),
                task.context,
                model=model,
                dialect=upstream.dialect,
                unseal=task.unseal,
                more=self._more,
                halvings=halvings,
            )
            if body is None:
                break
            try:
                return await upstream.open(body, task.caller_key)
            except UpstreamRefused as error:
                if task.request.body.truncation != "auto" or error.code != CONTEXT_TOO_LONG:
                    raise
                refused = error
        assert refused is not None
        raise refused

    async def make(self, stream: ChunkStream) -> Outcome:
        """Follow the stream and those of further turns. Raises ApiError; what was said until then is recorded."""
        for left in reversed(range(self._task.turns_max)):
            made = len(self._recorder.response.output)
            turn = await self._follow(stream)
            outcome = outcome_of(turn.finish_reason)
            if not turn.refused or turn.handed_over or outcome.status != "completed":
                return outcome
            calls = [(call.call_id, call.name, call.arguments, call.reason) for call in turn.refused]
            self._more += refused_calls(calls, self._said(made))
            if left:
                stream = await self.open()
        raise RunTooLong("The run took more turns than REPRISE_TURNS_MAX allows.")

    def _said(self, made: int) -> str:
        """The text of the output behind the first so many items."""
        items = [decode_item(item) for item in self._recorder.response.output[made:]]
        parts = [part for item in items if isinstance(item, Message) for part in item.content]
        return "".join(part.text for part in parts if isinstance(part, OutputText))

    async def _follow(self, stream: ChunkStream) -> Turn:
        first = self._turn.output_index if self._turn else 0
        turn = self._turn = Turn(
            self._task.context.toolbox,
            new_id,
            output_index=first,
            manner=self._task.manner,
            splitter=ThinkSplitter(stream.upstream.dialect.think),
        )
        status: ItemStatus = "incomplete"
        try:
            async for chunks in stream:
                self._recorder.record([event for chunk in chunks for event in turn.feed(chunk)])
            if outcome_of(turn.finish_reason).status == "completed":
                status = "completed"
        finally:
            try:
                self._recorder.record(turn.close(status))
            finally:
                self.usage = add_usage(self.usage, turn.usage)
                await asyncio.shield(stream.close())
        return turn
