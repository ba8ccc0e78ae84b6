"""The one insert of a response, and when it happens."""

from collections.abc import Awaitable, Callable

from app.domain.spending import NOTHING_SPENT, Spent
from app.offload import offload
from app.runs.plan import RunPlan
from app.storage import approvals, responses
from app.storage.database import Database, Tx
from app.storage.queue import Owner, Queued
from app.wire.items import encode_items
from app.wire.resources import Response


def inserts_first(plan: RunPlan) -> bool:
    """Whether the row of a foreground run is inserted before the model answers, and not with its end, which saves a commit.

    It must be there first if a client learns the response's id from a stream's first event, if a parent must not be deleted
    meanwhile, if it locks a conversation, or if tools run before the upstream has accepted the request.
    """
    request = plan.request
    return request.store and bool(request.stream or plan.parent or not plan.begins_with_upstream)


async def insert(
    database: Database,
    plan: RunPlan,
    response_id: str,
    response: Response | None,
    run: Owner | Queued | None,
    *,
    refuse: Callable[[Tx], Awaitable[None]] | None = None,
    spent: Spent = NOTHING_SPENT,
) -> None:
    """Insert a response with its input, and the approvals that it uses up; without a response only these. `run` is given for
    one that is still to be made: by this owner, or by a worker that claims it; `spent` is what one that has ended has used.
    `refuse` may raise in the same transaction.

    Raises DatabaseUnavailable, PreviousResponseNotFound, ConversationLocked, InvalidRequest.
    """
    decisions = plan.context.decisions
    items = await offload(plan.size, encode_items, plan.context.input) if response else []
    # With approvals it is repeated whatever happened, so that none is used up for nothing.
    async for attempt in database.retrying() if decisions else database.settling():
        with attempt:
            async with database.begin() if decisions or refuse else database.autocommit() as tx:
                if refuse and attempt.num == 1:  # later, it may have its place already
                    await refuse(tx)
                if response:
                    await responses.insert_response(
                        tx,
                        plan.tenant_id,
                        response,
                        items,
                        parent=plan.parent,
                        earlier_bytes=plan.earlier_bytes,
                        run=run,
                        is_chat=plan.request.is_chat,
                        charge=plan.charge(spent),
                    )
                await approvals.answer_requests(tx, plan.tenant_id, response_id, decisions)
