"""The recorder on a log and a journal in memory: what commits before what is sent."""

from collections.abc import Sequence

import pytest
from msgspec import Raw
from msgspec.structs import replace

from app.domain.lifecycle import Outcome, close_response, open_response
from app.domain.spending import Spent
from app.errors import DatabaseUnavailable, Fenced, RunTooLong
from app.runs.recorder import Recorder
from app.wire.events import Entry, ItemAdded, ItemDone, PartAdded, TextDelta
from app.wire.resources import Response
from tests.unit.build import request

ITEM = Raw(b'{"type":"message","id":"msg_1","role":"assistant","status":"completed","content":[]}')
AT = {"item_id": "msg_1", "output_index": 0, "content_index": 0}


class Log:
    """Events as readers see them."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def append(self, entries: Sequence[Entry]) -> None:
        self.entries += entries


class Journal:
    """Checkpoints, each with what readers had seen when it was committed; `fails` is raised instead, once."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.checkpoints: list[tuple[list[int], list[int]]] = []
        self.fails: Exception | None = None

    async def checkpoint(self, entries: Sequence[Entry], spent: Spent) -> None:
        if self.fails:
            raise self.fails
        self.checkpoints.append((numbers(entries), numbers(self.log.entries)))


def numbers(entries: Sequence[Entry]) -> list[int]:
    return [entry.sequence_number for entry in entries]


def response() -> Response:
    return open_response(request(), id="resp_1", created_at=1)


def recorder(log: Log, journal: Journal | None = None, **options: int) -> Recorder:
    return Recorder(response(), log, journal=journal, **{"bytes_max": 10_000, "events_max": 100, **options})


def added() -> list[ItemAdded | PartAdded]:
    part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    return [ItemAdded(output_index=0, item=ITEM), PartAdded(**AT, part=part)]


def delta() -> TextDelta:
    return TextDelta(**AT, delta="a", logprobs=[])


def done() -> ItemDone:
    return ItemDone(output_index=0, item=ITEM)


async def test_events_are_numbered_and_sent_at_once():
    log = Log()
    recording = recorder(log)
    await recording.begin()
    await recording.record([*added(), delta()])
    assert numbers(log.entries) == [0, 1, 2, 3, 4]


async def test_an_item_commits_before_readers_see_that_it_is_done():
    log = Log()
    journal = Journal(log)
    recording = recorder(log, journal)
    await recording.record([*added(), delta()])
    assert journal.checkpoints == []
    await recording.record([done()])
    assert journal.checkpoints == [([0, 1, 2, 3], [0, 1, 2])]
    assert numbers(log.entries) == [0, 1, 2, 3]


async def test_a_checkpointed_batch_commits_before_any_of_it_is_sent():
    log = Log()
    journal = Journal(log)
    await recorder(log, journal).record(added(), checkpoint=True)
    assert journal.checkpoints == [([0, 1], [])]


async def test_the_end_of_a_turn_waits_for_what_follows():
    log = Log()
    journal = Journal(log)
    recording = recorder(log, journal)
    await recording.record(added())
    await recording.record([done()], ends_turn=True)
    assert (numbers(log.entries), journal.checkpoints) == ([0, 1], [])
    await recording.record([ItemAdded(output_index=1, item=ITEM)])
    assert journal.checkpoints == [([0, 1, 2], [0, 1])]
    assert numbers(log.entries) == [0, 1, 2, 3]


async def test_the_end_of_the_last_turn_commits_with_the_run():
    log = Log()
    journal = Journal(log)
    recording = recorder(log, journal)
    await recording.record(added())
    await recording.record([done()], ends_turn=True)
    closed = close_response(recording.response, Outcome("completed"), usage=None, now=2)
    assert numbers(recording.close(closed)) == [0, 1, 2, 3]
    assert (numbers(log.entries), journal.checkpoints) == ([0, 1], [])
    recording.finish(closed, closed)
    assert numbers(log.entries) == [0, 1, 2, 3]
    assert log.entries[-1].is_terminal


async def test_what_another_process_has_stored_is_what_readers_get():
    log = Log()
    recording = recorder(log)
    await recording.begin()
    closed = close_response(recording.response, Outcome("completed"), usage=None, now=2)
    recording.close(closed)
    recording.finish(replace(closed, status="cancelled", completed_at=None), closed)
    assert numbers(log.entries) == [0, 1, 2]
    assert b'"status":"cancelled"' in log.entries[-1].body
    assert recording.response.status == "cancelled"


@pytest.mark.parametrize("error", [Fenced(), DatabaseUnavailable("gone")])
async def test_after_a_checkpoint_that_failed_nothing_is_sent(error: Exception):
    log = Log()
    journal = Journal(log)
    recording = recorder(log, journal)
    await recording.record(added())
    journal.fails = error
    with pytest.raises(type(error)):
        await recording.record([done()])
    journal.fails = None
    with pytest.raises(type(error)):
        await recording.record([delta()])
    with pytest.raises(type(error)):
        recording.close(response())
    assert numbers(log.entries) == [0, 1]


async def test_a_stopped_recorder_raises_fenced():
    log = Log()
    recording = recorder(log)
    recording.stop()
    with pytest.raises(Fenced):
        await recording.begin()
    assert log.entries == []


@pytest.mark.parametrize("limit", ["bytes_max", "events_max"])
async def test_a_run_is_limited_but_not_its_snapshots(limit: str):
    recording = recorder(Log(), **{limit: 3})
    await recording.begin()  # snapshots of the request
    with pytest.raises(RunTooLong):
        await recording.record([*added(), delta(), delta()])


async def test_what_the_upstream_sends_is_limited_whatever_comes_of_it():
    recording = recorder(Log(), bytes_max=10)
    recording.count_upstream(10)
    with pytest.raises(RunTooLong):
        recording.count_upstream(1)


async def test_events_of_earlier_owners_count_and_are_archived():
    former, log = Log(), Log()
    earlier = recorder(former)
    await earlier.record([*added(), delta()])
    journal = Journal(log)
    recording = Recorder(
        earlier.response,
        log,
        bytes_max=10_000,
        events_max=4,
        next_number=3,
        recorded=former.entries,
        pending=former.entries[2:],
        journal=journal,
    )
    await recording.record([done()])
    assert journal.checkpoints == [([2, 3], [])]
    closed = close_response(recording.response, Outcome("completed"), usage=None, now=2)
    assert numbers(recording.close(closed)) == [0, 1, 2, 3, 4]
    with pytest.raises(RunTooLong):
        await recording.record([delta()])
