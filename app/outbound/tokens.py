"""How many tokens a chat request has: its upstream's own count, by what its dialect names.

`input_tokens`: llama.cpp's `POST /v1/chat/completions/input_tokens` takes a chat request, images included, and answers
`{"input_tokens": N}` (ggml-org/llama.cpp, tools/server/server.cpp: `post_chat_completions_tok`).

`tokenize`: vLLM's `POST /tokenize` takes the messages, the tools and what else the chat template reads, and answers
`{"count": N, "max_model_len": …, "tokens": […]}` (vllm-project/vllm, vllm/entrypoints/serve/tokenize/protocol.py:
`TokenizeChatRequest`, `TokenizeResponse`). It ignores what `domain/token_count.py` lists, and does not expand images.

`apply_template`: an older llama.cpp's `POST /apply-template` takes a chat request and answers `{"prompt": …}`; `POST /tokenize` with
that as `content` answers `{"tokens": […]}`. A completion tokenizes its prompt with `add_special` and `parse_special`, too
(ggml-org/llama.cpp, tools/server/README.md).

`usage`: the usage of a completion of one token, which every server has and some bill.

An endpoint that is missing, refuses the request or answers with something else is passed over for what the dialect names next.
"""

import asyncio
import hashlib
import math
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Annotated, TypeVar

import msgspec
import structlog
from msgspec import Meta, Raw, Struct

from app.domain.dialect import Counter
from app.domain.token_count import completion, is_text, tokenize
from app.errors import ApiError, TokensNotCounted, UpstreamGarbled, UpstreamRefused, UpstreamUnavailable
from app.offload import offload
from app.outbound.failures import NO_JSON
from app.outbound.upstream import Upstream
from app.settings import Settings
from app.telemetry import describe
from app.wire.chat import ChatUsage
from app.wire.odd_chunks import COUNT_MAX

T = TypeVar("T")

log = structlog.get_logger()

SOON_S = 5.0
"""How long a response waits for a count."""

ONE_TOKEN = 1

SHORT_ANSWER_TOKENS = 256
"""Reasoning models of the hosted API refuse a limit that leaves no room for an answer; then the completion may be so long."""

_NO_ROOM = re.compile(r"max_tokens or model output limit was reached", re.IGNORECASE)
"""The hosted API's words for that."""

_Count = Annotated[int, Meta(ge=1, le=COUNT_MAX)]


class _InputTokens(Struct):
    input_tokens: _Count


class _Tokenized(Struct):
    count: _Count


class _Prompt(Struct):
    prompt: Raw


class _Tokens(Struct):
    tokens: Annotated[list[int], Meta(min_length=1)]


class ChatRequest(Struct, frozen=True):
    """A chat request whose tokens are counted."""

    upstream: Upstream
    model: str
    body: bytes
    caller_key: str | None
    report: Callable[[ChatUsage], None] | None = None
    """Called with what a completion has used, if one is made to count."""
    completing: Callable[[bool], None] | None = None
    """Called before a completion is asked for, with True, and if that is refused, with False."""

    def content_hash(self, tenant_id: str) -> bytes:
        """The same for the same request of a tenant only; with the caller's key where that decides what the upstream answers."""
        key = self.caller_key if self.upstream.passes_caller else None
        whose = msgspec.json.encode([tenant_id, self.upstream.name, self.model, key])
        return hashlib.sha256(whose + self.body).digest()


class TokenCounter:
    """Counts tokens, and remembers the counts."""

    def __init__(self, settings: Settings) -> None:
        self._bytes_max = settings.token_count_bytes_max
        self._remembered = RememberedCounts(settings.token_counts_cached_max, settings.token_counts_cached_s)
        self._counters: dict[Counter, Callable[[ChatRequest], Awaitable[int | None]]] = {
            "input_tokens": self._input_tokens,
            "tokenize": self._tokenize,
            "apply_template": self._apply_template,
            "usage": self._usage,
        }

    async def count(self, tenant_id: str, request: ChatRequest) -> int:
        """The tokens of a request. Raises ApiError, TokensNotCounted where nothing counts them."""
        count = await self._counted(tenant_id, request, request.upstream.dialect.count_tokens)
        if count is None:
            raise TokensNotCounted(
                f"The tokens of this request can't be counted: upstream '{request.upstream.name}' has nothing that counts them.",
                param="model",
            )
        return count

    async def count_without_output(self, tenant_id: str, request: ChatRequest) -> int | None:
        """The tokens of a request, if an endpoint counts them within SOON_S, without a completion."""
        endpoints = [name for name in request.upstream.dialect.count_tokens if name != "usage"]
        try:
            async with asyncio.timeout(SOON_S):
                return await self._counted(tenant_id, request, endpoints)
        except (ApiError, TimeoutError) as error:
            _log_failure(request.upstream, error)
            return None

    async def _counted(self, tenant_id: str, request: ChatRequest, counters: Sequence[Counter]) -> int | None:
        key = await offload(len(request.body), request.content_hash, tenant_id)
        count = self._remembered.get(key)
        if count is None and (count := await self._first(request, counters)) is not None:
            self._remembered.add(key, count)
        return count

    async def _first(self, request: ChatRequest, counters: Sequence[Counter]) -> int | None:
        """The count of the first counter that can; None if none can."""
        failed: UpstreamUnavailable | None = None
        for name in counters:
            try:
                count = await self._counters[name](request)
            except UpstreamUnavailable as error:
                failed = error
            else:
                if count is not None:
                    return count
        if failed:
            raise failed
        return None

    async def _input_tokens(self, request: ChatRequest) -> int | None:
        found = await self._ask(request, "chat/completions/input_tokens", request.body, _InputTokens)
        return found.input_tokens if found else None

    async def _tokenize(self, request: ChatRequest) -> int | None:
        body = await offload(len(request.body), tokenize, request.body)
        found = await self._ask(request, "/tokenize", body, _Tokenized) if body else None
        return found.count if found else None

    async def _apply_template(self, request: ChatRequest) -> int | None:
        if not await offload(len(request.body), is_text, request.body):
            return None
        found = await self._ask(request, "/apply-template", request.body, _Prompt)
        if found is None or memoryview(found.prompt)[0] != ord('"'):
            return None
        content = {"model": request.model, "content": found.prompt, "add_special": True, "parse_special": True}
        listed = await self._ask(request, "/tokenize", msgspec.json.encode(content), _Tokens)
        return len(listed.tokens) if listed else None

    async def _ask(self, request: ChatRequest, path: str, body: bytes, type_: type[T]) -> T | None:
        """The answer of an endpoint; None where it has none for this request."""
        upstream = request.upstream
        try:
            raw = await upstream.post(path, body, request.caller_key, bytes_max=self._bytes_max)
            return await offload(len(raw), msgspec.json.decode, raw, type=type_)
        except (UpstreamRefused, UpstreamGarbled, *NO_JSON) as error:
            _log_failure(upstream, error, path)
            return None

    async def _usage(self, request: ChatRequest) -> int | None:
        try:
            return await self._completed(request, ONE_TOKEN)
        except UpstreamRefused as error:
            if not _NO_ROOM.search(error.message):
                raise
        return await self._completed(request, SHORT_ANSWER_TOKENS)

    async def _completed(self, request: ChatRequest, tokens_max: int) -> int | None:
        """The tokens of the prompt by the usage of a completion; None if it has none."""
        upstream = request.upstream
        limit = {upstream.dialect.max_tokens: tokens_max}
        body = await offload(len(request.body), partial(completion, request.body, **limit))
        completing = request.completing or (lambda _: None)
        completing(True)
        try:
            stream = await upstream.open(request.model, body, request.caller_key)
        except ApiError:
            completing(False)
            raise
        try:
            chunks = await anext(aiter(stream))  # all of an answer that is not streamed
        finally:
            await stream.close()
        usage = next((chunk.usage for chunk in chunks if chunk.usage), None)
        if usage and request.report:
            request.report(usage)
        return usage.prompt_tokens or None if usage else None


def _log_failure(upstream: Upstream, error: Exception, path: str | None = None) -> None:
    log.info(
        "An upstream's endpoint did not count tokens.",
        action="tokens_not_counted",
        upstream=upstream.name,
        path=path,
        error=describe(error),
    )


class RememberedCounts:
    """The last counts, by content."""

    def __init__(self, counts_max: int, seconds: float) -> None:
        self._counts_max, self._seconds = counts_max, seconds
        self._counts: dict[bytes, tuple[int, float]] = {}

    def get(self, key: bytes) -> int | None:
        """A count that is not too old; then it is the last to be forgotten."""
        count, counted_s = self._counts.pop(key, (0, -math.inf))
        if time.monotonic() - counted_s >= self._seconds:
            return None
        self._counts[key] = count, counted_s
        return count

    def add(self, key: bytes, count: int) -> None:
        """Remember a count, and forget the one that was not asked for longest."""
        self._counts[key] = count, time.monotonic()
        if len(self._counts) > self._counts_max:
            del self._counts[next(iter(self._counts))]
