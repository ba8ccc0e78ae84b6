"""MCP servers: how they are declared and echoed, how their tools are listed, named, chosen and allowed."""

import json
import sys

import httpx
import openai
import pytest

from tests.api.streams import streamed, types_of
from tests.servers import Served
from tests.toolserver.tools import TOOLS
from tests.upstream import answer, call, calling, finish, note, script, text


def offered(upstream, given, turn=-1):
    """Names of the functions that the model saw."""
    return [tool["function"]["name"] for tool in upstream.asked(given)[turn].body.get("tools", [])]


def lists(response):
    """The lists in a response's output."""
    return [item for item in response.output if item.type == "mcp_list_tools"]


# -- Declaration ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        ([{"server_label": "no label"}], "tools[0].server_label"),
        ([{"server_label": ""}], "tools[0].server_label"),
        ([{"server_label": "nobody"}], "tools[0].server_url"),
        ([{"server_label": "a", "server_url": "ftp://example.com"}], "tools[0].server_url"),
        ([{"server_label": "a", "server_url": "file:///etc/passwd"}], "tools[0].server_url"),
        ([{"server_label": "a", "server_url": "http://[bad"}], "tools[0].server_url"),
        ([{"server_label": "a", "server_url": "http:///path"}], "tools[0].server_url"),
        ([{"server_label": "a", "server_url": "http://host:99999/"}], "tools[0].server_url"),
        ([{"server_label": "a", "server_url": "http://a\0b/"}], "tools[0].server_url"),
        ([{"server_label": "a", "server_url": "http://x"}, {"server_label": "a", "server_url": "http://y"}], "tools"),
        ([{"server_label": "a", "connector_id": "connector_gmail"}], "tools[0].connector_id"),
        ([{"server_label": "a", "tunnel_id": "t"}], "tools[0].tunnel_id"),
        ([{"server_label": "a", "server_url": "http://x", "require_approval": "often"}], "tools[0].require_approval"),
        ([{"server_label": "a", "server_url": "http://x", "headers": {"a": 1}}], "tools[0].headers.a"),
    ],
)
@pytest.mark.parametrize("mode", [{}, {"stream": True}, {"background": True}])
def test_a_wrong_declaration_is_refused_with_its_path(client, tools, param, mode):
    declared = [{"type": "mcp", **tool} for tool in tools]
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="m", input="x", tools=declared, **mode)
    assert refused.value.param == param


def test_the_echo_of_a_declaration_holds_no_secrets(client, mcp):
    tools = [
        mcp(authorization="s3cret", headers={"x-key": "s3cret"}, allowed_tools={"tool_names": ["echo"]}),
        mcp(
            "plain", options={"key": "s3cret"}, require_approval={"never": {"read_only": True}}, server_description="d"
        ),
        {"type": "mcp", "server_label": "bare", "server_url": "http://127.0.0.1:1", "allowed_callers": ["direct"]},
    ]
    response = client.responses.create(model="m", input="x", tools=tools)
    for shown in response, client.responses.retrieve(response.id):
        first, second, third = (tool.to_dict() for tool in shown.tools)
        where = tools[0]["server_url"].split("/mcp")[0]
        assert first == {
            "type": "mcp",
            "server_label": "box",
            "server_url": f"{where}/<redacted>",
            "server_description": None,
            "headers": None,
            "allowed_tools": {"tool_names": ["echo"]},
            "require_approval": "never",
        }
        assert (second["require_approval"], second["server_description"]) == ({"never": {"read_only": True}}, "d")
        assert (third["require_approval"], third["server_url"]) == ("always", "http://127.0.0.1:1/")
        assert third["allowed_callers"] == ["direct"]
        assert "s3cret" not in shown.to_json()


def test_only_so_many_servers_are_called(client):
    tools = [
        {"type": "mcp", "server_label": f"box{number}", "server_url": "http://127.0.0.1:1"} for number in range(33)
    ]
    with pytest.raises(openai.BadRequestError, match="more than 32 MCP servers") as refused:
        client.responses.create(model="m", input="x", tools=tools)
    assert refused.value.param == "tools"


@pytest.mark.parametrize("transport", ["mcp", "json", "sse"])
def test_every_http_transport_lists_and_calls(client, toolserver, name, mcp, transport):
    given = script(calling("echo", {"x": 1}), calling("add", {"a": 1, "b": 2}), answer("Done."))
    response = client.responses.create(model="m", input=given, tools=[mcp(transport=transport)])
    assert [item.type for item in response.output] == ["mcp_list_tools", "mcp_call", "mcp_call", "message"]
    assert [item.output for item in response.output[1:3]] == ['{"x": 1}', "3"]
    [session] = [session for session in toolserver.sessions(name) if session.greeted]
    assert session.closed.wait(5)


def test_the_operator_s_servers_are_named_by_their_label(new_server, base_env, catalog_file, toolserver, name):
    catalog = catalog_file(f"""
[upstreams.scripted]
base_url = "{base_env["OPENAI_BASE_URL"]}"
[tool_servers.local]
url = "{toolserver.url("mcp", name, auth="s3cret")}"
authorization_env = "TOOL_TOKEN"
headers = {{ "x-team" = "research" }}
[tool_servers.program]
command = ["{sys.executable}", "-m", "tests.toolserver"]
environment = {{ TEAM = "blue" }}
""")
    # The guard allows nothing: the operator's servers are not subject to it, a client's are.
    server = new_server(REPRISE_CATALOG=catalog, TOOL_TOKEN="s3cret", REPRISE_OUTBOUND_ALLOW="")
    given = script(
        [call("local__headers", {}, id="a"), call("program__headers", {}, id="b", index=1), finish("tool_calls")],
        answer("Done."),
    )
    declared = [
        {
            "type": "mcp",
            "server_label": label,
            "require_approval": "never",
            "headers": {"x-mine": "1", "X-Team": "payroll"},
        }
        for label in ("local", "program")
    ]
    with server.client() as client:
        response = client.responses.create(model="m", input=given, tools=declared)
        [heard] = [one.headers for one in toolserver.calls(name)]
        assert (heard["authorization"], heard["x-team"], heard["x-mine"]) == ("Bearer s3cret", "research", "1")
        first, second = (json.loads(item.output) for item in response.output if item.type == "mcp_call")
        assert (first["authorization"], first["x-team"], first["x-mine"]) == ("Bearer ***", "research", "1")
        assert second["TEAM"] == "blue" and "DATABASE_URL" not in second
        assert [tool.to_dict()["server_url"] for tool in response.tools] == [None, None]
        # A URL of the client's own under that label is the client's server, and gets no secrets.
        theirs = {**declared[0], "server_url": toolserver.url("mcp", name)}
        [listed, _] = client.responses.create(model="m", input="x", tools=[theirs]).output
        assert "not allowed" in listed.error
    assert "s3cret" not in "".join(server.printed)


@pytest.mark.parametrize("operators", ["AUTHORIZATION", "authorization"])
@pytest.mark.parametrize(
    "clients",
    [{"authorization": "cl1ents"}, {"headers": {"Authorization": "Bearer cl1ents"}}],
    ids=["authorization", "headers"],
)
def test_an_operator_s_header_stands_whatever_a_client_gives(
    new_server, base_env, catalog_file, toolserver, name, operators, clients
):
    catalog = catalog_file(f"""
[upstreams.scripted]
base_url = "{base_env["OPENAI_BASE_URL"]}"
[tool_servers.local]
url = "{toolserver.url("mcp", name)}"
headers = {{ {operators} = "Bearer 0perators" }}
""")
    declared = {"type": "mcp", "server_label": "local", "require_approval": "never", **clients}
    server = new_server(REPRISE_CATALOG=catalog)
    with server.client() as client:
        given = script([note(name), *calling("echo", {"x": 1})], answer("Done."))
        client.responses.create(model="m", input=given, tools=[declared])
    assert [one.headers["authorization"] for one in toolserver.calls(name)] == ["Bearer 0perators"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"headers": {f"x-{number}": "" for number in range(65)}}, "tools[1].headers"),
        ({"headers": {"x": "é" * 32_768}}, "tools[1].headers"),
        ({"headers": {"x": "y" * 32_768}, "authorization": "z" * 32_768}, "tools[1].authorization"),
    ],
    ids=["headers", "bytes", "authorization"],
)
def test_what_tool_servers_are_told_is_bounded(client, toolserver, name, mcp, fields, param):
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="m", input="x", tools=[mcp(), mcp("two", **fields)])
    assert refused.value.param == param
    assert toolserver.sessions(name) == []


# -- Listing ----------------------------------------------------------------------------------------------------------------


def test_a_list_in_the_context_is_not_asked_for_again(client, upstream, toolserver, name, mcp):
    tools = [mcp()]
    first = client.responses.create(model="m", input="one", tools=tools)
    assert len(lists(first)) == 1
    resent = [{"role": "user", "content": "one"}, *(item.to_dict() for item in first.output)]
    for store in (True, False):
        given = script([note(f"{name} {store}"), *answer("Good.")])
        asking = [*resent, {"role": "user", "content": given}]
        again = client.responses.create(model="m", input=asking, tools=tools, store=store)
        assert [item.type for item in again.output] == ["message"]
        assert "echo" in offered(upstream, given)
    branch = client.responses.create(model="m", input="two", tools=tools, previous_response_id=first.id)
    assert lists(branch) == []
    assert len(toolserver.sessions(name)) == 1
    # Another server's tools are not known by that.
    other = client.responses.create(model="m", input="x", tools=[*tools, mcp("two")], previous_response_id=branch.id)
    assert [item.server_label for item in lists(other)] == ["two"]


@pytest.mark.parametrize("store", [True, False])
def test_what_is_allowed_may_change_along_a_chain(client, upstream, toolserver, name, mcp, store):
    """A list is whole, whatever was allowed when it was made, and is not asked for again."""
    given = script([note(name), *calling("add", {"a": 1, "b": 2})], answer("Sorry."))
    first = client.responses.create(model="m", input=given, tools=[mcp(allowed_tools=["echo"])], store=store)
    assert [item.type for item in first.output] == ["mcp_list_tools", "message"]
    kept = {"previous_response_id": first.id, "input": []} if store else {"input": resent(given, first)}
    again = {"role": "user", "content": script([note(f"{name} again"), *calling("add", {"a": 1, "b": 2})], answer("3"))}
    kept["input"] = [*kept["input"], again]
    other = [mcp(allowed_tools=["add", "mistyped"])]
    second = client.responses.create(model="m", tools=other, store=store, **kept)
    assert [item.type for item in second.output] == ["mcp_call", "message"]
    assert (offered(upstream, given, 0), offered(upstream, again["content"])) == (["echo"], ["add"])
    assert len(toolserver.calls(name)) == 1


@pytest.mark.parametrize("store", [True, False])
def test_another_server_under_a_label_is_listed_anew(client, upstream, name, mcp, store):
    """Unless its list is in the context already."""
    narrow, wide = ([mcp(options={"tools": tools})] for tools in ("echo", "echo,add"))
    history, previous = [], None
    for number, (tools, lists_anew) in enumerate([(narrow, True), (wide, True), (wide, False), (narrow, False)]):
        asked = f"{name} {number}"
        made = client.responses.create(
            model="m",
            input=[*history, {"role": "user", "content": asked}],
            tools=tools,
            store=store,
            previous_response_id=previous,
        )
        assert bool(lists(made)) == lists_anew
        assert offered(upstream, asked) == (["echo"] if tools is narrow else ["echo", "add"])
        if store:
            previous = made.id
        else:
            history += resent(asked, made)


def resent(given, response):
    """A whole turn as input."""
    return [{"role": "user", "content": given}, *(item.to_dict() for item in response.output)]


def failing(mcp, toolserver, kind):
    match kind:
        case "refused":
            return {**mcp("bad"), "server_url": "http://127.0.0.1:1/mcp"}
        case "401":
            return mcp("bad", options={"auth": "other"}, authorization="wrong-t0ken")
        case "unsendable":
            return mcp("bad", authorization="Basic é")
        case "500":
            return mcp("bad", options={"status": 500})
        case "garbage":
            return {**mcp("bad"), "server_url": toolserver.url("calls").replace("/any", "")}
        case "stall":
            return mcp("bad", options={"silent": 1})
        case "too many":
            return mcp("bad", options={"growing": 1})
    raise AssertionError(kind)


@pytest.fixture(scope="module")
def impatient(base_env, new_database):
    """A server with small limits for tool servers."""
    env = {
        **base_env,
        "DATABASE_URL": new_database(),
        "REPRISE_TOOL_CONNECT_TIMEOUT_S": "0.5",
        "REPRISE_TOOL_LIST_TIMEOUT_S": "0.5",
        "REPRISE_TOOLS_LISTED_MAX": str(len(TOOLS)),
    }
    with Served(env) as running:
        yield running


@pytest.mark.parametrize("kind", ["refused", "401", "unsendable", "500", "garbage", "stall", "too many"])
def test_a_server_that_can_t_be_listed_says_so_and_the_others_go_on(impatient, upstream, toolserver, name, mcp, kind):
    given = script([note(name), *calling("echo", {"x": 1})], answer("Done."))
    bad = failing(mcp, toolserver, kind)
    events, made = streamed(impatient, input=given, tools=[bad, mcp("good", of=f"{name}good", allowed_tools=["echo"])])
    failed, listed, called, _ = made["output"]
    assert (failed["type"], failed["tools"], failed["server_label"]) == ("mcp_list_tools", [], "bad")
    assert failed["error"] and "wrong-t0ken" not in json.dumps(events)
    assert "error" not in listed
    assert (made["status"], called["output"]) == ("completed", '{"x": 1}')
    assert types_of(events)[2:6] == [
        "output_item.added",
        "mcp_list_tools.in_progress",
        "mcp_list_tools.failed",
        "output_item.done",
    ]
    # It is listed again with the next response.
    with impatient.client() as client:
        again = client.responses.create(model="m", input="x", tools=[bad], previous_response_id=made["id"])
        assert [bool(item.error) for item in lists(again)] == [True]


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        {"type": "mcp", "server_label": "bad"},
        {"type": "mcp", "server_label": "bad", "name": "echo"},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "mcp", "server_label": "bad"}]},
    ],
)
def test_a_choice_that_needs_a_server_that_can_t_be_listed_fails(server, client, upstream, mcp, name, choice):
    given = script([note(name), *answer("never")])
    tools = [mcp("bad", options={"status": 500})]
    if choice != "required":
        tools.append(mcp("good", of=f"{name}good"))
    with pytest.raises(openai.APIStatusError) as refused:
        client.responses.create(model="m", input=given, tools=tools, tool_choice=choice)
    assert (refused.value.status_code, refused.value.param) == (424, "tool_choice")
    assert "bad" in refused.value.message
    _, made = streamed(server, input=given, tools=tools, tool_choice=choice)
    assert (made["status"], made["error"]["code"]) == ("failed", "server_error")
    assert [item["type"] for item in made["output"]] == ["mcp_list_tools"] * len(tools)
    assert upstream.asked(given) == []


def test_a_choice_of_a_tool_that_the_server_does_not_have_is_refused(client, mcp):
    choice = {"type": "mcp", "server_label": "box", "name": "nothing"}
    with pytest.raises(openai.BadRequestError, match="no tool of this name") as refused:
        client.responses.create(model="m", input="x", tools=[mcp()], tool_choice=choice)
    assert refused.value.param == "tool_choice"
    with pytest.raises(openai.BadRequestError, match="not found in 'tools'"):
        client.responses.create(model="m", input="x", tools=[mcp()], tool_choice={**choice, "server_label": "other"})


def test_lies_of_a_list_are_put_right(client, upstream, mcp, name):
    given = script([note(name), *answer("Fine.")])
    response = client.responses.create(model="m", input=given, tools=[mcp(options={"lies": 1})])
    [listed] = lists(response)
    names = [tool.name for tool in listed.tools]
    assert names == offered(upstream, given) and names.count("twice") == 1
    for tool in upstream.asked(given)[0].body["tools"]:
        assert tool["function"]["parameters"]["type"] == "object"


def test_lists_hold_nothing_null_that_strict_clients_refuse(server, mcp):
    _, made = streamed(server, input="x", tools=[mcp(options={"tools": "echo,add"})])
    assert made["output"][0] == {
        "id": made["output"][0]["id"],
        "type": "mcp_list_tools",
        "server_label": "box",
        "tools": [
            {"name": "echo", "description": "Gives its arguments back.", "input_schema": {"type": "object"}},
            {
                "name": "add",
                "description": "Adds two numbers.",
                "input_schema": {
                    "type": "object",
                    "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
                    "required": ["a", "b"],
                },
                "annotations": {"readOnlyHint": True, "title": "Add"},
            },
        ],
    }


# -- Names and filters ------------------------------------------------------------------------------------------------------


def test_names_that_clash_are_told_apart_and_mapped_back(client, upstream, toolserver, name, mcp):
    given = script(
        [
            call("one__add", {"a": 1, "b": 2}, id="a"),
            call("two__add", {"a": 3, "b": 4}, id="b", index=1),
            call("two__echo", {"x": 1}, id="c", index=2),
            finish("tool_calls"),
        ],
        answer("Done."),
    )
    tools = [
        mcp("one", of=f"{name}one", allowed_tools=["add"]),
        {"type": "function", "name": "echo"},
        mcp("two", of=f"{name}two", allowed_tools=["add", "echo"]),
    ]
    response = client.responses.create(model="m", input=given, tools=tools)
    assert offered(upstream, given, 0) == ["one__add", "echo", "two__echo", "two__add"]
    called = [item for item in response.output if item.type == "mcp_call"]
    assert [(item.server_label, item.name, item.output) for item in called] == [
        ("one", "add", "3"),
        ("two", "add", "7"),
        ("two", "echo", '{"x": 1}'),
    ]
    assert [len(toolserver.calls(f"{name}{one}")) for one in ("one", "two")] == [1, 2]
    [said, *_] = (one for one in upstream.asked(given)[1].body["messages"] if one["role"] == "assistant")
    assert [one["function"]["name"] for one in said["tool_calls"]] == ["one__add", "two__add", "two__echo"]


@pytest.mark.parametrize(
    ("allowed", "names"),
    [
        (["add"], ["add"]),
        ({"tool_names": ["add", "echo"]}, ["echo", "add"]),
        ({"read_only": True}, ["add"]),
        ({"read_only": False, "tool_names": ["add", "echo"]}, ["echo"]),
        ([], []),
        (None, ["echo", "add", "fail"]),
    ],
)
def test_only_allowed_tools_are_seen(client, upstream, mcp, name, allowed, names):
    given = script([note(name), *answer("x")])
    tools = [mcp(options={"tools": "echo,add,fail"}, allowed_tools=allowed)]
    response = client.responses.create(model="m", input=given, tools=tools)
    assert [tool.name for tool in lists(response)[0].tools] == ["echo", "add", "fail"]
    assert offered(upstream, given) == names


@pytest.mark.parametrize(
    ("tools", "options", "called"),
    [
        ({"allowed_tools": ["echo"]}, {}, "add"),
        ({"allowed_tools": {"read_only": True}}, {}, "echo"),
        ({}, {}, "box__add"),
        ({}, {}, "other"),
        ({}, {"tool_choice": "none"}, "add"),
        ({}, {"tool_choice": {"type": "mcp", "server_label": "box", "name": "echo"}}, "add"),
        ({}, {"tool_choice": {"type": "mcp", "server_label": "box"}}, "get_time"),
        (
            {},
            {
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "auto",
                    "tools": [{"type": "mcp", "server_label": "box", "name": "echo"}],
                }
            },
            "add",
        ),
        ({}, {}, ""),
    ],
)
def test_what_is_not_allowed_is_refused_when_the_model_calls_it(
    client, upstream, toolserver, name, mcp, tools, options, called
):
    given = script([note(name), *calling(called, {"a": 1, "b": 2})], answer("Sorry."))
    declared = [mcp(**tools), {"type": "function", "name": "get_time"}]
    response = client.responses.create(model="m", input=given, tools=declared, **options)
    assert [item.type for item in response.output] == ["mcp_list_tools", "message"]
    assert toolserver.calls(name) == []
    *_, refused, told_why = upstream.asked(given)[1].body["messages"]
    assert refused["tool_calls"][0]["id"] == told_why["tool_call_id"]
    assert "no tool" in told_why["content"]


@pytest.mark.parametrize(
    ("choice", "wanted", "names"),
    [
        (
            {"type": "mcp", "server_label": "box", "name": "echo"},
            {"type": "function", "function": {"name": "echo"}},
            ["echo", "add", "get_time"],
        ),
        ({"type": "mcp", "server_label": "box"}, "required", ["echo", "add"]),
        ("required", "required", ["echo", "add", "get_time"]),
    ],
)
def test_a_demanded_call_is_demanded_once(client, upstream, mcp, name, choice, wanted, names):
    given = script([note(name), *calling("echo", {"x": 1})], [text("Said."), finish()])
    tools = [mcp(options={"tools": "echo,add"}), {"type": "function", "name": "get_time"}]
    response = client.responses.create(model="m", input=given, tools=tools, tool_choice=choice)
    assert response.output_text == "Said."
    first, second = (record.body for record in upstream.asked(given))
    assert first["tool_choice"] == wanted
    assert "tool_choice" not in second
    assert offered(upstream, given, 0) == names


# -- The guard --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(base_env, new_database):
    """A server that may call nothing private."""
    with Served({**base_env, "DATABASE_URL": new_database(), "REPRISE_OUTBOUND_ALLOW": ""}) as running:
        yield running


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "127.1", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]"]
)
def test_private_addresses_are_not_called(guarded, toolserver, name, mcp, host):
    declared = mcp()
    tools = [{**declared, "server_url": declared["server_url"].replace("127.0.0.1", host)}]
    _, made = streamed(guarded, input="x", tools=tools)
    assert "not allowed" in made["output"][0]["error"]
    assert (made["status"], toolserver.asked(name)) == ("completed", [])


def test_a_redirect_to_a_private_address_is_not_followed(base_env, new_server, toolserver, name, mcp):
    # A name that is allowed redirects to an address that is not.
    server = new_server(REPRISE_OUTBOUND_ALLOW="localhost")
    declared = mcp(options={"redirect": toolserver.url("mcp", f"{name}behind")})
    tools = [{**declared, "server_url": declared["server_url"].replace("127.0.0.1", "localhost", 1)}]
    made = httpx.post(f"{server.url}/responses", json={"model": "m", "input": "x", "tools": tools}).json()
    assert made["output"][0]["error"]
    assert toolserver.asked(name)
    assert toolserver.asked(f"{name}behind") == []
