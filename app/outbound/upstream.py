"""The upstream's chat stream, through the `openai` SDK's configuration and HTTP client.

The SDK says where to ask and with which headers, and keeps the connections. Its request and stream objects are not used, which
cost more than all the rest of a request: the body is ready bytes, and the stream's bytes are decoded by msgspec, all chunks of
one read together.

An upstream is not trusted with memory. No redirect is followed, no cookie kept and nothing decompressed: the conversation and the
key go where the operator said, and what is read is what was counted. Every answer has a limit in bytes.
"""

import asyncio
import math
import re
import time
from collections.abc import AsyncIterator
from contextlib import closing
from email.utils import parsedate_to_datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import aiohttp
import httpx2
import msgspec
import stamina
from msgspec import Struct
from openai import AsyncOpenAI, DefaultAioHttpClient
from openai._vendor.httpx_aiohttp import AiohttpTransport

from app.domain.dialect import Dialect
from app.errors import (
    ApiError,
    AuthenticationFailed,
    UpstreamBusy,
    UpstreamError,
    UpstreamGarbled,
    UpstreamRefused,
    UpstreamStalled,
    UpstreamUnavailable,
)
from app.outbound.catalog import UpstreamEntry
from app.outbound.masking import Mask, secrets_of
from app.patience import Patience
from app.settings import Settings
from app.wire.chat import (
    ChatError,
    ChatUsage,
    Choice,
    Choices,
    Chunk,
    Delta,
    Logprobs,
    ModelEntry,
    ModelList,
    decode_chunk,
)

CONTEXT_TOO_LONG = "context_length_exceeded"
_TOO_LONG = re.compile(
    r"maximum context length|context (length|window|size)|exceeds? the available context", re.IGNORECASE
)

NO_KEY = "none"
"""The SDK demands a key; servers without one ignore it."""

SDK_HEADERS = "x-stainless-"
"""How the names of those headers begin in which the SDK tells OpenAI what it runs on. An upstream needs none of them."""

TAIL_WAIT_S = 2.0
"""How long the usage, or the connection's end, may come after the finish."""

MESSAGE_CHARS_MAX = 1000
"""An upstream's own words in an error; longer ones are cut."""

NO_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding raises for bytes that are no JSON of the wanted form, UTF-8, or nested by the thousand."""


class _KeyRefused(UpstreamUnavailable):
    """The upstream does not accept this server's key, however often one asks."""

    is_final = True


class _Request(aiohttp.ClientRequest):
    """One that is given up leaves nothing to send: an upstream that reads nothing would keep the conversation in memory."""

    async def send(self, conn: aiohttp.connector.Connection) -> aiohttp.ClientResponse:
        transport = conn.transport
        assert transport is not None

        def drop_unsent() -> None:
            if transport.get_write_buffer_size():
                transport.abort()

        conn.add_callback(drop_unsent)
        return await super().send(conn)


class _Transport(AiohttpTransport):
    """The SDK's, without a memory for cookies, and with an error of its own for heads that can't be read."""

    def get_client(self) -> aiohttp.ClientSession:
        made = super().get_client()
        connector = made.connector
        made.detach()
        return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar(), request_class=_Request)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        try:
            return await super().handle_async_request(request)
        except (aiohttp.ClientResponseError, UnicodeError):
            raise httpx2.RemoteProtocolError("the head can't be read") from None  # the cause quotes it


class _Client(DefaultAioHttpClient):
    """The SDK's, on such transports."""

    def _init_transport(self, *_: Any, **options: Any) -> httpx2.AsyncBaseTransport:
        return _Transport(**options)

    def _init_proxy_transport(self, proxy: httpx2.Proxy, *_: Any, **options: Any) -> httpx2.AsyncBaseTransport:
        return _Transport(proxy=proxy, **options)


class _Sending(Struct):
    """What is sent, until it is: stamina's attempts are cycles, which keep their arguments until they are collected."""

    body: bytes
    caller_key: str | None


class Upstream:
    """One Chat Completions server."""

    def __init__(self, name: str, entry: UpstreamEntry, settings: Settings) -> None:
        self.name = name
        self.entry = entry
        self.dialect: Dialect = entry.speaks
        self.passes_caller = settings.upstream_auth == "caller"
        self._attempts_max = entry.attempts_max or settings.upstream_attempts_max
        self._retry_after_max_s = settings.upstream_retry_after_max_s
        self.idle_timeout_s = entry.idle_timeout_s or settings.upstream_idle_timeout_s
        self.line_bytes_max = settings.upstream_line_bytes_max
        self._error_bytes_max = settings.upstream_error_bytes_max
        self._answer_timeout_s = entry.answer_timeout_s or settings.upstream_answer_timeout_s
        # How long reads may take is our own business: the transport would set a timer for each.
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
            default_headers={**entry.headers, "Accept-Encoding": "identity"},
            http_client=self._http,
        )
        self._chat, self._models = sdk.base_url.join("chat/completions"), sdk.base_url.join("models")
        said = {**sdk.auth_headers, **sdk.default_headers}
        self._secrets = [entry.key, *secrets_of(entry.headers)]
        self._headers = {
            name: value
            for name, value in said.items()
            if isinstance(value, str) and (name in entry.headers or not name.lower().startswith(SDK_HEADERS))
        }
        # Made once: stamina takes as long to prepare its attempts as the first of them takes.
        self._opened = stamina.retry(
            on=self._backoff, attempts=self._attempts_max, timeout=None, wait_initial=0.1, wait_jitter=0.1, wait_max=2.0
        )(self._open)

    async def open(self, body: bytes, caller_key: str | None) -> "ChunkStream":
        """Send a chat request; gives the stream once the upstream has answered 200.

        Connection errors, 429 and 5xx are tried again, because nothing was sent to anybody yet. Raises UpstreamError.
        """
        sending = _Sending(body, caller_key)
        try:
            return await self._opened(sending)
        finally:
            sending.body, sending.caller_key = b"", None

    def _backoff(self, error: Exception) -> bool | float:
        if not isinstance(error, UpstreamUnavailable | UpstreamBusy) or isinstance(error, _KeyRefused):
            return False
        after = error.headers.get("Retry-After")
        if after is None:
            return True
        return float(after) if after.isdigit() and float(after) <= self._retry_after_max_s else False

    async def _open(self, sending: "_Sending") -> "ChunkStream":
        key = sending.caller_key
        try:
            return ChunkStream(self, await self._ask("POST", self._chat, key, sending.body), self.mask(key))
        except UpstreamError as error:
            error.upstream = self.name
            raise

    def mask(self, caller_key: str | None) -> Mask:
        """Takes keys out of what the upstream says of its failures; what it says to the model's users is not looked at."""
        return Mask([*self._secrets, caller_key or ""])

    async def list_models(self, caller_key: str | None) -> list[ModelEntry]:
        """The models that the upstream lists. Raises UpstreamError."""
        response = await self._ask("GET", self._models, caller_key)
        try:
            async with asyncio.timeout(self._answer_timeout_s):
                raw = await _read(response, self.line_bytes_max)
            return msgspec.json.decode(raw, type=ModelList).data
        except TimeoutError:
            raise UpstreamStalled("The upstream did not finish its answer.") from None
        except (httpx2.HTTPError, OSError) as error:
            raise UpstreamUnavailable(f"Upstream '{self.name}' broke off its answer.") from error
        except NO_JSON:
            raise UpstreamGarbled(f"Upstream '{self.name}' sent no list of models.") from None
        finally:
            await response.aclose()

    async def _ask(
        self, method: str, url: httpx2.URL, caller_key: str | None, body: bytes | None = None
    ) -> httpx2.Response:
        """The head of an answer that is a success. Raises ApiError."""
        headers = self._headers
        if self.passes_caller and caller_key:
            headers = {**headers, "Authorization": f"Bearer {caller_key}"}
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
            raise await self._refused(response, self.mask(caller_key))
        if not _is_compressed(response):
            return response
        await response.aclose()
        raise UpstreamGarbled(f"Upstream '{self.name}' sent a compressed answer, which was not asked for.")

    async def _refused(self, response: httpx2.Response, mask: Mask) -> ApiError:
        """Our error for an answer that is no success, whose body says more as far as it can be read."""
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
        return _refusal(response, raw, self, mask)

    async def close(self) -> None:
        """Close every connection."""
        await self._http.aclose()


class ChunkStream:
    """An upstream's answer: lists of chunks, one list a read. Always close it; closing breaks the upstream's work off."""

    def __init__(self, upstream: Upstream, response: httpx2.Response, mask: Mask) -> None:
        """Of a response that streams only the stream is kept: the rest of it holds the request, with the whole conversation."""
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        self.upstream = upstream
        self._mask = mask
        self._stream = response.stream
        has_events = response.headers.get("content-type", "").startswith("text/event-stream")
        self._unstreamed = None if has_events else response
        self._finished = False
        self.heard = False
        """Whether a chunk has come."""
        self.read_bytes = 0
        """How many bytes the last list of chunks has come in."""

    async def __aiter__(self) -> AsyncIterator[list[Chunk]]:
        """A list for every read, so that those without a chunk can be counted, too. Raises UpstreamStalled, UpstreamGarbled, or
        UpstreamError for an error object inside the stream."""
        if self._unstreamed:
            yield [await self._whole(self._unstreamed)]
            return
        lines = LineBuffer(self.upstream.line_bytes_max)
        async for raw in self._reads():
            chunks: list[Chunk] = []
            failed: UpstreamError | None = None
            try:
                for data in lines.feed(raw):
                    if data == b"[DONE]":
                        self._finished = True
                    elif data:
                        chunk = _chunk(data, self._mask)
                        chunks.append(chunk)
                        self._finished = self._finished or _is_last(chunk)
            except UpstreamError as error:
                failed = error
            self.heard = self.heard or bool(chunks)
            self.read_bytes = len(raw)
            yield chunks
            if failed:
                raise failed
        if not self._finished:
            raise UpstreamGarbled("The upstream broke off its answer.")

    async def _reads(self) -> AsyncIterator[bytes]:
        """What goes wrong behind the finish is no fault: everything was said."""
        reads = aiter(self._stream)  # what the response's own `aiter_raw` adds is bookkeeping, for every read
        idle_s = self.upstream.idle_timeout_s
        with closing(Patience(idle_s)) as idle, closing(Patience(min(idle_s, TAIL_WAIT_S))) as tail:
            while True:
                try:
                    with tail if self._finished else idle:
                        raw = await anext(reads)
                except StopAsyncIteration:
                    return
                except TimeoutError:
                    if self._finished:
                        return
                    raise UpstreamStalled(f"The upstream was silent for {idle_s:g} seconds.") from None
                except (httpx2.HTTPError, OSError) as error:
                    if self._finished:
                        return
                    raise UpstreamGarbled("The upstream broke off its answer.") from error
                yield raw

    async def _whole(self, response: httpx2.Response) -> Chunk:
        """The answer of a server that does not stream, as one chunk."""
        try:
            async with asyncio.timeout(self.upstream.idle_timeout_s):
                raw = await _read(response, self.upstream.line_bytes_max)
            whole = msgspec.json.decode(raw, type=_Completion)
        except TimeoutError:
            raise UpstreamStalled("The upstream did not finish its answer.") from None
        except (*NO_JSON, httpx2.HTTPError, OSError):
            raise UpstreamGarbled("The upstream sent neither a stream nor a chat completion.") from None
        self.read_bytes = len(raw)
        said = whole.choices.first
        choice = Choice(said.message, said.finish_reason or "stop", said.logprobs) if said else None
        return Chunk(choices=Choices(choice), usage=whole.usage)

    async def close(self) -> None:
        """Give the connection back, or break it off."""
        await self._stream.aclose()


class _WholeChoice(Struct):
    message: Delta
    finish_reason: str | None = None
    logprobs: Logprobs | None = None


class _WholeChoices(Struct, array_like=True):
    first: _WholeChoice | None = None


class _Completion(Struct):
    choices: _WholeChoices
    usage: ChatUsage | None = None


class LineBuffer:
    """Bytes → the payloads of `data:` lines, at any border."""

    def __init__(self, line_bytes_max: int) -> None:
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._line_bytes_max = line_bytes_max

    def feed(self, raw: bytes) -> list[bytes]:
        """The payloads that are whole by now. Raises UpstreamGarbled for a line that is too long."""
        *lines, rest = raw.split(b"\n")
        if lines and self._held:
            lines[0] = b"".join((*self._held, lines[0]))
            self._held, self._held_bytes = [], 0
        if rest:
            self._held.append(rest)
            self._held_bytes += len(rest)
        if self._held_bytes > self._line_bytes_max:
            raise UpstreamGarbled(f"The upstream sent a line of more than {self._line_bytes_max} bytes.")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]


async def _read(response: httpx2.Response, bytes_max: int) -> bytes:
    """A whole body. Raises UpstreamGarbled as soon as it is too long."""
    raw = await _read_some(response, bytes_max + 1)
    if len(raw) > bytes_max:
        raise UpstreamGarbled(f"The upstream sent an answer of more than {bytes_max} bytes.")
    return raw


async def _read_some(response: httpx2.Response, bytes_max: int) -> bytes:
    """The first so many bytes of a body, as they travel; no more are read."""
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


def _chunk(data: bytes, mask: Mask) -> Chunk:
    try:
        chunk = decode_chunk(data)
    except NO_JSON as error:
        raise UpstreamGarbled(f"The upstream sent what is no chunk: {error}") from None
    if bytes(chunk.error) not in {b"", b"null"}:
        raise _error_in_stream(chunk.error, mask)
    return chunk


def _is_last(chunk: Chunk) -> bool:
    return bool(chunk.choices and chunk.choices.first and chunk.choices.first.finish_reason)


def _error_in_stream(raw: msgspec.Raw, mask: Mask) -> UpstreamError:
    try:
        error = msgspec.convert(mask.json(msgspec.json.decode(raw)), ChatError | str)
    except NO_JSON:
        error = ChatError()
    error = _cut(ChatError(message=error) if isinstance(error, str) else error)
    status = int(str(error.code)) if str(error.code).isdecimal() else 0
    message = f"The upstream failed: {error.message or 'it gave no reason'}"
    if status == 429 or error.code == "rate_limit_exceeded":
        return UpstreamBusy(message)
    code = error.code if isinstance(error.code, str) and not error.code.isdecimal() else None
    return UpstreamError(message, code=code)


def _refusal(response: httpx2.Response, raw: bytes, upstream: Upstream, mask: Mask) -> ApiError:
    """An answer that is none → our error."""
    status, said = response.status_code, _cut(_said(raw, mask))
    if status < 400:
        return UpstreamGarbled(
            f"Upstream '{upstream.name}' answered with status {status}, and redirects are not followed."
        )
    if status in {401, 403} and not upstream.passes_caller:
        return _KeyRefused(f"Upstream '{upstream.name}' does not accept this server's key.")
    if status == 401:
        return AuthenticationFailed(said.message or "The upstream does not accept the key.")
    if status == 429:
        after = _retry_after(response.headers.get("retry-after", ""))
        return UpstreamBusy(said.message or "The upstream is busy.", headers={"Retry-After": after} if after else None)
    if status >= 500:
        return UpstreamUnavailable(f"The upstream failed with status {status}: {said.message or 'it gave no reason'}")
    code = str(said.code) if said.code is not None else None
    if _TOO_LONG.search(said.message or ""):
        code = CONTEXT_TOO_LONG
    return UpstreamRefused(
        said.message or f"The upstream refused the request with status {status}.",
        status=status,
        type=said.type or "invalid_request_error",
        param=said.param,
        code=code,
    )


def _retry_after(said: str) -> str | None:
    """The seconds of a Retry-After, as a number or as a time; None for what is neither. It becomes a header of ours."""
    if re.fullmatch(r"[0-9]{1,9}", said):
        return said
    try:
        at = parsedate_to_datetime(said)
        return str(max(0, math.ceil(at.timestamp() - time.time())))
    except (ValueError, OverflowError, OSError):
        return None


def _said(raw: bytes, mask: Mask) -> ChatError:
    """The error object of the upstream's answer; some servers send it bare, some a text."""
    try:
        body = mask.json(msgspec.json.decode(raw))
    except NO_JSON:
        body = mask.text(raw.decode(errors="replace").strip())
    if not isinstance(body, dict):
        return ChatError(message=body if isinstance(body, str) else None)
    inner = body.get("error", body)
    if not isinstance(inner, dict):
        return ChatError(message=str(inner))
    if not inner.get("message") and inner.get("detail"):
        return ChatError(message=str(inner["detail"]))
    try:
        return msgspec.convert(inner, ChatError)
    except msgspec.ValidationError:
        return ChatError(message=str(inner.get("message") or inner))


def _cut(said: ChatError) -> ChatError:
    """The same in bearable length."""
    return ChatError(
        **{
            field: value[:MESSAGE_CHARS_MAX] if isinstance(value, str) else value
            for field, value in msgspec.structs.asdict(said).items()
        }
    )
