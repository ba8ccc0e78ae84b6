"""What is to be reached, and tables of what was."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import ge, le
from statistics import median

Measured = Mapping[str, Mapping[str, float]]
"""Scenario → figure → median of the rounds."""


@dataclass(frozen=True)
class Goal:
    """One figure, and the mark it shall reach."""

    said: str
    scenario: str
    figure: str
    mark: float
    unit: str = "ms"
    at_least: bool = False
    bound: str = ""
    """The figure of what stands in the way: what the libraries alone reach, what a commit takes, what the cores allow."""

    def line(self, measured: Measured) -> str:
        """Its row of the table."""
        value = measured[self.scenario][self.figure]
        reached = (ge if self.at_least else le)(value, self.mark)
        sign = "≥" if self.at_least else "≤"
        bound = f"{self.bound}: {_plain(measured[self.scenario][self.bound])}" if self.bound else ""
        return (
            f"| {self.said} | {_plain(value)} | {sign} {_plain(self.mark)} {self.unit} | {'yes' if reached else 'no'} "
            f"| {bound} |"
        )


GOALS = (
    Goal("non-stream stored create, 16 clients: CPU per request", "creates", "server_cpu_ms", 1.2),
    Goal("the same: requests per second", "creates", "server_per_s", 600, "/s", at_least=True),
    Goal(
        "create, 1 client: p50 over the upstream's",
        "creates_alone",
        "server_added_p50_ms",
        3,
        bound="libraries_added_p50_ms",
    ),
    Goal(
        "64 streams × 200 × 5 ms: CPU per delta over the floor's",
        "streams",
        "server_over_floor",
        2,
        "×",
        bound="libraries_over_floor",
    ),
    Goal("the same: slowdown", "streams", "server_slowdown", 1.02, "×"),
    Goal("256 streams: slowdown", "streams_many", "server_slowdown", 1.1, "×", bound="libraries_slowdown"),
    Goal(
        "first delta, 16 streams: p50 over the upstream's",
        "streams_calm",
        "server_added_first_p50_ms",
        3,
        bound="commit_p50_ms",
    ),
    Goal("the same: p99", "streams_calm", "server_added_first_p99_ms", 8, bound="libraries_added_first_p99_ms"),
    Goal("first delta of a model that reads for 10 ms: p50", "streams_waited_for", "server_added_first_p50_ms", 3),
    Goal("the same: p99", "streams_waited_for", "server_added_first_p99_ms", 8),
    Goal("turn 100 of a chain, over its messages sent directly", "chain", "turn_100_added_ms", 4),
    Goal("turn 1,000", "chain", "turn_1000_added_ms", 30),
    Goal("bytes stored at turn 1,000 over those at turn 2", "chain", "bytes_growth", 1.1, "×"),
    Goal("retrieve, 16 clients", "reading", "retrieve_per_s", 2000, "/s", at_least=True),
    Goal("list input items, 16 clients", "reading", "items_per_s", 1500, "/s", at_least=True),
    Goal("background run of 20 × 5 ms, 16 at once", "background", "per_s", 100, "/s", at_least=True),
    Goal("the same: CPU per run", "background", "server_cpu_ms", 8),
    Goal("event of a worker to a client elsewhere, 64 streams: p50", "background_streams", "replica_late_p50_ms", 12),
    Goal("the same: p99", "background_streams", "replica_late_p99_ms", 40),
    Goal("resume: first event of a live run", "resume", "first_event_p50_ms", 5),
    Goal("resume: 10,000 events of a finished one", "resume", "replay_10000_ms", 60),
    Goal("1,000 clients following 50 runs: slowdown", "followers", "slowdown", 1.05, "×"),
    Goal("the same: memory per client", "followers", "kb_per_client", 20, "kB"),
    Goal("the same: Redis connections more", "followers", "redis_connections", 1, ""),
    Goal("MCP call, 8 in 4 turns: CPU over 4 creates", "tools", "cpu_ms_per_call", 6),
    Goal("idle stream: memory", "idle_streams", "server_kb_per_stream", 15, "kB", bound="libraries_kb_per_stream"),
    Goal("2 processes over 1, creates", "two_processes", "gain", 1.7, "×", at_least=True, bound="gain_at_most"),
)


def goals(measured: Measured) -> str:
    """The table of issue and README."""
    lines = ["| figure | measured | mark | reached | beside it |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *(goal.line(measured) for goal in GOALS if goal.scenario in measured)])


def table(figures: Mapping[str, float]) -> str:
    """All figures of one scenario."""
    return "\n".join(
        ["| figure | median |", "|---|---|", *(f"| {name} | {_plain(figures[name])} |" for name in figures)]
    )


def _plain(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def medians(rounds: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The median of each figure over the rounds."""
    every = list(rounds)
    return {name: median(one[name] for one in every) for name in every[0]}
