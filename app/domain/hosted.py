"""Hosted tools: what the hosted API runs itself, and here a tool server of the operator's catalog.

To the model each is a plain function. The catalog's route maps the arguments of its calls to those of a server's tool, and the
tool's answer to the results of the item. `app/domain/tools/` has a module for each.
"""

from collections.abc import Iterable
from typing import Any

import msgspec
from msgspec import Struct

from app.domain.tools.answers import Answer
from app.wire.decoding import Json, nests_too_deeply

Kind = str
"""A hosted tool by its name in the catalog, `[hosted.KIND]`: one tool may be declared by several types."""


def owner_of(kind: Kind) -> str:
    """The owner of a hosted tool, beside the labels of MCP servers and the namespaces of clients; neither holds a space."""
    return f"hosted {kind}"


def container_named(declaration: Json) -> str:
    """The container that a declaration names; empty for a new one."""
    environment = declaration.get("environment")
    named = environment.get("container_id") if isinstance(environment, dict) else declaration.get("container")
    return named if isinstance(named, str) else ""


def names_data(declaration: Json) -> bool:
    """Whether a declaration names what the answer is to come from: vector stores, files, or a container that exists."""
    holders = (declaration, *(declaration.get(key) for key in ("container", "environment", "input_image_mask")))
    return bool(container_named(declaration)) or any(
        isinstance(one, dict) and any(one.get(key) for key in ("vector_store_ids", "file_ids", "file_id"))
        for one in holders
    )


RESTRICTING = ("filters",)
"""Keys of a declaration that a client may rely on to keep things out of the results."""


class HostedRoute(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[hosted.KIND]` of the catalog: the tool of a tool server, and how arguments and results are mapped.

    A string in `arguments` that begins with `$` stands for a value: what the model gave (`$query`, `$queries`, `$code`,
    `$prompt`, `$commands`), `$tenant`, `$container`, or any key of the tool's declaration (`$vector_store_ids`, `$max_num_results`, ...);
    an argument whose value is absent is left out. `results` is where the list of results lies in the structured answer
    (`web.results`), `fields` names their keys (`url = "link"`). Without a mapping, names that mean the same are looked for.
    """

    server: str
    tool: str
    arguments: dict[str, Any] = {}
    results: str = ""
    fields: dict[str, str] = {}

    def drops(self, declaration: Json) -> str | None:
        """A key of a declaration that restricts what may be found, and that the tool does not get."""
        return next(
            (key for key in RESTRICTING if declaration.get(key) and f"${key}" not in self.arguments.values()), None
        )

    def fill(self, values: Json, parameters: Iterable[str]) -> Json:
        """The arguments of the tool, from the values of the placeholders; without a mapping these parameters."""
        made = {}
        for name, given in (self.arguments or {name: f"${name}" for name in parameters}).items():
            value = values.get(given[1:]) if isinstance(given, str) and given.startswith("$") else given
            if value is not None:
                made[name] = value
        return made

    def find(self, answer: Answer) -> Any:
        """What lies at `results` in a structured answer, or in a text that is JSON; None if there is nothing."""
        found = answer.structured if answer.structured is not None else _json(answer.text)
        for name in self.results.split(".") if self.results else ():
            found = found.get(name) if isinstance(found, dict) else None
        return found


def _json(text: str) -> Any:
    try:
        return None if nests_too_deeply(text.encode()) else msgspec.json.decode(text)
    except msgspec.DecodeError:
        return None
