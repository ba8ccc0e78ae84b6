"""Counts of tokens: what is counted, by which endpoint of the upstream, and what becomes of a count that fails."""

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tests.conftest import NewServer
from tests.servers import Served
from tests.upstream import Upstream, answer, call, endpoint, finish, gate, no_usage, note, script, status
from tests.waiting import count as rows

CATALOG = """
[upstreams.vllm]
base_url = "{base}?api-version=1"
dialect = "vllm"

[upstreams.llama]
base_url = "{base}"
dialect = "llama.cpp"

[upstreams.old_llama]
base_url = "{base}"
dialect = {{ preset = "llama.cpp", count_tokens = ["apply_template", "usage"] }}

[upstreams.plain]
base_url = "{base}"
dialect = "plain"

[upstreams.hosted]
base_url = "{base}"
dialect = "openai"

[upstreams.free]
base_url = "{base}"
dialect = {{ preset = "vllm", count_tokens = ["tokenize"] }}

[upstreams.slow]
base_url = "{base}"
dialect = "vllm"
answer_timeout_s = 0.5

[upstreams.down]
base_url = "{down}"
dialect = "vllm"
attempts_max = 1

[[models]]
name = "spare"
routes = [{{ upstream = "down", model = "scripted" }}, {{ upstream = "vllm", model = "scripted" }}]
"""

CHAT, TOKENIZE, INPUT_TOKENS = "/v1/chat/completions", "/tokenize", "/v1/chat/completions/input_tokens"
LOOK = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {}}, "strict": False}
IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}


@pytest.fixture(scope="module")
def server(new_cataloged: NewServer, upstream: Upstream) -> Iterator[Served]:
    """A server with an upstream of each dialect, which counts one request at a time."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        down = f"http://127.0.0.1:{free.getsockname()[1]}/v1"  # bound and not listening
        yield new_cataloged(
            CATALOG.format(base=upstream.base_url, down=down),
            REPRISE_TOKEN_COUNT_BYTES_MAX="4096",
            REPRISE_TOKEN_COUNTS_MAX="1",
            REPRISE_CONTEXTS_BYTES_MAX="1000000",
            REPRISE_CONTEXT_WAIT_S="2",
        )


def counted(client, model, given, **options):
    found = client.responses.input_tokens.count(model=model, input=given, **options)
    assert found.object == "response.input_tokens"
    return found.input_tokens


def paths(upstream, given):
    """The paths below which this last user message came, without their queries."""
    return [record.path.partition("?")[0] for record in upstream.asked(given)]


def refused(client, model, given, **options):
    """The body of a 400."""
    with pytest.raises(openai.BadRequestError) as caught:
        counted(client, model, given, **options)
    return caught.value.body


# -- What is counted --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("by", "asked"),
    [
        ("vllm", [TOKENIZE]),
        ("llama", [INPUT_TOKENS]),
        ("old_llama", ["/apply-template"]),  # its /tokenize gets the prompt as a text
        ("plain", [CHAT]),
        ("hosted", [CHAT]),
    ],
)
def test_the_count_is_that_of_the_request_that_the_model_would_get(client, upstream, said, by, asked):
    model, options = f"{by}@scripted", {"instructions": "Be brief, please.", "tools": [LOOK]}
    first = client.responses.create(model=model, input=f"before {said}", **options)
    count = counted(client, model, said, previous_response_id=first.id, **options)
    assert paths(upstream, said) == asked
    made = client.responses.create(model=model, input=said, previous_response_id=first.id, **options)
    assert count == made.usage.input_tokens == len(f"Be brief, please. before {said} ok: before {said} {said}".split())
    counting, creating = (record.body for record in upstream.asked(said))
    assert counting["messages"] == creating["messages"]
    assert counting["tools"] == creating["tools"]


def test_vllm_is_asked_for_the_generation_prompt_with_what_else_its_template_reads(client, upstream, said):
    kwargs = {"enable_thinking": False}
    counted(client, "vllm@scripted", said, extra_body={"chat_template_kwargs": kwargs, "top_k": 7})
    [record] = upstream.asked(said)
    assert record.path == "/tokenize?api-version=1"
    messages = [{"role": "user", "content": said}]
    assert record.body == {
        "model": "scripted",
        "messages": messages,
        "add_generation_prompt": True,
        "chat_template_kwargs": kwargs,
    }


@pytest.mark.parametrize(("by", "limit"), [("plain", {"max_tokens": 1}), ("hosted", {"max_completion_tokens": 1})])
def test_a_completion_for_a_count_has_one_token_and_is_not_streamed(client, upstream, said, by, limit):
    counted(client, f"{by}@scripted", said, extra_body={"min_tokens": 5})
    [record] = upstream.asked(said)
    assert record.body == {
        "model": "scripted",
        "messages": [{"role": "user", "content": said}],
        "stream": False,
        **limit,
    }


def test_a_model_that_needs_room_to_reason_gets_some(client, upstream, said):
    words = "Could not finish the message because max_tokens or model output limit was reached."
    given = script([note(said), status(400, {"error": {"message": words}}, times=1), *answer("Hm.")])
    assert counted(client, "hosted@scripted", given) == len(given.split())
    assert [record.body["max_completion_tokens"] for record in upstream.asked(given)] == [1, 256]


@pytest.mark.parametrize(
    "options",
    [
        {"reasoning": {"effort": "low"}},
        {"tools": [LOOK], "tool_choice": "required"},
        {"text": {"format": {"type": "json_object"}}},
        {"extra_body": {"documents": [{"text": "Of the sea."}]}},
    ],
)
def test_what_an_endpoint_would_not_count_is_counted_by_a_completion(client, upstream, said, options):
    counted(client, "vllm@scripted", said, **options)
    assert paths(upstream, said) == [CHAT]


@pytest.mark.parametrize(("by", "asked"), [("vllm", CHAT), ("old_llama", CHAT), ("llama", INPUT_TOKENS)])
def test_images_are_counted_by_what_expands_them(client, upstream, said, by, asked):
    parts = [{"type": "input_text", "text": said}, IMAGE]
    counted(client, f"{by}@scripted", [{"role": "user", "content": parts}])
    assert paths(upstream, said) == [asked]


def test_nothing_is_stored_and_no_approval_is_used_up(client, server, upstream, toolserver, mcp, name, said):
    tools = [mcp(require_approval="always", options={"tools": "echo"})]
    given = script([note(said), call("echo", {"text": "hi"}, id="c1"), finish("tool_calls")], answer("Done."))
    first = client.responses.create(model="plain@m", input=given, tools=tools)
    [asked] = [item for item in first.output if item.type == "mcp_approval_request"]
    decided = [{"type": "mcp_approval_response", "approval_request_id": asked.id, "approve": True}]
    before = [rows(server.database_url, table) for table in ("responses", "items", "approvals")]
    for _ in range(2):
        counted(client, "plain@m", decided, tools=tools, previous_response_id=first.id)
    assert [rows(server.database_url, table) for table in ("responses", "items", "approvals")] == before
    assert toolserver.calls(name) == []
    made = client.responses.create(model="plain@m", input=decided, tools=tools, previous_response_id=first.id)
    assert made.output_text == "Done."


def test_tools_that_are_not_listed_yet_do_not_count(client, upstream, toolserver, mcp, name, said):
    counted(client, "vllm@m", said, tools=[mcp(), LOOK])
    [record] = upstream.asked(said)
    assert [tool["function"]["name"] for tool in record.body["tools"]] == ["look"]
    assert toolserver.asked(name) == []


def test_a_conversation_is_counted_also_while_a_response_is_appended_to_it(client, upstream, said):
    conversation = client.conversations.create(
        items=[{"type": "message", "role": "user", "content": f"before {said}"}]
    ).id
    words = len(f"before {said} {said}".split())
    assert counted(client, "vllm@m", said, conversation=conversation) == words
    writing = script([note(said), gate(said), *answer("Hm.")])
    with ThreadPoolExecutor(1) as threads:
        made = threads.submit(client.responses.create, model="plain@m", input=writing, conversation=conversation)
        upstream.wait_reached(said)
        try:
            assert counted(client, "llama@m", said, conversation=conversation) == words
        finally:
            upstream.open(said)
        assert made.result().status == "completed"
    assert [item.type for item in client.conversations.items.list(conversation)] == ["message"] * 3
    longer = counted(client, "vllm@m", said, conversation={"id": conversation})
    assert longer == words + len(f"{writing} Hm.".split())


def test_a_trigger_of_a_compaction_does_not_count(client, said):
    trigger = {"type": "compaction_trigger"}
    asked = {"role": "user", "content": said}
    assert counted(client, "vllm@m", [asked, trigger]) == counted(client, "plain@m", [asked]) == len(said.split())


# -- Parameters -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "extra",
    [
        {"stream": True},
        {"store": False},
        {"background": True},
        {"temperature": 1},
        {"max_output_tokens": 100},
        {"metadata": {}},
        {"include": []},
        {"max_tokens": 5},
        {"no_such_thing": 1},
    ],
)
def test_a_parameter_of_another_endpoint_is_refused(client, said, extra):
    [name] = extra
    body = refused(client, "plain@m", said, extra_body=extra)
    assert (body["code"], body["param"]) == ("unknown_parameter", name)
    assert body["message"] == f"Unknown parameter: '{name}'."


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"messages": []}, "Unknown parameter: 'messages'. Did you mean 'input'?"),
        ({"model": None}, "Missing required parameter: 'model'."),
        ({"input": None}, "Missing required parameter: 'input'."),
        ({"personality": "x" * 65}, "Invalid value for 'personality': expected a string of length <= 64."),
        ({"personality": 7}, "Invalid type for 'personality': expected a string or null, got an integer instead."),
        ({"input": [{"type": "message", "role": "chorus", "content": "x"}]}, None),
        ({"previous_response_id": "resp_none"}, "Previous response with id 'resp_none' not found."),
        ({"prompt": {"id": "x"}}, "Unknown parameter: 'prompt'."),
    ],
)
def test_a_bad_count_is_refused_as_a_bad_create_is(http, given, message):
    reply = http.post("/responses/input_tokens", json={"model": "plain@m", "input": "hi", **given})
    assert reply.status_code == 400
    assert message in {None, reply.json()["error"]["message"]}


CONNECTOR = {"type": "mcp", "server_label": "a", "connector_id": "connector_dropbox"}


@pytest.mark.parametrize("given", [{"conversation": "conv_none"}, {"tools": [CONNECTOR]}])
def test_what_a_create_refuses_a_count_refuses_in_the_same_words(http, given):
    body = {"model": "plain@m", "input": "hi", **given}
    create, count = http.post("/responses", json=body), http.post("/responses/input_tokens", json=body)
    assert create.status_code == count.status_code >= 400
    assert create.json() == count.json()


def test_every_parameter_of_a_count_is_taken(client, said):
    assert counted(
        client,
        "plain@m",
        said,
        instructions=None,
        tools=[],
        tool_choice="auto",
        text={"format": {"type": "text"}},
        reasoning={"effort": "low"},
        truncation="auto",
        parallel_tool_calls=True,
        personality="friendly",
        extra_body={"previous_response_id": None, "conversation": None},
    ) == len(said.split())


def test_what_the_upstream_can_not_be_asked_is_refused(client):
    file = [{"role": "user", "content": [{"type": "input_file", "filename": "a.pdf"}]}]
    assert refused(client, "vllm@m", file)["code"] == "unsupported_parameter"


# -- Upstreams that do not count --------------------------------------------------------------------------------------------

LONG = list(range(2_000))
NO_COUNT = [
    endpoint(TOKENIZE, {"detail": "Not Found"}, code=404),
    endpoint(TOKENIZE, {"error": {"message": "not for this model"}}, code=501),
    endpoint(TOKENIZE, "<html>"),
    endpoint(TOKENIZE, [1, 2]),
    endpoint(TOKENIZE, {"tokens": [1, 2]}),
    endpoint(TOKENIZE, {"count": 0, "tokens": []}),
    endpoint(TOKENIZE, {"count": -3}),
    endpoint(TOKENIZE, {"count": "12"}),
    endpoint(TOKENIZE, {"count": len(LONG), "tokens": LONG}),
]


@pytest.mark.parametrize("step", NO_COUNT, ids=lambda step: str(step)[:60])
def test_an_endpoint_that_does_not_count_is_passed_over(client, upstream, said, step):
    given = script([note(said), step, *answer("Hm.")])
    assert counted(client, "vllm@m", given) == len(given.split())
    assert paths(upstream, given) == [TOKENIZE, CHAT]
    body = refused(client, "free@m", given)
    assert (body["code"], body["param"]) == ("token_count_not_available", "model")
    assert paths(upstream, given) == [TOKENIZE, CHAT, TOKENIZE]


@pytest.mark.parametrize(
    "step",
    [
        endpoint("/apply-template", {"error": {"message": "File Not Found"}}, code=404),
        endpoint("/apply-template", {"prompt": ["no", "text"]}),
        endpoint("/apply-template", {"prompt": ""}),  # of which there are no tokens
        endpoint("/apply-template", {"prompt": "x" * 5_000}),
    ],
    ids=lambda step: str(step)[:60],
)
def test_a_template_that_gives_no_prompt_is_passed_over(client, upstream, said, step):
    given = script([note(said), step, *answer("Hm.")])
    assert counted(client, "old_llama@m", given) == len(given.split())
    assert paths(upstream, given) == ["/apply-template", CHAT]


def test_an_upstream_that_reports_no_usage_can_not_count(client, said):
    body = refused(client, "plain@m", script([note(said), *answer("Hm."), no_usage()]))
    assert body["code"] == "token_count_not_available"
    assert "upstream 'plain' has nothing that counts them" in body["message"]


def test_the_upstreams_refusal_is_that_of_a_create(client, said):
    words = "The model `m` does not exist."
    given = script([note(said), status(404, {"error": {"message": words, "code": "model_not_found"}})])
    with pytest.raises(openai.NotFoundError) as caught:
        counted(client, "plain@m", given)
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("code", [500, 503])
def test_an_endpoint_that_fails_is_an_error_where_nothing_else_counts(client, said, code):
    given = script([note(said), endpoint(TOKENIZE, {"detail": "out of order"}, code=code), *answer("Hm.")])
    with pytest.raises(openai.InternalServerError, match="out of order") as caught:
        counted(client, "free@m", given)
    assert caught.value.status_code == 502
    assert counted(client, "vllm@m", given) == len(given.split())


def test_an_endpoint_that_does_not_answer_is_a_timeout(client, upstream, said):
    given = script([note(said), endpoint(TOKENIZE, {"count": 1}, gate=said)])
    with pytest.raises(openai.InternalServerError, match="did not answer in time") as caught:
        counted(client, "slow@m", given)
    assert caught.value.status_code == 504
    [record] = upstream.asked(given)
    assert record.closed.wait(5)
    assert record.peer_left


def test_the_next_route_counts_where_the_first_is_down(client, upstream, said):
    assert counted(client, "spare", said) == len(said.split())
    assert paths(upstream, said) == [TOKENIZE]


# -- Repeated and concurrent counts -----------------------------------------------------------------------------------------


def test_a_count_is_remembered_by_the_whole_request(client, upstream, said):
    first = counted(client, "vllm@m", said)
    assert counted(client, "vllm@m", said, personality="friendly", truncation="auto") == first
    assert len(upstream.asked(said)) == 1
    assert counted(client, "vllm@m", said, instructions="Be brief.") == first + 2
    assert counted(client, "vllm@n", said) == first
    assert counted(client, "llama@m", said) == first
    assert [record.body["model"] for record in upstream.asked(said)] == ["m", "m", "n", "m"]


def test_the_room_of_a_counted_context_is_released(client, said):
    for number in range(3):
        assert counted(client, "vllm@m", f"{number} {said} " + "x" * 600_000) == len(said.split()) + 2


def test_a_failed_count_is_not_remembered(client, upstream, said):
    given = script([note(said), status(400, times=1), *answer("Hm.")])
    refused(client, "plain@m", given)
    assert counted(client, "plain@m", given) == len(given.split())


def test_too_many_counts_at_once_are_refused_and_a_client_that_leaves_makes_room(client, server, upstream, said):
    given = script([note(said), endpoint(TOKENIZE, {"count": 12}, gate=said)])
    with server.client() as leaving, ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(counted, leaving, "vllm@m", given, timeout=2)
        upstream.wait_reached(said)
        with pytest.raises(openai.RateLimitError, match="Too many tokens are being counted"):
            counted(client, "vllm@m", f"more {said}")
        with pytest.raises(openai.APITimeoutError):
            waiting.result()
    [record] = upstream.asked(given)
    assert record.closed.wait(5)
    assert record.peer_left
    assert counted(client, "vllm@m", f"more {said}") == len(said.split()) + 1
