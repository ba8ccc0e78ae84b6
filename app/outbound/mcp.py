"""Sessions with MCP tool servers, for one run: list the tools, call one.

    async with ToolSessions(guard, settings, mask) as sessions:
        tools = await sessions.list_tools(server)
        result = await sessions.call(server, "add", {"a": 1}, call_id="mcp_123")

A session is opened on first use and closed at the end of the run. Over HTTP the transport is Streamable HTTP, or the older HTTP+SSE
if the server answers the first POST with a 4xx, as the specification defines. `command` is a program with the stdio transport, which
runs share (`programs.py`).

The SDK's contexts are task groups, and the task that enters one must exit it: so each session is a task, and callers pass their requests
to it. A call is sent once, and never retried, neither here nor by HTTP: if its answer is lost, its outcome is unknown, and the call
fails. The SDK refuses a server's own requests (sampling, elicitation, roots), as the client declares no capabilities.

Results are read as plain JSON (`answers.py`): the SDK's models would refuse a whole list for one bad schema.
"""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Self, TypeAlias

import httpx2
import mcp_types
import msgspec
import structlog
from mcp.client.session import ClientSession
from mcp.client.sse import sse_client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPError
from mcp.shared.inbound import (
    MCP_METHOD_HEADER,
    MCP_NAME_HEADER,
    MCP_PROTOCOL_VERSION_HEADER,
    encode_header_value,
)
from mcp.shared.jsonrpc_dispatcher import JSONRPCDispatcher
from msgspec import Struct

from app.outbound.answers import CallResult, Listed, read_result, read_tools
from app.outbound.guard import Guard, OutboundRefused
from app.outbound.masking import Mask
from app.outbound.program import program_streams
from app.outbound.programs import Programs
from app.outbound.toolserver import (
    ToolFailure,
    ToolServer,
    closed,
    failure_of,
    garbled,
    lists_too_much,
    refused,
    too_slow,
)
from app.settings import Settings
from app.wire.requests import mend_surrogates

__all__ = ["IDEMPOTENCY_KEY", "CallResult", "Listed", "ToolFailure", "ToolPrograms", "ToolServer", "ToolSessions"]

log = structlog.get_logger()

CLIENT = mcp_types.Implementation(name="reprise", version="1")

IDEMPOTENCY_KEY = "reprise/idempotencyKey"
"""The key of a call's id in its `_meta`: with it a server can recognize a repetition."""

CLOSE_S = 10.0
"""How long a session may take to close; more than `program.py` needs to kill a program."""

DELETE_S = 2.0
"""How long a server may take to answer the DELETE of a session."""

PART_BYTES_MIN = 256
"""A chunk of a body counts as at least so many bytes: that is what processing one costs."""

PARTS_AT_ONCE = 64
"""Chunks of a body that are processed before other tasks get a turn."""

REQUESTS_AT_ONCE_MAX = 16
"""Requests of a server to us, all of which are refused. A server with more of them does not read the refusals."""

NOT_THE_PROTOCOL = frozenset({401, 403, 407, 408, 429})
"""Statuses of a refused `initialize` that do not mean that the server speaks another version of the protocol."""


class ToolSessions:
    """The sessions of one run. Methods may be called by several tasks at once."""

    def __init__(
        self,
        guard: Guard,
        settings: Settings,
        mask: Mask,
        programs: "ToolPrograms | None" = None,
        *,
        tenant: str = "",
    ) -> None:
        """`mask` has the secrets of the run's servers. Without shared `programs` it starts its own, and ends them."""
        self._guard = guard
        self._settings = settings
        self._mask = mask
        self._programs: ToolPrograms = programs or Programs(settings)
        self._own_programs = programs is None
        self._tenant = tenant
        self._requests: set[asyncio.Task[dict[str, Any]]] = set()
        self._current: dict[bytes, _Session] = {}
        self._all: list[_Session] = []
        self._closed = False

    async def list_tools(self, server: ToolServer) -> list[Listed]:
        """All tools of a server; of two with the same name the first. Raises ToolFailure."""
        with self._masking():
            return await self._list_tools(server)

    async def call(self, server: ToolServer, name: str, arguments: dict[str, Any], *, call_id: str) -> CallResult:
        """Call a tool, once. Raises ToolFailure; a tool's own error is a result."""
        with self._masking():
            return await self._call(server, name, arguments, call_id)

    @contextlib.contextmanager
    def _masking(self) -> Iterator[None]:
        """Mask failures, as they quote servers."""
        try:
            yield
        except ToolFailure as failure:
            raise failure.masked(self._mask) from None

    async def _list_tools(self, server: ToolServer) -> list[Listed]:
        session = await self._session(server)
        timeout_s = self._settings.tool_list_timeout_s
        found: dict[str, Listed] = {}
        cursors: set[str] = set()
        cursor = ""
        bytes_left = self._settings.tool_list_bytes_max
        try:
            async with asyncio.timeout(timeout_s):
                while cursor not in cursors:
                    cursors.add(cursor)
                    page = await self._request(
                        session, server, "tools/list", {"cursor": cursor} if cursor else {}, timeout_s
                    )
                    size, tools = await asyncio.to_thread(self._read_page, page)  # a page may be megabytes
                    bytes_left -= size
                    if bytes_left < 0:
                        raise lists_too_much(server, f"{self._settings.tool_list_bytes_max} bytes")
                    if len(cursors) > self._settings.tool_list_pages_max:
                        raise lists_too_much(server, f"{self._settings.tool_list_pages_max} pages")
                    for tool in tools:
                        found.setdefault(tool.name, tool)
                    if len(found) > self._settings.tools_listed_max:
                        raise lists_too_much(server, f"{self._settings.tools_listed_max} tools")
                    match page:
                        case {"nextCursor": str(following)} if following:
                            cursor = following
        except TimeoutError:
            raise too_slow(server, "its list of tools", timeout_s) from None
        return list(found.values())

    async def _call(self, server: ToolServer, name: str, arguments: dict[str, Any], call_id: str) -> CallResult:
        session = await self._session(server)
        parameters = {"name": name, "arguments": arguments, "_meta": {IDEMPOTENCY_KEY: call_id}}
        result = await self._request(session, server, "tools/call", parameters, self._settings.tool_call_timeout_s)
        if result.get("resultType", "complete") != "complete":
            raise ToolFailure(
                "mcp_protocol_error",
                mcp_types.INVALID_REQUEST,
                f"The tool server '{server.label}' asks for input in mid-call, which is not offered.",
            )
        return await asyncio.to_thread(self._read_result, result)  # it may be megabytes

    def _read_page(self, page: dict[str, Any]) -> tuple[int, list[Listed]]:
        return len(msgspec.json.encode(page)), list(read_tools(self._mask.json(page)))

    def _read_result(self, result: dict[str, Any]) -> CallResult:
        return read_result(self._mask.json(result), self._settings.tool_output_bytes_max)

    async def close(self) -> None:
        """Close all sessions, and fail pending and later calls."""
        self._closed = True
        for request in self._requests:
            request.cancel()
        self._programs.release(self)
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
            if self._own_programs:
                await self._programs.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _session(self, server: ToolServer) -> "_Session":
        """The open session of a server, or a new one. Raises ToolFailure."""
        if self._closed:
            raise closed(server)
        if server.fault:
            raise ToolFailure("http_error", 401, server.fault)
        if server.command:
            session = await self._programs.lend(server, self, self._tenant, self._open)
        else:
            session = self._of_run(server)
        await session.until_open()
        return session

    def _of_run(self, server: ToolServer) -> "_Session":
        session = self._current.get(server.key)
        if session is None or session.over:
            session = self._current[server.key] = self._open(server)
            self._all.append(session)
        return session

    def _open(self, server: ToolServer) -> "_Session":
        return _Session(server, self._guard, self._settings, self._tenant)

    async def _request(
        self, session: "_Session", server: ToolServer, method: str, parameters: Mapping[str, Any], timeout_s: float
    ) -> dict[str, Any]:
        """A request that is cancelled with the run, even if the session is shared. Raises ToolFailure."""
        request = asyncio.ensure_future(session.request(method, parameters, timeout_s))
        self._requests.add(request)
        request.add_done_callback(self._requests.discard)
        try:
            return await request
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if caller is None or caller.cancelling():
                raise
            raise closed(server) from None


class _Session:
    """One session: a task that runs the SDK's contexts, and the requests of its callers."""

    def __init__(self, server: ToolServer, guard: Guard, settings: Settings, tenant: str) -> None:
        self._server, self._settings = server, settings
        self._wire = _Wire(self, server, guard, settings, tenant)
        self._dispatcher: _Dispatcher | None = None
        self._failure: ToolFailure | None = None
        self._opened = asyncio.Event()
        self._leaving = False
        self._requests = self._answers = 0
        self._asked: set[str | int] = set()
        """Ids of pending requests."""
        self._hang_check: asyncio.Task[None] | None = None
        self._version = ""
        """The protocol's version, if every request must have it."""
        self.forgotten = False
        """The server has dropped the session."""
        self._task = asyncio.create_task(self._run(), name=f"tool server {server.label}")
        self._task.add_done_callback(lambda _: self._opened.set())  # also if it ends before its first step

    @property
    def over(self) -> bool:
        """Whether it takes no more requests."""
        ended = self._dispatcher is not None and self._dispatcher.ended.is_set()
        return self.forgotten or ended or self._leaving or self._task.done()

    async def until_open(self) -> None:
        """Wait until requests can be sent. Raises ToolFailure."""
        timeout_s = self._settings.tool_connect_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await self._opened.wait()
        except TimeoutError:
            self._leaving = True
            self._task.cancel()
            self._failure = self._failure or too_slow(self._server, "its greeting", timeout_s)
        if self._dispatcher is None:
            raise self._failure or closed(self._server)

    async def request(self, method: str, parameters: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Send a request, once, and wait for its result. Raises ToolFailure."""
        assert self._dispatcher is not None
        self._requests += 1
        request_id = f"r{self._requests}"  # the SDK's own are numbers
        answers = self._answers
        self._asked.add(request_id)
        try:
            async with asyncio.timeout(timeout_s):
                result = await self._dispatcher.send_raw_request(
                    method,
                    self._stamped(parameters),
                    {"request_id": request_id, "headers": self._routing(method, parameters)},
                )
            self._answers += 1
            return result  # noqa: TRY300 the `finally` is for both
        except TimeoutError:
            if self._server.command and answers == self._answers and self._hang_check is None:
                self._hang_check = asyncio.create_task(self._end_if_hung())
            raise too_slow(self._server, method, timeout_s) from None
        except MCPError as error:
            self._answers += 1
            raise self._wire.failures.pop(request_id, None) or failure_of(error, self._server) from None
        finally:
            self._asked.discard(request_id)

    async def _end_if_hung(self) -> None:
        """End a program that answered nothing while a request timed out, unless it answers a ping."""
        assert self._dispatcher is not None
        try:
            async with asyncio.timeout(self._settings.tool_connect_timeout_s):
                await self._dispatcher.send_raw_request("ping", self._stamped({}), {"cancel_on_abandon": False})
        except TimeoutError:
            log.warning("A tool server's program hangs.", action="tool_program_hung", label=self._server.label)
            self.leave()
        except MCPError:
            pass  # an answer, or the end of the session
        finally:
            self._hang_check = None

    def _stamped(self, parameters: Mapping[str, Any]) -> Mapping[str, Any]:
        """Parameters with the `_meta` that a protocol version without a handshake needs in each request."""
        if not self._version:
            return parameters
        stamp = {
            mcp_types.PROTOCOL_VERSION_META_KEY: self._version,
            mcp_types.CLIENT_INFO_META_KEY: CLIENT.model_dump(by_alias=True, exclude_none=True),
            mcp_types.CLIENT_CAPABILITIES_META_KEY: {},
        }
        return {**parameters, "_meta": {**parameters.get("_meta", {}), **stamp}}

    def _routing(self, method: str, parameters: Mapping[str, Any]) -> dict[str, str]:
        """The HTTP headers that such a version needs."""
        if not self._version:
            return {}
        named = {MCP_NAME_HEADER: encode_header_value(parameters["name"])} if "name" in parameters else {}
        return {MCP_PROTOCOL_VERSION_HEADER: self._version, MCP_METHOD_HEADER: method, **named}

    def when_ended(self, then: Callable[[], None]) -> None:
        """Call `then` after its end."""
        self._task.add_done_callback(lambda _: then())

    def leave(self) -> asyncio.Task[None]:
        """Close the session; returns the task that does."""
        self._leaving = True
        if self._dispatcher is None:
            self._task.cancel()
        else:
            self._dispatcher.ended.set()
        return self._task

    async def _run(self) -> None:
        try:
            if self._server.command:
                await self._serve(self._program())
            else:
                await self._serve_http()
        except Exception as error:  # noqa: BLE001 - callers get it
            self._failure = failure_of(error, self._server)
        finally:
            if self._hang_check is not None:
                self._hang_check.cancel()

    async def _serve_http(self) -> None:
        """Use Streamable HTTP, or HTTP+SSE if the first POST is refused with a 4xx."""
        try:
            await self._serve(self._streamable())
        except Exception:
            first = self._wire.failures.get("initialize")
            if first is None:
                raise
            if not _may_speak_other_version(first):
                raise first from None
            self._wire.failures.clear()
            self._wire.two_streams = True
            try:
                await self._serve(self._two_streams())
            except Exception:  # both failed: report the newer transport's failure
                if self._dispatcher is not None:
                    raise
                raise first from None

    async def _serve(self, transport: AbstractAsyncContextManager[Any]) -> None:
        """Open a session over a transport, and keep it open until `leave` or its end."""
        async with transport as (incoming, outgoing):
            dispatcher = self._wire.dispatcher = _Dispatcher(incoming, outgoing)
            async with ClientSession(dispatcher=dispatcher, client_info=CLIENT) as session:
                await self._initialize(session)
                self._dispatcher = dispatcher
                self._opened.set()
                await dispatcher.ended.wait()

    async def _initialize(self, session: ClientSession) -> None:
        """Initialize the session, or discover a server without a handshake: since version 2026-07-28 each request is complete."""
        try:
            await session.initialize()
        except MCPError as first:
            noted = self._wire.failures.get("initialize")
            if noted is not None and not _may_speak_other_version(noted):
                raise
            try:
                await session.discover()
            except (MCPError, RuntimeError, ValueError):
                raise first from None
            self._version = session.protocol_version or ""

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

    def _program(self) -> AbstractAsyncContextManager[Any]:
        """The streams of a program that is started for this session."""
        if not self._server.trusted:
            raise OutboundRefused(self._server.label, "only the operator's catalog starts programs")

        def too_long(request_id: str | int) -> None:
            if request_id in self._asked and self._wire.dispatcher is not None:
                self._wire.failures[request_id] = self._wire.too_long()
                self._wire.dispatcher.abandon(request_id)

        return program_streams(
            self._server,
            line_bytes_max=self._settings.tool_answer_bytes_max,
            too_long=too_long,
            initialized=self._opened.is_set,
        )

    def _client(self, *_: object, **__: object) -> httpx2.AsyncClient:
        """An HTTP client without a read timeout: each request has its own deadline."""
        timeout_s = self._settings.tool_connect_timeout_s
        return httpx2.AsyncClient(
            transport=self._wire,
            headers=self._server.request_headers,
            timeout=httpx2.Timeout(timeout_s, read=None),
            trust_env=False,
        )


ToolPrograms: TypeAlias = Programs[_Session]
"""The programs that the runs of this process share."""


class _Dispatcher(JSONRPCDispatcher):
    """The SDK's dispatcher, with an event for the end of its connection, set before pending requests fail."""

    def __init__(self, incoming: Any, outgoing: Any) -> None:
        super().__init__(incoming, outgoing)
        self.ended = asyncio.Event()
        self._places = asyncio.Semaphore(REQUESTS_AT_ONCE_MAX)

    async def _dispatch_request(self, *arguments: Any) -> None:
        """Each request becomes a task: stop reading while there are too many."""
        await self._places.acquire()
        await super()._dispatch_request(*arguments)

    async def _handle_request(self, *arguments: Any) -> None:
        try:
            await super()._handle_request(*arguments)
        finally:
            self._places.release()

    def _fan_out_closed(self) -> None:
        self.ended.set()
        super()._fan_out_closed()

    def abandon(self, request_id: str | int) -> None:
        """Fail a pending request that will not be answered."""
        self._resolve_pending(
            request_id, mcp_types.ErrorData(code=mcp_types.CONNECTION_CLOSED, message="Connection closed")
        )


class _Message(Struct):
    """The fields of an outgoing message that matter here: requests have an id and a method."""

    id: str | int | None = None
    method: str = ""


class _Wire(httpx2.AsyncBaseTransport):
    """The HTTP transport under the SDK's: the guard, limits, and the failure of each request.

    With the SDK's transports an HTTP error of one request ends the whole session, or loses its status. So a failed POST gets a response
    made here, and the failure is stored under the request's id.
    """

    def __init__(self, session: _Session, server: ToolServer, guard: Guard, settings: Settings, tenant: str) -> None:
        self._session, self._server = session, server
        self._inner = guard.open_transport() if server.trusted else guard.transport(tenant)
        self._quick_s = settings.tool_connect_timeout_s
        self._bytes_max = settings.tool_answer_bytes_max
        self.two_streams = False
        """HTTP+SSE: results come as events of one long GET, not as the responses of POSTs."""
        self.dispatcher: _Dispatcher | None = None
        self.failures: dict[str | int, ToolFailure] = {}
        """By request id; that of the first request by "initialize"."""

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        message = _Message()
        if request.method == "POST":
            message = msgspec.json.decode(await request.aread(), type=_Message)
        waited_for = message.id is not None and message.method and not self.two_streams
        if request.method != "GET" and not waited_for:
            # The response is not needed, and the next message waits for it.
            quick_s = DELETE_S if request.method == "DELETE" else self._quick_s
            request.extensions["timeout"] = {**request.extensions.get("timeout", {}), "read": quick_s}
        try:
            response = await self._inner.handle_async_request(request)
        except (httpx2.TransportError, OutboundRefused) as error:
            if request.method != "POST":
                raise
            return self._failed(request, message, failure_of(error, self._server))
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        if response.status_code >= 400 and request.method == "POST":
            await response.aclose()
            return self._failed(request, message, refused(response.status_code, self._server))
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            await response.aclose()
            failure = garbled(self._server, "its answer is compressed, which was not asked for")
            return self._failed(request, message, failure)
        body = response.stream
        if request.method != "GET" or response.status_code != 200:  # the events of a GET are limited one by one
            body = _Limited(body, self, message, self._bytes_max)
        response.stream = _Mended(body, self._bytes_max)
        return response

    def _failed(self, request: httpx2.Request, message: _Message, failure: ToolFailure) -> httpx2.Response:
        """The response for the SDK: an error, or for HTTP+SSE a 202, since an error would end its writer."""
        self.note(message, failure)
        if not self.two_streams:
            return httpx2.Response(502, request=request)
        if self.dispatcher is not None and message.id is not None:
            self.dispatcher.abandon(message.id)
        return httpx2.Response(202, request=request)

    def note(self, message: _Message, failure: ToolFailure) -> None:
        """Store the failure of a request for its caller."""
        if message.method == "initialize":
            self.failures["initialize"] = failure
        elif message.id is not None and message.method:
            self.failures[message.id] = failure
            # a 404: the server has dropped the session, and later calls need a new one
            self._session.forgotten = self._session.forgotten or failure.code == 404

    def broken(self, message: _Message, error: Exception) -> httpx2.StreamError:
        """Store that a response is incomplete; returns an error that the SDK's transports survive."""
        failure = error if isinstance(error, ToolFailure) else failure_of(error, self._server)
        self.note(message, failure)
        return httpx2.StreamError(failure.message)

    def too_long(self) -> ToolFailure:
        """The failure for an answer over the limit."""
        return garbled(self._server, f"its answer is longer than {self._bytes_max} bytes")

    async def aclose(self) -> None:
        await self._inner.aclose()


class _Limited(httpx2.AsyncByteStream):
    """The body of a response, up to the limit."""

    def __init__(self, body: httpx2.AsyncByteStream, wire: _Wire, message: _Message, bytes_max: int) -> None:
        self._body, self._wire, self._message, self._bytes_max = body, wire, message, bytes_max

    async def __aiter__(self) -> AsyncIterator[bytes]:
        count = 0
        try:
            async for part in self._body:
                count += max(len(part), PART_BYTES_MIN)
                if count > self._bytes_max:
                    raise self._wire.broken(self._message, self._wire.too_long())
                yield part
        except httpx2.TransportError as error:
            raise self._wire.broken(self._message, error) from error

    async def aclose(self) -> None:
        await self._body.aclose()


class _Mended(httpx2.AsyncByteStream):
    """A body without escapes of lone surrogates, which the SDK can't read; output that was cut has them. It is passed on in whole
    lines, as an escape has no line break."""

    def __init__(self, body: httpx2.AsyncByteStream, line_bytes_max: int) -> None:
        self._body, self._line_bytes_max = body, line_bytes_max

    async def __aiter__(self) -> AsyncIterator[bytes]:
        line: list[bytes] = []
        count = 0
        parts = itertools.count(1)
        async for part in self._body:
            if next(parts) % PARTS_AT_ONCE == 0:
                await asyncio.sleep(0)  # else buffered chunks are read without a pause
            end = max(part.rfind(b"\n"), part.rfind(b"\r")) + 1
            if end:
                yield mend_surrogates(b"".join([*line, part[:end]]))
                line, count = [], 0
            line.append(part[end:])
            count += max(len(line[-1]), PART_BYTES_MIN)
            if count > self._line_bytes_max:
                raise httpx2.StreamError("a line is too long")
        yield mend_surrogates(b"".join(line))

    async def aclose(self) -> None:
        await self._body.aclose()


def _may_speak_other_version(failure: ToolFailure) -> bool:
    """Whether a refused `initialize` may come from a server that speaks an older or a newer version."""
    return failure.kind == "http_error" and 400 <= failure.code < 500 and failure.code not in NOT_THE_PROTOCOL
