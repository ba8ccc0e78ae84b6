"""The HTTP side: connections, the two transports, and the routes for tests."""

import asyncio
import concurrent.futures
import gzip
import json
import threading
import uuid
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from tests.threaded import Threaded
from tests.toolserver.tools import Call, Cut, Endless, Gone, Script, Session, Status

NOISE = {"jsonrpc": "2.0", "method": "notifications/message", "params": {"level": "info", "data": "x"}}


@dataclass(eq=False)
class Request:
    """One HTTP request that arrived."""

    server: str
    method: str
    path: str
    options: dict[str, str]
    headers: dict[str, str]
    body: Any = None
    status: int | None = None


@dataclass(eq=False)
class Connection:
    """One HTTP/1.1 connection, of which one request at a time is answered."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    streaming: bool = False
    ahead: bytes = b""

    async def read(self) -> Request | None:
        """The next request; None at the end."""
        try:
            head = (self.ahead + await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        self.ahead = b""
        first, *lines = head.rstrip().split("\r\n")
        method, target, _ = first.split(" ")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        body = await self.reader.readexactly(int(headers.get("content-length", "0")))
        parts = urlsplit(target)
        words = parts.path.strip("/").split("/")
        server = words[1] if len(words) > 1 else ""
        options = dict(parse_qsl(parts.query))
        return Request(server, method, words[0], options, headers, json.loads(body) if body else None)

    async def left(self) -> None:
        """Returns when the peer disconnects; a byte of its next request is kept."""
        try:
            self.ahead = await self.reader.read(1)
        except ConnectionError:
            return
        if self.ahead:
            await asyncio.Event().wait()

    async def whole(self, request: Request, status: int, body: object = None, **headers: str) -> None:
        """A complete answer."""
        request.status = status
        data = b"" if body is None else json.dumps(body).encode()
        if headers.get("content_encoding") == "gzip":
            data = gzip.compress(data)
        lines = {"content-type": "application/json", "content-length": str(len(data)), **headers}
        self.writer.write(_head(status, lines) + data)
        await self.writer.drain()

    async def event(self, request: Request, data: str, event: str = "message", **headers: str) -> None:
        """One event of a stream; the head goes before the first."""
        if not self.streaming:
            self.streaming, request.status = True, 200
            self.writer.write(
                _head(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked", **headers})
            )
        piece = f"event: {event}\ndata: {data}\n\n".encode()
        self.writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        await self.writer.drain()

    async def end(self) -> None:
        """The end of a stream."""
        self.writer.write(b"0\r\n\r\n")
        await self.writer.drain()
        self.streaming = False


def _head(status: int, headers: dict[str, str]) -> bytes:
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status} Scripted\r\n{lines}\r\n".encode("latin-1")


class Toolserver(Threaded):
    """The server, in a thread and loop of its own; every public method may be called from any thread."""

    def __init__(self, *, port: int = 0, record: str = "") -> None:
        super().__init__(port)
        self.script = Script(record)
        self.requests: list[Request] = []
        self.connections = 0
        self._quiet = threading.Event()
        self._open: dict[str, Session] = {}
        self._streams: dict[str, asyncio.Queue[dict[str, Any] | None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def url(self, transport: str = "mcp", name: str = "any", **options: object) -> str:
        """Where to find it: over `mcp`, `json` or `sse`, under a name of the test's, with options."""
        query = f"?{urlencode(options)}" if options else ""
        return f"http://127.0.0.1:{self.port}/{transport}/{name}{query}"

    def calls(self, name: str = "any", tool: str = "") -> list[Call]:
        """The calls that arrived under a name, in their order."""
        return [call for call in self.script.calls if call.server == name and tool in {"", call.tool}]

    def asked(self, name: str = "any") -> list[Request]:
        """The HTTP requests that arrived under a name."""
        return [request for request in self.requests if request.server == name]

    def sessions(self, name: str = "any") -> list[Session]:
        """The sessions that were opened under a name; closed ones say so."""
        return [session for session in self.script.sessions if session.server == name]

    def open(self, gate: str) -> None:
        """Open a gate for those who wait and those who will come."""
        self._loop.call_soon_threadsafe(self.script.gate(gate).opened.set)

    def wait_reached(self, gate: str, timeout_s: float = 5.0) -> None:
        """Block until a call has come to the gate."""
        if not self.script.gate(gate).reached.wait(timeout_s):
            raise TimeoutError(f"no call came to gate {gate!r} within {timeout_s} s")

    async def until_reached(self, gate: str, timeout_s: float = 5.0) -> None:
        """The same for a coroutine."""
        await asyncio.to_thread(self.wait_reached, gate, timeout_s)

    async def until_quiet(self, timeout_s: float = 5.0) -> bool:
        """Wait in a coroutine until all connections that there were have ended; False if one has not."""
        return await asyncio.to_thread(self._quiet.wait, timeout_s)

    async def serve(self, ready: concurrent.futures.Future[None]) -> None:
        """Listen in the running loop until `stop`; all sessions are forgotten."""
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        self._open, self._streams = {}, {}
        server = await asyncio.start_server(
            lambda reader, writer: self._begin(self._converse(Connection(reader, writer))),
            "127.0.0.1",
            self.port,
            limit=2**26,
        )
        self.port = server.sockets[0].getsockname()[1]
        ready.set_result(None)
        await self._stopping.wait()
        server.close()
        left = list(self._tasks)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _converse(self, connection: Connection) -> None:
        self.connections += 1
        self._quiet.clear()
        try:
            while (request := await connection.read()) is not None:
                self.requests.append(request)
                answering = asyncio.create_task(self._answer(connection, request))
                leaving = asyncio.create_task(connection.left())
                try:
                    await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    leaving.cancel()
                    answering.cancel()  # No matter if it is done; if not, the peer has left.
                    await asyncio.wait({answering, leaving})
                if answering.cancelled():
                    return
                answering.result()
        except (Cut, ConnectionError):
            pass  # That is what was asked for, or what the peer did.
        finally:
            connection.writer.transport.abort()
            self.connections -= 1
            if not self.connections:
                self._quiet.set()

    async def _answer(self, connection: Connection, request: Request) -> None:
        match request.method, request.path:
            case "GET", "calls":
                await connection.whole(request, 200, [call.as_json() for call in self.script.calls])
            case "GET", "sessions":
                found = [
                    {"server": one.server, "id": one.id, "closed": one.closed.is_set()} for one in self.script.sessions
                ]
                await connection.whole(request, 200, found)
            case "GET", "gates":
                await connection.whole(request, 200, {"reached": self.script.gate(request.server).reached.is_set()})
            case "POST", "gates":
                self.script.gate(request.server).opened.set()
                await connection.whole(request, 200, {"opened": request.server})
            case "DELETE", "gates":
                self.script.gates.pop(request.server, None)
                await connection.whole(request, 200, {"shut": request.server})
            case _, "mcp" | "json" | "sse" | "messages":
                await self._answer_client(connection, request)
            case _:
                await connection.whole(request, 404, {"error": "nothing here"})

    async def _answer_client(self, connection: Connection, request: Request) -> None:
        options = request.options
        if "redirect" in options:
            await connection.whole(request, 307, location=options["redirect"])
        elif "auth" in options and request.headers.get("authorization") != f"Bearer {options['auth']}":
            await connection.whole(request, 401, {"error": "who are you?"}, www_authenticate="Bearer")
        elif "status" in options and request.method == "POST":
            await connection.whole(request, int(options["status"]), {"error": "not today"})
        elif request.path == "sse":
            await self._stream(connection, request)
        elif request.path == "messages":
            await self._take(connection, request)
        elif request.method == "POST":
            await self._exchange(connection, request)
        else:
            await self._manage(connection, request)

    async def _exchange(self, connection: Connection, request: Request) -> None:
        """Streamable HTTP: a message, and its answer on the same request."""
        message = request.body
        greeting = message.get("method") == "initialize"
        if greeting or "modern" in request.options:
            session = self._new_session(request)
        elif (found := self._open.get(request.headers.get("mcp-session-id", ""))) is not None:
            session = found
        else:
            await connection.whole(request, 404, {"error": "unknown session"})
            return
        headers = {"mcp-session-id": session.id} if greeting and "modern" not in request.options else {}

        async def send(beside: dict[str, Any]) -> None:
            await connection.event(request, json.dumps(beside), **headers)

        try:
            answer = await self.script.answer(session, message, request.headers, send)
        except Status as wish:
            await connection.whole(request, wish.args[0], {"error": "scripted"})
        except Gone:
            del self._open[session.id]
            await connection.whole(request, 404, {"error": "unknown session"})
        except Endless:
            await self._go_on(connection, request)
        else:
            await self._reply(connection, request, answer, headers)

    async def _reply(
        self, connection: Connection, request: Request, answer: dict[str, Any] | None, headers: dict[str, str]
    ) -> None:
        if answer is None:
            await connection.whole(request, 202)
        elif "modern" in request.options and "error" in answer:
            await connection.whole(request, 400, answer)
        elif request.path == "mcp":
            await connection.event(request, json.dumps(answer), **headers)
            await connection.end()
        elif "packed" in request.options and request.body["method"] == "tools/call":
            await connection.whole(request, 200, answer, content_encoding="gzip")
        else:
            await connection.whole(request, 200, answer, **headers)

    async def _go_on(self, connection: Connection, request: Request) -> None:
        """Endless notifications, or endless white space before an answer."""
        if request.path == "json":
            connection.writer.write(_head(200, {"content-type": "application/json", "transfer-encoding": "chunked"}))
        while True:
            if request.path == "json":
                connection.writer.write(b"1000\r\n" + b" " * 4096 + b"\r\n")
                await connection.writer.drain()
            else:
                await connection.event(request, json.dumps(NOISE))

    async def _manage(self, connection: Connection, request: Request) -> None:
        """Streamable HTTP: the stream beside the answers, and the end of a session."""
        session = self._open.get(request.headers.get("mcp-session-id", ""))
        if session is None:
            await connection.whole(request, 404, {"error": "unknown session"})
        elif request.method == "DELETE":
            await self.script.wait_at(request.options.get("goodbye"))
            del self._open[session.id]
            session.close()
            await connection.whole(request, 200)
        else:
            await connection.event(request, "", "ping")
            await session.ending.wait()
            await connection.end()

    async def _stream(self, connection: Connection, request: Request) -> None:
        """HTTP+SSE: the one stream on which all answers come."""
        if request.method != "GET":
            await connection.whole(request, 405, {"error": "GET only"})
            return
        session = self._new_session(request)
        queue = self._streams[session.id] = asyncio.Queue(100)
        where = urlencode({**request.options, "session": session.id})
        address = f"{request.options.get('endpoint', '')}/messages/{session.server}?{where}"
        await connection.event(request, address, "endpoint")
        try:
            while (message := await queue.get()) is not None:
                await connection.event(request, json.dumps(message))
            raise Cut
        finally:
            session.close()
            del self._streams[session.id], self._open[session.id]

    async def _take(self, connection: Connection, request: Request) -> None:
        """HTTP+SSE: a message, whose answer comes on the stream."""
        session = self._open.get(request.options.get("session", ""))
        if session is None:
            await connection.whole(request, 404, {"error": "unknown session"})
            return
        match request.body:
            case {"method": "tools/call", "params": {"name": "status", "arguments": {"status": int(status)}}}:
                await connection.whole(request, status, {"error": "scripted"})
            case _:
                await connection.whole(request, 202)
                self._begin(self._answer_on_stream(session, request))

    async def _answer_on_stream(self, session: Session, request: Request) -> None:
        queue = self._streams[session.id]
        try:
            answer = await self.script.answer(session, request.body, request.headers, queue.put)
        except (Cut, Gone):
            await queue.put(None)
        except Endless:
            while True:
                await queue.put(NOISE)
        else:
            if answer is not None:
                await queue.put(answer)

    def _new_session(self, request: Request) -> Session:
        session = Session(uuid.uuid4().hex, request.server, request.options)
        self.script.sessions.append(session)
        self._open[session.id] = session
        return session
