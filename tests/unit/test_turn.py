"""One upstream completion: chunks → events. Nothing is lost, groups never interleave, whatever the dialect and the split."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.item_builders import OutputOptions
from app.domain.think import ThinkSplitter
from app.domain.toolbox import Rejected, Toolbox
from app.domain.turn import OwnCall, Turn
from app.wire.chat import Chunk, decode_chunk
from app.wire.events import Event
from tests.unit.build import chunk, counting, deltas, function, heard, made, piece, plain, said, toolbox

TOOLS = toolbox(function("f"), function("g"), {"type": "custom", "name": "run"})
NO_TOOLS = toolbox()


def turn(tools: Toolbox = TOOLS, **options: Any) -> Turn:
    """A turn with ids that count."""
    return Turn(tools, counting(), **options)


def calls(items: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """The calls among items: call id, name, arguments or input."""
    return [(one["call_id"], one["name"], one.get("arguments", one.get("input"))) for one in items if "call_id" in one]


def texts(items: list[dict[str, Any]], type: str) -> str:
    """All the text of one kind of item."""
    return "".join(
        part.get("text", part.get("refusal")) for one in items if one["type"] == type for part in one["content"]
    )


# -- Properties -------------------------------------------------------------------------------------------------------------

WORDS = st.text(alphabet='ab \n{}"ü😀', min_size=1, max_size=12)
ARGUMENTS = st.dictionaries(st.sampled_from("abc"), WORDS, max_size=3).map(
    lambda value: msgspec.json.encode(value).decode()
)
SPOKEN = st.lists(st.tuples(st.sampled_from(["reasoning_content", "content"]), WORDS), max_size=6)


def cut(text: str, sizes: list[int]) -> list[str]:
    """The text in pieces of these sizes, the rest as one."""
    pieces = []
    for size in sizes:
        pieces.append(text[:size])
        text = text[size:]
    return [piece for piece in [*pieces, text] if piece]


@st.composite
def conversations(draw: st.DrawFn) -> tuple[list[dict[str, Any]], list[str]]:
    """Deltas of one turn in a random order: parallel calls, text and reasoning mixed; and the arguments of the calls."""
    arguments = draw(st.lists(ARGUMENTS, max_size=4))
    queues: list[list[dict[str, Any]]] = [[{key: text} for key, text in draw(SPOKEN)]]
    for index, whole in enumerate(arguments):
        pieces = cut(whole, draw(st.lists(st.integers(1, 6), max_size=4)))
        first = piece(index, f"call_{index}", "f" if index % 2 else "g", "")
        queues.append([{"tool_calls": [first]}, *({"tool_calls": [piece(index, arguments=one)]} for one in pieces)])
    mixed: list[dict[str, Any]] = []
    while queues := [queue for queue in queues if queue]:
        mixed.append(draw(st.sampled_from(queues)).pop(0))
    return mixed, arguments


@st.composite
def in_chunks(draw: st.DrawFn, mixed: list[dict[str, Any]]) -> list[Chunk]:
    """The same deltas, each text cut again at random, some in one chunk with the next."""
    smaller = []
    for delta in mixed:
        sizes = draw(st.lists(st.integers(1, 4), max_size=3))
        for key in ("content", "reasoning_content"):
            smaller += [{key: one} for one in cut(delta.get(key, ""), sizes)]
        for one in delta.get("tool_calls", ()):
            whole = one["function"]["arguments"]
            first, *rest = cut(whole, sizes) or [""]
            smaller.append({"tool_calls": [{**one, "function": {**one["function"], "arguments": first}}]})
            smaller += [{"tool_calls": [piece(one["index"], arguments=later)]} for later in rest]
    merged: list[dict[str, Any]] = []
    for delta in smaller:
        if merged and delta.keys() == merged[-1].keys() == {"tool_calls"} and draw(st.booleans()):
            merged[-1] = {"tool_calls": merged[-1]["tool_calls"] + delta["tool_calls"]}
        else:
            merged.append(delta)
    return [chunk(**delta) for delta in merged]


def bare(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Items without their ids."""
    return [{key: value for key, value in one.items() if key != "id"} for one in items]


@given(conversations(), st.data())
def test_any_split_of_any_mixture_gives_the_same_items(
    conversation: tuple[list[dict[str, Any]], list[str]], data: st.DataObject
):
    mixed, arguments = conversation
    items = made(turn(), [chunk(**delta) for delta in mixed])
    assert bare(made(turn(), data.draw(in_chunks(mixed)))) == bare(items)
    order = [f"call_{delta['tool_calls'][0]['index']}" for delta in mixed if "id" in delta.get("tool_calls", [{}])[0]]
    assert calls(items) == [
        (id, "f" if int(id[-1]) % 2 else "g", arguments[int(id[-1])]) for id in dict.fromkeys(order)
    ]
    assert texts(items, "reasoning") == "".join(delta.get("reasoning_content", "") for delta in mixed)
    spoken = "".join(delta.get("content", "") for delta in mixed)
    assert texts(items, "message").split() == spoken.split()


@given(conversations(), st.sampled_from(["completed", "incomplete"]), st.integers(0, 3))
def test_groups_never_interleave_and_only_the_last_is_incomplete(
    conversation: tuple[list[dict[str, Any]], list[str]], status: str, first: int
):
    opened: list[int] = []
    events = [plain(one) for one in said(turn(output_index=first), [chunk(**one) for one in conversation[0]], status)]
    for event in events:
        if event["type"] == "response.output_item.added":
            opened.append(event["output_index"])
        assert event["output_index"] == opened[-1]
    assert opened == list(range(first, first + len(opened)))
    ends = [event["item"]["status"] for event in events if event["type"] == "response.output_item.done"]
    assert ends[-1:] == [status] * bool(opened)
    assert set(ends[:-1]) <= {"completed"} and len(ends) == len(opened)


# -- Order ------------------------------------------------------------------------------------------------------------------


def types(events: list[dict[str, Any]]) -> list[str]:
    """The types of events, without their prefix."""
    return [event["type"].removeprefix("response.") for event in events]


def test_plain_text_comes_in_the_order_of_the_reference():
    events = heard(said(turn(), [chunk(content="Hel"), chunk(content="lo"), chunk("stop")]))
    assert types(events) == (
        "created in_progress output_item.added content_part.added output_text.delta output_text.delta "
        "output_text.done content_part.done output_item.done completed".split()
    )
    assert events[3]["part"] == {"type": "output_text", "text": "", "annotations": [], "logprobs": []}


def test_a_summary_mirrors_the_reasoning_where_one_is_asked_for():
    chunks = [chunk(reasoning_content="hm"), chunk(content="yes")]
    events = said(turn(options=OutputOptions(summarize=True)), chunks)
    assert deltas(events, "reasoning_text") == deltas(events, "reasoning_summary_text") == ["hm"]
    reasoning, _ = made(turn(options=OutputOptions(summarize=True)), chunks)
    assert reasoning["summary"] == [{"type": "summary_text", "text": "hm"}]
    assert made(turn(), chunks)[0]["summary"] == []


FOLLOWS = OutputOptions(summary_follows=True)
SUMMED = [f"reasoning_summary_{what}" for what in ("part.added", "text.delta", "text.done", "part.done")]


def kinds(events: list[Event]) -> list[str]:
    """The types of events as a turn gives them."""
    return types([plain(event) for event in events])


def test_what_follows_reasoning_waits_for_its_summary():
    speaking = turn(options=FOLLOWS)
    events = speaking.feed(chunk(reasoning_content="hm"))
    assert kinds(events) == ["output_item.added", "content_part.added", "reasoning_text.delta"]
    assert speaking.feed(chunk(content="ye")) == speaking.feed(chunk(content="s")) == []
    assert speaking.unsummarized == "hm"
    events = speaking.summarize("In short.")
    assert kinds(events)[:7] == ["reasoning_text.done", "content_part.done", *SUMMED, "output_item.done"]
    assert deltas(events, "reasoning_summary_text") == ["In short."]
    assert deltas(events, "output_text") == ["ye", "s"]
    assert speaking.unsummarized is None


def test_each_reasoning_waits_also_one_at_the_end():
    speaking = turn(options=FOLLOWS)
    for one in (chunk(reasoning_content="a"), chunk(content="b"), chunk(reasoning_content="c"), chunk(content="d")):
        speaking.feed(one)
    waited = []
    for _ in range(2):
        waited.append(speaking.unsummarized)
        speaking.summarize("")
    speaking.feed(chunk(reasoning_content="e"))
    assert speaking.unsummarized is None
    speaking.settle()
    assert [*waited, speaking.unsummarized] == ["a", "c", "e"]
    assert kinds(speaking.summarize("x"))[-1] == "output_item.done"
    assert speaking.close() == []


def test_reasoning_whose_turn_breaks_off_while_it_waits_has_no_summary():
    speaking = turn(options=FOLLOWS)
    speaking.feed(chunk(reasoning_content="hm"))
    speaking.feed(chunk(content="yes"))
    events = [plain(event) for event in speaking.close("incomplete")]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert [(one["type"], one["status"]) for one in done] == [("reasoning", "completed"), ("message", "incomplete")]
    assert done[0]["summary"] == []


def test_reasoning_is_sealed_where_that_is_included():
    options = OutputOptions(seal=lambda text: f"sealed {text}")
    (reasoning,) = made(turn(options=options), [chunk(reasoning="a"), chunk(reasoning="b")])
    assert reasoning["encrypted_content"] == "sealed ab"
    assert "encrypted_content" not in made(turn(), [chunk(reasoning="a")])[0]


def test_a_single_group_streams_without_delay():
    speaking = turn()
    assert deltas(speaking.feed(chunk(content="a")), "output_text") == ["a"]
    speaking.feed(chunk(tool_calls=[piece(0, "c1", "f")]))
    assert deltas(speaking.feed(chunk(tool_calls=[piece(0, arguments='{"a"')])), "function_call_arguments") == ['{"a"']
    assert deltas(speaking.feed(chunk(tool_calls=[piece(0, arguments=":1}")])), "function_call_arguments") == [":1}"]


def test_text_and_refusal_are_parts_of_one_message():
    (message,) = made(turn(), [chunk(content="I would, "), chunk(refusal="but "), chunk(refusal="can't.")])
    assert [part["type"] for part in message["content"]] == ["output_text", "refusal"]
    assert message["content"][1]["refusal"] == "but can't."


def test_reasoning_in_both_fields_is_one_reasoning():
    assert texts(made(turn(), [chunk(reasoning="hm", reasoning_content="hm")]), "reasoning") == "hm"


def test_think_tags_in_content_are_reasoning():
    items = made(turn(), [chunk(content="<thi"), chunk(content="nk>hm</think>\n\ny"), chunk(content="es")])
    assert (texts(items, "reasoning"), texts(items, "message")) == ("hm", "yes")
    items = made(turn(splitter=ThinkSplitter("text")), [chunk(content="<think>hm</think>")])
    assert texts(items, "message") == "<think>hm</think>"


def test_what_looked_like_a_tag_is_said_at_the_end():
    assert texts(made(turn(), [chunk(content="<thin"), chunk("stop")]), "message") == "<thin"


def test_white_space_before_a_call_is_no_message():
    items = made(turn(), [chunk(content="\n\n"), chunk(tool_calls=[piece(0, "c1", "f", "{}")])])
    assert [one["type"] for one in items] == ["function_call"]
    assert texts(made(turn(), [chunk(content="\n"), chunk(content="x")]), "message") == "\nx"


def test_nothing_said_is_no_item():
    speaking = turn()
    assert said(speaking, [chunk(content=""), chunk("stop")]) == []
    assert speaking.finish_reason == "stop"


# -- Log probabilities ------------------------------------------------------------------------------------------------------


def token(text: str) -> dict[str, Any]:
    """A token's log probability as an upstream says it."""
    return {"token": text, "logprob": -0.5, "top_logprobs": [{"token": text, "logprob": -0.5, "bytes": [1]}]}


def tokens(items: list[dict[str, Any]]) -> list[list[str]]:
    """The tokens of each text."""
    return [
        [one["token"] for one in part["logprobs"]] for item in items for part in item["content"] if "logprobs" in part
    ]


def test_log_probabilities_go_with_their_text():
    chunks = [chunk(content=text, logprobs={"content": [token(text)]}) for text in ("a", "b")]
    events = [plain(event) for event in said(turn(), chunks)]
    assert [event["logprobs"][0]["token"] for event in events if event["type"] == "response.output_text.delta"] == [
        "a",
        "b",
    ]
    (message,) = made(turn(), chunks)
    assert message["content"][0]["logprobs"][0] == {
        "token": "a",
        "logprob": -0.5,
        "bytes": [97],
        "top_logprobs": [{"token": "a", "logprob": -0.5, "bytes": [1]}],
    }


def test_log_probabilities_of_text_that_is_held_back_are_not_lost():
    chunks = [chunk(content=text, logprobs={"content": [token(text)]}) for text in ("\n", "<", "b")]
    assert tokens(made(turn(), chunks)) == [["\n", "<", "b"]]


@pytest.mark.parametrize("field", ["reasoning_content", "content"])
def test_log_probabilities_of_reasoning_are_not_the_text_s(field: str):
    thought = {field: "<think>hm</think>" if field == "content" else "hm"}
    chunks = [
        chunk(**thought, logprobs={"content": [token("hm")]}),
        chunk(content="a", logprobs={"content": [token("a")]}),
    ]
    assert tokens(made(turn(), chunks)) == [["a"]]


# -- Dialects of calls ------------------------------------------------------------------------------------------------------

DIALECTS = {
    "whole": [[piece(0, "c1", "f", '{"a":1}')], [piece(1, "c2", "g", '{"b":2}')]],
    "all in one chunk": [[piece(0, "c1", "f", '{"a":1}'), piece(1, "c2", "g", '{"b":2}')]],
    "interleaved": [
        [piece(0, "c1", "f", '{"a"')],
        [piece(1, "c2", "g", '{"b"')],
        [piece(0, arguments=":1}")],
        [piece(1, arguments=":2}")],
    ],
    "id late": [[piece(0, None, "f", '{"a"')], [piece(0, "c1", None, ":1}")], [piece(1, "c2", "g", '{"b":2}')]],
    "id at the very end": [[piece(0, None, "f", '{"a":1}')], [piece(0, "c1")], [piece(1, "c2", "g", '{"b":2}')]],
    "name late": [[piece(0, "c1", None, '{"a"')], [piece(0, None, "f", ":1}")], [piece(1, "c2", "g", '{"b":2}')]],
    "name repeated": [
        [piece(0, "c1", "f", '{"a"')],
        [piece(0, None, "f", ":1}")],
        [piece(1, "c2", "g")],
        [piece(1, None, "g", '{"b":2}')],
    ],
    "id and name in every chunk": [
        [piece(0, "c1", "f", '{"a"')],
        [piece(0, "c1", "f", ":1}")],
        [piece(1, "c2", "g", '{"b":2}')],
    ],
    "empty strings for what is not said again": [
        [piece(0, "c1", "f", "")],
        [piece(0, "", "", '{"a":1}')],
        [piece(1, "c2", "g", "")],
        [piece(1, "", "", '{"b":2}')],
    ],
    "no index": [
        [piece(None, "c1", "f", '{"a"')],
        [piece(None, arguments=":1}")],
        [piece(None, "c2", "g", '{"b":2}')],
    ],
    "the same index with new ids": [[piece(0, "c1", "f", '{"a":1}')], [piece(0, "c2", "g", '{"b":2}')]],
    "indexes that do not begin at 0": [[piece(1, "c1", "f", '{"a":1}')], [piece(7, "c2", "g", '{"b":2}')]],
    "arguments as objects": [[piece(0, "c1", "f", {"a": 1})], [piece(1, "c2", "g", {"b": 2})]],
    "one character a chunk": [
        [piece(0, "c1", "f")],
        *([piece(0, arguments=one)] for one in '{"a":1}'),
        [piece(1, "c2", "g")],
        *([piece(1, arguments=one)] for one in '{"b":2}'),
    ],
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_two_calls_are_the_same_in_every_dialect(dialect: str):
    items = made(turn(), [*(chunk(tool_calls=one) for one in DIALECTS[dialect]), chunk("tool_calls")])
    assert calls(items) == [("c1", "f", '{"a":1}'), ("c2", "g", '{"b":2}')]


@pytest.mark.parametrize(
    "pieces",
    [
        [piece(None, None, "f", '{"a":1}'), piece(None, None, "g", '{"b":2}')],
        [piece(0, "", "f", '{"a":1}'), piece(0, "", "g", '{"b":2}')],
        [piece(0, None, "f", '{"a":1}'), piece(1, None, "g", '{"b":2}')],
    ],
)
def test_a_missing_call_id_is_made_up(pieces: list[dict[str, Any]]):
    (first, *f), (second, *g) = calls(made(turn(), [chunk(tool_calls=[one]) for one in pieces]))
    assert (f, g) == (["f", '{"a":1}'], ["g", '{"b":2}'])
    assert first != second and first.startswith("call_") and second.startswith("call_")


def test_a_name_in_pieces_is_put_together():
    tools = toolbox(function("get_weather"))
    pieces = [piece(0, "c1", "get_"), piece(0, None, "weather"), piece(0, arguments="{}")]
    assert calls(made(turn(tools), [chunk(tool_calls=[one]) for one in pieces])) == [("c1", "get_weather", "{}")]


def test_empty_arguments_are_an_empty_object():
    pieces = [piece(0, "c1", "f"), piece(1, "c2", "g", ""), piece(2, "c3", "f", None)]
    assert [one[2] for one in calls(made(turn(), [chunk(tool_calls=[one]) for one in pieces]))] == ["{}"] * 3


def test_a_call_id_that_comes_again_is_replaced():
    pieces = [piece(index, "c1", "f", "{}") for index in range(4)]
    ids = [one[0] for one in calls(made(turn(), [chunk(tool_calls=[one]) for one in pieces]))]
    assert ids[0] == "c1" and len(set(ids)) == 4


def test_a_call_id_has_no_more_characters_than_the_api_takes():
    pieces = [piece(0, "x" * 100 + "1", "f", "{}"), piece(1, "x" * 100 + "2", "g", "{}")]
    first, second = (one[0] for one in calls(made(turn(), [chunk(tool_calls=[one]) for one in pieces])))
    assert first == "x" * 64 and second != first and len(second) <= 64


def test_text_before_and_after_a_call_are_messages_of_their_own():
    chunks = [chunk(content="a"), chunk(tool_calls=[piece(0, "c1", "f", "{}")]), chunk(content="b")]
    items = made(turn(), chunks)
    assert [one["type"] for one in items] == ["message", "function_call", "message"]


def test_a_call_that_is_cut_off_is_incomplete():
    chunks = [chunk(content="a"), chunk(tool_calls=[piece(0, "c1", "f", '{"a"')])]
    message, cut_off = made(turn(), chunks, "incomplete")
    assert (message["status"], cut_off["status"], cut_off["arguments"]) == ("completed", "incomplete", '{"a"')


def test_what_follows_a_call_waits_until_its_arguments_are_whole():
    speaking = turn()
    speaking.feed(chunk(tool_calls=[piece(0, "c1", "f", '{"a"')]))
    assert speaking.feed(chunk(tool_calls=[piece(1, "c2", "g", '{"b":2}')])) == []
    events = speaking.feed(chunk(tool_calls=[piece(0, arguments=":1}")]))
    assert deltas(events, "function_call_arguments") == [":1}", '{"b":2}']


def test_a_namespace_is_set_on_the_call():
    tools = toolbox({"type": "namespace", "name": "crm", "tools": [function("find")]})
    (found,) = made(turn(tools), [chunk(tool_calls=[piece(0, "c1", "crm__find", "{}")])])
    assert (found["name"], found["namespace"]) == ("find", "crm")


# -- Custom tools -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pieces", "input"),
    [
        ([piece(0, "c1", "run", '{"input":"ls'), piece(0, arguments=' -l"}')], "ls -l"),
        ([piece(0, "c1", "run", '{"input":""}')], ""),
        ([piece(0, "c1", "run", "ls -l")], "ls -l"),
        ([piece(0, "c1", "run", '{"command":"ls"}')], '{"command":"ls"}'),
        (
            [
                {"index": 0, "id": "c1", "custom": {"name": "run", "input": "ls"}},
                {"index": 0, "custom": {"input": " -l"}},
            ],
            "ls -l",
        ),
        ([{"index": 0, "id": "c1", "custom": {"name": "run"}}], ""),
    ],
)
def test_a_custom_tool_gets_its_free_text_wrapped_or_native(pieces: list[dict[str, Any]], input: str):
    (custom,) = made(turn(), [chunk(tool_calls=[one]) for one in pieces])
    assert (custom["type"], custom["call_id"], custom["input"]) == ("custom_tool_call", "c1", input)


def test_two_native_custom_calls_at_one_index_are_told_apart_by_id():
    pieces = [{"index": 0, "id": id, "custom": {"name": "run", "input": id}} for id in ("c1", "c2")]
    assert calls(made(turn(), [chunk(tool_calls=[one]) for one in pieces])) == [
        ("c1", "run", "c1"),
        ("c2", "run", "c2"),
    ]


# -- Refused calls ----------------------------------------------------------------------------------------------------------


def test_a_call_of_a_tool_that_is_not_offered_is_no_item_and_is_remembered_once():
    speaking = turn()
    chunks = [chunk(tool_calls=[piece(0, "c1", "h", '{"a"')]), chunk(tool_calls=[piece(0, arguments=":1}")])]
    assert made(speaking, [*chunks, chunk("tool_calls")]) == []
    (refused,) = speaking.own_calls
    assert (
        refused == OwnCall("c1", "h", '{"a":1}', Rejected(refused.verdict.reason), refused.place)
        and "'h'" in refused.verdict.reason
    )
    assert speaking.client_calls == 0


def test_calls_around_a_refused_one_are_handed_over():
    speaking = turn()
    pieces = [piece(0, "c1", "f", "{}"), piece(1, "c2", "h", "{}"), piece(2, "c3", "g", "{}")]
    items = made(speaking, [chunk(tool_calls=[one]) for one in pieces])
    assert [one[0] for one in calls(items)] == ["c1", "c3"]
    assert ([one.call_id for one in speaking.own_calls], speaking.client_calls) == (["c2"], 2)


def test_without_tools_every_call_is_refused():
    speaking = turn(NO_TOOLS)
    assert made(speaking, [chunk(tool_calls=[piece(0, None, "f")])]) == []
    assert speaking.own_calls[0].call_id.startswith("call_")


# -- What a chunk says beside -----------------------------------------------------------------------------------------------


def test_usage_counts_wherever_it_stands():
    speaking = turn()
    speaking.feed(decode_chunk(b'{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4}}'))
    assert speaking.usage is not None and speaking.usage.prompt_tokens == 3
    speaking.feed(decode_chunk(b'{"choices":[{"finish_reason":"length"}],"usage":{"prompt_tokens":5}}'))
    assert speaking.usage.prompt_tokens == 5 and speaking.finish_reason == "length"
    speaking.feed(decode_chunk(b'{"choices":[],"usage":{"prompt_tokens":null}}'))
    assert speaking.usage.prompt_tokens == 5


def test_chunks_without_anything_say_nothing():
    assert (
        said(turn(), [decode_chunk(b"{}"), decode_chunk(b'{"choices":null}'), decode_chunk(b'{"choices":[{}]}')]) == []
    )
