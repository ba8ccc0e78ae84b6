"""The pipeline on a run in memory: in which order a response is committed and its end is sent."""

import asyncio
from collections.abc import Sequence

import pytest

from app.domain.lifecycle import Outcome, open_response
from app.errors import DatabaseUnavailable, ServerError
from app.outbound.guard import Guard
from app.outbound.tokens import TokenCounter
from app.runs.pipeline import Pipeline, Prompts, Turns
from app.runs.recorder import Recorder
from app.settings import Settings
from app.wire.events import Entry
from app.wire.resources import Response
from tests.unit.build import request


class MemoryRun:
    """A run that ends without a turn; it notes its steps."""

    attempts = 1

    def __init__(self, begun: Outcome | None, *, stored: str | None = None, fails: Exception | None = None) -> None:
        self.steps: list[str] = []
        self.begun, self.stored, self.fails = begun, stored, fails
        self.turns: Turns | None = None
        self.outcome: Outcome | None = None
        response = open_response(request(), id="resp_1", created_at=1)
        self.recorder = Recorder(response, self, bytes_max=1 << 20, events_max=100)

    def append(self, entries: Sequence[Entry]) -> None:
        self.steps += [entry.type for entry in entries]

    async def begin(self) -> Outcome | None:
        self.steps.append("begin")
        return self.begun

    def interrupted(self) -> Outcome | None:
        return None

    async def commit(self, closed: Response, entries: Sequence[Entry]) -> Response:
        await asyncio.sleep(0)
        if self.fails:
            raise self.fails
        self.steps.append(f"commit {closed.status} {len(entries)}")
        if self.stored:
            closed = open_response(request(), id="resp_1", created_at=1)
            closed.status = self.stored  # type: ignore[assignment]
        return closed

    async def publish(self) -> None:
        self.steps.append("publish")


def pipeline() -> Pipeline:
    settings = Settings()
    return Pipeline(
        settings, Guard.from_settings(settings), None, TokenCounter(settings), Prompts("Summarize.", "Summarize.")
    )  # type: ignore[arg-type]  # no programs


@pytest.mark.parametrize(
    "outcome", [Outcome("completed"), Outcome("cancelled"), Outcome("failed", error=ServerError("x"))]
)
async def test_the_terminal_event_is_sent_after_the_commit_and_before_the_rest(outcome: Outcome):
    run = MemoryRun(outcome)
    await pipeline().make(run)
    last = "response.failed" if outcome.status == "cancelled" else f"response.{outcome.status}"
    assert run.steps == ["begin", f"commit {outcome.status} 1", last, "publish"]
    assert run.outcome is outcome


async def test_the_terminal_event_is_that_of_what_is_stored():
    run = MemoryRun(Outcome("completed"), stored="cancelled")
    await pipeline().make(run)
    assert run.steps == ["begin", "commit completed 1", "response.failed", "publish"]


async def test_without_a_commit_nothing_is_sent():
    run = MemoryRun(Outcome("completed"), fails=DatabaseUnavailable("gone"))
    with pytest.raises(DatabaseUnavailable):
        await pipeline().make(run)
    assert run.steps == ["begin"]


async def test_a_refused_run_takes_no_further_step():
    run = MemoryRun(None)
    await pipeline().make(run)
    assert run.steps == ["begin"]
    assert run.outcome is None
