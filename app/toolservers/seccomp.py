"""The system calls that isolated code may not make: a seccomp filter in classic BPF.

It closes gaps of namespaces and resource limits:

- memory that belongs to no process: `memfd_create`, System V and POSIX queues and segments, shared anonymous mappings (whose pages
  remain when they are unmapped), huge pages, pages in pipes, rings of io_uring and perf. `isolation.py` measures the rest;
- keys of the host's user, which no namespace isolates;
- sockets other than those of the internet protocols, which the network namespace isolates. `socketpair` is allowed for streams, which
  asyncio and multiprocessing need, and which can't be connected to other sockets;
- namespaces, mounts, tracing, and other calls that computations do not need and exploits use.

It is a deny list, since any Python with any packages must run. Calls of another architecture (32 bits, x32) kill the process.
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
EPERM, ENOSYS, EAFNOSUPPORT = 1, 38, 97
LOAD, EQUAL, AT_LEAST, ANY_BIT, AND, RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06  # BPF's operations on 32 bits
NUMBER, ARCHITECTURE = 0, 4  # where they stand in `struct seccomp_data`

AF_UNIX, AF_INET, AF_INET6 = 1, 2, 10
SOCK_STREAM, SOCK_SEQPACKET, SOCK_TYPE = 1, 5, 0xF
SOL_SOCKET = 1
SO_BUFFERS = (7, 8, 32, 33)  # SO_SNDBUF, SO_RCVBUF, and the same with force
MAP_SHARED, MAP_ANONYMOUS, MAP_HUGETLB = 1, 0x20, 0x40000
NEW_NAMESPACES = 0x20000 | 0x2000000 | 0x4000000 | 0x8000000 | 0x10000000 | 0x20000000 | 0x40000000


class Machine(NamedTuple):
    """System call numbers of an architecture; little-endian only."""

    audit: int
    other_from: int  # numbers from here on belong to another architecture; 0: none do
    clone: int
    mmap: int
    socket: int
    socketpair: int
    setsockopt: int
    refused: tuple[int, ...]


NEW = (*range(425, 434), 438, 442, 443, 444, 445, 446, 447, 467)
"""The same on every architecture: io_uring_* (425-427), open_tree, move_mount, fsopen, fsconfig, fsmount, fspick (428-433), pidfd_getfd,
mount_setattr, quotactl_fd, landlock_* (whose rules are memory that belongs to no process), memfd_secret, open_tree_attr."""

CLONE3 = 435
"""A filter can't read its flags; with ENOSYS the C library falls back on clone."""

MACHINES = {
    "x86_64": Machine(
        audit=0xC000003E,
        other_from=0x40000000,
        clone=56,
        mmap=9,
        socket=41,
        socketpair=53,
        setsockopt=54,
        refused=(
            *(319, 29, 30, 31, 67, 64, 68, 240),  # memfd_create; shmget, shmat, shmctl, shmdt, semget, msgget, mq_open
            *(278, 206, 323, 298, 321),  # vmsplice, io_setup, userfaultfd, perf_event_open, bpf
            *(248, 249, 250),  # add_key, request_key, keyctl
            *(272, 308, 165, 166, 155, 161),  # unshare, setns, mount, umount2, pivot_root, chroot
            *(101, 310, 311, 312),  # ptrace, process_vm_readv, process_vm_writev, kcmp
            *(303, 304, 300),  # name_to_handle_at, open_by_handle_at, fanotify_init
            *(
                134,
                153,
                154,
                163,
                167,
                168,
                169,
                172,
                173,
            ),  # uselib, vhangup, modify_ldt, acct, swap*, reboot, iopl, ioperm
            *(175, 313, 176, 246, 320),  # init_module, finit_module, delete_module, kexec_load, kexec_file_load
            *(103, 135, 159, 164, 179, 212, 227, 305),  # syslog, personality, clocks, quotactl, lookup_dcookie
        ),
    ),
    "aarch64": Machine(
        audit=0xC00000B7,
        other_from=0,
        clone=220,
        mmap=222,
        socket=198,
        socketpair=199,
        setsockopt=208,
        refused=(
            *(279, 194, 196, 195, 197, 190, 186, 180),  # in the same order
            *(75, 0, 282, 241, 280),
            *(217, 218, 219),
            *(97, 268, 40, 39, 41, 51),
            *(117, 270, 271, 272),
            *(264, 265, 262),
            *(58, 89, 224, 225, 142),
            *(105, 273, 106, 104, 294),
            *(116, 92, 171, 170, 60, 18, 112, 266),
        ),
    ),
}


def filter_for(machine: str) -> bytes:
    """The program, as an array of `struct sock_filter`. Raises KeyError for an unknown machine (`os.uname().machine`)."""
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in _instructions(MACHINES[machine]))


Instruction = tuple[int, int, int, int]
"""An operation, how many instructions to skip if it is true and if it is not, and its operand."""


def _instructions(machine: Machine) -> Iterator[Instruction]:
    yield _load(ARCHITECTURE)
    yield from _unless(EQUAL, machine.audit, KILL)
    yield _load(NUMBER)
    if machine.other_from:
        yield from _when(AT_LEAST, machine.other_from, KILL)
    for number in (*machine.refused, *NEW):
        yield from _when(EQUAL, number, ERRNO | EPERM)
    yield from _when(EQUAL, CLONE3, ERRNO | ENOSYS)
    yield from _for_call(machine.clone, [_argument(0), *_when(ANY_BIT, NEW_NAMESPACES, ERRNO | EPERM)])
    shared_anonymous = MAP_SHARED | MAP_ANONYMOUS
    yield from _for_call(
        machine.mmap,
        [
            _argument(3),
            *_when(ANY_BIT, MAP_HUGETLB, ERRNO | EPERM),
            (AND, 0, 0, shared_anonymous),
            *_when(EQUAL, shared_anonymous, ERRNO | EPERM),
        ],
    )
    yield from _for_call(machine.socket, [_argument(0), *_only((AF_INET, AF_INET6))])
    yield from _for_call(
        machine.socketpair,
        [
            _argument(0),
            *_unless(EQUAL, AF_UNIX, ERRNO | EAFNOSUPPORT),
            _argument(1),
            (AND, 0, 0, SOCK_TYPE),
            *_only((SOCK_STREAM, SOCK_SEQPACKET)),
        ],
    )
    # Return 0 without effect, as the kernel does for a size over its limit: a buffer keeps the size that isolation.py counts.
    buffers = [one for option in SO_BUFFERS for one in _when(EQUAL, option, ERRNO)]
    yield from _for_call(machine.setsockopt, [_argument(1), *_unless(EQUAL, SOL_SOCKET, ALLOW), _argument(2), *buffers])
    yield (RETURN, 0, 0, ALLOW)


def _load(offset: int) -> Instruction:
    return (LOAD, 0, 0, offset)


def _argument(index: int) -> Instruction:
    """Load an argument's lower half: the kernel ignores the upper half of those checked here."""
    return _load(16 + 8 * index)


def _when(test: int, operand: int, verdict: int) -> list[Instruction]:
    """Return this verdict if the test is true."""
    return [(test, 0, 1, operand), (RETURN, 0, 0, verdict)]


def _unless(test: int, operand: int, verdict: int) -> list[Instruction]:
    """Return this verdict unless the test is true."""
    return [(test, 1, 0, operand), (RETURN, 0, 0, verdict)]


def _only(allowed: tuple[int, int]) -> list[Instruction]:
    """Refuse all but two values."""
    first, second = allowed
    return [(EQUAL, 2, 0, first), (EQUAL, 1, 0, second), (RETURN, 0, 0, ERRNO | EAFNOSUPPORT)]


def _for_call(number: int, rules: list[Instruction]) -> list[Instruction]:
    """Rules for one system call, allowed by default."""
    return [(EQUAL, 0, len(rules) + 1, number), *rules, (RETURN, 0, 0, ALLOW)]
