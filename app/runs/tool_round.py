"""What this server does between two turns of the model: list tools, ask for approvals, make calls."""

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

from app.domain.calls import PendingCall, approval_request, close_list, mcp_call, open_list
from app.domain.context import Context, proceed
from app.domain.lifecycle import Outcome
from app.domain.toolbox import NeedsApproval, Rejected, ServerCall, Toolbox
from app.domain.tools.answers import Answer
from app.domain.tools.table import tool_of
from app.domain.turn import OwnCall
from app.errors import ToolsUnavailable
from app.ids import new_id
from app.runs.plan import RunPlan
from app.runs.recorder import Recorder
from app.runs.tools import Tools, unavailable
from app.wire.events import Event
from app.wire.items import (
    AnyItem,
    FunctionCall,
    FunctionCallOutput,
    McpCall,
    decode_stored_item,
)
from app.wire.tools import ListedTool

NO_NAME = "unnamed"
"""Upstreams refuse a history with a call that names no tool."""


class ToolRounds:
    """The server-run tools of one run."""

    def __init__(self, plan: RunPlan, recorder: Recorder, tools: Tools) -> None:
        self._plan, self._recorder, self._tools = plan, recorder, tools
        self._calls_made = sum(tool_of(item) is not None for item in self._output_since(0))
        self.is_calling = False
        """Whether calls are under way."""
        self._has_left_out = False
        """Whether the run's limit has left out a call."""

    @property
    def spent(self) -> Outcome | None:
        """The outcome of a run whose limit has left out a call; None while there is none."""
        return Outcome("incomplete", reason="max_tool_calls") if self._has_left_out else None

    async def prepare(self, context: Context) -> Context:
        """List the tools of servers that the context does not know yet, and make the approved calls. Raises ToolsUnavailable."""
        if self._calls_made:  # by earlier owners
            context = replace(context, toolbox=_optional(context.toolbox))
        output = len(self._recorder.response.output)
        await self._list(context.toolbox.unlisted)
        approved = context.approved
        if listed := self._output_since(output):
            context = replace(proceed(context, self._plan.request, listed), approved=approved)
        toolbox = context.toolbox
        if approved:
            output = len(self._recorder.response.output)
            calls = [mcp_call(new_id, one.server_label, one.name, one.arguments, approval=one.id) for one in approved]
            await self._call(toolbox, calls, [])
            context = self.proceed(context, self._output_since(output))
        if toolbox.mode == "required" and not toolbox.offers:
            raise ToolsUnavailable(toolbox.unlisted)
        return context

    async def run(self, context: Context, own_calls: Sequence[OwnCall], output: int) -> list[AnyItem]:
        """Ask for approvals and make calls. Returns what the model reads next: the items of its turn, which begin at `output`,
        and what came of its calls."""
        turn = self._output_since(output)
        events: list[Event] = []
        calls: list[PendingCall] = []
        rejected: list[tuple[FunctionCall, FunctionCallOutput]] = []
        most, limits = self._plan.request.body.max_tool_calls, self._plan.limits
        left = None if limits.tool_calls is None else limits.tool_calls - self._calls_made
        for own in own_calls:
            match own.verdict:
                case Rejected(reason):
                    rejected.append(_rejected(own, reason))
                case NeedsApproval(name, label):
                    ids = self._plan.ids_of_requests(own.ids, label, name, own.arguments)
                    events += approval_request(ids, label, name, own.arguments, self._next_output_index())
                case ServerCall() if left is not None and len(calls) >= left:
                    self._has_left_out = True
                case ServerCall() as call if most is None or self._calls_made + len(calls) < most:
                    calls.append(self._tools.pending(call, own.arguments, own.ids))
                case ServerCall():
                    rejected.append(_rejected(own, "The limit of tool calls is reached. Answer without another call."))
        await self._call(context.toolbox, calls, events)
        made = self._output_since(output + len(turn))
        return [*turn, *(call for call, _ in rejected), *made, *(answer for _, answer in rejected)]

    def proceed(self, context: Context, more: Sequence[AnyItem]) -> Context:
        """The context of the next turn. The call that `tool_choice` may have demanded has been made."""
        context = proceed(context, self._plan.request, more)
        return replace(context, toolbox=_optional(context.toolbox))

    def _output_since(self, start: int) -> list[AnyItem]:
        return [decode_stored_item(item) for item in self._recorder.response.output[start:]]

    def _next_output_index(self) -> int:
        index = self._recorder.next_output_index
        self._recorder.next_output_index += 1
        return index

    async def _list(self, labels: Sequence[str]) -> None:
        listings = [asyncio.create_task(self._tools.list(label)) for label in labels]
        try:
            for label, listing in zip(labels, listings, strict=True):
                index = self._recorder.next_output_index
                item, begun = open_list(self._plan.ids_of_lists(label), label, index)
                await self._recorder.record(begun)
                tools: list[ListedTool] = []
                error: str | None = "The run ended before the server answered."
                try:
                    tools, error = await listing
                finally:
                    await self._recorder.record(close_list(item, index, tools, error), checkpoint=True)
                    self._recorder.next_output_index = index + 1
        finally:
            await _cancel(listings)

    async def _call(self, toolbox: Toolbox, calls: Sequence[PendingCall], events: list[Event]) -> None:
        """Make calls at once, and record their answers. They are recorded before any is sent, so that another worker, after a
        crash, does not make them again."""
        self._calls_made += len(calls)
        for call in calls:
            events += call.open(self._next_output_index())
        await self._recorder.record(events, checkpoint=True)
        self.is_calling = bool(calls)
        timeout_s = self._time_of_each(len(calls))
        answers = [asyncio.create_task(self._answer(toolbox, call, timeout_s)) for call in calls]
        waiting = deque(calls)
        try:
            for answer in answers:
                ended = waiting[0].close(await answer)
                waiting.popleft()
                await self._recorder.record(ended, checkpoint=True)  # not half of it
            for call, answer in zip(calls, answers, strict=True):
                if output := call.output(answer.result(), self._recorder.next_output_index):
                    self._recorder.next_output_index += 1
                    await self._recorder.record(output, checkpoint=True)
        except BaseException:
            await self._recorder.record([event for call in waiting for event in call.cut_off()])
            raise
        finally:
            self.is_calling = False
            await _cancel(answers)

    def _time_of_each(self, calls: int) -> float | None:
        """How long each of so many calls may take, so that all together are within the run's limit; None for no such limit."""
        most = self._plan.limits.tool_seconds
        return None if most is None or not calls else max(most - self._recorder.spent.tool_s, 0.0) / calls

    async def _answer(self, toolbox: Toolbox, call: PendingCall, timeout_s: float | None) -> Answer:
        item = call.item
        if isinstance(item, McpCall) and not toolbox.runs(item.server_label, item.name):
            return unavailable(item.name)
        answer, took_s = await self._tools.answer(call, timeout_s)
        self._recorder.spend_tool_time(took_s)
        return answer


def _rejected(own: OwnCall, reason: str) -> tuple[FunctionCall, FunctionCallOutput]:
    """The call as the model reads it again, with the reason as its output."""
    call = FunctionCall(id=own.ids("fc"), call_id=own.call_id, name=own.name or NO_NAME, arguments=own.arguments)
    return call, FunctionCallOutput(call_id=own.call_id, output=f"Error: {reason}")


def _optional(toolbox: Toolbox) -> Toolbox:
    """From now on the model may answer without a call."""
    return replace(toolbox, mode="auto" if toolbox.mode == "required" else toolbox.mode, only=None)


async def _cancel(tasks: "Sequence[asyncio.Task[Any]]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
