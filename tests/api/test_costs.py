"""What a request costs, counted on the wire: statements, round trips, bytes. No times: they belong to `make bench`.

A gross regression asks more often, sends what is stored already, or reads what nobody needs.
"""

import asyncio
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import asyncpg
import openai
import pytest

from app.storage.tables import OUTPUT_POSITION
from tests import wire_proxy
from tests.servers import Served
from tests.upstream import finish, note, repeat, script, status, text
from tests.waiting import fetch, until
from tests.wire_proxy import WireProxy

DEEP = 1000

FILL = f"""
insert into responses (tenant_id, id, thread_id, turn, status, background, model, metadata, created_at, body)
select 'default', 'resp_' || turn, 'thread', turn, 'completed', false, 'm', '{{}}', 0, '{{}}' from generate_series(1, {DEEP}) turn;
insert into items (tenant_id, thread_id, turn, position, id, body)
select tenant_id, thread_id, turn, position, 'msg_' || turn || '_' || position,
       json_build_object('type', 'message', 'id', 'msg_' || turn || '_' || position, 'status', 'completed',
                         'role', case when position = 0 then 'user' else 'assistant' end,
                         'content', json_build_array(json_build_object(
                             'type', case when position = 0 then 'input_text' else 'output_text' end,
                             'text', 'said in turn ' || turn, 'annotations', json_build_array())))
from responses, unnest(array[0, {OUTPUT_POSITION}]) position;
analyze;
"""
"""A chain of so many turns: `resp_1`, `resp_2`, …"""


BEATEN = """
select from pg_stat_activity
where datname = current_database() and pid <> pg_backend_pid() and state = 'idle' and query like '%(lease_s + 1)%'
"""
"""Whether the last statement of the first heartbeat is done; the next one comes long after the tests."""


@pytest.fixture(scope="module")
def database_url(new_database):
    """A database with a long chain."""
    url = new_database()

    async def fill() -> None:
        connection = await asyncpg.connect(url)
        await connection.execute(FILL)
        await connection.close()

    asyncio.run(fill())
    return url


@pytest.fixture(scope="module")
def postgres(database_url) -> Iterator[WireProxy]:
    """The proxy before Postgres."""
    directory = parse_qs(urlsplit(database_url).query)["host"][0]
    with WireProxy(Path(directory) / ".s.PGSQL.5432", ".s.PGSQL.5432", wire_proxy.postgres) as running:
        yield running


@pytest.fixture(scope="module")
def redis(servers) -> Iterator[WireProxy]:
    """The proxy before Redis."""
    with WireProxy(Path(urlsplit(servers.redis_url).path), "redis.sock", wire_proxy.redis) as running:
        yield running


@pytest.fixture(scope="module")
def tapped(base_env, database_url, postgres, redis) -> Iterator[Served]:
    """A server that asks for nothing by itself; it makes background runs only where a test starts a worker."""
    quiet = {
        "REPRISE_WORKERS_IN_API": "false",
        "REPRISE_KEY_CACHE_S": "3600",
        "REPRISE_AGENT_CACHE_S": "3600",
        "REPRISE_LEASE_S": "3600",
    }
    directory = parse_qs(urlsplit(database_url).query)["host"][0]
    url = database_url.replace(directory, str(postgres.directory))
    addresses = {"DATABASE_URL": url, "REDIS_URL": f"unix://{redis.path}", "REPRISE_REDIS_PREFIX": "tapped"}
    with Served({**base_env, **quiet, **addresses, "REPRISE_DATABASE_POOL_SIZE": "1"}) as running:
        until(lambda: fetch(database_url, BEATEN))
        yield running


@pytest.fixture(scope="module")
def client(tapped) -> Iterator[openai.OpenAI]:
    """The official client."""
    with tapped.client() as made:
        yield made


Cost = Callable[[Callable[[], object]], WireProxy]


@pytest.fixture
def cost(postgres) -> Cost:
    """Gives what Postgres is asked by a call, once the connection has prepared its statements."""

    def count(call: Callable[[], object]) -> WireProxy:
        call()
        with postgres.counting() as counted:
            call()
        return counted

    return count


def statements(counted: WireProxy) -> int:
    """How many statements were executed; `begin` and `commit` are statements, too."""
    return sum(request in {"E", "Q"} for request in counted.requests)


def stream(client: openai.OpenAI, **options: object) -> None:
    for _ in client.responses.create(model="m", input="hello", stream=True, **options):  # type: ignore[call-overload]
        pass


LONG = f"resp_{DEEP}"

CALLS = {
    "create": (1, lambda client: client.responses.create(model="m", input="hello")),
    "unstored create": (1, lambda client: client.responses.create(model="m", input="hello", store=False)),
    "stream": (2, stream),
    "input items": (1, lambda client: list(itertools.islice(client.responses.input_items.list(LONG), 20))),
    # The parent's turn is taken: the first attempt to store sees that, the second makes a branch.
    "branch": (4, lambda client: client.responses.create(model="m", input="hello", previous_response_id="resp_500")),
    "streamed branch": (4, lambda client: stream(client, previous_response_id="resp_500")),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_request_costs_so_many_statements(client, cost, name):
    expected, call = CALLS[name]
    assert statements(cost(lambda: call(client))) == expected


def test_a_name_that_may_be_an_agent_s_costs_one_statement_once(client, postgres):
    def create(name: str) -> int:
        with postgres.counting() as counted:
            client.responses.create(model=name, input="hello", store=False)
        return statements(counted)

    create("warm")  # prepares the statement
    assert [create(name) for name in ("seldom-1", "seldom-1", "seldom-2", "no/agent", "no/agent")] == [2, 1, 2, 1, 1], (
        "one counts"
    )


def test_quotas_cost_two_commands_where_there_are_limits_and_none_elsewhere(tapped, client, redis, new_database):
    def asked(client: openai.OpenAI) -> list[str]:
        client.responses.create(model="m", input="hello")
        with redis.counting():
            client.responses.create(model="m", input="hello")
        return redis.requests

    assert asked(client) == []
    limits = {"REPRISE_TENANT_REQUESTS_PER_MINUTE": "1000", "REPRISE_TENANT_TOKENS_PER_MINUTE": "10000000"}
    limits["REPRISE_TENANT_CONCURRENT_RUNS"] = "10"
    with Served({**tapped.env, "DATABASE_URL": new_database(), **limits}) as limited, limited.client() as other:
        assert asked(other) == ["EVALSHA", "EVALSHA"]


def test_a_response_is_read_with_one_statement(client, cost):
    made = client.responses.create(model="seldom", input="hello")
    assert statements(cost(lambda: client.responses.retrieve(made.id))) == 1
    assert statements(cost(lambda: client.get("/responses?model=seldom", cast_to=object))) == 1


def test_a_turn_costs_three_statements(client, cost):
    """One reads the context, one stores the row, one ends it."""
    chain = [LONG]

    def go_on() -> None:
        chain.append(client.responses.create(model="m", input="hello", previous_response_id=chain[-1]).id)

    assert statements(cost(go_on)) == 3


def test_credentials_of_tool_servers_cost_one_statement_where_a_request_may_need_them(client, cost, toolserver):
    def asked(*servers: int, **fields: str) -> int:
        tools = [
            {"type": "mcp", "server_label": f"box{at}", "server_url": toolserver.url("mcp", f"costs{at}"), **fields}
            for at in servers
        ]
        return statements(cost(lambda: client.responses.create(model="m", input="hello", tools=tools)))

    own = {"authorization": "its-own"}
    assert asked(1) == asked(1, **own) + 1
    assert asked(1, 2, 3) == asked(1, 2, 3, **own) + 1
    stored = {"server_url": toolserver.url("mcp", "costs1"), "authorization": "s3cret-value"}
    client.post("/tool_credentials", body=stored, cast_to=object)
    assert asked(1) == asked(1, **own) + 1


def test_a_turn_sends_as_much_to_the_database_however_long_the_chain(client, cost):
    def turn_behind(id: str) -> int:
        return cost(lambda: client.responses.create(model="m", input="hello", previous_response_id=id)).bytes

    short, long = turn_behind("resp_2"), turn_behind("resp_999")
    assert long <= 1.1 * short


def test_the_upstream_is_asked_once_with_the_whole_context(client, upstream, said):
    client.responses.create(model="m", input=said, previous_response_id="resp_998")
    [record] = upstream.asked(said)
    assert len(record.body["messages"]) == 2 * 998 + 1


def test_a_retry_sends_the_bytes_that_were_sent_before(client, upstream, said):
    asking = script([note(said), status(503, times=2), text("ok"), finish()])
    client.responses.create(model="m", input=asking, previous_response_id="resp_997")
    bodies = [record.raw for record in upstream.asked(asking)]
    assert len(bodies) == 3
    assert len(set(bodies)) == 1


def test_a_background_run_costs_the_same_however_much_it_says(client, tapped, postgres, redis):
    """Deltas that come together travel together; to Postgres go items and the end."""
    asked, added = {}, {}
    with Served({**tapped.env, "REPRISE_POLL_S": "60"}, command="worker"):
        for words in (1, 1, 300):  # the first run prepares its statements
            asking = script([repeat(words, text("{i} ")), finish()])
            with postgres.counting(), redis.counting():
                events = list(client.responses.create(model="m", input=asking, background=True, stream=True))
                until(lambda: fetch(tapped.database_url, "select from runs") == [])
            assert sum(event.type == "response.output_text.delta" for event in events) == words
            asked[words], added[words] = statements(postgres), redis.requests.count("XADD")
    assert asked[300] <= asked[1] + 4, "two claims more, if hints came twice"
    assert added[300] <= 60
    assert asked[1] <= 28
