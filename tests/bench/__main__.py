"""`python -m tests.bench [--quick] [--only SCENARIO …]`: the whole measurement in one command."""

import argparse
import resource
import tempfile
from pathlib import Path

import msgspec
import uvloop

from tests.bench import figures, plots, scenarios
from tests.bench.scenarios import Bench, Figures, Scenario
from tests.bench.stage import set_up
from tests.servers import ROOT

ROUNDS = 3
OPEN_FILES = 16_384


def main() -> None:
    """Measure and print; the whole measurement also draws the plots of docs/performance.md."""
    parser = argparse.ArgumentParser(description="Measures this server against its upstream and the floor.")
    parser.add_argument("--quick", action="store_true", help="one round, shorter")
    parser.add_argument(
        "--only", nargs="*", metavar="SCENARIO", help="only these (of `chain` needs what `reading` reads)"
    )
    parser.add_argument("--rounds", type=int)
    options = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(OPEN_FILES, hard), hard))
    chosen = [
        scenario
        for scenario in scenarios.ALL
        if (
            scenario.__name__ in options.only
            if options.only
            else not (options.quick and scenario in scenarios.NOT_IN_QUICK)
        )
    ]
    data = ROOT / ".data"
    data.mkdir(exist_ok=True)
    # Beside the data of `make run`: on the disk that a user's data is on.
    with (
        tempfile.TemporaryDirectory(prefix="bench-", dir=data, ignore_cleanup_errors=True) as home,
        set_up(Path(home)) as stage,
    ):
        bench = Bench(stage, quick=options.quick)
        rounds = options.rounds or (1 if options.quick else ROUNDS)
        measured = uvloop.run(_measure(bench, chosen, rounds))
    for name, medians in measured.items():
        print(f"\n## {name}\n\n{figures.table(medians)}\n")
        print(msgspec.json.encode({"scenario": name, "rounds": rounds, **medians}).decode())
    print(f"\n## Against the marks\n\n{figures.goals(measured)}")
    if not options.quick and not options.only:
        plots.draw(bench)


async def _measure(bench: Bench, chosen: list[Scenario], rounds: int) -> dict[str, Figures]:
    found: dict[str, list[Figures]] = {scenario.__name__: [] for scenario in chosen}
    for number in range(rounds):
        for scenario in chosen:
            print(f"round {number + 1}: {scenario.__doc__ or ''}".splitlines()[0], flush=True)
            found[scenario.__name__].append(await scenario(bench))
    return {name: figures.medians(each) for name, each in found.items()}


if __name__ == "__main__":
    main()
