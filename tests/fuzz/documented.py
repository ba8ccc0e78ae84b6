"""Requests that schemathesis makes from the OpenAPI document, valid and not, one by one and in chains.

No reply may be a 5xx or what the document does not say, and what the document forbids must be refused.
"""

import json
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from app.api.reference import DOCUMENT
from tests.servers import Served, reprise

MADE = ("examples", "fuzzing", "stateful")
BROKEN = ("coverage",)
"""Each key of each schema is broken on its own: of the operations with items that is tens of thousands of requests."""

UNCHECKED = (
    "positive_data_acceptance",  # what a schema allows may still be refused: an id that is unknown, a call without an output
)
LEFT_OUT = frozenset({"admin.keys.revoke", "admin.keys.rotate"})
"""Operations that would end the key of the requests themselves."""

WITH_ITEMS = frozenset(
    {
        "agents.create",
        "agents.update",
        "chat.completions.create",
        "conversations.create",
        "conversations.items.append",
        "responses.compact",
        "responses.create",
        "responses.input_tokens.count",
    }
)
"""Operations whose bodies have items or tools."""

SCOPES = ("responses.read", "responses.write", "admin")


def run(
    served: Served,
    directory: Path,
    *,
    phases: Sequence[str],
    examples: int,
    seed: int,
    without: Collection[str] = (),
) -> str:
    """What schemathesis found to be wrong, with commands that repeat it; empty if nothing is."""
    path = directory / "openapi.json"
    path.write_text(json.dumps(_readable(json.loads(DOCUMENT.read_bytes()))))
    scopes = [f"--scope={scope}" for scope in SCOPES]
    key = reprise(served.env, "keys", "create", "--tenant", "fuzzed", *scopes).stdout.strip()
    options = {
        "url": served.url.removesuffix("/v1"),
        "header": f"Authorization: Bearer {key}",
        "phases": ",".join(phases),
        "max-examples": examples,
        "seed": seed,
        "exclude-checks": ",".join(UNCHECKED),
        "exclude-operation-id-regex": f"^({'|'.join(LEFT_OUT.union(without))})$",
        "generation-database": "none",
        "warnings": "off",
    }
    given = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run", str(path)]
    ran = subprocess.run(
        [*command, *given, "--no-color", "--continue-on-failure"],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Test cases:" in ran.stdout, ran.stdout + ran.stderr
    return ran.stdout if ran.returncode else ""


def _readable(value: Any) -> Any:
    """The document as schemathesis reads streams: it takes a schema to be that of the event around the JSON."""
    if isinstance(value, dict):
        event = {"type": "object", "required": ["data"]}
        return {key: {"schema": event} if key == "text/event-stream" else _readable(one) for key, one in value.items()}
    return [_readable(one) for one in value] if isinstance(value, list) else value
