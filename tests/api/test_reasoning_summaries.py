"""Summaries of reasoning, as the catalog says: word for word, none, or made by a model."""

import pytest

from app.domain.prompt import DETAILS
from app.settings import Settings
from app.setup import reasoning_summary_prompt
from tests.api.streams import events_of
from tests.conftest import NewServer
from tests.replay import replay
from tests.servers import Served
from tests.upstream import (
    Upstream,
    answer,
    calling,
    error,
    finish,
    reasoning,
    script,
    stall,
    status,
    text,
    usage,
)
from tests.waiting import settled

PROMPT = reasoning_summary_prompt(Settings())
CATALOG = """
[upstreams.only]
base_url = "{base}"
dialect = "plain"

[[models]]
name = "sums"
routes = [{{ upstream = "only", model = "m" }}]
reasoning_summary = {{ model = "summarizer" }}

[[models]]
name = "off"
routes = [{{ upstream = "only", model = "m" }}]
reasoning_summary = "off"

[[models]]
name = "summarizer"
routes = [{{ upstream = "only", model = "small" }}]

[[models]]
name = "sums by an old engine"
routes = [{{ upstream = "only", model = "m" }}]
reasoning_summary = {{ model = "old" }}

[[models]]
name = "old"
routes = [{{ upstream = "only", model = "old", lacks = ["stream_options"] }}]
"""
BYTES_MAX = 4096


@pytest.fixture(scope="module")
def server(new_cataloged: NewServer, upstream: Upstream) -> Served:
    """A server whose models make summaries, or none."""
    return new_cataloged(
        CATALOG.format(base=upstream.base_url),
        REPRISE_REASONING_SUMMARY_TIMEOUT_S="3",
        REPRISE_REASONING_SUMMARY_BYTES_MAX=str(BYTES_MAX),
        REPRISE_REASONING_SUMMARIES_MAX="2",
    )


@pytest.fixture
def thought(said, upstream, monkeypatch):
    """Reasoning that is this test's own; with `answered` the summarizer's turn is that."""

    def make(*answered):
        if answered:
            monkeypatch.setitem(upstream.scripts, f"thought {said}", script(list(answered)))
        return f"thought {said}"

    return make


def asked(thought, *rest, **body):
    """A create request whose model thinks, and answers."""
    steps = [reasoning(thought), text("Yes."), finish(), usage(10, 5)]
    return {"model": "sums", "input": script(steps, *rest), "reasoning": {"summary": "auto"}, **body}


def test_a_summary_is_streamed_before_the_answer_and_stored(http, upstream, thought):
    shortly = thought(text("In "), text("short.\n"), finish(), usage(100, 20))
    events = events_of(http.post("/responses", json=asked(shortly, stream=True)))
    types = [event["type"].removeprefix("response.") for event in events]
    assert types[types.index("reasoning_text.done") : types.index("output_text.delta")] == [
        "reasoning_text.done",
        "content_part.done",
        "reasoning_summary_part.added",
        "reasoning_summary_text.delta",
        "reasoning_summary_text.done",
        "reasoning_summary_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
    ]
    response = replay(events)
    assert response["output"][0]["summary"] == [{"type": "summary_text", "text": "In short."}]
    assert (response["usage"]["input_tokens"], response["usage"]["output_tokens"]) == (110, 25)
    assert http.get(f"/responses/{response['id']}").json() == response
    [record] = upstream.asked(shortly)
    assert record.body["model"] == "small"
    assert record.body["messages"] == [
        {"role": "system", "content": PROMPT},
        {"role": "user", "content": shortly},
    ]
    assert "tools" not in record.body


@pytest.mark.parametrize("background", [False, True])
def test_it_is_the_same_where_nothing_is_streamed(client, http, thought, background):
    given = asked(thought(*answer("In short.")), background=background)
    made = http.post("/responses", json=given).json()
    response = settled(lambda: _ended(client.responses.retrieve(made["id"])), error=AssertionError)
    assert [part.text for part in response.output[0].summary] == ["In short."]
    assert response.output_text == "Yes."


def _ended(response):
    assert response.status == "completed"
    return response


def test_reasoning_that_ends_its_turn_has_one_too(client, thought):
    shortly = thought(*answer("In short."))
    response = client.responses.create(**{**asked(shortly), "input": script([reasoning(shortly), finish()])})
    assert [part.text for part in response.output[0].summary] == ["In short."]


@pytest.mark.parametrize("detail", ["concise", "detailed"])
def test_the_prompt_says_how_detailed_it_is_to_be(client, upstream, thought, detail):
    client.responses.create(**asked(thought(), reasoning={"generate_summary": detail}))
    [record] = upstream.asked(thought())
    assert record.body["messages"][0]["content"] == f"{PROMPT}\n\n{DETAILS[detail]}"


@pytest.mark.parametrize("body", [{"reasoning": {"effort": "low"}}, {"model": "off"}])
def test_where_it_is_not_asked_for_or_off_there_is_none(client, upstream, thought, body):
    response = client.responses.create(**asked(thought(), **body))
    assert (response.output[0].summary, response.output[0].content[0].text) == ([], thought())
    assert upstream.asked(thought()) == []


def test_models_without_the_key_give_the_reasoning_itself(client, upstream, thought):
    response = client.responses.create(**asked(thought(), model="m"))
    assert response.output[0].summary[0].text == thought()
    assert upstream.asked(thought()) == []


def test_the_model_that_makes_it_is_not_sent_what_its_route_lacks(client, upstream, thought):
    client.responses.create(**asked(thought(), model="sums by an old engine"))
    [record] = upstream.asked(thought())
    assert (record.body["model"], "stream_options" in record.body) == ("old", False)


FAULTS = {
    "refused": [status(400, {"error": {"message": "no"}})],
    "broken off": [text("In "), error("out of memory")],
    "cut off": [text("In "), finish("length")],
    "empty": [text("  "), finish()],
    "too long": [text("x" * (BYTES_MAX + 1)), finish()],
    "silent": [text("In "), stall(30)],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_without_a_summary_the_answer_is_whole(http, thought, fault):
    events = events_of(http.post("/responses", json=asked(thought(*FAULTS[fault]), stream=True)))
    response = replay(events)
    assert response["status"] == "completed"
    assert response["output"][0]["summary"] == []
    assert response["output"][1]["content"][0]["text"] == "Yes."
    assert not any("summary" in event["type"] for event in events)


def test_summaries_leave_the_limits_of_the_answer_alone_and_have_one_of_their_own(client, upstream, thought):
    shortly = thought(*answer("In short."), usage(100, 500))
    thinking = [reasoning(shortly), *calling("h", {}, id="c1"), usage(10, 5)]
    ended = [reasoning(shortly), text("Yes."), reasoning(shortly), finish(), usage(10, 5)]
    tools = [{"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}, "strict": False}]
    said = script(thinking, ended)
    response = client.responses.create(
        model="sums", input=said, tools=tools, max_output_tokens=100, reasoning={"summary": "auto"}
    )
    assert response.status == "completed"
    summed = [len(item.summary) for item in response.output if item.type == "reasoning"]
    assert summed == [1, 1, 0]  # REPRISE_REASONING_SUMMARIES_MAX
    assert upstream.asked(said)[-1].body["max_tokens"] == 95
    assert response.usage.output_tokens == 2 * 5 + 2 * 500
