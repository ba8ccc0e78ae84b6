"""Sessions with MCP tool servers, for one run: list the tools, call one.

    async with ToolSessions(guard, settings, mask) as sessions:
        tools = await sessions.list_tools(server)
        result = await sessions.call(server, "add", {"a": 1}, call_id="mcp_123")

A session is opened when it is first needed, kept for the whole run, and closed with it. Over HTTP it is Streamable HTTP, or
the older HTTP+SSE where the server refuses the first POST with a 4xx, as the specification says; `command` is a program that
is spoken to over its standard input and output, and shared with other runs (`programs.py`).

The SDK's contexts are task groups, which must be left by the task that entered them: each session is a task of its own that
holds them, and callers only put requests into it. A call that was sent is never sent again, neither by us nor by HTTP: when
its answer is lost, nobody knows what became of it, and the call fails. What a server asks of us (sampling, elicitation,
roots) is refused by the SDK, since we offer none of it.

Results are taken from under the SDK's models, which would refuse a whole list for one bad schema (`answers.py`).
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
"""Where in a call's `_meta` its id stands, so that a careful server can tell a repetition from a new call."""

CLOSE_S = 10.0
"""How long a session may take to end; longer than `program.py` takes for a program that does not."""

GOODBYE_S = 2.0
"""How long a server may take to answer that it has heard of the end of a session."""

PART_BYTES_MIN = 256
"""What a part of an answer counts for at least: each costs as much as so many bytes, however few it has."""

PARTS_AT_ONCE = 64
"""Services of an answer that are read without a pause."""

REQUESTS_AT_ONCE_MAX = 16
"""Of a server to us; it reads no answers, or asks without end, where more would have to wait. We refuse all of them."""

STILL_NO_MCP = frozenset({401, 403, 407, 408, 429})
"""Refusals of a greeting that are meant for us, and do not say that the server speaks another protocol."""


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
        """`mask` takes out of answers what the run's servers were told in confidence. Without `programs` to share it has its
        own, which end with it."""
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
        """Failures quote servers."""
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
                    size, tools = await asyncio.to_thread(self._read_page, page)  # a server may send megabytes
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
        """End all sessions, whatever they are doing; later calls fail."""
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
        """The open session of a server; a new one where there is none, or where the old one has ended."""
        if self._closed:
            raise closed(server)
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
        """A request that ends with the run, though the session may go on. Raises ToolFailure."""
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
    """One session: a task that holds the SDK's contexts, and requests that callers put into it."""

    def __init__(self, server: ToolServer, guard: Guard, settings: Settings, tenant: str) -> None:
        self._server, self._settings = server, settings
        self._wire = _Wire(self, server, guard, settings, tenant)
        self._dispatcher: _Dispatcher | None = None
        self._failure: ToolFailure | None = None
        self._opened = asyncio.Event()
        self._leaving = False
        self._requests = self._answers = 0
        self._asked: set[str | int] = set()
        """Ids of requests that wait for their answers."""
        self._doubt: asyncio.Task[None] | None = None
        self._version = ""
        """The protocol's, where every request must say it."""
        self.forgotten = False
        """The server no longer knows it."""
        self._task = asyncio.create_task(self._run(), name=f"tool server {server.label}")
        self._task.add_done_callback(lambda _: self._opened.set())  # also if it ends before its first step

    @property
    def over(self) -> bool:
        """No use for another request."""
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
        request_id = f"r{self._requests}"  # The SDK's own are numbers.
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
            return result  # noqa: TRY300 the answer counts, whether good or bad
        except TimeoutError:
            if self._server.command and answers == self._answers and self._doubt is None:
                self._doubt = asyncio.create_task(self._end_if_hung())
            raise too_slow(self._server, method, timeout_s) from None
        except MCPError as error:
            self._answers += 1
            raise self._wire.failures.pop(request_id, None) or failure_of(error, self._server) from None
        finally:
            self._asked.discard(request_id)

    async def _end_if_hung(self) -> None:
        """A program that has answered nothing for the whole of a request, and does not answer now, is no use to anybody."""
        assert self._dispatcher is not None
        try:
            async with asyncio.timeout(self._settings.tool_connect_timeout_s):
                await self._dispatcher.send_raw_request("ping", self._stamped({}), {"cancel_on_abandon": False})
        except TimeoutError:
            log.warning("A tool server's program hangs.", action="tool_program_hung", label=self._server.label)
            self.leave()
        except MCPError:
            pass  # that is an answer, or its end
        finally:
            self._doubt = None

    def _stamped(self, parameters: Mapping[str, Any]) -> Mapping[str, Any]:
        """Parameters with what a protocol without handshakes wants to have in each request."""
        if not self._version:
            return parameters
        stamp = {
            mcp_types.PROTOCOL_VERSION_META_KEY: self._version,
            mcp_types.CLIENT_INFO_META_KEY: CLIENT.model_dump(by_alias=True, exclude_none=True),
            mcp_types.CLIENT_CAPABILITIES_META_KEY: {},
        }
        return {**parameters, "_meta": {**parameters.get("_meta", {}), **stamp}}

    def _routing(self, method: str, parameters: Mapping[str, Any]) -> dict[str, str]:
        """The same for headers."""
        if not self._version:
            return {}
        named = {MCP_NAME_HEADER: encode_header_value(parameters["name"])} if "name" in parameters else {}
        return {MCP_PROTOCOL_VERSION_HEADER: self._version, MCP_METHOD_HEADER: method, **named}

    def when_ended(self, then: Callable[[], None]) -> None:
        """Call `then` when nothing of it is left."""
        self._task.add_done_callback(lambda _: then())

    def leave(self) -> asyncio.Task[None]:
        """Say goodbye; gives the task that does."""
        self._leaving = True
        if self._dispatcher is None:
            self._task.cancel()
        else:
            self._dispatcher.ended.set()
        return self._task

    async def _run(self) -> None:
        try:
            if self._server.command:
                await self._hold(self._program())
            else:
                await self._hold_http()
        except Exception as error:  # noqa: BLE001 - whatever it is, callers hear of it
            self._failure = failure_of(error, self._server)
        finally:
            if self._doubt is not None:
                self._doubt.cancel()

    async def _hold_http(self) -> None:
        """Streamable HTTP, or HTTP+SSE where its first POST is refused with a 4xx."""
        try:
            await self._hold(self._streamable())
        except Exception:
            first = self._wire.failures.get("initialize")
            if first is None:
                raise
            if not _may_be_another_time(first):
                raise first from None
            self._wire.failures.clear()
            self._wire.two_streams = True
            try:
                await self._hold(self._two_streams())
            except Exception:  # Both were tried; the newer one's refusal says more.
                if self._dispatcher is not None:
                    raise
                raise first from None

    async def _hold(self, transport: AbstractAsyncContextManager[Any]) -> None:
        """Open a session over a transport and keep it until somebody leaves."""
        async with transport as (incoming, outgoing):
            dispatcher = self._wire.dispatcher = _Dispatcher(incoming, outgoing)
            async with ClientSession(dispatcher=dispatcher, client_info=CLIENT) as session:
                await self._greet(session)
                self._dispatcher = dispatcher
                self._opened.set()
                await dispatcher.ended.wait()

    async def _greet(self, session: ClientSession) -> None:
        """Shake hands. A server that knows no handshake is asked what it speaks: from 2026-07-28 on each request says all."""
        try:
            await session.initialize()
        except MCPError as first:
            noted = self._wire.failures.get("initialize")
            if noted is not None and not _may_be_another_time(noted):
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
            greeted=self._opened.is_set,
        )

    def _client(self, *_: object, **__: object) -> httpx2.AsyncClient:
        """An HTTP client; how long an answer may take is said by each request's deadline."""
        timeout_s = self._settings.tool_connect_timeout_s
        return httpx2.AsyncClient(
            transport=self._wire,
            headers=self._server.request_headers,
            timeout=httpx2.Timeout(timeout_s, read=None),
            trust_env=False,
        )


ToolPrograms: TypeAlias = Programs[_Session]
"""The programs that the runs of a process share."""


class _Dispatcher(JSONRPCDispatcher):
    """The SDK's, which also says that its connection has ended, before those who wait for answers hear of it."""

    def __init__(self, incoming: Any, outgoing: Any) -> None:
        super().__init__(incoming, outgoing)
        self.ended = asyncio.Event()
        self._places = asyncio.Semaphore(REQUESTS_AT_ONCE_MAX)

    async def _dispatch_request(self, *arguments: Any) -> None:
        """Each request becomes a task: while there are too many, nothing more is read."""
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

    def __init__(self, session: _Session, server: ToolServer, guard: Guard, settings: Settings, tenant: str) -> None:
        self._session, self._server = session, server
        self._inner = guard.open_transport() if server.trusted else guard.transport(tenant)
        self._quick_s = settings.tool_connect_timeout_s
        self._bytes_max = settings.tool_answer_bytes_max
        self.two_streams = False
        """HTTP+SSE: results do not come on the answer of a POST but on the one long GET."""
        self.dispatcher: _Dispatcher | None = None
        self.failures: dict[str | int, ToolFailure] = {}
        """By request id; that of the first request under "initialize"."""

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        message = _Message()
        if request.method == "POST":
            message = msgspec.json.decode(await request.aread(), type=_Message)
        waited_for = message.id is not None and message.method and not self.two_streams
        if request.method != "GET" and not waited_for:
            # Nothing of worth comes as an answer, and what is sent next must not wait for it for long.
            quick_s = GOODBYE_S if request.method == "DELETE" else self._quick_s
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
        if request.method != "GET" or response.status_code != 200:  # a GET is a stream, of events that are limited each
            body = _Limited(body, self, message, self._bytes_max)
        response.stream = _Mended(body, self._bytes_max)
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
            self._session.forgotten = self._session.forgotten or failure.code == 404

    def broken(self, message: _Message, error: Exception) -> httpx2.StreamError:
        """Note that an answer did not come to its end; gives what the SDK's transports survive."""
        failure = error if isinstance(error, ToolFailure) else failure_of(error, self._server)
        self.note(message, failure)
        return httpx2.StreamError(failure.message)

    def too_long(self) -> ToolFailure:
        """An answer is over the limit."""
        return garbled(self._server, f"its answer is longer than {self._bytes_max} bytes")

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
                count += max(len(part), PART_BYTES_MIN)
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
        parts = itertools.count(1)
        async for part in self._body:
            if next(parts) % PARTS_AT_ONCE == 0:
                await asyncio.sleep(0)  # what has come already would be read without a pause
            end = max(part.rfind(b"\n"), part.rfind(b"\r")) + 1
            if end:
                yield mend_surrogates(b"".join([*held, part[:end]]))
                held, count = [], 0
            held.append(part[end:])
            count += max(len(held[-1]), PART_BYTES_MIN)
            if count > self._line_bytes_max:
                raise httpx2.StreamError("a line is too long")
        yield mend_surrogates(b"".join(held))

    async def aclose(self) -> None:
        await self._body.aclose()


def _may_be_another_time(failure: ToolFailure) -> bool:
    """Whether a refused greeting may come from a server that speaks an older or a newer protocol."""
    return failure.kind == "http_error" and 400 <= failure.code < 500 and failure.code not in STILL_NO_MCP
