"""The listening socket, and how it stops: what waits to be accepted is accepted first."""

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
"""For clients that have seen the server's half of a handshake and have yet to send theirs."""

ACCEPT_S = 2.0
"""The longest wait for all to be accepted: without the filter new ones may come for ever."""

SO_ATTACH_FILTER = 26
TCP_SYN = 0x02
_REFUSE_SYN = (
    (0x30, 0, 0, 13),  # load the byte of the TCP flags
    (0x45, 0, 1, TCP_SYN),  # is it a SYN?
    (0x06, 0, 0, 0),  # then drop it
    (0x06, 0, 0, 0xFFFFFFFF),  # else take all of it
)
"""A packet filter, as (code, jump if true, jump if false, operand)."""


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
    """Return when all that have connected are accepted, and no more will: to close a socket resets those that wait at it.

    Only Linux can do that, and where it lets nobody but root, those who come at the last moment may be reset. A client that comes
    meanwhile asks again within a second, and then meets another process or none.
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
    """How many connections wait to be accepted: that is what `tcpi_unacked` of a listening socket means."""
    await asyncio.sleep(0)  # the loop accepts meanwhile
    (count,) = struct.unpack_from("I", listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 28), 24)
    return int(count)
