"""Quotas in Redis: what is used of them, the same for every process.

Of a rate Redis has the debt of time (domain/quotas.py) and when that was known, by its own clock, until the debt is healed. Of concurrent
runs it has two sorted sets: those of the foreground by the end of their leases, and those of the background by when Postgres, which
knows them, is to be asked whether they still wait or are being made. What a run has reserved of tokens it has until that is settled.

The keys of a tenant share a hash tag, so that the scripts work on a cluster. Each script is all or nothing.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

from msgspec import Struct

from app.domain.quotas import RUNS_RETRY_US, Holder, Limits, Measure, State, SubjectName
from app.settings import Settings
from app.storage.redisclient import connect_pooled

KNOWN_S = 60
"""How long a background run counts before Postgres is asked for it."""

ASKED_MAX = 1_000
"""Background runs that Postgres is asked for at once."""

RESERVED_S = 7 * 86_400
"""How long a reservation can be settled: background runs may wait for long."""

_RATES = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local MINUTE = 60000000
-- No upstream can mean more: what it reports wrongly would lock a tenant out for good.
local DEBT_MAX = 1440 * MINUTE

local function whole(number)
    return string.format('%.0f', number)
end

-- In microseconds. A clock that was set back heals nothing before it is where it was: then the debt counts from now on.
local function owed(key)
    local known = redis.call('GET', key)
    if not known then
        return 0
    end
    local at, debt = string.match(known, '^(%S+) (%S+)$')
    return math.max(0, debt - math.max(0, now - at)), now < tonumber(at)
end

local function owe(key, debt)
    if debt <= 0 then
        redis.call('DEL', key)
    else
        debt = math.min(debt, DEBT_MAX)
        redis.call('SET', key, whole(now) .. string.format(' %.17g', debt), 'PX', whole(math.ceil(debt / 1000)))
    end
end
"""

_ADMIT = (
    _RATES
    + """
-- KEYS: the reservation, and of each subject requests, tokens, runs of the foreground and of the background.
local run, is_background, tokens = ARGV[1], ARGV[2] == '1', tonumber(ARGV[3])
local lease_us, known_us, kept_ms, asked_max = ARGV[4], ARGV[5], ARGV[6], ARGV[7]
local rates, places, unknown, fits = {}, {}, {}, true
local reserved = ARGV[3] .. ' ' .. whole(now)

local function rate(key, limit, cost)
    if limit == 0 then
        return 0, 0
    end
    local interval = MINUTE / limit
    local debt, is_ahead = owed(key)
    if is_ahead then
        owe(key, debt)
    end
    local over = debt + cost * interval - MINUTE
    -- Sums of fractions differ by far less than a thousandth of what is limited.
    local is_within = cost == 0 or over <= interval / 1000
    fits = fits and is_within
    rates[#rates + 1] = {key, limit, cost, interval, debt, is_within, math.max(0, over)}
    return interval, debt + cost * interval
end

for at = 2, #KEYS, 4 do
    local limits = 8 + (at - 2) / 4 * 3
    rate(KEYS[at], tonumber(ARGV[limits]), 1)
    reserved = reserved .. string.format(' %.17g %.17g', rate(KEYS[at + 1], tonumber(ARGV[limits + 1]), tokens))
    local runs_max, foreground, background = tonumber(ARGV[limits + 2]), KEYS[at + 2], KEYS[at + 3]
    if run ~= '' and runs_max > 0 then
        redis.call('ZREMRANGEBYSCORE', foreground, '-inf', whole(now))
        local used = redis.call('ZCARD', foreground) + redis.call('ZCARD', background)
        if used >= runs_max then
            fits = false
            -- What is later than it could have been set is of a clock that was set back.
            for _, one in ipairs(redis.call('ZRANGEBYSCORE', foreground, '(' .. whole(now + lease_us), '+inf')) do
                redis.call('ZADD', foreground, whole(now + lease_us), one)
            end
            for _, range in ipairs({{'-inf', whole(now)}, {'(' .. whole(now + known_us), '+inf'}}) do
                for _, one in ipairs(redis.call('ZRANGEBYSCORE', background, range[1], range[2], 'LIMIT', 0, asked_max)) do
                    unknown[#unknown + 1] = one
                end
            end
        end
        places[#places + 1] = {foreground, background, runs_max, used}
    end
end

local reply = {}
for _, one in ipairs(rates) do
    local key, limit, cost, interval, debt, is_within, over = unpack(one)
    if fits and cost > 0 then
        debt = debt + cost * interval
        owe(key, debt)
    end
    local remaining = math.max(0, math.floor((MINUTE - debt) / interval + 0.001))
    reply[#reply + 1] = {is_within and 1 or 0, remaining, math.ceil(debt), math.ceil(over)}
end
for _, one in ipairs(places) do
    local foreground, background, runs_max, used = unpack(one)
    if fits then
        local key = is_background and background or foreground
        redis.call('ZADD', key, whole(now + (is_background and known_us or lease_us)), run)
        redis.call('PEXPIRE', key, kept_ms)
    end
    reply[#reply + 1] = {used < runs_max and 1 or 0, math.max(0, runs_max - used - (fits and 1 or 0)), 0, 0}
end
if fits and run ~= '' and tokens > 0 then
    redis.call('SET', KEYS[1], reserved, 'PX', kept_ms)
end
return {reply, unknown}
"""
)

_SETTLE = (
    _RATES
    + """
-- KEYS: as for the admission, without requests. ARGV: the run, and what it has used; nothing for what it has reserved.
-- A reservation is its tokens, when they were reserved, and of each subject the interval and the debt with them.
local reserved = redis.call('GET', KEYS[1])
local fields = {}
for field in string.gmatch(reserved or '', '%S+') do
    fields[#fields + 1] = tonumber(field)
end
if reserved then
    redis.call('DEL', KEYS[1])
end
for at = 2, #KEYS, 3 do
    redis.call('ZREM', KEYS[at + 1], ARGV[1])
    redis.call('ZREM', KEYS[at + 2], ARGV[1])
    local interval, debt = fields[3 + (at - 2) / 3 * 2], fields[4 + (at - 2) / 3 * 2]
    if debt and interval > 0 and ARGV[2] ~= '' then
        -- What has healed is not given back: else the debts of others would be paid with it, and many minutes saved for one moment.
        local left = math.max(0, math.min(fields[1] * interval, debt - math.max(0, now - fields[2])))
        owe(KEYS[at], owed(KEYS[at]) + math.max((ARGV[2] - fields[1]) * interval, -left))
    end
end
"""
)

_PROLONG = (
    _RATES
    + """
-- KEYS: sorted sets. ARGV: for how long, how many runs are removed, and runs: these first, then those that are prolonged.
for _, key in ipairs(KEYS) do
    for at = 3, #ARGV do
        if at < 3 + ARGV[2] then
            redis.call('ZREM', key, ARGV[at])
        else
            redis.call('ZADD', key, 'XX', whole(now + ARGV[1]), ARGV[at])
        end
    end
end
"""
)

_US_PER_S = 1_000_000
_MS_PER_S = 1_000


class Answer(Struct, frozen=True):
    """What a request has met."""

    states: list[State]
    unknown: list[str]
    """Background runs that have places and may have ended, if there is no place left."""

    @property
    def fits(self) -> bool:
        """Whether the request has taken what it needs."""
        return all(one.fits for one in self.states)


class QuotaStore:
    """What is used of quotas. Its methods raise RedisError and OSError."""

    def __init__(self, settings: Settings) -> None:
        self._prefix, self._lease_us = settings.redis_prefix, int(settings.lease_s * _US_PER_S)
        self._client = connect_pooled(settings, timeout_s=settings.quota_timeout_s)
        self._admit, self._settle, self._prolong = map(self._client.register_script, (_ADMIT, _SETTLE, _PROLONG))

    async def close(self) -> None:
        """Close every connection."""
        await self._client.aclose()

    async def admit(
        self,
        holder: Holder,
        limits: Sequence[Limits],
        run: str = "",
        *,
        tokens: int = 0,
        is_background: bool = False,
    ) -> Answer:
        """Take a request, tokens and, for a run, a place; or nothing. `limits` are those of the tenant, and of the key if there is
        one."""
        times = (self._lease_us, KNOWN_S * _US_PER_S, RESERVED_S * _MS_PER_S)
        given = [
            number for one in limits for number in (one.requests_per_minute, one.tokens_per_minute, one.concurrent_runs)
        ]
        reply, unknown = await self._admit(
            self._keys(holder, run, "requests", "tokens", "foreground", "background"),
            [run, int(is_background), tokens, *times, ASKED_MAX, *given],
        )
        met = _met(limits, tokens, is_run=bool(run))
        states = [
            State(
                subject,
                measure,
                limit,
                requested,
                fits=bool(fits),
                remaining=remaining,
                reset_us=reset_us,
                retry_us=0 if fits else retry_us or RUNS_RETRY_US,
            )
            for (subject, measure, limit, requested), (fits, remaining, reset_us, retry_us) in zip(
                met, reply, strict=True
            )
        ]
        return Answer(states, [one.decode() for one in unknown])

    async def settle(self, holder: Holder, run: str, tokens: int | None) -> None:
        """Free the places of a run that has ended, and count what it has used instead of what it has reserved; None if that is the
        same. May be repeated."""
        keys = self._keys(holder, run, "tokens", "foreground", "background")
        await self._settle(keys, [run, "" if tokens is None else tokens])

    async def prolong(self, runs: Mapping[str, Holder]) -> None:
        """Prolong the places of runs of the foreground, unless their leases have ended."""
        by_holder: dict[Holder, list[str]] = {}
        for run, holder in runs.items():
            by_holder.setdefault(holder, []).append(run)
        for holder, some in by_holder.items():
            await self._prolong(self._keys(holder, None, "foreground"), [self._lease_us, 0, *some])

    async def sort_out(self, holder: Holder, ended: Iterable[str], known: Iterable[str]) -> None:
        """Free the places of background runs that have ended; the others have theirs for KNOWN_S more."""
        gone = list(ended)
        await self._prolong(self._keys(holder, None, "background"), [KNOWN_S * _US_PER_S, len(gone), *gone, *known])

    async def doubt(self, holder: Holder, run: str) -> None:
        """A background run may not be known: Postgres is to be asked for it at once."""
        await self._prolong(self._keys(holder, None, "background"), [0, 0, run])

    def _keys(self, holder: Holder, run: str | None, *names: str) -> list[str]:
        """The names of keys: what the run has reserved, unless it is None, then these of the tenant and of the key."""
        tag = hashlib.sha256(holder.tenant.encode()).hexdigest()[:32]  # a name may contain anything
        of_tenant = f"{self._prefix}:quota:{{{tag}}}"
        subjects = [of_tenant, *([f"{of_tenant}:{holder.key_id}"] if holder.key_id else [])]
        reserved = [] if run is None else [f"{of_tenant}:reserved:{run}"]
        return [*reserved, *(f"{subject}:{name}" for subject in subjects for name in names)]


def _met(limits: Sequence[Limits], tokens: int, *, is_run: bool) -> Iterator[tuple[SubjectName, Measure, int, int]]:
    """The limits that a request meets, in the script's order: of which subject, of what, how much, and how much is requested."""
    subjects: list[tuple[SubjectName, Limits]] = list(zip(("tenant", "key"), limits, strict=False))
    for subject, one in subjects:
        if one.requests_per_minute:
            yield subject, "requests", one.requests_per_minute, 1
        if one.tokens_per_minute:
            yield subject, "tokens", one.tokens_per_minute, tokens
    for subject, one in subjects:
        if one.concurrent_runs and is_run:
            yield subject, "runs", one.concurrent_runs, 1
