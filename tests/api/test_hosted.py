"""Hosted tools on the operator's tool servers: search, code, images; what `include` shows, what is cited."""

import json

import httpx
import openai
import pytest

from tests.api.streams import events_of, types_of
from tests.replay import replay
from tests.upstream import answer, call, calling, finish, note, script

PAGES = {
    "items": [
        {"link": "https://fjords.example/a", "name": "Fjords", "snippet": "Deep."},
        {"link": "https://fjords.example/b", "name": "More fjords", "snippet": "Deeper."},
    ]
}
RAN = {"ran": [{"stdout": "a b", "exit_code": 0}, {"stderr": "no such file", "exit_code": 2}]}
FILES = {"results": [{"file_id": "file_1", "filename": "plan.md", "score": 0.9, "text": "Ship it."}]}


@pytest.fixture(scope="module")
def hosting(base_env, new_database, toolserver, upstream, tmp_path_factory):
    """A server whose catalog puts the scripted MCP server behind every hosted type."""
    from tests.servers import Served

    catalog = tmp_path_factory.mktemp("catalog") / "catalog.toml"
    catalog.write_text(f"""
[upstreams.up]
base_url = "{upstream.base_url}"
[tool_servers.box]
url = "{toolserver.url("mcp", "hosting")}"
[hosted.web_search]
server = "box"
tool = "raw"
arguments = {{ result = {{ structuredContent = {json_toml(PAGES)} }}, q = "$query", size = "$search_context_size" }}
results = "items"
fields = {{ url = "link", title = "name", text = "snippet" }}
[hosted.file_search]
server = "box"
tool = "raw"
arguments = {{ result = {{ structuredContent = {json_toml(FILES)} }}, queries = "$queries", stores = "$vector_store_ids", tenant = "$tenant" }}
[hosted.code_interpreter]
server = "box"
tool = "echo"
arguments = {{ program = "$code", container = "$container" }}
[hosted.image_generation]
server = "box"
tool = "image"
[hosted.shell]
server = "box"
tool = "raw"
arguments = {{ result = {{ structuredContent = {json_toml(RAN)} }}, commands = "$commands", container = "$container" }}
results = "ran"
[agents.searcher]
model = "m"
tools = [{{ type = "web_search" }}]
""")
    env = {name: value for name, value in base_env.items() if name != "OPENAI_BASE_URL"}
    with Served({**env, "DATABASE_URL": new_database(), "REPRISE_CATALOG": str(catalog)}) as running:
        yield running


def json_toml(value):
    """A value as an inline TOML table."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {json_toml(one)}" for key, one in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(json_toml, value)) + "]"
    return json.dumps(value)


@pytest.fixture(scope="module")
def hosted_client(hosting):
    """The official client of that server."""
    with hosting.client() as made:
        yield made


def streamed(server, **body):
    """A streamed response: its events, and what they fold into, as the oracle has checked."""
    reply = httpx.post(f"{server.url}/responses", json={"model": "m", "stream": True, **body}, timeout=30)
    events = events_of(reply)
    return events, replay(events)


def between(events, added):
    """The types of the events from the one that adds this type of item to the one that ends it."""
    start = next(i for i, e in enumerate(events) if e["type"].endswith("item.added") and e["item"]["type"] == added)
    end = next(i for i, e in enumerate(events) if i > start and e["type"].endswith("item.done"))
    return types_of(events[start : end + 1])


# -- Web search -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type", ["web_search", "web_search_2025_08_26", "web_search_preview"])
def test_a_search_is_made_and_cited(hosting, hosted_client, upstream, toolserver, type):
    given = script(
        calling("web_search", {"query": f"fjords {type}"}), answer("See [Fjords](https://fjords.example/a).")
    )
    made = hosted_client.responses.create(
        model="m",
        input=given,
        tools=[{"type": type, "search_context_size": "low"}],
        include=["web_search_call.results"],
    )
    searched, message = made.output
    assert (searched.type, searched.status, searched.action.type, searched.action.query) == (
        "web_search_call",
        "completed",
        "search",
        f"fjords {type}",
    )
    assert searched.id.startswith("ws_")
    assert searched.results[0] == {"url": "https://fjords.example/a", "title": "Fjords", "text": "Deep."}
    (citation,) = message.content[0].annotations
    assert (citation.type, citation.url, citation.title) == ("url_citation", "https://fjords.example/a", "Fjords")
    cited = message.content[0].text[citation.start_index : citation.end_index]
    assert cited == "[Fjords](https://fjords.example/a)"
    called = toolserver.calls("hosting", "raw")[-1]
    assert (called.arguments["q"], called.arguments["size"]) == (f"fjords {type}", "low")
    asked, then = upstream.asked(given)
    assert [tool["function"]["name"] for tool in asked.body["tools"]] == ["web_search"]
    assert "Deeper." in then.body["messages"][-1]["content"]


def test_the_events_of_a_search_are_those_of_the_hosted_api(hosting):
    given = script(calling("web_search", {"query": "x"}), answer("At https://fjords.example/b it says so."))
    events, made = streamed(hosting, input=given, tools=[{"type": "web_search"}])
    assert between(events, "web_search_call") == [
        "output_item.added",
        "web_search_call.in_progress",
        "web_search_call.searching",
        "web_search_call.completed",
        "output_item.done",
    ]
    assert "output_text.annotation.added" in types_of(events)
    assert made["output"][1]["content"][0]["annotations"][0]["url"] == "https://fjords.example/b"
    assert "results" not in made["output"][0] and "sources" not in made["output"][0]["action"]


def test_sources_and_results_are_shown_where_they_are_asked_for(hosting, hosted_client):
    given = script(calling("web_search", {"query": "x"}), answer("Found."))
    made = hosted_client.responses.create(model="m", input=given, tools=[{"type": "web_search"}])
    assert made.output[0].action.sources is None
    again = hosted_client.responses.retrieve(
        made.id, include=["web_search_call.action.sources", "web_search_call.results"]
    )
    assert [source.url for source in again.output[0].action.sources] == [
        "https://fjords.example/a",
        "https://fjords.example/b",
    ]
    assert len(again.output[0].results) == 2
    then = hosted_client.responses.create(model="m", input="x", previous_response_id=made.id)
    listed = hosted_client.responses.input_items.list(then.id, order="asc").data[1]
    assert not hasattr(listed, "results") and listed.action.sources is None
    listed = hosted_client.responses.input_items.list(
        then.id, order="asc", include=["web_search_call.action.sources"]
    ).data[1]
    assert len(listed.action.sources) == 2


def test_a_later_turn_still_reads_what_was_found(hosted_client, upstream):
    given = script(calling("web_search", {"query": "x"}), answer("Found."))
    made = hosted_client.responses.create(model="m", input=given, tools=[{"type": "web_search"}])
    hosted_client.responses.create(model="m", input="What was it?", previous_response_id=made.id)
    messages = upstream.asked("What was it?")[-1].body["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant", "user"]
    assert "Deeper." in messages[2]["content"]


def test_a_background_search_is_shown_as_it_was_streamed(hosting):
    given = script(calling("web_search", {"query": "x"}), answer("Found."))
    body = {"input": given, "tools": [{"type": "web_search"}], "background": True}
    shown, made = streamed(hosting, **body, include=["web_search_call.results"])
    assert len(made["output"][0]["results"]) == 2
    with httpx.Client(base_url=hosting.url) as http:
        path = f"/responses/{made['id']}?stream=true"
        assert events_of(http.get(f"{path}&include[]=web_search_call.results")) == shown
        hidden = events_of(http.get(path))
        assert "results" not in replay(hidden)["output"][0]


def test_a_failed_search_is_told_to_the_model(hosting, hosted_client, upstream, new_server, catalog_file, toolserver):
    catalog = catalog_file(f"""
[upstreams.up]
base_url = "{upstream.base_url}"
[tool_servers.box]
url = "{toolserver.url("mcp", "failing")}"
[hosted.web_search]
server = "box"
tool = "fail"
""")
    given = script(calling("web_search", {"query": "none"}), answer("No luck."))
    with new_server(REPRISE_CATALOG=catalog).client() as client:
        made = client.responses.create(model="m", input=given, tools=[{"type": "web_search"}])
    assert (made.status, made.output[0].status, made.output_text) == ("completed", "failed", "No luck.")
    assert upstream.asked(given)[1].body["messages"][-1]["content"] == "Error: it failed"


# -- Files, code, images ----------------------------------------------------------------------------------------------------


def test_files_are_searched_and_cited(hosting, toolserver):
    given = script(calling("file_search", {"queries": ["plan", "ship"]}), answer("Ship it, says 【plan.md】."))
    tools = [{"type": "file_search", "vector_store_ids": ["vs_1"]}]
    events, made = streamed(hosting, input=given, tools=tools, include=["file_search_call.results"])
    assert between(events, "file_search_call") == [
        "output_item.added",
        "file_search_call.in_progress",
        "file_search_call.searching",
        "file_search_call.completed",
        "output_item.done",
    ]
    searched, message = made["output"]
    assert (searched["queries"], searched["results"]) == (["plan", "ship"], FILES["results"])
    assert message["content"][0]["annotations"] == [
        {"type": "file_citation", "file_id": "file_1", "filename": "plan.md", "index": 15}
    ]
    called = toolserver.calls("hosting", "raw")[-1]
    assert (called.arguments["stores"], called.arguments["tenant"]) == (["vs_1"], "default")


def test_code_is_run_and_its_container_stays(hosting, hosted_client, toolserver):
    given = script(calling("code_interpreter", {"code": "print(1)"}), answer("One."))
    tools = [{"type": "code_interpreter", "container": {"type": "auto"}}]
    events, made = streamed(hosting, input=given, tools=tools, include=["code_interpreter_call.outputs"])
    assert between(events, "code_interpreter_call") == [
        "output_item.added",
        "code_interpreter_call.in_progress",
        "code_interpreter_call_code.delta",
        "code_interpreter_call_code.done",
        "code_interpreter_call.interpreting",
        "code_interpreter_call.completed",
        "output_item.done",
    ]
    ran = made["output"][0]
    assert ran["code"] == "print(1)" and ran["container_id"].startswith("cntr_")
    told = json.loads(ran["outputs"][0]["logs"])
    assert told["program"] == "print(1)"
    again = script(calling("code_interpreter", {"code": "print(2)"}), answer("Two."))
    then = hosted_client.responses.create(model="m", input=again, tools=tools, previous_response_id=made["id"])
    assert then.output[0].container_id == ran["container_id"] and then.output[0].outputs is None
    first, second = [call.arguments["container"] for call in toolserver.calls("hosting", "echo")[-2:]]
    assert first == second != ran["container_id"], "a tool server gets a name that no other tenant can say"


def test_bare_code_is_code(hosted_client, toolserver):
    given = script(calling("code_interpreter", "print('bare')"), answer("Yes."))
    made = hosted_client.responses.create(
        model="m", input=given, tools=[{"type": "code_interpreter", "container": "c1"}]
    )
    assert (made.output[0].code, made.output[0].container_id) == ("print('bare')", "c1")
    assert toolserver.calls("hosting", "echo")[-1].arguments["program"] == "print('bare')"


def test_an_image_is_made(hosting):
    given = script(calling("image_generation", {"prompt": "a pixel"}), answer("There."))
    events, made = streamed(hosting, input=given, tools=[{"type": "image_generation"}])
    assert between(events, "image_generation_call") == [
        "output_item.added",
        "image_generation_call.in_progress",
        "image_generation_call.generating",
        "image_generation_call.completed",
        "output_item.done",
    ]
    assert made["output"][0]["result"] and made["output"][0]["revised_prompt"] == "a pixel"


def test_a_shell_runs_in_a_container(hosting, upstream, toolserver):
    given = script(calling("shell", {"commands": ["ls", "cat c"]}), answer("Two files."))
    tools = [{"type": "shell", "environment": {"type": "container_auto"}}]
    _, made = streamed(hosting, input=given, tools=tools)
    ran, output = made["output"][:2]
    assert (ran["type"], ran["status"], ran["action"]) == ("shell_call", "completed", {"commands": ["ls", "cat c"]})
    assert ran["environment"]["type"] == "container_reference"
    assert (output["type"], output["call_id"]) == ("shell_call_output", ran["call_id"])
    assert output["output"] == [
        {"stdout": "a b", "stderr": "", "outcome": {"type": "exit", "exit_code": 0}},
        {"stdout": "", "stderr": "no such file", "outcome": {"type": "exit", "exit_code": 2}},
    ]
    assert toolserver.calls("hosting", "raw")[-1].arguments["commands"] == ["ls", "cat c"]
    told = upstream.asked(given)[1].body["messages"]
    assert json.loads(told[1]["tool_calls"][0]["function"]["arguments"]) == {"commands": ["ls", "cat c"]}
    assert json.loads(told[2]["content"]) == output["output"]
    then = httpx.post(
        f"{hosting.url}/responses", json={"model": "m", "input": "More?", "previous_response_id": made["id"]}
    )
    assert then.status_code == 200


def test_calls_of_one_turn_end_before_the_shell_s_output_is_said(hosting, upstream):
    given = script(
        [
            call("shell", {"commands": ["ls", "cat c"]}, id="a"),
            call("web_search", {"query": "beside a shell"}, id="b", index=1),
            finish("tool_calls"),
        ],
        answer("Both."),
    )
    tools = [{"type": "shell", "environment": {"type": "container_auto"}}, {"type": "web_search"}]
    _, made = streamed(hosting, input=given, tools=tools, background=True)
    assert [item["type"] for item in made["output"]] == [
        "shell_call",
        "web_search_call",
        "shell_call_output",
        "message",
    ]
    told = upstream.asked(given)[1].body["messages"]
    assert [message["role"] for message in told] == ["user", "assistant", "tool", "tool"]


def test_a_filter_that_the_tool_would_not_hear_of_is_refused(hosted_client):
    tools = [{"type": "file_search", "vector_store_ids": ["vs_1"], "filters": {"type": "eq", "key": "a", "value": 1}}]
    with pytest.raises(openai.BadRequestError) as refused:
        hosted_client.responses.create(model="m", input="x", tools=tools)
    assert refused.value.param == "tools[0].filters"


def test_what_stands_behind_a_hosted_tool_is_called_by_us_alone(hosted_client):
    """It believes what it is told of the tenant."""
    with pytest.raises(openai.BadRequestError) as refused:
        hosted_client.responses.create(
            model="m", input="x", tools=[{"type": "mcp", "server_label": "box", "require_approval": "never"}]
        )
    assert refused.value.param == "tools[0].server_url"


# -- Where nothing stands behind a type -------------------------------------------------------------------------------------


def test_a_catalog_may_refuse_what_it_lacks(new_server, catalog_file, upstream):
    catalog = catalog_file(f'refuse_missing_tools = true\n[upstreams.up]\nbase_url = "{upstream.base_url}"\n')
    with new_server(REPRISE_CATALOG=catalog).client() as client:
        with pytest.raises(openai.BadRequestError) as refused:
            client.responses.create(model="m", input="x", tools=[{"type": "web_search"}])
        assert (refused.value.param, refused.value.code) == ("tools[0].type", "unsupported_parameter")


@pytest.mark.parametrize("background", [False, True])
def test_what_is_left_out_is_said_in_a_header(client, background):
    tools = [
        {"type": "web_search"},
        {"type": "code_interpreter", "container": {"type": "auto"}},
        {"type": "function", "name": "f", "parameters": {}},
    ]
    reply = client.responses.with_raw_response.create(model="m", input="x", tools=tools, background=background)
    assert reply.headers["x-reprise-left-out-tools"] == "web_search, code_interpreter"
    assert [tool.type for tool in reply.parse().tools] == ["function"]


FUNCTION = {"type": "function", "name": "f", "parameters": {}}


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(
    ("given", "param", "entry"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "web_search"),
        ({"tools": [{"type": "web_search_preview"}, {"type": "image_generation"}]}, "tools[0].type", "web_search"),
        (
            {"tools": [FUNCTION, {"type": "file_search", "vector_store_ids": ["vs_1"]}]},
            "tools[1].type",
            "file_search",
        ),
        (
            {"tools": [FUNCTION, {"type": "code_interpreter", "container": "cntr_1"}]},
            "tools[1].type",
            "code_interpreter",
        ),
        (
            {"tools": [FUNCTION, {"type": "code_interpreter", "container": {"type": "auto", "file_ids": ["file_1"]}}]},
            "tools[1].type",
            "code_interpreter",
        ),
        (
            {"tools": [FUNCTION, {"type": "web_search"}], "tool_choice": {"type": "web_search"}},
            "tool_choice",
            "web_search",
        ),
    ],
)
def test_a_hosted_tool_that_the_answer_depends_on_is_refused_with_what_to_configure(
    client, given, param, entry, background
):
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="m", input="x", background=background, **given)
    assert (refused.value.param, refused.value.code) == (param, "unsupported_parameter")
    assert f"[hosted.{entry}]" in refused.value.message


def test_a_catalog_may_leave_out_whatever_it_lacks(new_server, catalog_file, upstream):
    catalog = catalog_file(f'refuse_missing_tools = false\n[upstreams.up]\nbase_url = "{upstream.base_url}"\n')
    with new_server(REPRISE_CATALOG=catalog).client() as client:
        tools = [{"type": "file_search", "vector_store_ids": ["vs_1"]}]
        reply = client.responses.with_raw_response.create(model="m", input="x", tools=tools)
    assert reply.headers["x-reprise-left-out-tools"] == "file_search"
    assert reply.parse().tools == []


@pytest.mark.parametrize("mode", ["required", {"type": "web_search_preview"}])
def test_a_demanded_search_is_made_once(hosted_client, upstream, mode):
    given = script(calling("web_search", {"query": str(mode)}), answer("Found."))
    made = hosted_client.responses.create(
        model="m", input=given, tools=[{"type": "web_search_preview"}], tool_choice=mode
    )
    assert [item.type for item in made.output] == ["web_search_call", "message"]
    first, then = upstream.asked(given)
    assert first.body["tool_choice"] in ("required", {"type": "function", "function": {"name": "web_search"}})
    assert "tool_choice" not in then.body


# -- Over Chat Completions ---------------------------------------------------------------------------------------------------

INSIDE = {
    "web_search": ({"tools": [{"type": "web_search"}]}, "web_search", {"query": "fjords"}, ["web_search_call"]),
    "web_search_options": ({"web_search_options": {}}, "web_search", {"query": "fjords"}, ["web_search_call"]),
    "an agent's": ({"model": "searcher"}, "web_search", {"query": "fjords"}, ["web_search_call"]),
    "file_search": (
        {"tools": [{"type": "file_search", "vector_store_ids": ["vs_1"]}]},
        "file_search",
        {"queries": ["plan"]},
        ["file_search_call"],
    ),
    "code_interpreter": (
        {"tools": [{"type": "code_interpreter", "container": {"type": "auto"}}]},
        "code_interpreter",
        {"code": "1"},
        ["code_interpreter_call"],
    ),
    "image_generation": (
        {"tools": [{"type": "image_generation"}]},
        "image_generation",
        {"prompt": "A fjord."},
        ["image_generation_call"],
    ),
    "shell": (
        {"tools": [{"type": "shell", "environment": {"type": "container_auto"}}]},
        "shell",
        {"commands": ["ls"]},
        ["shell_call", "shell_call_output"],
    ),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("given", "name", "arguments", "items"), INSIDE.values(), ids=INSIDE)
def test_a_chat_completion_has_the_answer_and_its_response_the_calls(
    hosted_client, said, given, name, arguments, items, stream
):
    told = script([note(said), call(name, arguments, id="call_1"), finish("tool_calls")], answer("Here it is."))
    body = {"model": "m", "messages": [{"role": "user", "content": told}], "store": True, **given}
    if stream:
        chunks = list(hosted_client.chat.completions.create(stream=True, **body))
        made = "".join(one.choices[0].delta.content or "" for one in chunks)
        assert not any(one.choices[0].delta.tool_calls for one in chunks)
        assert [one.choices[0].finish_reason for one in chunks][-1] == "stop"
        id = chunks[0].response_id
    else:
        whole = hosted_client.chat.completions.create(**body)
        [choice] = whole.choices
        assert (choice.message.tool_calls, choice.finish_reason) == (None, "stop")
        made, id = choice.message.content, whole.response_id
    assert made == "Here it is."
    stored = hosted_client.responses.retrieve(id)
    assert [item.type for item in stored.output] == [*items, "message"]
    assert {item.status for item in stored.output} == {"completed"}
