"""Server processes that are forks of one that has imported the server, which takes longer than most tests.

python -m tests.forked FD    forks on request; a request and three files come on the socket FD
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parent.parent
REQUEST_BYTES_MAX = 128 * 1024
IMPORT_FIRST = "FORKED_IMPORT_FIRST"
"""The variable that names a module which a fork imports before it becomes the server."""


class ForkServer:
    """One per test process, started on demand; it exits with the process that started it."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()

    def start(self, env: Mapping[str, str], *arguments: str, files_max: tuple[int, int] | None = None) -> "Process":
        """`reprise ARGUMENTS` in this environment; `files_max` are its soft and hard limits of open files."""
        output, output_end = os.pipe()
        try:
            status = self._forked(env, arguments, files_max, output_end, output_end)
        finally:
            os.close(output_end)
        return Process(status, os.fdopen(output, encoding="utf-8", errors="replace"))

    def run(self, env: Mapping[str, str], *arguments: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
        """`reprise ARGUMENTS`, run to its end. Raises subprocess.TimeoutExpired."""
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
            process = Process(self._forked(env, arguments, None, output.fileno(), errors.fileno()))
            try:
                status = process.wait(timeout_s)
            finally:
                process.kill()
            output.seek(0)
            errors.seek(0)
            return subprocess.CompletedProcess(arguments, status, output.read(), errors.read())

    def _forked(
        self,
        env: Mapping[str, str],
        arguments: tuple[str, ...],
        files_max: tuple[int, int] | None,
        output: int,
        errors: int,
    ) -> int:
        """The file descriptor that the status of the new process is read from."""
        request = json.dumps({"env": dict(env), "arguments": arguments, "files_max": files_max}).encode()
        assert len(request) <= REQUEST_BYTES_MAX
        status, status_end = os.pipe()
        with self._lock:
            if self._socket is None:
                self._socket = _forking()
            socket.send_fds(self._socket, [request], [output, errors, status_end])
        os.close(status_end)
        return status


def _forking() -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for one in (ours, theirs):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * REQUEST_BYTES_MAX)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs.fileno())], cwd=ROOT, pass_fds=[theirs.fileno()]
        )

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


class Process:
    """The interface of `subprocess.Popen` for a child of another process."""

    def __init__(self, status: int, stdout: TextIO | None = None) -> None:
        self.stdout = stdout
        self._status = os.fdopen(status)
        self.pid = int(self._status.readline())
        self.returncode: int | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._await_end, daemon=True).start()

    def _await_end(self) -> None:
        with self._status:
            self.returncode = int(self._status.readline() or -signal.SIGKILL)
        self._ended.set()

    def poll(self) -> int | None:
        """Its exit status, if it has ended; the negative signal where that has ended it."""
        return self.returncode if self._ended.is_set() else None

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status once it has ended. Raises subprocess.TimeoutExpired."""
        if not self._ended.wait(timeout) or self.returncode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """A signal, unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended this moment
                os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, unless it has ended."""
        self.send_signal(signal.SIGKILL)


def serve_forks(requests: socket.socket) -> None:
    """Fork for every request until the socket is closed."""
    from litestar import Litestar

    from app import cli, doctor, serving  # noqa: F401 - this is what takes so long

    Litestar()  # imports its plugins when it is first made
    for name in ("anyio._backends._asyncio", "encodings.idna", "uvicorn.lifespan.on", "uvloop"):  # as each start would
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # otherwise each fork's garbage collection copies it all
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are reaped by the kernel
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the tests
    while True:
        request, files, _, _ = socket.recv_fds(requests, REQUEST_BYTES_MAX, 3)
        if not request:
            return
        if os.fork() == 0:
            requests.close()
            _watch(json.loads(request), *files)
        for file in files:
            os.close(file)


def _watch(request: dict[str, Any], output: int, errors: int, status: int) -> None:
    """Fork the server, and write its pid, then how it has ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        os.close(status)
        _become(request, output, errors)
    os.close(output)
    os.close(errors)
    os.write(status, f"{pid}\n".encode())
    _, ended = os.waitpid(pid, 0)
    os.write(status, f"{os.waitstatus_to_exitcode(ended)}\n".encode())
    os._exit(0)


def _become(request: dict[str, Any], output: int, errors: int) -> None:
    from app import cli

    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(errors, 2)
    os.close(output)
    os.close(errors)
    os.environ.clear()
    os.environ.update(request["env"])
    if request["files_max"]:
        resource.setrlimit(resource.RLIMIT_NOFILE, tuple(request["files_max"]))
    if first := os.environ.get(IMPORT_FIRST):
        importlib.import_module(first)
    sys.argv = ["reprise", *request["arguments"]]
    cli.main()
    sys.exit()


if __name__ == "__main__":
    serve_forks(socket.socket(fileno=int(sys.argv[1])))
