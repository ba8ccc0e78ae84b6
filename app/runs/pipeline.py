"""How a response is made.

Every run takes these steps, new or recovered, in the foreground or in the background:

    begin     foreground: open the upstream and insert the row; background: recover what earlier owners recorded
    turns     tools listed and approved calls made, then (prompt → upstream → items → tools)* → outcome; before a turn whose
              context is too long, or in place of an answer, a compaction
    close     status, usage and error
    commit    the row, with all that ends with it
    finish    the terminal event, for readers
    publish   background: every event is in Redis, the row of the queue goes

A turn whose calls this server makes, or rejects, is followed by another, in which the model reads what came of them. A turn that
ends in calls for the client, or in calls that need approval, ends the run; so does one without calls.
"""

import asyncio
import re
import time
from collections.abc import Collection, Sequence
from typing import Protocol

import structlog
from msgspec import Struct

from app.domain.context import Context
from app.domain.lifecycle import Outcome, close_response
from app.domain.toolbox import NeedsApproval
from app.errors import ApiError, DatabaseUnavailable, Fenced, RunTooLong, ServerError
from app.outbound.guard import Guard
from app.outbound.mcp import ToolPrograms
from app.outbound.tokens import TokenCounter
from app.runs.compacting import Compacting
from app.runs.model_turn import ModelTurns
from app.runs.plan import RunPlan
from app.runs.recorder import Recorder
from app.runs.summaries import Summaries
from app.runs.tool_round import ToolRounds
from app.runs.tools import Tools
from app.settings import Settings
from app.storage.backlog import Backlog
from app.wire.events import Entry
from app.wire.resources import Response

log = structlog.get_logger()

MODEL_CHARS_MAX = 100
"""Of a logged model name."""

_CODE = re.compile(r"[a-z_]{1,64}")


class Prompts(Struct, frozen=True):
    """The texts that ask models for summaries."""

    compaction: str
    reasoning_summary: str


class Turns(Struct):
    """What the turns of one run need."""

    plan: RunPlan
    recorder: Recorder
    tools: Tools
    model: ModelTurns
    rounds: ToolRounds
    compacting: Compacting

    @property
    def spent(self) -> Outcome | None:
        """The outcome of a run that has reached a limit of its own; None while it may continue."""
        return self.rounds.spent or self.model.spent


class Run(Protocol):
    """What differs between foreground and background runs."""

    attempts: int
    """How many owners the run has had."""
    turns: Turns | None
    """Set while the outcome is open."""
    outcome: Outcome | None
    """Set once it is decided."""

    @property
    def recorder(self) -> Recorder:
        """There is one since `begin`."""
        ...

    async def begin(self) -> Turns | Outcome | None:
        """Record everything before the first turn. Returns the outcome of a run that ends without one; None for a run that was
        refused before its first event, as its reader knows."""
        ...

    def interrupted(self) -> Outcome | None:
        """The outcome of a run that is cancelled now; None if another worker continues it."""
        ...

    async def commit(self, closed: Response, entries: Sequence[Entry]) -> Response:
        """Commit the end of a response, with all its events. Returns what is stored, which is not `closed` if another process has
        ended it before. Raises Fenced."""
        ...

    async def publish(self) -> None:
        """Finish what remains after the terminal event."""
        ...


class Pipeline:
    """Makes responses."""

    def __init__(
        self, settings: Settings, guard: Guard, programs: ToolPrograms, counter: TokenCounter, prompts: Prompts
    ) -> None:
        self.settings, self._guard, self._programs, self._counter = settings, guard, programs, counter
        self._prompts = prompts

    async def make(self, run: Run) -> None:
        """Make a response. Raises Fenced, DatabaseUnavailable and CancelledError if another worker continues the run."""
        begun = await run.begin()
        if begun is None:
            return
        run.outcome = outcome = await self._outcome(run, begun) if isinstance(begun, Turns) else begun
        recorder = run.recorder
        closed = close_response(recorder.response, outcome, usage=recorder.spent.usage, now=int(time.time()))
        stored = await run.commit(closed, recorder.close(closed))
        recorder.finish(stored, closed)
        log_ended(stored, recorder, run.attempts)
        await run.publish()

    def turns(
        self, plan: RunPlan, recorder: Recorder, *, call_ids: Collection[str] = (), reader: Backlog | None = None
    ) -> Turns:
        """The turns of a planned run; its sessions with tool servers are to be closed."""
        tools = Tools(plan, self._guard, self._programs, self.settings)
        model = ModelTurns(
            plan,
            recorder,
            self._counter,
            calls_max=self.settings.turn_calls_max,
            compaction_prompt=self._prompts.compaction,
            summaries=Summaries(plan, recorder, self.settings, self._prompts.reasoning_summary),
            call_ids=call_ids,
            reader=reader,
        )
        compacting = Compacting(plan, recorder, model, bytes_max=self.settings.compaction_bytes_max)
        return Turns(plan, recorder, tools, model, ToolRounds(plan, recorder, tools), compacting)

    async def _outcome(self, run: Run, turns: Turns) -> Outcome:
        run.turns = turns
        try:
            return await self._limited(turns)
        except asyncio.CancelledError:
            outcome = run.interrupted()
            if outcome is None:
                raise
            task = asyncio.current_task()
            assert task
            task.uncancel()
            return outcome
        finally:
            run.turns = None

    async def _limited(self, turns: Turns) -> Outcome:
        """Take turns within the limit of time. Every end is an outcome, except for Fenced, DatabaseUnavailable, CancelledError."""
        try:
            async with asyncio.timeout(self.settings.run_duration_max_s):
                return await self._take_turns(turns)
        except TimeoutError:
            return Outcome("failed", error=RunTooLong("The run took longer than REPRISE_RUN_DURATION_MAX_S allows."))
        except (Fenced, DatabaseUnavailable):
            raise
        except ApiError as error:
            return Outcome("failed", error=error)
        except Exception:
            log.exception("A run failed because of a bug.", action="run_failed")
            return Outcome("failed", error=ServerError("The server had an error while making the response."))
        finally:
            await turns.model.close()

    async def _take_turns(self, turns: Turns) -> Outcome:
        """Raises ApiError; the events until then are recorded."""
        request = turns.plan.request
        if not request.generate:
            return Outcome("completed")
        context = await self._prepare(turns)
        if request.compacts:
            return await turns.compacting.answer(context)
        for left in reversed(range(self.settings.turns_max)):
            context, ended = await self._take_turn(turns, context, is_last=not left)
            if ended:
                return ended
        raise AssertionError("the last turn ends")

    async def _take_turn(self, turns: Turns, context: Context, *, is_last: bool) -> tuple[Context, Outcome | None]:
        """One turn of the model, and the calls that it makes: the context of the next; or how the run ends. Raises as `_take_turns`."""
        model, rounds = turns.model, turns.rounds
        if ended := turns.spent:  # perhaps by earlier owners
            return context, ended
        context, ended = await turns.compacting.fit(context)
        if ended := ended or turns.spent:
            return context, ended
        output = len(turns.recorder.response.output)
        turn = await model.follow(context)
        outcome = model.outcome_of(turn)
        if outcome.status != "completed" or not turn.own_calls:
            return context, outcome
        ends = turn.client_calls or any(isinstance(call.verdict, NeedsApproval) for call in turn.own_calls)
        if is_last and not ends:  # the model would not read what comes of the calls
            return context, Outcome("incomplete", reason="max_turns")
        made = await rounds.run(context, turn.own_calls, output)
        if ended := rounds.spent or (outcome if ends else None):
            return context, ended
        turns.compacting.follow(turn.usage, made)
        return rounds.proceed(context, made), None

    async def _prepare(self, turns: Turns) -> Context:
        """The context of the first turn, with what comes of lists and approved calls; a turn that is requested already, or makes a
        summary only, needs none."""
        plan = turns.plan
        if turns.model.opening or (plan.request.compacts and not plan.context.approved):
            return plan.context
        context = await turns.rounds.prepare(plan.context)
        turns.compacting.add(context.items[len(plan.context.items) :])
        return context


def log_ended(response: Response, recorder: Recorder, attempts: int) -> None:
    """Log the end of a response. The name of a model that no upstream has may be anything, and is not logged."""
    error, incomplete, usage = response.error, response.incomplete_details, response.usage
    log.info(
        "A response has ended.",
        action="run_ended",
        status=response.status,
        model=None if error and error.code == "model_not_found" else response.model[:MODEL_CHARS_MAX],
        upstream=recorder.upstream,
        error=error.code if error and _CODE.fullmatch(error.code) else error and "other",
        reason=incomplete.reason if incomplete else None,
        input_tokens=usage.input_tokens if usage else None,
        output_tokens=usage.output_tokens if usage else None,
        duration_s=round(recorder.duration_s, 3),
        attempts=attempts,
    )
