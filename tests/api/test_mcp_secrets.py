"""What a client tells us for its MCP servers in confidence is nowhere to be found: not in an answer, a table, Redis or a log."""

import base64
import json

import openai
import pytest

from tests.api.streams import streamed
from tests.replay import replay
from tests.servers import Served
from tests.upstream import answer, call, calling, finish, note, script
from tests.waiting import dumped, fetch, remembered, until

TOKEN, KEY, IN_QUERY = "t0ken-s3cret", "k3y-s3cret", "qu3ry-s3cret"
SECRETS = (TOKEN, KEY, IN_QUERY)


@pytest.fixture
def tools(mcp):
    """A server that takes a token, a header and a key in its URL, and whose tools can tell what they heard."""
    return [
        mcp(
            options={"auth": TOKEN, "key": IN_QUERY},
            authorization=TOKEN,
            headers={"x-key": KEY},
            server_description="A box.",
        )
    ]


@pytest.fixture(scope="module")
def secretive(base_env, new_database):
    """A server of its own, that logs everything, and whose every byte in Redis bears its own name."""
    env = {
        **base_env,
        "DATABASE_URL": new_database(),
        "REPRISE_LOG_LEVEL": "debug",
        "REPRISE_REDIS_PREFIX": "secretive",
        "REPRISE_EVENT_TTL_S": "600",
    }
    with Served(env) as running:
        yield running


def hidden(text):
    """Asserts that none of the secrets is in a text."""
    for secret in SECRETS:
        assert secret not in text


def heard(toolserver, name):
    """What the tool server was told with its calls."""
    return {(one.headers.get("authorization"), one.headers.get("x-key")) for one in toolserver.calls(name)}


@pytest.mark.parametrize("mode", ["plain", "stream", "background", "background stream"])
def test_secrets_are_nowhere(secretive, base_env, toolserver, name, tools, mode):
    given = script(
        [
            note(name),
            call("echo", {"x": 1}, id="a"),
            call("refuse", {}, id="b", index=1),
            call("status", {"status": 500}, id="c", index=2),
            finish("tool_calls"),
        ],
        answer("Done."),
    )
    with secretive.client() as client:
        if mode == "stream":
            events, made = streamed(secretive, input=given, tools=tools)
            hidden(json.dumps(events))
        else:
            options = {"background": "background" in mode, "stream": "stream" in mode}
            begun = client.responses.create(model="m", input=given, tools=tools, **options)
            if options["stream"]:
                events = [event.to_dict() for event in begun]
                hidden(json.dumps(events))
                made = replay(events)
            else:
                hidden(begun.to_json())
                made = until(
                    lambda: (one := client.responses.retrieve(begun.id)).status == "completed" and one
                ).to_dict()
        assert [item.get("status") for item in made["output"]] == [None, "completed", "failed", "failed", "completed"]
        assert heard(toolserver, name) == {(f"Bearer {TOKEN}", KEY)}
        hidden(json.dumps(made))
        hidden(client.responses.retrieve(made["id"]).to_json())
        after = client.responses.create(model="m", input="x", tools=tools, previous_response_id=made["id"])
        hidden(str(list(client.responses.input_items.list(after.id))))
    stored = dumped(secretive.database_url)
    assert "A box." in stored  # the declaration is among it
    hidden(stored)
    printed = "".join(secretive.printed)
    assert made["id"] in printed
    hidden(printed)
    if mode == "background stream":
        held = remembered(base_env["REDIS_URL"], "secretive")
        assert "A box." in held
        hidden(held)
    until(lambda: not fetch(secretive.database_url, "select from runs"))


def test_what_a_server_says_of_our_secrets_is_masked(secretive, mcp, name):
    # The model's arguments hold them here, which is how the scripted server gets to know what to say.
    tools = [mcp(authorization=TOKEN, headers={"x-key": KEY}, options={"key": IN_QUERY})]
    given = script(
        [note(name), *calling("refuse", {"message": f"no {TOKEN}, no {KEY}, no {IN_QUERY}"})],
        answer("Done."),
    )
    _, made = streamed(secretive, input=given, tools=tools, store=False)
    assert made["output"][1]["error"]["message"] == "no ***, no ***, no ***"


ECHO = (
    "plain:authorization token:authorization base64:authorization url:authorization plain:x-key base64:x-key url:x-key"
).split()
"""Every form in which the scripted server can give back what it was told."""


def results():
    """What a tool may answer, with all of it everywhere."""
    said = " ".join(f"{{{form}}}" for form in ECHO)
    for content in (
        {"type": "text", "text": said},
        {"type": "resource", "resource": {"uri": "x:{token:authorization}", "mimeType": "{plain:x-key}", "text": said}},
        {"type": "resource", "resource": {"uri": "x:{plain:x-key}", "blob": "AAAA"}},
        {"type": "resource_link", "uri": "x:{url:x-key}", "name": said, "description": said},
        {"type": "image", "mimeType": "image/png; {token:authorization}", "data": "AAAA"},
        {"type": "image", "mimeType": "image/png", "data": "{base64:x-key}"},
        {"type": "{plain:x-key}"},
    ):
        yield "raw", {"result": {"content": [content]}}
    structured = {"deep": [{"{plain:x-key}": [said]}]}
    yield "raw", {"result": {"content": [], "structuredContent": structured}}
    yield "raw", {"result": {"content": [{"type": "text", "text": said}], "isError": True}}
    yield "refuse", {"message": said}


def test_what_a_tool_server_echoes_is_masked_wherever_it_says_it(secretive, upstream, toolserver, mcp, name):
    given = script(
        [
            note(name),
            *(call(tool, given, id=f"c{at}", index=at) for at, (tool, given) in enumerate(results())),
            finish("tool_calls"),
        ],
        answer("Done."),
    )
    options = {"echo": 1, "auth": TOKEN, "tools": "raw,refuse"}
    box = mcp(options=options, authorization=TOKEN, headers={"x-key": KEY})
    events, made = streamed(secretive, input=given, tools=[box])
    calls = [item for item in made["output"] if item["type"] == "mcp_call"]
    assert len(toolserver.calls(name)) == len(calls) == len(list(results()))
    leaky = next(tool for tool in made["output"][0]["tools"] if tool["name"] == "leaky")
    assert leaky["description"] == "You are Bearer ***, that is ***."
    assert list(leaky["input_schema"]["properties"]) == ["***"]
    assert leaky["annotations"] == {"title": "***"}
    assert [item["status"] for item in calls] == ["completed"] * 8 + ["failed"] * 2
    assert calls[5]["output"] == "[image/png, not readable]"
    said = [json.dumps(item["output"] or item["error"]) for item in calls]
    assert [at for at, text in enumerate(said) if "***" not in text] == [5]
    encoded = [
        base64.b64encode(f"got {said}!".encode()).decode()[-12:-4]  # the middle of the secret at its end
        for said in (KEY, f"Bearer {TOKEN}")
    ]
    asked = [record.raw.decode() for record in upstream.asked(given)]
    for text in (
        json.dumps(events),
        json.dumps(made),
        dumped(secretive.database_url),
        "".join(secretive.printed),
        *asked,
    ):
        hidden(text)
        assert not [part for part in encoded if part in text]


def test_one_servers_secret_in_another_ones_answer_is_masked(secretive, mcp, name):
    given = script(
        [note(name), *calling("echo", {"x": f"{TOKEN} {base64.b64encode(KEY.encode()).decode()}"})], answer("Done.")
    )
    tools = [mcp(options={"tools": "echo"}), mcp("other", of=f"{name}2", authorization=TOKEN, headers={"x-key": KEY})]
    tools[1]["allowed_tools"] = ["add"]
    _, made = streamed(secretive, input=given, tools=tools, store=False)
    [made_call] = [item for item in made["output"] if item["type"] == "mcp_call"]
    assert made_call["output"] == '{"x": "*** ***"}'


@pytest.mark.parametrize("field", ["authorization", "headers", "server_url"])
def test_secrets_of_a_refused_request_are_not_repeated(secretive, mcp, field):
    wrong = {"authorization": {"x": TOKEN}, "headers": [TOKEN], "server_url": f"ftp://{TOKEN}"}[field]
    with secretive.client() as client, pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="m", input="x", tools=[{**mcp(), field: wrong}])
    hidden(str(refused.value.body))
    hidden("".join(secretive.printed))


def test_secrets_of_a_background_run_are_sealed_and_survive_its_worker(new_server, upstream, toolserver, name, tools):
    env = {"REPRISE_LEASE_S": "1.5", "REPRISE_POLL_S": "0.2"}
    server = new_server(**env, REPRISE_WORKERS_IN_API="false")
    given = script([note(name), *calling("gate", {"name": name})], calling("echo", {"x": 1}), answer("Done."))
    with server.client() as client:
        queued = client.responses.create(model="m", input=given, tools=tools, tool_choice="required", background=True)
        [row] = fetch(server.database_url, "select secrets, request::text from runs")
        assert row["secrets"] and "server_label" in row["request"]
        hidden(dumped(server.database_url))
        first = new_server(**env, DATABASE_URL=server.database_url)
        toolserver.wait_reached(name)
        hidden(dumped(server.database_url))
        first.kill()
        second = new_server(**env, DATABASE_URL=server.database_url)
        made = until(lambda: (one := client.responses.retrieve(queued.id)).status == "completed" and one)
    assert [(item.type, item.status) for item in made.output[1:]] == [
        ("mcp_call", "failed"),
        ("mcp_call", "completed"),
        ("message", "completed"),
    ]
    assert [one.tool for one in toolserver.calls(name)] == ["gate", "echo"]
    assert heard(toolserver, name) == {(f"Bearer {TOKEN}", KEY)}
    # The call that was demanded has been made, whoever made it.
    assert [record.body.get("tool_choice") for record in upstream.asked(given)] == ["required", None, None]
    assert fetch(server.database_url, "select from runs where secrets is not null") == []
    hidden(dumped(server.database_url))
    hidden("".join([*server.printed, *first.printed, *second.printed]))
