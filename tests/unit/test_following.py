"""Following a background run, on a Redis and a Postgres in memory: every event once, in order, wherever it is found."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import msgspec
import pytest
import zstandard
from redis.exceptions import ConnectionError as RedisGone

from app.domain.lifecycle import Outcome, close_response, open_response
from app.errors import ServerError
from app.runs.following import Following
from app.settings import Settings
from app.storage.backlog import Backlogs
from app.storage.redishub import Batch
from app.wire.events import Completed, Created, Entry, InProgress, TextDelta, encode_event
from tests.unit.build import request

RESPONSE = open_response(request(), id="resp_1", created_at=1)
DONE = close_response(RESPONSE, Outcome("completed"), usage=None, now=2)
SILENT: list[Batch] = []

Step = list[Batch] | Exception


def event(number: int, last: int) -> Entry:
    """One of the events 0 to `last` of a run."""
    if number == last:
        return encode_event(Completed(response=DONE, sequence_number=number))
    if number < 2:
        kind = InProgress if number else Created
        return encode_event(kind(response=RESPONSE, sequence_number=number))
    at: dict[str, Any] = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    return encode_event(TextDelta(**at, delta="a", logprobs=[], sequence_number=number))


def events(*given: int, last: int = 9) -> list[Entry]:
    return [event(number, last) for number in given]


def batch(*given: int, jump: int | None = None) -> Batch:
    return Batch(events(*given), jump, 100)


class Redis:
    """A stream whose reads give these steps, then silence; it notes from where it is read again."""

    def __init__(self, *steps: Step) -> None:
        self.steps = list(steps)
        self.begins = -1
        self.rewound: list[int] = []
        self.given = 0

    @asynccontextmanager
    async def reading(self, response_id: str, after: int, backlog: Any, *, silence_s: float) -> AsyncIterator["Redis"]:
        self.begins = after
        yield self

    async def next(self) -> list[Batch]:
        step = self.steps.pop(0) if self.steps else SILENT
        if isinstance(step, Exception):
            raise step
        return step

    def hand_out(self, entries: list[Entry]) -> list[Entry]:
        return entries

    def rewind(self, after: int) -> None:
        self.rewound.append(after)


class Postgres:
    """What is stored of the run: each look sees the next of these."""

    def __init__(self, *looks: tuple[Sequence[int], bool]) -> None:
        self.looks = list(looks)

    @asynccontextmanager
    async def autocommit(self) -> AsyncIterator["Postgres"]:
        yield self

    async def one(self, _: Any, *, number: int, **__: Any) -> dict[str, Any]:
        given, archived = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
        frames = b"".join(entry.frame for entry in events(*(one for one in given if one >= number)))
        return {
            "status": "in_progress",
            "background": True,
            "streamed": True,
            "archive": zstandard.compress(frames) if archived else None,
            "archive_next": None,
            "dictionary": None,
            "journal": frames,
            "journal_next": None,
        }


async def follow(
    redis: Redis, postgres: Postgres, *, stored: Sequence[int] = (), archived: bool = False, after: int = -1
) -> list[list[int]]:
    """The numbers of each batch that a reader gets."""
    settings = msgspec.structs.replace(Settings(), poll_s=0.001, keepalive_s=0.002)
    following = Following(settings, postgres, redis, Backlogs(settings))  # type: ignore[arg-type]
    followed = following.follow_stored("tenant", "resp_1", events(*stored), is_archived=archived, after=after)
    return [[entry.sequence_number for entry in got] async for got in followed.batches]


def flat(batches: list[list[int]]) -> list[int]:
    return [number for got in batches for number in got]


NOTHING: tuple[Sequence[int], bool] = ((), False)


async def test_stored_events_come_first_then_those_of_the_stream():
    redis = Redis([batch(2, 3)], [batch(4, 5), batch(6, 7, 8)], [batch(9)])
    assert flat(await follow(redis, Postgres(NOTHING), stored=(0, 1))) == list(range(10))
    assert (redis.begins, redis.rewound) == (1, [])


async def test_events_that_were_seen_already_are_left_out():
    redis = Redis([batch(0, 1, 2, 3)], [batch(2, 3, 4, 5)], [batch(6, 7, 8, 9)])
    assert flat(await follow(redis, Postgres(NOTHING), stored=(0, 1))) == list(range(10))
    assert redis.rewound == []


async def test_it_begins_after_the_number_that_the_reader_has():
    assert flat(await follow(Redis([batch(6, 7, 8, 9)]), Postgres(NOTHING), after=5)) == [6, 7, 8, 9]


async def test_a_gap_is_filled_from_postgres_and_the_stream_is_read_again():
    redis = Redis([batch(0, 1, 2)], [batch(5, 6)], [batch(5, 6, 7, 8, 9)])
    got = flat(await follow(redis, Postgres(((0, 1, 2, 3, 4), False))))
    assert got == list(range(10))
    assert redis.rewound == [4]


async def test_a_gap_after_consecutive_events_is_looked_up_after_them():
    redis = Redis([batch(0, 1, 2), batch(5)], [batch(3, 4, 5, 6, 7, 8, 9)])
    assert flat(await follow(redis, Postgres(NOTHING))) == list(range(10))
    assert redis.rewound == [2]


async def test_a_gap_that_is_nowhere_is_waited_for():
    redis = Redis([batch(0, 1, 4)], [batch(4)], [batch(2, 3, 4, 5, 6, 7, 8, 9)])
    assert flat(await follow(redis, Postgres(NOTHING))) == list(range(10))


async def test_numbers_that_were_given_up_are_no_gap():
    redis = Redis([batch(0, 1, 2)], [batch(7, 8, 9, jump=2)])
    assert flat(await follow(redis, Postgres(NOTHING))) == [0, 1, 2, 7, 8, 9]
    assert redis.rewound == []


async def test_without_redis_postgres_is_read_to_the_end():
    gone = RedisGone("gone")
    redis = Redis(*(gone for _ in range(20)))
    postgres = Postgres(NOTHING, ((0, 1, 2, 3), False), NOTHING, (range(10), True))
    assert flat(await follow(redis, postgres)) == list(range(10))


async def test_an_archive_needs_no_stream():
    redis = Redis()
    assert flat(await follow(redis, Postgres(NOTHING), stored=range(10), archived=True)) == list(range(10))


async def test_a_silent_run_gives_empty_batches():
    redis = Redis([batch(0, 1)], SILENT, SILENT, SILENT, SILENT, [batch(*range(2, 10))])
    got = await follow(redis, Postgres(NOTHING))
    assert [] in got
    assert all(first < second for first, second in pairwise(flat(got)))
    assert flat(got) == list(range(10))


async def test_readers_are_released_when_the_process_ends():
    settings = Settings()
    following = Following(settings, Postgres(NOTHING), Redis([batch(0, 1)]), Backlogs(settings))  # type: ignore[arg-type]
    followed = following.follow_stored("tenant", "resp_1", [])
    got = aiter(followed.batches)
    assert [entry.sequence_number for entry in await anext(got)] == [0, 1]
    following.release()
    with pytest.raises(ServerError, match="shutting down"):
        await anext(got)
