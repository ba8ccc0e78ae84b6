"""When a process may rely on its own leases, and judge those of others."""

import time
from datetime import UTC, datetime, timedelta

import pytest

from app.runs.leases import Watch

LEASE_S = 12.0
CLOCK = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def now(monkeypatch):
    """Sets the monotonic clock."""
    at = [1_000.0]
    monkeypatch.setattr(time, "monotonic", lambda: at[0])

    def set_to(seconds):
        at[0] = 1_000.0 + seconds

    return set_to


def beaten(watch, now, *times, ahead_s=0.0):
    """A heartbeat at each of these times, by a database's clock that is so much ahead."""
    for at in times:
        now(at)
        watch.beaten(time.monotonic() - 0.1, time.monotonic(), CLOCK + timedelta(seconds=at + ahead_s))


def test_without_a_heartbeat_nothing_lease_is_valid(now):
    watch = Watch(LEASE_S)
    assert not watch.lease_is_valid
    assert not watch.is_on_time
    assert watch.look() is None


def test_heartbeats_on_time_are_watched_time(now):
    watch = Watch(LEASE_S)
    beaten(watch, now, 0, 3, 6, 9, 12)
    assert watch.look().watched_s == 12
    assert watch.is_on_time
    now(17)
    assert watch.look().watched_s == 17
    now(18.1)
    assert not watch.is_on_time
    assert watch.look() is None
    assert watch.lease_is_valid
    now(12 + 0.8 * LEASE_S)
    assert not watch.lease_is_valid


def test_after_a_late_heartbeat_the_watch_begins_anew(now):
    watch = Watch(LEASE_S)
    beaten(watch, now, 0, 3, 6)
    beaten(watch, now, 12.1)
    assert watch.look().watched_s == 0
    assert watch.is_on_time


@pytest.mark.parametrize("by", [3600.0, -3600.0, 6.5])
def test_after_a_jump_of_the_clock_the_watch_begins_anew(now, by):
    watch = Watch(LEASE_S)
    beaten(watch, now, 0, 3, 6)
    beaten(watch, now, 9, ahead_s=by)
    assert watch.look().watched_s == 0


def test_what_was_seen_does_not_grow_while_something_is_waited_for(now):
    """As a connection to a database that is frozen: it comes together with leases that nobody could prolong."""
    watch = Watch(LEASE_S)
    beaten(watch, now, 0, 3)
    now(5)
    seen = watch.look()
    now(30)
    assert (seen.horizon, seen.watched_s) == (CLOCK + timedelta(seconds=5), 5)
