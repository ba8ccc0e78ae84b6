"""What waits at a listening socket is accepted before it closes, for so long."""

import asyncio
import socket

import pytest

from app.http import listener

SO_LOCK_FILTER = 44
"""Linux' number, which the socket module does not have."""


async def test_those_that_nobody_accepts_are_waited_for_only_so_long(monkeypatch):
    monkeypatch.setattr(listener, "ACCEPT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.create_connection(listening.getsockname()):
        async with asyncio.timeout(20):
            await listener.accept_last(listening)


async def test_a_socket_that_does_not_say_who_waits_holds_nothing_up():
    with socket.socket(socket.AF_UNIX) as other:
        await listener.accept_last(other)


async def test_a_socket_that_takes_no_filter_is_waited_for_all_the_same():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setsockopt(socket.SOL_SOCKET, SO_LOCK_FILTER, 1)
        with pytest.raises(PermissionError):
            listener._drop_new(listening)
        await listener.accept_last(listening)
