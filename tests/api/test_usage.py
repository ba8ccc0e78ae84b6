"""Usage: what is counted of every kind of run, for whom, what it costs, and who sees it."""

import csv
import io
import random
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import httpx
import msgspec
import openai
import pytest
from msgspec import Struct

from app.settings import Settings
from app.setup import reasoning_summary_prompt
from tests.servers import Served, reprise
from tests.upstream import call, error, finish, gate, reasoning, script, status, text, usage
from tests.waiting import fetch, until

CATALOG = """
currency = "EUR"
default = "up"

[upstreams.up]
base_url = "{base}"
dialect = "openai"
prices = {{ input = 1, output = 2 }}

[upstreams.down]
base_url = "http://127.0.0.1:9/v1"
attempts_max = 1

[[models]]
name = "dear"
routes = [{{ upstream = "up", model = "scripted" }}]
prices = {{ input = 2.5, cached_input = 0.000125, output = 10.000001 }}

[[models]]
name = "spare"
routes = [{{ upstream = "down" }}, {{ upstream = "up", model = "scripted", prices = {{ input = 0.1, output = 0.7 }} }}]
prices = {{ input = 1000, output = 1000 }}

[[models]]
name = "thinker"
routes = [{{ upstream = "up", model = "scripted" }}]
reasoning_summary = {{ model = "dear" }}

[agents.helper]
model = "dear"
instructions = "Help."
"""
PRICES = {
    "dear": ("2.5", "0.000125", "10.000001"),
    "spare": ("0.1", "0.1", "0.7"),
    "free@": ("1", "1", "2"),
    "up@scripted": ("1", "1", "2"),
}
COUNTED = ("runs", "tool_calls", "input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens")
TODAY = {datetime.now(UTC).date().isoformat()}
LEDGER_S = 1


class House(Struct):
    """A server with keys of two tenants, by name, and their ids."""

    env: dict[str, str]
    served: Served
    keys: dict[str, str]
    ids: dict[str, str]

    def client(self, key: str) -> openai.OpenAI:
        return self.served.client(self.keys[key])

    def get(self, key: str, **query: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.keys[key]}"}
        return httpx.get(f"{self.served.url}/usage", params=query, headers=headers, timeout=30)

    def report(self, key: str, *group_by: str, **query: Any) -> list[dict[str, Any]]:
        reply = self.get(key, **{"group_by[]": group_by}, **query)
        assert reply.status_code == 200, reply.text
        assert reply.json()["has_more"] is False
        return reply.json()["data"]

    def used(self, model: str, key: str = "admin") -> dict[str, Any]:
        """What was used with a model, which a test has for itself."""
        [row] = self.report(key, "model", model=model)
        return {name: row[name] for name in (*COUNTED, "cost")}


@pytest.fixture(scope="module")
def house(base_env: Mapping[str, str], new_database: Callable[[], str], upstream, tmp_path_factory) -> Iterator[House]:
    catalog = tmp_path_factory.mktemp("usage") / "catalog.toml"
    catalog.write_text(CATALOG.format(base=upstream.base_url))
    env = {name: value for name, value in base_env.items() if name != "OPENAI_BASE_URL"}
    env |= {"DATABASE_URL": new_database(), "REPRISE_CATALOG": str(catalog), "REPRISE_USAGE_LEDGER_S": str(LEDGER_S)}
    keys, ids = {}, {}
    for name, options in {
        "admin": ("--tenant=a", "--scope=admin"),
        "alice": ("--tenant=a", "--user=alice"),
        "bob": ("--tenant=a", "--user=bob"),
        "bob too": ("--tenant=a", "--user=bob"),
        "unbound": ("--tenant=a",),
        "writer": ("--tenant=a", "--scope=responses.write"),
        "other": ("--tenant=b",),
        "other admin": ("--tenant=b", "--scope=admin", "--scope=responses.read"),
    }.items():
        made = reprise(env, "keys", "create", *options)
        keys[name], ids[name] = made.stdout.strip(), made.stderr.split()[0]
    with Served(env) as one, Served(env):  # two processes roll up
        yield House(env, one, keys, ids)


def tokens(prompt: int, completion: int, cached: int = 0, thought: int = 0) -> dict[str, Any]:
    details = {
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": thought},
    }
    return usage(prompt, completion, **details)


def cost(model: str, prompt: int, completion: int, cached: int = 0) -> Decimal:
    price, cached_price, output_price = map(Decimal, PRICES[model])
    return ((prompt - cached) * price + cached * cached_price + completion * output_price) / 10**6


# -- What is counted --------------------------------------------------------------------------------------------------------


TURN = [text("hi"), finish(), tokens(1_000_003, 77, 13, 5)]
ONCE = {
    "runs": 1,
    "tool_calls": 0,
    "input_tokens": 1_000_003,
    "cached_tokens": 13,
    "output_tokens": 77,
    "reasoning_tokens": 5,
}


def respond(client, model, said, **options):
    return client.responses.create(model=model, input=said, **options)


def chat(client, model, said, **options):
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": said}], **options)


def in_background(client, model, said, **options):
    made = respond(client, model, said, background=True, **options)
    until(lambda: client.responses.retrieve(made.id).status == "completed", "it has ended")


KINDS = {
    "stored": respond,
    "not stored": lambda *of: respond(*of, store=False),
    "streamed": lambda *of: list(respond(*of, stream=True)),
    "streamed, not stored": lambda *of: list(respond(*of, stream=True, store=False)),
    "background": in_background,
    "chat": chat,
    "stored chat": lambda *of: chat(*of, store=True),
    "streamed chat": lambda *of: list(chat(*of, stream=True)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_is_counted_with_its_cost(house, kind):
    model = f"up@{kind}"
    with house.client("unbound") as client:
        KINDS[kind](client, model, script(TURN))
    assert house.used(model) == {**ONCE, "cost": str(cost("up@scripted", 1_000_003, 77, 13))}


def test_a_compaction_is_counted(house, upstream):
    from app.setup import compaction_prompt

    prompt = compaction_prompt(Settings())
    upstream.scripts[prompt] = script(TURN)
    try:
        with house.client("unbound") as client:
            made = client.responses.compact(model="up@compacts", input=[{"role": "user", "content": "Compact me."}])
    finally:
        upstream.scripts.pop(prompt)
    assert made.usage.input_tokens == 1_000_003
    assert house.used("up@compacts") == {**ONCE, "cost": str(cost("up@scripted", 1_000_003, 77, 13))}


def test_a_count_of_tokens_is_counted_if_the_upstream_made_a_completion_and_is_no_run(house):
    with house.client("unbound") as client:
        for _ in range(2):  # the second is remembered
            assert client.responses.input_tokens.count(model="up@counts", input=script(TURN)).input_tokens == 1_000_003
    assert house.used("up@counts") == {**ONCE, "runs": 0, "cost": str(cost("up@scripted", 1_000_003, 77, 13))}


def test_an_agent_is_counted_by_its_name_at_the_prices_of_its_model(house):
    with house.client("alice") as client:
        respond(client, "helper", script(TURN))
        assert client.responses.input_tokens.count(model="helper", input=script(TURN)).input_tokens == 1_000_003
    once = cost("dear", 1_000_003, 77, 13)
    twice = {name: 2 * ONCE[name] for name in ONCE if name not in {"runs", "tool_calls"}}
    assert house.used("helper") == {**ONCE, **twice, "cost": str(2 * once)}


def test_each_turn_costs_what_its_route_does(house, upstream):
    """A model that is down has no price; and a summary of reasoning has that of the model which makes it."""
    with house.client("unbound") as client:
        respond(client, "spare", script(TURN))
    assert house.used("spare") == {**ONCE, "cost": str(cost("spare", 1_000_003, 77, 13))}
    prompt = reasoning_summary_prompt(Settings())
    thoughts = "I think of a number."
    upstream.scripts[thoughts] = script([text("A summary."), finish(), tokens(3, 4)])
    try:
        with house.client("unbound") as client:
            said = script([reasoning(thoughts), *TURN])
            made = client.responses.create(model="thinker", input=said, reasoning={"summary": "auto"})
    finally:
        upstream.scripts.pop(thoughts)
    assert prompt
    assert made.usage.input_tokens == 1_000_006
    expected = cost("up@scripted", 1_000_003, 77, 13) + cost("dear", 3, 4)
    assert Decimal(house.used("thinker")["cost"]) == expected


def test_runs_that_fail_are_cancelled_or_cut_off_are_counted_with_what_is_known(house, upstream, said):
    with house.client("unbound") as client:
        with pytest.raises(openai.APIError):
            respond(client, "up@fails", script([text("half"), tokens(5, 6), error()]))
        made = respond(client, "up@is-cut-off", script([text("half"), finish("length"), tokens(7, 8)]))
        assert made.status == "incomplete"
        asked = script([text("half"), gate(said)])
        made = respond(client, "up@is-cancelled", asked, background=True)
        upstream.wait_reached(said, 20)
        assert client.responses.cancel(made.id).status == "cancelled"
        upstream.open(said)
    found = {row["model"]: row for row in house.report("admin", "model")}
    counted = {
        name: [found[f"up@{name}"][key] for key in ("runs", "input_tokens", "output_tokens")]
        for name in ("fails", "is-cut-off", "is-cancelled")
    }
    assert counted == {"fails": [1, 5, 6], "is-cut-off": [1, 7, 8], "is-cancelled": [1, 0, 0]}


def test_a_request_that_is_refused_is_no_run(house):
    with house.client("unbound") as client:
        with pytest.raises(openai.BadRequestError):
            respond(client, "up@refused", "hi", temperature=9)
        with pytest.raises(openai.APIStatusError):
            respond(client, "up@refused", script([status(400)]), stream=True)
    assert house.report("admin", model="up@refused") == []


def test_calls_of_tools_that_this_server_makes_are_counted(house, mcp):
    calls = [call("add", {"a": 1, "b": at}, index=at, id=f"call_{at}") for at in range(3)]
    said = script([*calls, finish("tool_calls"), tokens(1, 1)], [call("look", {}, id="own"), finish("tool_calls")])
    function = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {}}}
    with house.client("unbound") as client:
        respond(client, "up@calls", said, tools=[mcp(), function])
        respond(client, "up@calls", said, tools=[mcp(), function], store=False)
    assert (house.used("up@calls")["runs"], house.used("up@calls")["tool_calls"]) == (2, 6)


def test_what_is_deleted_stays_counted(house):
    with house.client("unbound") as client:
        made = respond(client, "up@deleted", script(TURN))
        before = house.used("up@deleted")
        client.responses.delete(made.id)
    assert house.used("up@deleted") == before


def test_an_upstream_that_reports_absurd_numbers_harms_no_other_report(house):
    with house.client("unbound") as client:
        for _ in range(3):
            respond(
                client,
                "dear",
                script([text("x"), finish(), usage(2**80, 2**80, prompt_tokens_details={"cached_tokens": 2**90})]),
            )
    until(lambda: not fetch(house.env["DATABASE_URL"], "select from usage_ledger"), "all is rolled up")
    [row] = house.report("admin", model="dear")
    assert row["input_tokens"] == row["cached_tokens"] == row["output_tokens"] == 3 * 2**53


# -- Who sees it ------------------------------------------------------------------------------------------------------------


def test_each_key_sees_what_is_its_own(house):
    model = "up@whose"
    for key in ("alice", "bob", "bob too", "unbound", "other"):
        with house.client(key) as client:
            respond(client, model, script(TURN), store=key != "alice")

    def seen(key: str) -> list[tuple[str | None, str | None, int]]:
        rows = house.report(key, "user", "key", model=model)
        return sorted(((row["user"], row["key_id"], row["runs"]) for row in rows), key=str)

    def own(*names: str, user: str | None) -> list[tuple[str | None, str | None, int]]:
        return sorted((user, house.ids[name], 1) for name in names)

    bobs = own("bob", "bob too", user="bob")
    assert seen("alice") == own("alice", user="alice")
    assert seen("bob") == seen("bob too") == bobs
    assert seen("unbound") == own("unbound", user=None)
    assert seen("admin") == sorted([*own("alice", user="alice"), *bobs, *own("unbound", user=None)], key=str)
    assert seen("other") == seen("other admin") == own("other", user=None)
    for key, query in (
        ("alice", {"user": "bob"}),
        ("alice", {"key_id": house.ids["bob"]}),
        ("unbound", {"user": "alice"}),
    ):
        assert house.report(key, "user", **query) == []
    assert [row["runs"] for row in house.report("bob", user="bob", key_id=house.ids["bob too"], model=model)] == [1]
    assert [row["runs"] for row in house.report("admin", user="", model=model)] == [1]


def test_a_key_that_may_not_read_sees_nothing(house):
    reply = house.get("writer")
    assert (reply.status_code, reply.json()["error"]["code"]) == (403, "missing_scope")


def test_a_server_without_keys_shows_its_usage(client, http):
    client.responses.create(model="unpriced", input=script(TURN))
    [row] = http.get("/usage", params={"model": "unpriced", "group_by": ["key", "user"]}).json()["data"]
    assert (row["runs"], row["key_id"], row["user"], row["cost"], row["currency"]) == (1, None, None, "0", "USD")


# -- Reports ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"group_by": "week"}, "group_by"),
        ({"since": "yesterday"}, "since"),
        ({"until": "2026-02-30"}, "until"),
        ({"since": "2026-02-02", "until": "2026-02-01"}, "until"),
        ({"limit": "0"}, "limit"),
        ({"limit": "1001"}, "limit"),
        ({"after": "nothing"}, "after"),
        ({"after": "é"}, "after"),
        ({"after": "WyIiLCIiLCIiLCJcdTAwMDAiLCIiXQ"}, "after"),  # ["","","","\u0000",""]
        ({"format": "xml"}, "format"),
        ({"days": "3"}, "days"),
    ],
)
def test_a_query_that_is_wrong_is_refused(house, query, param):
    reply = house.get("admin", **query)
    assert (reply.status_code, reply.json()["error"]["param"].partition("[")[0]) == (400, param)


def test_days_are_filtered_and_told_apart(house):
    statement = """
    insert into usage_days (tenant_id, day, model, key_id, user_name, currency, run_count, tool_calls, input_tokens, cached_tokens,
                            output_tokens, reasoning_tokens, cost)
    select 'a', cast(day as date), 'old', '', '', currency, 1, 0, 10, 0, 5, 0, 7
    from unnest(array['2020-01-01', '2020-01-02', '2020-01-03']) day, unnest(array['EUR', 'USD']) currency
    """
    fetch(house.env["DATABASE_URL"], statement)

    def found(**query: Any) -> list[tuple[str, str]]:
        return [(row["day"], row["currency"]) for row in house.report("admin", "day", model="old", **query)]

    every = [(f"2020-01-0{day}", currency) for day in (1, 2, 3) for currency in ("EUR", "USD")]
    assert found() == every
    assert found(order="desc") == every[::-1]
    assert found(since="2020-01-02", until="2020-01-02") == every[2:4]
    assert found(until="2020-01-01") == every[:2]
    with_cost = house.report("admin", model="old")
    assert [(row["currency"], row["cost"], row["runs"]) for row in with_cost] == [
        ("EUR", "0.000000000021", 3),
        ("USD", "0.000000000021", 3),
    ]
    for order in ("asc", "desc"):
        pages, after = [], {}
        while True:
            page = house.get("admin", group_by="day", model="old", limit=4, order=order, **after).json()
            pages += [(row["day"], row["currency"]) for row in page["data"]]
            if not page["has_more"]:
                break
            after = {"after": page["last_id"]}
        assert pages == (every if order == "asc" else every[::-1])


def test_csv_has_the_same_rows_and_links_the_next_page(house):
    with house.client("unbound") as client:
        for model in ("=SUM(A1)", 'a,"b"', "plain"):
            respond(client, model, script(TURN))
    first = house.get("admin", group_by="model", format="csv", limit=2, since="2026-01-01")
    assert first.headers["content-type"] == "text/csv; charset=utf-8; header=present"
    rows, reply = list(csv.DictReader(io.StringIO(first.text))), first
    while "link" in reply.headers:
        path = reply.links["next"]["url"]
        headers = {"Authorization": f"Bearer {house.keys['admin']}"}
        reply = httpx.get(house.served.url.removesuffix("/v1") + path, headers=headers, timeout=30)
        rows += csv.DictReader(io.StringIO(reply.text))
    listed = house.report("admin", "model", since="2026-01-01")
    assert [row["model"].removeprefix("'") for row in rows] == [row["model"] for row in listed]
    assert [row["cost"] for row in rows] == [row["cost"] for row in listed]
    assert {"'=SUM(A1)", 'a,"b"', "plain"} <= {row["model"] for row in rows}


def test_the_command_line_shows_each_tenant(house):
    for key in ("unbound", "other"):
        with house.client(key) as client:
            respond(client, "up@shown", script(TURN))
    table = reprise(house.env, "usage", "--by", "model", "--tenant", "b").stdout.splitlines()
    assert table[0].split() == [
        "tenant",
        "model",
        "runs",
        "tool",
        "calls",
        "input",
        "tokens",
        "cached",
        "tokens",
        "output",
        "tokens",
        "reasoning",
        "tokens",
        "cost",
        "currency",
    ]
    [line] = [line for line in table if "up@shown" in line]
    assert line.split() == [
        "b",
        "up@shown",
        "1",
        "0",
        "1000003",
        "13",
        "77",
        "5",
        str(cost("up@scripted", 1_000_003, 77, 13)),
        "EUR",
    ]
    objects = [msgspec.json.decode(line) for line in reprise(house.env, "usage", "--json").stdout.splitlines()]
    assert {one["tenant"] for one in objects} == {"a", "b"}
    rows = list(csv.DictReader(io.StringIO(reprise(house.env, "usage", "--csv", "--since", "2026-01-01").stdout)))
    [of_b] = house.report("other admin")
    assert [row["cost"] for row in rows if row["tenant"] == "b"] == [of_b["cost"]]
    assert reprise(house.env, "usage", "--tenant", "nobody").stdout.split()[0] == "tenant"
    refused = reprise(house.env, "usage", "--since", "2026-02-02", "--until", "2026-02-01")
    assert (refused.returncode, refused.stdout, "'--until': it is before" in refused.stderr) == (2, "", True)


# -- Histories --------------------------------------------------------------------------------------------------------------


CALLERS = ("alice", "bob", "bob too", "unbound", "other")
SUMMED = ("runs", "input_tokens", "cached_tokens", "output_tokens")
IDLE = dict.fromkeys(SUMMED, 0) | {"cost": "0"}


def last(events: Any) -> Any:
    return list(events)[-1]


def said_by_chat(used: Any) -> tuple[int, int, int]:
    return used.prompt_tokens, used.completion_tokens, used.prompt_tokens_details.cached_tokens


def said_by_response(used: Any) -> tuple[int, int, int]:
    return used.input_tokens, used.output_tokens, used.input_tokens_details.cached_tokens


def deleted(client: openai.OpenAI, *of: str) -> Any:
    made = respond(client, *of)
    client.responses.delete(made.id)
    return made.usage


WAYS = {
    "stored": lambda *of: said_by_response(respond(*of).usage),
    "deleted": lambda *of: said_by_response(deleted(*of)),
    "not stored": lambda *of: said_by_response(respond(*of, store=False).usage),
    "streamed": lambda *of: said_by_response(last(respond(*of, stream=True)).response.usage),
    "background": lambda *of: said_by_response(last(respond(*of, stream=True, background=True)).response.usage),
    "chat": lambda *of: said_by_chat(chat(*of).usage),
    "streamed chat": lambda *of: said_by_chat(
        last(chat(*of, stream=True, stream_options={"include_usage": True})).usage
    ),
}
"""Ways to make a run; each gives its usage by its own word."""


def one_run(house: House, chance: random.Random) -> tuple[str, tuple[int, int, int]]:
    """A run of some kind: whose it is, and its usage."""
    prompt, completion = chance.randrange(10**6), chance.randrange(10**5)
    scripted = (prompt, completion, chance.randrange(prompt + 1))
    end = chance.choice([[finish()], [finish("length")], [error()]])
    said = script([text(f"run {chance.random()}"), tokens(*scripted), *end, tokens(*scripted)])
    caller, way = chance.choice(CALLERS), chance.choice(list(WAYS))
    with house.client(caller) as client:
        try:
            used = WAYS[way](client, "up@history", said)
        except openai.APIError:  # the error says nothing of usage
            used = scripted
    assert used == scripted
    return caller, used


def sums(house: House) -> dict[str, dict[str, Any]]:
    """What the reports of both tenants say of histories, by key."""
    rows = [row for key in ("admin", "other admin") for row in house.report(key, "user", "key", model="up@history")]
    return {row["key_id"]: {name: row[name] for name in (*SUMMED, "cost")} for row in rows}


@pytest.mark.parametrize("seed", range(2))
def test_after_any_history_the_report_is_the_sum_of_the_runs(house, seed):
    chance = random.Random(seed)
    chances = [random.Random(chance.random()) for _ in range(100)]
    before = sums(house)
    with ThreadPoolExecutor(8) as threads:
        runs = list(threads.map(lambda one: one_run(house, one), chances))
    expected = {id: dict(IDLE) | before.get(id, {}) for id in map(house.ids.get, CALLERS)}
    for caller, (prompt, completion, cached) in runs:
        row = expected[house.ids[caller]]
        for name, more in zip(SUMMED, (1, prompt, cached, completion), strict=True):
            row[name] += more
        row["cost"] = Decimal(row["cost"]) + cost("up@scripted", prompt, completion, cached)

    def found() -> dict[str, dict[str, Any]]:
        return {id: row | {"cost": Decimal(row["cost"])} for id, row in sums(house).items()}

    assert found() == expected
    until(lambda: not fetch(house.env["DATABASE_URL"], "select from usage_ledger"), "all is rolled up")
    assert found() == expected
    rows = fetch(house.env["DATABASE_URL"], "select from usage_days where model = 'up@history'")
    assert len(rows) <= 2 * len(CALLERS), "a row for each key and day"
