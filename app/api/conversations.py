"""`/v1/conversations`: create, retrieve, update, list, fork, delete; their items: create, list, retrieve, delete."""

import time
from collections.abc import Mapping
from typing import Any

from litestar import Controller, Request, Response, delete, get, post
from msgspec import Raw

from app.api import pages, queries
from app.api.replies import json_reply, small_reply
from app.api.services import Services
from app.domain.context import accept_items, references
from app.domain.sealed import TenantSeal
from app.errors import InvalidRequest
from app.ids import new_id
from app.offload import offload
from app.rooms import Room
from app.runs.admission import Caller
from app.storage import audit, contexts, conversations
from app.storage.conversations import StoredConversation
from app.wire import conversations as wire
from app.wire.items import AnyItem, decode_stored_item, encode_items
from app.wire.resources import Deleted, encode


class ConversationsController(Controller):
    """Conversations, which responses continue and are appended to."""

    path = "/v1/conversations"

    @post(status_code=200)
    async def create(self, request: Request[Any, Any, Any], caller: Caller, services: Services) -> Response[bytes]:
        """A new conversation, perhaps with its first items."""
        await services.storage_quota.demand_room(caller.storage_limits)
        with services.bodies.reading(request) as body, Room(services.reads) as room:
            raw = await body.read()
            asked = await offload(len(raw), wire.decode_request, wire.CREATE, raw)
            items = await _accepted(services, caller, asked.items or [], len(raw), room)
            made = _new(encode(asked.metadata or {}).decode())
            async for attempt in services.database.settling():
                with attempt:
                    async with services.database.autocommit() as tx:
                        await conversations.create_conversation(tx, caller.tenant_id, made, items)
        return small_reply(_shown(made))

    @get(opt=queries.TAKEN)
    async def list(self, request: Request[Any, Any, Any], caller: Caller, services: Services) -> Response[Any]:
        """Conversations by creation; beyond the hosted API."""
        query = queries.parse(request, queries.ConversationPage)
        list_rows = conversations.list_conversations
        return await pages.resources(services, query, list_rows, caller.tenant_id, query.metadata, show=_shown)

    @get("/{conversation_id:str}")
    async def retrieve(self, conversation_id: str, caller: Caller, services: Services) -> Response[bytes]:
        """One conversation, without its items."""
        async with services.database.autocommit() as tx:
            return small_reply(_shown(await conversations.get_conversation(tx, caller.tenant_id, conversation_id)))

    @post("/{conversation_id:str}", status_code=200)
    async def update(
        self, request: Request[Any, Any, Any], conversation_id: str, caller: Caller, services: Services
    ) -> Response[bytes]:
        """Replace the metadata."""
        asked = await services.bodies.decoded(request, wire.UPDATE)
        metadata = encode(asked.metadata or {}).decode()
        async with services.database.autocommit() as tx:
            updated = await conversations.update_conversation(tx, caller.tenant_id, conversation_id, metadata)
        return small_reply(_shown(updated))

    @delete("/{conversation_id:str}", status_code=200)
    async def remove(self, conversation_id: str, caller: Caller, services: Services) -> Response[bytes]:
        """Delete a conversation; its responses and its forks stay as they are."""
        entry = audit.entry(caller.rights, "conversation.deleted", conversation_id)
        async for attempt in services.database.settling():
            with attempt:
                async with services.database.begin() as tx:
                    await conversations.delete_conversation(
                        tx, caller.tenant_id, conversation_id, again=attempt.num > 1
                    )
                    await audit.write(tx, caller.rights.tenant, entry)
        return small_reply(Deleted(conversation_id, "conversation.deleted"))

    @post("/{conversation_id:str}/fork", status_code=200)
    async def fork(
        self, request: Request[Any, Any, Any], conversation_id: str, caller: Caller, services: Services
    ) -> Response[bytes]:
        """A new conversation that shares the items of this one, up to `after`; beyond the hosted API."""
        await services.storage_quota.demand_room(caller.storage_limits)
        asked = await services.bodies.decoded(request, wire.FORK)
        async with services.database.autocommit() as tx:
            source = await conversations.get_conversation(tx, caller.tenant_id, conversation_id)
        fork = _new(source.metadata if asked.metadata is None else encode(asked.metadata).decode())
        async for attempt in services.database.settling():
            with attempt:
                async with services.database.begin() as tx:
                    await conversations.fork_conversation(
                        tx, caller.tenant_id, conversation_id, fork, after=asked.after
                    )
        return small_reply(_shown(fork))

    @get("/{conversation_id:str}/items", opt=queries.TAKEN)
    async def items(
        self, request: Request[Any, Any, Any], conversation_id: str, caller: Caller, services: Services
    ) -> Response[Any]:
        """Its items, newest first unless asked otherwise."""
        query = queries.parse(request, queries.ItemPage)
        return await pages.items(services, query, contexts.list_conversation_items, caller.tenant_id, conversation_id)

    @post("/{conversation_id:str}/items", status_code=200, opt=queries.TAKEN)
    async def create_items(
        self, request: Request[Any, Any, Any], conversation_id: str, caller: Caller, services: Services
    ) -> Response[Any]:
        """Append items."""
        query = queries.parse(request, queries.Included)
        await services.storage_quota.demand_room(caller.storage_limits)
        with services.bodies.reading(request) as body, Room(services.reads) as room:
            raw = await body.read()
            asked = await offload(len(raw), wire.decode_request, wire.ITEMS, raw)
            items = await _accepted(services, caller, asked.items, len(raw), room)
            async for attempt in services.database.settling():
                with attempt:
                    async with services.database.begin() as tx:
                        await conversations.append_items(
                            tx, caller.tenant_id, conversation_id, items, again=attempt.num > 1
                        )
        rows = [(id, pages.shown(body, query.include)) for id, body in items]
        return json_reply(pages.encoded(rows, has_more=False), services.backlogs)

    @get("/{conversation_id:str}/items/{item_id:str}", opt=queries.TAKEN)
    async def retrieve_item(
        self, request: Request[Any, Any, Any], conversation_id: str, item_id: str, caller: Caller, services: Services
    ) -> Response[Any]:
        """One item."""
        query = queries.parse(request, queries.Included)

        async def read(bytes_max: int) -> tuple[int, str | None]:
            async with services.database.autocommit() as tx:
                return await conversations.get_item(tx, caller.tenant_id, conversation_id, item_id, bytes_max=bytes_max)

        return await pages.read(services, read, lambda body: pages.shown(body.encode(), query.include))

    @delete("/{conversation_id:str}/items/{item_id:str}", status_code=200)
    async def remove_item(
        self, conversation_id: str, item_id: str, caller: Caller, services: Services
    ) -> Response[bytes]:
        """Remove an item; gives the conversation. Responses and forks that have the item keep it."""
        entry = audit.entry(caller.rights, "conversation.item.deleted", item_id)
        async for attempt in services.database.settling():
            with attempt:
                async with services.database.begin() as tx:
                    left = await conversations.remove_item(
                        tx, caller.tenant_id, conversation_id, item_id, again=attempt.num > 1
                    )
                    await audit.write(tx, caller.rights.tenant, entry)
        return small_reply(_shown(left))


async def _accepted(
    services: Services, caller: Caller, given: list[Raw], size: int, room: Room
) -> list[tuple[str, bytes]]:
    """Given items with their ids, as they are stored; `room` is for those that references stand for. Raises InvalidRequest."""
    items = await offload(size, wire.decode_items, given)
    wanted = references(items)
    most = services.settings.context_bytes_max

    async def read(bytes_max: int) -> tuple[int, dict[str, str] | None]:
        async with services.database.autocommit() as tx:
            taken, found = await contexts.find_items(tx, caller.tenant_id, wanted, bytes_max=min(bytes_max, most))
        if taken > most:
            raise InvalidRequest(f"The items take {taken} bytes; more than {most} are not possible.", param="items")
        return taken, found

    found = await room.read(read, wait_s=services.settings.context_wait_s) if wanted else {}
    seal = services.seal.of(caller.tenant_id)
    return await offload(size + room.size, _stored_form, items, found, seal)


def _stored_form(items: list[AnyItem], found: Mapping[str, str], seal: TenantSeal) -> list[tuple[str, bytes]]:
    referenced = {id: decode_stored_item(body.encode()) for id, body in found.items()}
    return encode_items(accept_items(items, (), referenced, new_id, seal=seal, param="items"))


def _new(metadata: str) -> StoredConversation:
    return StoredConversation(new_id("conv"), int(time.time()), metadata)


def _shown(conversation: StoredConversation) -> wire.Conversation:
    return wire.Conversation(conversation.id, conversation.created_at, Raw(conversation.metadata.encode()))
