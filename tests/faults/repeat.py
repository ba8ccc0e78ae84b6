"""python -m tests.faults.repeat --seconds N: chaos and the fault suite in turns, each time with different timing, until the time is up.

Every round prints its seed. The first violation ends the run with status 1, its output, and the command that repeats it.
"""

import argparse
import os
import re
import subprocess
import sys
import time

CHAOS_S = 60.0
"""Of random faults before each round of the suite."""

CHAOS = ["tests.faults.chaos"]
SUITE = ["pytest", "-x", "-n", "3", "--dist", "loadfile", "--no-loadscope-reorder", "tests/faults"]


def run(arguments: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """One process of ours, and all that it says."""
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def main() -> None:
    """Rounds until the time is over, or a promise is broken."""
    parser = argparse.ArgumentParser(description="The fault suite and chaos, again and again, with random timing.")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    ends, seed, number = time.monotonic() + arguments.seconds, arguments.seed, 0
    while (left := ends - time.monotonic()) > 0:
        number += 1
        print(f"round {number}, seed {seed}", flush=True)
        done = run([*CHAOS, "--seed", str(seed), "--seconds", str(min(CHAOS_S, left))], {})
        print(done.stdout, end="", flush=True)
        if done.returncode != 0:
            broken = re.search(r"seed=(\d+) BROKEN", done.stdout)
            sys.exit(f"BROKEN; again: python -m {' '.join(CHAOS)} --seconds 1 --seed {broken[1] if broken else seed}")
        if time.monotonic() < ends:
            done = run(SUITE, {"FAULTS_SEED": str(seed), "FAULTS_END": str(ends)})
            if done.returncode != 0:
                sys.exit(f"{done.stdout}\nBROKEN; again: FAULTS_SEED={seed} python -m {' '.join(SUITE)}")
            print(done.stdout.strip().splitlines()[-1], flush=True)
        seed += 1_000  # chaos counts its own rounds upwards from its seed


if __name__ == "__main__":
    main()
