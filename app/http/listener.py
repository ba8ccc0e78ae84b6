"""The listening socket. Connections in its backlog are accepted before it closes."""

import asyncio
import contextlib
import ctypes
import socket
import struct
import sys

from app.settings import Settings, SettingsError

BACKLOG = 2_048
"""Connections that may wait to be accepted."""

HANDSHAKE_S = 0.1
"""For clients in the middle of a TCP handshake."""

ACCEPT_S = 2.0
"""The longest wait for an empty backlog: without the filter new connections may keep coming."""

SO_ATTACH_FILTER = 26
TCP_SYN = 0x02
_REFUSE_SYN = (
    (0x30, 0, 0, 13),  # load the byte of the TCP flags
    (0x45, 0, 1, TCP_SYN),  # is it a SYN?
    (0x06, 0, 0, 0),  # then drop it
    (0x06, 0, 0, 0xFFFFFFFF),  # else take all of it
)
"""A packet filter in classic BPF: (code, jump if true, jump if false, operand)."""


def listen(settings: Settings) -> socket.socket:
    """Raises SettingsError."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server(
            (settings.host, settings.port), family=family, backlog=BACKLOG, reuse_port=settings.reuse_port
        )
    except OSError as error:
        why = str(error.strerror or error).partition(" (")[0]
        raise SettingsError(f"can't listen on {settings.host}:{settings.port}: {why}.") from None


async def accept_last(listener: socket.socket) -> None:
    """Drop new SYNs, and return when the backlog is empty: closing a socket resets the connections in its backlog.

    Only Linux can do that; where it needs root, connections of the last moment may be reset. A client whose SYN is dropped
    sends it again within a second, and reaches another process or none.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError):
        _drop_new(listener)
    with contextlib.suppress(OSError):  # TimeoutError is one
        async with asyncio.timeout(ACCEPT_S):
            await asyncio.sleep(HANDSHAKE_S)
            while await _waiting(listener):
                pass


def _drop_new(listener: socket.socket) -> None:
    filter = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in _REFUSE_SYN))
    program = struct.pack("HP", len(_REFUSE_SYN), ctypes.addressof(filter))
    listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)


async def _waiting(listener: socket.socket) -> int:
    """The length of the backlog, which is `tcpi_unacked` of a listening socket."""
    await asyncio.sleep(0)  # the loop accepts meanwhile
    (count,) = struct.unpack_from("I", listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 28), 24)
    return int(count)
