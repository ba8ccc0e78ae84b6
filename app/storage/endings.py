"""Everything that the commit at a run's end writes, in one statement of named parts.

What else a run's end is to write, such as an outbox row, is one more part here. The parts see `response`, the row
that has just ended; without it they write nothing.
"""

from typing import Any

from sqlalchemy import text

from app.domain.lifecycle import APPENDED
from app.storage import usage
from app.storage.database import Query, Tx
from app.storage.items import INSERT
from app.storage.journal import Pages
from app.storage.parts import ctes, with_and_without
from app.storage.responses import rows_of
from app.storage.tables import IN_FLIGHT
from app.storage.usage import Charge
from app.wire.resources import Response

_RESPONSE = """
    update responses set status = :status, body = cast(:body as json), part_hashes = :part_hashes, bytes = :bytes,
                         context_bytes = context_bytes + cast(:own_bytes as bigint)
    where tenant_id = :tenant_id and id = :id and status in {in_flight} {owned}
    returning thread_id, turn, context_bytes
"""

_OUTPUT = INSERT.format(place="response")

_CONVERSATION = """
    update conversations conversation
    set thread_id = response.thread_id, turn = response.turn, context_bytes = response.context_bytes
    from response
    where conversation.tenant_id = :tenant_id and conversation.id = :conversation_id and conversation.writer = :id
"""
"""The input and output are appended to the conversation."""

_FOREGROUND = {
    "response": _RESPONSE.format(in_flight=IN_FLIGHT, owned=""),
    "output": _OUTPUT,
    "conversation": _CONVERSATION,
    "usage": usage.OF_RESPONSE,
    "lease": "delete from runs where tenant_id = :tenant_id and response_id = :id",
}
"""The end of a foreground run."""

_BACKGROUND = {
    "run": """
        update runs set state = 'sealed', request = null, secrets = null
        where tenant_id = :tenant_id and response_id = :id and lease = :epoch and state in ('running', 'cancelled')
        returning 1
    """,
    "response": _RESPONSE.format(in_flight=IN_FLIGHT, owned="and exists (select from run)"),
    "output": _OUTPUT,
    "conversation": _CONVERSATION,
    "usage": usage.OF_RESPONSE,
    "archive": """
        insert into event_archive (tenant_id, response_id, first_number, frames)
        select :tenant_id, :id, page.first_number, page.frames
        from response, unnest(cast(:first_numbers as bigint[]), cast(:pages as bytea[])) as page (first_number, frames)
    """,
    "journal": """
        delete from event_journal where tenant_id = :tenant_id and response_id = :id and exists (select from run)
    """,
}
"""The end of a background run. Its own row stays until the terminal event is sent."""


def _foreground(parts: dict[str, str]) -> Query:
    return Query(text(f"with {ctes({**_FOREGROUND, **parts})} select exists (select from response) as ended"))


def _background(parts: dict[str, str]) -> Query:
    return Query(
        text(f"""
    with {ctes({**_BACKGROUND, **parts})}
    select exists (select from run) as ended,
           exists (select from runs where tenant_id = :tenant_id and response_id = :id and lease = :epoch
                                          and state = 'sealed') as known  -- by an earlier attempt
    """)
    )


_END_FOREGROUND = with_and_without(_foreground, "response")
_END_BACKGROUND = with_and_without(_background, "response")


async def end_foreground(tx: Tx, tenant_id: str, response: Response, charge: Charge) -> bool:
    """End a foreground response whose row is inserted. False if another process has ended it, or it is deleted."""
    binds = await _binds(response, charge)
    row = await tx.one(_END_FOREGROUND[bool(binds["stored_hashes"])], tenant_id=tenant_id, **binds)
    return row is not None and bool(row["ended"])


async def end_background(
    tx: Tx, tenant_id: str, response: Response, epoch: int, archive: Pages, charge: Charge
) -> bool:
    """End a background response, with all its events. False if the lease is lost."""
    binds = {
        "tenant_id": tenant_id,
        "epoch": epoch,
        "first_numbers": [number for number, _ in archive],
        "pages": [frames for _, frames in archive],
        **await _binds(response, charge),
    }
    query = _END_BACKGROUND[bool(binds["stored_hashes"])]
    row = await tx.one(query, **binds)
    if row and not (row["ended"] or row["known"]):
        # Perhaps it is, by an attempt of ours whose commit the first look could not see yet.
        row = await tx.one(query, **binds)
    return row is not None and bool(row["ended"] or row["known"])


async def _binds(response: Response, charge: Charge) -> dict[str, Any]:
    conversation = response.conversation if response.status in APPENDED else None
    return {
        "conversation_id": conversation.id if conversation else None,
        "id": response.id,
        "status": response.status,
        **await rows_of(response, []),
        **await usage.binds(response, charge),
    }
