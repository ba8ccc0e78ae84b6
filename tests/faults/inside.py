"""A server with the settings INSIDE (cluster.py) imports this when it is forked.

WALL_CLOCK_SHIFT_S shifts the process's wall clock, and no monotonic one; the server asks both through their modules.
At SIGUSR1 it prints how many asyncio tasks it has.
"""

import asyncio
import datetime as dt
import gc
import os
import signal
import time

SHIFT_S = float(os.environ.get("WALL_CLOCK_SHIFT_S", "0"))

_time, _time_ns = time.time, time.time_ns


class ShiftedDatetime(dt.datetime):
    """Its `now` is that of the shifted clock."""

    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + dt.timedelta(seconds=SHIFT_S)

    @classmethod
    def utcnow(cls):
        return cls.now(dt.UTC).replace(tzinfo=None)


if SHIFT_S:
    time.time = lambda: _time() + SHIFT_S
    time.time_ns = lambda: _time_ns() + int(SHIFT_S * 1e9)
    dt.datetime = ShiftedDatetime


def count_tasks(*_):
    """To stdout, where the test reads it."""
    tasks = [one for one in gc.get_objects() if isinstance(one, asyncio.Task) and not one.done()]
    print(f"TASKS {len(tasks)}", flush=True)


signal.signal(signal.SIGUSR1, count_tasks)
