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


def test_what_is_imported_is_declared():
    modules = {module for path in (ROOT / "app").rglob("*.py") for module in imported(path.read_text())}
    foreign = modules - set(sys.stdlib_module_names) - {"app"}
    distribution_of = packages_distributions()
    needed = {distribution_of[module][0].lower().replace("_", "-") for module in foreign}
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[\[<>= ;]", line)[0] for line in declared}
    assert needed <= names
    assert names - needed == {"httptools"}, "declared, and not imported"  # uvicorn imports it if it is there
