"""Making a response: tools listed and approved calls made, then (prompt → upstream → turn → tools)* → outcome.

A turn whose calls we run, or refuse, is followed by another, in which the model reads what came of them. A turn that ends in
calls for the client, or in calls that wait for approval, ends the run; so does one without any calls.
"""

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import structlog
from msgspec.structs import replace

from app.domain.calls import SERVER_RUN, PendingCall, approval_request, close_list, mcp_call, open_list
from app.domain.citations import NO_SOURCES, sources_of
from app.domain.context import Context, proceed
from app.domain.lifecycle import Outcome, add_usage, outcome_of
from app.domain.prompt import chat_request
from app.domain.think import ThinkSplitter
from app.domain.toolbox import NeedsApproval, Rejected, ServerCall, Toolbox
from app.domain.tools.answers import Answer
from app.domain.turn import OwnCall, Turn
from app.errors import (
    ApiError,
    DatabaseUnavailable,
    Fenced,
    RunTooLong,
    ServerError,
    ToolsUnavailable,
    UpstreamBusy,
    UpstreamGarbled,
    UpstreamRefused,
    UpstreamStalled,
    UpstreamUnavailable,
)
from app.ids import new_id, siblings
from app.outbound.failures import CONTEXT_TOO_LONG
from app.outbound.upstream import ChunkStream, Upstream
from app.runs.aside import aside
from app.runs.recorder import Recorder
from app.runs.task import Task
from app.runs.tools import Tools, unavailable
from app.storage.backlog import Backlog
from app.wire.events import Event
from app.wire.items import (
    AnyItem,
    FunctionCall,
    FunctionCallOutput,
    ItemStatus,
    McpCall,
    call_id_of,
    decode_stored_item,
    type_of,
)
from app.wire.tools import ListedTool

log = structlog.get_logger()

TRUNCATIONS_MAX = 20
"""Halvings of a context before giving up; more than any context can take."""

NO_NAME = "unnamed"
"""Upstreams refuse a history with a call that names no tool."""


class Loop:
    """One run. `open()` first where the task begins with the upstream: until it has returned nothing is recorded; then
    `outcome()`."""

    def __init__(
        self,
        task: Task,
        recorder: Recorder,
        tools: Tools,
        *,
        turns_max: int,
        calls_max: int,
        output_index: int = 0,
        call_ids: Iterable[str] = (),
        reader: Backlog | None = None,
    ) -> None:
        """`output_index` is that of the first item that this run makes; `call_ids` are used already. `calls_max` are those of one
        turn. The run waits for its `reader`, if it has one that can't read later."""
        self._turns_max, self._calls_max = turns_max, calls_max
        self._output_index = output_index
        # Clients tell calls apart by their ids, along the whole chain.
        self._call_ids = {*call_ids, *filter(None, map(call_id_of, task.context.items))}
        self._task, self._recorder, self._tools = task, recorder, tools
        self._context: Context = task.context
        self._calls_made = sum(type_of(item) in SERVER_RUN for item in self._made(0))
        if self._calls_made:
            self._context = replace(self._context, toolbox=_at_will(self._context.toolbox))
        self._reader = reader
        self.is_calling = False
        """Whether calls of this server's are under way."""

    async def open(self) -> ChunkStream:
        """The upstream's answer to the next turn; the next route is tried where one is out of order. Raises ApiError."""
        failed: ApiError | None = None
        for upstream, route in self._task.routes:
            try:
                return await self._open(upstream, route.model)
            except (UpstreamUnavailable, UpstreamBusy, UpstreamGarbled, UpstreamStalled) as error:
                failed = error
        assert failed is not None
        raise failed

    async def _open(self, upstream: Upstream, model: str) -> ChunkStream:
        """With `truncation: auto`, a context that is too long loses its older half until the upstream takes it."""
        task = self._task
        taken = {name: value for name, value in task.request.extra.items() if upstream.entry.takes(name)}
        refused: UpstreamRefused | None = None
        for halvings in range(TRUNCATIONS_MAX):
            body = await aside(
                task.size,
                chat_request,
                replace(task.request, extra=taken),
                self._context,
                model=model,
                dialect=upstream.dialect_for(model),
                unseal=task.seal.open,
                output_tokens_max=self._tokens_left,
                halvings=halvings,
            )
            if body is None:
                break
            try:
                return await upstream.open(model, body, task.caller_key)
            except UpstreamRefused as error:
                if task.request.body.truncation != "auto" or error.code != CONTEXT_TOO_LONG:
                    raise
                refused = error
        assert refused is not None
        raise refused

    @property
    def _tokens_left(self) -> int | None:
        """What `max_output_tokens` leaves for the turns to come."""
        most, usage = self._task.request.body.max_output_tokens, self._recorder.usage
        return most - usage.output_tokens if most and usage else most

    @property
    def _spent(self) -> bool:
        return self._tokens_left is not None and self._tokens_left <= 0

    async def outcome(self, opening: "asyncio.Task[ChunkStream] | None", duration_max_s: float) -> Outcome:
        """Make the response, from an upstream's answer if that is there or on its way; every way to end but being cancelled,
        fenced or without a database is an outcome."""
        try:
            async with asyncio.timeout(duration_max_s):
                return await self._make(opening)
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
            if opening:
                await drop_opening(opening)

    async def _make(self, opening: "asyncio.Task[ChunkStream] | None") -> Outcome:
        """Turn after turn. Raises ApiError; what was said until then is recorded."""
        if not self._task.request.generate:
            return Outcome("completed")
        if opening is None:
            await self._prepare()
        if opening is None and self._spent:  # by former owners
            return Outcome("incomplete", reason="max_output_tokens")
        stream = await (opening or self.open())
        for left in reversed(range(self._turns_max)):
            made = len(self._recorder.response.output)
            turn = await self._follow(stream)
            outcome = outcome_of(turn.finish_reason)
            if outcome.status != "completed" or not turn.own_calls:
                return outcome
            ends = turn.handed_over or any(isinstance(call.verdict, NeedsApproval) for call in turn.own_calls)
            if not (left or ends):
                break  # nobody would read what comes of the calls
            said = self._made(made)
            refused = await self._run_calls(turn.own_calls)
            if ends:
                return outcome
            if self._spent:
                return Outcome("incomplete", reason="max_output_tokens")
            calls = self._made(made + len(said))
            self._proceed([*said, *(call for call, _ in refused), *calls, *(output for _, output in refused)])
            stream = await self.open()
        return Outcome("incomplete", reason="max_turns")

    def _proceed(self, more: Sequence[AnyItem]) -> None:
        context = proceed(self._context, self._task.request, more)
        self._context = replace(context, toolbox=_at_will(context.toolbox))

    def _made(self, start: int) -> list[AnyItem]:
        """The items of the output behind the first so many."""
        return [decode_stored_item(item) for item in self._recorder.response.output[start:]]

    # -- Tools ------------------------------------------------------------------------------------------------------------

    async def _prepare(self) -> None:
        """List the tools of servers that the context does not know yet, and make the calls that were approved."""
        made = len(self._recorder.response.output)
        await self._list(self._context.toolbox.unlisted)
        if len(self._recorder.response.output) > made:
            self._context = replace(
                proceed(self._context, self._task.request, self._made(made)), approved=self._context.approved
            )
        made = len(self._recorder.response.output)
        approved = self._context.approved
        calls = [mcp_call(new_id, one.server_label, one.name, one.arguments, approval=one.id) for one in approved]
        toolbox = self._context.toolbox
        if calls:
            await self._answer(calls, [])
            self._proceed(self._made(made))
        if toolbox.mode == "required" and not toolbox.offers:
            raise ToolsUnavailable(toolbox.unlisted)

    async def _list(self, labels: Sequence[str]) -> None:
        listings = [asyncio.create_task(self._tools.list(label)) for label in labels]
        try:
            for label, listing in zip(labels, listings, strict=True):
                item, begun = open_list(self._task.ids_of_lists(label), label, self._output_index)
                await self._recorder.record(begun)
                tools: list[ListedTool] = []
                error: str | None = "The run ended before the server had answered."
                try:
                    tools, error = await listing
                finally:
                    ended = close_list(item, self._output_index, tools, error)
                    await self._recorder.record(ended, keep=True)
                    self._output_index += 1
        finally:
            await _drop(listings)

    async def _run_calls(self, own_calls: Sequence[OwnCall]) -> list[tuple[FunctionCall, FunctionCallOutput]]:
        """Ask for approvals, make calls; gives the calls that were refused, with what the model is told of each."""
        events: list[Event] = []
        calls: list[PendingCall] = []
        refused: list[tuple[FunctionCall, FunctionCallOutput]] = []
        most = self._task.request.body.max_tool_calls
        for own in own_calls:
            match own.verdict:
                case Rejected(reason):
                    refused.append(_refused(own, reason))
                case NeedsApproval(name, label):
                    asked = self._task.ids_of_requests(own.ids, label, name, own.arguments)
                    events += approval_request(asked, label, name, own.arguments, self._output_index)
                    self._output_index += 1
                case ServerCall() as run if most is None or self._calls_made + len(calls) < most:
                    calls.append(self._tools.pending(run, own.arguments, own.ids))
                case ServerCall():
                    refused.append(_refused(own, "The limit of tool calls is reached. Answer without another call."))
        await self._answer(calls, events)
        return refused

    async def _answer(self, calls: Sequence[PendingCall], events: list[Event]) -> None:
        """Make calls, at once, and say what came of them. That they are made is recorded before any is sent: whoever goes on
        after a crash does not make them again."""
        self._calls_made += len(calls)
        for call in calls:
            events += call.open(self._output_index)
            self._output_index += 1
        await self._recorder.record(events, keep=True)
        self.is_calling = bool(calls)
        answers = [asyncio.create_task(self._answer_of(call)) for call in calls]
        waiting = deque(calls)
        try:
            for answer in answers:
                ended = waiting[0].close(await answer)
                waiting.popleft()
                await self._recorder.record(ended, keep=True)  # not half of it
            for call, answer in zip(calls, answers, strict=True):
                if output := call.output(answer.result(), self._output_index):
                    self._output_index += 1
                    await self._recorder.record(output, keep=True)
        except BaseException:
            await self._recorder.record([event for call in waiting for event in call.cut_off()])
            raise
        finally:
            self.is_calling = False
            await _drop(answers)

    async def _answer_of(self, call: PendingCall) -> Answer:
        item = call.item
        if isinstance(item, McpCall) and not self._context.toolbox.runs(item.server_label, item.name):
            return unavailable(item.name)
        return await self._tools.answer(call)

    # -- Turns ------------------------------------------------------------------------------------------------------------

    async def _follow(self, stream: ChunkStream) -> Turn:
        self._recorder.upstream = stream.upstream.name
        turn = Turn(
            self._context.toolbox,
            new_id,
            output_index=self._output_index,
            options=self._task.options,
            splitter=ThinkSplitter(stream.upstream.dialect.think),
            call_ids=self._call_ids,
            sources=sources_of(self._context.items) if self._context.hosted else NO_SOURCES,
            calls_max=self._calls_max,
            call_items=siblings(),
        )
        status: ItemStatus = "incomplete"
        try:
            async for chunks in stream:
                if chunks:
                    await self._recorder.record([event for chunk in chunks for event in turn.feed(chunk)])
                self._recorder.hear(stream.read_bytes)
                if turn.has_too_many_calls:
                    raise UpstreamGarbled(f"The upstream sent more than {self._calls_max} calls in one turn.")
                if self._reader and self._reader.is_full:
                    await self._reader.room()
            if outcome_of(turn.finish_reason).status == "completed":
                status = "completed"
        finally:
            try:
                await self._recorder.record(turn.close(status), ending=True)
            finally:
                stream.upstream.hear(stream.model, turn.reasoning_form)
                self._output_index = turn.output_index
                self._recorder.usage = add_usage(self._recorder.usage, turn.usage)
                await asyncio.shield(stream.close())
        return turn


def _refused(own: OwnCall, reason: str) -> tuple[FunctionCall, FunctionCallOutput]:
    call = FunctionCall(id=own.ids("fc"), call_id=own.call_id, name=own.name or NO_NAME, arguments=own.arguments)
    return call, FunctionCallOutput(call_id=own.call_id, output=f"Error: {reason}")


def _at_will(toolbox: Toolbox) -> Toolbox:
    """A call that was demanded has been made: from now on the model may answer."""
    return replace(toolbox, mode="auto" if toolbox.mode == "required" else toolbox.mode, only=None)


async def _drop(tasks: "Sequence[asyncio.Task[Any]]") -> None:
    """Nobody waits for these any more."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def drop_opening(opening: "asyncio.Task[ChunkStream]") -> None:
    """Close the upstream's answer, or stop waiting for it."""
    opening.cancel()
    for result in await asyncio.gather(opening, return_exceptions=True):
        if isinstance(result, ChunkStream):
            await result.close()
