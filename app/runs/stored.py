"""What a run's context has in Postgres, read once there is room for it in memory."""

from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import TypeVar

from msgspec import Struct

from app.domain.context import answered_requests, check_parent, references
from app.domain.lifecycle import APPENDED, IN_FLIGHT
from app.errors import ConversationLocked, InvalidRequest
from app.rooms import Room, Rooms
from app.settings import Settings
from app.storage import approvals, contexts, responses
from app.storage.contexts import Chain, Parent, StoredItem
from app.storage.database import Database, Tx
from app.wire.items import McpApprovalRequest, decode_stored_item
from app.wire.requests import CreateResponse
from app.wire.resources import Usage

T = TypeVar("T")


class Stored(Struct):
    """What is stored of a new request's context."""

    bytes: int = 0
    """What all of it takes."""
    parent: Parent | None = None
    earlier: list[StoredItem] = []
    earlier_bytes: int = 0
    referenced: dict[str, str] = {}
    requests: dict[str, McpApprovalRequest] = {}


class StoredContexts:
    """Reads contexts, as many as there is room for in this process."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._database = database
        self._items_max, self._bytes_max = settings.context_items_max, settings.context_bytes_max
        self._wait_s = settings.context_wait_s
        self._rooms = Rooms(settings.contexts_bytes_max, waiting_max=settings.foreground_runs_max)

    def room(self) -> Room:
        """Room for a context, to be taken and released."""
        return Room(self._rooms)

    async def of_request(self, tenant_id: str, request: CreateResponse, room: Room, beside: int) -> Stored:
        """What is stored of a new request's context, once there is room for all of it, and for so many bytes beside it. Raises
        ApiError."""
        previous, conversation = request.body.previous_response_id, request.conversation_id
        wanted = references(request.input)
        answered = answered_requests(request.input)

        async def read(bytes_max: int) -> tuple[int, Stored | None]:
            found = Stored()
            async with self._database.autocommit() as tx:
                if chain := await self._continued(tx, tenant_id, request, bytes_max):
                    found.parent, found.earlier = chain.parent, chain.items or []
                    found.bytes = found.earlier_bytes = chain.bytes
                if wanted:
                    left = bytes_max - found.bytes
                    taken, bodies = await contexts.find_items(tx, tenant_id, wanted, bytes_max=left)
                    found.referenced = bodies or {}
                    found.bytes += taken
                if found.bytes > bytes_max:
                    return found.bytes, None
                if answered:
                    known = {*wanted, *(item.id for item in found.earlier), *(item.id for item in request.input)}
                    found.requests = await _requests(tx, tenant_id, answered, known)
            return found.bytes, found

        given = len(bytes(request.body.input)) + beside
        if previous is None and conversation is None and not wanted and not answered:
            self._check(given)
            await room.take(request.size + beside, wait_s=self._wait_s)
            return Stored()
        return await self._fitting(room, read, request.size + beside, given=given, wait_s=self._wait_s)

    async def of_response(
        self, tenant_id: str, response_id: str, request: CreateResponse, room: Room, beside: int
    ) -> Chain:
        """What is stored of the context of a response that is being made; it waits for room as long as that takes. Raises ApiError."""

        async def read(bytes_max: int) -> tuple[int, Chain | None]:
            async with self._database.autocommit() as tx:
                chain = await contexts.load_chain(
                    tx, tenant_id, response_id, bytes_max=bytes_max, items_max=self._items_max
                )
            return chain.bytes, None if chain.items is None else chain

        return await self._fitting(room, read, request.size + beside, given=beside, wait_s=None)

    async def requests(
        self, tenant_id: str, answered: Sequence[str], known: Collection[str | None]
    ) -> dict[str, McpApprovalRequest]:
        """Those of the answered approval requests that we have made; what is not among the `known` items of the context is not even
        read."""
        if not answered:
            return {}
        async with self._database.autocommit() as tx:
            return await _requests(tx, tenant_id, answered, known)

    async def usage(self, tenant_id: str, response_id: str) -> Usage | None:
        """The usage of a response, if others may continue it."""
        async with self._database.autocommit() as tx:
            parent = await responses.load_body(tx, tenant_id, response_id)
        # In a conversation one that has failed is no parent.
        is_known = parent and (parent.conversation is None or parent.status in APPENDED)
        return parent.usage if parent and is_known else None

    async def _fitting(
        self,
        room: Room,
        read: Callable[[int], Awaitable[tuple[int, T | None]]],
        size: int,
        *,
        given: int,
        wait_s: float | None,
    ) -> T:
        """What `read` finds, when there is room for it beside a request of this size, of whose context so much is given."""

        async def look(bytes_max: int) -> tuple[int, T | None]:
            needed, found = await read(min(bytes_max - size, self._bytes_max - given))
            self._check(given + needed)
            return size + needed, found

        self._check(given)
        return await room.read(look, least=size, wait_s=wait_s)

    def _check(self, size: int) -> None:
        """Raises InvalidRequest for a context that is too long."""
        if size > self._bytes_max:
            raise InvalidRequest(
                f"The context takes {size} bytes; more than {self._bytes_max} are not possible.",
                param="input",
                code="context_length_exceeded",
            )

    async def _continued(self, tx: Tx, tenant_id: str, request: CreateResponse, bytes_max: int) -> Chain | None:
        """What a new response continues. Raises ConversationLocked, unless it only reads the conversation."""
        if (previous := request.body.previous_response_id) is not None:
            chain = await contexts.load_chain(
                tx, tenant_id, previous, items_max=self._items_max, bytes_max=bytes_max, in_flight=False
            )
            check_parent(previous, chain.status)
            return chain
        if (conversation := request.conversation_id) is not None:
            chain = await contexts.load_conversation(
                tx,
                tenant_id,
                conversation,
                items_max=self._items_max,
                bytes_max=bytes_max,
                in_flight=not request.store,
            )
            if request.store and chain.status in IN_FLIGHT:
                raise ConversationLocked
            return chain
        return None


async def _requests(
    tx: Tx, tenant_id: str, answered: Sequence[str], known: Collection[str | None]
) -> dict[str, McpApprovalRequest]:
    found = await approvals.find_requests(tx, tenant_id, [id for id in answered if id in known])
    items = [decode_stored_item(body.encode()) for body in found]
    return {item.id: item for item in items if isinstance(item, McpApprovalRequest)}
