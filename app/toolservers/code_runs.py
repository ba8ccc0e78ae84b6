"""Runs of code in containers: at most so many at once, and one at a time in each container."""

import asyncio
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from app.toolservers.archives import ChangedFile, archive_of, changes, new_archive, scratch
from app.toolservers.containers import Containers, ContainersFull
from app.toolservers.isolated_python import IsolatedPython


@dataclass(frozen=True)
class CodeRun:
    """How a run ended."""

    stdout: str
    stderr: str  # with a line for each limit that it met
    exit_code: int
    timed_out: bool
    files: list[ChangedFile]


class CodeRunner:
    """Runs cells in containers."""

    def __init__(self, python: IsolatedPython, containers: Containers, *, runs_max: int) -> None:
        """`runs_max` runs at once; others wait."""
        self.python, self.containers = python, containers
        self._turns = asyncio.Semaphore(runs_max)

    async def run(self, code: str, container: str, files: Mapping[str, bytes]) -> CodeRun:
        """Run one cell. Raises IsolationError, ContainersFull, UnicodeEncodeError.

        `container` is a valid id, or empty for a run whose files are discarded; the names of `files` are valid.
        """
        async with AsyncExitStack() as stack:
            archive = await stack.enter_async_context(self.containers.use(container)) if container else None
            await stack.enter_async_context(self._turns)
            before = [stack.enter_context(archive_of(files))]
            if archive and archive.exists():
                before.insert(0, stack.enter_context(archive.open("rb")))
            after = stack.enter_context(new_archive(self.containers.directory) if archive else scratch())
            outcome = await self.python.run(code, before, after)
            changed = await asyncio.to_thread(changes, before, after)
            notes = [*outcome.notes]
            if archive:
                try:
                    await asyncio.to_thread(self.containers.replace, archive, Path(after.name))
                except ContainersFull as error:
                    notes.append(f"the files are as they were before: {error}")
        stderr = outcome.stderr + "".join(f"[sandbox: {note}]\n" for note in notes)
        return CodeRun(outcome.stdout, stderr, outcome.exit_code, outcome.timed_out, changed)
