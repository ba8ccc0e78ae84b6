"""Every package that `app` imports is a dependency of ours, not only of another one."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[2]


def imported(source: str) -> Iterator[str]:
    """The top-level modules that a file imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


def sources() -> list[str]:
    """Every file of the server."""
    return [path.read_text() for path in (ROOT / "app").rglob("*.py")]


def dependencies() -> list[str]:
    """The declared requirements."""
    declared: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return declared


def private(source: str) -> Iterator[str]:
    """The top-level modules that a file imports private modules or names of."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = [*node.module.split("."), *(alias.name for alias in node.names)]
            if any(part.startswith("_") and not part.startswith("__") for part in parts):
                yield parts[0]


def test_what_is_imported_is_declared():
    modules = {module for source in sources() for module in imported(source)}
    foreign = modules - set(sys.stdlib_module_names) - {"app"}
    distribution_of = packages_distributions()
    names = {re.split(r"[\[<>= ;]", line)[0] for line in dependencies()}
    providers = [[one.lower().replace("_", "-") for one in distribution_of[module]] for module in foreign]
    needed = {next((one for one in found if one in names), found[0]) for found in providers}
    assert needed <= names
    assert names - needed == {"httptools"}, "declared, and not imported"  # uvicorn imports it if it is there


def test_private_names_are_those_of_one_minor_version():
    """An update of what they belong to is tested before it is installed."""
    used = {module for source in sources() for module in private(source)} | {"uvicorn"}  # its protocol is extended
    assert used == {"openai", "uvicorn"}
    for line in dependencies():
        if re.split(r"[\[<>= ;]", line)[0] in used:
            bounds = re.search(r">=(\d+)\.(\d+),<(\d+)\.(\d+)$", line)
            assert bounds, line
            major, minor, next_major, next_minor = map(int, bounds.groups())
            assert (next_major, next_minor) == (major, minor + 1), line
