"""What the server says: greeting, lists, and the tools; the same over every transport."""

import asyncio
import base64
import json
import os
import re
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

Send = Callable[[dict[str, Any]], Awaitable[None]]
"""Puts a message on the way to the client, beside the answer."""

MODERN = "2026-07-28"
"""The first protocol version without handshakes and sessions."""

PIXEL = base64.b64encode(b"\x89PNG\r\n\x1a\n a pixel").decode()
NUMBERS = {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}, "required": ["a", "b"]}
ANYTHING = {"type": "object"}


class Cut(Exception):
    """The connection, or the program, ends here."""


class Status(Exception):
    """The call is answered with this HTTP status."""


class Endless(Exception):
    """The answer has no end."""


class Gone(Exception):
    """The session is forgotten; the call is answered as one of an unknown session."""


class RpcError(Exception):
    """A JSON-RPC error: code and message."""


@dataclass(eq=False)
class Gate:
    """One place where calls wait for the test."""

    reached: threading.Event = field(default_factory=threading.Event)
    opened: asyncio.Event = field(default_factory=asyncio.Event)

    async def go_through(self) -> None:
        """Record an arrival, and wait."""
        self.reached.set()
        await self.opened.wait()


@dataclass(eq=False)
class Call:
    """One tools/call that arrived; times are `time.time()`."""

    server: str
    tool: str
    arguments: Any
    meta: dict[str, Any]
    headers: dict[str, str]
    session: str
    arrived_s: float = field(default_factory=time.time)
    outcome: str = ""  # answered, failed, cut, left: empty while it runs
    ended: threading.Event = field(default_factory=threading.Event)

    def as_json(self) -> dict[str, Any]:
        """For other processes."""
        names = "server tool arguments meta headers session arrived_s outcome".split()
        return {name: getattr(self, name) for name in names}

    async def until_ended(self, timeout_s: float = 5.0) -> str:
        """Wait in a coroutine of another loop; gives the outcome."""
        await asyncio.to_thread(self.ended.wait, timeout_s)
        return self.outcome

    def end(self, outcome: str) -> None:
        """Say what became of it; the first word counts."""
        self.outcome = self.outcome or outcome
        self.ended.set()


@dataclass(eq=False)
class Session:
    """One client's session; `asked` are our own requests that it has not answered yet."""

    id: str
    server: str
    options: Mapping[str, str]
    greeted: bool = False
    asked: dict[str, asyncio.Future[dict[str, Any]]] = field(default_factory=dict)
    closed: threading.Event = field(default_factory=threading.Event)
    ending: asyncio.Event = field(default_factory=asyncio.Event)

    def close(self) -> None:
        """It is over."""
        self.closed.set()
        self.ending.set()

    async def until_closed(self, timeout_s: float = 5.0) -> bool:
        """Wait in a coroutine of another loop; False if it continues."""
        return await asyncio.to_thread(self.closed.wait, timeout_s)


class Script:
    """What the server answers, and what it remembers."""

    def __init__(self, record: str = "") -> None:
        self.calls: list[Call] = []
        self.sessions: list[Session] = []
        self.gates: dict[str, Gate] = {}
        self._record = record
        self._listings = 0

    def gate(self, name: str) -> Gate:
        """The gate of that name."""
        return self.gates.setdefault(name, Gate())

    async def answer(
        self, session: Session, message: dict[str, Any], headers: dict[str, str], send: Send
    ) -> dict[str, Any] | None:
        """The answer to one message, None where none is due. Raises Cut, Status, Endless, Gone."""
        if "method" not in message:
            session.asked.pop(str(message.get("id"))).set_result(message)
            return None
        if "id" not in message:
            session.greeted = session.greeted or message["method"] == "notifications/initialized"
            return None
        parameters = message.get("params") or {}
        try:
            reply = {"result": await self._result(session, message["method"], parameters, headers, send)}
        except RpcError as error:
            code, text = error.args
            reply = {"error": {"code": code, "message": text}}
        if session.options.get("echo"):
            reply = echoed(reply, headers)
        return {"jsonrpc": "2.0", "id": message["id"], **reply}

    async def _result(
        self, session: Session, method: str, parameters: dict[str, Any], headers: dict[str, str], send: Send
    ) -> dict[str, Any]:
        match method:
            case _ if session.options.get("modern") and not self._is_modern(method, parameters, headers):
                raise RpcError(-32022, "no handshakes here")
            case "server/discover" if session.options.get("modern"):
                return {"supportedVersions": [MODERN], "capabilities": {"tools": {}}, "resultType": "complete"}
            case "initialize":
                if session.options.get("silent"):
                    await asyncio.Event().wait()
                await self.wait_at(session.options.get("greeting"))
                return {
                    "protocolVersion": parameters["protocolVersion"],
                    "capabilities": {"tools": {"listChanged": True}},
                    "serverInfo": {"name": session.server, "version": "1"},
                }
            case "ping":
                return {}
            case "tools/list":
                await self.wait_at(session.options.get("listing"))
                return self._page(session.options, parameters.get("cursor"))
            case "tools/call":
                return await self._call(session, parameters, headers, send)
            case _:
                raise RpcError(-32601, f"Method not found: {method}")

    def _is_modern(self, method: str, parameters: dict[str, Any], headers: dict[str, str]) -> bool:
        """Whether a request says all that there is to know, in its `_meta`, and over HTTP in its headers again."""
        meta = parameters.get("_meta", {})
        expected = {"mcp-protocol-version": MODERN, "mcp-method": method}
        if method == "tools/call":
            expected["mcp-name"] = parameters["name"]
        over_http = "host" in headers
        return (
            meta.get("io.modelcontextprotocol/protocolVersion") == MODERN
            and isinstance(meta.get("io.modelcontextprotocol/clientCapabilities"), dict)
            and (not over_http or expected.items() <= headers.items())
        )

    async def wait_at(self, gate: str | None) -> None:
        """Wait at the gate of that name, if there is a name."""
        if gate:
            await self.gate(gate).go_through()

    def _page(self, options: Mapping[str, str], cursor: str | None) -> dict[str, Any]:
        listed = list(TOOLS) if "tools" not in options else options["tools"].split(",")
        tools: list[Any] = [{"name": name, **TOOLS[name]} for name in listed]
        if options.get("growing"):
            self._listings += 1
            tools += [{"name": f"new_{number + 1}", "inputSchema": ANYTHING} for number in range(self._listings)]
        if options.get("lies"):
            tools = LIES
        if options.get("echo"):
            tools = [*tools, *ECHOES]
        if options.get("loop"):
            return {"tools": tools[:1], "nextCursor": "again"}
        pages = int(options.get("pages", "1"))
        number = int(cursor or 0)
        size = -(-len(tools) // pages)
        page = {"tools": tools[number * size : (number + 1) * size]}
        return page if number + 1 >= pages else {**page, "nextCursor": str(number + 1)}

    async def _call(
        self, session: Session, parameters: dict[str, Any], headers: dict[str, str], send: Send
    ) -> dict[str, Any]:
        call = Call(
            server=session.server,
            tool=parameters["name"],
            arguments=parameters.get("arguments"),
            meta=parameters.get("_meta") or {},
            headers=headers,
            session=session.id,
        )
        self.calls.append(call)
        if self._record:
            with Path(self._record).open("a") as file:
                file.write(json.dumps(call.as_json()) + "\n")
        try:
            result = await self._perform(call, session, send)
        except (Cut, Endless, Gone):
            call.end("cut")
            raise
        except asyncio.CancelledError:
            call.end("left")
            raise
        except Exception:
            call.end("failed")
            raise
        call.end("answered")
        return result

    async def _perform(self, call: Call, session: Session, send: Send) -> dict[str, Any]:
        given = call.arguments or {}
        match call.tool:
            case "slow":
                await asyncio.sleep(given.get("ms", 100) / 1000)
                return texts("slept")
            case "gate":
                await self.gate(given["name"]).go_through()
                return texts("through")
            case "cut":
                raise Cut
            case "status":
                raise Status(given["status"])
            case "endless":
                raise Endless
            case "gone":
                session.close()
                raise Gone
            case "refuse":
                raise RpcError(given.get("code", -32603), given.get("message", "refused"))
            case "headers":
                return texts(json.dumps(call.headers, sort_keys=True))
            case "ask":
                question = {"jsonrpc": "2.0", "id": f"q{len(self.calls)}", "method": given["method"], "params": {}}
                question["params"] = given.get("params", {})
                session.asked[question["id"]] = answer = asyncio.get_running_loop().create_future()
                await send(question)
                return texts(json.dumps(await answer, sort_keys=True))
            case "process":
                return texts(json.dumps({"pid": os.getpid(), "calls": len(self.calls)}))
            case "notify":
                await send({"jsonrpc": "2.0", "method": "notifications/tools/list_changed"})
                return texts("notified")
        return answer_of(call.tool, given)


def texts(*found: str) -> dict[str, Any]:
    """A result of text parts."""
    return {"content": [{"type": "text", "text": text} for text in found]}


def echoed(value: Any, headers: Mapping[str, str]) -> Any:
    """A value with headers in the places of `{plain:NAME}`, `{token:NAME}` (without a scheme), `{base64:NAME}`, `{url:NAME}`."""
    match value:
        case str():
            return PLACE.sub(lambda place: ECHOED[place["form"]](headers.get(place["name"], "")), value)
        case dict():
            return {echoed(key, headers): echoed(inner, headers) for key, inner in value.items()}
        case list():
            return [echoed(inner, headers) for inner in value]
    return value


PLACE = re.compile(r"\{(?P<form>\w+):(?P<name>[\w-]+)\}")
ECHOED: dict[str, Callable[[str], str]] = {
    "plain": str,
    "token": lambda value: value.rpartition(" ")[2],
    "base64": lambda value: base64.b64encode(f"got {value}!".encode()).decode(),
    "url": lambda value: quote(value, safe=""),
}

FIXED = {
    "structured": {"content": [], "structuredContent": {"sum": 3, "of": [1, 2]}},
    "image": {"content": [{"type": "image", "data": PIXEL, "mimeType": "image/png"}]},
    "half": {**texts("half a pair: \ud83d"), "structuredContent": {"half": "\ud83d"}},
}
"""Results that are always the same."""


def answer_of(tool: str, given: dict[str, Any]) -> dict[str, Any]:
    """The results that need nothing but the arguments. Raises RpcError for an unknown tool."""
    match tool:
        case "echo":
            return texts(json.dumps(given, sort_keys=True))
        case "add":
            total = given["a"] + given["b"]
            return {**texts(str(total)), "structuredContent": {"sum": total}}
        case "fail":
            return {**texts(given.get("text", "it failed")), "isError": True}
        case "say":
            return {"content": given.get("content", []), **given.get("more", {})}
        case "structured" | "image" | "half":
            return FIXED[tool]
        case "long":
            return texts("é" * given["chars"])
        case "raw":
            return given["result"]
    raise RpcError(-32602, f"Unknown tool: {tool}")


def _tools() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "echo", {"description": "Gives its arguments back.", "inputSchema": ANYTHING}
    yield (
        "add",
        {
            "description": "Adds two numbers.",
            "inputSchema": NUMBERS,
            "outputSchema": {"type": "object", "properties": {"sum": {"type": "number"}}},
            "annotations": {"readOnlyHint": True, "title": "Add"},
        },
    )
    yield "slow", {"description": "Answers after `ms`.", "inputSchema": ANYTHING}
    yield "gate", {"description": "Waits until the test opens gate `name`.", "inputSchema": ANYTHING}
    yield "cut", {"description": "Breaks the connection.", "inputSchema": ANYTHING}
    yield "status", {"description": "Answers with an HTTP `status`.", "inputSchema": ANYTHING}
    yield "endless", {"description": "Never stops answering.", "inputSchema": ANYTHING}
    yield "gone", {"description": "Forgets the session.", "inputSchema": ANYTHING}
    yield "refuse", {"description": "A JSON-RPC error: `code`, `message`.", "inputSchema": ANYTHING}
    yield "headers", {"description": "Gives the request's headers back.", "inputSchema": ANYTHING}
    yield "ask", {"description": "Asks the client `method` and gives its answer back.", "inputSchema": ANYTHING}
    yield "notify", {"description": "Says that the list of tools has changed.", "inputSchema": ANYTHING}
    yield "process", {"description": "Gives its process and how many calls that had.", "inputSchema": ANYTHING}
    yield "fail", {"description": "Says that it failed: `text`.", "inputSchema": ANYTHING}
    yield "say", {"description": "Answers with `content`, and `more`.", "inputSchema": ANYTHING}
    yield (
        "structured",
        {
            "description": "Structured content only, and not what its schema says.",
            "inputSchema": ANYTHING,
            "outputSchema": {"type": "object", "required": ["other"]},
        },
    )
    yield "image", {"description": "A picture.", "inputSchema": ANYTHING}
    yield "long", {"description": "As many two-byte characters as `chars`.", "inputSchema": ANYTHING}
    yield "half", {"description": "Text that ends in the middle of a surrogate pair.", "inputSchema": ANYTHING}
    yield "raw", {"description": "Answers with `result` as it stands.", "inputSchema": ANYTHING}


TOOLS = dict(_tools())

LIES: list[Any] = [
    {"name": "no_schema"},
    {"name": "null_schema", "inputSchema": None},
    {"name": "text_schema", "inputSchema": "object"},
    {"name": "array_schema", "inputSchema": {"type": "array", "items": {}}},
    {"name": "typeless", "inputSchema": {"properties": {"a": {}}}, "annotations": ["not", "an", "object"]},
    {"name": "twice", "description": "the first", "inputSchema": ANYTHING},
    {"name": "twice", "description": "the second", "inputSchema": ANYTHING},
    {"name": "numbered", "description": 7, "inputSchema": ANYTHING, "outputSchema": "nonsense"},
    {"name": 7, "inputSchema": ANYTHING},
    {"name": "", "inputSchema": ANYTHING},
    {"inputSchema": ANYTHING},
    "no tool at all",
]

ECHOES: list[Any] = [
    {
        "name": "leaky",
        "description": "You are {plain:authorization}, that is {token:authorization}.",
        "inputSchema": {
            "type": "object",
            "properties": {
                "{plain:x-key}": {"type": "string", "description": "{base64:x-key}", "enum": [["{url:x-key}"]]}
            },
        },
        "annotations": {"title": "{token:authorization}"},
    }
]
"""What a server lists that gives headers back."""
