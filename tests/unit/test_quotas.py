"""The arithmetic and the words of quotas."""

import msgspec
import pytest

from app import settings
from app.domain.quotas import (
    Holder,
    Limits,
    State,
    duration,
    headers_of,
    holder_of,
    limits_of,
    refusal,
    reserved_tokens,
    storage_limits,
    used_tokens,
)
from app.domain.rights import Rights, owner_of
from app.errors import RequestTooLarge, StorageQuotaExceeded
from app.storage.keys import encode_limits, limits_in
from app.wire import admin
from app.wire.admin import OwnLimits
from app.wire.items import InputText, Message
from app.wire.resources import InputTokensDetails, OutputTokensDetails, Usage
from tests.unit.build import request

SECOND = 1_000_000


@pytest.mark.parametrize(
    ("us", "text"),
    [
        (0, "0s"),
        (1, "1ms"),
        (17_000, "17ms"),
        (999_000, "999ms"),
        (999_001, "1s"),
        (1 * SECOND, "1s"),
        (1_500_000, "1.5s"),
        (8_640_000, "8.64s"),
        (59_952_000, "59.952s"),
        (60 * SECOND, "1m0s"),
        (86_400_000, "1m26.4s"),
        (360 * SECOND, "6m0s"),
        (3_600 * SECOND, "1h0m0s"),
        (90_061 * SECOND, "25h1m1s"),
    ],
)
def test_a_time_is_written_as_the_hosted_api_writes_it(us, text):
    assert duration(us) == text


def state(subject="tenant", measure="requests", limit=10, *, left=0, fits=True, reset_us=0, retry_us=0, asks=1):
    return State(subject, measure, limit, asks, fits=fits, remaining=left, reset_us=reset_us, retry_us=retry_us)


def test_the_headers_are_those_of_the_limit_that_leaves_the_least():
    states = [
        state(limit=100, left=50, reset_us=30 * SECOND),
        state(measure="tokens", limit=1_000, left=7, reset_us=90 * SECOND),
        state("key", limit=60, left=49, reset_us=11 * SECOND),
        state("key", "tokens", 2_000, left=8, reset_us=SECOND),
        state("key", "runs", 1, left=0),
    ]
    assert headers_of(states) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "49",
        "x-ratelimit-reset-requests": "11s",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "7",
        "x-ratelimit-reset-tokens": "1m30s",
    }
    assert headers_of(states[-1:]) == {}


@pytest.mark.parametrize(
    ("refused", "type_", "message", "retry"),
    [
        (
            state(limit=3, fits=False, retry_us=20 * SECOND),
            "requests",
            (
                "Rate limit reached for this tenant on requests per min (RPM): Limit 3, Used 3, Requested 1. "
                "Please try again in 20s."
            ),
            ("20", "20000"),
        ),
        (
            state("key", "tokens", 40_000, left=1_500, fits=False, retry_us=28_400, asks=1_519),
            "tokens",
            (
                "Rate limit reached for this API key on tokens per min (TPM): Limit 40000, Used 38500, Requested 1519. "
                "Please try again in 29ms."
            ),
            ("1", "29"),
        ),
        (
            state(measure="runs", limit=2, fits=False, retry_us=SECOND),
            "requests",
            (
                "Rate limit reached for this tenant on concurrent runs: Limit 2, Used 2, Requested 1. "
                "Please try again in 1s."
            ),
            ("1", "1000"),
        ),
    ],
)
def test_a_refusal_is_in_the_words_of_the_hosted_api(refused, type_, message, retry):
    error = refusal([state("key", limit=5, fits=False, retry_us=10_000), refused, state(left=3)])
    assert (error.status, error.type, error.code, error.message) == (429, type_, "rate_limit_exceeded", message)
    assert (error.headers["retry-after"], error.headers["retry-after-ms"]) == retry
    assert "x-ratelimit-limit-requests" in error.headers


def test_limits_that_are_not_given_are_the_default_ones_and_zero_is_none():
    default = Limits(1, 2, 3)
    assert limits_of(OwnLimits(), default) == default
    assert limits_of(OwnLimits(requests_per_minute=0, concurrent_runs=9), default) == Limits(0, 2, 9)


def test_stored_bytes_alone_are_nothing_for_redis():
    assert not Limits(stored_bytes=1).are_counted
    assert all(Limits(**{name: 1}).are_counted for name in Limits.__struct_fields__ if name != "stored_bytes")


@pytest.mark.parametrize(
    ("user", "words"), [("", "this API key: Limit 5 bytes, Used 7 by its tenant"), ("ada", "Used 7 by its user")]
)
def test_a_tenant_s_limit_of_stored_bytes_is_the_tenant_s_and_a_key_s_that_of_its_user(user, words):
    rights = Rights("acme", user, key_id="key_1")
    of_tenant, of_key = storage_limits(rights, [Limits(stored_bytes=9), Limits(stored_bytes=5)])
    assert (of_tenant.owner, of_key.owner) == ("acme", owner_of("acme", user))
    of_tenant.demand_room(8)
    of_key.demand_room(4)
    with pytest.raises(StorageQuotaExceeded, match=r"for this tenant: Limit 9 bytes, Used 9\. Delete "):
        of_tenant.demand_room(9)
    with pytest.raises(StorageQuotaExceeded, match=words) as caught:
        of_key.demand_room(7)
    assert "ada" not in caught.value.message
    assert storage_limits(rights, [Limits(), Limits(stored_bytes=5)]) == (of_key,)
    assert storage_limits(rights, [Limits(stored_bytes=9)]) == (of_tenant,), "a server without keys"


def test_limits_are_stored_as_far_as_they_are_given():
    given = OwnLimits(requests_per_minute=0, stored_bytes=7)
    assert encode_limits(given) == '{"requests_per_minute":0,"stored_bytes":7}'
    assert limits_in({"limits": encode_limits(given)}) == given
    assert encode_limits(OwnLimits()) is None
    assert limits_in({"limits": None}) == OwnLimits()


def test_a_request_counts_for_its_tenant_and_its_key_and_with_a_token_for_its_user():
    ada = owner_of("acme", "ada")
    assert holder_of("acme", None) == Holder("acme", None)
    assert holder_of(ada, "key_1") == Holder("acme", "key_1")
    assert holder_of(ada, "jwt:corp") == Holder("acme", "jwt:corp:ada")
    assert holder_of("acme", "jwt:corp") == Holder("acme", "jwt:corp")


HELLO = [Message(role="user", content=[InputText(text="x" * 4_000)])]
"""Some thousand tokens."""


def test_input_is_estimated_and_output_reserved_as_far_as_the_request_allows_it():
    limits = [Limits(tokens_per_minute=100_000)]
    given = reserved_tokens(limits, request(), HELLO, 0)
    assert 1_000 < given < 1_100
    assert reserved_tokens(limits, request(), HELLO, 500) == given + 500
    assert reserved_tokens(limits, request(max_output_tokens=700), HELLO, 500) == given + 700
    assert reserved_tokens([Limits()], request(), HELLO, 500) == 0
    assert reserved_tokens([Limits(), Limits(tokens_per_minute=given + 3)], request(), HELLO, 500) == given + 3


@pytest.mark.parametrize(
    ("limits", "subject"), [((9_000, 0), "tenant"), ((0, 9_000), "API key"), ((20_000, 9_000), "API key")]
)
def test_a_request_that_can_never_fit_is_no_matter_of_waiting(limits, subject):
    both = [Limits(tokens_per_minute=one) for one in limits]
    with pytest.raises(RequestTooLarge) as caught:
        reserved_tokens(both, request(max_output_tokens=9_000), HELLO, 500)
    assert (caught.value.status, caught.value.type) == (413, "tokens")
    assert caught.value.message.startswith(
        f"Request too large for this {subject} on tokens per min (TPM): Limit 9000, Requested 10"
    )
    assert "retry-after" not in caught.value.headers


def usage(total):
    return Usage(total, InputTokensDetails(), 0, OutputTokensDetails(), total)


@pytest.mark.parametrize(
    ("status", "reported", "was_asked", "used"),
    [
        ("completed", 70, True, 70),
        ("incomplete", 700, True, 700),
        ("completed", None, True, 100),
        ("cancelled", None, True, 100),
        ("cancelled", 70, True, 100),
        ("failed", 700, True, 700),
        ("cancelled", None, False, 0),
        ("failed", None, False, 0),
    ],
)
def test_what_is_not_reported_counts_as_reserved_unless_nothing_was_asked(status, reported, was_asked, used):
    given = usage(reported) if reported else None
    assert used_tokens(status, given, was_asked=was_asked, reserved=100) == used


def test_the_settings_and_the_api_take_the_same_numbers():
    assert settings.LIMIT_MAX == admin.LIMIT_MAX
    msgspec.convert({"requests_per_minute": settings.LIMIT_MAX}, OwnLimits)
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"requests_per_minute": settings.LIMIT_MAX + 1}, OwnLimits)
