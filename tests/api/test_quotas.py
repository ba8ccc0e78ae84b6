"""Quotas as clients meet them: what is refused, what the replies say, what the official client makes of it."""

import asyncio
import itertools
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx
import openai
import pytest
import redis
from msgspec import Struct

from app.domain.quotas import Holder
from app.domain.rights import owner_of
from app.settings import Settings
from app.storage.quotas import QuotaStore
from tests.issuer import Issuer
from tests.servers import Served, reprise
from tests.upstream import Upstream, finish, gate, script, status, text, usage
from tests.waiting import fetch, until

CACHE_S = 0.2
LEASE_S = 4.0
SCOPES = ("--scope=admin", "--scope=responses.read", "--scope=responses.write")


class House(Struct):
    """Two replicas whose tenants have no limits unless a test sets some."""

    env: dict[str, str]
    one: Served
    other: Served

    def tenant(self, name: str, **limits: int) -> "Tenant":
        """A new tenant with an administrators' key."""
        self.limit(name, "--create", **limits)
        done = reprise(self.env, "keys", "create", "--tenant", name, *SCOPES)
        assert done.returncode == 0, done.stderr
        return Tenant(self, name, done.stdout.strip())

    def limit(self, name: str, *more: str, **limits: int) -> None:
        options = [*more, *(f"--{limit.replace('_', '-')}={value}" for limit, value in limits.items())]
        done = reprise(self.env, "tenants", "limit", name, *options)
        assert done.returncode == 0, done.stderr


class Tenant(Struct):
    """A tenant, and the key of its administrators."""

    house: House
    name: str
    key: str

    def make(self, **given: Any) -> dict[str, Any]:
        with self.http() as http:
            reply = http.post("/admin/keys", json=given)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def http(self, key: str | None = None, served: Served | None = None) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key or self.key}"}
        return httpx.Client(base_url=(served or self.house.one).url, headers=headers, timeout=30)

    def client(self, key: str | None = None, served: Served | None = None, **options: Any) -> openai.OpenAI:
        return (served or self.house.one).client(key or self.key).with_options(**options)


@pytest.fixture(scope="module")
def house(base_env: Mapping[str, str], new_database: Callable[[], str]) -> Iterator[House]:
    env = {**base_env, "DATABASE_URL": new_database(), "REPRISE_KEY_CACHE_S": f"{CACHE_S}"}
    env |= {
        "REPRISE_STORED_BYTES_AGE_S": "0.2",
        "REPRISE_LEASE_S": f"{LEASE_S}",
        "REPRISE_QUOTA_TIMEOUT_S": "5",
        "REPRISE_REDIS_PREFIX": "quotas-api",
    }
    with Served(env) as one, Served(env) as other:
        yield House(env, one, other)


@pytest.fixture
def tenant(house, request) -> Callable[..., Tenant]:
    """Makes a tenant that is this test's own."""
    return lambda **limits: house.tenant(request.node.name, **limits)


ASKED = {"model": "m", "input": "hi"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}

CREATES: dict[str, tuple[str, dict[str, Any]]] = {
    "response": ("/responses", ASKED),
    "stream": ("/responses", {**ASKED, "stream": True}),
    "background": ("/responses", {**ASKED, "background": True}),
    "background stream": ("/responses", {**ASKED, "background": True, "stream": True}),
    "unstored": ("/responses", {**ASKED, "store": False}),
    "chat": ("/chat/completions", CHAT),
    "chat stream": ("/chat/completions", {**CHAT, "stream": True}),
    "compact": ("/responses/compact", ASKED),
    "input tokens": ("/responses/input_tokens", ASKED),
}


def limits_in(reply: httpx.Response) -> dict[str, str]:
    prefix = "x-ratelimit-"
    return {name.removeprefix(prefix): value for name, value in reply.headers.items() if name.startswith(prefix)}


def error_of(reply: httpx.Response) -> tuple[int, str, str | None]:
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return reply.status_code, error["type"], error["code"]


# -- Headers ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CREATES)
def test_every_create_says_what_is_left(tenant, kind):
    acme = tenant(requests_per_minute=30, tokens_per_minute=600_000)
    path, body = CREATES[kind]
    with acme.http() as http:
        first, second = (limits_in(http.post(path, json=body)) for _ in range(2))
    assert first["limit-requests"] == "30"
    assert first["remaining-requests"] == "29"
    assert first["reset-requests"] == "2s"
    assert first["limit-tokens"] == "600000"
    assert second["remaining-requests"] == "28"
    assert second["reset-requests"].startswith(("3.", "4s"))
    used = 600_000 - int(first["remaining-tokens"])
    assert 0 < used < 50 if kind == "input tokens" else 1_024 < used < 1_100


def test_a_reply_to_a_request_that_is_refused_later_says_it_too(tenant):
    acme = tenant(requests_per_minute=30)
    with acme.http() as http:
        reply = http.post("/responses", json={"model": "m", "input": script([status(400)])})
    assert reply.status_code == 400
    assert limits_in(reply) == {"limit-requests": "30", "remaining-requests": "29", "reset-requests": "2s"}
    assert len(reply.headers.get_list("x-ratelimit-limit-requests")) == 1


def test_without_limits_nothing_is_counted_and_nothing_said(tenant, house):
    acme = tenant()
    with acme.http() as http, redis.Redis.from_url(house.env["REDIS_URL"]) as counted:
        before = set(counted.keys("quotas-api:quota:*"))
        for path, body in CREATES.values():
            reply = http.post(path, json=body)
            assert (reply.status_code, limits_in(reply)) == (200, {})
        assert set(counted.keys("quotas-api:quota:*")) <= before


# -- Rates ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CREATES)
def test_a_request_too_many_is_a_429_in_the_words_of_the_hosted_api(tenant, kind):
    acme = tenant(requests_per_minute=2)
    path, body = CREATES[kind]
    with acme.http() as http:
        assert [http.post(path, json=body).status_code for _ in range(2)] == [200, 200]
        replies = [http.post(path, json=body) for _ in range(2)]  # the second is not even planned
    for reply in replies:
        assert error_of(reply) == (429, "requests", "rate_limit_exceeded")
        message = reply.json()["error"]["message"]
        assert message.startswith(
            "Rate limit reached for this tenant on requests per min (RPM): Limit 2, Used 2, Requested 1. "
            "Please try again in "
        )
        wait_ms = int(reply.headers["retry-after-ms"])
        assert 20_000 < wait_ms <= 30_000
        assert wait_ms <= 1_000 * int(reply.headers["retry-after"]) < wait_ms + 1_000
        assert f"try again in {wait_ms / 1000:g}s." in message
        assert limits_in(reply).keys() == {"limit-requests", "remaining-requests", "reset-requests"}
        assert limits_in(reply)["remaining-requests"] == "0"


def test_what_is_refused_for_another_reason_takes_nothing(tenant):
    acme = tenant(requests_per_minute=1)
    with acme.http() as http:
        for body in ({**ASKED, "previous_response_id": "resp_x"}, {**ASKED, "tools": 3}):
            assert http.post("/responses", json=body).status_code == 400
        assert http.post("/responses", json=ASKED).status_code == 200
        assert http.get("/responses").status_code == 200
        assert http.post("/responses", json=ASKED).status_code == 429
        assert http.get("/responses").status_code == 200


def test_a_tenant_s_limit_holds_for_all_its_keys_and_users_together(tenant, house):
    acme = tenant(requests_per_minute=3)
    keys = [acme.key, acme.make()["value"], acme.make(user="ada")["value"], acme.make(user="bob")["value"]]
    found = []
    for at, key in enumerate(keys):
        with acme.http(key, (house.one, house.other)[at % 2]) as http:
            found.append(http.post("/responses", json=ASKED).status_code)
    assert found == [200, 200, 200, 429]


def test_a_key_s_limit_is_its_own_and_a_request_that_it_refuses_takes_nothing_of_the_tenant_s(tenant):
    acme = tenant(requests_per_minute=4)
    narrow, wide = acme.make(limits={"requests_per_minute": 1})["value"], acme.make()["value"]
    with acme.http(narrow) as http:
        replies = [http.post("/responses", json=ASKED) for _ in range(3)]
    assert [reply.status_code for reply in replies] == [200, 429, 429]
    assert limits_in(replies[0])["limit-requests"] == "1"
    assert "for this API key on" in replies[1].json()["error"]["message"]
    with acme.http(wide) as http:
        assert [http.post("/responses", json=ASKED).status_code for _ in range(4)] == [200, 200, 200, 429]


def test_the_official_client_waits_as_long_as_it_is_asked_to_and_succeeds(tenant, upstream: Upstream, said):
    acme = tenant(tokens_per_minute=60_000)
    spent = script([text("all"), usage(59_000, 1_500), finish()])
    with acme.client() as client:
        assert client.responses.create(model="m", input=spent).usage.total_tokens == 60_500
        with pytest.raises(openai.RateLimitError) as caught:
            client.responses.create(model="m", input=said)
        assert (caught.value.code, caught.value.type) == ("rate_limit_exceeded", "tokens")
        begun = time.monotonic()
        assert client.with_options(max_retries=1).responses.create(model="m", input=said).output_text == f"ok: {said}"
        assert 0.5 < time.monotonic() - begun < 10
    assert len(upstream.asked(said)) == 1


@pytest.mark.parametrize("kind", ["response", "stream", "unstored", "chat stream", "background"])
def test_what_a_run_has_used_counts_in_place_of_what_it_has_reserved(tenant, kind):
    acme = tenant(tokens_per_minute=1_000_000)
    path, body = CREATES[kind]
    asked_for = script([text("much"), usage(500_000, 100_000), finish()])
    body = {
        **body,
        **({"messages": [{"role": "user", "content": asked_for}]} if "messages" in body else {"input": asked_for}),
    }
    with acme.http() as http:
        first = http.post(path, json=body)
        assert int(limits_in(first)["remaining-tokens"]) > 990_000

        def left() -> int:
            return int(limits_in(http.post("/responses/input_tokens", json=ASKED))["remaining-tokens"])

        if kind == "background":
            until(lambda: left() < 500_000)
        assert 400_000 <= left() < 450_000


@pytest.mark.parametrize("steps", [[status(500)], [status(400)]], ids=["it fails", "it refuses"])
def test_a_run_that_no_upstream_answers_uses_no_tokens(tenant, steps):
    acme = tenant(tokens_per_minute=60_000)
    with acme.http() as http:
        for _ in range(3):
            reply = http.post("/responses", json={**ASKED, "input": script(steps), "max_output_tokens": 50_000})
            assert reply.status_code in {400, 502}, reply.text


def test_a_run_that_is_broken_off_has_used_what_it_reserved(tenant, upstream: Upstream, said):
    acme = tenant(tokens_per_minute=60_000)
    asked = script([text("so "), gate(said), finish()])
    with acme.client() as client:
        events = client.responses.create(model="m", input=asked, stream=True, max_output_tokens=50_000)
        next(event for event in events if event.type == "response.output_text.delta")
        events.close()
    with acme.http() as http:
        stored = until(lambda: http.get("/responses").json()["data"])
        until(lambda: http.get(f"/responses/{stored[0]['id']}").json()["status"] == "cancelled")
        reply = http.post("/responses", json={**ASKED, "max_output_tokens": 50_000})
    upstream.open(said)
    assert error_of(reply) == (429, "tokens", "rate_limit_exceeded")


@pytest.mark.parametrize(
    "kind", ["response", "stream", "unstored", "chat", "chat stream", "background", "background stream"]
)
def test_a_run_whose_client_leaves_before_the_first_byte_has_used_what_it_reserved(
    tenant, upstream: Upstream, said, kind
):
    acme = tenant(tokens_per_minute=60_000, concurrent_runs=1)
    path, body = CREATES[kind]
    asked = script([gate(said), text("ok"), finish()])
    given, most = ("messages", "max_completion_tokens") if "chat" in kind else ("input", "max_output_tokens")
    body = {**body, given: [{"role": "user", "content": asked}], most: 50_000}
    asyncio.run(leave(acme, path, body, lambda: upstream.wait_reached(said, 20)))
    with acme.http() as http:
        if "background" in kind:
            [made] = http.get("/responses").json()["data"]
            assert http.post(f"/responses/{made['id']}/cancel").json()["status"] == "cancelled"
        until(lambda: http.post("/responses", json={**ASKED, "max_output_tokens": 16}).status_code == 200)
        reply = http.post("/responses", json={**ASKED, "max_output_tokens": 50_000})
    upstream.open(said)
    assert error_of(reply) == (429, "tokens", "rate_limit_exceeded")


async def leave(acme: Tenant, path: str, body: dict[str, Any], reached: Callable[[], None]) -> None:
    """Disconnect as soon as the upstream is reached."""
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {acme.key}"}, timeout=30) as http:
        asking = asyncio.create_task(http.post(f"{acme.house.one.url}{path}", json=body))
        await asyncio.to_thread(reached)
        asking.cancel()
        await asyncio.wait([asking])


def left_of(acme: Tenant) -> int:
    """The tokens that are left, as a request says that takes none."""
    with acme.http() as http:
        reply = http.post("/responses", json={**ASKED, "input": script([status(400)]), "max_output_tokens": 16})
    return int(limits_in(reply)["remaining-tokens"])


def test_a_count_takes_what_the_completion_has_used_that_was_made_for_it(tenant):
    acme = tenant(tokens_per_minute=1_000_000)
    given = script([text("much"), usage(500_000, 1), finish()])
    with acme.http() as http:
        assert http.post("/responses/input_tokens", json={**ASKED, "input": given}).json()["input_tokens"] == 500_000
        assert 400_000 <= left_of(acme) < 550_000
        again = http.post("/responses/input_tokens", json={**ASKED, "input": given})
        assert again.json()["input_tokens"] == 500_000, "it is remembered"
        assert left_of(acme) > 400_000


def test_a_count_that_an_upstream_refuses_or_that_is_too_long_uses_no_tokens(tenant, upstream: Upstream, said):
    acme = tenant(tokens_per_minute=6_000)
    long = script([status(400)]) + " " * 16_000
    with acme.http() as http:
        for _ in range(3):
            assert http.post("/responses/input_tokens", json={**ASKED, "input": long}).status_code == 400
        longer = http.post("/responses/input_tokens", json={**ASKED, "input": said + " " * 25_000})
        assert error_of(longer) == (413, "tokens", "request_too_large")
    assert not upstream.asked(said)


def test_a_count_whose_client_leaves_has_used_what_it_reserved(tenant, upstream: Upstream, said):
    acme = tenant(tokens_per_minute=6_000, concurrent_runs=1)
    asked = script([gate(said), text("ok"), finish()]) + " " * 16_000
    body = {**ASKED, "input": asked}
    asyncio.run(leave(acme, "/responses/input_tokens", body, lambda: upstream.wait_reached(said, 20)))
    with acme.http() as http, redis.Redis.from_url(acme.house.env["REDIS_URL"]) as counted:
        until(lambda: upstream.asked(asked)[0].peer_left)
        until(lambda: not counted.keys("quotas-api:quota:*count_*"))
        reply = http.post("/responses/input_tokens", json=body)
        assert error_of(reply) == (429, "tokens", "rate_limit_exceeded")
        assert http.post("/responses", json={**ASKED, "max_output_tokens": 16}).status_code == 200, "it has no place"
    upstream.open(said)


def test_a_request_that_can_never_fit_is_no_429(tenant, upstream: Upstream, said):
    acme = tenant(tokens_per_minute=10_000)
    with acme.client(max_retries=3) as client:
        for more in ({}, {"background": True}):
            with pytest.raises(openai.APIStatusError) as caught:
                client.responses.create(model="m", input=said, max_output_tokens=10_000, **more)
            assert (caught.value.status_code, caught.value.code) == (413, "request_too_large")
            assert "Limit 10000, Requested 100" in caught.value.message
        assert client.responses.create(model="m", input=said).output_text
    assert len(upstream.asked(said)) == 1


# -- Runs at once -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["stream", "background", "chat stream"])
def test_runs_at_once_are_limited_until_they_end(tenant, upstream: Upstream, said, kind):
    acme = tenant(concurrent_runs=2)
    path, body = CREATES[kind]
    key = "messages" if "messages" in body else "input"

    def asked(name: str) -> dict[str, Any]:
        asked_for = script([text("so "), gate(f"{said} {name}"), finish()])
        return {**body, key: [{"role": "user", "content": asked_for}]}

    with acme.http() as http, http.stream("POST", path, json=asked("a")) as a:
        assert a.status_code == 200
        with http.stream("POST", path, json=asked("b")) as b:
            assert b.status_code == 200
            refused = http.post(path, json=asked("c"))
            assert error_of(refused) == (429, "requests", "rate_limit_exceeded")
            assert (refused.headers["retry-after"], limits_in(refused)) == ("1", {})
            assert "on concurrent runs: Limit 2, Used 2, Requested 1." in refused.json()["error"]["message"]
            with acme.http(served=acme.house.other) as elsewhere:
                assert elsewhere.post("/responses", json=ASKED).status_code == 429
                assert elsewhere.post("/responses/input_tokens", json=ASKED).status_code == 200
            upstream.open(f"{said} a")
            if kind == "background":
                until(lambda: http.post("/responses", json=ASKED).status_code == 200)
            else:
                a.read()
            assert http.post("/responses", json=ASKED).status_code == 200
            upstream.open(f"{said} b")


@pytest.mark.parametrize("kind", [kind for kind in CREATES if "background" not in kind])
def test_one_run_after_the_other_is_never_one_too_many(tenant, kind):
    acme = tenant(concurrent_runs=1)
    path, body = CREATES[kind]
    with acme.http() as http:
        for _ in range(10):
            assert http.post(path, json=body).status_code == 200
        failing = [{"role": "user", "content": script([status(500)])}]
        if kind not in {"input tokens", "compact"}:
            for _ in range(3):
                reply = http.post(path, json={**body, "messages" if "messages" in body else "input": failing})
                assert reply.status_code in {502, 500}, reply.text


@pytest.mark.parametrize("way", ["cancelled", "disconnected"])
def test_a_run_that_is_broken_off_frees_its_place(tenant, upstream: Upstream, said, way):
    acme = tenant(concurrent_runs=1)
    asked = script([text("so "), gate(said), finish()])
    with acme.client() as client:
        if way == "disconnected":
            events = client.responses.create(model="m", input=asked, stream=True)
            next(iter(events))
            events.close()
        else:
            made = client.responses.create(model="m", input=asked, background=True)
            upstream.wait_reached(said, 20)
            with pytest.raises(openai.RateLimitError):
                client.responses.create(model="m", input="hi")
            client.responses.cancel(made.id)

        def free() -> bool:
            try:
                return bool(client.responses.create(model="m", input="hi").output_text)
            except openai.RateLimitError:
                return False

        until(free, timeout_s=LEASE_S / 2)
    upstream.open(said)


def test_a_place_that_was_lost_with_its_background_run_is_found_free(tenant, house, upstream: Upstream, said):
    """As if the process had died after the commit and before the word to Redis."""
    acme = tenant(concurrent_runs=1)
    with acme.client() as client, redis.Redis.from_url(house.env["REDIS_URL"]) as counted:
        made = client.responses.create(model="m", input=script([gate(said), finish()]), background=True)
        [key] = [key for key in counted.keys("quotas-api:quota:*:background") if counted.zscore(key, made.id)]
        for is_there in (True, False):
            if not is_there:
                upstream.open(said)
                until(lambda: client.responses.retrieve(made.id).status == "completed")
                until(lambda: not counted.zcard(key))
            counted.zadd(key, {made.id: 1})  # long ago
            if is_there:
                with pytest.raises(openai.RateLimitError):
                    client.responses.create(model="m", input="hi")
                assert counted.zscore(key, made.id) > time.time() * 1e6 + 50e6, "it is known for a minute"
            else:
                assert client.responses.create(model="m", input="hi").output_text
                assert counted.zcard(key) == 0


def test_the_places_of_a_killed_process_are_free_after_its_lease(tenant, house, upstream: Upstream, said):
    acme = tenant(concurrent_runs=2)
    asked = {"model": "m", "input": script([text("so "), gate(said), finish()]), "stream": True}
    with (
        Served(house.env) as third,
        acme.http(served=third) as http,
        acme.http() as elsewhere,
        http.stream("POST", "/responses", json=asked) as a,
        http.stream("POST", "/responses", json=asked) as b,
    ):
        assert (a.status_code, b.status_code) == (200, 200)
        begun = time.monotonic()
        while time.monotonic() - begun < 1.5 * LEASE_S:  # they are prolonged
            assert elsewhere.post("/responses", json=ASKED).status_code == 429
        third.kill()
        killed = time.monotonic()
        until(lambda: elsewhere.post("/responses", json=ASKED).status_code == 200, timeout_s=LEASE_S + 2)
        assert time.monotonic() - killed > LEASE_S / 4
    upstream.open(said)


# -- Two replicas -----------------------------------------------------------------------------------------------------------


class Answered(Struct):
    """How a request was answered, and when it was sent and answered, in unix seconds."""

    status: int
    sent: float
    at: float
    left: str | None


async def crowd(
    acme: Tenant, count: int, body: dict[str, Any], *, at_once: int, answered: Callable[[Answered], None]
) -> None:
    """So many requests to both replicas in turns, a number of them at once."""
    left = iter(range(count))
    client = httpx.AsyncClient(
        timeout=60, limits=httpx.Limits(max_connections=None), headers={"Authorization": f"Bearer {acme.key}"}
    )
    async with client as http:

        async def work() -> None:
            for number in left:
                url = (acme.house.one, acme.house.other)[number % 2].url
                sent = time.time()
                reply = await http.post(f"{url}/responses", json=body)
                remaining = reply.headers.get("x-ratelimit-remaining-requests")
                answered(Answered(reply.status_code, sent, time.time(), remaining))

        await asyncio.gather(*(work() for _ in range(at_once)))


def test_two_replicas_under_load_keep_one_quota_of_requests_off_by_none(tenant, house):
    """What is taken is a debt of time, so Redis says to the microsecond how many requests it has let through."""
    limit, count, ahead = 120, 800, 10
    interval = 60 / limit
    acme = tenant(requests_per_minute=limit)
    asked = {**ASKED, "store": False}
    settings = Settings(redis_url=house.env["REDIS_URL"], redis_prefix="quotas-api")
    key = QuotaStore(settings)._keys(Holder(acme.name, None), None, "requests")[0]
    found: list[Answered] = []
    with redis.Redis.from_url(house.env["REDIS_URL"]) as counted, acme.http() as http:

        def healed_at() -> float:
            """When all that was let through will have healed."""
            return sum(float(part) / 1e6 for part in counted.get(key).split())

        assert http.post("/responses", json=asked).status_code == 200
        begun = healed_at() - interval
        for _ in range(
            1, ahead
        ):  # so that the debt has not healed before the crowd comes: then Redis would not know since when
            assert http.post("/responses", json=asked).status_code == 200
        asyncio.run(crowd(acme, count, asked, at_once=40, answered=found.append))
        accepted = ahead + sum(one.status == 200 for one in found)
        refused = [one for one in found if one.status == 429]
        assert accepted + len(refused) == ahead + count
        assert (healed_at() - begun) / interval == pytest.approx(accepted, abs=0.001)
    assert {one.left for one in refused} == {"0"}
    least, most = (
        limit + (max(times) - begun) / interval for times in zip(*((r.sent, r.at) for r in refused), strict=True)
    )
    assert least - 1 <= accepted <= most, "none was refused for which there was room"


@pytest.mark.parametrize(
    ("limits", "more", "expected"),
    [
        ({"concurrent_runs": 17}, {}, 17),
        ({"tokens_per_minute": 100_000}, {"max_output_tokens": 30_000}, 3),  # the fourth would fit after 12 s
        ({"tokens_per_minute": 100_000, "concurrent_runs": 2}, {"max_output_tokens": 30_000}, 2),
        ({"tokens_per_minute": 100_000, "concurrent_runs": 9}, {"max_output_tokens": 30_000}, 3),
    ],
)
def test_two_replicas_under_load_let_through_exactly_as_many_runs_as_there_is_room_for(
    tenant, upstream: Upstream, said, limits, more, expected
):
    count = 200
    acme = tenant(**limits)
    asked = {"model": "m", "input": script([gate(said), text("ok"), finish()]), "store": False, **more}
    found: list[Answered] = []

    def answered(one: Answered) -> None:
        found.append(one)
        if len(found) == count - expected:  # all others wait at the gate
            assert {one.status for one in found} == {429}
            upstream.open(said)

    begun = time.monotonic()
    asyncio.run(crowd(acme, count, asked, at_once=count, answered=answered))
    assert "tokens_per_minute" not in limits or time.monotonic() - begun < 11, "too slow to say"
    assert sum(one.status == 200 for one in found) == expected
    assert sum(one.status == 429 for one in found) == count - expected


# -- Stored bytes -----------------------------------------------------------------------------------------------------------


def store(acme: Tenant, key: str, served: Served | None = None) -> httpx.Response:
    """The reply to a create of a response that takes some 30 kB, as random text is not compressed well."""
    with acme.http(key, served) as http:
        return http.post("/responses", json={"model": "m", "input": secrets.token_hex(20_000)})


def fill(acme: Tenant, *keys: str, served: Served | None = None) -> str:
    """Store with the keys in turns until that is refused; gives the message."""
    turns = itertools.cycle(keys)
    reply = until(lambda: refused(store(acme, next(turns), served)))
    assert error_of(reply) == (403, "insufficient_quota", "storage_quota_exceeded")
    return str(reply.json()["error"]["message"])


def refused(reply: httpx.Response) -> httpx.Response | None:
    assert reply.status_code in {200, 403}, reply.text
    return reply if reply.status_code == 403 else None


def empty(acme: Tenant, *keys: str) -> None:
    """Delete all responses."""
    for key in keys:
        with acme.http(key) as http:
            while made := http.get("/responses").json()["data"]:
                assert {http.delete(f"/responses/{one['id']}").status_code for one in made} == {200}


def measured(acme: Tenant, user: str = "") -> int | None:
    """What is known of a tenant, or of one user."""
    owner = owner_of(acme.name, user)
    rows = fetch(acme.house.env["DATABASE_URL"], "select stored_bytes from tenants where id = $1", owner)
    return rows[0]["stored_bytes"]


def stores_nothing(acme: Tenant, key: str, conversation: str) -> None:
    """Whatever would be stored is refused, and the rest is not."""
    form = {"files": {"file": ("a.txt", b"a")}, "data": {"purpose": "user_data"}}
    item = {"role": "user", "content": "hi"}
    with acme.http(key) as http, acme.client(key, max_retries=3) as client:
        for more in ({}, {"background": True}, {"stream": True}, {"conversation": conversation}):
            with pytest.raises(openai.PermissionDeniedError) as caught:
                client.responses.create(model="m", input="hi", **more)
            assert caught.value.code == "storage_quota_exceeded"
        for path, given in (
            ("/chat/completions", {"json": {**CHAT, "store": True}}),
            ("/chat/completions", {"json": {**CHAT, "conversation": conversation}}),
            ("/conversations", {"json": {}}),
            (f"/conversations/{conversation}/items", {"json": {"items": [item]}}),
            (f"/conversations/{conversation}/fork", {"json": {}}),
            ("/files", form),
        ):
            assert error_of(http.post(path, **given))[0::2] == (403, "storage_quota_exceeded"), path
        assert http.post("/responses", json={**ASKED, "store": False}).status_code == 200
        assert http.post("/responses/compact", json=ASKED).status_code == 200
        assert http.post("/responses/input_tokens", json=ASKED).status_code == 200
        assert http.post("/chat/completions", json=CHAT).status_code == 200
        assert http.get("/responses").status_code == 200
        assert len(http.get(f"/conversations/{conversation}/items").json()["data"]) == 0


def begin(acme: Tenant, key: str) -> str:
    """A new conversation."""
    with acme.http(key) as http:
        return str(http.post("/conversations", json={}).json()["id"])


def test_a_tenant_that_has_stored_enough_stores_no_more_until_it_deletes(tenant):
    acme = tenant(stored_bytes=100_000)
    ada, bob = (acme.make(user=user)["value"] for user in ("ada", "bob"))
    conversation = begin(acme, acme.key)
    message = fill(acme, ada, bob)
    said = re.match(r"Storage limit reached for this tenant: Limit 100000 bytes, Used (\d+)\. Delete ", message)
    assert said and 100_000 <= int(said[1]) <= measured(acme)  # which may have been measured again meanwhile
    stores_nothing(acme, acme.key, conversation)
    empty(acme, ada, bob)
    until(lambda: store(acme, ada).status_code == 200)


def test_of_two_users_one_has_stored_what_its_key_allows_and_the_other_has_not(tenant):
    acme = tenant()
    ada, bob = (acme.make(user=user, limits={"stored_bytes": 100_000})["value"] for user in ("ada", "bob"))
    conversation = begin(acme, ada)
    assert store(acme, bob).status_code == 200
    message = fill(acme, ada)
    said = re.match(r"Storage limit reached for this API key: Limit 100000 bytes, Used (\d+) by its user\. ", message)
    assert said and 100_000 <= int(said[1]) <= measured(acme, "ada")
    assert "ada" not in message
    stores_nothing(acme, ada, conversation)
    assert store(acme, bob).status_code == 200
    assert until(lambda: (measured(acme, "bob") or 0) > 40_000), "both responses are measured"
    assert store(acme, bob).status_code == 200
    assert store(acme, acme.make(user="ada")["value"]).status_code == 200, "the limit is that of the key"
    empty(acme, ada)
    until(lambda: store(acme, ada).status_code == 200)


def test_a_key_of_no_user_is_at_its_limit_once_its_tenant_has_stored_that_with_its_users(tenant):
    acme = tenant()
    narrow, ada = acme.make(limits={"stored_bytes": 100_000})["value"], acme.make(user="ada")["value"]
    conversation = begin(acme, narrow)
    for key in (ada, ada, narrow, ada):
        assert store(acme, key).status_code == 200
    message = fill(acme, narrow)
    said = re.match(r"Storage limit reached for this API key: Limit 100000 bytes, Used (\d+) by its tenant\. ", message)
    assert said and 100_000 <= int(said[1]) <= measured(acme)
    assert "ada" not in message
    stores_nothing(acme, narrow, conversation)
    assert [store(acme, key).status_code for key in (acme.key, ada)] == [200, 200]
    empty(acme, ada, narrow)
    until(lambda: store(acme, narrow).status_code == 200)


def test_of_a_tenant_s_limit_and_a_key_s_the_one_that_is_reached_refuses(tenant):
    acme = tenant(stored_bytes=60_000)
    wide = acme.make(user="ada", limits={"stored_bytes": 10_000_000})["value"]
    assert "this tenant: Limit 60000 bytes" in fill(acme, wide)
    acme.house.limit(acme.name, stored_bytes=10_000_000)
    until(lambda: store(acme, wide).status_code == 200)
    narrow = acme.make(user="ada", limits={"stored_bytes": 60_000})["value"]
    assert "this API key: Limit 60000 bytes" in fill(acme, narrow)


def test_a_change_of_a_key_s_stored_bytes_is_noticed(tenant, house):
    acme = tenant()
    made = acme.make(user="ada", limits={"stored_bytes": 100_000})
    assert made["limits"]["stored_bytes"] == 100_000
    fill(acme, made["value"])
    with acme.http() as http:
        path, limits = f"/admin/keys/{made['id']}", {"stored_bytes": 10**15}
        assert http.post(path, json={"limits": limits}).json()["limits"]["stored_bytes"] == 10**15
        until(lambda: store(acme, made["value"]).status_code == 200)
        assert reprise(house.env, "keys", "limit", made["id"], "--stored-bytes=1").returncode == 0
        until(lambda: store(acme, made["value"], house.other).status_code == 403)
        [line] = [one for one in reprise(house.env, "keys", "list").stdout.splitlines() if made["id"] in one]
        assert line.endswith("\tstored_bytes=1")
        assert http.post(path, json={"limits": {}}).json()["limits"]["stored_bytes"] is None
        until(lambda: store(acme, made["value"]).status_code == 200)
    own = reprise(house.env, "keys", "create", f"--tenant={acme.name}", "--user=ada", "--stored-bytes=1").stdout.strip()
    until(lambda: store(acme, own).status_code == 403)
    for bad in ("-1", str(10**15 + 1), "many"):
        done = reprise(house.env, "keys", "limit", made["id"], f"--stored-bytes={bad}")
        assert (done.returncode, "Invalid value for '--stored-bytes'" in done.stderr) == (2, True)


def test_the_setting_limits_what_users_of_tokens_and_of_keys_without_a_limit_have_stored(new_cataloged, upstream):
    with Issuer() as issuer:
        served = new_cataloged(
            f"""
            [upstreams.up]
            base_url = "{upstream.base_url}"
            [issuers.company]
            issuer = "{issuer.url}"
            audience = "reprise"
            algorithms = ["RS256"]
            jwks_url = "{issuer.jwks_url}"
            tenant = "acme"
            claims = {{ user = "sub" }}
            """,
            REPRISE_KEY_CACHE_S="0",
            REPRISE_STORED_BYTES_AGE_S="0.2",
            REPRISE_KEY_STORED_BYTES="60000",
        )
        house = House(dict(served.env), served, served)
        ada, bob = (issuer.token(sub=user) for user in ("ada", "bob"))
        acme = Tenant(house, "acme", ada)
        assert store(acme, bob).status_code == 200
        message = fill(acme, ada)
        assert "for this API key: Limit 60000 bytes" in message
        assert " by its user." in message
        assert store(acme, bob).status_code == 200
        of_ada, free = (
            reprise(house.env, "keys", "create", "--tenant=acme", "--user=ada", *more).stdout.strip()
            for more in ((), ("--stored-bytes=0",))
        )
        assert [store(acme, key).status_code for key in (of_ada, free)] == [403, 200]
        empty(acme, ada)
        until(lambda: store(acme, ada).status_code == 200)


# -- Where limits are set ---------------------------------------------------------------------------------------------------


def limit_of(acme: Tenant, served: Served) -> str | None:
    with acme.http(served=served) as http:
        return limits_in(http.post("/responses/input_tokens", json=ASKED)).get("limit-requests")


def test_the_operator_s_limits_are_noticed_by_every_replica_soon(tenant, house):
    acme = tenant(requests_per_minute=1_000)
    both = (house.one, house.other)
    assert [limit_of(acme, one) for one in both] == ["1000", "1000"]
    house.limit(acme.name, requests_per_minute=2_000, concurrent_runs=5)
    until(lambda: [limit_of(acme, one) for one in both] == ["2000", "2000"], timeout_s=CACHE_S + 2)
    listed = reprise(house.env, "tenants", "list").stdout.splitlines()
    assert f"{acme.name}\t1\t0\trequests_per_minute=2000,concurrent_runs=5" in listed
    house.limit(acme.name)
    until(lambda: [limit_of(acme, one) for one in both] == [None, None], timeout_s=CACHE_S + 2)
    with acme.http() as http:
        logs = [
            http.get("/admin/audit", params={"type": type_}).json()["data"]
            for type_ in ("tenant.created", "tenant.updated")
        ]
    by_operator = [(acme.name, "command_line")]
    assert [[(one["target"], one["actor"]["type"]) for one in log] for log in logs] == [by_operator, by_operator * 2]
    for bad in ("-1", "1000000001", "many"):
        done = reprise(house.env, "tenants", "limit", acme.name, f"--requests-per-minute={bad}")
        assert (done.returncode, "Invalid value" in done.stderr) == (2, True)
    done = reprise(house.env, "tenants", "limit", f"{acme.name}s", "--requests-per-minute=1")
    assert (done.returncode, done.stderr) == (
        1,
        f"reprise: Invalid value for 'tenant': there is no tenant '{acme.name}s'; `--create` makes it.\n",
    )
    assert f"{acme.name}s" not in reprise(house.env, "tenants", "list").stdout
    done = reprise(house.env, "tenants", "limit", "")
    assert (done.returncode, done.stderr.startswith("reprise: Invalid value for 'tenant'")) == (1, True)


def test_a_key_s_limits_are_set_by_api_and_on_the_command_line(tenant, house):
    acme = tenant()
    limits = {"requests_per_minute": 50, "tokens_per_minute": None, "concurrent_runs": 0, "stored_bytes": None}
    made = acme.make(name="narrow", limits={"requests_per_minute": 50, "concurrent_runs": 0})
    assert made["limits"] == limits
    narrow = Tenant(house, acme.name, made["value"])
    assert limit_of(narrow, house.one) == "50"
    with acme.http() as http:
        path = f"/admin/keys/{made['id']}"
        assert http.post(path, json={"name": "wider"}).json()["limits"] == limits
        changed = http.post(path, json={"limits": {"requests_per_minute": 70}, "models": ["m*"]}).json()
        assert (changed["name"], changed["models"]) == ("wider", ["m*"])
        assert changed["limits"] == {**dict.fromkeys(limits), "requests_per_minute": 70}
        assert http.get(path).json() == changed
        until(lambda: limit_of(narrow, house.one) == "70", timeout_s=CACHE_S + 2)
        done = reprise(house.env, "keys", "limit", made["id"], "--requests-per-minute=90")
        assert (done.returncode, done.stdout) == (
            0,
            f"{made['id']} has new limits; servers notice within {CACHE_S:g} s.\n",
        )
        until(lambda: limit_of(narrow, house.one) == "90", timeout_s=CACHE_S + 2)
        rotated = http.post(f"{path}/rotate", json={}).json()
        assert rotated["limits"]["requests_per_minute"] == 90
        [line] = [one for one in reprise(house.env, "keys", "list").stdout.splitlines() if made["id"] in one]
        assert line.endswith("\trequests_per_minute=90")
        cleared = http.post(path, json={"limits": {}, "models": None, "scopes": ["responses.read"]}).json()
        assert (cleared["models"], cleared["scopes"]) == (None, ["responses.read"])
        log = http.get("/admin/audit", params={"type": "key.updated"}).json()["data"]
        assert {one["target"] for one in log} == {made["id"]}
        assert len(log) == 4
        http.delete(path)
        assert http.post(path, json={"name": "x"}).status_code == 404
    own = reprise(house.env, "keys", "create", f"--tenant={acme.name}", "--requests-per-minute=11")
    assert limit_of(Tenant(house, acme.name, own.stdout.strip()), house.one) == "11"


@pytest.mark.parametrize(
    ("given", "param", "code"),
    [
        ({"limits": {"requests_per_minute": -1}}, "limits.requests_per_minute", "invalid_value"),
        ({"limits": {"requests_per_minute": 1_000_000_001}}, "limits.requests_per_minute", "invalid_value"),
        ({"limits": {"tokens_per_minute": "many"}}, "limits.tokens_per_minute", "invalid_type"),
        ({"limits": {"stored_bytes": -1}}, "limits.stored_bytes", "invalid_value"),
        ({"limits": {"stored_bytes": 10**15 + 1}}, "limits.stored_bytes", "invalid_value"),
        ({"limits": {"stored_byte": 1}}, "limits.stored_byte", "unknown_parameter"),
        ({"limits": None}, "limits", "invalid_type"),
        ({"scopes": []}, "scopes", "invalid_value"),
        ({"scopes": ["admin"]}, "user", "invalid_value"),
        ({"models": ["a\n"]}, "models", "invalid_value"),
        ({"name": "a\u0000"}, "name", "invalid_value"),
        ({"user": "bob"}, "user", "unknown_parameter"),
    ],
)
def test_a_key_can_not_become_what_it_could_not_be_made_as(tenant, given, param, code):
    acme = tenant()
    made = acme.make(user="ada")
    with acme.http() as http:
        reply = http.post(f"/admin/keys/{made['id']}", json=given)
        error = reply.json()["error"]
        assert (reply.status_code, error["param"], error["code"]) == (400, param, code)
        assert http.get(f"/admin/keys/{made['id']}").json() == {k: v for k, v in made.items() if k != "value"}


def test_the_settings_limit_every_tenant_and_key_that_has_no_limits_of_its_own(new_server):
    env = {"REPRISE_TENANT_REQUESTS_PER_MINUTE": "5", "REPRISE_KEY_REQUESTS_PER_MINUTE": "3"}
    served = new_server(**env, REPRISE_KEY_CACHE_S="0", REPRISE_REDIS_PREFIX="quotas-settings")
    with httpx.Client(base_url=served.url) as http:
        reply = http.post("/responses", json=ASKED)
        assert limits_in(reply)["limit-requests"] == "5", "a server without keys has one tenant"
    house = House(dict(served.env), served, served)
    acme = house.tenant("acme")
    free = house.tenant("free", requests_per_minute=0)
    assert limit_of(acme, served) == "3"
    assert limit_of(Tenant(house, "free", free.make(limits={"requests_per_minute": 0})["value"]), served) is None
    assert limit_of(Tenant(house, "acme", acme.make(limits={"requests_per_minute": 0})["value"]), served) == "5"
