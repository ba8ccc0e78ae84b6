"""Containers: the files that a later call with the same id finds again, as tar archives in a directory.

Several processes may share the directory. `ID.lock` is locked (`flock`) while a run uses the container; its modification time is that of
the last use. `ID.tar` has the files, and is replaced as a whole. The lock `counting` is held by what creates, grows or removes a
container. A container's lock is tried, never waited for, so the two can't deadlock.
"""

import asyncio
import fcntl
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import IO, NoReturn

from app.toolservers.archives import NEW

MIB = 1024**2
LOCK_POLL_S = 0.05
SWEEP_S = 30.0


class ContainersFull(Exception):
    """The limit of containers, or of their bytes, is reached, and all of them are in use."""


class Containers:
    """The containers of a directory. The least recently used ones are removed where others need their room."""

    def __init__(self, directory: Path, *, idle_s: float, count_max: int, bytes_max: int) -> None:
        """A container is removed `idle_s` seconds after its last use; `bytes_max` is the size of all archives together."""
        self.directory = directory
        self._idle_s, self._count_max, self._bytes_max = idle_s, count_max, bytes_max

    @asynccontextmanager
    async def use(self, container: str) -> AsyncIterator[Path]:
        """The archive of a container, which may not exist yet, locked against other uses in any process. Raises ContainersFull."""
        lock = self.directory / f"{container}.lock"
        while True:
            with await asyncio.to_thread(self._open_lock, lock) as file:
                if try_lock(file, lock):
                    os.utime(file.fileno())
                    yield lock.with_suffix(".tar")
                    os.utime(file.fileno())
                    return
            await asyncio.sleep(LOCK_POLL_S)

    def replace(self, archive: Path, by: Path) -> None:
        """Make the file `by` the archive of a container in use. Raises ContainersFull."""
        with self._counting():
            while by.stat().st_size + self._bytes_without(archive) > self._bytes_max:
                self._remove_oldest(f"containers have more than {self._bytes_max // MIB} MiB, and all are in use.")
            by.replace(archive)

    def sweep(self) -> None:
        """Remove the containers that are unused for too long."""
        with self._counting():
            for lock in self.directory.glob("*.lock"):
                remove_unused(lock, idle_s=self._idle_s)
        for left in self.directory.glob(f"*{NEW}"):  # of a server that was killed
            with suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > self._idle_s:
                    left.unlink()

    async def keep_swept(self) -> NoReturn:
        """Sweep every SWEEP_S seconds."""
        while True:
            await asyncio.to_thread(self.sweep)
            await asyncio.sleep(SWEEP_S)

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """Hold the lock of the directory: counts and sizes change in one process at a time."""
        with (self.directory / "counting").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _open_lock(self, lock: Path) -> IO[str]:
        """The lock file of a container, created if it does not exist. Raises ContainersFull."""
        with suppress(FileNotFoundError):
            return lock.open("r+")
        with self._counting():
            while not lock.exists() and len([*self.directory.glob("*.lock")]) >= self._count_max:
                self._remove_oldest(f"there are {self._count_max} containers, and all are in use.")
            return lock.open("a")

    def _bytes_without(self, archive: Path) -> int:
        return sum(path.stat().st_size for path in self.directory.glob("*.tar") if path != archive)

    def _remove_oldest(self, all_in_use: str) -> None:
        """Remove the least recently used container. Raises ContainersFull, with the message `all_in_use`."""
        locks = [(lock.stat().st_mtime, lock) for lock in self.directory.glob("*.lock")]
        if not any(remove_unused(lock) for _, lock in sorted(locks)):
            raise ContainersFull(all_in_use)


def remove_unused(lock: Path, *, idle_s: float = 0.0) -> bool:
    """Remove a container, unless it is in use or its last use is less than `idle_s` seconds ago."""
    with lock.open("a") as file:
        if not try_lock(file, lock) or time.time() - os.fstat(file.fileno()).st_mtime < idle_s:
            return False
        lock.with_suffix(".tar").unlink(missing_ok=True)
        lock.unlink()
        return True


def try_lock(file: IO[str], path: Path) -> bool:
    """Lock the file; False if another process holds the lock, or has removed the file from its path."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(file.fileno()).st_ino == path.stat().st_ino
    except (BlockingIOError, FileNotFoundError):
        return False
