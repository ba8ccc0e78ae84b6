"""Quotas: what a tenant and its keys may use, taken on admission and settled when a run has ended.

Redis counts, for every process (storage/quotas.py). Without limits it is not asked. While it does not answer, REPRISE_QUOTA_OUTAGE
decides.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TypeVar

import structlog
from msgspec import Struct
from redis.exceptions import RedisError

from app.domain.quotas import Holder, Limits, State, SubjectName, headers_of, refusal
from app.errors import DatabaseUnavailable, ServerUnavailable
from app.settings import Settings
from app.storage import queue
from app.storage.database import Database
from app.storage.quotas import Answer, QuotaStore
from app.storage.redisclient import break_off
from app.telemetry import describe

log = structlog.get_logger()

T = TypeVar("T")

BEATS_PER_LEASE = 4

SILENCE_S = 1.0
"""How long Redis is not asked after it did not answer: then few requests wait for it in vain."""

_US_PER_S = 1_000_000

REFUSED_MAX = 10_000
"""Tenants and keys that are remembered as refused."""

UNSETTLED_MAX = 10_000
"""Grants that are remembered until Redis can settle them."""


class Grant(Struct, frozen=True):
    """What a run has taken that is to be settled."""

    holder: Holder
    run: str
    tokens: int
    """What is reserved."""


class Admitted(Struct, frozen=True):
    """A request that is within its limits."""

    headers: dict[str, str]
    grant: Grant | None
    """None for a request that leaves nothing to be settled."""


class _Refused(Struct, frozen=True):
    """A limit of requests that is used up; times are monotonic seconds."""

    limit: int
    until: float
    reset_at: float

    def state(self, subject: SubjectName, now: float) -> State:
        """The limit as a request meets it now."""
        reset_us, retry_us = (int((at - now) * _US_PER_S) for at in (self.reset_at, self.until))
        return State(subject, "requests", self.limit, 1, fits=False, remaining=0, reset_us=reset_us, retry_us=retry_us)


class Quotas:
    """The quotas, as this process knows them."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings, self._database = settings, database
        self._store = QuotaStore(settings)
        self._running: dict[str, Holder] = {}
        """The runs of the foreground that have places, by response id."""
        self._refused: dict[tuple[str, str | None], _Refused] = {}
        self._unsettled: dict[Grant, int | None] = {}
        """What is to be settled once Redis answers: grants that have ended, and those that it did not answer in time."""
        self._is_down = False
        self._asked_again_at = 0.0
        self._settling: set[asyncio.Task[None]] = set()
        self._prolonging: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start to prolong the places of runs of the foreground: those of a process that dies are free after a lease. And to settle
        what could not be settled."""
        self._prolonging = asyncio.create_task(self._prolong_forever())

    async def close(self) -> None:
        """Settle what has ended, and stop."""
        if self._settling:
            await asyncio.wait(self._settling)
        if self._prolonging:
            await break_off([self._prolonging])
        await self._store.close()

    # -- Admission --------------------------------------------------------------------------------------------------------

    def refuse_early(self, holder: Holder, limits: Sequence[Limits]) -> None:
        """Raises RateLimited where it is known that no request fits yet: before that costs a plan and a question to Redis."""
        now = time.monotonic()
        for (subject, key), one in zip(_subjects(holder), limits, strict=False):
            refused = self._refused.get(key)
            if refused is None or refused.limit != one.requests_per_minute:
                continue
            if now < refused.until:
                raise refusal([refused.state(subject, now)])
            del self._refused[key]

    async def admit(
        self,
        holder: Holder,
        limits: Sequence[Limits],
        run: str = "",
        *,
        tokens: int = 0,
        is_background: bool = False,
    ) -> Admitted:
        """Take a request and, for a run, its tokens and a place; or nothing. `limits` are those of the tenant, and of the key if there
        is one; without any there is nothing to take. Raises RateLimited; ServerUnavailable, if the operator wants that, while Redis does
        not answer."""
        if not limits:
            return Admitted({}, None)

        has_place = bool(run) and any(one.concurrent_runs for one in limits)
        grant = Grant(holder, run, tokens) if has_place or tokens else None

        async def take() -> Answer:
            try:
                return await self._store.admit(holder, limits, run, tokens=tokens, is_background=is_background)
            except BaseException:  # Redis may have counted it, or will once it awakes
                if grant:
                    self._settle_later(grant, 0)
                raise

        asked_at = time.monotonic()
        answer = await self._taken(take, grant)
        if answer and answer.unknown and await self._sort_out(holder, answer.unknown):
            asked_at = time.monotonic()
            answer = await self._taken(take, grant)
        if answer is None:
            if self._settings.quota_outage == "refuse":
                raise ServerUnavailable("The quotas can't be checked at the moment; please try again.")
            return Admitted({}, None)
        if not answer.fits:
            self._remember(holder, answer.states, asked_at)
            raise refusal(answer.states)
        if has_place and not is_background:
            self._running[run] = holder
        return Admitted(headers_of(answer.states), grant)

    async def _taken(self, take: Callable[[], Awaitable[Answer]], grant: Grant | None) -> Answer | None:
        """What Redis answers. A client that disconnects meanwhile has taken nothing."""
        asking = asyncio.ensure_future(self._ask(take))
        try:
            return await asyncio.shield(asking)
        except asyncio.CancelledError:
            if grant:
                asking.add_done_callback(lambda _: self.settle_soon(grant, 0))
            raise

    def _remember(self, holder: Holder, states: Sequence[State], asked_at: float) -> None:
        for subject, key in _subjects(holder):
            for one in states:
                if not one.fits and (one.subject, one.measure) == (subject, "requests"):
                    self._refused.pop(key, None)
                    while len(self._refused) >= REFUSED_MAX:
                        del self._refused[next(iter(self._refused))]
                    until, reset_at = asked_at + one.retry_us / _US_PER_S, asked_at + one.reset_us / _US_PER_S
                    self._refused[key] = _Refused(one.limit, until, reset_at)

    async def _sort_out(self, holder: Holder, runs: Sequence[str]) -> bool:
        """Ask Postgres which background runs have ended without a word to Redis. Returns whether there is a place more."""
        try:
            async with self._database.autocommit() as tx:
                known = await queue.those_alive(tx, holder.tenant, runs)
        except DatabaseUnavailable:
            return False
        ended = [run for run in runs if run not in known]
        await self._ask(lambda: self._store.sort_out(holder, ended, known))
        return bool(ended)

    # -- After admission --------------------------------------------------------------------------------------------------

    async def settle(self, grant: Grant, tokens: int | None) -> None:
        """Free the place of a run that has ended, and count what it has used; None for what it has reserved. Before the client
        learns of the end: it may make the next request at once. Nothing, the second time."""
        await asyncio.shield(self.settle_soon(grant, tokens))

    def settle_soon(self, grant: Grant, tokens: int | None) -> "asyncio.Task[None]":
        """The same, for callers that can't wait."""
        settling = asyncio.ensure_future(self._settle(grant, tokens))
        self._settling.add(settling)
        settling.add_done_callback(self._settling.discard)
        return settling

    async def doubt(self, grant: Grant) -> None:
        """A background run may have been stored, or not: Postgres is asked for it as soon as there is no place left."""
        await self._ask(lambda: self._store.doubt(grant.holder, grant.run))

    async def _settle(self, grant: Grant, tokens: int | None) -> None:
        self._running.pop(grant.run, None)
        if not await self._is_settled(grant, tokens):
            self._settle_later(grant, tokens)

    async def _is_settled(self, grant: Grant, tokens: int | None) -> bool:
        async def settle() -> bool:
            await self._store.settle(grant.holder, grant.run, tokens)
            return True

        return bool(await self._ask(settle))

    def _settle_later(self, grant: Grant, tokens: int | None) -> None:
        while len(self._unsettled) >= UNSETTLED_MAX:
            del self._unsettled[next(iter(self._unsettled))]
        self._unsettled[grant] = tokens

    async def _prolong_forever(self) -> None:
        beat_s = self._settings.lease_s / BEATS_PER_LEASE
        while True:
            await asyncio.sleep(beat_s)
            prolonged_at = time.monotonic()
            if self._running:
                await self._ask(lambda: self._store.prolong(dict(self._running)))
            for grant, tokens in list(self._unsettled.items()):
                # What is left is settled later: the places of those that still run would be lost meanwhile.
                if time.monotonic() > prolonged_at + beat_s or not await self._is_settled(grant, tokens):
                    break
                self._unsettled.pop(grant, None)

    async def _ask(self, question: Callable[[], Awaitable[T]]) -> T | None:
        """Redis' answer; None if there is none in time, which is logged once."""
        if time.monotonic() < self._asked_again_at:
            return None
        try:
            async with asyncio.timeout(self._settings.quota_timeout_s):
                answer = await question()
        except (RedisError, OSError) as error:
            self._asked_again_at = time.monotonic() + SILENCE_S
            if not self._is_down:
                log.warning(
                    "Redis does not count what quotas limit.",
                    action="quotas_down",
                    outage=self._settings.quota_outage,
                    error=describe(error),
                )
            self._is_down = True
            return None
        if self._is_down:
            self._is_down = False
            log.info("Redis counts again what quotas limit.", action="quotas_up")
        return answer


def _subjects(holder: Holder) -> Iterator[tuple[SubjectName, tuple[str, str | None]]]:
    """The tenant, and the key if there is one: its name, and how it is remembered."""
    yield "tenant", (holder.tenant, None)
    if holder.key_id:
        yield "key", (holder.tenant, holder.key_id)
