"""Runs a program where it can do little: Linux namespaces and resource limits, from the standard library alone.

A program of its own, started by `sandbox.py` for each run: `python -ISB isolation.py ORDER`, where ORDER is the JSON of an
`Order`. What the jailed program prints goes to this program's stdout and stderr, and it reads this program's stdin.

With namespaces, which Linux gives to unprivileged users too unless it is told not to, the program has

- no network: a namespace with a loopback device that is down;
- no files but its own: a file system in memory, of a fixed size, with `/usr` and the interpreter in it, read-only;
- no sight of other processes, and none of its own outlives it;
- a user without any privilege, and no way to gain one by setuid programs or namespaces of its own. Started by root, it gets
  a user id of its own.

Without namespaces it has resource limits and a process group, and nothing else: it reads and writes whatever this program's
user can, and reaches the network.

Either way system calls that it does not need are refused (`seccomp.py`), and it has a session keyring of its own, which is
empty. It shares the kernel with the host all the same: a hole in the kernel is a way out.

Its memory is counted, not only limited: a limit of each process says nothing about all of them, nor about pages that are in
none. What all processes hold (resident, swapped out, tables of pages) and what their sockets and pipes could hold is looked
at every STEP_S seconds, so for moments it can be more than the limit. What could hide from the count is refused.

Its files come in and go out as tar archives, so that nothing it makes is ever a file of the host by itself; only regular files
are taken along.
"""

import contextlib
import ctypes
import errno
import json
import os
import resource
import secrets
import signal
import stat
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, TypedDict

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH = 2
SYS_MOUNT_SETATTR = 442  # the same on every architecture
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 1, 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38
SECCOMP_MODE_FILTER = 2
RLIMIT_MSGQUEUE = 12
SYS_KEYCTL = {"x86_64": 250, "aarch64": 219}
KEYCTL_JOIN_SESSION_KEYRING = 1

# What is read from /dev/full are zeros as well; and it can't be mapped, which would be memory that is in no process.
DEVICES = {"null": "null", "zero": "full", "full": "full", "random": "random", "urandom": "urandom"}
SECRETIVE = ("/proc/keys", "/proc/key-users")
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64")
ETC = ("/etc/alternatives", "/etc/fonts", "/etc/ld.so.cache", "/etc/localtime", "/etc/mime.types", "/etc/ssl/certs")
ETC_NETWORK = ("/etc/hosts", "/etc/nsswitch.conf", "/etc/resolv.conf")
STEP_S = 0.05
HELD_BYTES = {"pipe:": 64 * 1024, "anon_inode:inotify": 6 * 1024 * 1024}
"""What the kernel may hold for a descriptor, besides sockets: a pipe's pages, and events with long names."""
LOCKS_MAX = 2000
"""Locks of files, which take little memory each, but have no other limit; more count as all the memory there is."""
COUNTED = ("VmRSS:", "VmSwap:", "VmPTE:")

libc = ctypes.CDLL(None, use_errno=True)


class Order(TypedDict):
    """What to run, and within which limits."""

    command: list[str]
    filter: str  # of system calls, in hexadecimal digits
    env: dict[str, str]
    visible: list[str]  # directories that the program may read, besides the system's
    namespaces: bool
    network: bool
    home: str  # where the program's files are; with namespaces, a place in its own file system
    files_in: list[int]  # descriptors of tar archives that are unpacked one over the other
    files_out: int  # descriptor that the files which are left go to
    report: int  # descriptor that the `Report` goes to
    wall_s: float
    cpu_s: int
    memory_bytes: int  # of one process' address space, and of what all processes use together
    socket_bytes: int  # that one socket may hold
    processes: int  # and threads
    open_files: int
    file_bytes: int  # of one file
    disk_bytes: int  # of all files
    files: int


class Report(TypedDict, total=False):
    """How it went: either `failure`, or the rest."""

    failure: str  # the jail could not be made
    exit_code: int  # negative: the signal it died of
    stopped: str  # "", "time" or "memory"
    left_out: int  # files that were not taken along: too many, too large, or with a name that is no text


def main() -> None:
    """Do what the order says and report."""
    order: Order = json.loads(sys.argv[1])
    try:
        keep_to_ourselves(*order["files_in"], order["files_out"], order["report"])
        report = enter(order) if order["namespaces"] else confine(order, order["home"], None)
    except Exception as error:  # noqa: BLE001 the caller says it, in its own words
        report = {"failure": f"{type(error).__name__}: {error}"}
    if report is not None:
        tell(order, report)


def keep_to_ourselves(*ours: int) -> None:
    """The program gets no descriptors beyond stdin, stdout and stderr; nor do we, beyond our own."""
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 names are what is wanted
        descriptor = int(name)
        if descriptor in ours:
            os.set_inheritable(descriptor, False)
        elif descriptor > 2:
            with contextlib.suppress(OSError):  # that of the list itself is closed already
                os.close(descriptor)


def tell(order: Order, report: Report) -> None:
    """Report; the first line that is told counts."""
    os.write(order["report"], json.dumps(report).encode() + b"\n")


def enter(order: Order) -> Report | None:
    """Make the namespaces, and run the order by the first process in them, which reports itself."""
    uid, gid = os.getuid(), os.getgid()
    flags = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS | (0 if order["network"] else CLONE_NEWNET)
    if uid == 0:
        # Root needs no user namespace, and the program gets a user that nothing else belongs to.
        uid = gid = 1_000_000_000 + secrets.randbelow(1_000_000_000)
        call("unshare", flags)
    else:
        call("unshare", flags | CLONE_NEWUSER)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    first = os.fork()
    if first:
        os.waitpid(first, 0)
        return None
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    build_root(order, uid, gid)
    return confine(order, order["home"], (uid, gid))


def build_root(order: Order, uid: int, gid: int) -> None:
    """Make the file system that the program sees, and make it the root."""
    # Looked at first: the interpreter may be below /tmp, which the new root covers until it has its place.
    wanted = [*SYSTEM, *ETC, *(ETC_NETWORK if order["network"] else ()), *order["visible"]]
    sources = {path: os.path.realpath(path) for path in wanted if os.path.exists(path)}  # noqa: PTH110
    links = {path: os.readlink(path) for path in SYSTEM if os.path.islink(path)}  # noqa: PTH114, PTH115
    call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    size = f"mode=0755,size={order['disk_bytes']},nr_inodes={order['files'] + 200}"
    call("mount", b"tmpfs", b"/tmp", b"tmpfs", MS_NOSUID | MS_NODEV, size.encode())
    os.chdir("/tmp")
    Path("old").mkdir()
    call("pivot_root", b".", b"old")
    os.chdir("/")
    for path, target in links.items():
        Path(path).symlink_to(target)
    seen: list[str] = list(links)
    for path in sorted(sources, key=len):
        if not any(path == one or path.startswith(one + "/") for one in seen):
            show(f"/old{sources[path]}", path, read_only=True)
            seen.append(path)
    for device, real in DEVICES.items():
        show(f"/old/dev/{real}", f"/dev/{device}", read_only=False)
    for name, target in {"fd": "", "stdin": "/0", "stdout": "/1", "stderr": "/2"}.items():
        Path("/dev", name).symlink_to(f"/proc/self/fd{target}")
    Path("/proc").mkdir()
    call("mount", b"proc", b"/proc", b"proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, None)
    for path in filter(os.path.exists, SECRETIVE):
        call("mount", b"/old/dev/null", path.encode(), None, MS_BIND, None)
    call("umount2", b"/old", MNT_DETACH)
    Path("/old").rmdir()
    Path("/etc/passwd").write_text(f"sandbox:x:{uid}:{gid}::/tmp:/bin/sh\n")
    Path("/etc/group").write_text(f"sandbox:x:{gid}:\n")
    for path in ("/tmp", "/dev/shm", order["home"]):
        Path(path).mkdir(parents=True, exist_ok=True)
        os.chown(path, uid, gid)
    # Linux refuses user namespaces to those whose root is not their mount namespace's: the program can't get privileges there.
    show("/", "/.root", read_only=False)
    os.chroot("/.root")
    os.chdir("/")


def show(source: str, path: str, *, read_only: bool) -> None:
    """Let a file or directory of the host be seen at a path."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if Path(source).is_dir():
        Path(path).mkdir()
    else:
        Path(path).touch()
    call("mount", source.encode(), path.encode(), None, MS_BIND | MS_REC, None)
    if read_only:
        attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
        call("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, path.encode(), AT_RECURSIVE, attributes, ctypes.c_size_t(32))


def confine(order: Order, home: str, user: tuple[int, int] | None) -> Report:
    """Run the order's program in `home`, and pack the files that are there afterwards."""
    # Whatever loses its parent becomes our child, and nobody may look into this process.
    call("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    Path("/proc/self/oom_score_adj").write_text("1000")
    call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    started = os.fork()
    if not started:
        become(order, home, user)
    status, stopped = watch(order, started)
    left_out = pack(order, home)
    return {"exit_code": os.waitstatus_to_exitcode(status), "stopped": stopped, "left_out": left_out}


def become(order: Order, home: str, user: tuple[int, int] | None) -> NoReturn:
    """Turn this process into the order's program."""
    try:
        os.setsid()
        if user and os.getuid() == 0:
            os.setgroups([])
            os.setresgid(user[1], user[1], user[1])
            os.setresuid(user[0], user[0], user[0])
        call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        call("prctl", PR_SET_DUMPABLE, 1, 0, 0, 0)  # our parent counts our memory
        call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        os.umask(0o077)
        for descriptor in order["files_in"]:
            unpack(descriptor, home)
        os.chdir(home)
        # At the soft limit a signal says what has happened; who ignores it is killed at the hard one.
        resource.setrlimit(resource.RLIMIT_CPU, (order["cpu_s"], order["cpu_s"] + 1))
        for limit, value in {
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_AS: order["memory_bytes"],
            resource.RLIMIT_NPROC: order["processes"],
            resource.RLIMIT_NOFILE: order["open_files"],
            resource.RLIMIT_FSIZE: order["file_bytes"],
            RLIMIT_MSGQUEUE: 0,
        }.items():
            resource.setrlimit(limit, (value, value))
        signal.pthread_sigmask(signal.SIG_SETMASK, set())
        forget_keys()
        filter_calls(bytes.fromhex(order["filter"]))
        os.execve(order["command"][0], order["command"], order["env"] | {"PWD": home})  # noqa: S606
    except Exception as error:  # noqa: BLE001 there is nobody above to catch it
        tell(order, {"failure": f"{type(error).__name__}: {error}"})
    os._exit(127)


def forget_keys() -> None:
    """Join a new session keyring, if the kernel has such."""
    if libc.syscall(SYS_KEYCTL[os.uname().machine], KEYCTL_JOIN_SESSION_KEYRING, None) < 0:
        error = ctypes.get_errno()
        # Where containers are not allowed to use keys, the filter says the same to the program.
        if error not in (errno.ENOSYS, errno.EPERM):
            raise OSError(error, f"keyctl: {os.strerror(error)}")


class FilterProgram(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def filter_calls(program: bytes) -> None:
    """Let the kernel judge this process' system calls from now on, and those of what it starts."""
    call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(FilterProgram(len(program) // 8, program)), 0, 0)


def watch(order: Order, started: int) -> tuple[int, str]:
    """Wait until the program has ended or must; leave no process. Gives its wait status, and why it was stopped."""
    stopped = ""
    deadline = time.monotonic() + order["wall_s"]
    while (status := reaped(started)) is None:
        if time.monotonic() > deadline:
            stopped = "time"
        elif order["namespaces"] and memory_used(order) > order["memory_bytes"]:
            stopped = "memory"
        if stopped:
            os.kill(started, signal.SIGKILL)
            status = os.waitpid(started, 0)[1]
            break
        signal.sigtimedwait({signal.SIGCHLD}, STEP_S)
    while descendants(everybody=order["namespaces"]):
        signal.sigtimedwait({signal.SIGCHLD}, STEP_S)
    return status, stopped


def reaped(started: int) -> int | None:
    """Bury who has died; the wait status of the program if it is among them."""
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == started:
            return status
        if not pid:
            return None


def descendants(*, everybody: bool) -> bool:
    """Kill and bury those who are left; False when there are none."""
    if everybody:
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)  # everybody in the namespace but ourselves
    else:
        for pid in Path("/proc/thread-self/children").read_text().split():
            os.kill(int(pid), signal.SIGKILL)  # not buried yet, hence still ours; its children become ours
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def memory_used(order: Order) -> int:
    """Bytes that the processes of the namespace but this one use together, or may have the kernel use for them."""
    used = order["memory_bytes"] + 1 if too_many_locks() else 0
    holders: set[str] = set()
    for path in Path("/proc").iterdir():
        if path.name.isdigit() and path.name != "1":
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
                used += memory_of(path, holders, order)
    sockets = sum(one.startswith("socket:") for one in holders)
    if not order["network"]:  # then all are ours, also those in a message, which are in no process
        sockets = int(Path("/proc/net/sockstat").read_text().split()[2])
    held = sum(size for one in holders for kind, size in HELD_BYTES.items() if one.startswith(kind))
    return used + held + sockets * order["socket_bytes"]


def too_many_locks() -> bool:
    """Whether the namespace has more than LOCKS_MAX; all of them would take too long to read."""
    count = 0
    with Path("/proc/locks").open("rb", buffering=0) as file:
        while count <= LOCKS_MAX and (chunk := file.read(64 * 1024)):
            count += chunk.count(b"\n")
    return count > LOCKS_MAX


def memory_of(process: Path, holders: set[str], order: Order) -> int:
    """Bytes of one process; adds what its descriptors are to `holders`."""
    found = [0]
    for task in (process / "task").iterdir():  # the first may have ended, and each may have descriptors of its own
        lines = map(str.split, (task / "status").read_text().splitlines())
        found.append(sum(int(line[1]) * 1024 for line in lines if line and line[0] in COUNTED))
        try:
            holders.update(os.readlink(one.path) for one in os.scandir(task / "fd"))  # noqa: PTH115 they are no paths
        except FileNotFoundError:
            continue  # closed meanwhile
        except PermissionError:  # a program that its user may not read
            found[0] = order["open_files"] * order["socket_bytes"]
    return found[0] + max(found[1:], default=0)


def unpack(descriptor: int, home: str) -> None:
    """Put an archive's files into `home`; their names have been checked by whoever packed them."""
    with os.fdopen(descriptor, "rb") as file, tarfile.open(fileobj=file) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11 has it since 3.11.4
        archive.extractall(home)  # noqa: S202 (it is our own archive, and we are in the jail)


def pack(order: Order, home: str) -> int:
    """Put the regular files below `home` into the archive `files_out`; gives how many were left out."""
    left_out = taken = size = 0
    with (
        os.fdopen(order["files_out"], "wb") as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for path, found in regular_files(home):
            name = os.path.relpath(path, home)
            taken, size = taken + 1, size + found.st_size
            fits = taken <= order["files"] and size <= order["disk_bytes"] and found.st_size <= order["file_bytes"]
            if not fits or not is_text(name):
                left_out, size = left_out + 1, size - found.st_size
                continue
            member = tarfile.TarInfo(name)
            member.size, member.mtime, member.mode = found.st_size, int(found.st_mtime), 0o600
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            with os.fdopen(descriptor, "rb") as content:
                archive.addfile(member, content)
    return left_out


def regular_files(home: str) -> Iterator[tuple[str, os.stat_result]]:
    """The regular files below a directory, without following links."""
    waiting = [home]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in sorted(entries, key=lambda one: one.name):
                found = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(found.st_mode) and len(entry.path) < 1000:
                    waiting.append(entry.path)
                elif stat.S_ISREG(found.st_mode):
                    yield entry.path, found


def is_text(name: str) -> bool:
    """Whether a file's name is UTF-8, and not longer than an archive is read back with."""
    try:
        return len(name.encode()) <= 1000
    except UnicodeEncodeError:
        return False


def call(name: str, *arguments: Any) -> None:
    """A function of the C library. Raises OSError."""
    if getattr(libc, name)(*arguments) < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")


if __name__ == "__main__":
    main()
