"""The scripts that count quotas, on a real Valkey: against a simple model, and on the server's own clock."""

import asyncio
import math
import random
import uuid
from collections.abc import AsyncIterator
from fractions import Fraction
from typing import Any

import pytest

from app.domain.quotas import Holder, Limits, State
from app.settings import Settings
from app.storage import quotas
from app.storage.quotas import KNOWN_S, Answer, QuotaStore

MINUTE_US = 60_000_000
LEASE_S = 15.0
ALICE = Holder("acme", "key_a")
BOB = Holder("acme", "key_b")
TENANT = Holder("acme", None)


def settings(redis_url: str, **given: Any) -> Settings:
    prefix = f"quotas-{uuid.uuid4().hex}"
    return Settings(redis_url=redis_url, redis_prefix=prefix, lease_s=LEASE_S, quota_timeout_s=10.0, **given)


@pytest.fixture
async def store(servers) -> AsyncIterator[QuotaStore]:
    made = QuotaStore(settings(servers.redis_url))
    yield made
    await made.close()


class Clocked(QuotaStore):
    """Scripts that read a clock which the test sets, in microseconds; debts do not expire by the server's own."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.now = 1_800_000_000_000_000
        self._clock = f"{settings.redis_prefix}:clock"
        for name, script in (("_admit", quotas._ADMIT), ("_settle", quotas._SETTLE), ("_prolong", quotas._PROLONG)):
            clocked = script.replace("redis.call('TIME')", f"redis.call('MGET', '{self._clock}:s', '{self._clock}:us')")
            assert clocked != script
            clocked = clocked.replace("whole(math.ceil(debt / 1000))", "3600000")
            setattr(self, name, self._client.register_script(clocked))

    async def at(self, now: int) -> None:
        self.now = now
        seconds, microseconds = divmod(now, 1_000_000)
        await self._client.mset({f"{self._clock}:s": seconds, f"{self._clock}:us": microseconds})


@pytest.fixture
async def clocked(servers) -> AsyncIterator[Clocked]:
    made = Clocked(settings(servers.redis_url))
    await made.at(made.now)
    yield made
    await made.close()


# -- The model --------------------------------------------------------------------------------------------------------------


class Bucket:
    """What is used of a rate, exactly, in what it limits."""

    def __init__(self) -> None:
        self.used, self.at = Fraction(0), 0

    def heal(self, now: int, limit: int) -> None:
        self.used = max(Fraction(0), self.used - Fraction(now - self.at) * limit / MINUTE_US)
        self.at = now


class Model:
    """Every quota of a tenant with its keys, without expiry and without Redis."""

    def __init__(self, limits: dict[str | None, Limits]) -> None:
        self.limits = limits
        self.buckets: dict[tuple[str | None, str], Bucket] = {}
        self.foreground: dict[str | None, dict[str, int]] = {subject: {} for subject in limits}
        self.background: dict[str | None, set[str]] = {subject: set() for subject in limits}
        self.reserved: dict[str, tuple[int, int, dict[str | None, Fraction]]] = {}

    def bucket(self, subject: str | None, measure: str, now: int) -> tuple[Bucket, int]:
        found = self.buckets.setdefault((subject, measure), Bucket())
        limit = getattr(self.limits[subject], f"{measure}_per_minute")
        found.heal(now, limit)
        return found, limit

    def rates(self, holder: Holder, tokens: int, now: int) -> list[tuple[Bucket, int, int]]:
        found = []
        for subject in subjects(holder):
            for measure, cost in (("requests", 1), ("tokens", tokens)):
                if getattr(self.limits[subject], f"{measure}_per_minute"):
                    bucket, limit = self.bucket(subject, measure, now)
                    found.append((bucket, limit, cost))
        return found

    def runs(self, subject: str | None, now: int) -> int:
        leases = self.foreground[subject]
        for run in [run for run, until in leases.items() if until <= now]:
            del leases[run]
        return len(leases) + len(self.background[subject])

    def admit(
        self, holder: Holder, run: str, tokens: int, now: int, *, is_background: bool
    ) -> tuple[list[bool], list[int]]:
        """Which limits let the request through, and what each leaves afterwards."""
        rates = self.rates(holder, tokens, now)
        places = [
            (one, self.limits[one].concurrent_runs) for one in subjects(holder) if self.limits[one].concurrent_runs
        ]
        fits = [cost == 0 or bucket.used + cost <= limit + Fraction(1, 1000) for bucket, limit, cost in rates]
        fits += [self.runs(subject, now) < most for subject, most in places]
        if all(fits):
            for bucket, _, cost in rates:
                bucket.used += cost
            for subject, _ in places:
                if is_background:
                    self.background[subject].add(run)
                else:
                    self.foreground[subject][run] = now + int(LEASE_S * 1_000_000)
            if tokens:
                limited = [subject for subject in subjects(holder) if self.limits[subject].tokens_per_minute]
                used = {subject: self.buckets[subject, "tokens"].used for subject in limited}
                self.reserved[run] = tokens, now, used
        left = [max(0, math.floor(limit - bucket.used + Fraction(1, 1000))) for bucket, limit, _ in rates]
        return fits, [*left, *(max(0, most - self.runs(subject, now)) for subject, most in places)]

    def settle(self, holder: Holder, run: str, tokens: int | None, now: int) -> None:
        reserved, at, owed = self.reserved.pop(run, (None, now, {}))
        for subject in subjects(holder):
            self.foreground[subject].pop(run, None)
            self.background[subject].discard(run)
            if reserved is not None and tokens is not None and self.limits[subject].tokens_per_minute:
                bucket, limit = self.bucket(subject, "tokens", now)
                left = max(Fraction(0), min(Fraction(reserved), owed[subject] - Fraction(now - at) * limit / MINUTE_US))
                bucket.used = max(Fraction(0), bucket.used + max(Fraction(tokens - reserved), -left))


def subjects(holder: Holder) -> list[str | None]:
    return [None, holder.key_id] if holder.key_id else [None]


def limits_for(chance: random.Random) -> Limits:
    def some(*values: int) -> int:
        return chance.choice(values)

    return Limits(some(0, 1, 3, 7, 60, 977), some(0, 10, 999, 30_011, 1_000_000_000), some(0, 1, 2, 5))


@pytest.mark.parametrize("seed", range(20))
async def test_the_scripts_do_what_a_simple_model_does(clocked, seed):
    chance = random.Random(seed)
    model = Model({subject: limits_for(chance) for subject in (None, "key_a", "key_b")})
    running: dict[str, Holder] = {}
    admitted = 0
    for step in range(300):
        await clocked.at(clocked.now + chance.choice((0, 1, 17, 1_003, 250_007, 3_000_001, 70_000_003)))
        if running and chance.random() < 0.4:
            run = chance.choice(list(running))
            used = chance.choice((None, 0, 5, 400, 20_000))
            for _ in range(chance.choice((1, 2))):  # the second time nothing happens
                await clocked.settle(running[run], run, used)
                model.settle(running[run], run, used, clocked.now)
            del running[run]
            continue
        holder, run, is_background = chance.choice((ALICE, BOB, TENANT)), f"resp_{step}", chance.random() < 0.3
        limits = [model.limits[subject] for subject in subjects(holder)]
        tokens = chance.choice((1, 9, 500, 15_000)) if any(one.tokens_per_minute for one in limits) else 0
        answer = await clocked.admit(holder, limits, run, tokens=tokens, is_background=is_background)
        fits, left = model.admit(holder, run, tokens, clocked.now, is_background=is_background)
        assert [one.fits for one in answer.states] == fits
        assert [one.remaining for one in answer.states] == left
        if all(fits):
            admitted += 1
            running[run] = holder
    assert admitted


# -- Times ------------------------------------------------------------------------------------------------------------------


def only(answer: Answer, measure: str) -> State:
    [state] = [one for one in answer.states if one.measure == measure]
    return state


async def test_a_request_fits_exactly_when_it_was_promised_to(clocked):
    limits = [Limits(requests_per_minute=7)]
    for _ in range(7):
        answer = await clocked.admit(TENANT, limits)
        assert answer.fits
    assert (only(answer, "requests").remaining, only(answer, "requests").reset_us) == (0, MINUTE_US)
    refused = only(await clocked.admit(TENANT, limits), "requests")
    assert not refused.fits
    assert refused.retry_us == math.ceil(MINUTE_US / 7)
    await clocked.at(clocked.now + refused.retry_us - 10_000)
    assert not (await clocked.admit(TENANT, limits)).fits
    await clocked.at(clocked.now + 10_000)
    assert (await clocked.admit(TENANT, limits)).fits
    assert not (await clocked.admit(TENANT, limits)).fits


async def test_more_tokens_than_were_reserved_are_paid_for_later(clocked):
    limits = [Limits(tokens_per_minute=600)]
    assert (await clocked.admit(TENANT, limits, "resp_1", tokens=100)).fits
    await clocked.settle(TENANT, "resp_1", 1_200)
    state = only(await clocked.admit(TENANT, limits, "resp_2", tokens=100), "tokens")
    assert (state.fits, state.remaining, state.reset_us) == (False, 0, 2 * MINUTE_US)
    assert state.retry_us == MINUTE_US + MINUTE_US // 6
    assert (await clocked.admit(TENANT, limits)).fits, "what takes no tokens does not wait for them"
    await clocked.at(clocked.now + state.retry_us)
    assert (await clocked.admit(TENANT, limits, "resp_2", tokens=100)).fits


async def test_what_long_runs_have_reserved_in_vain_is_not_saved_for_one_moment(clocked):
    limits = [Limits(tokens_per_minute=600)]
    for minute in range(5):
        assert (await clocked.admit(TENANT, limits, f"resp_{minute}", tokens=600)).fits
        await clocked.at(clocked.now + MINUTE_US)
    taken = 0
    for minute in range(5):
        taken += (await clocked.admit(TENANT, limits, f"resp_at_once_{minute}", tokens=600)).fits
        await clocked.settle(TENANT, f"resp_{minute}", 0)
    assert taken == 1


async def test_what_an_upstream_reports_wrongly_does_not_lock_a_tenant_out_for_good(clocked):
    limits = [Limits(tokens_per_minute=1)]
    assert (await clocked.admit(TENANT, limits, "resp_1", tokens=1)).fits
    await clocked.settle(TENANT, "resp_1", 2**60)
    refused = only(await clocked.admit(TENANT, limits, "resp_2", tokens=1), "tokens")
    assert refused.retry_us == refused.reset_us == 86_400_000_000


async def test_a_clock_that_is_set_back_does_not_lock_a_tenant_out(clocked):
    limits = [Limits(requests_per_minute=1)]
    begun = clocked.now
    assert (await clocked.admit(TENANT, limits)).fits
    await clocked.at(begun - 3_600_000_000)
    assert only(await clocked.admit(TENANT, limits), "requests").retry_us == MINUTE_US
    await clocked.at(clocked.now + MINUTE_US)
    assert (await clocked.admit(TENANT, limits)).fits


async def test_a_clock_that_is_set_back_keeps_no_places_of_the_dead(clocked):
    limits, hour_us = [Limits(concurrent_runs=2)], 3_600_000_000
    assert (await clocked.admit(TENANT, limits, "resp_dead")).fits
    assert (await clocked.admit(TENANT, limits, "resp_ended", is_background=True)).fits
    await clocked.at(clocked.now - hour_us)
    answer = await clocked.admit(TENANT, limits, "resp_1")
    assert (answer.fits, answer.unknown) == (False, ["resp_ended"])
    await clocked.at(clocked.now + int(LEASE_S * 1_000_000))
    await clocked.sort_out(TENANT, ended=[], known=["resp_ended"])
    answer = await clocked.admit(TENANT, limits, "resp_1")
    assert (answer.fits, answer.unknown) == (True, [])
    assert (await clocked.admit(TENANT, limits, "resp_2")).unknown == []


async def test_what_is_healed_is_forgotten_by_the_server(store):
    limits = [Limits(60_000, 60_000)]
    answer = await store.admit(TENANT, limits, "resp_1", tokens=30_000)
    assert answer.fits
    [requests, tokens] = store._keys(TENANT, None, "requests", "tokens")
    assert await store._client.pttl(requests) <= 1
    assert 29_000 < await store._client.pttl(tokens) <= 30_001
    assert 6 * 86_400 < await store._client.ttl(store._keys(TENANT, "resp_1")[0]) <= 7 * 86_400


async def test_the_clock_is_that_of_redis(store):
    limits = [Limits(requests_per_minute=600)]  # one each 100 ms
    for _ in range(600):
        await store.admit(TENANT, limits)
    loop = asyncio.get_running_loop()
    state = only(await store.admit(TENANT, limits), "requests")
    begun = loop.time()
    while not state.fits:
        assert 0 < state.retry_us <= 100_000
        await asyncio.sleep(state.retry_us / 1e6)
        state = only(await store.admit(TENANT, limits), "requests")
    assert loop.time() - begun < 10


# -- Places -----------------------------------------------------------------------------------------------------------------


async def test_the_place_of_a_dead_process_is_free_after_a_lease(clocked):
    limits = [Limits(concurrent_runs=2)]
    for run in ("resp_1", "resp_2"):
        assert (await clocked.admit(TENANT, limits, run)).fits
    lease_us = int(LEASE_S * 1_000_000)
    await clocked.at(clocked.now + lease_us - 1)
    await clocked.prolong({"resp_1": TENANT})
    assert not (await clocked.admit(TENANT, limits, "resp_3")).fits
    await clocked.at(clocked.now + 1)
    assert (await clocked.admit(TENANT, limits, "resp_3")).fits
    assert not (await clocked.admit(TENANT, limits, "resp_4")).fits
    await clocked.settle(TENANT, "resp_3", None)
    await clocked.prolong({"resp_3": TENANT})  # which was under way when it ended
    assert (await clocked.admit(TENANT, limits, "resp_5")).fits


async def test_the_place_of_a_background_run_is_its_own_until_postgres_knows_it_no_more(clocked):
    limits = [Limits(concurrent_runs=2), Limits(concurrent_runs=2)]
    for run in ("resp_1", "resp_2"):
        assert (await clocked.admit(ALICE, limits, run, is_background=True)).fits
    assert (await clocked.admit(ALICE, limits, "resp_3")).unknown == []
    await clocked.at(clocked.now + KNOWN_S * 1_000_000)
    answer = await clocked.admit(ALICE, limits, "resp_3")
    assert not answer.fits
    assert set(answer.unknown) == {"resp_1", "resp_2"}
    await clocked.sort_out(ALICE, ended=["resp_1"], known=["resp_2"])
    assert (await clocked.admit(ALICE, limits, "resp_3")).fits
    assert (await clocked.admit(ALICE, limits, "resp_4")).unknown == []


async def test_postgres_is_asked_at_once_for_a_background_run_of_which_nobody_knows_whether_it_is_stored(clocked):
    limits = [Limits(concurrent_runs=2), Limits(concurrent_runs=2)]
    for run in ("resp_1", "resp_2"):
        assert (await clocked.admit(ALICE, limits, run, is_background=True)).fits
    await clocked.doubt(ALICE, "resp_1")
    assert set((await clocked.admit(ALICE, limits, "resp_3")).unknown) == {"resp_1"}


# -- All or nothing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [(0, "requests_per_minute"), (0, "concurrent_runs"), (1, "tokens_per_minute")])
async def test_a_request_that_one_limit_refuses_takes_from_none(clocked, which):
    roomy, at, name = Limits(100, 100_000, 100), *which
    limits = [roomy, roomy]
    limits[at] = Limits(**{**{field: getattr(roomy, field) for field in Limits.__struct_fields__}, name: 1})
    before = await clocked.admit(ALICE, limits, "resp_1", tokens=1)
    assert before.fits
    for number in range(5):
        assert not (await clocked.admit(ALICE, limits, f"resp_x{number}", tokens=1)).fits
    await clocked.settle(ALICE, "resp_1", 0)
    await clocked.at(clocked.now + MINUTE_US)
    after = await clocked.admit(ALICE, limits, "resp_2", tokens=1)
    assert [one.remaining for one in after.states] == [one.remaining for one in before.states]


async def test_two_processes_at_once_take_no_more_than_there_is(servers):
    shared = settings(servers.redis_url)
    stores = [QuotaStore(shared), QuotaStore(shared)]
    limits = [Limits(requests_per_minute=5, concurrent_runs=40), Limits(tokens_per_minute=1_000)]

    async def count(number: int, **given: Any) -> bool:
        return (await stores[number % 2].admit(ALICE, limits, f"resp_{number}", **given)).fits

    begun = asyncio.get_running_loop().time()
    assert sum(await asyncio.gather(*(count(number, tokens=10) for number in range(200)))) == 5
    limits = [Limits(concurrent_runs=40), Limits(tokens_per_minute=1_000)]
    assert sum(await asyncio.gather(*(count(number, tokens=10) for number in range(200, 400)))) == 35
    assert asyncio.get_running_loop().time() - begun < 12, "too slow to say: a request heals in 12 s"
    for one in stores:
        await one.close()


def test_the_keys_of_a_tenant_are_in_one_slot_whatever_its_name(servers):
    store = QuotaStore(Settings(redis_url=servers.redis_url))
    names = store._keys(Holder("a}{b", "key_1"), "resp_1", "requests", "tokens", "foreground", "background")
    tags = {name[name.index("{") + 1 : name.index("}")] for name in names}
    assert len(names) == len(set(names)) == 9
    assert len(tags) == 1
    assert not set(names) & set(store._keys(Holder("a", "key_1"), "resp_1", "requests", "tokens", "foreground"))
