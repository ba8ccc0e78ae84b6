"""What real engines say in their own ways, and what becomes of it."""

import openai
import pytest

from tests.upstream import answer, delta, error, finish, note, script, status, text

CITED = {"url": "https://example.org/a", "title": "A", "start_index": 0, "end_index": 5}

FLAT = {"type": "url_citation", **CITED}


@pytest.mark.parametrize(
    "steps",
    [
        [text("Found"), delta(content="", annotations=[{"type": "url_citation", "url_citation": CITED}]), finish()],
        [delta(annotations=[FLAT, {"type": "file", "file": {}}, {"type": "url_citation"}]), text("Found"), finish()],
    ],
    ids=["after the text", "before it, flat, beside others"],
)
def test_the_citations_of_a_model_that_searches_by_itself_are_passed_on(client, steps):
    events = list(client.responses.create(model="scripted", input=script(steps), stream=True))
    added = [event.annotation.to_dict() for event in events if event.type == "response.output_text.annotation.added"]
    [message] = events[-1].response.output
    assert added == [FLAT]
    assert [one.to_dict() for one in message.content[0].annotations] == [FLAT]


OVERFLOW = "This model's maximum context length is 8 tokens."


@pytest.mark.parametrize(
    "refusal",
    [
        status(200, {"error": {"message": OVERFLOW, "type": "BadRequestError", "code": 400}}),
        error(OVERFLOW, "BadRequestError", "400"),
        error("too long", "exceed_context_size_error", 400),
    ],
    ids=["a body", "in the stream", "by its type"],
)
def test_a_context_that_overflows_in_the_stream_is_truncated(client, upstream, said, refusal):
    first = client.responses.create(model="scripted", input=said)
    second = script([note(said), refusal])
    with pytest.raises(openai.BadRequestError, match=r"context length|too long"):
        client.responses.create(model="scripted", input=second, previous_response_id=first.id, truncation="auto")
    assert [len(record.body["messages"]) for record in upstream.asked(second)] == [3, 1]


def test_an_overflow_that_is_gone_once_the_context_is_halved_is_not_noticed(client, upstream, said):
    first = client.responses.create(model="scripted", input=said)
    asking = script([note(said), status(200, {"error": {"message": OVERFLOW, "code": 400}}, times=1), *answer("Fine.")])
    made = client.responses.create(model="scripted", input=asking, previous_response_id=first.id, truncation="auto")
    assert made.output_text == "Fine."
    assert [len(record.body["messages"]) for record in upstream.asked(asking)] == [3, 1]
