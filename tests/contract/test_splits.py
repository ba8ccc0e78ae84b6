"""However an upstream's script is cut, into reads or into chunks, clients hear the same and the same is stored."""

from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from tests.api.streams import events_of
from tests.contract.cases import CASES, ONLY_F, RUN, Case, F, function, token
from tests.contract.compare import comparable, joined
from tests.contract.conftest import Heard
from tests.replay import replay
from tests.upstream import Step, call, coalesce, error, finish, reasoning, refusal, script, split, text, usage

Event = dict[str, Any]

SIZES = [1, 2, 3, 7, 64]

USED = usage(3, 4)
"""Said and not computed: words that are cut would count more."""

RICH: dict[str, Case] = {
    "everything at once": Case(
        turns=[
            [
                text("<think>\nLet me ü"),
                text("ber</think>\n\nWell 😀, "),
                text("<b>look</b>."),
                call("f", '{"a": "ü', id="c1"),
                call("run", '{"input":"ls', index=1, id="c2"),
                call(arguments='"}'),
                call(arguments=' -l"}', index=1),
                text("Done."),
                finish("tool_calls"),
                USED,
            ]
        ],
        made=[],
        body={"tools": [*RUN["tools"], function("f")], "reasoning": {"summary": "auto"}},
    ),
    "reasoning and refusal": Case(
        turns=[[reasoning("Hm, "), reasoning("no."), text("I'd like to, "), refusal("but I can't."), finish(), USED]],
        made=[],
    ),
    "log probabilities": Case(
        turns=[
            [
                text("\n", logprobs={"content": [token("\n")]}),
                text("Hé", logprobs={"content": [token("H"), token("é")]}),
                text("y", logprobs={"content": [token("y")]}),
                finish(),
                USED,
            ]
        ],
        made=[],
        body={"top_logprobs": 1},
    ),
    "a refused call and another turn": Case(
        turns=[
            [text("One."), call("g", '{"b":', id="c1"), call(arguments="2}"), finish("tool_calls"), USED],
            [reasoning("Two"), text("Three."), finish("length"), USED],
        ],
        made=[],
        body=ONLY_F,
    ),
    "an error": Case(turns=[[text("Once upon"), call("f", '{"a"', id="c1"), error("out of memory")]], made=[], body=F),
}


def streamed(http: httpx.Client, case: Case, turns: Sequence[Sequence[Step]]) -> list[Event]:
    """The events of a case with another script; what is stored is what they say."""
    asked = {"role": "user", "content": script(*turns)}
    body = {**case.request, "input": [*case.before, asked], "stream": True}
    events = events_of(http.post("/responses", json=body))
    response = replay(events)
    assert http.get(f"/responses/{response['id']}").json() == response
    return events


@pytest.mark.parametrize("cut", [*map(split, SIZES), coalesce()], ids=str)
@pytest.mark.parametrize("name", RICH)
def test_any_split_into_reads_gives_the_same_events(name: str, cut: Step, http: httpx.Client):
    case = RICH[name]
    events = streamed(http, case, [[cut, *steps] for steps in case.turns])
    assert comparable(events) == comparable(streamed(http, case, case.turns))


def _pieces(step: Step, size: int) -> list[Step]:
    """A step that says something, as several that say so many characters each."""
    for key in ("text", "reasoning_content", "refusal"):
        if key in step and "logprobs" not in step:
            said = step[key]
            return [{key: said[at : at + size]} for at in range(0, len(said), size)]
    if "call" in step and "arguments" in step["call"]:
        given = step["call"]
        said = given["arguments"]
        first, *rest = [said[at : at + size] for at in range(0, len(said), size)]
        return [{"call": {**given, "arguments": first}}, *(call(arguments=one, index=given["index"]) for one in rest)]
    return [step]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", RICH)
def test_any_split_into_chunks_gives_the_same_events_but_for_the_number_of_deltas(
    name: str, size: int, http: httpx.Client
):
    case = RICH[name]
    turns = [[piece for step in steps for piece in _pieces(step, size)] for steps in case.turns]
    assert joined(streamed(http, case, turns)) == joined(streamed(http, case, case.turns))


NOT_TO_BE_SPLIT = {
    "status": "the answer is no stream",
    "cut": "a connection that breaks takes with it what is still unread, so when it breaks does matter",
}
"""Steps of cases that can't be split → why."""

SPLITTABLE = [
    name
    for name, case in CASES.items()
    if not case.after  # another message is the last: the script does not answer
    and not any(NOT_TO_BE_SPLIT.keys() & step.keys() for steps in case.turns for step in steps)
]


@pytest.mark.parametrize("cut", [split(1), coalesce()], ids=str)
@pytest.mark.parametrize("name", SPLITTABLE)
def test_every_case_is_the_same_byte_by_byte_and_all_at_once(name: str, cut: Step, http: httpx.Client, heard: Heard):
    case = CASES[name]
    asked = {"role": "user", "content": script(*([cut, *steps] for steps in case.turns))}
    body = {**case.request, "input": [*case.before, asked], "stream": True}
    events = comparable(events_of(http.post("/responses", json=body)))
    expected = comparable(heard(name))
    for one in (events, expected):
        one[-1]["response"]["usage"] = None  # the script is part of the prompt, and so is the split
    assert events == expected
