"""Runs one cell of Python in isolation: starts `isolation.py`, which makes the namespaces, and reads its report."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from app.toolservers.archives import scratch
from app.toolservers.isolation import Order, Report
from app.toolservers.seccomp import MACHINES, filter_for

ISOLATION = Path(__file__).with_name("isolation.py")
NOTEBOOK_CELL = Path(__file__).with_name("notebook_cell.py").read_text()
WMEM_DEFAULT = Path("/proc/sys/net/core/wmem_default")
HOME = "/mnt/data"  # where models expect their files
MIB = 1024**2
OVERTIME_S = 15.0  # for packing files, beyond the wall time


@dataclass(frozen=True)
class Limits:
    """Bounds of one run."""

    wall_s: float = 60.0
    cpu_s: int = 30  # of each process
    memory_bytes: int = 1024**3  # of each process, and of all together
    processes: int = 64  # and threads
    open_files: int = 256
    file_bytes: int = 64 * 1024**2
    disk_bytes: int = 256 * 1024**2
    files: int = 2000
    output_bytes: int = 64 * 1024  # of stdout, and of stderr; the middle of a longer one is left out


@dataclass(frozen=True)
class Outcome:
    """How a cell ended."""

    stdout: str
    stderr: str
    exit_code: int  # negative: the signal that ended it
    timed_out: bool
    notes: tuple[str, ...]  # limits that it met


class IsolationError(Exception):
    """Code can't be run in isolation; the message is the reason."""


class IsolatedPython:
    """An interpreter that runs cells in isolation."""

    def __init__(self, python: Path, limits: Limits, directory: Path, *, allow_network: bool) -> None:
        """`python` is an interpreter with the packages that code may use; a run without namespaces has its files in `directory`."""
        self._python, self._limits, self._directory = python, limits, directory
        self.network = allow_network
        self._visible: list[str] = []
        self._filter = b""
        # The kernel lets one message more into a buffer that is not full.
        self._socket_bytes = 2 * int(WMEM_DEFAULT.read_text())
        self.isolated = True
        """Whether runs have namespaces; without them only resource limits apply."""

    async def prepare(self) -> None:
        """Find out which isolation works on this machine. Raises IsolationError."""
        question = "import json, sys; print(json.dumps([sys.prefix, sys.base_prefix]))"
        asked = await asyncio.create_subprocess_exec(
            *(self._python, "-c", question), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        )
        answer, _ = await asked.communicate()
        if asked.returncode:
            raise IsolationError(f"{self._python} is no working Python.")
        self._visible = json.loads(answer)
        machine = os.uname().machine
        if machine not in MACHINES:
            raise IsolationError(f"the system calls of {machine} are not known.")
        self._filter = filter_for(machine)
        try:
            await self._try_out()
        except IsolationError:
            if not self.network or os.getuid() == 0:  # nothing would confine root
                raise
            self.isolated = False
            await self._try_out()

    async def _try_out(self) -> None:
        code = "print(*(line.split(':')[0] for line in open('/proc/net/dev').readlines()[2:]))"
        with scratch() as files:
            outcome = await self.run(code, [], files)
        if outcome.exit_code or (outcome.stdout.split() != ["lo"] and not self.network):
            raise IsolationError(f"a trial run failed: {outcome.stderr or outcome.stdout}".strip())

    async def run(self, code: str, before: Sequence[IO[bytes]], after: IO[bytes]) -> Outcome:
        """Run a cell with the files of the archives `before`, and write the files that are left to the archive `after`.

        Raises IsolationError, UnicodeEncodeError.
        """
        async with AsyncExitStack() as stack:
            report, report_end = stack.enter_context(_pipe())
            stdin = stack.enter_context(scratch(code))
            for file in before:
                file.seek(0)
            home = HOME if self.isolated else stack.enter_context(tempfile.TemporaryDirectory(dir=self._directory))
            order = self._order(home, [file.fileno() for file in before], after.fileno(), report_end.fileno())
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-ISB", ISOLATION, json.dumps(order)),
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={},
                pass_fds=(*order["files_in"], order["files_out"], order["report"]),
                start_new_session=True,
            )
            report_end.close()
            stack.push_async_callback(_kill, process)
            assert process.stdout
            assert process.stderr
            limit = self._limits.output_bytes
            try:
                async with asyncio.timeout(self._limits.wall_s + OVERTIME_S):
                    stdout, stderr = await asyncio.gather(_text(process.stdout, limit), _text(process.stderr, limit))
                    await process.wait()
            except TimeoutError:
                raise IsolationError("it did not end in time.") from None
            line = report.readline()
            done: Report = json.loads(line) if line else {"failure": stderr or "it died."}
            if "failure" in done:
                raise IsolationError(done["failure"])
            timed_out = done["stopped"] == "time" or done["exit_code"] == -signal.SIGXCPU
            return Outcome(stdout, stderr, done["exit_code"], timed_out, (*_notes(done, self._limits),))

    def _order(self, home: str, files_in: list[int], files_out: int, report: int) -> Order:
        limits = self._limits
        return {
            "command": [str(self._python), "-B", "-s", "-u", "-X", "utf8", "-c", NOTEBOOK_CELL],
            "filter": self._filter.hex(),
            "env": {
                "PATH": f"{self._python.parent}:/usr/local/bin:/usr/bin:/bin",
                "HOME": "/tmp" if self.isolated else home,  # noqa: S108 in a file system of its own
                "LANG": "C.UTF-8",
                "OMP_NUM_THREADS": "2",  # a thread for each core of a large machine would exceed `processes`
            },
            "visible": self._visible,
            "namespaces": self.isolated,
            "network": self.network,
            "home": home,
            "files_in": files_in,
            "files_out": files_out,
            "report": report,
            "wall_s": limits.wall_s,
            "cpu_s": limits.cpu_s,
            "memory_bytes": limits.memory_bytes,
            "socket_bytes": self._socket_bytes,
            "processes": limits.processes,
            "open_files": limits.open_files,
            "file_bytes": limits.file_bytes,
            "disk_bytes": limits.disk_bytes,
            "files": limits.files,
        }


async def _kill(process: asyncio.subprocess.Process) -> None:
    """Kill `isolation.py` unless it has ended; the kernel kills the processes in its namespaces."""
    if process.returncode is None:
        process.kill()
        await process.wait()


async def _text(stream: asyncio.StreamReader, limit: int) -> str:
    """A stream to its end; of one that is longer than `limit` bytes the beginning and the end."""
    head, tail, size = bytearray(), bytearray(), 0
    while chunk := await stream.read(64 * 1024):
        size += len(chunk)
        tail += chunk
        room = limit // 2 - len(head)
        head += tail[:room]
        del tail[:room], tail[: max(len(tail) - limit // 2, 0)]
    cut = size - len(head) - len(tail)
    gap = f"\n[… {cut} bytes are left out …]\n" if cut else ""
    return head.decode(errors="replace") + gap + tail.decode(errors="replace")


def _notes(report: Report, limits: Limits) -> Iterator[str]:
    if report["stopped"] == "time":
        yield f"stopped after {limits.wall_s:g} s"
    if report["stopped"] == "memory":
        yield f"stopped: more than {limits.memory_bytes // MIB} MiB of memory"
    if report["exit_code"] == -signal.SIGXCPU:
        yield f"stopped: more than {limits.cpu_s} s of CPU time"
    if report["left_out"]:
        yield f"{report['left_out']} files are not kept: too many, too large, or badly named"


@contextmanager
def _pipe() -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Both ends of a pipe."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as reader, os.fdopen(writing, "wb") as writer:
        yield reader, writer
