"""Issuers of tokens: what claims give, which entries of a catalog are wrong, and when keys are fetched."""

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from app.domain.issuers import Issuer, rights_of
from app.domain.rights import ORDINARY
from app.errors import AuthenticationFailed, IssuerUnavailable
from app.outbound.guard import Guard
from app.outbound.issuer_keys import IssuerKeys, is_safe
from app.settings import Settings, parse_allowed
from tests.issuer import Issuer as Published

REQUIRED = {"issuer": "https://i", "audience": "a", "algorithms": ["RS256"]}


def made(**fields: Any) -> Issuer:
    return msgspec.convert({**REQUIRED, **({} if "claims" in fields else {"tenant": "t"}), **fields}, Issuer)


# -- Rights -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scopes", "claim", "given"),
    [
        ({}, None, set()),
        ({}, "responses.read other admin operator", {"responses.read"}),
        ({}, ["responses.write", "responses.read"], set(ORDINARY)),
        ({}, [], set()),
        ({"a": ["admin", "responses.read"], "b": ["responses.read"]}, "a b c", {"admin", "responses.read"}),
        ({"a": ["admin"]}, "responses.read admin", set()),
    ],
)
def test_scopes_are_those_of_the_claim(scopes, claim, given):
    issuer = made(claims={"scopes": "s", "tenant": "t"}, tenants=["*"], scopes=scopes)
    claims = {"t": "x"} if claim is None else {"t": "x", "s": claim}
    assert rights_of("i", issuer, claims).scopes == given


@pytest.mark.parametrize(
    "fields",
    [
        {"claims": {"scopes": "s"}, "scopes": {"x": ["operator"]}},
        {"claims": {"scopes": "s"}, "scopes": {"x": ["admin", "operator"]}},
        {"default_scopes": ["operator"]},
    ],
)
def test_no_issuer_makes_operators(fields):
    with pytest.raises(msgspec.ValidationError, match="Invalid enum value 'operator'"):
        made(tenant="t", **fields)


def test_without_names_of_claims_a_token_may_do_what_a_key_may():
    found = rights_of("i", made(), {"scope": "", "models": []})
    assert (found.tenant, found.user, found.scopes, found.models, found.key_id) == ("t", "", ORDINARY, None, "jwt:i")


def test_defaults_hold_for_tokens_without_the_claim():
    names = {"tenant": "t", "models": "m", "scopes": "s"}
    issuer = made(claims=names, tenants=["*"], default_models=["a"], default_scopes=["admin"])
    assert rights_of("i", issuer, {"t": "x"}).models == ("a",)
    assert rights_of("i", issuer, {"t": "x"}).scopes == {"admin"}
    assert rights_of("i", issuer, {"t": "x", "m": ["b*"]}).models == ("b*",)
    assert rights_of("i", made(claims=names, tenants=["*"]), {"t": "x"}).models == ()


def test_a_claim_is_found_by_its_name_or_by_a_path():
    of = {"https://x.example/user": "by name", "a": {"b": {"c": "by path"}}, "a.b": "first"}
    for name, user in (("https://x.example/user", "by name"), ("a.b.c", "by path"), ("a.b", "first")):
        assert rights_of("i", made(tenant="t", claims={"user": name}), of).user == user
    for name in ("a.c", "a.b.c.d", "https://x", "b"):
        with pytest.raises(AuthenticationFailed, match=f"no claim '{name}'"):
            rights_of("i", made(tenant="t", claims={"user": name}), of)


@pytest.mark.parametrize("models", [["a"] * 101, ["a" * 513], ["a\n"], [1], {"a": 1}])
def test_models_that_no_key_may_have_are_refused(models):
    with pytest.raises(AuthenticationFailed):
        rights_of("i", made(tenant="t", claims={"models": "m"}), {"m": models})


# -- Entries ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"tenant": ""}, "needs either 'tenant', or 'claims.tenant'"),
        ({"tenant": "t", "claims": {"tenant": "x"}}, "needs either 'tenant', or 'claims.tenant'"),
        ({"claims": {"tenant": "x"}}, "needs 'tenants'"),
        ({"tenants": ["x"]}, "need 'claims.tenant'"),
        ({"creates_tenants": True}, "need 'claims.tenant'"),
        ({"tenant": "a\nb"}, "no name of a tenant"),
        ({"algorithms": ["HS256"]}, "HS256 needs a secret"),
        ({"algorithms": ["HS256", "RS256"], "secret_env": "X"}, "RS256 verifies with a public key"),
        ({"secret_env": "X", "jwks_url": "https://x"}, "needs one of 'jwks_url' and 'secret_env'"),
        ({"secret": "x"}, "a secret does not belong into a file"),
        ({"issuer": "company"}, "because 'issuer' is no URL"),
        ({"tenant": "t", "claims": {"user": "sub"}, "default_scopes": ["admin"]}, "can't have the scope 'admin'"),
        (
            {"tenant": "t", "claims": {"user": "sub", "scopes": "s"}, "scopes": {"x": ["admin"]}},
            "can't have the scope 'admin'",
        ),
        ({"scopes": {"x": ["responses.read"]}}, "'scopes' needs 'claims.scopes'"),
        ({"default_models": ["a\n"]}, "control characters"),
    ],
)
def test_an_entry_that_can_not_be_has_a_fault(fields, fault):
    assert list(made().faults()) == []
    assert fault in next(made(**fields).faults())


@pytest.mark.parametrize(
    ("algorithm", "length", "is_long_enough"), [("HS256", 31, False), ("HS256", 32, True), ("HS512", 63, False)]
)
def test_a_secret_is_as_long_as_the_hash(algorithm, length, is_long_enough):
    issuer = msgspec.structs.replace(made(algorithms=[algorithm]), secret="s" * length)
    assert (list(issuer.faults_of_secret()) == []) is is_long_enough


def test_keys_are_fetched_by_https_or_in_the_operator_s_network():
    settings = Settings(outbound_allow="10.0.0.0/8, idp.internal")
    assert all(is_safe(url, settings) for url in ("https://x/k", "http://10.1.1.1:8/k", "http://IDP.internal/k"))
    assert not any(
        is_safe(url, settings) for url in ("http://x/k", "http://11.1.1.1", "ftp://10.1.1.1", "https://", "")
    )


# -- Keys -------------------------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes when a test lets it."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def published() -> Iterator[Published]:
    with Published() as running:
        yield running


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def fetched(published: Published, clock: Clock) -> IssuerKeys:
    issuer = made(jwks_url=published.jwks_url, algorithms=["RS256", "PS256", "ES256"])
    settings = Settings(jwks_cache_s=100, jwks_stale_s=1_000, jwks_cooldown_s=10)
    return IssuerKeys("i", issuer, settings, Guard(parse_allowed("127.0.0.1")), clock=clock)


async def settled(keys: IssuerKeys) -> None:
    """Wait for a fetch in the background."""
    if keys._fetching is not None:
        await keys._fetching


async def test_keys_are_fetched_again_before_they_are_old(published, clock, fetched):
    first = await fetched.find("first", "RS256")
    assert (await fetched.find("first", "PS256")) is not first
    clock.now = 49
    assert await fetched.holds(first)
    assert fetched._fetching is None
    clock.now = 50
    assert await fetched.holds(first)
    await settled(fetched)
    assert (published.fetches, await fetched.find("first", "RS256")) == (2, first)
    clock.now = 151  # too old to be used for one more request
    published.rotate("new")
    assert not await fetched.holds(first)
    assert await fetched.find("first", "RS256") is None
    assert await fetched.find("new", "ES256") is await fetched.find(None, "ES256") is not None
    assert await fetched.find("new", "RS256") is None
    assert published.fetches == 3


async def test_an_unknown_key_is_looked_for_once_in_a_cooldown(published, clock, fetched):
    assert await fetched.find("first", "RS256")
    published.rotate("new")
    clock.now = 9.9
    assert await fetched.find("new", "ES256") is None
    clock.now = 10
    assert await fetched.find("new", "ES256")
    assert await fetched.find("newer", "ES256") is None
    assert published.fetches == 2


async def test_keys_of_an_issuer_that_is_away_are_used_until_they_are_stale(published, clock, fetched):
    first = await fetched.find("first", "RS256")
    published.stop()
    clock.now = 1_099
    assert await fetched.holds(first)
    clock.now = 1_101
    for _ in range(2):
        with pytest.raises(IssuerUnavailable):
            await fetched.holds(first)
    published.start()
    clock.now = 1_112
    assert await fetched.holds(first)


async def test_failed_fetches_are_repeated_ever_later(published, clock, fetched):
    published.answers["keys"] = lambda _: [b"HTTP/1.1 500 No\r\nconnection: close\r\n\r\n"]
    waits_s = []
    for number in range(6):
        with pytest.raises(IssuerUnavailable) as unavailable:
            await fetched.find("first", "RS256")
        assert published.fetches == number + 1
        waits_s.append(int(unavailable.value.headers["Retry-After"]))
        clock.now += waits_s[-1]
    assert waits_s == [1, 2, 4, 8, 10, 10]
