"""The filter of system calls, run as the kernel runs it, for machines that this one is not, too."""

import struct

import pytest

from app.toolservers.seccomp import AF_INET, AF_INET6, ALLOW, ERRNO, KILL, MACHINES, filter_for

EPERM, ENOSYS, EAFNOSUPPORT = ERRNO | 1, ERRNO | 38, ERRNO | 97
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
CALLS = {
    "x86_64": {"read": 0, "mmap": 9, "socket": 41, "socketpair": 53, "setsockopt": 54, "clone": 56, "ptrace": 101}
    | {"keyctl": 250, "unshare": 272, "memfd_create": 319, "io_uring_setup": 425, "clone3": 435, "openat2": 437},
    "aarch64": {
        "read": 63,
        "mmap": 222,
        "socket": 198,
        "socketpair": 199,
        "setsockopt": 208,
        "clone": 220,
        "ptrace": 117,
    }
    | {"keyctl": 219, "unshare": 97, "memfd_create": 279, "io_uring_setup": 425, "clone3": 435, "openat2": 437},
}
"""Written down once more, from the kernel's tables."""


def verdict(machine: str, call: int, *arguments: int, audit: int = 0) -> int:
    """What the kernel would do. Raises if the filter is one that it would not take."""
    code = [*struct.iter_unpack("<HBBI", filter_for(machine))]
    given = struct.pack("<IIQ6Q", call, audit or AUDIT[machine], 0, *arguments, *[0] * (6 - len(arguments)))
    at, value = 0, 0
    while True:
        operation, if_true, if_false, operand = code[at]
        at += 1
        match operation:
            case 0x20:
                (value,) = struct.unpack_from("<I", given, operand)
            case 0x54:
                value &= operand
            case 0x06:
                return operand
            case 0x15 | 0x35 | 0x45:
                true = {0x15: value == operand, 0x35: value >= operand, 0x45: bool(value & operand)}[operation]
                at += if_true if true else if_false
            case _:
                raise AssertionError(operation)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(
    ("call", "arguments", "expected"),
    [
        ("read", (), ALLOW),
        ("openat2", (), ALLOW),
        ("ptrace", (), EPERM),
        ("keyctl", (), EPERM),
        ("unshare", (), EPERM),
        ("memfd_create", (), EPERM),
        ("io_uring_setup", (), EPERM),
        ("clone3", (), ENOSYS),
        ("clone", (0x3D0F00,), ALLOW),  # a thread
        ("clone", (0x11,), ALLOW),  # a process
        ("clone", (0x10000011,), EPERM),
        ("clone", (0x40000000,), EPERM),
        ("mmap", (0, 4096, 3, 0x22), ALLOW),  # private, anonymous
        ("mmap", (0, 4096, 3, 0x01), ALLOW),  # of a file, shared
        ("mmap", (0, 4096, 3, 0x21), EPERM),
        ("mmap", (0, 4096, 3, 0x23), EPERM),  # shared, and validated
        ("mmap", (0, 4096, 3, 0x40022), EPERM),  # huge pages
        ("socket", (AF_INET, 1), ALLOW),
        ("socket", (AF_INET6, 2), ALLOW),
        ("socket", (1, 1), EAFNOSUPPORT),
        ("socket", (40, 1), EAFNOSUPPORT),
        ("socket", (16, 3), EAFNOSUPPORT),
        ("socket", (1 << 32 | AF_INET, 1), ALLOW),  # the kernel looks at the lower half, too
        ("socketpair", (1, 1), ALLOW),
        ("socketpair", (1, 0x80801), ALLOW),  # a stream, with flags
        ("socketpair", (1, 5), ALLOW),
        ("socketpair", (1, 2), EAFNOSUPPORT),
        ("socketpair", (30, 1), EAFNOSUPPORT),
        ("setsockopt", (3, 1, 7), ERRNO),  # as if it had been done
        ("setsockopt", (3, 1, 33), ERRNO),
        ("setsockopt", (3, 1, 2), ALLOW),
        ("setsockopt", (3, 6, 7), ALLOW),  # of another protocol
    ],
)
def test_each_call_has_its_verdict(machine: str, call: str, arguments: tuple[int, ...], expected: int) -> None:
    assert verdict(machine, CALLS[machine][call], *arguments) == expected


@pytest.mark.parametrize("machine", MACHINES)
def test_calls_of_another_architecture_kill(machine: str) -> None:
    for audit in (0x40000003, 0x40000028, *({*AUDIT.values()} - {AUDIT[machine]})):
        assert verdict(machine, CALLS[machine]["read"], audit=audit) == KILL


def test_calls_of_x32_kill() -> None:
    assert verdict("x86_64", 0x40000000) == KILL
    assert verdict("x86_64", 0x40000000 + 520) == KILL


@pytest.mark.parametrize("machine", MACHINES)
def test_the_kernel_takes_it(machine: str) -> None:
    """It has a limit, and every way through it ends with a verdict."""
    assert len(filter_for(machine)) // 8 <= 4096
    assert {verdict(machine, call) for call in range(600)} == {ALLOW, EPERM, ENOSYS, EAFNOSUPPORT}
