"""Messages for chat templates that take less than the API: merged, split, with ids of their form."""

from typing import Any

import pytest

from app.domain.dialect import PRESETS, Dialect, preset_of_host, preset_of_owners
from app.domain.messages import messages
from tests.unit.build import assistant, call, context, output, plain, user

SYSTEM = {"role": "system", "content": "s"}
IMAGE = {"role": "user", "content": [{"type": "input_image", "image_url": "data:x"}]}
IN_TURN = Dialect(lacks=frozenset({"repeated_roles"}))
SYSTEM_FIRST = Dialect(lacks=frozenset({"later_system_messages"}))
ONE_CALL = Dialect(lacks=frozenset({"parallel_calls_in_history"}))
NINE = Dialect(call_id_format="nine_alphanumerics")


def said(*items: dict[str, Any], dialect: Dialect, **body: Any) -> list[dict[str, Any]]:
    """The messages of a context of these items."""
    made: list[dict[str, Any]] = plain(messages(context(*items, **body), dialect, lambda sealed: sealed))
    return made


def roles(*items: dict[str, Any], dialect: Dialect) -> list[tuple[str, Any]]:
    """Who says what."""
    return [(message["role"], message["content"]) for message in said(*items, dialect=dialect)]


def test_neighbours_of_one_role_are_one():
    assert roles(user("a"), user("b"), assistant("c"), assistant("d"), user("e"), dialect=IN_TURN) == [
        ("user", "a\n\nb"),
        ("assistant", "c\n\nd"),
        ("user", "e"),
    ]


def test_a_user_never_speaks_at_once_behind_the_output_of_a_call():
    items = [user("a"), call("c1"), output("c1"), user("b")]
    assert [role for role, _ in roles(*items, dialect=IN_TURN)] == ["user", "assistant", "tool", "assistant", "user"]


def test_parts_and_texts_of_neighbours_are_parts():
    assert roles(user("a"), IMAGE, user(""), dialect=IN_TURN) == [
        ("user", [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "data:x"}}])
    ]


def test_an_answer_before_a_call_is_said_with_it():
    thought = {
        "type": "reasoning",
        "id": "rs",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": "hm"}],
    }
    dialect = Dialect(lacks=frozenset({"repeated_roles"}), reasoning="reasoning")
    items = [assistant("a"), thought, assistant("b"), call("c1"), output("c1"), assistant("c")]
    first, tool, last = said(*items, dialect=dialect)
    assert (first["content"], first["reasoning"], [one["id"] for one in first["tool_calls"]]) == (
        "a\n\nb",
        "hm",
        ["c1"],
    )
    assert (tool["role"], last["content"]) == ("tool", "c")


def test_calls_that_follow_each_other_stay_apart():
    items = [user("a"), call("c1"), output("c1"), call("c2"), output("c2")]
    assert [role for role, _ in roles(*items, dialect=IN_TURN)] == ["user", "assistant", "tool", "assistant", "tool"]


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([user("a"), SYSTEM, user("b")], [("user", "a\n\ns\n\nb")]),
        ([user("a"), assistant("b"), SYSTEM, user("c")], [("user", "a"), ("assistant", "b"), ("user", "s\n\nc")]),
        ([user("a"), SYSTEM, assistant("b"), user("c")], [("user", "a\n\ns"), ("assistant", "b"), ("user", "c")]),
        ([user("a"), user("b")], [("user", "a"), ("user", "b")]),
    ],
)
def test_a_later_system_message_never_makes_two_users_in_a_row(items: list[dict[str, Any]], expected: Any):
    assert roles(*items, dialect=SYSTEM_FIRST) == expected


def test_calls_made_at_once_become_one_after_the_other():
    items = [assistant("look"), call("c1"), call("c2"), output("c2", "two"), output("c1", "one"), assistant("done")]
    made = said(*items, dialect=ONE_CALL)
    assert [(one["role"], one["content"]) for one in made] == [
        ("assistant", "look"),
        ("tool", "one"),
        ("assistant", None),
        ("tool", "two"),
        ("assistant", "done"),
    ]
    assert [[call["id"] for call in one["tool_calls"]] for one in made if "tool_calls" in one] == [["c1"], ["c2"]]


def test_ids_of_calls_have_nine_letters_and_digits():
    made = said(
        call("call_0123456789"), call("abcDEF123"), output("call_0123456789"), output("abcDEF123"), dialect=NINE
    )
    first, second = (one["id"] for one in made[0]["tool_calls"])
    assert len(first) == 9 and first.isalnum() and second == "abcDEF123"
    assert [one["tool_call_id"] for one in made[1:]] == [first, second]
    assert said(call("call_0123456789"), output("call_0123456789"), dialect=NINE)[1]["tool_call_id"] == first


# -- Presets ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("owners", "found"),
    [
        (["vllm", "vllm"], "vllm"),
        (["llamacpp"], "llama.cpp"),
        (["sglang"], "sglang"),
        (["library", "somebody"], "ollama"),
        (["mistralai"], "mistral"),
        (["openai", None], None),
        (["vllm", "llamacpp"], None),
        ([], None),
    ],
)
def test_an_engine_is_known_by_the_owner_of_its_models(owners: list[str | None], found: str | None):
    assert preset_of_owners(owners) == found


def test_a_service_is_known_by_its_host():
    assert preset_of_host("openrouter.ai") == "openrouter"
    assert preset_of_host("openrouter.ai.example") is None
    assert preset_of_host(None) is None


def test_every_preset_but_the_plain_one_says_how_reasoning_goes_back():
    assert [name for name, preset in PRESETS.items() if preset.reasoning == "same"] == ["plain"]
