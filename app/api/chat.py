"""`/v1/chat/completions`: create, and what is stored. Another reader of the runs that `/v1/responses` makes."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import msgspec
from litestar import Controller, Request, Response, delete, get, post

from app.api import making, pages, queries
from app.api.replies import json_reply, small_reply
from app.api.services import Services
from app.api.sse import KEEPALIVE, EventStream, padded
from app.domain.chat_completion import Chunks, completion, completion_id, error_of, response_id
from app.domain.chat_messages import sent_messages
from app.domain.chat_request import create_request, renamed
from app.errors import ApiError, InvalidParameter, UpstreamError
from app.ids import seconds_of
from app.offload import offload
from app.runs.admission import Caller
from app.storage import audit, completions, responses
from app.storage.contexts import StoredItem
from app.storage.facets import CHAT
from app.storage.pages import Page
from app.storage.responses import Stored
from app.wire import chat_requests, resources
from app.wire.chat import ChatMessage
from app.wire.chat_requests import ChatRequest, decode_chat
from app.wire.completions import Chunk
from app.wire.conversations import decode_request
from app.wire.events import Entry
from app.wire.items import decode_stored_item
from app.wire.requests import CreateResponse
from app.wire.resources import Deleted, ErrorBody, ErrorReply, encode


class ChatCompletionsController(Controller):
    """Completions of chats. A stored one is a response, too, whose id differs in the prefix only."""

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

    @get(opt=queries.TAKEN)
    async def list(self, request: Request[Any, Any, Any], caller: Caller, services: Services) -> Response[Any]:
        """Stored completions by creation, the oldest first unless asked otherwise."""
        query = queries.parse(request, queries.CompletionPage)
        filter = responses.Filter(model=query.model, status=CHAT, metadata=query.metadata)
        after = None if query.after is None else _cursor(query.after)
        return await pages.responses(services, query, filter, caller.tenant_id, after=after, write=_page_of_completions)

    @get("/{completion_id:str}")
    async def retrieve(self, completion_id: str, caller: Caller, services: Services) -> Response[Any]:
        """One stored completion."""
        return await _found(services, caller, completion_id)

    @post("/{completion_id:str}", status_code=200)
    async def update(
        self, request: Request[Any, Any, Any], completion_id: str, caller: Caller, services: Services
    ) -> Response[Any]:
        """Replace the metadata."""
        with services.bodies.reading(request) as body:
            asked = decode_request(chat_requests.UPDATE, await body.read())
        async for attempt in services.database.settling():
            with attempt:
                async with services.database.begin() as tx:
                    await completions.update_metadata(tx, caller.tenant_id, completion_id, asked.metadata or {})
        return await _found(services, caller, completion_id)

    @get("/{completion_id:str}/messages", opt=queries.TAKEN)
    async def messages(
        self, request: Request[Any, Any, Any], completion_id: str, caller: Caller, services: Services
    ) -> Response[Any]:
        """The messages of the request, oldest first unless asked otherwise."""
        query = queries.parse(request, queries.MessagePage)

        async def read(bytes_max: int) -> tuple[int, Sequence[StoredItem] | None]:
            async with services.database.autocommit() as tx:
                return await completions.input_of(
                    tx,
                    caller.tenant_id,
                    completion_id,
                    items_max=services.settings.context_items_max,
                    bytes_max=bytes_max,
                )

        return await pages.read(services, read, partial(_page_of_messages, completion_id=completion_id, query=query))

    @delete("/{completion_id:str}", status_code=200)
    async def delete(self, completion_id: str, caller: Caller, services: Services) -> Response[bytes]:
        """Delete a completion; responses that continue it keep their context."""
        entry = audit.entry(caller.rights, "response.deleted", response_id(completion_id))
        async for attempt in services.database.settling():
            with attempt:
                async with services.database.begin() as tx:
                    await completions.delete(tx, caller.tenant_id, completion_id, again=attempt.num > 1)
                    await audit.write(tx, caller.rights.tenant, entry)
        return small_reply(Deleted(completion_id, "chat.completion.deleted"))


async def _found(services: Services, caller: Caller, completion_id: str) -> Response[Any]:
    """A reply with a stored completion. Raises CompletionNotFound."""

    async def read(bytes_max: int) -> tuple[int, Stored | None]:
        async with services.database.autocommit() as tx:
            return await completions.find(tx, caller.tenant_id, completion_id, bytes_max=bytes_max)

    return await pages.read(services, read, _retrieved)


def _retrieved(stored: Stored) -> bytes:
    return encode(completion(responses.response_of(stored)))


def _page_of_completions(page: Page[tuple[str, Stored]]) -> bytes:
    return pages.encoded([(completion_id(id), _retrieved(stored)) for id, stored in page.rows], has_more=page.has_more)


def _cursor(after: str) -> str:
    """The response that a completion is, which may be deleted. Raises InvalidParameter if its id is none of ours."""
    id = response_id(after)
    if id == after or seconds_of(id) is None:
        raise InvalidParameter(f"Chat completion with id '{after}' not found.", param="after")
    return id


def _page_of_messages(items: Sequence[StoredItem], completion_id: str, query: queries.MessagePage) -> bytes:
    """A page of messages, whose ids are their places in the request. Raises InvalidParameter for the cursor."""
    sent = sent_messages([decode_stored_item(item.body.encode()) for item in items])
    rows = [(f"{completion_id}-{at}", message) for at, message in enumerate(sent)]
    if query.order == "desc":
        rows.reverse()
    start = 0
    if query.after is not None:
        start = next((at + 1 for at, (id, _) in enumerate(rows) if id == query.after), 0)
        if not start:
            raise InvalidParameter(f"Message with id '{query.after}' not found.", param="after")
    end = start + query.limit
    return pages.encoded([(id, _listed(id, message)) for id, message in rows[start:end]], has_more=end < len(rows))


def _listed(id: str, message: ChatMessage) -> bytes:
    """A message as it is listed: parts stand apart from the text."""
    parts = message["content"] if isinstance(message["content"], list) else None
    content = None if parts else message["content"]
    return msgspec.json.encode({"refusal": None, **message, "id": id, "content": content, "content_parts": parts})


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
