"""The catalog: which upstream a request goes to, with which key, and in which dialect."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from app.domain.dialect import HOSTED, Dialect
from app.outbound.catalog import UpstreamEntry
from app.outbound.catalog_file import load_catalog
from app.settings import Settings, SettingsError
from tests.conftest import NewServer
from tests.servers import Served, reprise
from tests.upstream import (
    Upstream,
    answer,
    call,
    calling,
    error,
    finish,
    note,
    reasoning,
    refusal,
    script,
    status,
    text,
)


class OutOfOrder(Upstream):
    """An upstream that answers every request with one status."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self._code = code

    async def answer(self, record, wire) -> None:
        """Every request alike."""
        await wire.whole(self._code, {"error": {"message": "out of order", "type": "server_error", "param": None}})


CATALOG = """
[upstreams.plain]
base_url = "{plain}"

[upstreams.down]
base_url = "{down}"
attempts_max = 1

[upstreams.broken]
base_url = "{broken}"
attempts_max = 1

[upstreams.busy]
base_url = "{busy}"
attempts_max = 1

[upstreams.keyed]
base_url = "{keyed}"
key_env = "KEY_OF_THE_KEYED"
headers = {{ x-team = "blue", x-stainless-mine = "kept" }}

[upstreams.locked]
base_url = "{keyed}"
key = "wrong"

[upstreams.own_headers]
base_url = "{plain}?api-version=preview"
headers = {{ authorization = "Basic dTpw", user-agent = "house/1", content-type = "application/json; charset=utf-8" }}

[upstreams.hosted]
base_url = "{plain}"
dialect = {{ developer_role = true, refusals = true, verbosity = true, max_tokens = "max_completion_tokens", custom_tools = "native", tool_images = true }}

[upstreams.poor]
base_url = "{plain}"
dialect = {{ lacks = ["stream_options", "parallel_tool_calls", "tool_choice_required", "json_schema", "json_object", "reasoning_effort", "content_parts", "later_system_messages", "strict"] }}

[upstreams.templated]
base_url = "{plain}"
dialect = {{ lacks = ["later_system_messages"] }}

[upstreams.thinker]
base_url = "{plain}"
dialect = {{ reasoning = "reasoning_content", think = "thinking" }}

[upstreams.reasoner]
base_url = "{plain}"
dialect = {{ reasoning = "reasoning", think = "text" }}

[upstreams.rambler]
base_url = "{plain}"
dialect = {{ think = "anywhere" }}

[upstreams.wrapping]
base_url = "{plain}"
dialect = {{ custom_tools = "function" }}

[upstreams.ruled]
base_url = "{plain}"
pass = ["house_rule"]

[[models]]
name = "safe"
routes = [{{ upstream = "down" }}, {{ upstream = "broken" }}, {{ upstream = "busy" }}, {{ upstream = "locked" }}, {{ upstream = "plain", model = "real" }}]

[[models]]
name = "unsafe"
routes = [{{ upstream = "down" }}, {{ upstream = "broken" }}]

[[models]]
name = "first"
routes = [{{ upstream = "plain" }}, {{ upstream = "keyed" }}]

[[models]]
name = "mixed"
routes = [{{ upstream = "plain" }}, {{ upstream = "ruled" }}]

[[models]]
name = "Qwen/*-[0-9]b"
routes = [{{ upstream = "plain", model = "small" }}]

[[models]]
name = "Qwen/*"
routes = [{{ upstream = "plain" }}]
"""

KEY = "the-key"


@pytest.fixture(scope="module")
def keyed() -> Iterator[Upstream]:
    """An upstream that asks for a key."""
    with Upstream(api_key=KEY) as running:
        yield running


@pytest.fixture(scope="module")
def served(new_cataloged: NewServer, upstream: Upstream, keyed: Upstream) -> Iterator[Served]:
    """A server with a catalog of every kind of upstream; most are the scripted one under another name."""
    with Upstream() as gone:
        down = gone.base_url
    with OutOfOrder(503) as broken, OutOfOrder(429) as busy:
        urls = {"plain": upstream, "broken": broken, "busy": busy, "keyed": keyed}
        toml = CATALOG.format(down=down, **{name: one.base_url for name, one in urls.items()})
        yield new_cataloged(toml, KEY_OF_THE_KEYED=KEY)


@pytest.fixture(scope="module")
def cataloged(served: Served) -> Iterator[openai.OpenAI]:
    """The official client of that server."""
    with served.client() as made:
        yield made


# -- Routes -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "asked"),
    [
        ("plain@some/model", "some/model"),
        ("plain@hosted@x", "hosted@x"),
        ("Qwen/Qwen3-8b", "small"),
        ("Qwen/Qwen3-80B", "Qwen/Qwen3-80B"),
        ("safe", "real"),
    ],
)
def test_the_first_entry_that_matches_says_the_upstream_and_its_name_of_the_model(cataloged, said, heard, model, asked):
    made = cataloged.responses.create(model=model, input=said)
    assert (made.model, heard()["model"]) == (model, asked)


@pytest.mark.parametrize("model", ["qwen/x", "SAFE", "nobody@x", "plain", "@x"])
def test_a_model_that_nothing_names_is_not_found(cataloged, model):
    with pytest.raises(openai.NotFoundError) as missing:
        cataloged.responses.create(model=model, input="Hello")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize("stream", [False, True])
def test_upstreams_that_are_out_of_order_are_passed_over(cataloged, said, heard, stream):
    """Down, 503, 429 and 401 in turn; the last route answers."""
    made = cataloged.responses.create(model="safe", input=said, stream=stream)
    if stream:
        *_, last = made
        made = last.response
    assert made.output_text == f"ok: {said}"
    assert heard()["model"] == "real"


def test_when_every_route_fails_the_last_failure_is_told(cataloged):
    with pytest.raises(openai.InternalServerError) as failed:
        cataloged.responses.create(model="unsafe", input="Hello")
    assert failed.value.status_code == 502
    assert failed.value.body["message"] == "The upstream failed with status 503: out of order"


def test_what_an_upstream_refuses_is_not_tried_elsewhere(cataloged, keyed):
    given = script([note("not elsewhere"), status(400, {"error": {"message": "Bad prompt."}})])
    with pytest.raises(openai.BadRequestError):
        cataloged.responses.create(model="first", input=given)
    assert keyed.asked(given) == []


def test_after_the_first_chunk_no_other_upstream_is_tried(cataloged, keyed):
    given = script([text("Once"), error("out of memory")])
    *_, last = cataloged.responses.create(model="first", input=given, stream=True)
    assert last.type == "response.failed"
    assert keyed.asked(given) == []


# -- Keys and headers -------------------------------------------------------------------------------------------------------


def test_the_key_of_an_upstream_comes_from_the_environment_and_its_headers_from_the_catalog(cataloged, keyed, said):
    cataloged.responses.create(model="keyed@x", input=said)
    [record] = keyed.asked(said)
    assert record.headers["authorization"] == f"Bearer {KEY}"
    assert record.headers["x-team"] == "blue"
    assert record.headers["x-stainless-mine"] == "kept"
    assert [name for name in record.headers if name.startswith("x-stainless-")] == ["x-stainless-mine"]


def test_headers_of_the_catalog_stand_in_the_place_of_the_usual_ones_in_any_case(cataloged, upstream, said):
    cataloged.responses.create(model="own_headers@x", input=said)
    [record] = upstream.asked(said)
    given = {"authorization": "Basic dTpw", "user-agent": "house/1", "content-type": "application/json; charset=utf-8"}
    assert {name: record.headers[name] for name in given} == given


def test_a_query_in_the_address_of_an_upstream_goes_with_every_request(cataloged, upstream, said):
    cataloged.responses.create(model="own_headers@x", input=said)
    cataloged.models.list()
    paths = {record.path for record in (*upstream.asked(said), *upstream.requests) if "?" in record.path}
    assert paths == {"/v1/chat/completions?api-version=preview", "/v1/models?api-version=preview"}


def test_a_caller_does_not_learn_that_the_servers_own_key_is_wrong_by_a_401(cataloged, said):
    with pytest.raises(openai.InternalServerError) as failed:
        cataloged.responses.create(model="locked@x", input=said)
    assert failed.value.status_code == 502
    assert failed.value.body["message"] == "Upstream 'locked' does not accept this server's key."
    assert failed.value.response.headers["x-should-retry"] == "false"


def test_the_callers_key_does_not_reach_the_upstream(served, upstream, said):
    with served.client(api_key="callers-own") as client:
        client.responses.create(model="plain@x", input=said)
    [record] = upstream.asked(said)
    assert "callers-own" not in str(record.headers)


def test_an_upstream_that_refuses_the_callers_key_lists_nothing_and_the_others_do(new_server, catalog_file, upstream):
    with OutOfOrder(401) as locked:
        catalog = catalog_file(
            f'[upstreams.locked]\nbase_url = "{locked.base_url}"\n[upstreams.open]\nbase_url = "{upstream.base_url}"'
        )
        own = new_server(REPRISE_CATALOG=catalog, REPRISE_UPSTREAM_AUTH="caller")
        with own.client(api_key=KEY) as client:
            assert {model.id.partition("@")[0] for model in client.models.list()} == {"open"}


def test_the_callers_own_key_is_passed_on_where_that_is_set(new_server, catalog_file, keyed, said):
    catalog = catalog_file(
        f'default = "keyed"\n[upstreams.keyed]\nbase_url = "{keyed.base_url}"\nheaders = {{ authorization = "Basic dTpw" }}\n[upstreams.other]\nbase_url = "http://127.0.0.1:9/v1"'
    )
    own = new_server(REPRISE_CATALOG=catalog, REPRISE_UPSTREAM_AUTH="caller")
    with own.client(api_key=KEY) as client, own.client(api_key="another") as other:
        made = client.responses.create(model="any/model", input=said)
        [record] = keyed.asked(said)
        assert (record.headers["authorization"], record.body["model"]) == (f"Bearer {KEY}", "any/model")
        assert client.models.retrieve("keyed@scripted").owned_by == "tests"
        assert keyed.requests[-1].headers["authorization"] == f"Bearer {KEY}"
        with pytest.raises(openai.AuthenticationError) as refused:
            other.responses.create(model="any/model", input="Hello")
        assert refused.value.code == "invalid_api_key"
        # Each key is a tenant of its own.
        assert client.responses.retrieve(made.id).id == made.id
        with pytest.raises(openai.NotFoundError):
            other.responses.retrieve(made.id)
    # Without one there is nobody whose data this could be, and the upstream has nothing to check.
    for method, path in (("POST", "/responses"), ("GET", f"/responses/{made.id}"), ("GET", "/models")):
        reply = httpx.request(
            method, f"{own.url}{path}", json={"model": "m", "input": said} if method == "POST" else None
        )
        assert (reply.status_code, reply.json()["error"]["code"]) == (401, "missing_api_key")
    for key in (b"schl\xc3\xbcssel", b"sk 1"):  # could not be sent as it stands
        reply = httpx.get(f"{own.url}/models/m", headers={"authorization": b"Bearer " + key})
        assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")


# -- Parameters beyond the API ----------------------------------------------------------------------------------------------


def test_what_engines_take_today_is_passed_on_and_what_the_catalog_adds(cataloged, said, heard):
    given = {
        **dict.fromkeys(("thinking_token_budget", "reasoning_budget_tokens", "n_keep", "t_max_predict_ms"), 7),
        **dict.fromkeys(("include_reasoning", "return_token_ids"), True),
        "allowed_token_ids": [1, 2],
        "vllm_xargs": {"a": 1},
        "structured_outputs": {"regex": "a+"},
        "top_n_sigma": 0.5,
        "lora": [{"id": 0, "scale": 0.5}],
        "dry_sequence_breakers": ["\n"],
        "house_rule": {"a": 1},
    }
    cataloged.responses.create(model="ruled@x", input=said, extra_body=given)
    assert {name: heard()[name] for name in given} == given


@pytest.mark.parametrize(("model", "name"), [("plain@x", "house_rule"), ("ruled@x", "nonsense")])
def test_a_parameter_that_the_upstream_does_not_take_is_unknown(cataloged, said, model, name):
    with pytest.raises(openai.BadRequestError) as refused:
        cataloged.responses.create(model=model, input=said, extra_body={name: 1})
    assert (refused.value.code, refused.value.param) == ("unknown_parameter", name)


def test_of_several_routes_each_gets_what_it_takes(cataloged, upstream, said):
    cataloged.responses.create(model="mixed", input=said, extra_body={"top_k": 5, "house_rule": 1})
    [record] = upstream.asked(said)
    assert (record.body["top_k"], "house_rule" in record.body) == (5, False)


# -- Dialects ---------------------------------------------------------------------------------------------------------------

TOOL = {"type": "function", "name": "f", "strict": True}
SHELL = {"type": "custom", "name": "shell", "description": "Runs a command."}
GRAMMAR = {"type": "grammar", "syntax": "lark", "definition": 'start: "yes"'}


def test_what_an_upstream_lacks_is_left_out_where_nothing_is_lost(cataloged, said, heard):
    cataloged.responses.create(
        model="poor@x",
        input=said,
        tools=[TOOL],
        parallel_tool_calls=False,
        reasoning={"effort": "low"},
        text={"verbosity": "low"},
    )
    assert heard() == {
        "model": "x",
        "messages": [{"role": "user", "content": said}],
        "stream": True,
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}],
    }


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"text": {"format": {"type": "json_object"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {}}}}, "text.format"),
        ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
    ],
    ids=str,
)
@pytest.mark.parametrize("background", [False, True])
def test_what_an_upstream_lacks_is_refused_at_once_where_the_client_depends_on_it(
    cataloged, upstream, said, given, param, background
):
    with pytest.raises(openai.BadRequestError) as refused:
        cataloged.responses.create(model="poor@x", input=said, background=background, **given)
    assert (refused.value.code, refused.value.param) == ("unsupported_parameter", param)
    assert upstream.asked(said) == []


def test_an_upstream_without_parts_gets_texts_joined(cataloged, upstream):
    parts = [{"type": "input_text", "text": "Hello"}, {"type": "input_text", "text": "test_catalog"}]
    cataloged.responses.create(model="poor@x", input=[{"role": "user", "content": parts}])
    [record] = upstream.asked("Hello\ntest_catalog")
    assert record.body["messages"] == [{"role": "user", "content": "Hello\ntest_catalog"}]


def test_an_upstream_of_one_system_message_gets_later_ones_from_the_user(cataloged, upstream, said):
    cataloged.responses.create(
        model="poor@x",
        instructions="Be brief.",
        input=[
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": "Hi"},
            {"role": "system", "content": "Now be rude."},
            {"role": "user", "content": said},
        ],
    )
    [record] = upstream.asked(f"Hi\n\nNow be rude.\n\n{said}")
    assert record.body["messages"] == [
        {"role": "system", "content": "Be brief.\n\nBe kind."},
        {"role": "user", "content": f"Hi\n\nNow be rude.\n\n{said}"},
    ]


def test_parts_of_the_first_system_message_are_joined_with_the_instructions(cataloged, said, heard):
    parts = [{"type": "input_text", "text": "Be kind."}, {"type": "input_text", "text": "Be quick."}]
    cataloged.responses.create(
        model="templated@x",
        instructions="Be brief.",
        input=[{"role": "system", "content": parts}, {"role": "user", "content": said}],
    )
    assert heard()["messages"] == [
        {"role": "system", "content": "Be brief.\n\nBe kind.\nBe quick."},
        {"role": "user", "content": said},
    ]


def test_usage_is_null_from_an_upstream_that_cannot_be_asked_for_it(cataloged, said):
    assert cataloged.responses.create(model="poor@x", input=said).usage is None


def test_the_hosted_dialect_is_spoken_in_full(cataloged, said, heard):
    cataloged.responses.create(
        model="hosted@x",
        instructions="Be brief.",
        input=[
            {"role": "system", "content": "Be kind."},
            {"role": "developer", "content": "Be quick."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
            {"role": "user", "content": said},
        ],
        max_output_tokens=20,
        text={"verbosity": "low"},
        tools=[TOOL, {**SHELL, "format": GRAMMAR}],
        tool_choice={"type": "custom", "name": "shell"},
    )
    body = heard()
    assert body.pop("messages") == [
        {"role": "developer", "content": "Be brief."},
        {"role": "system", "content": "Be kind."},
        {"role": "developer", "content": "Be quick."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "refusal": "No."},
        {"role": "user", "content": said},
    ]
    assert body == {
        "model": "x",
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_completion_tokens": 20,
        "verbosity": "low",
        "tools": [
            {
                "type": "function",
                "function": {"name": "f", "parameters": {"type": "object", "properties": {}}, "strict": True},
            },
            {
                "type": "custom",
                "custom": {
                    "name": "shell",
                    "description": "Runs a command.",
                    "format": {"type": "grammar", "grammar": {"syntax": "lark", "definition": 'start: "yes"'}},
                },
            },
        ],
        "tool_choice": {"type": "custom", "custom": {"name": "shell"}},
    }


@pytest.mark.parametrize("store", [True, False])
def test_images_of_mcp_tools_reach_a_model_that_sees_them(cataloged, upstream, name, mcp, store):
    given = script([note(name), *calling("image", {})])
    made = cataloged.responses.create(model="hosted@x", input=given, tools=[mcp()], store=store)
    kept = {"previous_response_id": made.id} if store else {}
    more = {"role": "user", "content": f"And now, {name}?"}
    history = [] if store else [{"role": "user", "content": given}, *(item.to_dict() for item in made.output)]
    cataloged.responses.create(model="hosted@x", input=[*history, more], tools=[mcp()], store=store, **kept)
    asked = (
        one for one in upstream.requests if "messages" in (one.body or {})
    )  # others call it as if it were a tool server
    _, *later = (one for one in asked if one.body["messages"][0]["content"] == given)
    assert len(later) == 2
    for record in later:
        _, _, result, attached, *_ = record.body["messages"]
        assert result["content"].startswith("[image/png, 16 bytes]")
        assert attached["content"][1]["image_url"]["url"].startswith("data:image/png;base64,")


def test_a_model_that_does_not_see_them_reads_that_there_was_an_image(cataloged, upstream, name, mcp):
    given = script([note(name), *calling("image", {})], answer("A dot."))
    made = cataloged.responses.create(model="plain@x", input=given, tools=[mcp()])
    assert "images" not in made.output[1].to_dict()
    assert upstream.asked(given)[1].body["messages"][-1]["content"] == "[image/png, 16 bytes]"


def test_a_native_custom_call_comes_and_goes_as_one(cataloged, upstream):
    given = script(
        [
            call(id="call_c", custom={"name": "shell", "input": ""}),
            call(custom={"input": "ls "}),
            call(custom={"input": "-l"}),
            finish("tool_calls"),
        ],
        answer("Listed."),
    )
    events = list(cataloged.responses.create(model="hosted@x", input=given, tools=[SHELL], stream=True))
    deltas = [event.delta for event in events if event.type == "response.custom_tool_call_input.delta"]
    made = events[-1].response
    assert (deltas, made.output[0].input, made.output[0].call_id) == (["ls ", "-l"], "ls -l", "call_c")
    output = {"type": "custom_tool_call_output", "call_id": "call_c", "output": "a.txt"}
    cataloged.responses.create(model="hosted@x", previous_response_id=made.id, input=[output], tools=[SHELL])
    _, asked = upstream.asked(given)
    assert asked.body["messages"][1:] == [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_c", "type": "custom", "custom": {"name": "shell", "input": "ls -l"}}],
        },
        {"role": "tool", "tool_call_id": "call_c", "content": "a.txt"},
    ]


def test_a_grammar_is_refused_by_a_dialect_that_says_so(cataloged, said):
    with pytest.raises(openai.BadRequestError) as refused:
        cataloged.responses.create(model="wrapping@x", input=said, tools=[{**SHELL, "format": GRAMMAR}])
    assert (refused.value.code, refused.value.param) == ("unsupported_parameter", "tools")


@pytest.mark.parametrize(("name", "key"), [("thinker", "reasoning_content"), ("reasoner", "reasoning")])
def test_earlier_reasoning_is_passed_back_to_an_upstream_that_takes_it(cataloged, said, heard, name, key):
    first = cataloged.responses.create(
        model=f"{name}@x",
        input=script([note(name), reasoning("Hm."), text("</think>" * (name == "thinker") + "Hi"), finish()]),
    )
    assert first.output_text == "Hi"
    cataloged.responses.create(model=f"{name}@x", previous_response_id=first.id, input=said)
    assert heard()["messages"][1] == {"role": "assistant", "content": "Hi", key: "Hm."}


def test_sealed_reasoning_of_a_client_that_keeps_its_own_history_is_opened(cataloged, said, heard):
    first = cataloged.responses.create(
        model="reasoner@x",
        input=script([reasoning("A long thought."), text("Hi"), finish()]),
        store=False,
    )
    thought, message = first.output
    sealed = {"type": "reasoning", "id": thought.id, "summary": [], "encrypted_content": thought.encrypted_content}
    cataloged.responses.create(
        model="reasoner@x",
        store=False,
        input=[{"role": "user", "content": "Hi"}, sealed, message.to_dict(), {"role": "user", "content": said}],
    )
    assert heard()["messages"][1] == {"role": "assistant", "content": "Hi", "reasoning": "A long thought."}


@pytest.mark.parametrize("background", [False, True])
def test_reasoning_that_this_server_did_not_seal_is_refused(cataloged, background):
    first = cataloged.responses.create(
        model="reasoner@x", input=script([reasoning("Hm."), text("Hi"), finish()]), store=False
    )
    thought = first.output[0].encrypted_content
    changed = thought[:-9] + ("A" if thought[-9] != "A" else "B") + thought[-8:]
    for sealed in ("gAAAAABother", changed):
        item = {"type": "reasoning", "id": "rs_x", "summary": [], "encrypted_content": sealed}
        with pytest.raises(openai.BadRequestError) as refused:
            cataloged.responses.create(
                model="reasoner@x", input=[{"role": "user", "content": "Hi"}, item], background=background
            )
        assert (refused.value.code, refused.value.param) == ("invalid_encrypted_content", "input[1].encrypted_content")


@pytest.mark.parametrize(
    ("name", "thought", "answered"),
    [("thinker", ["Hm."], "Hi"), ("reasoner", [], "Hm.</think>\n\nHi"), ("plain", [], "Hm.</think>\n\nHi")],
)
def test_where_thinking_begins_is_the_dialects_to_say(cataloged, name, thought, answered):
    given = script([note(name), text("Hm.</th"), text("ink>\n\nHi"), finish()])
    made = cataloged.responses.create(model=f"{name}@x", input=given)
    assert [one.content[0].text for one in made.output if one.type == "reasoning"] == thought
    assert made.output_text == answered


def test_thoughts_in_the_middle_of_an_answer_are_reasoning_where_the_dialect_says_so(cataloged):
    given = script([text("Well <thi"), text("nk>hm</think>\nyes, "), text("<b>."), finish()])
    made = cataloged.responses.create(model="rambler@x", input=given)
    assert [(one.type, one.content[0].text) for one in made.output] == [
        ("message", "Well "),
        ("reasoning", "hm"),
        ("message", "yes, <b>."),
    ]


def test_a_dialect_that_leaves_content_alone_takes_think_tags_as_text(cataloged):
    made = cataloged.responses.create(model="reasoner@x", input=script([text("<think>Hm.</think>Hi"), finish()]))
    assert made.output_text == "<think>Hm.</think>Hi"


@pytest.mark.parametrize("name", ["plain", "hosted"])
def test_a_refusal_comes_as_a_refusal_in_every_dialect(cataloged, name):
    made = cataloged.responses.create(model=f"{name}@x", input=script([note(name), refusal("No."), finish()]))
    assert made.output[0].content[0].to_dict() == {"type": "refusal", "refusal": "No."}


@pytest.mark.parametrize(
    ("url", "dialect"),
    [
        ("https://api.openai.com/v1", HOSTED),
        ("http://127.0.0.1:8000/v1", Dialect()),
        ("https://eu.api.openai.com/v1", HOSTED),
        ("https://house.openai.azure.com/openai/v1", HOSTED),
        ("https://api.openai.com.example.org/v1", Dialect()),
        ("https://notapi.openai.com/v1", Dialect()),
    ],
)
def test_the_hosted_api_is_known_by_its_host(url, dialect):
    assert UpstreamEntry(base_url=url).speaks == dialect


# -- Bad files --------------------------------------------------------------------------------------------------------------

GOOD = '[upstreams.a]\nbase_url = "http://127.0.0.1:1/v1"\n'


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("", "Object missing required field `upstreams`"),
        ("[upstreams]", "Expected `object` of length >= 1 - at `$.upstreams`"),
        ("upstreams = 7", "Expected `object`, got `int` - at `$.upstreams`"),
        ("[upstreams.a", "Expected ']' at the end of a table declaration"),
        ("[upstreams.a]", "[upstreams.a]: Object missing required field `base_url`"),
        (GOOD + 'colour = "red"', "unknown field `colour`"),
        (GOOD + "attempts_max = 0", "attempts_max"),
        (GOOD + 'dialect = { lacks = ["everything"] }', "everything"),
        (GOOD + 'key_env = "NOT_THERE"', "upstream 'a' needs the environment variable NOT_THERE."),
        ('default = "b"\n' + GOOD, "'default' names an unknown upstream 'b'; there are a."),
        (GOOD + '[[models]]\nname = "m"\nroutes = []', "length >= 1"),
        (
            GOOD + '[[models]]\nname = "m"\nroutes = [{ upstream = "b" }]',
            "model 'm' names an unknown upstream 'b'; there are a.",
        ),
        (
            '[upstreams.a]\nbase_url = "127.0.0.1:1/v1"',
            "[upstreams.a]: Expected `str` matching regex '^https?://' - at `$.base_url`",
        ),
    ],
)
def test_a_bad_catalog_is_told_in_one_line_that_names_the_file(catalog_file, toml, message):
    path = catalog_file(toml)
    with pytest.raises(SettingsError) as wrong:
        load_catalog(Settings(catalog=path), {})
    assert path in str(wrong.value)
    assert message in str(wrong.value)
    assert "\n" not in str(wrong.value)


@pytest.mark.parametrize("name", ["missing.toml", ""])
def test_a_file_that_cannot_be_read_is_told(tmp_path: Path, name: str):
    with pytest.raises(SettingsError, match="can't be read"):
        load_catalog(Settings(catalog=str(tmp_path / name)), {})


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("localhost:8000/v1", "is no http:// or https:// URL"),
        ("http://h:abc/v1", "is no http:// or https:// URL"),
        ("http://[::1/v1", "is no http:// or https:// URL"),
        ("http://", "is no http:// or https:// URL"),
        ("ftp://h/v1", "is no http:// or https:// URL"),
        ("sk-secret", "is no http:// or https:// URL"),
        ("http://user:secret@h/v1", "holds a user or a password"),
        ("https://secret@h/v1", "holds a user or a password"),
    ],
)
def test_an_upstream_that_is_no_url_is_told_without_a_quotation(tmp_path: Path, url: str, said: str):
    with pytest.raises(SettingsError, match=rf"^OPENAI_BASE_URL {said}[^\n]*\.$") as wrong:
        load_catalog(Settings(openai_base_url=url), {})
    assert "secret" not in str(wrong.value)
    path = tmp_path / "catalog.toml"
    path.write_text(f'upstreams.local.base_url = "{url}"')
    with pytest.raises(SettingsError, match="local") as wrong:
        load_catalog(Settings(catalog=str(path)), {})
    assert "secret" not in str(wrong.value)


def test_an_address_is_shown_without_its_query():
    assert UpstreamEntry(base_url="https://h/v1?key=secret").address == "https://h/v1"


@pytest.mark.parametrize("key", ["schl\u00fcssel", "sk-1\u20132", "sk-1\n", "sk 1"])
def test_a_key_that_is_none_is_told_without_a_quotation(key: str):
    with pytest.raises(SettingsError, match=r"^OPENAI_API_KEY holds characters that no key has\.$"):
        load_catalog(Settings(openai_base_url="http://h/v1", openai_api_key=key), {})


def test_a_file_that_is_not_utf8_is_told(tmp_path: Path):
    path = tmp_path / "catalog.toml"
    path.write_bytes(b'default = "\xff"')
    with pytest.raises(SettingsError, match=r"catalog\.toml: "):
        load_catalog(Settings(catalog=str(path)), {})


def test_a_server_with_a_bad_catalog_does_not_start_and_says_why_in_one_line(base_env, new_database, catalog_file):
    path = catalog_file('default = "b"\n' + GOOD)
    env = {**base_env, "DATABASE_URL": new_database(), "REPRISE_CATALOG": path, "REPRISE_PORT": "0"}
    ended = reprise(env, "serve")
    assert (ended.returncode, ended.stdout, ended.stderr) == (
        1,
        "",
        f"reprise: {path}: 'default' names an unknown upstream 'b'; there are a.\n",
    )
