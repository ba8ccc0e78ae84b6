"""Making a response: (prompt → upstream → turn)* → outcome.

A turn that ends in calls for the client ends the run. A turn whose only calls were refused is followed by another, in which
the model reads why.
"""

import asyncio
from collections.abc import Iterable

import structlog
from msgspec.structs import replace

from app.domain.lifecycle import NO_USAGE, Outcome, add_usage, outcome_of
from app.domain.prompt import chat_request, refused_calls
from app.domain.think import ThinkSplitter
from app.domain.turn import Turn
from app.errors import (
    ApiError,
    DatabaseUnavailable,
    Fenced,
    RunTooLong,
    ServerError,
    UpstreamBusy,
    UpstreamError,
    UpstreamRefused,
    UpstreamUnavailable,
)
from app.ids import new_id
from app.outbound.upstream import CONTEXT_TOO_LONG, ChunkStream, Upstream
from app.runs.recorder import Recorder
from app.runs.task import Task
from app.wire.chat import ChatMessage
from app.wire.items import ItemStatus, Message, OutputText, decode_item
from app.wire.resources import Usage

log = structlog.get_logger()

TRUNCATIONS_MAX = 20
"""Halvings of a context before giving up; more than any context can take."""


class Loop:
    """One run. `open()` first: until it has returned nothing is recorded; then `make()`."""

    def __init__(
        self, task: Task, recorder: Recorder, *, turns_max: int, output_index: int = 0, call_ids: Iterable[str] = ()
    ) -> None:
        """`output_index` is that of the first item that this run makes; `call_ids` are used already."""
        self.usage: Usage = NO_USAGE
        self._turns_max = turns_max
        self._output_index = output_index
        self._call_ids = set(call_ids)
        self._task = task
        self._recorder = recorder
        self._more: list[ChatMessage] = []
        self._route = 0

    async def open(self, *, behind: int = -1, failed: ApiError | None = None) -> ChunkStream:
        """The upstream's answer to the next turn; the next route is tried where one is out of order.

        `behind` is the route that has `failed` by now. Raises ApiError.
        """
        for number in range(behind + 1, len(self._task.routes)):
            upstream, route = self._task.routes[number]
            self._route = number
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

    async def outcome(self, opening: "asyncio.Task[ChunkStream] | None", duration_max_s: float) -> Outcome:
        """Make the response from an upstream's answer that is there or on its way; every way to end but being cancelled,
        fenced or without a database is an outcome."""
        if opening is None:
            return Outcome("completed")
        try:
            async with asyncio.timeout(duration_max_s):
                return await self.make(await opening)
        except TimeoutError:
            return Outcome("failed", error=RunTooLong("The run took longer than REPRISE_RUN_DURATION_MAX_S allows."))
        except (asyncio.CancelledError, Fenced, DatabaseUnavailable):
            raise
        except ApiError as error:
            return Outcome("failed", error=error)
        except Exception:
            log.exception("A run failed by our own mistake.", action="run_failed")
            return Outcome("failed", error=ServerError("The server had an error while making the response."))
        finally:
            await break_off(opening)

    async def make(self, stream: ChunkStream) -> Outcome:
        """Follow the stream and those of further turns. Raises ApiError; what was said until then is recorded."""
        for left in reversed(range(self._turns_max)):
            made = len(self._recorder.response.output)
            turn = await self._follow_first(stream)
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

    async def _follow_first(self, stream: ChunkStream) -> Turn:
        """Follow the stream; if it breaks down before its first chunk, nobody has heard it, and the next route is taken."""
        while True:
            try:
                return await self._follow(stream)
            except UpstreamError as error:
                if stream.heard:
                    raise
                stream = await self.open(behind=self._route, failed=error)

    async def _follow(self, stream: ChunkStream) -> Turn:
        turn = Turn(
            self._task.context.toolbox,
            new_id,
            output_index=self._output_index,
            manner=self._task.manner,
            splitter=ThinkSplitter(stream.upstream.dialect.think),
            call_ids=self._call_ids,
        )
        status: ItemStatus = "incomplete"
        try:
            async for chunks in stream:
                await self._recorder.record([event for chunk in chunks for event in turn.feed(chunk)])
            if outcome_of(turn.finish_reason).status == "completed":
                status = "completed"
        finally:
            try:
                await self._recorder.record(turn.close(status), ending=True)
            finally:
                self._output_index = turn.output_index
                self.usage = add_usage(self.usage, turn.usage)
                await asyncio.shield(stream.close())
        return turn


async def break_off(opening: "asyncio.Task[ChunkStream]") -> None:
    """Close the upstream's answer, or stop waiting for it."""
    opening.cancel()
    for result in await asyncio.gather(opening, return_exceptions=True):
        if isinstance(result, ChunkStream):
            await result.close()
