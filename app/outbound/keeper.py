"""Runs a tool server's program; no process of it outlives the Reprise process that started it.

A separate program that imports the standard library only: `program.py` starts `python -ISB keeper.py COMMAND…`. The program inherits
its stdin, stdout and stderr. When the other end of stdin is closed, which kill -9 of Reprise does too, the program has GRACE_S seconds
to exit, GRACE_S more after SIGTERM, and then it is killed with all its descendants. Descendants are also killed when it exits
itself.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

GRACE_S = 1.0
STEP_S = 0.02
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
CHILDREN = Path("/proc/thread-self/children")
NOT_STARTED = 127


def main() -> None:
    """Run the command; exit with its status, or with 128 and the signal that killed it."""
    on_linux = sys.platform == "linux"
    libc = ctypes.CDLL(None)
    if on_linux:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphaned descendants become children of this process
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))

    def begin() -> None:
        if on_linux:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # also if this process is killed

    try:
        child = subprocess.Popen(sys.argv[1:], start_new_session=True, preexec_fn=begin)  # noqa: PLW1509, S603 one thread, the operator's command
    except OSError:
        sys.exit(NOT_STARTED)
    os.close(1)  # readers must see EOF when the program exits
    status = None
    try:
        status = wait_for_exit_or_eof(child)
        if status is None:
            child.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = child.wait(GRACE_S)
    finally:
        kill_all(child)
    sys.exit(128 - status if status and status < 0 else status or 0)


def wait_for_exit_or_eof(child: subprocess.Popen[bytes]) -> int | None:
    """The program's exit status; None if it still runs GRACE_S seconds after stdin was closed."""
    woken, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    watched = select.poll()
    watched.register(0, 0)  # POLLHUP only
    watched.register(woken, select.POLLIN)
    while (status := child.poll()) is None:
        if any(descriptor == 0 for descriptor, _ in watched.poll()):
            with contextlib.suppress(subprocess.TimeoutExpired):
                return child.wait(GRACE_S)
            return None
        os.read(woken, 4096)
    return status


def kill_all(child: subprocess.Popen[bytes]) -> None:
    """Kill the program, its process group, and on Linux all other descendants."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    while CHILDREN.exists() and (left := CHILDREN.read_text().split()):
        for pid in map(int, left):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(STEP_S)


if __name__ == "__main__":
    main()
