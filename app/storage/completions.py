"""Stored chat completions: the responses that were made as such and have something for the client."""

from msgspec.structs import replace
from sqlalchemy import text

from app.domain.chat_completion import response_id
from app.domain.lifecycle import APPENDED
from app.errors import CompletionNotFound
from app.storage import responses
from app.storage.contexts import StoredItem, load_chain
from app.storage.database import Query, Tx, storable
from app.storage.parts import ctes, storing
from app.storage.responses import Stored
from app.storage.tables import OUTPUT_POSITION
from app.wire.resources import encode

_FIND = """
    select 1 from responses
    where tenant_id = :tenant_id and id = :id and deleted_at is null and is_chat and status = any(cast(:statuses as text[]))
"""

_IS_CHAT = Query(text(_FIND))

_LOCK = Query(text(f"{_FIND} for no key update"))

_RESPONSE = """
    update responses set metadata = cast(:metadata as jsonb), body = cast(:body as json), part_hashes = :part_hashes, bytes = :bytes
    where tenant_id = :tenant_id and id = :id
    returning 1
"""

_UPDATE = Query(text(f"with {ctes({'response': _RESPONSE, **storing('response')})} select 1 from response"))


async def _response_id(tx: Tx, tenant_id: str, completion_id: str, find: Query = _IS_CHAT) -> str:
    """The id of a completion's response. Raises CompletionNotFound."""
    id = response_id(completion_id)
    binds = {"tenant_id": tenant_id, "id": id, "statuses": sorted(APPENDED)}
    if id == completion_id or not storable(id) or await tx.one(find, **binds) is None:
        raise CompletionNotFound(completion_id)
    return id


async def find(tx: Tx, tenant_id: str, completion_id: str, *, bytes_max: int) -> tuple[int, Stored | None]:
    """The size of a completion's response in bytes, and the response, unless that is more than `bytes_max`. Raises CompletionNotFound."""
    id = await _response_id(tx, tenant_id, completion_id)
    return await responses.find_response(tx, tenant_id, id, bytes_max=bytes_max)


async def input_of(
    tx: Tx, tenant_id: str, completion_id: str, *, items_max: int, bytes_max: int
) -> tuple[int, list[StoredItem] | None]:
    """What a completion's context takes, and the items of its own request, unless that is more than `bytes_max`.

    Raises CompletionNotFound."""
    id = await _response_id(tx, tenant_id, completion_id)
    chain = await load_chain(tx, tenant_id, id, items_max=items_max, bytes_max=bytes_max)
    if chain.items is None:
        return chain.bytes, None
    turn = chain.parent.place.turn
    return chain.bytes, [item for item in chain.items if item.turn == turn and item.position < OUTPUT_POSITION]


async def update_metadata(tx: Tx, tenant_id: str, completion_id: str, metadata: dict[str, str]) -> None:
    """Replace the metadata; nothing else of the completion's response changes. Needs a transaction. Raises CompletionNotFound."""
    id = await _response_id(tx, tenant_id, completion_id, _LOCK)
    found = await responses.load_body(tx, tenant_id, id)
    assert found
    body = await responses.rows_of(replace(found, metadata=metadata), [])
    await tx.one(_UPDATE, **{**body, "tenant_id": tenant_id, "id": id, "metadata": encode(metadata).decode()})


async def delete(tx: Tx, tenant_id: str, completion_id: str, *, again: bool = False) -> None:
    """Delete a completion, and the response that it is. Needs a transaction. `again` if an earlier attempt may have deleted it.

    Raises CompletionNotFound."""
    try:
        id = await _response_id(tx, tenant_id, completion_id, _LOCK)
    except CompletionNotFound:
        if again:
            return
        raise
    await responses.delete_response(tx, tenant_id, id, again=again)
