"""Quotas: what a tenant, and one of its keys, may use in a minute and at once.

A rate is a limit of so much in a minute, by GCRA: what is taken is a debt of time, which passes by itself. A minute's worth may be
taken at once, and from then on as much as time has healed. Tokens are reserved on admission, by an estimate, and settled when the
run has ended.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from msgspec import Struct

from app.domain.compaction import context_tokens
from app.domain.issuers import LABEL
from app.domain.lifecycle import APPENDED
from app.domain.rights import Rights, tenant_of, user_of
from app.errors import RateLimited, RequestTooLarge, StorageQuotaExceeded
from app.wire.admin import OwnLimits
from app.wire.items import AnyItem
from app.wire.requests import CreateResponse
from app.wire.resources import Status, Usage

Measure = Literal["requests", "tokens", "runs"]

SubjectName = Literal["tenant", "key"]

RUNS_RETRY_US = 1_000_000
"""When a run ends is unknown: so long a client waits before it asks for a place again, in microseconds."""

_SUBJECTS: Mapping[SubjectName, str] = {"tenant": "this tenant", "key": "this API key"}

_MEASURES: Mapping[Measure, str] = {
    "requests": "requests per min (RPM)",
    "tokens": "tokens per min (TPM)",
    "runs": "concurrent runs",
}

_S_PER_MIN = 60
_MIN_PER_H = 60


class Limits(Struct, frozen=True):
    """What a subject may use; 0 is no limit."""

    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    concurrent_runs: int = 0
    stored_bytes: int = 0

    @property
    def are_counted(self) -> bool:
        """Whether there is something for Redis to count; stored bytes are measured in Postgres."""
        return bool(self.requests_per_minute or self.tokens_per_minute or self.concurrent_runs)


class StorageLimit(Struct, frozen=True):
    """How much an owner may have stored until a subject may store nothing more; a tenant's users count for it."""

    subject: SubjectName
    owner: str
    bytes: int

    def demand_room(self, stored: int) -> None:
        """Raises StorageQuotaExceeded where the owner has stored so much."""
        if stored < self.bytes:
            return
        by = ""
        if self.subject == "key":
            by = " by its user" if user_of(self.owner) else " by its tenant"
        raise StorageQuotaExceeded(
            f"Storage limit reached for {_SUBJECTS[self.subject]}: Limit {self.bytes} bytes, Used {stored}{by}."
        )


class Holder(Struct, frozen=True):
    """Whose quotas a request counts for: its tenant's, and its key's if it has one."""

    tenant: str
    key_id: str | None


def holder_of(owner: str, key_id: str | None) -> Holder:
    """The holder of what is asked for with a key. An issuer's tokens have no key: those of one user count as one."""
    tenant, user = tenant_of(owner), user_of(owner)
    return Holder(tenant, f"{key_id}:{user}" if key_id and user and key_id.startswith(LABEL) else key_id)


class State(Struct, frozen=True):
    """One limit as a request has met it. Times are in microseconds."""

    subject: SubjectName
    measure: Measure
    limit: int
    requested: int
    fits: bool
    remaining: int
    reset_us: int = 0
    """Until nothing is used."""
    retry_us: int = 0
    """Until the request would fit."""


def limits_of(given: OwnLimits, default: Limits) -> Limits:
    """The limits that are given, and the others by default."""
    return Limits(
        **{
            name: value if (value := getattr(given, name)) is not None else getattr(default, name)
            for name in Limits.__struct_fields__
        }
    )


def storage_limits(rights: Rights, limits: Sequence[Limits]) -> tuple[StorageLimit, ...]:
    """Where a caller stores nothing more. `limits` are those of its tenant, and of its key if there is one: that of a key is for what
    its user has stored, or without one for the tenant with its users."""
    subjects: tuple[tuple[SubjectName, str], ...] = (("tenant", rights.tenant), ("key", rights.owner))
    return tuple(
        StorageLimit(subject, owner, one.stored_bytes)
        for (subject, owner), one in zip(subjects, limits, strict=False)
        if one.stored_bytes
    )


def reserved_tokens(
    limits: Sequence[Limits], request: CreateResponse, visible: Sequence[AnyItem], output_tokens: int | None
) -> int:
    """The tokens that a request reserves: an estimate of its input, and the output that it allows; without `max_output_tokens` that
    is `output_tokens`, or what the limits leave. With None for `output_tokens` it is the input alone. 0 without a limit. `limits` are
    those of the tenant, and of the key if there is one. Raises RequestTooLarge for more than a minute's worth."""
    most = min((one.tokens_per_minute for one in limits if one.tokens_per_minute), default=0)
    if not most or not request.generate:
        return 0
    given = context_tokens(request, visible)
    output = 0
    if output_tokens is not None:
        output = request.body.max_output_tokens or min(output_tokens, max(0, most - given))
    if given + output > most:
        subject: SubjectName = "tenant" if limits[0].tokens_per_minute == most else "key"
        raise RequestTooLarge(
            f"Request too large for {_SUBJECTS[subject]} on {_MEASURES['tokens']}: Limit {most}, Requested {given + output}. "
            "The input or output tokens must be reduced in order to run successfully."
        )
    return given + output


def used_tokens(status: Status, usage: Usage | None, *, was_asked: bool, reserved: int) -> int:
    """What a run that has ended has used; `was_asked` says whether an upstream was sent a turn and has not refused it. None reports
    a turn that was broken off: then what was reserved counts, unless the turns before it have used more."""
    reported = usage.total_tokens if usage else 0
    is_whole = usage is not None and status in APPENDED
    return max(reported, reserved) if was_asked and not is_whole else reported


def headers_of(states: Sequence[State]) -> dict[str, str]:
    """The headers of a reply, as the hosted API has them: of each rate the limit that leaves the least."""
    headers = {}
    for measure in ("requests", "tokens"):
        of_measure = [one for one in states if one.measure == measure]
        if of_measure:
            least = min(of_measure, key=lambda one: (one.remaining, one.limit))
            headers[f"x-ratelimit-limit-{measure}"] = str(least.limit)
            headers[f"x-ratelimit-remaining-{measure}"] = str(least.remaining)
            headers[f"x-ratelimit-reset-{measure}"] = duration(least.reset_us)
    return headers


def refusal(states: Sequence[State]) -> RateLimited:
    """The error of a request that some limit refuses: of several the one for which it must wait longest."""
    worst = max((one for one in states if not one.fits), key=lambda one: one.retry_us)
    milliseconds = math.ceil(worst.retry_us / 1000)
    return RateLimited(
        f"Rate limit reached for {_SUBJECTS[worst.subject]} on {_MEASURES[worst.measure]}: Limit {worst.limit}, "
        f"Used {worst.limit - worst.remaining}, Requested {worst.requested}. "
        f"Please try again in {duration(milliseconds * 1000)}.",
        type="tokens" if worst.measure == "tokens" else "requests",
        headers={
            "retry-after": str(math.ceil(milliseconds / 1000)),
            "retry-after-ms": str(milliseconds),
            **headers_of(states),
        },
    )


def duration(us: int) -> str:
    """A time as the hosted API writes it, to the next millisecond: `0s`, `12ms`, `8.64s`, `6m0s`, `1h0m0s`."""
    milliseconds = math.ceil(us / 1000)
    if 0 < milliseconds < 1000:
        return f"{milliseconds}ms"
    whole, rest = divmod(milliseconds, 1000)
    minutes, seconds = divmod(whole, _S_PER_MIN)
    hours, minutes = divmod(minutes, _MIN_PER_H)
    text = f"{seconds}.{rest:03}".rstrip("0").rstrip(".") if rest else str(seconds)
    if hours:
        return f"{hours}h{minutes}m{text}s"
    return f"{minutes}m{text}s" if minutes else f"{text}s"
