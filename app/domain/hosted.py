"""Hosted tools: what the hosted API runs itself, and here a tool server of the operator's catalog.

To the model each is a plain function. What it calls it with is mapped to the arguments of the tool behind it, and the tool's
answer to the results of the item. The mapping is the operator's; without one, names that mean the same are looked for.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
from msgspec import Struct

from app.errors import UnsupportedParameter
from app.wire.decoding import Json, nests_too_deeply
from app.wire.hosted_tools import declared_keys
from app.wire.tools import FunctionTool, HostedTool

Kind = Literal["web_search", "file_search", "code_interpreter", "image_generation", "shell"]

KINDS: Mapping[str, Kind] = {
    "web_search": "web_search",
    "web_search_2025_08_26": "web_search",
    "web_search_preview": "web_search",
    "web_search_preview_2025_03_11": "web_search",
    "file_search": "file_search",
    "code_interpreter": "code_interpreter",
    "image_generation": "image_generation",
    "shell": "shell",
}
"""Declared type → kind: one tool has several names."""


def kind_of(tool: HostedTool) -> Kind | None:
    """What a declared tool is; None for what only the client can run, as a shell is unless it asks for a container."""
    kind = KINDS.get(tool.type)
    return None if kind == "shell" and not container_asked(tool.fields) else kind


def container_asked(declaration: Json) -> bool:
    """Whether a shell is to run in a container."""
    environment = declaration.get("environment")
    return isinstance(environment, dict) and str(environment.get("type")).startswith("container")


def container_named(declaration: Json) -> str:
    """The container that a declaration names; empty for a new one."""
    environment = declaration.get("environment")
    named = environment.get("container_id") if isinstance(environment, dict) else declaration.get("container")
    return named if isinstance(named, str) else ""


def names_data(declaration: Json) -> bool:
    """Whether a declaration names what the answer is to come from: vector stores, files, or a container that there is."""
    holders = (declaration, *(declaration.get(key) for key in ("container", "environment", "input_image_mask")))
    return bool(container_named(declaration)) or any(
        isinstance(one, dict) and any(one.get(key) for key in ("vector_store_ids", "file_ids", "file_id"))
        for one in holders
    )


def missing_server(type_: str, param: str) -> UnsupportedParameter:
    """The 400 for a hosted tool without a tool server; it names what the operator has to configure."""
    kind = KINDS.get(type_, type_)
    return UnsupportedParameter(
        f"No server is configured for tools of type '{type_}': the catalog has no [hosted.{kind}].", param=param
    )


def _function(name: str, description: str, **parameters: Json) -> FunctionTool:
    schema = {"type": "object", "properties": parameters, "required": [next(iter(parameters))]}
    return FunctionTool(name=name, description=description, parameters=schema)


SEEN: Mapping[Kind, FunctionTool] = {
    "web_search": _function(
        "web_search",
        "Search the web. Cite what you use as a Markdown link: [title](url).",
        query={"type": "string", "description": "What to search for."},
    ),
    "file_search": _function(
        "file_search",
        "Search the user's files. Cite what you use by its file name, as in 【name.pdf】.",
        queries={
            "type": "array",
            "items": {"type": "string"},
            "description": "What to search for, in several wordings.",
        },
    ),
    "code_interpreter": _function(
        "code_interpreter",
        "Run Python code and get what it prints.",
        code={"type": "string", "description": "The whole program."},
    ),
    "image_generation": _function(
        "image_generation",
        "Make an image from a description.",
        prompt={"type": "string", "description": "What the image shows."},
    ),
    "shell": _function(
        "shell",
        "Run shell commands in a container and get what they print.",
        commands={"type": "array", "items": {"type": "string"}, "description": "The commands, one after the other."},
    ),
}
"""The function that the model sees."""


def owner_of(kind: Kind) -> str:
    """Whose a hosted tool is, beside the labels of MCP servers and the namespaces of clients; neither holds a space."""
    return f"hosted {kind}"


class HostedRoute(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[hosted.KIND]` of the catalog: the tool behind a hosted type, and how what goes in and comes out is mapped.

    A string in `arguments` that begins with `$` stands for a value: what the model gave (`$query`, `$queries`, `$code`,
    `$prompt`, `$commands`), `$tenant`, `$container`, or any key of the tool's declaration (`$vector_store_ids`, `$max_num_results`, ...);
    an argument whose value is absent is left out. `results` is where the list of results lies in the structured answer
    (`web.results`), `fields` names their keys (`url = "link"`).
    """

    server: str
    tool: str
    arguments: dict[str, Any] = {}
    results: str = ""
    fields: dict[str, str] = {}

    def drops(self, declaration: Json) -> str | None:
        """A key of a declaration that restricts what may be found, and that the tool would never hear of."""
        return next(
            (key for key in RESTRICTING if declaration.get(key) and f"${key}" not in self.arguments.values()), None
        )


RESTRICTING = ("filters",)
"""Keys of a declaration that a client may rely on to keep things out of the results."""


def placeholders(kind: Kind) -> frozenset[str]:
    """The names that `arguments` may use, without their `$`."""
    given = {*(SEEN[kind].parameters or {})["properties"], "tenant", "container"}
    given |= {"query", "queries"} if kind in {"web_search", "file_search"} else set()
    return frozenset(given | {key for type_, of in KINDS.items() if of == kind for key in declared_keys(type_)})


class Asked(Struct, frozen=True):
    """What a hosted call is made from."""

    given: Json
    """The model's arguments."""
    declaration: Json
    tenant: str
    container: str


def arguments_of(kind: Kind, route: HostedRoute, asked: Asked) -> Json:
    """The arguments of the tool behind a hosted type."""
    # The model may say what it is asked for, and nothing else: neither whose files are searched nor where code runs.
    parameters = (SEEN[kind].parameters or {})["properties"]
    said = {name: value for name, value in asked.given.items() if name in parameters}
    if kind == "file_search":
        said |= {"query": " ".join(queries_of(asked.given)), "queries": queries_of(asked.given)}
    if kind == "web_search":
        said["queries"] = [asked.given.get("query")]
    values = {**said, **asked.declaration, "tenant": asked.tenant, "container": asked.container}
    template = route.arguments or {name: f"${name}" for name in parameters}
    made = {}
    for name, given in template.items():
        value = values.get(given[1:]) if isinstance(given, str) and given.startswith("$") else given
        if value is not None:
            made[name] = value
    return made


def queries_of(given: Json) -> list[str]:
    """What a file search looks for; models give one string where a list is asked."""
    queries = given.get("queries", given.get("query"))
    return [str(query) for query in queries] if isinstance(queries, list) else [str(queries)] if queries else []


_FIELDS: Mapping[Kind, Mapping[str, Sequence[str]]] = {
    "web_search": {
        "url": ("url", "link", "href"),
        "title": ("title", "name"),
        "text": ("text", "snippet", "content", "description", "body"),
    },
    "file_search": {
        "file_id": ("file_id", "id", "document_id"),
        "filename": ("filename", "file_name", "name", "title", "path"),
        "score": ("score", "similarity", "rank"),
        "text": ("text", "content", "snippet", "chunk"),
        "attributes": ("attributes", "metadata"),
    },
}
"""Kind → a result's key → the names that tools give it."""

_SHELL_KEYS = ("stdout", "stderr", "timed_out", "exit_code")


def result_keys(kind: Kind) -> Sequence[str]:
    """The keys of a result that `fields` may rename."""
    return _SHELL_KEYS if kind == "shell" else tuple(_FIELDS.get(kind, ()))


def results_of(kind: Kind, route: HostedRoute, structured: Any, text: str) -> list[Json]:
    """The results of a search: those of the structured answer, or of a text that is JSON; else the text is the one result."""
    found = _listed(structured if structured is not None else _json(text), route.results)
    if found is None:
        return [{"text": text}] if text else []
    names = _FIELDS[kind]
    return [_renamed(result, names, route.fields) for result in found]


def shell_outputs(route: HostedRoute, structured: Any, text: str) -> list[Json]:
    """What a shell tool says of each command: its structured answer, or a list of them; else the text is what was printed."""
    found = structured if structured is not None else _json(text)
    for name in route.results.split(".") if route.results else ():
        found = found.get(name) if isinstance(found, dict) else None
    ran = [one for one in (found if isinstance(found, list) else [found]) if isinstance(one, dict)]
    return [_shell_output(one, route.fields) for one in ran] or [_shell_output({"stdout": text}, {})]


def _shell_output(ran: Json, fields: Mapping[str, str]) -> Json:
    timed_out, exit_code = (
        ran.get(fields.get("timed_out", "timed_out")),
        ran.get(fields.get("exit_code", "exit_code"), 0),
    )
    return {
        "stdout": str(ran.get(fields.get("stdout", "stdout")) or ""),
        "stderr": str(ran.get(fields.get("stderr", "stderr")) or ""),
        "outcome": {"type": "timeout"}
        if timed_out
        else {"type": "exit", "exit_code": exit_code if isinstance(exit_code, int) else 1},
    }


def _json(text: str) -> Any:
    try:
        return None if nests_too_deeply(text.encode()) else msgspec.json.decode(text)
    except msgspec.DecodeError:
        return None


def _listed(found: Any, path: str) -> list[Json] | None:
    """The list of objects at a dotted path; without a path the first that there is."""
    for name in path.split(".") if path else ():
        found = found.get(name) if isinstance(found, dict) else None
    if isinstance(found, dict) and not path:
        found = next((value for value in found.values() if isinstance(value, list)), None)
    if not isinstance(found, list):
        return None
    return [one if isinstance(one, dict) else {"text": str(one)} for one in found]


def _renamed(result: Json, names: Mapping[str, Sequence[str]], fields: Mapping[str, str]) -> Json:
    made = {}
    for name, others in names.items():
        keys = [fields[name]] if name in fields else others
        value = next((result[key] for key in keys if result.get(key) is not None), None)
        if value is not None:
            made[name] = value
    return made
