"""python -m tests.fuzz --requests N --seed N: broken requests on servers of its own."""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from app import embedded, migrate
from tests.fuzz import documented
from tests.fuzz.sending import Fuzzer, report
from tests.servers import Served
from tests.upstream import Upstream

BATCH = 500
"""Requests between two checks for errors."""
WRONG_MAX = 20
"""More need not be seen."""


def main() -> int:
    """Exit status 1 for any violation."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--requests", type=int, default=30_000)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--first", type=int, default=0, help="the number of the first")
    parser.add_argument("--at-once", type=int, default=4)
    parser.add_argument(
        "--documented", action="store_true", help="requests of schemathesis, as many for each operation"
    )
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    with tempfile.TemporaryDirectory() as directory, Upstream() as upstream:
        data = Path(directory)
        with embedded.start(data / "servers", durable=False) as servers:
            migrate.upgrade(servers.database_url)
            env = {
                "DATABASE_URL": servers.database_url,
                "REDIS_URL": servers.redis_url,
                "OPENAI_BASE_URL": upstream.base_url,
                "REPRISE_DATA_DIR": str(data),
            }
            with Served({**env, "REPRISE_AUTH_DELAY_MAX_S": "0"}) as served:
                return (from_document if given.documented else fuzz)(served, upstream, given)


def from_document(served: Served, upstream: Upstream, given: argparse.Namespace) -> int:
    """All that schemathesis makes of the OpenAPI document."""
    with tempfile.TemporaryDirectory() as directory:
        phases = (*documented.MADE, *documented.BROKEN)
        wrong = documented.run(served, Path(directory), phases=phases, examples=given.requests, seed=given.seed)
    print(wrong or "nothing is wrong", flush=True)
    return 1 if wrong else 0


def fuzz(served: Served, upstream: Upstream, given: argparse.Namespace) -> int:
    """Batch after batch, until all are sent or too much is wrong."""
    fuzzer = Fuzzer(served, upstream, given.seed)
    wrong: list[str] = []
    for first in range(given.first, given.first + given.requests, BATCH):
        came = fuzzer.run(first, min(BATCH, given.first + given.requests - first), given.at_once)
        print(*came, sep="\n", end="\n" if came else "", flush=True)
        wrong += came
        upstream.clear()
        if len(wrong) > WRONG_MAX:
            break
    late = fuzzer.afterwards()
    print(*late, report(fuzzer, wrong + late), sep="\n", flush=True)
    return 1 if wrong or late else 0


if __name__ == "__main__":
    sys.exit(main())
