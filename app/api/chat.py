"""`/v1/chat/completions`: create. Another reader of the runs that `/v1/responses` makes."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from litestar import Controller, Request, Response, post

from app.api import making
from app.api.replies import json_reply
from app.api.services import Services
from app.api.sse import KEEPALIVE, EventStream, padded
from app.domain.chat_completion import Chunks, completion, error_of
from app.domain.chat_request import create_request, renamed
from app.errors import ApiError, UpstreamError
from app.offload import offload
from app.runs.admission import Caller
from app.wire import resources
from app.wire.chat_requests import ChatRequest, decode_chat
from app.wire.completions import Chunk
from app.wire.events import Entry
from app.wire.requests import CreateResponse
from app.wire.resources import ErrorBody, ErrorReply, encode


class ChatCompletionsController(Controller):
    """Completions of chats."""

    path = "/v1/chat/completions"

    @post(status_code=200)
    async def create(self, request: Request[Any, Any, Any], caller: Caller, services: Services) -> Response[Any]:
        """Make a completion: JSON when it is done, or chunks while it is made."""
        with ExitStack() as taking:
            raw = await taking.enter_context(services.bodies.reading(request)).read()
            chat, create = await offload(len(raw), _decoded, raw, services)
            del raw  # the completion may take long
            try:
                run, made, headers = await making.run(request, services, caller, create, taking)
            except ApiError as error:
                raise renamed(error, chat) from None
        if made is None:
            options = create.body.stream_options
            frames = ChunkFrames(
                Chunks(include_usage=chat.include_usage),
                obfuscate=bool(options and options.include_obfuscation),
                keepalive_s=services.settings.keepalive_s,
                keepalive_chunks=services.settings.keepalive_events,
            )
            return EventStream(services.following.follow(run), frames, headers)
        body = await offload(sum(memoryview(item).nbytes for item in made.output), _completed, made)
        return json_reply(body, services.backlogs, headers, made=made.id, stored=made.store)


def _decoded(raw: bytes, services: Services) -> tuple[ChatRequest, CreateResponse]:
    chat = decode_chat(raw, services.catalog.passed_on)
    return chat, create_request(chat)


def _completed(made: resources.Response) -> bytes:
    if error := error_of(made):
        cancelled = UpstreamError(error.message, code=error.code)
        cancelled.is_final = True
        raise cancelled
    return encode(completion(made))


class ChunkFrames:
    """Events as the chunks of a completion."""

    def __init__(
        self,
        chunks: Chunks,
        *,
        obfuscate: bool,
        keepalive_s: float,
        keepalive_chunks: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._chunks, self._obfuscate = chunks, obfuscate
        self._keepalive_s, self._keepalive_chunks = keepalive_s, keepalive_chunks
        self._clock = clock
        self._written_at = clock()
        self._is_begun = False

    def frames(self, batch: Sequence[Entry]) -> bytes:
        """The frames of the chunks that a batch makes. Events that make none, as those of a call that the server makes, may follow
        each other for long: then a sign of life."""
        self._is_begun = True
        frames = b"".join(self._frame(one) for entry in batch for one in self._chunks.take(entry))
        now = self._clock()
        if not frames and now - self._written_at >= self._keepalive_s:
            frames = self.keepalive()
        if frames:
            self._written_at = now
        return frames

    def _frame(self, one: Chunk | ErrorBody) -> bytes:
        if isinstance(one, ErrorBody):
            return b"data: %b\n\n" % encode(ErrorReply(one))
        body = encode(one)
        frame = b"data: %b\n\n" % body
        return padded(frame, len(body)) if self._obfuscate and one.choices else frame

    def keepalive(self) -> bytes:
        """A comment, or a chunk that adds nothing."""
        return self._frame(self._chunks.idle()) if self._keepalive_chunks and self._is_begun else KEEPALIVE
