"""How many tokens a create would send to the model: the plan of a create that is never made."""

from collections.abc import Callable

from msgspec import Struct
from msgspec.structs import replace

from app.domain.context import LeftOut
from app.domain.quotas import reserved_tokens
from app.domain.spending import NOTHING_SPENT, spend
from app.errors import TooManyRequests
from app.ids import new_id
from app.offload import offload
from app.outbound.catalog import Route
from app.outbound.tokens import ChatRequest, TokenCounter
from app.outbound.upstream import Upstream
from app.runs.admission import Caller
from app.runs.plan import RunPlan
from app.runs.planning import Planner
from app.runs.quotas import Grant, Quotas
from app.settings import Settings
from app.storage import usage
from app.storage.database import Database
from app.wire.chat import ChatUsage
from app.wire.requests import CreateResponse


class Counted(Struct, frozen=True):
    """The tokens of a prompt, and what it leaves out."""

    tokens: int
    left_out: LeftOut


class TokenCounts:
    """The counts that this process makes."""

    def __init__(
        self, settings: Settings, database: Database, planner: Planner, counter: TokenCounter, quotas: Quotas
    ) -> None:
        self._database, self._planner, self._counter, self._quotas = database, planner, counter, quotas
        self._counts_max = settings.token_counts_max
        self._counting = 0

    async def count(self, caller: Caller, request: CreateResponse, planned: Callable[[], None]) -> Counted:
        """The tokens of the first turn's prompt, before any truncation: nothing is stored, listed or called. `planned` is called as
        soon as the context has room of its own. Raises ApiError."""
        self._quotas.refuse_early(caller.holder, caller.limits)
        if self._counting >= self._counts_max:
            raise TooManyRequests("Too many tokens are being counted; please try again.", headers={"Retry-After": "1"})
        self._counting += 1
        try:
            plan = await self._planner.plan(caller.tenant_id, caller.key, request, rights=caller.rights)
            with plan.room:
                id = new_id("count")
                grant = await self._grant(caller, plan, id)
                planned()
                return Counted(await self._count(plan, id, grant), plan.left_out)
        finally:
            self._counting -= 1

    async def _grant(self, caller: Caller, plan: RunPlan, id: str) -> Grant | None:
        """Take a request and, since a completion may be made to count, an estimate of the input; no place, as this is no run."""
        limits = [replace(one, concurrent_runs=0) for one in caller.limits]
        visible = [item for _, item in plan.context.visible]
        tokens = await offload(plan.size, reserved_tokens, limits, plan.request, visible, None) if limits else 0
        admitted = await self._quotas.admit(caller.holder, limits, id, tokens=tokens)
        caller.reply_headers.update(admitted.headers)
        return admitted.grant

    async def _count(self, plan: RunPlan, id: str, grant: Grant | None) -> int:
        spent, is_unreported = NOTHING_SPENT, False

        async def ask(upstream: Upstream, route: Route) -> int:
            def report(used: ChatUsage) -> None:
                nonlocal spent
                spent = spend(spent, used, route.prices)

            def completing(begun: bool) -> None:
                nonlocal is_unreported
                is_unreported = begun

            body = await offload(plan.size, plan.chat_request, plan.request, plan.context, upstream, route)
            asked = ChatRequest(upstream, route.model, body, plan.caller_key, report, completing)
            return await self._counter.count(plan.tenant_id, asked)

        try:
            tokens = await plan.first_in_order(ask)
        finally:
            if grant:
                is_known = spent != NOTHING_SPENT or not is_unreported
                await self._quotas.settle(grant, spent.tokens if is_known else None)
        if spent != NOTHING_SPENT:
            charge = plan.charge(spent)
            async for attempt in self._database.settling():
                with attempt:
                    async with self._database.autocommit() as tx:
                        await usage.count_request(tx, plan.tenant_id, id, plan.request.named, charge)
        return tokens
