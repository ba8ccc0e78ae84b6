"""Approvals of server-run calls: what was asked, and that each request is answered once."""

from collections.abc import Sequence

from sqlalchemy import text

from app.errors import InvalidRequest
from app.storage.database import Query, Tx, storable
from app.storage.parts import whole
from app.storage.tables import OUTPUT_POSITION

_FIND_REQUESTS = Query(
    text(f"""
    select {whole("item")} as body from items item
    where tenant_id = :tenant_id and id = any(cast(:ids as text[])) and position >= :output_position
    """).bindparams(output_position=OUTPUT_POSITION)
)

_ANSWER = Query(
    text("""
    with given as (
        select * from unnest(cast(:ids as text[]), cast(:approve as boolean[])) as given (request_id, approve)
    ), answered as (
        insert into approvals (tenant_id, request_id, approve, response_id)
        select :tenant_id, request_id, approve, :response_id from given
        on conflict do nothing
        returning request_id
    )
    select given.request_id from given left join approvals earlier
        on earlier.tenant_id = :tenant_id and earlier.request_id = given.request_id
    where given.request_id not in (select request_id from answered)
      and (earlier.response_id is null or (earlier.response_id <> :response_id and (earlier.approve or given.approve)))
    """)
)


async def find_requests(tx: Tx, tenant_id: str, ids: Sequence[str]) -> list[str]:
    """The items with these ids that this server has made, as JSON. What clients have sent under such an id is not among them."""
    rows = await tx.all(_FIND_REQUESTS, tenant_id=tenant_id, ids=[id for id in ids if storable(id)])
    return [row["body"] for row in rows]


async def answer_requests(tx: Tx, tenant_id: str, response_id: str, answers: Sequence[tuple[str, bool]]) -> None:
    """Store that this response's input answers these requests (id, approved). Needs a transaction.

    Raises InvalidRequest for one that was answered before; a denial may be repeated.
    """
    if not answers:
        return
    in_order = sorted(answers)  # two that answer the same requests wait for each other at the first, and not crosswise
    given = {"ids": [id for id, _ in in_order], "approve": [approve for _, approve in in_order]}
    rows = await tx.all(_ANSWER, tenant_id=tenant_id, response_id=response_id, **given)
    if rows:  # perhaps by an attempt of ours whose commit the first look could not see yet
        rows = await tx.all(_ANSWER, tenant_id=tenant_id, response_id=response_id, **given)
    if rows:
        raise InvalidRequest(f"Approval request '{rows[0]['request_id']}' has been answered already.", param="input")
