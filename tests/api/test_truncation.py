"""`truncation: auto`: what of a long context reaches the upstream, once that has refused the whole."""

import openai
import pytest

from tests.conftest import NewServer
from tests.servers import Served
from tests.upstream import Upstream, answer, call, calling, endpoint, finish, note, script, status
from tests.waiting import until

CATALOG = """
default = "plain"

[upstreams.plain]
base_url = "{base}"
dialect = "plain"

[upstreams.vllm]
base_url = "{base}"
dialect = "vllm"

[upstreams.silent]
base_url = "{base}"
dialect = "plain"
context_tokens = 4_000

[[models]]
name = "small"
routes = [{{ upstream = "silent", context_tokens = 2_000 }}]

[[models]]
name = "counted"
routes = [{{ upstream = "vllm", context_tokens = 40 }}]
"""


@pytest.fixture(scope="module")
def server(new_cataloged: NewServer, upstream: Upstream) -> Served:
    """A server with upstreams that refuse long prompts, and one that is known to cut them."""
    return new_cataloged(CATALOG.format(base=upstream.base_url))


def refusal(words, times=1):
    return status(400, {"error": {"message": words, "type": "BadRequestError", "code": 400}}, times=times)


def too_long(tokens, times=1):
    words = f"This model's maximum context length is 100 tokens. However, your messages resulted in {tokens} tokens."
    return refusal(words, times)


def at_least(tokens_max):
    """A refusal before the whole prompt is counted."""
    words = f"This model's maximum context length is {tokens_max} tokens. However, your prompt contains at least {tokens_max + 1}."
    return refusal(words)


def history(turns):
    """So many turns, each with a call and its output."""
    items = []
    for turn in range(turns):
        items += [
            {"role": "user", "content": f"question {turn}"},
            {"type": "function_call", "call_id": f"c{turn}", "name": "look", "arguments": "{}"},
            {"type": "function_call_output", "call_id": f"c{turn}", "output": "x" * 2_000},
            {"role": "assistant", "content": f"answer {turn}"},
        ]
    return items


def questions(record):
    """The user's messages that the upstream got, without the last one."""
    return [message["content"] for message in record.body["messages"] if message["role"] == "user"][:-1]


def make(client, given, turns=10, model="scripted", truncation="auto", **options):
    asked = {"role": "user", "content": given}
    return client.responses.create(
        model=model, input=[*history(turns), asked], instructions="Be brief.", truncation=truncation, **options
    )


def test_only_the_oldest_turns_that_do_not_fit_are_left_out(client, upstream, said):
    given = script([note(said), too_long(120), *answer("Fine.")])
    made = make(client, given)
    assert (made.status, made.output_text, made.truncation) == ("completed", "Fine.", "auto")
    whole, shorter = upstream.asked(given)
    assert questions(whole) == [f"question {turn}" for turn in range(10)]
    assert questions(shorter) == [f"question {turn}" for turn in range(2, 10)]
    system, first, called, output, *_ = shorter.body["messages"]
    assert (system["role"], system["content"]) == ("system", "Be brief.")
    assert (first["content"], called["tool_calls"][0]["id"], output["tool_call_id"]) == ("question 2", "c2", "c2")
    items = client.responses.input_items.list(made.id, limit=100)
    assert len(items.data) == 41  # stored whole


def test_each_refusal_leaves_out_more_until_the_last_turn_is_left(client, upstream, said):
    given = script([note(said), too_long(200, times=None)])
    with pytest.raises(openai.BadRequestError, match="resulted in 200 tokens") as caught:
        make(client, given)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input")
    left = [len(questions(record)) for record in upstream.asked(given)]
    assert left == sorted(set(left), reverse=True)
    assert left[:2] == [10, 4]  # half of the prompt, and of the instructions and the last turn
    assert left[-1] == 0


def test_the_next_turns_of_a_run_begin_where_the_first_did(client, upstream, said, mcp, name):
    first = [note(said), too_long(150), *calling("echo", {"text": "hi"})]
    given = script(first, answer("Fine."))
    made = make(client, given, tools=[mcp()])
    assert made.output_text == "Fine."
    whole, shorter, second = upstream.asked(given)
    assert questions(whole) == [f"question {turn}" for turn in range(10)]
    assert questions(shorter) == questions(second) != questions(whole)
    assert [message["role"] for message in second.body["messages"][-2:]] == ["assistant", "tool"]


def test_a_background_run_is_truncated_too(client, upstream, said):
    given = script([note(said), too_long(120), *answer("Fine.")])
    made = make(client, given, background=True)
    until(lambda: client.responses.retrieve(made.id).output_text == "Fine.")
    assert [len(questions(record)) for record in upstream.asked(given)] == [10, 8]


def test_a_chain_is_truncated_by_turns(client, upstream, said):
    previous = None
    for turn in range(4):
        previous = client.responses.create(
            model="scripted", input=f"{turn} of {said}", previous_response_id=previous
        ).id
    given = script([note(said), too_long(105), *answer("Fine.")])
    client.responses.create(model="scripted", input=given, previous_response_id=previous, truncation="auto")
    assert [len(questions(record)) for record in upstream.asked(given)] == [4, 3]


def test_a_call_that_the_last_input_answers_keeps_its_turn(client, upstream, said):
    given = script([note(said), call("look", {}, id="c99"), finish("tool_calls")], [too_long(150), *answer("Fine.")])
    first = make(client, given, tools=[{"type": "function", "name": "look", "parameters": {}}])
    output = {"type": "function_call_output", "call_id": "c99", "output": "done"}
    made = client.responses.create(model="scripted", input=[output], previous_response_id=first.id, truncation="auto")
    assert made.output_text == "Fine."
    last = upstream.asked(given)[-1].body["messages"]
    assert [message["role"] for message in last[-3:]] == ["user", "assistant", "tool"]


def test_without_auto_the_refusal_is_the_client_s_with_its_counts(client, upstream, said):
    words = {"message": "too long", "type": "exceed_context_size_error", "n_prompt_tokens": 120, "n_ctx": 100}
    given = script([note(said), status(400, {"error": words})])
    asked = [*history(2), {"role": "user", "content": given}]
    with pytest.raises(openai.BadRequestError, match="has 120 tokens, the model's context 100") as caught:
        client.responses.create(model="scripted", input=asked)
    assert caught.value.code == "context_length_exceeded"
    assert len(upstream.asked(given)) == 1


# -- Sizes that are known ---------------------------------------------------------------------------------------------------


def asked(upstream, given):
    """The path and the number of earlier questions of each request."""
    return [(record.path.rpartition("/")[2], len(questions(record))) for record in upstream.asked(given)]


def test_a_size_that_a_refusal_names_is_learned_and_later_prompts_are_counted_first(client, upstream, said):
    words = len(f"Be brief. {said}".split()) + 10 * 5  # of which there are five in each turn, and the script has one
    given = script([note(said), at_least(words - 12), *answer("Fine.")])
    assert make(client, given, model="vllm@learned").output_text == "Fine."
    assert asked(upstream, given)[0] == ("completions", 10)
    assert {path for path, _ in asked(upstream, given)[1:-1]} == {"tokenize"}
    path, left = asked(upstream, given)[-1]
    assert (path, 0 < left < 10) == ("completions", True)
    again = script([note(f"again {said}"), *answer("Fine.")])
    make(client, again, model="vllm@learned")
    *counts, (path, left) = asked(upstream, again)
    assert (path, 0 < left < 10) == ("completions", True)
    assert counts == [("tokenize", 10), ("tokenize", left)]


def test_a_size_from_which_the_limit_of_an_output_may_be_subtracted_is_not_learned(client, upstream, said):
    given = script([note(said), at_least(60), *answer("Fine.")])
    make(client, given, model="vllm@limited", max_output_tokens=100)
    again = script([note(f"again {said}"), *answer("Fine.")])
    make(client, again, model="vllm@limited")
    assert asked(upstream, again) == [("completions", 10)]


def test_a_prompt_that_can_not_be_counted_is_sent_and_halved(client, upstream, said):
    missing = endpoint("/tokenize", {"detail": "Not Found"}, code=404)
    given = script([note(said), missing, at_least(50), *answer("Fine.")])
    assert make(client, given, model="vllm@uncounted").output_text == "Fine."
    chats = [left for path, left in asked(upstream, given) if path == "completions"]
    assert chats == [10, 5]


@pytest.mark.parametrize(("model", "left"), [("silent@m", 6), ("small", 2)])
def test_where_the_catalog_knows_the_size_a_longer_prompt_is_not_sent(client, upstream, said, model, left):
    given = script([note(said), *answer("Fine.")])
    assert make(client, given, model=model).output_text == "Fine."
    assert asked(upstream, given) == [("completions", left)]
    with_auto = script([note(f"short {said}"), *answer("Fine.")])
    make(client, with_auto, turns=1, model=model)
    assert asked(upstream, with_auto) == [("completions", 1)]


@pytest.mark.parametrize(("model", "size"), [("silent@m", 4_000), ("small", 2_000)])
def test_without_auto_what_is_longer_than_the_catalogs_size_is_refused_with_the_counts(
    client, upstream, said, model, size
):
    given = script([note(said), *answer("Fine.")])
    with pytest.raises(openai.BadRequestError, match=rf"has {size} tokens, but the prompt has about \d+") as refused:
        make(client, given, model=model, truncation="disabled")
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "input")
    assert upstream.asked(given) == []
    fits = script([note(f"short {said}"), *answer("Fine.")])
    make(client, fits, turns=1, model=model, truncation="disabled")
    assert asked(upstream, fits) == [("completions", 1)]


def test_a_prompt_that_is_counted_exactly_is_refused_by_its_count(client, upstream, said):
    given = script([note(said), *answer("Fine.")])
    with pytest.raises(openai.BadRequestError, match=r"has 40 tokens, but the prompt has \d+\."):
        make(client, given, model="counted", truncation="disabled")
    assert asked(upstream, given) == [("tokenize", 10)]
