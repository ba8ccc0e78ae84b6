"""What waits at a listening socket is accepted before it closes, for so long."""

import asyncio
import socket

from app.http import listener


async def test_those_that_nobody_accepts_are_waited_for_only_so_long(monkeypatch):
    monkeypatch.setattr(listener, "ACCEPT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.create_connection(listening.getsockname()):
        async with asyncio.timeout(20):
            await listener.accept_last(listening)


async def test_a_socket_that_does_not_say_who_waits_holds_nothing_up():
    with socket.socket(socket.AF_UNIX) as other:
        await listener.accept_last(other)
