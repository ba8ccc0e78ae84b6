"""What a process knows of leases from its own heartbeats: whether its own are valid, and whether it may judge those of others.

An expired lease in Postgres proves nothing while no process could prolong one: during an outage, behind a lock, while all
processes stood still, after the database's clock has jumped. A process that has kept its own heartbeats on time for a whole
lease knows that the owner could have done the same.
"""

import math
import time
from datetime import datetime, timedelta

from msgspec import Struct

BEATS_PER_LEASE = 4

RETRIES_PER_LEASE = 12
"""As often is a heartbeat tried that has failed. Together with LATE this gives an owner time before anyone claims its runs."""

LATE = 0.5
"""The part of a lease after which the next heartbeat is late. A clock that differs by more has jumped."""

SELF_FENCE = 0.8
"""The part of a lease after which a process that can't prolong it stops by itself."""


class Sight(Struct, frozen=True):
    """What a process has seen at some moment."""

    horizon: datetime
    """The database's time by our clock, which no jump and no delay of a statement moves forward."""
    watched_s: float
    """For how long heartbeats have been on time and the database's clock steady."""


class Watch:
    """The heartbeats of this process; times are monotonic seconds, but for the database's own clock."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._begun_at = self._ended_at = self._steady_since = -math.inf
        self._clock: datetime | None = None

    def beaten(self, begun_at: float, ended_at: float, clock: datetime) -> None:
        """A heartbeat has succeeded; `clock` is the database's time in between."""
        passed_s = ended_at - self._ended_at
        if self._clock is None or max(passed_s, abs((clock - self._clock).total_seconds() - passed_s)) > self._late_s:
            self._steady_since = ended_at
        self._begun_at, self._ended_at, self._clock = begun_at, ended_at, clock

    @property
    def _late_s(self) -> float:
        return LATE * self._lease_s

    @property
    def is_sure(self) -> bool:
        """Whether our own leases are surely valid: the last heartbeat is not too old. If not, no event may be sent."""
        return time.monotonic() - self._begun_at < SELF_FENCE * self._lease_s

    @property
    def is_on_time(self) -> bool:
        """Whether the last heartbeat is young enough to judge other owners by it."""
        return time.monotonic() - self._ended_at < self._late_s

    def look(self) -> Sight | None:
        """What can be judged at this moment; None if the next heartbeat comes first. Whatever is waited for afterwards, a
        connection or an answer, proves nothing more."""
        now = time.monotonic()
        since_s = now - self._ended_at
        if self._clock is None or since_s >= self._late_s:
            return None
        return Sight(self._clock + timedelta(seconds=since_s), now - self._steady_since)
