"""python -m tests.faults.chaos --seconds N: random faults at random moments, and after each round every promise is checked.

A round: two replicas, two workers, 20 responses, half of them with a call of an MCP tool, 50 clients that leave and come back,
foreground streams, one to four faults: also outages that are longer than a lease, read-only Postgres, and cancels within
milliseconds of creates. One line is printed per round; the first broken promise ends the run, with its seed and the output of
every process.
"""

import argparse
import contextlib
import http.client
import itertools
import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.outbound.mcp import IDEMPOTENCY_KEY
from tests.faults.client import Follower, begin, call, decoded, frames_of, get, stream
from tests.faults.cluster import LEASE_S, Cluster, Servers, frozen
from tests.faults.stream_oracle import checked_response, closed_as, rounds_of, text_of
from tests.servers import Served
from tests.toolserver import Toolprocess
from tests.upstream import Upstream, answer, calling, finish, note, reasoning, repeat, script, text

RESPONSES = 20
CLIENTS = 50
STREAMS = 6
"""Foreground ones: as long as its replica lives, nothing may happen to any."""

CANCELS = 30
"""Of one fault, each within milliseconds of its create."""

RUNS_MAX = 12
"""Places of a worker: so few that a place which leaks is missed."""

STUCK_S = 25.0
"""The faults of a round do not take so long, so a client that heard nothing for so long was forgotten."""

LONGEST_S = 45.0
"""Runs without followers end within this, however often they are taken over."""

JUMPS_MAX = 4
"""More often than this no round can empty Redis and kill an owner."""


class Chaos:
    """The cluster, and the faults that befall it."""

    def __init__(self, cluster: Cluster, chance: random.Random) -> None:
        self._cluster, self._chance = cluster, chance
        self.may_jump = False

    def faults(self) -> list[Callable[[], None]]:
        """One to four of them, in a random order."""
        every = [
            self.worker_killed,
            self.workers_killed,
            self.worker_frozen,
            self.worker_stopped,
            self.replica_killed,
            self.postgres_killed,
            self.postgres_frozen,
            self.postgres_gone,
            self.postgres_read_only,
            self.redis_killed,
            self.redis_frozen,
            self.redis_emptied,
            self.response_cancelled,
            self.responses_cancelled_at_once,
        ]
        return self._chance.sample(every, self._chance.randint(1, 4))

    def worker_killed(self) -> None:
        """Kill -9 of one; another starts."""
        self._cluster.kill(self._chance.choice(self._cluster.workers))
        self._cluster.ensure(workers=2)

    def workers_killed(self) -> None:
        """Kill -9 of all."""
        self._cluster.kill_workers()
        self._cluster.ensure(workers=2)

    def worker_frozen(self) -> None:
        """SIGSTOP for less or more than a lease."""
        with frozen([self._chance.choice(self._cluster.workers).process.pid]):
            self._pass()

    def worker_stopped(self) -> None:
        """SIGTERM."""
        worker = self._chance.choice(self._cluster.workers)
        worker.process.send_signal(signal.SIGTERM)
        worker.process.wait(30)
        self._cluster.ensure(workers=2)

    def replica_killed(self) -> None:
        """Kill -9 of one; another starts elsewhere."""
        self._cluster.kill(self._chance.choice(self._cluster.replicas))
        self._cluster.ensure(workers=2)

    def postgres_killed(self) -> None:
        """Kill -9 of the postmaster."""
        self._cluster.servers.kill_postgres()

    def postgres_frozen(self) -> None:
        """SIGSTOP of every process of it."""
        with contextlib.suppress(ProcessLookupError), frozen(self._cluster.servers.postgres()):
            self._pass()

    def postgres_gone(self) -> None:
        """Refuse connections for longer than a lease."""
        with self._cluster.servers.without_postgres():
            self._pass_a_lease()

    def postgres_read_only(self) -> None:
        """It takes no writes, for longer than a lease."""
        self._cluster.servers.wait_postgres()
        with self._cluster.servers.read_only():
            self._pass_a_lease()

    def redis_killed(self) -> None:
        """Kill -9; it comes back with its append-only file."""
        self.may_jump = True
        self._cluster.servers.kill_valkey()
        self._cluster.servers.wait_valkey()

    def redis_frozen(self) -> None:
        """SIGSTOP."""
        self.may_jump = True
        with frozen(self._cluster.servers.valkey()):
            self._pass()

    def redis_emptied(self) -> None:
        """FLUSHALL."""
        self.may_jump = True
        self._cluster.servers.wait_valkey()
        self._cluster.servers.redis.flushall()

    def response_cancelled(self) -> None:
        """One of those that run."""
        rows = self._retried(lambda: self._cluster.query("select response_id from runs where request is not null"))
        if rows:
            response_id = self._chance.choice(rows)["response_id"]
            self._retried(
                lambda: call(self._chance.choice(self._cluster.urls), "POST", f"/responses/{response_id}/cancel")
            )

    def responses_cancelled_at_once(self) -> None:
        """So soon that a worker may not have begun what it has claimed."""
        for number in range(CANCELS):
            with contextlib.suppress(OSError, http.client.HTTPException, AssertionError, IndexError):
                said = script(answer(f"cancelled {number}"))
                response_id = begin(self._chance.choice(self._cluster.urls), said, stream=bool(number % 2))
                time.sleep(self._chance.uniform(0, 0.006))
                call(self._chance.choice(self._cluster.urls), "POST", f"/responses/{response_id}/cancel")

    def _pass_a_lease(self) -> None:
        time.sleep(self._chance.uniform(1.1, 2.5) * LEASE_S)

    def _pass(self) -> None:
        time.sleep(self._chance.uniform(0.1, 2 * LEASE_S))

    def _retried(self, ask: Callable[[], Any]) -> Any:
        for _ in range(100):
            with contextlib.suppress(Exception):  # whatever it asks may be down just now
                return ask()
            time.sleep(0.1)
        raise AssertionError("no replica answers")


class Foreground:
    """A foreground stream, which lives and dies with its replica."""

    def __init__(self, replica: Served, said: str) -> None:
        self._replica = replica
        self._ended = ""
        self._seen: list[Any] = []
        self._thread = threading.Thread(target=self._follow, args=(replica.url, said), daemon=True)
        self._thread.start()

    def _follow(self, url: str, said: str) -> None:
        try:
            status, self._seen = stream(url, said)
            self._ended = "heard" if status == 200 else "refused"
        except (OSError, http.client.HTTPException):
            self._ended = "cut"

    def check(self, urls: list[str]) -> str:
        """The outcome. Raises AssertionError if it is not allowed."""
        self._thread.join(90)
        assert self._ended, "a foreground stream has not ended"
        if self._ended == "heard":
            response = checked_response(self._seen)
            assert response["status"] == "completed", f"a stream of a living replica has ended otherwise: {response}"
            assert get(urls[0], response["id"]) == response
        if self._ended == "cut":
            assert self._replica.process.poll() is not None, "a living replica has cut a stream off"
        return self._ended


class Round:
    """Responses, clients and faults at once; then the promises."""

    def __init__(self, cluster: Cluster, box: Toolprocess, seed: int) -> None:
        self._cluster, self._box = cluster, box
        self._chance = random.Random(seed)
        self.seed = seed
        self.counts: Counter[str] = Counter()
        self._followers: list[Follower] = []
        self._streams: list[Foreground] = []
        self._boxes: dict[str, str] = {}
        """Response → the name under which the tool server finds its calls."""

    def run(self) -> str:
        """Returns a line that describes it. Raises AssertionError."""
        begun = time.monotonic()
        self._cluster.ensure(workers=2)
        chaos = Chaos(self._cluster, self._chance)
        faults = chaos.faults()
        making = threading.Thread(target=self._begin_all)
        making.start()
        for fault in faults:
            time.sleep(self._chance.uniform(0.2, 1.2))
            fault()
        making.join()
        self._cluster.ensure(workers=2)
        assert len(self._followers) == CLIENTS
        for follower in self._followers:
            follower.urls[:] = self._cluster.urls
        self._cluster.servers.wait_postgres()
        for one in self._streams:
            self.counts[f"streams_{one.check(self._cluster.urls)}"] += 1
        for follower in self._followers:
            self._check(follower, JUMPS_MAX if chaos.may_jump else 0)
        self._cluster.assert_nothing_is_left(LONGEST_S)  # also of responses whose first event was lost
        names = " ".join(fault.__name__ for fault in faults)
        figures = " ".join(f"{name}={count}" for name, count in sorted(self.counts.items()))
        return f"seed={self.seed} {time.monotonic() - begun:.1f}s {figures} faults: {names}"

    def _begin_all(self) -> None:
        ids = []
        for number in range(RESPONSES):
            rounds, name = self._chance.randint(20, 120), f"{self.seed}-{number}"
            thinking = repeat(self._chance.randint(1, 10), reasoning("r{i} "), every_ms=5)
            talking = repeat(rounds, text("w{i} "), every_ms=self._chance.randint(5, 40))
            talk = [talking, text(f"end of {rounds}"), finish()]
            if number % 2:
                call = calling("slow", {"ms": self._chance.randint(1, 1500)})
                box = {
                    "type": "mcp",
                    "server_label": "box",
                    "server_url": self._box.url(name),
                    "require_approval": "never",
                }
                ids.append(self._begun(script([note(name), thinking, *call], talk), tools=[box]))
                self._boxes[ids[-1]] = name
            else:
                ids.append(self._begun(script([note(name), thinking, *talk])))
            self._followers.append(Follower(self._cluster.urls, ids[-1], drops=self._chance.randint(0, 8), seed=number))
        for number in range(STREAMS):
            talking = repeat(self._chance.randint(20, 120), text("w{i} "), every_ms=self._chance.randint(5, 40))
            said = script([note(f"{self.seed} stream {number}"), talking, finish()])
            self._streams.append(Foreground(self._chance.choice(self._cluster.replicas), said))
        for number in range(CLIENTS - RESPONSES):
            drops = self._chance.randint(0, 8)
            self._followers.append(Follower(self._cluster.urls, self._chance.choice(ids), drops=drops, seed=number))

    def _begun(self, said: str, **more: Any) -> str:
        for _ in range(300):
            with contextlib.suppress(OSError, http.client.HTTPException, AssertionError, IndexError):
                return begin(self._chance.choice(self._cluster.urls), said, **more)
            time.sleep(0.1)
        raise AssertionError("no response could be begun")

    def _check(self, follower: Follower, jumps_max: int) -> None:
        seen = follower.join(90)
        assert follower.slowest_s < STUCK_S, f"{follower.response_id}: nothing was heard for {follower.slowest_s:.1f} s"
        row = get(self._cluster.urls[0], follower.response_id)
        assert checked_response(seen, jumps=jumps_max) == row
        kept = frames_of(self._cluster.urls[1], follower.response_id)
        assert checked_response([decoded(frame) for frame in kept], jumps=jumps_max) == row
        archive = {decoded(frame)["sequence_number"]: frame for frame in kept}
        superseded = [frame for frame in follower.frames if archive.get(decoded(frame)["sequence_number"]) != frame]
        if not jumps_max:
            assert kept == follower.frames
        assert not any(decoded(frame)["sequence_number"] in archive for frame in superseded), "other bytes, same number"
        assert row["status"] in {"completed", "cancelled"}, row
        if row["status"] == "completed":
            last = text_of({"output": row["output"][-1:]})
            rounds = rounds_of(last)
            assert rounds == list(range(len(rounds)))
            assert last.endswith(f"end of {len(rounds)}")
        if follower.response_id in self._boxes:
            self._check_calls(row, self._box.calls(self._boxes[follower.response_id]))
        self._count(follower, seen, superseded, row)

    def _check_calls(self, row: Any, sent: list[Any]) -> None:
        """A response that was created twice, because the first reply was lost, has its own call: each is sent once at most."""
        calls = [item for item in row["output"] if item["type"] == "mcp_call"]
        keys = [call["meta"][IDEMPOTENCY_KEY] for call in sent]
        assert len(set(keys)) == len(keys), f"a call was sent twice: {sent}"
        for item in calls:
            assert item["status"] in {"completed", "failed"}, item
            assert item["id"] in keys or item["status"] == "failed", f"a result of nothing: {item}"
        assert len(calls) <= 1, f"a call with an unknown outcome was made again: {calls}"
        assert row["status"] == "cancelled" or calls, row
        self.counts["calls"] += len(calls)
        self.counts["unknown"] += sum(item["status"] == "failed" for item in calls)

    def _count(self, follower: Follower, seen: list[Any], superseded: list[bytes], row: Any) -> None:
        numbers = [event["sequence_number"] for event in seen]
        self.counts["events"] += len(seen)
        self.counts["resumes"] += len(follower.resumed_at)
        self.counts["cuts"] += follower.cuts
        self.counts["partials"] += closed_as(seen).count("incomplete")
        self.counts["jumps"] += sum(after != before + 1 for before, after in itertools.pairwise(numbers))
        self.counts["superseded"] += len(superseded)
        self.counts["cancelled"] += row["status"] == "cancelled"


def main() -> None:
    """Rounds until the time is over."""
    parser = argparse.ArgumentParser(description="Random faults, and every promise checked.")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    ends, seed = time.monotonic() + arguments.seconds, arguments.seed
    with (
        tempfile.TemporaryDirectory(prefix="chaos-") as home,
        Upstream() as upstream,
        Toolprocess(Path(home) / "calls") as box,
    ):
        servers = Servers(Path(home) / "servers")
        env = {
            "OPENAI_BASE_URL": upstream.base_url,
            "REPRISE_DATA_DIR": f"{home}/data",
            "REPRISE_OUTBOUND_ALLOW": "127.0.0.1/32",
        }
        patience = {"REPRISE_RUN_ATTEMPTS_MAX": "50", "REPRISE_SHUTDOWN_GRACE_S": "0.5"}
        cluster = Cluster(servers, env, REPRISE_WORKER_RUNS_MAX=str(RUNS_MAX), **patience)
        try:
            while time.monotonic() < ends:
                try:
                    print(Round(cluster, box, seed).run(), flush=True)
                except BaseException:
                    print(f"seed={seed} BROKEN\n{cluster.printed}", flush=True)
                    raise
                upstream.clear()
                seed += 1
        finally:
            cluster.close()
            servers.close()
    os._exit(0)  # followers of a broken round may still wait


if __name__ == "__main__":
    main()
