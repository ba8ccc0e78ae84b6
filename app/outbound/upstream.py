"""The upstream's chat stream, through the `openai` SDK's configuration and HTTP client.

The SDK provides the URL, the headers and the connection pool. Its request and stream objects are not used, as they cost more than the
rest of a request: the body is encoded already, and msgspec decodes the stream, all chunks of one read together.

An upstream is not trusted with memory. Redirects are not followed, cookies not stored, and compressed answers refused: the conversation
and the key go only to the operator's URL, and limits count the bytes in memory. Every answer has a limit in bytes.
"""

import asyncio
import codecs
import math
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import closing
from contextvars import ContextVar
from functools import cached_property
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, ClassVar
from weakref import WeakSet

import aiohttp
import httpx2
import stamina
import structlog
from msgspec import Struct
from msgspec.structs import replace
from openai import AsyncOpenAI, DefaultAioHttpClient
from openai._vendor.httpx_aiohttp import AiohttpTransport

from app.domain.dialect import PRESETS, Dialect, ReasoningForm, preset_of_owners
from app.errors import (
    ApiError,
    UpstreamBusy,
    UpstreamError,
    UpstreamGarbled,
    UpstreamRefused,
    UpstreamStalled,
    UpstreamUnavailable,
)
from app.idle_timeout import IdleTimeout
from app.outbound.catalog import Route, UpstreamEntry
from app.outbound.failures import NO_CREDIT, NO_JSON, ErrorContext, KeyRefused, failed_in_stream, refused
from app.outbound.masking import KEY_NAME, Mask, secrets_of
from app.settings import Settings
from app.wire.chat import Chunk, ModelEntry
from app.wire.odd_chunks import is_error, read_chunk, read_completion, read_models

log = structlog.get_logger()

NO_KEY = "none"
"""The SDK requires a key; servers without one ignore it."""

MERE_WORD = re.compile(r"[A-Za-z]{1,12}")
"""A key that is no secret, such as `ollama`: masking it would garble error messages."""

SDK_HEADERS = "x-stainless-"
"""The prefix of the SDK's headers about its platform, which an upstream does not need."""

TAIL_WAIT_S = 2.0
"""How long to wait for the usage, or for the end of the connection, after the finish."""

DETECT_TIMEOUT_S, DETECT_INTERVAL_S = 2.0, 10.0

FORMS_MAX = 1_000

CONTEXT_TOKENS_S = 600.0
"""How long the size of a context is believed: an engine may be started again with another one."""

BROKEN_OFF = "The upstream broke off its answer."

DISCONNECTED = (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError)
"""The connection was closed before an answer began."""

_FIELDS = (b"data:", b"error:")


class _Sent(Struct):
    """How a request was sent."""

    on_reused: bool = False
    """On a connection that another request used before."""


_SENT: ContextVar[_Sent] = ContextVar("sent")


class _Request(aiohttp.ClientRequest):
    """A request that discards unsent bytes when it is cancelled: if the upstream does not read, they would stay in memory."""

    _used: ClassVar[WeakSet[object]] = WeakSet()

    async def send(self, conn: aiohttp.connector.Connection) -> aiohttp.ClientResponse:
        transport = conn.transport
        assert transport is not None
        _SENT.get().on_reused = conn.protocol in self._used
        self._used.add(conn.protocol)

        def drop_unsent() -> None:
            if transport.get_write_buffer_size():
                transport.abort()

        conn.add_callback(drop_unsent)
        return await super().send(conn)


class _Transport(AiohttpTransport):
    """The SDK's transport without cookies, and with an error for unreadable heads. Engines close idle connections without notice:
    a request that fails on a reused connection is sent again, once, on a new one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._options = options

    @cached_property
    def _without_keepalive(self) -> "_Transport":
        limits = httpx2.Limits(max_connections=self.limits.max_connections, keepalive_expiry=0)
        return _Transport(**{**self._options, "limits": limits})

    def get_client(self) -> aiohttp.ClientSession:
        made = super().get_client()
        connector = made.connector
        made.detach()
        return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar(), request_class=_Request)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        sent = _Sent()
        _SENT.set(sent)
        try:
            return await super().handle_async_request(request)
        except (aiohttp.ClientResponseError, UnicodeError):
            raise httpx2.RemoteProtocolError("the head can't be read") from None  # the cause quotes the head
        except httpx2.TransportError as error:
            if not (sent.on_reused and isinstance(error.__cause__, DISCONNECTED)):
                raise
        return await self._without_keepalive.handle_async_request(request)

    async def aclose(self) -> None:
        if "_without_keepalive" in self.__dict__:
            await self._without_keepalive.aclose()
        await super().aclose()


class _Client(DefaultAioHttpClient):
    """The SDK's client with this transport."""

    def _init_transport(self, *_: Any, **options: Any) -> httpx2.AsyncBaseTransport:
        return _Transport(**options)

    def _init_proxy_transport(self, proxy: httpx2.Proxy, *_: Any, **options: Any) -> httpx2.AsyncBaseTransport:
        return _Transport(proxy=proxy, **options)


class _PendingRequest(Struct):
    """A request that is cleared once it is sent: stamina's attempts are reference cycles, which hold their arguments."""

    model: str
    body: bytes
    caller_key: str | None


class Upstream:
    """One Chat Completions server."""

    def __init__(self, name: str, entry: UpstreamEntry, settings: Settings) -> None:
        self.name = name
        self.entry = entry
        self.dialect: Dialect = entry.speaks
        """The plain one until it is detected, unless the catalog names it."""
        self.dialect_name = entry.dialect_name
        self._forms: dict[str, ReasoningForm] = {}
        self._context_tokens: dict[str, tuple[int, float]] = {}
        self._detection: asyncio.Task[None] | None = None
        self._detect_at = 0.0
        self.passes_caller = settings.upstream_auth == "caller"
        self._attempts_max = entry.attempts_max or settings.upstream_attempts_max
        self._retry_after_max_s = settings.upstream_retry_after_max_s
        self.idle_timeout_s = entry.idle_timeout_s or settings.upstream_idle_timeout_s
        self.line_bytes_max = settings.upstream_line_bytes_max
        self._error_bytes_max = settings.upstream_error_bytes_max
        self._answer_timeout_s = entry.answer_timeout_s or settings.upstream_answer_timeout_s
        # No read timeout: the transport would set a timer for each read. `IdleTimeout` limits reads.
        timeout = httpx2.Timeout(
            self._answer_timeout_s,
            connect=entry.connect_timeout_s or settings.upstream_connect_timeout_s,
            read=None,
        )
        self._http = _Client(
            timeout=timeout,
            limits=httpx2.Limits(max_connections=settings.upstream_connections_max),
            follow_redirects=False,
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
        )
        sdk = AsyncOpenAI(
            base_url=entry.base_url,
            api_key=entry.key or NO_KEY,
            http_client=self._http,
        )
        self._base = sdk.base_url
        self._chat, self._models = self._url("chat/completions"), self._url("models")
        keys_in_url = (value for name, value in sdk.base_url.params.multi_items() if KEY_NAME.search(name))
        self._secrets = [*keys_in_url, *secrets_of(entry.headers)]
        sdk_headers = {**sdk.auth_headers, **sdk.default_headers}
        self._headers = httpx2.Headers(
            {
                name: value
                for name, value in sdk_headers.items()
                if isinstance(value, str) and not name.lower().startswith(SDK_HEADERS)
            }
        )
        self._headers.update({**entry.headers, "Accept-Encoding": "identity"})
        # Made once: preparing it costs as much as a first attempt.
        self._opened = stamina.retry(
            on=self._backoff, attempts=self._attempts_max, timeout=None, wait_initial=0.1, wait_jitter=0.1, wait_max=2.0
        )(self._open)

    def _url(self, path: str) -> httpx2.URL:
        """The URL of a path below the base URL or, with a slash before it, beside its `/v1`."""
        base = self._base
        if path.startswith("/"):
            base, path = base.copy_with(path=base.path.removesuffix("/v1/") + "/"), path[1:]
        return base.join(path).copy_with(query=self._base.query or None)

    async def find_dialect(self, caller_key: str | None) -> None:
        """Detect the dialect, unless it is known. If the upstream does not answer in DETECT_TIMEOUT_S, the plain dialect is used, and
        detection is tried again after DETECT_INTERVAL_S."""
        if self.dialect_name:
            return
        now = asyncio.get_running_loop().time()
        if self._detection is None and now >= self._detect_at:
            self._detect_at = now + DETECT_INTERVAL_S
            self._detection = asyncio.create_task(self._detect(caller_key))
        if self._detection:
            await asyncio.wait({self._detection})

    async def _detect(self, caller_key: str | None) -> None:
        try:
            async with asyncio.timeout(DETECT_TIMEOUT_S):
                models = await self.list_models(caller_key)
        except (UpstreamRefused, KeyRefused) as refusal:
            if self.passes_caller and refusal.status == 403:
                return  # not for this caller's key
            models = []  # it has no list of models, or none for our key
        except (ApiError, TimeoutError):
            return
        else:
            if not models:
                return  # no model is loaded yet
        finally:
            self._detection = None
        self.recognize(models)
        log.info("A dialect was found.", action="dialect_found", upstream=self.name, dialect=self.dialect_name)

    def recognize(self, models: Sequence[ModelEntry]) -> None:
        """Use the dialect of the engine that lists these models, unless the catalog names one."""
        if self.dialect_name:
            return
        self.dialect_name = found = preset_of_owners(model.owned_by for model in models) or "plain"
        self.dialect = PRESETS[found]

    def dialect_for(self, route: Route) -> Dialect:
        """The dialect for a route's model: without what that lacks, and earlier reasoning is sent back in the form in which it sends
        it."""
        dialect, form = self.dialect, self._forms.get(route.model)
        if route.lacks:
            dialect = replace(dialect, lacks=dialect.lacks | route.lacks)
        return replace(dialect, reasoning=form) if form else dialect

    def record_reasoning_form(self, model: str, form: ReasoningForm | None) -> None:
        """Remember the form of a model's reasoning, for the last FORMS_MAX models."""
        if form and (self.dialect.reasoning == "same" or model in self._forms):
            self._forms.pop(model, None)
            self._forms[model] = form
            if len(self._forms) > FORMS_MAX:
                del self._forms[next(iter(self._forms))]

    def context_tokens(self, model: str) -> int | None:
        """The size of a model's context, if the upstream has named it in the last CONTEXT_TOKENS_S."""
        tokens, named_s = self._context_tokens.get(model, (None, -math.inf))
        return tokens if time.monotonic() - named_s < CONTEXT_TOKENS_S else None

    def record_context_tokens(self, model: str, tokens: int | None) -> None:
        """Remember the size of a model's context, for the last FORMS_MAX models."""
        if tokens:
            self._context_tokens.pop(model, None)
            self._context_tokens[model] = tokens, time.monotonic()
            if len(self._context_tokens) > FORMS_MAX:
                del self._context_tokens[next(iter(self._context_tokens))]

    async def open(self, model: str, body: bytes, caller_key: str | None) -> "ChunkStream":
        """Send a chat request; returns the stream when it has content.

        Connection errors, 429 and 5xx are retried, as no event was sent to the client yet. Raises ApiError.
        """
        pending = _PendingRequest(model, body, caller_key)
        try:
            return await self._opened(pending)
        finally:
            pending.body, pending.caller_key = b"", None

    def _backoff(self, error: Exception) -> bool | float:
        if not isinstance(error, UpstreamUnavailable | UpstreamBusy) or isinstance(error, KeyRefused):
            return False
        if error.code == NO_CREDIT:
            return False
        after = error.headers.get("Retry-After")
        if after is None:
            return True
        return float(after) if after.isdigit() and float(after) <= self._retry_after_max_s else False

    async def _open(self, pending: "_PendingRequest") -> "ChunkStream":
        try:
            async with asyncio.timeout(self._answer_timeout_s):
                return await self._begin(pending)
        except TimeoutError:
            error: UpstreamError = UpstreamStalled("The upstream did not answer in time.")
        except UpstreamError as failed:
            error = failed
        error.upstream = self.name
        raise error

    async def _begin(self, pending: "_PendingRequest") -> "ChunkStream":
        response = await self._ask("POST", self._chat, pending.caller_key, pending.body)
        stream = ChunkStream(self, pending.model, response, self._error_context(pending.caller_key))
        try:
            await stream.begin()
        except BaseException:
            await stream.close()
            raise
        return stream

    def _error_context(self, caller_key: str | None) -> ErrorContext:
        return ErrorContext(self.name, self.passes_caller, self.mask(caller_key))

    def mask(self, caller_key: str | None) -> Mask:
        """Masks keys in the upstream's error messages; the model's output is not masked."""
        keys = (self.entry.key, caller_key if self.passes_caller else None)
        return Mask([*self._secrets, *(key for key in keys if key and not MERE_WORD.fullmatch(key))])

    async def list_models(self, caller_key: str | None) -> list[ModelEntry]:
        """The models that the upstream lists. Raises ApiError."""
        response = await self._ask("GET", self._models, caller_key)
        raw = await self._whole(response, self.line_bytes_max)
        try:
            return read_models(raw)
        except NO_JSON:
            raise UpstreamGarbled(f"Upstream '{self.name}' sent no list of models.") from None

    async def post(self, path: str, body: bytes, caller_key: str | None, *, bytes_max: int) -> bytes:
        """The answer of another endpoint than the chat's, which is below the base URL or, with a slash before its path, beside its
        `/v1`. Raises ApiError, UpstreamGarbled also for an answer of more than `bytes_max`."""
        response = await self._ask("POST", self._url(path), caller_key, body)
        return await self._whole(response, bytes_max)

    async def _whole(self, response: httpx2.Response, bytes_max: int) -> bytes:
        try:
            async with asyncio.timeout(self._answer_timeout_s):
                return await _read(response, bytes_max)
        except TimeoutError:
            raise UpstreamStalled("The upstream did not finish its answer.") from None
        except (httpx2.HTTPError, OSError) as error:
            raise UpstreamUnavailable(f"Upstream '{self.name}' broke off its answer.") from error
        finally:
            await response.aclose()

    async def _ask(
        self, method: str, url: httpx2.URL, caller_key: str | None, body: bytes | None = None
    ) -> httpx2.Response:
        """A response with a 2xx, whose body is not read yet. Raises ApiError."""
        headers = self._headers
        if self.passes_caller and caller_key:
            headers = headers | {"Authorization": f"Bearer {caller_key}"}
        request = self._http.build_request(method, url, headers=headers, content=body)
        try:
            async with asyncio.timeout(self._answer_timeout_s):
                response = await self._http.send(request, stream=True)
        except TimeoutError:
            raise UpstreamStalled("The upstream did not answer in time.") from None
        except httpx2.RemoteProtocolError:
            raise UpstreamGarbled(f"Upstream '{self.name}' sent an answer whose head can't be read.") from None
        except (httpx2.HTTPError, OSError) as error:
            raise UpstreamUnavailable(f"Upstream '{self.name}' can't be reached.") from error
        if not response.is_success:
            raise await self._refused(response, self._error_context(caller_key))
        if not _is_compressed(response):
            return response
        await response.aclose()
        raise UpstreamGarbled(f"Upstream '{self.name}' sent a compressed answer, which was not asked for.")

    async def _refused(self, response: httpx2.Response, context: ErrorContext) -> ApiError:
        """Our error for a response that is not a 2xx, with its body's message if that can be read."""
        raw = b""
        try:
            async with asyncio.timeout(self._answer_timeout_s):
                if not _is_compressed(response):
                    raw = await _read_some(response, self._error_bytes_max)
        except TimeoutError:
            return UpstreamStalled("The upstream did not finish its answer.")
        except (httpx2.HTTPError, OSError):
            return UpstreamUnavailable(f"Upstream '{self.name}' broke off its answer.")
        finally:
            await response.aclose()
        return refused(response.status_code, response.headers, raw, context)

    async def close(self) -> None:
        """Close every connection."""
        if self._detection:
            self._detection.cancel()
        await self._http.aclose()


class ChunkStream:
    """An upstream's answer: a list of chunks for each read. Call `begin` first, and always `close`, which cancels generation."""

    def __init__(self, upstream: Upstream, model: str, response: httpx2.Response, context: ErrorContext) -> None:
        """Only the stream of a streamed response is kept: the response refers to the request, with the whole conversation."""
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        self.upstream, self.model = upstream, model
        self._error_context = context
        self._stream = response.stream
        self._reads = aiter(response.stream)  # without the bookkeeping of `aiter_raw` for each read
        self._lines = LineBuffer(upstream.line_bytes_max)
        has_events = response.headers.get("content-type", "").startswith("text/event-stream")
        self._unstreamed = None if has_events else response
        self._first: list[Chunk] = []
        self._failed: ApiError | None = None
        """An error after the first chunks, in the same read."""
        self._finished = self._done = self._ended = False
        self._tail_bytes = 0
        self.read_bytes = 0
        """The bytes of the last list of chunks; 0 after the finish."""

    async def begin(self) -> None:
        """Wait for the first content; an error before it is an error of the whole request. Raises ApiError.

        Chunks without content are dropped, up to `line_bytes_max` of them.
        """
        if self._unstreamed:
            self._first, self._ended = [await self._whole(self._unstreamed)], True
            return
        has_content = False
        while not (has_content or self._finished or self._ended) and self.read_bytes <= self.upstream.line_bytes_max:
            raw = await self._read()
            chunks, self._failed = self._parse(raw)
            has_content = any(map(_has_content, chunks))
            self._first += chunks
            if not has_content:
                self._first = [chunk for chunk in self._first if chunk.usage][-1:]
            self.read_bytes += len(raw)
            if self._failed and not has_content:
                raise self._failed

    async def __aiter__(self) -> AsyncIterator[list[Chunk]]:
        """A list for each read, even an empty one, as reads are counted. Raises UpstreamError."""
        yield self._first
        self._first = []
        if self._failed:
            raise self._failed
        idle_s = self.upstream.idle_timeout_s
        with closing(IdleTimeout(idle_s)) as idle, closing(IdleTimeout(min(idle_s, TAIL_WAIT_S))) as tail:
            while not self._ended:
                timeout = tail if self._finished else idle
                try:
                    with timeout:
                        raw = await self._read()
                except TimeoutError:
                    if self._finished:
                        return
                    raise UpstreamStalled(f"The upstream was silent for {idle_s:g} seconds.") from None
                chunks, failed = self._parse(raw)
                timeout.continues = timeout is tail or not any(map(_has_choice, chunks))
                self.read_bytes = 0 if timeout is tail else len(raw)
                yield chunks
                if failed:
                    raise failed

    async def _read(self) -> bytes:
        """The next bytes; empty at the end. Errors after the finish are ignored, as the answer is complete."""
        try:
            return await anext(self._reads)
        except StopAsyncIteration:
            self._ended = True
            if self._finished:
                return b""
            raise UpstreamUnavailable(BROKEN_OFF) from None
        except (httpx2.HTTPError, OSError) as error:
            self._ended = True
            if self._finished:
                return b""
            raise UpstreamUnavailable(BROKEN_OFF) from error

    def _parse(self, raw: bytes) -> tuple[list[Chunk], ApiError | None]:
        """The chunks of a read, and the error after them."""
        chunks: list[Chunk] = []
        try:
            payloads = self._lines.feed(raw)
        except UpstreamGarbled as error:
            self._ended = True
            return chunks, None if self._finished else error
        for data in payloads:
            if data == b"[DONE]":
                self._finished = self._done = True
            if not data or self._done:  # after [DONE] the rest is read so that the connection can be reused
                continue
            try:
                chunk = read_chunk(data)
            except NO_JSON as error:
                failed: ApiError | None = UpstreamGarbled(f"The upstream sent what is no chunk: {error}")
            else:
                failed = self._failure(chunk)
            if failed is None:
                chunks.append(chunk)
                self._finished = self._finished or _is_last(chunk)
            elif not self._finished:
                return chunks, failed
        if self._finished:
            self._tail_bytes += len(raw)
            self._ended = self._ended or self._tail_bytes > self.upstream.line_bytes_max
        return chunks, None

    def _failure(self, chunk: Chunk) -> ApiError | None:
        return failed_in_stream(chunk.error, self._error_context) if chunk.error and is_error(chunk.error) else None

    async def _whole(self, response: httpx2.Response) -> Chunk:
        """An answer that is not streamed, as one chunk."""
        try:
            raw = await _read(response, self.upstream.line_bytes_max)
            self.read_bytes = len(raw)
            chunk = read_completion(raw)
        except NO_JSON:
            raise UpstreamGarbled("The upstream sent neither a stream nor a chat completion.") from None
        except (httpx2.HTTPError, OSError):
            raise UpstreamUnavailable(BROKEN_OFF) from None
        if chunk.error and is_error(chunk.error):
            raise failed_in_stream(chunk.error, self._error_context)
        return chunk

    async def close(self) -> None:
        """Release the connection, or close it if the answer is incomplete."""
        await self._stream.aclose()


class LineBuffer:
    """Bytes, split anywhere → the payloads of `data:` lines."""

    def __init__(self, line_bytes_max: int) -> None:
        self._partial: list[bytes] = []
        self._partial_bytes = 0
        self._line_bytes_max = line_bytes_max
        self._begun = False

    def feed(self, raw: bytes) -> list[bytes]:
        """The payloads of complete lines. Raises UpstreamGarbled for a line that is too long."""
        *lines, rest = raw.split(b"\n")
        if lines and self._partial:
            lines[0] = b"".join((*self._partial, lines[0]))
            self._partial, self._partial_bytes = [], 0
        if lines and not self._begun:
            self._begun = True
            lines[0] = lines[0].removeprefix(codecs.BOM_UTF8)  # SSE allows one at the beginning
        if rest:
            self._partial.append(rest)
            self._partial_bytes += len(rest)
        if self._partial_bytes > self._line_bytes_max:
            raise UpstreamGarbled(f"The upstream sent a line of more than {self._line_bytes_max} bytes.")
        return [
            line[5:].strip() if line.startswith(b"data:") else _error_of_line(line)
            for line in lines
            if line.startswith(_FIELDS)
        ]


async def _read(response: httpx2.Response, bytes_max: int) -> bytes:
    """A whole body. Raises UpstreamGarbled if it is longer than `bytes_max`."""
    raw = await _read_some(response, bytes_max + 1)
    if len(raw) > bytes_max:
        raise UpstreamGarbled(f"The upstream sent an answer of more than {bytes_max} bytes.")
    return raw


async def _read_some(response: httpx2.Response, bytes_max: int) -> bytes:
    """The first `bytes_max` bytes of a body; no more are read."""
    assert isinstance(response.stream, httpx2.AsyncByteStream)
    parts: list[bytes] = []
    left = bytes_max
    async for part in response.stream:
        parts.append(part[:left])
        left -= len(part)
        if left <= 0:
            break
    return b"".join(parts)


def _is_compressed(response: httpx2.Response) -> bool:
    return response.headers.get("content-encoding", "identity").lower() not in {"", "identity"}


def _error_of_line(line: bytes) -> bytes:
    """A chunk for an `error:` line, as older llama.cpp sends."""
    return b'{"error":%b}' % line[6:].strip()


def _has_content(chunk: Chunk) -> bool:
    """Whether a chunk has more than the role, which some servers send before the model's output."""
    choice = chunk.choices.first if chunk.choices else None
    if choice is None or choice.finish_reason or choice.delta is None:
        return bool(choice and choice.finish_reason)
    delta = choice.delta
    reasoning = delta.reasoning_content or delta.reasoning or delta.thinking
    return bool(delta.content or reasoning or delta.refusal or delta.tool_calls or delta.annotations)


def _has_choice(chunk: Chunk) -> bool:
    """Whether a chunk shows progress of the model; comments and chunks without a choice only keep the connection alive."""
    return bool(chunk.choices and chunk.choices.first)


def _is_last(chunk: Chunk) -> bool:
    """Whether a chunk ends the answer; after `finish_reason: error` the error itself may follow."""
    reason = chunk.choices.first.finish_reason if chunk.choices and chunk.choices.first else None
    return bool(reason) and reason != "error"
