"""`python -m tests.engines`: every feature on every engine; prints the table and writes docs/engines.md. Fails where Reprise fails."""

import argparse
import re
import sys
import tempfile
import traceback
from dataclasses import dataclass

import openai

from tests.engines import features
from tests.engines.features import TURNS_MAX, Differs, Feature, Setup
from tests.engines.servers import Engine, Installed
from tests.servers import ROOT, Served
from tests.toolserver import Toolserver

HOME = ROOT / ".engines"
PAGE = ROOT / "docs" / "engines.md"
REASON_CHARS_MAX = 100
CLIENT_TIMEOUT_S = 120
ENGINES = {"llama-server": Installed.llama_server, "transformers": Installed.transformers_serve}
INTRODUCTION = """\
# Engines

Made by `make engines`: Reprise in front of real engines that serve a tiny model with random weights, asked through the official client.
Nothing is configured but `OPENAI_BASE_URL`.

- **yes**: it works, and what is streamed, answered and stored agrees.
- **no**: the engine takes the request, and does something else.
- **refused**: the engine refuses it, and the client gets a 4xx with the engine's words.
- **fails**: a fault of Reprise's own.

What a preset or a `dialect` in the [catalog](catalog.md) lacks is refused before the engine is asked.
"""


@dataclass(frozen=True)
class Outcome:
    """What has become of a feature on an engine."""

    text: str
    fault: str = ""
    """Of ours: the traceback."""


Columns = dict[str, dict[str, Outcome]]
"""Engine → feature → outcome."""


def main() -> None:
    """Run, print, write the page. What no longer works leaves the page as it is. That, and what fails, makes the exit status 1."""
    parser = argparse.ArgumentParser(description="Runs the features on real engines.")
    parser.add_argument("--only", metavar="WORDS", default="", help="features whose names have these; writes no page")
    parser.add_argument("--engine", choices=list(ENGINES), help="only this one; writes no page")
    options = parser.parse_args()
    chosen = {label: run for label, run in features.ALL.items() if options.only in label}
    columns: Columns = {}
    for name in [options.engine] if options.engine else ENGINES:
        with ENGINES[name](Installed(HOME)) as engine:
            columns[f"{engine.name} {engine.version}"] = _column(engine, chosen)
    table = _table(columns)
    print(f"\n{table}")
    lost = _lost(columns)
    for line in lost:
        print(f"No longer works: {line}")
    if not lost and not options.only and not options.engine:
        PAGE.write_text(f"{INTRODUCTION}\n{table}")
    sys.exit(bool(lost) or any(outcome.fault for column in columns.values() for outcome in column.values()))


def _column(engine: Engine, chosen: dict[str, Feature]) -> dict[str, Outcome]:
    with tempfile.TemporaryDirectory(prefix="engines-", ignore_cleanup_errors=True) as data, Toolserver() as tools:
        env = {
            "OPENAI_BASE_URL": engine.base_url,
            "REPRISE_DATA_DIR": data,
            "REPRISE_DURABLE": "false",
            "REPRISE_OUTBOUND_ALLOW": "127.0.0.1/32",
            "REPRISE_TURNS_MAX": str(TURNS_MAX),
        }
        with Served(env) as server, server.client(timeout=CLIENT_TIMEOUT_S) as client:
            setup = Setup(engine, server, client, tools.url("mcp", "engines", tools="echo"))
            return {label: _run(setup, label, run) for label, run in chosen.items()}


def _run(setup: Setup, label: str, run: Feature) -> Outcome:
    outcome = _outcome(setup, run)
    print(f"{setup.engine.name}: {label}: {outcome.text}", flush=True)
    if outcome.fault:
        print(f"{outcome.fault}\nThe engine's log: {setup.engine.log}", file=sys.stderr, flush=True)
    return outcome


def _lost(columns: Columns) -> list[str]:
    """What works by the page and does not any more."""
    lines = PAGE.read_text().splitlines() if PAGE.exists() else []
    head, *rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")] or [[]]
    worked = {
        (engine.split()[0], row[0])
        for row in rows
        for engine, cell in zip(head[1:], row[1:], strict=True)
        if cell == "yes"
    }
    return [
        f"{engine}: {label}: {outcome.text}"
        for engine, column in columns.items()
        for label, outcome in column.items()
        if outcome.text != "yes" and (engine.split()[0], label) in worked
    ]


def _outcome(setup: Setup, run: Feature) -> Outcome:
    try:
        run(setup)
    except Differs as differs:
        return Outcome(f"no: {differs}")
    except openai.APIStatusError as error:
        if error.status_code < 500:
            return Outcome(f"refused: {_reason(error)}")
        return Outcome("**fails**", traceback.format_exc())
    except Exception:  # noqa: BLE001 - whatever it is, it is a line of the table
        return Outcome("**fails**", traceback.format_exc())
    return Outcome("yes")


def _reason(error: openai.APIStatusError) -> str:
    """The message, as it fits into a cell."""
    body = error.body if isinstance(error.body, dict) else {}
    message = re.sub(r"\s+", " ", str(body.get("message") or error)).replace("|", "\\|")
    return message if len(message) <= REASON_CHARS_MAX else f"{message[:REASON_CHARS_MAX]}…"


def _table(columns: Columns) -> str:
    labels = next(iter(columns.values()))
    rows = [[label, *(column[label].text for column in columns.values())] for label in labels]
    head = [["feature", *columns], ["---"] * (len(columns) + 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in head + rows)


if __name__ == "__main__":
    main()
