"""`truncation: auto`: which positions a context may begin at, what it then holds, and how much is left out."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from app.domain.compaction import Compacted, seal_compacted
from app.domain.context import Context, pair
from app.domain.truncation import estimated_prompt, later_start, starts, truncated
from app.wire.items import InputText, PromptedMessage
from tests.unit.build import SEAL, assistant, call, context, output, request, user

SYSTEM = {"role": "developer", "content": "Be brief."}
REASONING = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]}


def texts(made: Context) -> list[str]:
    """A word for each item."""
    return [str(getattr(item, "call_id", None) or item.content[0].text) for item in made.items]  # type: ignore[union-attr]


def test_a_context_may_begin_with_each_turn_but_the_first():
    made = context(user("1"), assistant("a"), user("2"), user("2b"), assistant("b"), user("3"))
    assert starts(made) == [2, 5]
    assert texts(truncated(made, 2)) == ["2", "2b", "b", "3"]
    assert texts(truncated(made, 5)) == ["3"]


def test_a_turn_is_dropped_with_its_calls_outputs_and_reasoning():
    first = [user("1"), REASONING, call("c1"), output("c1"), assistant("a")]
    made = context(*first, user("2"), call("c2"), output("c2"), assistant("b"))
    assert starts(made) == [len(first)]
    rest = truncated(made, len(first))
    assert texts(rest) == ["2", "c2", "c2", "b"]
    assert rest.answers == {1: rest.items[2]}


def test_a_call_that_is_answered_in_a_later_turn_stays_with_its_output():
    made = context(user("1"), assistant("a"), user("2"), call("c1"), user("3"), output("c1"), assistant("b"), user("4"))
    assert starts(made) == [2, 7]


@pytest.mark.parametrize("items", [[user("1"), assistant("a")], [assistant("a")], [SYSTEM, user("1")]])
def test_the_last_turn_stays(items: list[dict[str, Any]]):
    made = context(*items)
    assert starts(made) == []
    assert later_start(request(), made, 0, 0.5) is None


def test_instructions_stay_where_they_stand():
    made = context(SYSTEM, user("1"), assistant("a"), SYSTEM, user("2"), SYSTEM, assistant("b"))
    assert starts(made) == [4]
    assert texts(truncated(made, 4)) == ["Be brief.", "Be brief.", "2", "Be brief.", "b"]


COMPACTION = {
    "type": "compaction",
    "id": "cmp_1",
    "encrypted_content": seal_compacted(Compacted(summary="So far."), SEAL),
}


def test_a_compaction_item_stays_and_what_it_stands_for_is_no_turn():
    made = context(user("1"), assistant("a"), COMPACTION, user("2"), assistant("b"), user("3"), assistant("c"))
    assert starts(made) == [5]
    rest = truncated(made, 5)
    assert [type(item).__name__ for item in rest.items] == ["Compaction", "Message", "Message"]
    assert rest.visible == list(enumerate(rest.items))


def test_a_context_that_was_compacted_later_is_whole_again():
    made = context(user("1"), assistant("a"), user("2"), call("c1"), COMPACTION, output("c1"), user("3"))
    assert truncated(made, 2) is made
    assert truncated(made, 3) is made


def turns(count: int) -> list[dict[str, Any]]:
    return [item for _ in range(count) for item in (user("x" * 1000), assistant("y" * 1000))]


@pytest.mark.parametrize(
    ("share", "start"), [(0.01, 2), (0.05, 2), (0.15, 4), (0.55, 12), (0.9, 18), (1.0, 18), (None, 10)]
)
def test_as_many_turns_are_left_out_as_the_share_demands(share: float | None, start: int):
    assert later_start(request(), context(*turns(10)), 0, share) == start


def test_what_is_left_out_already_does_not_count_and_every_start_is_later():
    made = context(*turns(10))
    assert later_start(request(), made, 10, 0.15) == 12
    assert later_start(request(), made, 16, 0.01) == 18
    assert later_start(request(), made, 18, 0.01) is None


def test_the_share_is_of_the_whole_prompt():
    body = request(instructions="z" * 20_000)
    assert later_start(body, context(*turns(10)), 0, 0.15) == 6


def test_the_messages_of_a_prompt_count_as_instructions_do():
    made = context(*turns(10))
    prompted = replace(request(), prompted=[PromptedMessage("developer", [InputText(text="z" * 20_000)])])
    assert later_start(prompted, made, 0, 0.15) == 6
    assert estimated_prompt(prompted, made) - estimated_prompt(request(), made) > 5_000


KINDS = st.lists(st.sampled_from(["user", "assistant", "call", "output", "system", "reasoning"]), max_size=30)


@given(KINDS)
def test_no_item_is_ever_without_its_partner(kinds: list[str]):
    items: list[dict[str, Any]] = [SYSTEM]
    unanswered: list[str] = []
    for number, kind in enumerate(kinds):
        if kind == "call":
            unanswered.append(f"c{number}")
            items.append(call(unanswered[-1]))
        elif kind == "output" and unanswered:
            items.append(output(unanswered.pop(0)))
        elif kind == "reasoning":
            items.append({**REASONING, "id": f"rs_{number}"})
        elif kind == "system":
            items.append(SYSTEM)
        elif kind in {"user", "assistant"}:
            items.append({"user": user, "assistant": assistant}[kind](str(number)))
    made = context(*items, *map(output, unanswered))
    for start in starts(made):
        rest = truncated(made, start)
        assert rest.answers == pair(rest.items)  # which refuses what has no partner
        assert [item for item in rest.items if getattr(item, "role", "") == "developer"] == [
            item for item in made.items if getattr(item, "role", "") == "developer"
        ]
