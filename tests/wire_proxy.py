"""A proxy between a server and its Postgres or Redis: it counts requests, and can lose an answer."""

import asyncio
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

Parse = Callable[[bytes], tuple[list[str], bytes]]
"""Bytes of a client → the requests in them, and the incomplete rest."""

SSL_ASKED = struct.pack("!II", 8, 80877103)


def postgres(data: bytes) -> tuple[list[str], bytes]:
    """Statements are `Q` (simple) and `E` (execute); `S` is the end of a round trip. See Postgres' "Message Formats"."""
    found = []
    while len(data) >= 5:
        begins = 0 if data[0] == 0 else 1  # a connection's first message has no type
        (length,) = struct.unpack_from("!I", data, begins)
        if len(data) < begins + length:
            break
        found.append(chr(data[0]) if begins else "startup")
        data = data[begins + length :]
    return found, data


def redis(data: bytes) -> tuple[list[str], bytes]:
    """The names of commands, which are arrays of bulk strings."""
    found = []
    while data:
        words, rest = [], data
        head, line_ends, rest = rest.partition(b"\r\n")
        for _ in range(int(head[1:]) if line_ends else 0):
            size, line_ends, rest = rest.partition(b"\r\n")
            if not line_ends or len(rest) < int(size[1:]) + 2:
                line_ends = b""
                break
            words.append(rest[: int(size[1:])])
            rest = rest[int(size[1:]) + 2 :]
        if not line_ends:
            break
        found.append(words[0].decode().upper())
        data = rest
    return found, data


class Statements:
    """The prepared statements of one connection to Postgres."""

    def __init__(self) -> None:
        self._rest = b""
        self._texts: dict[bytes, bytes] = {}

    def run(self, data: bytes) -> list[bytes]:
        """The texts of statements that these bytes of the client execute."""
        self._rest += data
        texts = []
        while len(self._rest) >= 5:
            begins = 0 if self._rest[0] == 0 else 1
            (length,) = struct.unpack_from("!I", self._rest, begins)
            if len(self._rest) < begins + length:
                break
            kind, body = self._rest[:begins], self._rest[begins + 4 : begins + length]
            self._rest = self._rest[begins + length :]
            if kind == b"Q":
                texts.append(body)
            elif kind == b"P":
                name, text = body.split(b"\0")[:2]
                self._texts[name] = text
            elif kind == b"B":
                texts.append(self._texts.get(body.split(b"\0")[1], b""))
        return texts


class WireProxy:
    """Listens on a unix socket, passes everything on to another, and counts. A context manager."""

    def __init__(self, target: Path, name: str, parse: Parse) -> None:
        """`name` is that of the socket, which lies in `directory`."""
        self._target, self._parse = target, parse
        self._home = tempfile.TemporaryDirectory(prefix="tap-")  # short: a socket's address holds about 100 bytes
        self.directory = Path(self._home.name)
        self.path = self.directory / name
        self.requests: list[str] = []
        self.bytes = 0
        self._to_lose: bytes | None = None
        self.lost = 0
        """How many answers were lost."""

    def lose_answer_of(self, text: str) -> None:
        """Pass the next statement with this text on to Postgres, and break the connection off in the place of its answer."""
        self._to_lose = text.encode()

    @contextmanager
    def counting(self) -> Iterator[Self]:
        """What is asked in the block."""
        self.requests, self.bytes = [], 0
        yield self

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        listening = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(listening,), daemon=True)
        self._thread.start()
        assert listening.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(10)
        self._home.cleanup()

    def _run(self, listening: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve(listening))
        self._loop.close()

    async def _serve(self, listening: threading.Event) -> None:
        self._ended = asyncio.Event()
        passing: set[asyncio.Task[None]] = set()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            passing.add(asyncio.current_task())  # type: ignore[arg-type]
            theirs, ours = await asyncio.open_unix_connection(self._target)
            doomed = asyncio.Event()
            try:
                await asyncio.gather(
                    self._pass(reader, ours, self._parse, doomed), self._pass(theirs, writer, None, doomed)
                )
            finally:
                ours.close()
                writer.close()

        server = await asyncio.start_unix_server(accept, self.path)
        listening.set()
        await self._ended.wait()
        server.close()
        for task in passing:
            task.cancel()
        await asyncio.gather(*passing, return_exceptions=True)

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, parse: Parse | None, doomed: asyncio.Event
    ) -> None:
        rest, statements = b"", Statements()
        while data := await reader.read(65536):
            if parse and data != SSL_ASKED:
                self.bytes += len(data)
                found, rest = parse(rest + data)
                self.requests += found
                if parse is postgres and any(self._is_to_lose(text) for text in statements.run(data)):
                    doomed.set()
            elif doomed.is_set():
                self.lost += 1
                break
            writer.write(data)
        writer.close()

    def _is_to_lose(self, text: bytes) -> bool:
        if self._to_lose is None or self._to_lose not in text:
            return False
        self._to_lose = None
        return True
