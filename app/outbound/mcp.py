"""Sessions with MCP tool servers, for one run: list the tools, call one.

    async with ToolSessions(guard, settings) as sessions:
        tools = await sessions.list_tools(server)
        result = await sessions.call(server, "add", {"a": 1}, call_id="mcp_123")

A session is opened when it is first needed, kept for the whole run, and closed with it. Over HTTP it is Streamable HTTP, or
the older HTTP+SSE where the server refuses the first POST with a 4xx, as the specification says; `command` is a program that
is spoken to over its standard input and output.

The SDK's contexts are task groups, which must be left by the task that entered them: each session is a task of its own that
holds them, and callers only put requests into it. A call that was sent is never sent again, neither by us nor by HTTP: when
its answer is lost, its outcome is unknown, and ToolFailure says so. What a server asks of us (sampling, elicitation, roots)
is refused by the SDK, since we offer none of it.

Servers lie: results are read from plain JSON here and not by the SDK's models, which would refuse a whole list for one bad
schema.
"""

import asyncio
import base64
import binascii
import contextlib
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Literal, Self

import httpx2
import mcp_types
import msgspec
import structlog
from mcp.client.session import ClientSession
from mcp.client.sse import sse_client
from mcp.client.stdio import StdioServerParameters, stdio_client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPError
from mcp.shared.jsonrpc_dispatcher import JSONRPCDispatcher
from msgspec import Struct

from app.outbound.guard import Guard, OutboundRefused
from app.settings import Settings
from app.wire.requests import mend_surrogates

log = structlog.get_logger()

IDEMPOTENCY_KEY = "reprise/idempotencyKey"
"""Where in a call's `_meta` its id stands, so that a careful server can tell a repetition from a new call."""

CLOSE_S = 10.0
"""How long a session may take to say goodbye; longer than the SDK's own steps for a program that does not end."""

MESSAGE_CHARS_MAX = 1000
"""A server's own words in a failure; longer ones are cut."""

SECRET_CHARS_MIN = 4
"""Shorter header values are no secrets, and masking them would garble messages."""

STILL_NO_MCP = frozenset({401, 403, 407, 408, 429})
"""Refusals of the first POST that are meant for us, and do not say that the server speaks the older transport."""

OURS = frozenset("accept accept-encoding connection content-length content-type host transfer-encoding".split())
"""Headers that are the transport's business, whatever a tool's `headers` say."""


class ToolServer(Struct, frozen=True):
    """Where a tool server is, and what it wants to hear."""

    label: str
    url: str = ""  # http(s), or
    command: tuple[str, ...] = ()  # a program, from the operator's catalog only, with
    environment: Mapping[str, str] = {}
    headers: Mapping[str, str] = {}
    authorization: str = ""  # a bearer token, unless it names a scheme
    trusted: bool = False  # the operator's own: no guard

    @property
    def key(self) -> bytes:
        """Equal for equal servers."""
        return msgspec.json.encode(self, order="sorted")

    @property
    def request_headers(self) -> dict[str, str]:
        """The headers of every request."""
        headers = {name: value for name, value in self.headers.items() if name.lower() not in OURS}
        if self.authorization:
            headers = {name: value for name, value in headers.items() if name.lower() != "authorization"}
            bare = " " not in self.authorization.strip()
            headers["Authorization"] = f"Bearer {self.authorization.strip()}" if bare else self.authorization
        return {**headers, "Accept-Encoding": "identity"}

    def masked(self, text: str) -> str:
        """A server's words without anything that we told it in confidence, and of bearable length."""
        url = httpx2.URL(self.url)
        secrets = [*self.headers.values(), *self.environment.values(), self.authorization, *self.authorization.split()]
        secrets += [url.userinfo.decode(), url.query.decode(), *(value for _, value in url.params.multi_items())]
        for secret in sorted(set(secrets), key=len, reverse=True):
            if len(secret) >= SECRET_CHARS_MIN:
                text = text.replace(secret, "***")
        return text if len(text) <= MESSAGE_CHARS_MAX else f"{text[:MESSAGE_CHARS_MAX]}…"


class Listed(Struct, frozen=True):
    """A tool as its server lists it. `annotations` have MCP's keys (`readOnlyHint`)."""

    name: str
    description: str | None
    input_schema: dict[str, Any]
    annotations: dict[str, Any] | None


class CallResult(Struct, frozen=True):
    """What a tool answered."""

    text: str  # all of it, rendered for the model
    structured: Any | None
    images: tuple[tuple[str, str], ...]  # (media type, base64)
    is_error: bool  # the tool itself says that it failed


class ToolFailure(Exception):
    """A tool server could not be listed or called; the message may be shown, it carries no secrets.

    `http_error` has an HTTP status as its code: the server's, or 403 where the guard refuses, 502 where the server can't be
    reached or breaks off, 504 where it is too slow. `mcp_protocol_error` has a JSON-RPC code.
    """

    def __init__(self, kind: Literal["http_error", "mcp_protocol_error"], code: int, message: str) -> None:
        super().__init__(message)
        self.kind: Literal["http_error", "mcp_protocol_error"] = kind
        self.code = code
        self.message = message


class ToolSessions:
    """The sessions of one run. Methods may be called by several tasks at once."""

    def __init__(self, guard: Guard, settings: Settings) -> None:
        self._guard = guard
        self._settings = settings
        self._current: dict[bytes, _Session] = {}
        self._all: list[_Session] = []

    async def list_tools(self, server: ToolServer) -> list[Listed]:
        """All tools of a server; of two with the same name the first. Raises ToolFailure."""
        session = await self._session(server)
        timeout_s = self._settings.tool_list_timeout_s
        found: dict[str, Listed] = {}
        cursors: set[str] = set()
        cursor = ""
        try:
            async with asyncio.timeout(timeout_s):
                while cursor not in cursors:
                    cursors.add(cursor)
                    page = await session.request("tools/list", {"cursor": cursor} if cursor else {}, timeout_s)
                    for tool in _tools(page):
                        found.setdefault(tool.name, tool)
                    if len(found) > self._settings.tools_listed_max:
                        raise ToolFailure(
                            "mcp_protocol_error",
                            mcp_types.INVALID_REQUEST,
                            f"The tool server '{server.label}' lists more than {self._settings.tools_listed_max} tools.",
                        )
                    match page:
                        case {"nextCursor": str(following)} if following:
                            cursor = following
        except TimeoutError:
            raise _too_slow(server, "its list of tools", timeout_s) from None
        return list(found.values())

    async def call(self, server: ToolServer, name: str, arguments: dict[str, Any], *, call_id: str) -> CallResult:
        """Call a tool, once. Raises ToolFailure; a tool's own error is a result."""
        session = await self._session(server)
        parameters = {"name": name, "arguments": arguments, "_meta": {IDEMPOTENCY_KEY: call_id}}
        result = await session.request("tools/call", parameters, self._settings.tool_call_timeout_s)
        if result.get("resultType", "complete") != "complete":
            raise ToolFailure(
                "mcp_protocol_error",
                mcp_types.INVALID_REQUEST,
                f"The tool server '{server.label}' asks for input in mid-call, which is not offered.",
            )
        return _read_result(result, self._settings.tool_output_bytes_max)

    async def close(self) -> None:
        """End all sessions, whatever they are doing."""
        sessions, self._all, self._current = self._all, [], {}
        tasks = [session.leave() for session in sessions]
        try:
            if tasks:
                await asyncio.wait(tasks, timeout=CLOSE_S)
        finally:
            late = [task for task in tasks if not task.done()]
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _session(self, server: ToolServer) -> "_Session":
        """The open session of a server; a new one where there is none, or where the old one has ended."""
        session = self._current.get(server.key)
        if session is None or session.over:
            session = self._current[server.key] = _Session(server, self._guard, self._settings)
            self._all.append(session)
        await session.until_open()
        return session


class _Session:
    """One session: a task that holds the SDK's contexts, and requests that callers put into it."""

    def __init__(self, server: ToolServer, guard: Guard, settings: Settings) -> None:
        self._server, self._settings = server, settings
        self._wire = _Wire(self, server, guard, settings)
        self._dispatcher: _Dispatcher | None = None
        self._failure: ToolFailure | None = None
        self._opened = asyncio.Event()
        self._leaving = asyncio.Event()
        self._requests = 0
        self.over = False
        self._task = asyncio.create_task(self._run(), name=f"tool server {server.label}")

    async def until_open(self) -> None:
        """Wait until requests can be sent. Raises ToolFailure."""
        timeout_s = self._settings.tool_connect_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await self._opened.wait()
        except TimeoutError:
            self.over = True
            self._task.cancel()
            raise _too_slow(self._server, "its greeting", timeout_s) from None
        if self._dispatcher is None:
            raise self._failure or _failure(MCPError(mcp_types.CONNECTION_CLOSED, "Connection closed"), self._server)

    async def request(self, method: str, parameters: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Send a request, once, and wait for its result. Raises ToolFailure."""
        assert self._dispatcher is not None
        self._requests += 1
        request_id = f"r{self._requests}"  # The SDK's own are numbers.
        try:
            async with asyncio.timeout(timeout_s):
                return await self._dispatcher.send_raw_request(method, parameters, {"request_id": request_id})
        except TimeoutError:
            raise _too_slow(self._server, method, timeout_s) from None
        except MCPError as error:
            raise self._wire.failures.pop(request_id, None) or _failure(error, self._server) from None

    def leave(self) -> asyncio.Task[None]:
        """Say goodbye, or give up where nobody has answered our greeting; gives the task that does."""
        self.over = True
        self._leaving.set()
        if not self._opened.is_set():
            self._task.cancel()
        return self._task

    async def _run(self) -> None:
        try:
            if self._server.command:
                await self._hold(_program(self._server))
            else:
                await self._hold_http()
        except Exception as error:  # noqa: BLE001 - whatever it is, callers hear of it
            self._failure = _failure(error, self._server)
        finally:
            self.over = True
            self._opened.set()

    async def _hold_http(self) -> None:
        """Streamable HTTP, or HTTP+SSE where its first POST is refused with a 4xx."""
        try:
            await self._hold(self._streamable())
        except Exception:
            refused = self._wire.failures.get("initialize")
            if refused is None:
                raise
            if refused.kind != "http_error" or not 400 <= refused.code < 500 or refused.code in STILL_NO_MCP:
                raise refused from None
            self._wire.failures.clear()
            self._wire.two_streams = True
            try:
                await self._hold(self._two_streams())
            except Exception:  # Both were tried; the newer one's refusal says more.
                if self._dispatcher is not None:
                    raise
                raise refused from None

    async def _hold(self, transport: AbstractAsyncContextManager[Any]) -> None:
        """Open a session over a transport and keep it until somebody leaves."""
        self._leaving = asyncio.Event()  # The transport that was tried before has set its own.
        if self.over:
            return
        async with transport as (incoming, outgoing):
            dispatcher = self._wire.dispatcher = _Dispatcher(incoming, outgoing, self._leaving)
            client = mcp_types.Implementation(name="reprise", version="1")
            async with ClientSession(dispatcher=dispatcher, client_info=client) as session:
                await session.initialize()
                self._dispatcher = dispatcher
                self._opened.set()
                await self._leaving.wait()

    @contextlib.asynccontextmanager
    async def _streamable(self) -> AsyncIterator[Any]:
        async with (
            self._client() as client,
            streamable_http_client(
                self._server.url, http_client=client, max_sse_event_size=self._settings.tool_answer_bytes_max
            ) as streams,
        ):
            yield streams

    def _two_streams(self) -> AbstractAsyncContextManager[Any]:
        return sse_client(self._server.url, httpx_client_factory=self._client)

    def _client(self, *_: object, **__: object) -> httpx2.AsyncClient:
        """An HTTP client; how long an answer may take is said by each request's deadline."""
        timeout_s = self._settings.tool_connect_timeout_s
        headers = self._server.request_headers
        if not all(value.isascii() and value.isprintable() for value in headers.values()):
            raise ToolFailure("http_error", 400, f"A header for '{self._server.label}' can't be sent as it stands.")
        return httpx2.AsyncClient(
            transport=self._wire,
            headers=headers,
            timeout=httpx2.Timeout(timeout_s, read=None),
            trust_env=False,
        )


class _Dispatcher(JSONRPCDispatcher):
    """The SDK's, which also says when its connection has ended."""

    def __init__(self, incoming: Any, outgoing: Any, ended: asyncio.Event) -> None:
        super().__init__(incoming, outgoing)
        self._ended = ended

    async def run(self, *args: Any, **options: Any) -> None:
        try:
            await super().run(*args, **options)
        finally:
            self._ended.set()

    def abandon(self, request_id: str | int) -> None:
        """Wake who waits for a request that will not be answered."""
        self._resolve_pending(
            request_id, mcp_types.ErrorData(code=mcp_types.CONNECTION_CLOSED, message="Connection closed")
        )


class _Message(Struct):
    """What we look at in a message that leaves: requests have an id and a method."""

    id: str | int | None = None
    method: str = ""


class _Wire(httpx2.AsyncBaseTransport):
    """Under the SDK's transports: the guard, limits, and what became of each request.

    The SDK's transports let an HTTP error of one request end the whole session, or turn its status into a general sentence.
    So a POST that fails is answered here by ourselves, and the reason noted under the request's id.
    """

    def __init__(self, session: _Session, server: ToolServer, guard: Guard, settings: Settings) -> None:
        self._session, self._server = session, server
        self._inner = guard.open_transport() if server.trusted else guard.transport()
        self._quick_s = settings.tool_connect_timeout_s
        self._bytes_max = settings.tool_answer_bytes_max
        self.two_streams = False
        """HTTP+SSE: results do not come on the answer of a POST but on the one long GET."""
        self.dispatcher: _Dispatcher | None = None
        self.failures: dict[str | int, ToolFailure] = {}
        """By request id; that of the first request under "initialize"."""

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        message = msgspec.json.decode(request.content, type=_Message) if request.method == "POST" else _Message()
        waited_for = message.id is not None and message.method and not self.two_streams
        if request.method != "GET" and not waited_for:
            # Nothing of worth comes as an answer, and what is sent next must not wait for it for long.
            request.extensions["timeout"] = {**request.extensions.get("timeout", {}), "read": self._quick_s}
        try:
            response = await self._inner.handle_async_request(request)
        except (httpx2.TransportError, OutboundRefused) as error:
            if request.method != "POST":
                raise
            return self._failed(request, message, _failure(error, self._server))
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        if request.method != "POST":
            response.stream = _Mended(response.stream, self._bytes_max)
            return response
        if response.status_code >= 400:
            await response.aclose()
            return self._failed(request, message, _refused(response.status_code, self._server))
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            await response.aclose()
            failure = _garbled(self._server, "its answer is compressed, which was not asked for")
            return self._failed(request, message, failure)
        response.stream = _Mended(_Limited(response.stream, self, message, self._bytes_max), self._bytes_max)
        return response

    def _failed(self, request: httpx2.Request, message: _Message, failure: ToolFailure) -> httpx2.Response:
        """What the SDK gets instead of an answer: an error, or nothing where an error would end its writing for good."""
        self.note(message, failure)
        if not self.two_streams:
            return httpx2.Response(502, request=request)
        if self.dispatcher is not None and message.id is not None:
            self.dispatcher.abandon(message.id)
        return httpx2.Response(202, request=request)

    def note(self, message: _Message, failure: ToolFailure) -> None:
        """Keep why a request failed, for the one who waits for it."""
        if message.method == "initialize":
            self.failures["initialize"] = failure
        elif message.id is not None and message.method:
            self.failures[message.id] = failure
            # A server that has forgotten the session: later calls need another one.
            self._session.over = self._session.over or failure.code == 404

    def broken(self, message: _Message, error: Exception) -> httpx2.StreamError:
        """Note that an answer did not come to its end; gives what the SDK's transports survive."""
        failure = error if isinstance(error, ToolFailure) else _failure(error, self._server)
        self.note(message, failure)
        return httpx2.StreamError(failure.message)

    def too_long(self) -> ToolFailure:
        """An answer is over the limit."""
        return _garbled(self._server, f"its answer is longer than {self._bytes_max} bytes")

    async def aclose(self) -> None:
        await self._inner.aclose()


class _Limited(httpx2.AsyncByteStream):
    """The body of an answer, up to the limit."""

    def __init__(self, body: httpx2.AsyncByteStream, wire: _Wire, message: _Message, bytes_max: int) -> None:
        self._body, self._wire, self._message, self._bytes_max = body, wire, message, bytes_max

    async def __aiter__(self) -> AsyncIterator[bytes]:
        count = 0
        try:
            async for part in self._body:
                count += len(part)
                if count > self._bytes_max:
                    raise self._wire.broken(self._message, self._wire.too_long())
                yield part
        except httpx2.TransportError as error:
            raise self._wire.broken(self._message, error) from error

    async def aclose(self) -> None:
        await self._body.aclose()


class _Mended(httpx2.AsyncByteStream):
    """A body without escapes of half a surrogate pair, as outputs cut in the middle hold them: the SDK can't read those. It is
    passed on in whole lines, since an escape has no line break in it."""

    def __init__(self, body: httpx2.AsyncByteStream, line_bytes_max: int) -> None:
        self._body, self._line_bytes_max = body, line_bytes_max

    async def __aiter__(self) -> AsyncIterator[bytes]:
        held: list[bytes] = []
        count = 0
        async for part in self._body:
            end = max(part.rfind(b"\n"), part.rfind(b"\r")) + 1
            if end:
                yield mend_surrogates(b"".join([*held, part[:end]]))
                held, count = [], 0
            held.append(part[end:])
            count += len(held[-1])
            if count > self._line_bytes_max:
                raise httpx2.StreamError("a line is too long")
        yield mend_surrogates(b"".join(held))

    async def aclose(self) -> None:
        await self._body.aclose()


@contextlib.asynccontextmanager
async def _program(server: ToolServer) -> AsyncIterator[Any]:
    """The streams of a program that is started for this session."""
    if not server.trusted:
        raise OutboundRefused(server.label, "only the operator's catalog starts programs")
    program, *arguments = server.command
    parameters = StdioServerParameters(command=program, args=arguments, env=dict(server.environment))
    async with stdio_client(parameters) as streams:
        yield streams


def _failure(error: BaseException, server: ToolServer) -> ToolFailure:
    """What a client may hear of an error; its own words only where they are a server's or the guard's."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    match error:
        case ToolFailure():
            return error
        case MCPError(code=mcp_types.PARSE_ERROR):
            return _garbled(server, "what it sends is not JSON-RPC")
        case MCPError():
            return ToolFailure("mcp_protocol_error", error.code, server.masked(error.message))
        case OutboundRefused():
            return ToolFailure("http_error", 403, str(error))
        case httpx2.HTTPStatusError():
            return _refused(error.response.status_code, server)
        case httpx2.HTTPError() | httpx2.InvalidURL():
            return _unreachable(error, server)
        case OSError() if server.command:
            why = f"The program of the tool server '{server.label}' can't be started."
            return ToolFailure("mcp_protocol_error", mcp_types.CONNECTION_CLOSED, why)
    log.warning("a tool server is not understood", action="tool_server_garbled", error=type(error).__name__)
    return _garbled(server, "it does not speak MCP as we know it")


def _unreachable(error: Exception, server: ToolServer) -> ToolFailure:
    who = f"The tool server '{server.label}'"
    match error:
        case httpx2.TimeoutException():
            return ToolFailure("http_error", 504, f"{who} did not answer in time.")
        case httpx2.ConnectError() | httpx2.UnsupportedProtocol() | httpx2.InvalidURL():
            return ToolFailure("http_error", 502, f"{who} can't be reached.")
    return ToolFailure("http_error", 502, f"{who} broke off the connection.")


def _refused(status: int, server: ToolServer) -> ToolFailure:
    return ToolFailure("http_error", status, f"The tool server '{server.label}' answered with HTTP status {status}.")


def _garbled(server: ToolServer, why: str) -> ToolFailure:
    return ToolFailure(
        "mcp_protocol_error", mcp_types.PARSE_ERROR, f"The tool server '{server.label}' is not understood: {why}."
    )


def _too_slow(server: ToolServer, what: str, timeout_s: float) -> ToolFailure:
    return ToolFailure(
        "mcp_protocol_error",
        mcp_types.REQUEST_TIMEOUT,
        f"The tool server '{server.label}' did not answer within {timeout_s:g} s ({what}).",
    )


def _tools(page: Mapping[str, Any]) -> list[Listed]:
    """The tools of one page, as far as they have names; lies about the rest are put right."""
    tools = page.get("tools")
    return [
        Listed(name=name, description=_text(tool.get("description")), input_schema=schema, annotations=notes)
        for tool in (tools if isinstance(tools, list) else [])
        if isinstance(tool, dict) and (name := _text(tool.get("name")))
        for schema in [_object_schema(tool.get("inputSchema"))]
        for notes in [tool["annotations"] if isinstance(tool.get("annotations"), dict) else None]
    ]


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _object_schema(schema: object) -> dict[str, Any]:
    """A schema that promises an object; anything else would be refused by upstreams."""
    if isinstance(schema, dict) and schema.get("type", "object") == "object":
        return {"type": "object", **schema}
    return {"type": "object"}


def _read_result(result: Mapping[str, Any], bytes_max: int) -> CallResult:
    content = result.get("content")
    parts = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    structured = result.get("structuredContent")
    lines, images = [], []
    for part in parts:
        line, image = _render(part)
        lines.append(line)
        images += [image] if image else []
    if structured is not None and not any(part.get("type") == "text" for part in parts):
        lines.insert(0, msgspec.json.encode(structured).decode())
    text = _cut("\n".join(lines), bytes_max)
    return CallResult(text, structured, tuple(images), is_error=result.get("isError") is True)


def _render(part: Mapping[str, Any]) -> tuple[str, tuple[str, str] | None]:
    """A part of a result as text, and as an image where it is one."""
    match part:
        case {"type": "text", "text": str(text)}:
            return text, None
        case {"type": "image" | "audio", "data": str(data)}:
            return _binary("", part.get("mimeType"), data)
        case {"type": "resource", "resource": {"text": str(text)}}:
            return text, None
        case {"type": "resource", "resource": {"blob": str(data), **resource}}:
            return _binary(f"resource {resource.get('uri')}, ", resource.get("mimeType"), data)
        case {"type": "resource_link", "uri": str(uri)}:
            named = ": ".join(str(part[key]) for key in ("name", "description") if part.get(key))
            return f"[resource link {uri}{f', {named}' if named else ''}]", None
        case _:
            return f"[content of type {part.get('type')!r}]", None


def _binary(what: str, media_type: object, data: str) -> tuple[str, tuple[str, str] | None]:
    media = media_type if isinstance(media_type, str) and media_type else "application/octet-stream"
    try:
        size = len(base64.b64decode(data, validate=True))
    except binascii.Error:
        return f"[{what}{media}, not readable]", None
    return f"[{what}{media}, {size} bytes]", (media, data) if media.startswith("image/") else None


def _cut(text: str, bytes_max: int) -> str:
    encoded = text.encode(errors="replace")
    if len(encoded) <= bytes_max:
        return text
    kept = encoded[:bytes_max].decode(errors="ignore")
    return f"{kept}\n[cut off here: {len(encoded)} bytes in all, {bytes_max} are shown]"
