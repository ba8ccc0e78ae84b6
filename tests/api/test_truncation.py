"""`truncation: auto`: what of a long context reaches the upstream, once that has refused the whole."""

import openai
import pytest

from tests.upstream import answer, call, calling, finish, note, script, status
from tests.waiting import until


def too_long(tokens, tokens_max=100, times=1):
    words = f"This model's maximum context length is {tokens_max} tokens. However, your messages resulted in {tokens} tokens."
    return status(400, {"error": {"message": words, "type": "BadRequestError", "code": 400}}, times=times)


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


def make(client, given, turns=10, **options):
    asked = {"role": "user", "content": given}
    return client.responses.create(
        model="scripted", input=[*history(turns), asked], instructions="Be brief.", truncation="auto", **options
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
