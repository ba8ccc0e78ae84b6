"""What real engines say in their own ways, and what becomes of it."""

import openai
import pytest

from app.outbound.catalog import UpstreamEntry
from app.outbound.upstream import Upstream as Asked
from app.settings import Settings
from tests.upstream import Upstream, answer, call, calling, delta, error, finish, note, reasoning, script, status, text

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


# -- Reasoning goes back, with nothing configured ---------------------------------------------------------------------------

TOOL = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}
THOUGHTS = {
    "reasoning_content": (reasoning("Hm."), {"content": None, "reasoning_content": "Hm."}),
    "reasoning": (reasoning("Hm.", "reasoning"), {"content": None, "reasoning": "Hm."}),
    "tags": (text("<think>Hm.</think>"), {"content": "<think>\nHm.\n</think>\n\n"}),
    "parts": (
        delta(content=[{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}]),
        {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}]},
    ),
}


def history(record):
    """The assistant's message behind the last question, without its calls."""
    message = record.body["messages"][-2]
    assert message["role"] == "assistant"
    return {key: value for key, value in message.items() if key not in {"role", "tool_calls"}}


@pytest.mark.parametrize("name", THOUGHTS)
def test_reasoning_goes_back_in_the_form_in_which_it_came(client, upstream, said, name):
    """In a run's own loop, here behind a call that is refused, and to the run that continues with a function's output."""
    thought, expected = THOUGHTS[name]
    asking = script([note(said), thought, *calling("nobody", id="c0")], calling("f", id="c1"), answer("Yes."))
    first = client.responses.create(model="m", input=asking, tools=[TOOL])
    output = {"type": "function_call_output", "call_id": "c1", "output": "one"}
    client.responses.create(model="m", previous_response_id=first.id, input=[output], tools=[TOOL])
    _, loop, next_run = upstream.asked(asking)
    assert history(loop) == expected
    assert history(next_run) == expected


def test_each_model_of_an_upstream_has_its_reasoning_back_in_its_own_form(client, upstream, said):
    names, made = ("tags", "reasoning_content"), {}
    for name in names:
        asking = script([note(f"{said} {name}"), THOUGHTS[name][0], *calling("f", id="c1")], answer("Yes."))
        made[name] = asking, client.responses.create(model=name, input=asking, tools=[TOOL])
    output = {"type": "function_call_output", "call_id": "c1", "output": "one"}
    for name, (asking, first) in made.items():
        client.responses.create(model=name, previous_response_id=first.id, input=[output], tools=[TOOL])
        assert history(upstream.asked(asking)[-1]) == THOUGHTS[name][1]


@pytest.mark.parametrize(("context", "recalled"), [("current_turn", [None]), ("all_turns", ["Hm."])])
def test_the_reasoning_of_earlier_turns_goes_back_as_the_request_says(client, upstream, said, context, recalled):
    first = client.responses.create(model="m", input=script([note(said), reasoning("Hm."), text("Hi"), finish()]))
    client.responses.create(model="m", previous_response_id=first.id, input=said, reasoning={"context": context})
    [asked] = upstream.asked(said)
    assert [one.get("reasoning_content") for one in asked.body["messages"] if one["role"] == "assistant"] == recalled


# -- Dialects that are found ------------------------------------------------------------------------------------------------


class OddLister(Upstream):
    """An engine whose list of models has other types than the API's."""

    async def answer(self, record, wire):
        """The list is its own, all else as ever."""
        if record.method != "GET":
            await super().answer(record, wire)
            return
        whole = {"id": "a", "created": 1700000000.5, "owned_by": "mistralai"}
        await wire.whole(200, {"data": [whole, {"id": None}, "b", 7, {"name": "c", "created": None, "owned_by": 1}]})


class Lister(Upstream):
    """An engine that lists its models otherwise each time."""

    def __init__(self, *answers):
        super().__init__()
        self._answers = iter(answers)

    async def answer(self, record, wire):
        """The next answer."""
        await wire.whole(*next(self._answers))


@pytest.mark.parametrize(
    ("auth", "first"),
    [("configured", (200, {"data": []})), ("caller", (403, {"error": {"message": "not with this key"}}))],
    ids=["it has no model yet", "a caller may not list"],
)
async def test_what_says_nothing_of_an_engine_does_not_decide_its_dialect(monkeypatch, auth, first):
    monkeypatch.setattr("app.outbound.upstream.DETECT_INTERVAL_S", 0.0)
    with Lister(first, (200, {"data": [{"id": "a", "owned_by": "library"}]})) as engine:
        asked = Asked("u", UpstreamEntry(base_url=engine.base_url), Settings(upstream_auth=auth))
        await asked.find_dialect("a-key")
        assert asked.dialect_name is None
        await asked.find_dialect("a-key")
        assert asked.dialect_name == "ollama"
        await asked.close()


def test_an_engine_is_known_by_what_it_lists_however_odd_the_list(new_server):
    with OddLister() as engine:
        served = new_server(OPENAI_BASE_URL=engine.base_url)
        with served.client() as client:
            assert [(one.id, one.created) for one in client.models.list()] == [("a", 1700000000), ("b", 0), ("c", 0)]
            begun = client.responses.create(
                model="m",
                input=script([call("f", {}, id="call_0123456789"), finish("tool_calls")], answer("Yes.")),
                tools=[TOOL],
            )
            output = {"type": "function_call_output", "call_id": "call_0123456789", "output": "one"}
            client.responses.create(model="m", previous_response_id=begun.id, input=[output], tools=[TOOL])
        messages = engine.requests[-1].body["messages"]
        assert messages[-1]["tool_call_id"] == messages[-2]["tool_calls"][0]["id"]
        assert len(messages[-1]["tool_call_id"]) == 9
        assert any('"dialect_found"' in line and '"mistral"' in line for line in served.printed)
