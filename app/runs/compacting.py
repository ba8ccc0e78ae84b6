"""Compaction within a run: a turn of the model makes a summary, which stands for the context from then on."""

from collections.abc import Sequence

from msgspec.structs import replace

from app.domain.compaction import (
    MADE_BY_MODEL,
    Compacted,
    context_tokens,
    estimated_tokens,
    fitting,
    last_messages,
    seal_compacted,
)
from app.domain.context import Context, proceed
from app.domain.lifecycle import Outcome
from app.domain.tools.server_tool import item_done
from app.errors import UpstreamGarbled
from app.ids import new_id
from app.offload import offload
from app.runs.model_turn import ModelTurns
from app.runs.plan import RunPlan
from app.runs.recorder import Recorder
from app.wire.chat import ChatUsage
from app.wire.events import Compacting as CompactingEvent
from app.wire.events import Event, ItemAdded
from app.wire.items import AnyItem, Compaction


class Compacting:
    """The compactions of one run."""

    def __init__(self, plan: RunPlan, recorder: Recorder, model: ModelTurns, *, bytes_max: int) -> None:
        """`bytes_max` limits a summary."""
        self._plan, self._recorder, self._model, self._bytes_max = plan, recorder, model, bytes_max
        self._tokens = plan.context_tokens

    def follow(self, usage: ChatUsage | None, made: Sequence[AnyItem]) -> None:
        """Count what a turn has `made`: its usage counts the whole context, except for what came of its calls."""
        if usage is None or not usage.is_reported:
            self.add(made)
            return
        self._tokens = (usage.prompt_tokens or 0) + (usage.completion_tokens or 0)
        self.add([item for item in made if not isinstance(item, MADE_BY_MODEL)])

    def add(self, items: Sequence[AnyItem]) -> None:
        """Count items that no upstream has counted."""
        if self._plan.compact_threshold is not None:
            self._tokens += estimated_tokens(items)

    async def answer(self, context: Context) -> Outcome:
        """The outcome of a run that makes a compaction item and nothing else. Raises as `fit`."""
        _, outcome = await self._compact(context)
        return outcome

    async def fit(self, context: Context) -> tuple[Context, Outcome | None]:
        """The context of the next turn, compacted if it is too long; and the outcome of a run that ends because it has no whole
        summary. Raises ApiError, Fenced, DatabaseUnavailable."""
        if not self._plan.is_over(context, self._tokens):
            return context, None
        compacted, outcome = await self._compact(context)
        return compacted, None if outcome.status == "completed" else outcome

    async def _compact(self, context: Context) -> tuple[Context, Outcome]:
        """Record a compaction item."""
        await self._model.open_compaction(context)
        recorder, index = self._recorder, self._recorder.next_output_index
        recorder.next_output_index += 1
        item = Compaction(id=new_id("cmp"), encrypted_content="")
        begun: list[Event] = [ItemAdded(output_index=index, item=item)]
        if self._plan.request.compacts:  # the API has this event for triggers only
            begun.append(CompactingEvent(item_id=item.id, output_index=index))
        await recorder.record(begun)
        try:
            compacted, outcome = await self._summarize(context)
            if compacted:
                sealed = await offload(self._plan.size, seal_compacted, compacted, self._plan.seal)
                item = replace(item, encrypted_content=sealed, summary=compacted.summary)
        finally:
            await recorder.record([item_done(index, item)], checkpoint=True)
        if not compacted:
            return context, outcome
        made = await offload(self._plan.size, proceed, context, self._plan.request, [item])
        context = replace(made, toolbox=context.toolbox)  # `tool_choice` may be fulfilled
        self._tokens = context_tokens(self._plan.request, [one for _, one in context.visible])
        return context, outcome

    async def _summarize(self, context: Context) -> tuple[Compacted | None, Outcome]:
        summary, turn = await self._model.compact(context, self._bytes_max)
        outcome = self._model.outcome_of(turn)
        if outcome.status != "completed":
            return None, outcome
        if not summary.strip():
            raise UpstreamGarbled("The upstream made no summary of the context.")
        kept = last_messages(context.items, self._plan.seal.open)
        return fitting(summary.strip(), kept), outcome
