"""The server: HTTP connections, routes, and its methods for tests."""

import asyncio
import concurrent.futures
import contextlib
import socket
import struct
import time
from collections import Counter
from collections.abc import Sequence
from typing import cast

import httptools
import msgspec

from tests.threaded import Threaded
from tests.upstream.reply import Answered, Cut, Gate, Recorded, Reply, Wire
from tests.upstream.script import Step
from tests.upstream.strictness import Refused, asked_turn, check_request, steps_of, text_of


class Connection(asyncio.Protocol):
    """One HTTP/1.1 connection. A protocol and not a stream, since that learns of a disconnect during a reply."""

    transport: asyncio.Transport

    def __init__(self, upstream: "Upstream") -> None:
        """Not connected yet."""
        self._upstream = upstream
        self._parser = httptools.HttpRequestParser(self)
        self._writable = asyncio.Event()
        self._writable.set()
        self._url, self._body = b"", bytearray()
        self._headers: dict[str, str] = {}
        self._task: asyncio.Task[None] | None = None
        self._record: Recorded | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The peer is there."""
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is one without saying so.
        self._upstream.connections.add(self)

    def data_received(self, data: bytes) -> None:
        """Bytes of a request."""
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.transport.close()

    def eof_received(self) -> bool:
        """The peer has closed; clients that only close their half are not known to us."""
        self._left()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._upstream.connections.discard(self)
        self._left()

    def pause_writing(self) -> None:
        """The peer reads slower than we write."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """The peer has caught up."""
        self._writable.set()

    async def write(self, data: bytes) -> None:
        """Write at once, in one write, and wait while the peer is slow."""
        self.transport.write(data)
        await self._writable.wait()
        await asyncio.sleep(0)  # So that two writes are two sends, and a long reply leaves the loop to others.

    def on_message_begin(self) -> None:
        """Parser: a request begins."""
        self._url, self._body, self._headers = b"", bytearray(), {}

    def on_url(self, url: bytes) -> None:
        """Parser: a part of the target."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Parser: one header."""
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, data: bytes) -> None:
        """Parser: a part of the body."""
        self._body += data

    def on_message_complete(self) -> None:
        """Parser: a whole request is there; answer it, after the one before it."""
        record = self._upstream.record(
            self._parser.get_method().decode(), self._url.decode(), self._headers, bytes(self._body)
        )
        self._task = asyncio.create_task(self._answer(record, self._task, self._parser.should_keep_alive()))

    async def _answer(self, record: Recorded, before: asyncio.Task[None] | None, keep_alive: bool) -> None:
        if before is not None:
            await before
        self._record = record
        try:
            await self._upstream.answer(record, Wire(self.write, record))
            if not keep_alive:
                self.transport.close()
        except Cut as wish:
            if wish.args[0] == "reset":
                peer = self.transport.get_extra_info("socket")
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.close()
        except BaseException:
            self.transport.abort()
            raise
        finally:
            self._record = None
            record.closed_s = time.monotonic()
            record.closed.set()

    def _left(self) -> None:
        if self._task is not None and not self._task.done():
            if self._record is not None:
                self._record.peer_left = True
            self._task.cancel()


class Upstream(Threaded):
    """The server, in a thread and loop of its own; every public method may be called from any thread."""

    def __init__(
        self,
        *,
        port: int = 0,
        models: Sequence[str] = ("scripted", "scripted-no-usage-option", "scripted-strict"),
        api_key: str | None = None,
        no_usage_option: bool = False,
        no_content_parts: bool = False,
        keep_requests: bool = True,
    ) -> None:
        """Set what it refuses: `stream_options`, content parts for pure text, other keys than `api_key`."""
        super().__init__(port)
        self.requests: list[Recorded] = []
        self.connections: set[Connection] = set()
        self.scripts: dict[str, str] = {}
        """A user message's text → the script that answers it, where the text is not the test's own."""
        self._models, self._api_key, self._keep = models, api_key, keep_requests
        self._no_usage_option, self._no_content_parts = no_usage_option, no_content_parts
        self._gates: dict[str, Gate] = {}
        self._counts: Counter[tuple[str, int, bytes]] = Counter()
        self._arrived = 0

    @property
    def base_url(self) -> str:
        """What the server under test gets as the upstream's address."""
        return f"http://127.0.0.1:{self.port}/v1"

    def asked(self, said: str) -> list[Recorded]:
        """The requests whose last user message was this script or text, in the order of their arrival."""
        return [record for record in self.requests if record.said == said]

    def gate(self, name: str) -> Gate:
        """The gate of that name."""
        return self._gates.setdefault(name, Gate())

    def open(self, name: str) -> None:
        """Open a gate for those who wait and those who will come."""
        self._loop.call_soon_threadsafe(self.gate(name).opened.set)

    def wait_reached(self, name: str, timeout_s: float = 5.0) -> None:
        """Block until a reply has come to the gate."""
        if not self.gate(name).reached.wait(timeout_s):
            raise TimeoutError(f"no reply came to gate {name!r} within {timeout_s} s")

    async def until_reached(self, name: str, timeout_s: float = 5.0) -> None:
        """The same for a coroutine, whose loop may be the one of the server under test."""
        await asyncio.to_thread(self.wait_reached, name, timeout_s)

    def clear(self) -> None:
        """Forget requests and counts; open and forget the gates."""
        gates, self._gates = self._gates, {}
        for one in gates.values():
            self._loop.call_soon_threadsafe(one.opened.set)
        self._counts.clear()
        self.scripts.clear()
        self.requests.clear()

    def count(self, record: Recorded, step: Step) -> int:
        """How often this step of this turn of this script has been reached, now included."""
        key = (record.said, record.turn, msgspec.json.encode(step))
        self._counts[key] += 1
        return self._counts[key]

    def record(self, method: str, path: str, headers: dict[str, str], raw: bytes) -> Recorded:
        """Write down a request that has just arrived."""
        record = Recorded(number=self._arrived, method=method, path=path, headers=headers, raw=raw)
        # What is no chat request has no script; `answer` refuses it where it must.
        with contextlib.suppress(msgspec.DecodeError, TypeError, KeyError, AttributeError):
            record.body = msgspec.json.decode(raw) if raw else None
            record.said, record.turn = asked_turn(record.body["messages"])
        self._arrived += 1
        if self._keep:
            self.requests.append(record)
        return record

    async def answer(self, record: Recorded, wire: Wire) -> None:
        """Route one request."""
        try:
            match record.method, record.path.partition("?")[0].strip("/").split("/"):
                case "POST", [*_, "chat", "completions"]:
                    await self._answer_chat(record, wire)
                case "GET", [*_, "models"]:
                    models = [
                        {"id": name, "object": "model", "created": 0, "owned_by": "tests"} for name in self._models
                    ]
                    await wire.whole(200, {"object": "list", "data": models})
                case "POST", [*_, "tokenize" | "apply-template" | "input_tokens"]:
                    await self._answer_count(record, wire)
                case "POST", ["gates", name]:
                    self.gate(name).opened.set()
                    await wire.whole(200, {"opened": name})
                case _:
                    raise Refused(f"Invalid URL ({record.method} {record.path})", status=404)
        except Refused as refused:
            await wire.whole(refused.status, refused.body)

    async def _answer_chat(self, record: Recorded, wire: Wire) -> None:
        if self._api_key is not None and record.headers.get("authorization") != f"Bearer {self._api_key}":
            raise Refused("Incorrect API key provided.", code="invalid_api_key", status=401)
        model = str(record.body.get("model")) if isinstance(record.body, dict) else ""
        check_request(
            record.body,
            no_usage_option=self._no_usage_option or model.endswith("-no-usage-option"),
            no_content_parts=self._no_content_parts or model.endswith("-strict"),
        )
        with contextlib.suppress(Answered):
            await Reply(record, wire, self.gate, self.count).run(
                steps_of(self.scripts.get(record.said, record.said), record.turn)
            )

    async def _answer_count(self, record: Recorded, wire: Wire) -> None:
        """The endpoints of engines that count tokens, which are words here; a script may have another answer."""
        path = record.path.partition("?")[0]
        for step in steps_of(record.said, record.turn):
            if step.get("endpoint") == path:
                if step["waits_at"]:
                    await self.gate(step["waits_at"]).go_through()
                await wire.whole(step["code"], step["body"])
                return
        texts = [text_of(message.get("content")) for message in record.body.get("messages", ())]
        words = (record.body.get("content") or " ".join(texts)).split()
        tokens = list(range(len(words)))
        answers = {
            "/tokenize": {"count": len(words), "max_model_len": 4096, "tokens": tokens}
            if "messages" in record.body
            else {"tokens": tokens},
            "/apply-template": {"prompt": " ".join(words)},
            "/v1/chat/completions/input_tokens": {"object": "response.input_tokens", "input_tokens": len(words)},
        }
        if path not in answers:
            raise Refused(f"Invalid URL ({record.method} {record.path})", status=404)
        await wire.whole(200, answers[path])

    async def serve(self, ready: concurrent.futures.Future[None]) -> None:
        """Listen in the running loop until `stop`; `ready` says when, or why not."""
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        try:
            server = await self._loop.create_server(lambda: Connection(self), "127.0.0.1", self.port, backlog=4096)
        except OSError as error:
            ready.set_exception(error)
            return
        self.port = server.sockets[0].getsockname()[1]
        ready.set_result(None)
        await self._stopping.wait()
        server.close()
        for connection in list(self.connections):
            connection.transport.abort()
