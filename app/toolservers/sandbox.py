"""A tool server behind `code_interpreter`: runs Python, without a network and within limits.

    python -m app.toolservers.sandbox [--http HOST:PORT] [--python /opt/science/bin/python]

What the isolation is worth: each run gets Linux namespaces of its own (`isolation.py` says what they hide), so code cannot reach the
network, see the host's files or processes, or leave a process behind; CPU and wall time, memory, processes, files and output are
bounded. That is what a container gives, not what a virtual machine gives: the kernel is shared, though system calls that code
does not need are refused (`seccomp.py`). For code of strangers run this server on a machine, or in a virtual machine, that holds nothing of value.

Where namespaces can't be had (a Docker container with the default profile is such a place) the server does not start, unless
`--allow-network` says that code may reach the network: then it runs with namespaces where they can be had, else with resource
limits alone, and reads whatever this server's user can read.

What a container remembers between calls are its files, kept as one tar archive in `--directory`, for `--idle` seconds after its
last use, at most `--containers` of them and `--all-disk` MiB together: the one that was not used for the longest time goes
first, and never one in use; several servers may share a directory. Who knows a container's id can use it: ids must be unguessable. Interpreters do not survive a call, variables are gone.
"""

import asyncio
import base64
import binascii
import fcntl
import hashlib
import io
import json
import mimetypes
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any, NoReturn

import click
from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import CallToolResult, ImageContent, TextContent, ToolAnnotations
from pydantic import BaseModel, Field

from app.toolservers.address import http_option
from app.toolservers.isolation import Order, Report
from app.toolservers.seccomp import MACHINES, filter_for
from app.toolservers.serving import serve

ISOLATION = Path(__file__).with_name("isolation.py")
NOTEBOOK_CELL = Path(__file__).with_name("notebook_cell.py").read_text()
WMEM_DEFAULT = Path("/proc/sys/net/core/wmem_default")
HOME = "/mnt/data"  # where models expect their files
CONTAINER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{15,127}")
IMAGES = ("image/png", "image/jpeg", "image/gif", "image/webp")
MIB = 1024**2
CODE_BYTES_MAX = MIB
IMAGE_BYTES_MAX = 5 * 1024 * 1024
IMAGES_MAX = 10
TEXT_BYTES_MAX = 16 * 1024
FILES_SHOWN_MAX = 50
OVERTIME_S = 15.0  # for packing files, beyond the wall time
LOCK_POLL_S = 0.05
SWEEP_S = 30.0


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
    output_bytes: int = 64 * 1024  # kept of stdout, and of stderr


class GivenFile(BaseModel):
    """A file that the code finds in its working directory."""

    name: str = Field(description="Path relative to the working directory.")
    text: str | None = Field(None, description="Its content as text; either this or data.")
    data: str | None = Field(None, description="Its content in base64.")


class MadeFile(BaseModel):
    """A file that the run has made or changed."""

    name: str
    size: int = Field(description="Bytes.")
    mime_type: str
    text: str | None = Field(None, description="The content of a small text file.")


class Run(BaseModel):
    """How a run went."""

    stdout: str
    stderr: str
    exit_code: int = Field(description="0 is success; negative is the signal that ended it.")
    timed_out: bool
    files: list[MadeFile] = Field(description="Files that the run has made or changed.")


class NoRoom(Exception):
    """There are too many containers, or too large ones, and all are in use."""


class IsolationFailed(Exception):
    """Code could not be run in a jail; the message says why."""


# -- the sandbox ------------------------------------------------------------------------------------------------------------


class Sandbox:
    """Runs code in jails; containers are archives in `directory`, which several processes may share."""

    def __init__(
        self,
        directory: Path,
        python: Path,
        limits: Limits,
        *,
        allow_network: bool = False,
        idle_s: float = 1200.0,
        runs_max: int = 4,
        containers_max: int = 1000,
        all_disk_bytes: int = 10 * 1024**3,
    ) -> None:
        """`python` is an interpreter, with whatever packages the code may use."""
        self._containers_max, self._all_disk_bytes = containers_max, all_disk_bytes
        self._directory, self._python, self._limits = directory, python, limits
        self.network, self._idle_s = allow_network, idle_s
        self._turns = asyncio.Semaphore(runs_max)
        self._visible: list[str] = []
        self._filter = b""
        # The kernel lets one message more into a buffer that is not full.
        self._socket_bytes = 2 * int(WMEM_DEFAULT.read_text())
        self.isolated = True
        """Whether runs get namespaces; without them there are resource limits and nothing else."""

    async def prepare(self) -> None:
        """Find out what can be had here. Raises IsolationFailed."""
        question = "import json, sys; print(json.dumps([sys.prefix, sys.base_prefix]))"
        asked = await asyncio.create_subprocess_exec(
            *(self._python, "-c", question), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        )
        answer, _ = await asked.communicate()
        if asked.returncode:
            raise IsolationFailed(f"{self._python} is no working Python.")
        self._visible = json.loads(answer)
        machine = os.uname().machine
        if machine not in MACHINES:
            raise IsolationFailed(f"the system calls of {machine} are not known here.")
        self._filter = filter_for(machine)
        try:
            await self._try_out()
        except IsolationFailed:
            if not self.network or os.getuid() == 0:  # as root it would be confined by nothing
                raise
            self.isolated = False
            await self._try_out()

    async def _try_out(self) -> None:
        seen, _ = await self.run("print(*(line.split(':')[0] for line in open('/proc/net/dev').readlines()[2:]))")
        if seen.exit_code or (seen.stdout.split() != ["lo"] and not self.network):
            raise IsolationFailed(f"a trial run went wrong: {seen.stderr or seen.stdout}".strip())

    async def run(
        self, code: str, container: str = "", files: Mapping[str, bytes] | None = None
    ) -> tuple[Run, list[ImageContent]]:
        """Run one cell, and give how it went and the images that it made. Raises IsolationFailed, NoRoom.

        `container` is a valid id, or empty for a run whose files are forgotten; the names of `files` are valid.
        """
        async with AsyncExitStack() as stack:
            state = await stack.enter_async_context(self._held(container)) if container else None
            await stack.enter_async_context(self._turns)
            before = [stack.enter_context(archive_of(files or {}))]
            if state and state.exists():
                before.insert(0, stack.enter_context(state.open("rb")))
            after = stack.enter_context(fresh(self._directory) if state else scratch())
            report, stdout, stderr = await self._isolated_run(code, before, after)
            made, images = await asyncio.to_thread(changes, before, after)
            said = [*notes(report, self._limits)]
            if state:
                try:
                    await asyncio.to_thread(self._keep, Path(after.name), state)
                except NoRoom as error:
                    said.append(f"the files are as they were before: {error}")
        run = Run(
            stdout=stdout,
            stderr=stderr + "".join(f"[sandbox: {note}]\n" for note in said),
            exit_code=report["exit_code"],
            timed_out=report["stopped"] == "time" or report["exit_code"] == -signal.SIGXCPU,
            files=made,
        )
        return run, images

    async def _isolated_run(self, code: str, before: list[IO[bytes]], after: IO[bytes]) -> tuple[Report, str, str]:
        """Carry out one order; gives the report, stdout and stderr."""
        async with AsyncExitStack() as stack:
            told, report = stack.enter_context(pipe())
            stdin = stack.enter_context(scratch(code))
            for file in before:
                file.seek(0)
            home = HOME if self.isolated else stack.enter_context(tempfile.TemporaryDirectory(dir=self._directory))
            order = self._order(home, [file.fileno() for file in before], after.fileno(), report.fileno())
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-ISB", ISOLATION, json.dumps(order)),
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={},
                pass_fds=(*order["files_in"], order["files_out"], order["report"]),
                start_new_session=True,
            )
            report.close()
            stack.push_async_callback(end, process)
            assert process.stdout
            assert process.stderr
            limit = self._limits.output_bytes
            try:
                async with asyncio.timeout(self._limits.wall_s + OVERTIME_S):
                    stdout, stderr = await asyncio.gather(kept(process.stdout, limit), kept(process.stderr, limit))
                    await process.wait()
            except TimeoutError:
                raise IsolationFailed("it did not come to an end.") from None
            line = told.readline()
            done: Report = json.loads(line) if line else {"failure": stderr or "it died."}
            if "failure" in done:
                raise IsolationFailed(done["failure"])
            return done, stdout, stderr

    def _order(self, home: str, files_in: list[int], files_out: int, report: int) -> Order:
        limits = self._limits
        return {
            "command": [str(self._python), "-B", "-s", "-u", "-X", "utf8", "-c", NOTEBOOK_CELL],
            "filter": self._filter.hex(),
            "env": {
                "PATH": f"{self._python.parent}:/usr/local/bin:/usr/bin:/bin",
                "HOME": "/tmp" if self.isolated else home,  # noqa: S108 in a file system of its own
                "LANG": "C.UTF-8",
                "OMP_NUM_THREADS": "2",  # one thread per core of a large machine would be more than is allowed
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

    # -- containers

    @asynccontextmanager
    async def _held(self, container: str) -> AsyncIterator[Path]:
        """The archive of a container, which nobody else uses meanwhile, in whatever process. Raises NoRoom."""
        lock = self._directory / f"{container}.lock"
        while True:
            with await asyncio.to_thread(self._admitted, lock) as file:
                if locked(file, lock):
                    os.utime(file.fileno())
                    yield lock.with_suffix(".tar")
                    os.utime(file.fileno())
                    return
            await asyncio.sleep(LOCK_POLL_S)

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """Containers come, grow and go one at a time, in whatever process."""
        with (self._directory / "counting").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _admitted(self, lock: Path) -> IO[str]:
        """Open the lock of a container, which may be a new one, if need be in the place of another. Raises NoRoom."""
        with suppress(FileNotFoundError):
            return lock.open("r+")
        with self._counting():
            while not lock.exists() and len([*self._directory.glob("*.lock")]) >= self._containers_max:
                self._drop_oldest(f"there are {self._containers_max} containers, and all are in use.")
            return lock.open("a")

    def _keep(self, archive: Path, state: Path) -> None:
        """A container's files are those of the archive from now on; others make room. Raises NoRoom."""
        with self._counting():
            while archive.stat().st_size + self._size_without(state) > self._all_disk_bytes:
                self._drop_oldest(f"containers have more than {self._all_disk_bytes // MIB} MiB, and all are in use.")
            archive.replace(state)

    def _size_without(self, state: Path) -> int:
        return sum(path.stat().st_size for path in self._directory.glob("*.tar") if path != state)

    def _drop_oldest(self, otherwise: str) -> None:
        """Remove the container whose last use is the longest ago. Raises NoRoom, saying `otherwise`, if all are in use."""
        locks = [(lock.stat().st_mtime, lock) for lock in self._directory.glob("*.lock")]
        if not any(drop(lock) for _, lock in sorted(locks)):
            raise NoRoom(otherwise)

    def sweep(self) -> None:
        """Remove the containers that nobody has used for long."""
        with self._counting():
            for lock in self._directory.glob("*.lock"):
                drop(lock, idle_s=self._idle_s)
        for left in self._directory.glob("*.new"):  # of a server that was killed
            with suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > self._idle_s:
                    left.unlink()

    async def keep_swept(self) -> NoReturn:
        """Sweep again and again."""
        while True:
            await asyncio.to_thread(self.sweep)
            await asyncio.sleep(SWEEP_S)


def drop(lock: Path, *, idle_s: float = 0.0) -> bool:
    """Remove a container, unless it is in use or was less than so many seconds ago."""
    with lock.open("a") as file:
        if not locked(file, lock) or time.time() - os.fstat(file.fileno()).st_mtime < idle_s:
            return False
        lock.with_suffix(".tar").unlink(missing_ok=True)
        lock.unlink()
        return True


def locked(file: IO[str], path: Path) -> bool:
    """Take the lock, unless somebody has it or has removed it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(file.fileno()).st_ino == path.stat().st_ino
    except (BlockingIOError, FileNotFoundError):
        return False


async def end(process: asyncio.subprocess.Process) -> None:
    """Kill a jail that has not come to its end; the kernel kills what is in it."""
    if process.returncode is None:
        process.kill()
        await process.wait()


async def kept(stream: asyncio.StreamReader, limit: int) -> str:
    """A stream's text to its end; of one that is longer than `limit` bytes, beginning and end."""
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


def notes(report: Report, limits: Limits) -> Iterator[str]:
    """What the model must know besides what the code printed."""
    if report["stopped"] == "time":
        yield f"stopped after {limits.wall_s:g} s"
    if report["stopped"] == "memory":
        yield f"stopped: more than {limits.memory_bytes // 1024**2} MiB of memory"
    if report["exit_code"] == -signal.SIGXCPU:
        yield f"stopped: more than {limits.cpu_s} s of CPU time"
    if report["left_out"]:
        yield f"{report['left_out']} files are not kept: too many, too large, or badly named"


@contextmanager
def pipe() -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Both ends of a pipe."""
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as told, os.fdopen(writer, "wb") as teller:
        yield told, teller


# -- files ------------------------------------------------------------------------------------------------------------------


@contextmanager
def scratch(text: str = "") -> Iterator[IO[bytes]]:
    """A file without a name, to be read from its beginning. Raises UnicodeEncodeError."""
    with tempfile.TemporaryFile() as file:
        file.write(text.encode())
        file.seek(0)
        yield file


@contextmanager
def fresh(directory: Path) -> Iterator[IO[bytes]]:
    """A new file, which must be moved elsewhere in the block to remain."""
    with tempfile.NamedTemporaryFile(dir=directory, suffix=".new", delete=False) as file:
        try:
            yield file
        finally:
            Path(file.name).unlink(missing_ok=True)


@contextmanager
def archive_of(files: Mapping[str, bytes]) -> Iterator[IO[bytes]]:
    """An archive of files, by name."""
    with tempfile.TemporaryFile() as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size, member.mode, member.mtime = len(content), 0o600, int(time.time())
                archive.addfile(member, io.BytesIO(content))
        file.flush()
        yield file


def contents(file: IO[bytes]) -> Iterator[tuple[tarfile.TarInfo, IO[bytes]]]:
    """The files of an archive."""
    file.seek(0)
    with tarfile.open(fileobj=file) as archive:
        for member in archive:
            content = archive.extractfile(member)
            assert content  # there is nothing but regular files in it
            yield member, content


def changes(before: Sequence[IO[bytes]], after: IO[bytes]) -> tuple[list[MadeFile], list[ImageContent]]:
    """The files of `after` that `before` has not or has with another content, and those of them that are images."""
    known = {member.name: digest(content) for file in before for member, content in contents(file)}
    made: list[MadeFile] = []
    images: list[ImageContent] = []
    for member, content in contents(after):
        if known.get(member.name) == digest(content):
            continue
        mime_type = mimetypes.guess_type(member.name)[0] or "application/octet-stream"
        content.seek(0)
        if mime_type in IMAGES and member.size <= IMAGE_BYTES_MAX and len(images) < IMAGES_MAX:
            images.append(ImageContent(data=base64.b64encode(content.read()).decode(), mime_type=mime_type))
            text = None
        else:
            text = text_of(content.read()) if member.size <= TEXT_BYTES_MAX and len(made) < FILES_SHOWN_MAX else None
        made.append(MadeFile(name=member.name, size=member.size, mime_type=mime_type, text=text))
    return made, images


def digest(content: IO[bytes]) -> bytes:
    """What tells one content from another."""
    return hashlib.file_digest(content, "sha256").digest()  # type: ignore[arg-type]


def text_of(content: bytes) -> str | None:
    """The text, if it is one."""
    try:
        return None if b"\0" in content else content.decode()
    except UnicodeDecodeError:
        return None


# -- the tool ---------------------------------------------------------------------------------------------------------------


def checked_container(container: str) -> str:
    """A container's id, or nothing. Raises ToolError."""
    if container and not CONTAINER.fullmatch(container):
        raise ToolError("container must have 16 to 128 letters, digits, - and _.")
    return container


def checked_files(files: Sequence[GivenFile]) -> dict[str, bytes]:
    """Contents by name. Raises ToolError."""
    checked: dict[str, bytes] = {}
    for file in files:
        parts = file.name.split("/")
        if (
            not all(parts)
            or {".", ".."} & {*parts}
            or "\0" in file.name
            or len(file.name.encode(errors="replace")) > 255
        ):
            raise ToolError(f"{file.name!r} is not a relative path without . and ..")
        if (file.text is None) == (file.data is None):
            raise ToolError(f"{file.name!r} needs either text or data.")
        try:
            checked[file.name] = base64.b64decode(file.data, validate=True) if file.data else (file.text or "").encode()
        except (binascii.Error, UnicodeEncodeError) as error:
            raise ToolError(f"{file.name!r} can't be read: {error}") from error
    return checked


def said(run: Run) -> str:
    """A run as text for a model."""
    parts = [run.stdout, f"stderr:\n{run.stderr}" if run.stderr else ""]
    parts += [f"exit code {run.exit_code}"] * bool(run.exit_code)
    for file in run.files[:FILES_SHOWN_MAX]:
        parts.append(
            f"file {file.name} ({file.mime_type}, {file.size} bytes)" + (f":\n{file.text}" if file.text else "")
        )
    more = len(run.files) - FILES_SHOWN_MAX
    parts += [f"and {more} more files"] * (more > 0)
    return "\n".join(part.rstrip("\n") for part in parts if part) or "(no output)"


def tool_server(sandbox: Sandbox) -> MCPServer[Any]:
    """The MCP server."""

    @asynccontextmanager
    async def swept(_: MCPServer[Any]) -> AsyncIterator[None]:
        sweeping = asyncio.create_task(sandbox.keep_swept())
        yield
        sweeping.cancel()

    server: MCPServer[Any] = MCPServer("sandbox", lifespan=swept, log_level="WARNING")

    description = (
        "Run Python code and give what it printed and the files it made. "
        f"There is {'a' if sandbox.network else 'no'} network. Variables are gone with the end of the call; "
        "files in the working directory stay for the next call of the same container."
    )
    hints = ToolAnnotations(read_only_hint=False, destructive_hint=False, open_world_hint=sandbox.network)

    @server.tool(description=description, annotations=hints)
    async def run_python(
        code: Annotated[str, Field(description="Python code. The value of a last expression is printed.")],
        container: Annotated[
            str, Field(description="Whose files to work on: 16 to 128 letters, digits, - and _. Empty: nobody's.")
        ] = "",
        files: Annotated[list[GivenFile], Field(description="Files to put into the working directory first.")] = [],  # noqa: B006 a schema's default
    ) -> Annotated[CallToolResult, Run]:
        if len(code.encode(errors="replace")) > CODE_BYTES_MAX:
            raise ToolError(f"code is longer than {CODE_BYTES_MAX} bytes.")
        try:
            run, images = await sandbox.run(code, checked_container(container), checked_files(files))
        except UnicodeEncodeError as error:
            raise ToolError(f"code is not text: {error}") from error
        except (IsolationFailed, NoRoom) as error:
            raise ToolError(f"The code could not be run: {error}") from error
        return CallToolResult(content=[TextContent(text=said(run)), *images], structured_content=run.model_dump())

    return server


# -- the program ------------------------------------------------------------------------------------------------------------


@click.command()
@http_option
@click.option("--python", default=sys.executable, show_default=True, help="The interpreter that runs the code.")
@click.option(
    "--directory", type=click.Path(path_type=Path, readable=False), help="Where containers are kept; must be private."
)
@click.option("--idle", default=1200.0, show_default=True, help="Seconds that an unused container is kept.")
@click.option("--runs", default=os.cpu_count() or 1, show_default=True, help="Runs at once; others wait.")
@click.option("--wall", default=Limits.wall_s, show_default=True, help="Seconds that a run may last.")
@click.option("--cpu", default=Limits.cpu_s, show_default=True, help="Seconds of CPU time of each process.")
@click.option("--memory", default=Limits.memory_bytes // MIB, show_default=True, help="MiB of memory of a run.")
@click.option("--disk", default=Limits.disk_bytes // MIB, show_default=True, help="MiB of all files of a container.")
@click.option("--containers", default=1000, show_default=True, help="Containers; beyond: the oldest idle one goes.")
@click.option("--all-disk", default=10 * 1024, show_default=True, help="MiB of all files of all containers; likewise.")
@click.option("--processes", default=Limits.processes, show_default=True, help="Processes and threads of a run.")
@click.option(
    "--allow-network", is_flag=True, help="Let code reach the network, and run it even where only limits hold it."
)
def main(
    address: str | None,
    python: str,
    directory: Path | None,
    idle: float,
    runs: int,
    wall: float,
    cpu: int,
    memory: int,
    disk: int,
    containers: int,
    all_disk: int,
    processes: int,
    allow_network: bool,
) -> None:
    """Serve the tool run_python over MCP, on stdio or HTTP."""
    if all_disk < disk:
        raise click.UsageError("--all-disk must be as much as --disk at least.")
    limits = Limits(wall_s=wall, cpu_s=cpu, memory_bytes=memory * MIB, disk_bytes=disk * MIB, processes=processes)
    sandbox = Sandbox(
        private(directory or Path(tempfile.gettempdir(), f"reprise-sandbox-{os.getuid()}")),
        Path(shutil.which(python) or python),
        limits,
        allow_network=allow_network,
        idle_s=idle,
        runs_max=runs,
        containers_max=containers,
        all_disk_bytes=all_disk * MIB,
    )
    try:
        asyncio.run(sandbox.prepare())
    except (IsolationFailed, OSError) as error:
        raise click.ClickException(
            f"code can't be isolated here: {error}\nLinux namespaces are needed: see app/toolservers/sandbox.py."
        ) from error
    if not sandbox.isolated:
        click.echo("Warning: nothing but resource limits holds the code: it can read what this user can.", err=True)
    serve(tool_server(sandbox), address)


def private(directory: Path) -> Path:
    """The directory, made if need be. Raises click.ClickException if others can look into it."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise click.ClickException(f"{directory} must belong to this user alone (chmod 700).")
    return directory


if __name__ == "__main__":
    main()
