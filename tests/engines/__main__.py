"""`python -m tests.engines`: every feature on every engine; prints the table and writes docs/engines.md. Fails where Reprise fails."""

import argparse
import re
import sys
import tempfile
import traceback
from dataclasses import dataclass

import openai

from tests.engines import features
from tests.engines.features import Differs, Feature, Setup
from tests.engines.servers import Engine, Installed
from tests.servers import ROOT, Served

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

What a preset or a `dialect` in the [catalog](../README.md#catalog) lacks is refused before the engine is asked.
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
    """Run, print, write the page. What fails, or no longer works, leaves the page as it is, and the exit status is 1."""
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
    bad = _worse(columns)
    for line in bad:
        print(line)
    if not bad and not options.only and not options.engine:
        PAGE.write_text(f"{INTRODUCTION}\n{table}")
    sys.exit(bool(bad))


def _column(engine: Engine, chosen: dict[str, Feature]) -> dict[str, Outcome]:
    with (
        tempfile.TemporaryDirectory(prefix="engines-", ignore_cleanup_errors=True) as data,
        Served({"OPENAI_BASE_URL": engine.base_url, "REPRISE_DATA_DIR": data, "REPRISE_DURABLE": "false"}) as server,
        server.client(timeout=CLIENT_TIMEOUT_S) as client,
    ):
        setup = Setup(engine, server, client)
        return {label: _run(setup, label, run) for label, run in chosen.items()}


def _run(setup: Setup, label: str, run: Feature) -> Outcome:
    outcome = _outcome(setup, run)
    print(f"{setup.engine.name}: {label}: {outcome.text}", flush=True)
    if outcome.fault:
        print(f"{outcome.fault}\nThe engine's log: {setup.engine.log}", file=sys.stderr, flush=True)
    return outcome


def _worse(columns: Columns) -> list[str]:
    """What fails, and what works by the page and does not any more."""
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
        if outcome.fault or (outcome.text != "yes" and (engine.split()[0], label) in worked)
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
