"""Bearer JWTs: which are taken, whose data they open, what the server asks of their issuer, and what it logs."""

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from msgspec import Struct

from tests.issuer import Issuer, public
from tests.rogue import JSON, Visit, headed
from tests.servers import Served, reprise
from tests.upstream import Upstream, finish, gate, script, words
from tests.waiting import fetch, until

SECRET = "5ecret-of-32-bytes-0123456789abcdef"


def send(served: Served, token: str, method: str = "GET", path: str = "/models", **given: Any) -> httpx.Response:
    with httpx.Client(base_url=served.url, headers={"Authorization": f"Bearer {token}"}, timeout=30) as http:
        return http.request(method, path, **given)


def refusal(reply: httpx.Response) -> tuple[int, str | None, str]:
    error = reply.json()["error"]
    return reply.status_code, error["code"], error["message"]


class House(Struct):
    """A server that takes tokens, and has no key."""

    served: Served
    issuer: Issuer
    upstream: Upstream

    def token(self, **given: Any) -> str:
        """A token of the entry whose users belong to a tenant that exists."""
        return self.issuer.token(**{"sub": "ada", **given})

    def get(self, token: str, path: str = "/models") -> httpx.Response:
        return send(self.served, token, path=path)


Catalog = Callable[..., dict[str, str]]


@pytest.fixture(scope="module")
def with_issuers(base_env: Mapping[str, str], upstream: Upstream, new_database, tmp_path_factory) -> Catalog:
    """Settings of a server with these entries of issuers, on a database of its own."""

    def made(entries: str, **settings: str) -> dict[str, str]:
        path = tmp_path_factory.mktemp("tokens") / "catalog.toml"
        path.write_text(f'[upstreams.up]\nbase_url = "{upstream.base_url}"\n{entries}')
        env = {name: value for name, value in base_env.items() if name != "OPENAI_BASE_URL"}
        env |= {"DATABASE_URL": new_database(), "REPRISE_CATALOG": str(path), "REPRISE_AUTH_DELAY_MAX_S": "0"}
        return env | settings

    return made


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with Issuer() as running:
        yield running


def entry(issuer: Issuer, more: str = "", *, keys: str = "", name: str = "company", path: str = "") -> str:
    return f"""
        [issuers.{name}]
        issuer = "{issuer.url}{path}"
        audience = ["other", "reprise"]
        algorithms = ["RS256", "ES256"]
        {keys or f'jwks_url = "{issuer.jwks_url}"'}
        leeway_s = 0
        {more or 'tenant = "acme"'}
    """


@pytest.fixture(scope="module")
def house(with_issuers: Catalog, upstream: Upstream) -> Iterator[House]:
    with Issuer() as issuer:
        issuer.keys["second"] = ec.generate_private_key(ec.SECP256R1())
        of_users = entry(
            issuer,
            'tenant = "acme"\nclaims = { user = "sub", scopes = "roles.reprise" }\n'
            'default_scopes = ["responses.read", "responses.write"]',
        )
        of_tenants = entry(
            issuer, 'tenants = ["acme", "team-*"]\nclaims = { tenant = "org" }', name="teams", path="/teams"
        )
        making = entry(
            issuer,
            'tenants = ["new-*"]\nclaims = { tenant = "org" }\ncreates_tenants = true',
            name="new",
            path="/new",
        )
        of_secret = """
            [issuers.secretive]
            issuer = "secretive"
            audience = "reprise"
            algorithms = ["HS256"]
            secret_env = "TOKEN_SECRET"
            tenant = "acme"
        """
        env = with_issuers(of_users + of_tenants + making + of_secret, TOKEN_SECRET=SECRET)
        with Served(env) as served:
            yield House(served, issuer, upstream)


# -- Which tokens -----------------------------------------------------------------------------------------------------------


def test_with_an_issuer_every_request_needs_a_credential(house):
    for sent in ({}, {"Authorization": "Bearer none"}, {"Authorization": "Basic YTpi"}):
        reply = httpx.get(f"{house.served.url}/models", headers=sent)
        assert refusal(reply)[:2] == (401, "invalid_api_key" if "none" in str(sent) else "missing_api_key")
    assert house.get(house.token()).status_code == 200
    assert fetch(house.served.database_url, "select from keys") == []


NOW = int(time.time())
MISSING = "The token has no claim '{}'."


@pytest.mark.parametrize(
    ("given", "code", "message"),
    [
        ({"exp": NOW - 1, "iat": NOW - 9}, "token_expired", "The token is expired."),
        ({"exp": None}, "invalid_api_key", MISSING.format("exp")),
        ({"iat": None}, "invalid_api_key", MISSING.format("iat")),
        ({"aud": None}, "invalid_api_key", MISSING.format("aud")),
        ({"aud": "another"}, "invalid_api_key", "The token is for another audience."),
        ({"nbf": NOW + 3_000}, "invalid_api_key", "The token is not valid yet."),
        ({"iat": NOW + 3_000, "exp": NOW + 4_000}, "invalid_api_key", "The token is not valid yet."),
        ({"exp": NOW + 86_500, "iat": NOW}, "invalid_api_key", "The token is valid for longer than this server takes."),
        ({"exp": 1e300}, "invalid_api_key", "The token is valid for longer than this server takes."),
        ({"exp": str(NOW + 3_000)}, "invalid_api_key", "The token is not valid."),
        ({"exp": [1]}, "invalid_api_key", "The token is not valid."),
        ({"sub": None}, "invalid_api_key", "The token has no claim 'sub' with a name."),
        ({"sub": ""}, "invalid_api_key", "The token has no claim 'sub' with a name."),
        ({"sub": "a\x1fb"}, "invalid_api_key", "The token has no claim 'sub' with a name."),
        ({"sub": "a" * 257}, "invalid_api_key", "The token has no claim 'sub' with a name."),
        ({"roles": {"reprise": 1}}, "invalid_api_key", "The token's claim 'roles.reprise' is neither a text nor a list of texts."),
        ({"kid": "unknown"}, "invalid_api_key", "The token's issuer has no such key."),
        ({"kid": "second", "key": "first"}, "invalid_api_key", "The token's issuer has no such key."),
        ({"kid": "second", "key": "another"}, "invalid_api_key", "The token's signature is not valid."),
        ({"headers": {"crit": ["b64"], "b64": True}}, "invalid_api_key", "The token is signed in a way that this server does not take from its issuer."),
        ({"more": "x" * 12_500}, "invalid_api_key", "The token is longer than this server takes (REPRISE_JWT_BYTES_MAX)."),
    ],
)  # fmt: skip
def test_a_token_that_is_not_valid_is_refused_with_the_reason(house, given, code, message):
    if "key" in given:
        given["key"] = house.issuer.keys.get(given["key"]) or ec.generate_private_key(ec.SECP256R1())
    assert refusal(house.get(house.token(**given))) == (401, code, message)


def encoded(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


HEADER = encoded(b'{"alg": "RS256", "kid": "first"}')


@pytest.mark.parametrize(
    ("head", "payload", "signature"),
    [
        ("a", "b", "c"),
        ("e30", "e30", "e30"),
        (HEADER, "e30", "e30"),
        (HEADER, encoded(b"[]"), "e30"),
        (HEADER, encoded(b"\xff\xfe"), "e30"),
        (HEADER, encoded(b'{"iss": 1}'), "e30"),
        (HEADER, encoded(b'{"x": ' + b"[" * 5_000), "e30"),
        (encoded(b'{"x": ' + b"[" * 5_000), "e30", "e30"),
        (encoded(b'{"alg": 1}'), "e30", "e30"),
        (encoded(b'{"alg": "RS256", "kid": 1}'), "e30", "e30"),
        (encoded(b'{"alg": "RS256", "n": ' + b"1" * 9_000 + b"}"), "e30", "e30"),
        (HEADER, None, "A" * 5),
        (HEADER, None, "A" * 342),
        (HEADER, None, ""),
        (encoded(b'{"alg": "RS256", "kid": "first", "x": ' + b"[" * 900 + b"]" * 900 + b"}"), None, "e30"),
        (encoded(b'{"alg": "RS256", "kid": "first", "b64": false}'), None, "e30"),
        (HEADER, "A" * 16_000, "e30"),
    ],
    ids=lambda value: f"{value}"[:20],
)
def test_what_is_no_token_is_refused(house, head, payload, signature):
    claims = encoded(json.dumps(house.issuer.claims()).encode()) if payload is None else payload
    assert refusal(house.get(f"{head}.{claims}.{signature}"))[:2] == (401, "invalid_api_key")


def test_a_token_without_the_name_of_a_key_needs_that_its_issuer_has_just_one(house):
    assert house.get(house.token(kid=None)).status_code == 200  # one for each algorithm
    house.issuer.keys["third"] = ec.generate_private_key(ec.SECP256R1())
    try:
        with Served({**house.served.env}) as another:
            message = "The token's issuer has no such key."
            assert refusal(send(another, house.token(kid=None))) == (401, "invalid_api_key", message)
            assert send(another, house.token(kid=None, key=house.issuer.keys["first"])).status_code == 200
    finally:
        del house.issuer.keys["third"]


def test_a_secret_in_the_environment_signs_tokens_of_its_own_issuer_only(house):
    claims = house.issuer.claims(iss="secretive")
    assert house.get(jwt.encode(claims, SECRET, "HS256")).status_code == 200
    for forged in (
        jwt.encode(claims, SECRET[::-1], "HS256"),
        jwt.encode(claims, SECRET * 2, "HS512"),
        jwt.encode({**claims, "iss": house.issuer.url}, SECRET, "HS256"),
        house.issuer.token(iss="secretive"),
    ):
        assert refusal(house.get(forged))[:2] == (401, "invalid_api_key")


# -- Whose data -------------------------------------------------------------------------------------------------------------


def test_tokens_and_keys_of_a_user_open_the_same_data(house, with_issuers):
    env = with_issuers(entry(house.issuer, 'tenant = "acme"\nclaims = { user = "sub" }'))
    key = reprise(env, "keys", "create", "--tenant=acme", "--user=ada").stdout.strip()
    with Served(env) as served:
        made = send(served, key, "POST", "/responses", json={"model": "m", "input": "hi"}).json()["id"]
        statuses = {
            sub: send(served, house.token(sub=sub), path=f"/responses/{made}").status_code for sub in ("ada", "bob")
        }
    assert statuses == {"ada": 200, "bob": 404}


def test_a_user_is_made_with_the_first_token_and_a_tenant_only_where_the_catalog_allows_it(house):
    def tenants() -> set[tuple[str, str | None]]:
        return {tuple(row) for row in fetch(house.served.database_url, "select id, tenant from tenants")}

    assert house.get(house.token(sub="eve")).status_code == 200
    assert {("acme", None), ("acme\x1feve", "acme")} <= tenants()
    of_team = {"iss": f"{house.issuer.url}/teams", "org": "team-1"}
    missing = (401, "invalid_api_key", "The token's tenant does not exist.")
    assert refusal(house.get(house.issuer.token(**of_team))) == missing
    assert house.get(house.issuer.token(**{**of_team, "org": "acme"})).status_code == 200
    reprise(house.served.env, "keys", "create", "--tenant=team-1")
    assert house.get(house.issuer.token(**of_team)).status_code == 200
    new = {"iss": f"{house.issuer.url}/new", "org": "new-1"}
    assert house.get(house.issuer.token(**new)).status_code == 200
    assert ("new-1", None) in tenants()
    made = "select actor, key_id, target from audit_log where action = 'tenant.created' and tenant_id = $1"
    assert [tuple(row) for row in fetch(house.served.database_url, made, "new-1")] == [("jwt", "jwt:new", "new-1")]
    assert [row["actor"] for row in fetch(house.served.database_url, made, "team-1")] == ["command_line"]
    refused = (401, "invalid_api_key", "The token's tenant is none that its issuer may name.")
    for other in ({**new, "org": "acme"}, {**of_team, "org": "new-1"}, {**of_team, "org": "team"}):
        assert refusal(house.get(house.issuer.token(**other))) == refused
    assert not {id for id, _ in tenants()} & {"team", "team-2"}


def test_the_scopes_of_a_token_are_those_that_its_claim_names(house):
    reading = house.token(roles={"reprise": ["responses.read", "admin", "other"]})
    writing = house.token(roles={"reprise": "responses.write other"})
    asked = {"model": "m", "input": "hi"}
    statuses = [
        (
            send(house.served, token, "GET", "/responses").status_code,
            send(house.served, token, "POST", "/responses", json=asked).status_code,
        )
        for token in (reading, writing, house.token(roles={"reprise": []}), house.token(roles={}))
    ]
    assert statuses == [(200, 403), (403, 200), (403, 403), (200, 200)]
    assert refusal(house.get(reading, "/admin/audit"))[:2] == (403, "missing_scope")


def test_a_background_response_is_finished_after_its_token_has_expired(house, said):
    short = house.token(exp=int(time.time()) + 3)
    text = script([gate(said), *words(said), finish()])
    asked = {"model": "m", "input": text, "background": True}
    made = send(house.served, short, "POST", "/responses", json=asked).json()["id"]
    until(lambda: house.get(short).status_code == 401)
    assert refusal(house.get(short)) == (401, "token_expired", "The token is expired.")
    house.upstream.open(said)
    later = house.token()
    until(lambda: house.get(later, f"/responses/{made}").json()["status"] == "completed")


# -- What is asked of the issuer --------------------------------------------------------------------------------------------


def test_tokens_with_keys_that_do_not_exist_cause_no_requests_to_the_issuer(with_issuers, issuer):
    with Served(with_issuers(entry(issuer), REPRISE_JWKS_COOLDOWN_S="600")) as served:
        assert send(served, issuer.token()).status_code == 200
        made_up = [issuer.token(kid=f"random {number}") for number in range(20)]
        with ThreadPoolExecutor(8) as threads:
            statuses = set(threads.map(lambda token: send(served, token).status_code, made_up))
        assert (statuses, issuer.fetches) == ({401}, 1)


def test_many_first_tokens_cause_one_request_to_the_issuer(with_issuers, issuer):
    asked, answer = threading.Event(), threading.Event()

    def slowly(_: Visit) -> Iterator[bytes]:
        asked.set()
        yield JSON
        assert answer.wait(20)
        yield json.dumps({"keys": issuer.published()}).encode()

    issuer.answers["keys"] = slowly
    with Served(with_issuers(entry(issuer))) as served, ThreadPoolExecutor(8) as threads:
        replies = [threads.submit(send, served, issuer.token(sub=str(number))) for number in range(8)]
        assert asked.wait(20)
        answer.set()
        assert {reply.result().status_code for reply in replies} == {200}
    assert issuer.fetches == 1


def test_a_key_that_is_new_is_fetched_and_one_that_is_withdrawn_is_refused(with_issuers, issuer):
    times = {"REPRISE_JWKS_COOLDOWN_S": "1", "REPRISE_JWKS_CACHE_S": "2"}
    with Served(with_issuers(entry(issuer), **times)) as served:
        before = issuer.token()
        assert send(served, before).status_code == 200
        issuer.rotate("new")
        until(lambda: send(served, issuer.token()).status_code == 200)
        until(lambda: send(served, before).status_code == 401)
        assert send(served, issuer.token()).status_code == 200


def test_while_the_issuer_is_away_its_keys_stay_in_use(with_issuers, issuer):
    times = {"REPRISE_JWKS_COOLDOWN_S": "1", "REPRISE_JWKS_CACHE_S": "0.1"}
    with Served(with_issuers(entry(issuer), **times)) as served:
        token = issuer.token()
        assert send(served, token).status_code == 200
        issuer.stop()
        until(lambda: send(served, token) and any("issuer_keys_not_fetched" in line for line in served.printed))
        assert send(served, token).status_code == 200
        assert refusal(send(served, issuer.token(kid="new")))[0] == 503  # it may be a key of the issuer's


def test_while_the_issuer_is_away_and_no_keys_are_there_it_is_unknown_whether_a_token_is_valid(with_issuers, issuer):
    issuer.stop()
    with Served(with_issuers(entry(issuer))) as served:
        reply = send(served, issuer.token())
        assert refusal(reply) == (503, None, "The keys of this token's issuer can't be fetched now; please try again.")
        assert int(reply.headers["retry-after"]) >= 1
        issuer.start()
        until(lambda: send(served, issuer.token()).status_code == 200)


BIG = json.dumps({"keys": [], "more": "x" * 2_000})


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (headed(status="500 No"), "The server answered with status 500."),
        (headed("location: /elsewhere", status="302 Found"), "There are more than 0 redirects."),
        (JSON + b"{}", "The answer is no set of keys."),
        (JSON + b"[" * 1_000, "The answer is no set of keys."),
        (JSON + b'{"keys": [1, {"kty": "RSA"}, {"kty": "oct", "k": "YWJj", "kid": "first"}]}', "can be used"),
        (JSON + json.dumps({"keys": [public(rsa.generate_private_key(65537, 1024), "first")]}).encode(), "can be used"),
        (JSON + BIG.encode(), "The keys are larger than REPRISE_JWKS_BYTES_MAX."),
    ],
    ids=lambda value: "answer" if isinstance(value, bytes) else value,
)
def test_an_issuer_that_answers_with_something_else_is_not_believed(with_issuers, issuer, answer, reason):
    issuer.answers["keys"] = lambda _: [answer]
    with Served(with_issuers(entry(issuer), REPRISE_JWKS_BYTES_MAX="1024")) as served:
        assert send(served, issuer.token()).status_code == 503
        until(lambda: any("issuer_keys_not_fetched" in line and reason in line for line in served.printed))
        issuer.answers["keys"] = issuer._publish
        until(lambda: send(served, issuer.token()).status_code == 200)


def test_an_issuer_that_is_silent_is_waited_for_as_long_as_the_setting_states(with_issuers, issuer):
    issuer.answers["keys"] = lambda _: [None]
    with Served(with_issuers(entry(issuer), REPRISE_JWKS_TIMEOUT_S="0.2")) as served:
        assert send(served, issuer.token()).status_code == 503


def test_keys_may_be_discovered_or_stand_in_a_file(with_issuers, issuer):
    issuer.answers["openid-configuration"], right = (
        lambda _: [JSON + json.dumps({"issuer": "https://another", "jwks_uri": issuer.jwks_url}).encode()],
        issuer.answers["openid-configuration"],
    )
    by_file = entry(issuer, keys='jwks_file = "keys.json"', name="by-file", path="/by-file")
    env = with_issuers(entry(issuer, keys=" ") + by_file)
    file = Path(env["REPRISE_CATALOG"]).parent / "keys.json"
    file.write_text(json.dumps({"keys": issuer.published()}))
    with Served(env) as served:
        assert send(served, issuer.token(iss=f"{issuer.url}/by-file")).status_code == 200
        assert issuer.visits == []
        assert send(served, issuer.token()).status_code == 503
        until(lambda: any("that of another issuer" in line for line in served.printed))
        issuer.answers["openid-configuration"] = right
        until(lambda: send(served, issuer.token()).status_code == 200)


def test_an_issuer_in_a_private_network_is_called_only_if_the_operator_names_it(with_issuers, issuer):
    https = entry(issuer, keys=f'jwks_url = "{issuer.jwks_url.replace("http:", "https:")}"')
    with Served(with_issuers(https, REPRISE_OUTBOUND_ALLOW="")) as served:
        assert send(served, issuer.token()).status_code == 503
        until(lambda: any("not on the public internet" in line for line in served.printed))


# -- The command line, the log ----------------------------------------------------------------------------------------------


def test_the_reply_to_a_token_that_fails_waits_where_a_client_has_failed_often(with_issuers, issuer):
    env = {"REPRISE_AUTH_ATTEMPTS_PER_MINUTE": "1", "REPRISE_AUTH_DELAY_MAX_S": "120"}
    with Served(with_issuers(entry(issuer), **env)) as served, httpx.Client(base_url=served.url, timeout=30) as http:

        def status(token: str, **options: float) -> int:
            return http.get("/models", headers={"Authorization": f"Bearer {token}"}, **options).status_code

        assert status(issuer.token(aud="another")) == 401
        with pytest.raises(httpx.ReadTimeout):  # it waits for a minute, or until its client disconnects
            status(issuer.token(aud="another"), timeout=0.5)
        assert status(issuer.token()) == 200
        until(lambda: sum("authentication_failed" in line for line in served.printed) == 2)
        first, second = (json.loads(line) for line in served.printed if "authentication_failed" in line)
        assert (first["delay_s"], first["key_id"], second["key_id"]) == (0, "jwt:company", "jwt:company")
        assert second["delay_s"] > 0


def test_doctor_fetches_the_keys_of_each_issuer(with_issuers, issuer):
    issuer.answers["bad"] = lambda _: [headed(status="404 Not Found")]
    bad = entry(issuer, keys=f'jwks_url = "{issuer.url}/bad"', name="bad", path="/bad")
    done = reprise(with_issuers(entry(issuer) + bad, REPRISE_HOST="0.0.0.0"), "doctor")
    lines = {line.partition(": ")[0]: line for line in done.stdout.splitlines()}
    assert lines["ok   issuer company"] == "ok   issuer company: 1 key for RS256, ES256"
    assert lines["BAD  issuer bad"] == "BAD  issuer bad: The server answered with status 404."
    assert lines["ok   keys"] == "ok   keys: every request needs one"


def test_no_log_has_a_token_or_what_it_claims(house):
    kept = {"sub": "ada", "email": "ada@5ecret.example", "roles": {"reprise": ["5ecret-role"]}}
    tokens = [house.token(**kept), house.token(**kept, aud="another"), house.token(**kept, kid="5ecret-kid")]
    tokens.append(house.token(**{**kept, "iss": "https://5ecret.example"}))
    replies = [house.get(token) for token in tokens]
    assert [reply.status_code for reply in replies] == [200, 401, 401, 401]
    until(lambda: sum('"status": 401' in line and "request_answered" in line for line in house.served.printed) >= 3)
    printed = "".join(house.served.printed) + "".join(reply.text for reply in replies)
    assert "5ecret" not in printed
    assert not any(part[:20] in printed for token in tokens for part in token.split("."))
    failures = [json.loads(line) for line in house.served.printed if "authentication_failed" in line]
    assert {failure["key_id"] for failure in failures} <= {"jwt:company", "jwt:teams", "jwt:new", "jwt:secretive", None}
