"""Runs a program in isolation: Linux namespaces and resource limits, with the standard library only.

A separate program, which `isolated_python.py` starts for each run: `python -ISB isolation.py ORDER`, where ORDER is the JSON of an
`Order`. The isolated program inherits stdin, stdout and stderr.

With namespaces, which most Linux systems also allow to unprivileged users, the program has

- no network: a namespace with a loopback device that is down;
- no files of the host: a tmpfs of a fixed size, with `/usr` and the interpreter mounted read-only;
- a PID namespace: it can't see other processes, and no process of it survives;
- a user without capabilities, which setuid programs or new namespaces can't gain. If this program runs as root, the isolated one gets
  a random user id.

Without namespaces only resource limits and a session confine it: it can read and write what this program's user can, and use the
network.

In both cases system calls that it does not need are refused (`seccomp.py`), and it has a new, empty session keyring. It shares the
kernel with the host: a vulnerability of the kernel is a way out.

Its memory is measured, not only limited: a limit of each process does not limit their sum, nor pages that belong to none. Every STEP_S
seconds the memory of all processes (resident, swapped out, page tables) and the capacity of their sockets and pipes is added up, so
for a moment it can exceed the limit. System calls for memory that is not measured are refused.

Its files are passed in and out as tar archives of regular files, so no file that it makes becomes a file of the host.
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

# /dev/full also reads as zeros, and can't be mapped, which would be memory that belongs to no process.
DEVICES = {"null": "null", "zero": "full", "full": "full", "random": "random", "urandom": "urandom"}
SECRETIVE = ("/proc/keys", "/proc/key-users")
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64")
ETC = ("/etc/alternatives", "/etc/fonts", "/etc/ld.so.cache", "/etc/localtime", "/etc/mime.types", "/etc/ssl/certs")
ETC_NETWORK = ("/etc/hosts", "/etc/nsswitch.conf", "/etc/resolv.conf")
STEP_S = 0.05
DESCRIPTOR_BYTES = {"pipe:": 64 * 1024, "anon_inode:inotify": 6 * 1024 * 1024}
"""Kernel memory of a descriptor other than a socket: a pipe's pages, an inotify queue with long names."""
LOCKS_MAX = 2000
"""File locks, which have no other limit; more of them count as more memory than allowed."""
COUNTED = ("VmRSS:", "VmSwap:", "VmPTE:")

libc = ctypes.CDLL(None, use_errno=True)


class Order(TypedDict):
    """What to run, with which limits."""

    command: list[str]
    filter: str  # seccomp program, hexadecimal
    env: dict[str, str]
    visible: list[str]  # directories that the program can read, besides the system's
    namespaces: bool
    network: bool
    home: str  # the program's working directory; with namespaces, in its tmpfs
    files_in: list[int]  # descriptors of tar archives, unpacked into `home` in this order
    files_out: int  # descriptor for a tar archive of the files in `home` at the end
    report: int  # descriptor for the `Report`
    wall_s: float
    cpu_s: int
    memory_bytes: int  # of a process' address space, and of all processes together
    socket_bytes: int  # capacity of one socket
    processes: int  # and threads
    open_files: int
    file_bytes: int  # of one file
    disk_bytes: int  # of all files
    files: int


class Report(TypedDict, total=False):
    """The result: either `failure`, or the other fields."""

    failure: str  # why the isolation failed
    exit_code: int  # negative: the signal that killed it
    stopped: str  # "", "time" or "memory"
    left_out: int  # files that were not archived: too many, too large, or with a name that is not UTF-8


def main() -> None:
    """Execute the order and report."""
    order: Order = json.loads(sys.argv[1])
    try:
        close_other_descriptors(*order["files_in"], order["files_out"], order["report"])
        report = enter_namespaces(order) if order["namespaces"] else confine(order, order["home"], None)
    except Exception as error:  # noqa: BLE001 the caller reports it
        report = {"failure": f"{type(error).__name__}: {error}"}
    if report is not None:
        send_report(order, report)


def close_other_descriptors(*ours: int) -> None:
    """Close inherited descriptors other than 0 to 2 and ours, and make ours non-inheritable."""
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 names are what is wanted
        descriptor = int(name)
        if descriptor in ours:
            os.set_inheritable(descriptor, False)
        elif descriptor > 2:
            with contextlib.suppress(OSError):  # the directory's own is closed already
                os.close(descriptor)


def send_report(order: Order, report: Report) -> None:
    """Write a report; the reader uses the first line."""
    os.write(order["report"], json.dumps(report).encode() + b"\n")


def enter_namespaces(order: Order) -> Report | None:
    """Create the namespaces; their first process executes the order and reports."""
    uid, gid = os.getuid(), os.getgid()
    flags = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS | (0 if order["network"] else CLONE_NEWNET)
    if uid == 0:
        # Root needs no user namespace; the program gets a user id that owns nothing else.
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
    """Build the program's file system, and make it the root."""
    # Resolved first: the interpreter may be below /tmp, where the new root is mounted.
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
            bind_mount(f"/old{sources[path]}", path, read_only=True)
            seen.append(path)
    for device, real in DEVICES.items():
        bind_mount(f"/old/dev/{real}", f"/dev/{device}", read_only=False)
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
    # Linux refuses user namespaces to a process in a chroot, so the program can't gain capabilities in one.
    bind_mount("/", "/.root", read_only=False)
    os.chroot("/.root")
    os.chdir("/")


def bind_mount(source: str, path: str, *, read_only: bool) -> None:
    """Mount a file or directory of the host at a path."""
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
    """Run the order's program in `home`, then pack its files."""
    # Orphans become children of this process, which must not be dumpable, so that no other can trace it.
    call("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    Path("/proc/self/oom_score_adj").write_text("1000")
    call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    started = os.fork()
    if not started:
        exec_program(order, home, user)
    status, stopped = watch(order, started)
    left_out = pack(order, home)
    return {"exit_code": os.waitstatus_to_exitcode(status), "stopped": stopped, "left_out": left_out}


def exec_program(order: Order, home: str, user: tuple[int, int] | None) -> NoReturn:
    """Apply limits to this process, and exec the order's program."""
    try:
        os.setsid()
        if user and os.getuid() == 0:
            os.setgroups([])
            os.setresgid(user[1], user[1], user[1])
            os.setresuid(user[0], user[0], user[0])
        call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        call("prctl", PR_SET_DUMPABLE, 1, 0, 0, 0)  # the parent measures its memory
        call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        os.umask(0o077)
        for descriptor in order["files_in"]:
            unpack(descriptor, home)
        os.chdir(home)
        # SIGXCPU at the soft limit shows the reason; a process that ignores it is killed at the hard limit.
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
        join_new_keyring()
        filter_calls(bytes.fromhex(order["filter"]))
        os.execve(order["command"][0], order["command"], order["env"] | {"PWD": home})  # noqa: S606
    except Exception as error:  # noqa: BLE001 a forked child must not return
        send_report(order, {"failure": f"{type(error).__name__}: {error}"})
    os._exit(127)


def join_new_keyring() -> None:
    """Join a new session keyring, if the kernel has keyrings."""
    if libc.syscall(SYS_KEYCTL[os.uname().machine], KEYCTL_JOIN_SESSION_KEYRING, None) < 0:
        error = ctypes.get_errno()
        # Docker refuses keyctl with EPERM; our filter refuses it too.
        if error not in (errno.ENOSYS, errno.EPERM):
            raise OSError(error, f"keyctl: {os.strerror(error)}")


class FilterProgram(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def filter_calls(program: bytes) -> None:
    """Filter the system calls of this process and its future children."""
    call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(FilterProgram(len(program) // 8, program)), 0, 0)


def watch(order: Order, started: int) -> tuple[int, str]:
    """Wait for the program, stop it at a limit, and kill all processes. Returns its wait status, and why it was stopped."""
    stopped = ""
    deadline = time.monotonic() + order["wall_s"]
    while (status := reap(started)) is None:
        if time.monotonic() > deadline:
            stopped = "time"
        elif order["namespaces"] and memory_used(order) > order["memory_bytes"]:
            stopped = "memory"
        if stopped:
            os.kill(started, signal.SIGKILL)
            status = os.waitpid(started, 0)[1]
            break
        signal.sigtimedwait({signal.SIGCHLD}, STEP_S)
    while kill_descendants(in_namespace=order["namespaces"]):
        signal.sigtimedwait({signal.SIGCHLD}, STEP_S)
    return status, stopped


def reap(started: int) -> int | None:
    """Reap exited children; returns the program's wait status if it is one of them."""
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == started:
            return status
        if not pid:
            return None


def kill_descendants(*, in_namespace: bool) -> bool:
    """Kill and reap the remaining processes; False if there are none."""
    if in_namespace:
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)  # all in the namespace but this process
    else:
        for pid in Path("/proc/thread-self/children").read_text().split():
            os.kill(int(pid), signal.SIGKILL)  # not reaped yet, so the id is valid; its children become ours
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def memory_used(order: Order) -> int:
    """Bytes of memory of all other processes in the namespace, and of the kernel for them."""
    used = order["memory_bytes"] + 1 if too_many_locks() else 0
    descriptors: set[str] = set()
    for path in Path("/proc").iterdir():
        if path.name.isdigit() and path.name != "1":
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it exited
                used += memory_of(path, descriptors, order)
    sockets = sum(one.startswith("socket:") for one in descriptors)
    if not order["network"]:  # also those in messages, which belong to no process
        sockets = int(Path("/proc/net/sockstat").read_text().split()[2])
    held = sum(size for one in descriptors for kind, size in DESCRIPTOR_BYTES.items() if one.startswith(kind))
    return used + held + sockets * order["socket_bytes"]


def too_many_locks() -> bool:
    """Whether the namespace has more than LOCKS_MAX locks; counting all of them could take long."""
    count = 0
    with Path("/proc/locks").open("rb", buffering=0) as file:
        while count <= LOCKS_MAX and (chunk := file.read(64 * 1024)):
            count += chunk.count(b"\n")
    return count > LOCKS_MAX


def memory_of(process: Path, descriptors: set[str], order: Order) -> int:
    """Bytes of one process; adds the targets of its descriptors to `descriptors`."""
    found = [0]
    for task in (process / "task").iterdir():  # the first may have exited, and each may have its own descriptors
        lines = map(str.split, (task / "status").read_text().splitlines())
        found.append(sum(int(line[1]) * 1024 for line in lines if line and line[0] in COUNTED))
        try:
            descriptors.update(os.readlink(one.path) for one in os.scandir(task / "fd"))  # noqa: PTH115 not paths
        except FileNotFoundError:
            continue  # closed
        except PermissionError:  # an executable that its user can't read
            found[0] = order["open_files"] * order["socket_bytes"]
    return found[0] + max(found[1:], default=0)


def unpack(descriptor: int, home: str) -> None:
    """Unpack an archive into `home`; its names are checked when it is packed."""
    with os.fdopen(descriptor, "rb") as file, tarfile.open(fileobj=file) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11 has it since 3.11.4
        archive.extractall(home)  # noqa: S202 (our own archive, unpacked in isolation)


def pack(order: Order, home: str) -> int:
    """Archive the regular files below `home` in `files_out`; returns how many were left out."""
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
    """Whether a file's name is UTF-8, and short enough for the archive."""
    try:
        return len(name.encode()) <= 1000
    except UnicodeEncodeError:
        return False


def call(name: str, *arguments: Any) -> None:
    """Call a function of the C library. Raises OSError."""
    if getattr(libc, name)(*arguments) < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")


if __name__ == "__main__":
    main()
