"""`/v1/responses`: create, retrieve, list, delete, input items."""

from collections.abc import Collection
from contextlib import ExitStack
from functools import partial
from typing import Any

import msgspec
from litestar import Controller, Request, Response, delete, get, post

from app.api import making, pages, queries
from app.api.left_out import left_out_headers
from app.api.replies import json_reply, small_reply
from app.api.services import Services
from app.api.sse import EventFrames, EventStream
from app.domain.prompt_templates import fill_in
from app.errors import InvalidRequest
from app.offload import offload
from app.runs.admission import Caller
from app.runs.following import Followed
from app.storage import audit, contexts, responses
from app.storage.pages import Page
from app.storage.responses import Stored
from app.wire import resources
from app.wire.redaction import Redaction
from app.wire.requests import CreateResponse, decode_create
from app.wire.resources import Deleted, encode


class ResponsesController(Controller):
    """The resource that everything is about."""

    path = "/v1/responses"

    @post(status_code=200)
    async def create(self, request: Request[Any, Any, Any], caller: Caller, services: Services) -> Response[Any]:
        """Make a response: JSON when it is done, SSE while it is made, or later, in the background."""
        with ExitStack() as taking:
            raw = await taking.enter_context(services.bodies.reading(request)).read()
            prompts, bytes_max = services.catalog.prompts, services.settings.body_bytes_max
            filling_in = partial(fill_in, prompts=prompts, bytes_max=bytes_max)
            create = await offload(len(raw), decode_create, raw, services.catalog.passed_on, filling_in)
            if create.background:
                return await self._create_in_background(caller, create, raw, services)
            del raw  # the response may take long

            run, made, headers = await making.run(request, services, caller, create, taking)
        if made:
            return _reply(services, made, create.include, headers, is_new=True)
        return _stream(services, services.following.follow(run), create, headers)

    async def _create_in_background(
        self, caller: Caller, create: CreateResponse, raw: bytes, services: Services
    ) -> Response[Any]:
        queued = await services.admission.enqueue(caller, create, raw)
        headers = left_out_headers(queued.left_out)
        if not create.stream:
            return _reply(services, queued.response, (), headers, is_new=True)
        followed = services.following.follow_stored(caller.tenant_id, queued.response.id, queued.entries, is_new=True)
        return _stream(services, followed, create, headers)

    @get(opt=queries.TAKEN)
    async def list(self, request: Request[Any, Any, Any], caller: Caller, services: Services) -> Response[Any]:
        """Responses by creation; beyond the hosted API."""
        if request.headers.get("upgrade", "").lower() == "websocket":
            raise InvalidRequest("This server does not speak WebSocket; use POST.", code="websocket_not_supported")
        query = queries.parse(request, queries.ResponsePage)
        filter = responses.Filter(
            model=query.model,
            status=query.status,
            metadata=query.metadata,
            created_after=query.created_after,
            created_before=query.created_before,
        )
        return await pages.responses(
            services, query, filter, caller.tenant_id, after=query.after, write=_page_of_responses
        )

    @get("/{response_id:str}", opt=queries.TAKEN)
    async def retrieve(
        self, request: Request[Any, Any, Any], response_id: str, caller: Caller, services: Services
    ) -> Response[Any]:
        """One response as it is now, or with `stream=true` its events after `starting_after`."""
        query = queries.parse(request, queries.Retrieve)
        if query.stream:
            return await self._replay(response_id, query, caller, services)

        async def read(bytes_max: int) -> tuple[int, Stored | None]:
            async with services.database.autocommit() as tx:
                return await responses.find_response(tx, caller.tenant_id, response_id, bytes_max=bytes_max)

        return await pages.read(services, read, partial(_retrieved, include=query.include))

    async def _replay(
        self, response_id: str, query: queries.Retrieve, caller: Caller, services: Services
    ) -> Response[Any]:
        after = -1 if query.starting_after is None else query.starting_after
        events = await services.following.stored(caller.tenant_id, response_id, after)
        for wanted, given in (("background", events.background), ("stream", events.streamed)):
            if not given:
                raise InvalidRequest(
                    f"This response cannot be streamed because it was not created with {wanted}=true.", param="stream"
                )
        followed = services.following.follow_stored(
            caller.tenant_id, response_id, events.entries, is_archived=events.archived, after=after
        )
        return _event_stream(services, followed, query.include, obfuscate=bool(query.include_obfuscation), headers={})

    @delete("/{response_id:str}", status_code=200)
    async def delete(self, response_id: str, caller: Caller, services: Services) -> Response[bytes]:
        """Delete a response; later ones that build on it keep their context."""
        entry = audit.entry(caller.rights, "response.deleted", response_id)
        async for attempt in services.database.settling():
            with attempt:
                async with services.database.begin() as tx:
                    await responses.delete_response(tx, caller.tenant_id, response_id, again=attempt.num > 1)
                    await audit.write(tx, caller.rights.tenant, entry)
        return small_reply(Deleted(response_id))

    @get("/{response_id:str}/input_items", opt=queries.TAKEN)
    async def input_items(
        self, request: Request[Any, Any, Any], response_id: str, caller: Caller, services: Services
    ) -> Response[Any]:
        """The context that the response was made from: earlier inputs and outputs, and its own input."""
        query = queries.parse(request, queries.ItemPage)
        return await pages.items(services, query, contexts.list_input_items, caller.tenant_id, response_id)

    @post("/{response_id:str}/cancel", status_code=200)
    async def cancel(self, response_id: str, caller: Caller, services: Services) -> Response[Any]:
        """Cancel a background response; one that has ended is given as it is. A foreground one ends with its connection."""
        async with services.database.autocommit() as tx:
            stored = await responses.get_response(tx, caller.tenant_id, response_id)
        if not responses.response_of(stored).background:
            raise InvalidRequest("Cannot cancel a synchronous response.", param="response_id")
        return _reply(services, await services.cancellation.cancel(caller.tenant_id, response_id), ())


def _stream(services: Services, followed: Followed, create: CreateResponse, headers: dict[str, str]) -> EventStream:
    options = create.body.stream_options
    obfuscate = bool(options and options.include_obfuscation)
    return _event_stream(services, followed, create.include, obfuscate=obfuscate, headers=headers)


def _event_stream(
    services: Services, followed: Followed, include: Collection[str], *, obfuscate: bool, headers: dict[str, str]
) -> EventStream:
    frames = EventFrames(
        Redaction(include),
        obfuscate=obfuscate,
        keepalive_events=services.settings.keepalive_events,
        after=followed.after,
    )
    return EventStream(followed, frames, headers)


def _shown(response: resources.Response, include: Collection[str]) -> resources.Response:
    return msgspec.structs.replace(response, output=Redaction(include).output(response.output))


def _reply(
    services: Services,
    response: resources.Response,
    include: Collection[str],
    headers: dict[str, str] | None = None,
    *,
    is_new: bool = False,
) -> Response[Any]:
    body = encode(_shown(response, include))
    return json_reply(body, services.backlogs, headers, made=response.id if is_new else None, stored=response.store)


def _retrieved(stored: Stored, include: Collection[str]) -> bytes:
    return encode(_shown(responses.response_of(stored), include))


def _page_of_responses(page: Page[tuple[str, Stored]]) -> bytes:
    return pages.encoded([(id, _retrieved(stored, ())) for id, stored in page.rows], has_more=page.has_more)
