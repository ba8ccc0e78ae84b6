"""Compaction: what the model sees of a context, what an item holds, which calls stay with their outputs."""

from typing import Any

import pytest
from msgspec.structs import replace

from app.domain.compaction import (
    COMPACTED_BYTES_MAX,
    HEADING,
    LEFT_OUT,
    MEDIA_TOKENS,
    MESSAGES_HEADING,
    Compacted,
    can_compact,
    context_tokens,
    counted_tokens,
    estimated_tokens,
    fitting,
    last_messages,
    newest_compaction,
    open_compacted,
    seal_compacted,
)
from app.domain.dialect import Dialect
from app.domain.messages import messages
from app.domain.sealed import KEY_BYTES, Seal
from app.errors import InvalidRequest
from app.wire.items import SEALED_CHARS_MAX, Compaction, InputImage, InputText, Message, PromptedMessage
from app.wire.resources import InputTokensDetails, OutputTokensDetails, Usage
from tests.unit.build import SEAL, assistant, call, context, function, item, output, plain, request, user

IMAGE = {"type": "input_image", "image_url": "data:image/png;base64," + "A" * 40_000}
REQUEST = {"type": "mcp_approval_request", "id": "mcpr_1", "server_label": "s", "name": "t", "arguments": "{}"}


def compaction(summary: str = "so far", *kept: dict[str, Any], id: str = "") -> dict[str, Any]:
    """A compaction item that this server has sealed."""
    held = Compacted(summary, [message for message in map(item, kept) if isinstance(message, Message)])
    return {"type": "compaction", "id": id, "encrypted_content": seal_compacted(held, SEAL)}


def seen(*items: dict[str, Any], dialect: Dialect | None = None, **options: Any) -> list[dict[str, Any]]:
    """The messages that the model sees of these items."""
    made: list[dict[str, Any]] = plain(messages(context(*items, **options), dialect or Dialect(), SEAL.open))
    return made


def summed(text: str = "so far") -> dict[str, Any]:
    """The message that stands for what was compacted."""
    return {"role": "user", "content": f"{HEADING}\n\n{text}"}


# -- What the model sees ----------------------------------------------------------------------------------------------------


def test_the_summary_stands_for_what_precedes_it():
    assert seen(user("a"), assistant("b"), compaction(), user("c")) == [summed(), {"role": "user", "content": "c"}]


def test_only_the_newest_counts():
    assert seen(user("a"), compaction("old"), user("b"), compaction("new"), user("c"))[0] == summed("new")
    assert len(seen(compaction("old"), compaction("new"))) == 1


def test_instructions_stay():
    items = ({"role": "developer", "content": "be brief"}, user("a"), {"role": "system", "content": "be kind"})
    assert [one["content"] for one in seen(*items, compaction(), instructions="be true")] == [
        "be true",
        "be brief",
        "be kind",
        summed()["content"],
    ]


def test_a_compaction_of_the_chain_counts_and_its_tools_stay():
    tools = {"type": "additional_tools", "tools": [{"type": "function", "name": "f", "parameters": {}}]}
    made = context(user("next"), chain=[tools, user("a"), compaction(id="cmp_1")])
    assert list(made.toolbox.offers) == ["f"]
    assert [at for at, _ in made.visible] == [2, 3]


def test_the_user_s_last_messages_are_in_the_summary_s_message():
    text = f"{HEADING}\n\nso far\n\n{MESSAGES_HEADING}\n\na\n\nb"
    kept = [{"role": "user", "content": [{"type": "input_text", "text": one}]} for one in "ab"]
    assert seen(compaction("so far", *kept)) == [{"role": "user", "content": text}]
    [made] = seen(compaction("so far", {"role": "user", "content": [{"type": "input_text", "text": "a"}, IMAGE]}))
    assert [part["type"] for part in made["content"]] == ["text", "text", "image_url"]


def test_a_summary_is_the_user_s_even_where_instructions_have_a_role_of_their_own():
    assert seen(compaction(), dialect=Dialect(developer_role=True)) == [summed()]


def test_one_that_was_broken_off_stands_for_nothing():
    broken = {"type": "compaction", "encrypted_content": ""}
    assert [one["content"] for one in seen(user("a"), broken, user("b"))] == ["a", "b"]
    assert newest_compaction([item(user("a")), item(broken)]) == -1


# -- Calls and outputs ------------------------------------------------------------------------------------------------------


def test_a_call_that_is_answered_after_the_summary_comes_after_it():
    given = [user("a"), call("c1", "f", '{"a":1}'), call("c0"), output("c0"), compaction(), output("c1", "found")]
    assert seen(*given) == [
        summed(),
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "found"},
    ]


@pytest.mark.parametrize(
    "before",
    [[call("c1")], [output("c1")], [call("c1"), output("c1")], [REQUEST], [call("c1"), call("c1"), output("c1")]],
)
def test_what_a_summary_stands_for_needs_no_partner(before: list[dict[str, Any]]):
    assert seen(*before, compaction(), user("b")) == [summed(), {"role": "user", "content": "b"}]


def test_an_output_answers_a_later_call_rather_than_one_before_the_summary():
    made = seen(call("c1", "old"), compaction(), call("c1", "new"), output("c1"))
    assert [one["tool_calls"][0]["function"]["name"] for one in made if "tool_calls" in one] == ["new"]


@pytest.mark.parametrize("after", [[call("c1")], [output("c1")]])
def test_what_follows_a_summary_needs_its_partner(after: list[dict[str, Any]]):
    with pytest.raises(InvalidRequest, match="No tool"):
        context(user("a"), call("c2"), output("c2"), compaction(), *after)


def test_an_approval_request_that_is_denied_after_the_summary_comes_after_it():
    denial = {"type": "mcp_approval_response", "approval_request_id": "mcpr_1", "approve": False}
    made = context(compaction(), chain=[user("a"), REQUEST])
    assert made.answers == {}
    both = [item(one) for one in (user("a"), REQUEST, compaction(), denial)]
    from app.domain.context import pair

    assert list(pair(both)) == [1]


# -- What an item holds -----------------------------------------------------------------------------------------------------


def test_an_item_opens_for_its_tenant_alone_and_reasoning_s_seal_is_another():
    sealed = seal_compacted(Compacted("s"), SEAL)
    held = Compaction(encrypted_content=sealed)
    assert open_compacted(held, SEAL.open) == Compacted("s")
    assert SEAL.open(sealed) is None
    other = Seal(bytes(KEY_BYTES)).of("another")
    assert open_compacted(held, other.open) is None
    assert open_compacted(Compaction(encrypted_content=SEAL.close('{"summary":"s"}')), SEAL.open) is None
    assert open_compacted(Compaction(encrypted_content=SEAL.close("[]", "compaction")), SEAL.open) is None


def test_an_old_key_opens_it_and_a_lost_one_does_not():
    new, lost = Seal(bytes([1] * KEY_BYTES), bytes(KEY_BYTES)), Seal(bytes([1] * KEY_BYTES))
    held = Compaction(encrypted_content=seal_compacted(Compacted("s"), SEAL))
    assert open_compacted(held, new.of("tenant").open) == Compacted("s")
    assert open_compacted(held, lost.of("tenant").open) is None


FORGED = ("x", SEAL.close('{"summary":"s"}'), "gAAAA" + "A" * 1000)


@pytest.mark.parametrize("sealed", FORGED, ids=["no-token", "for-reasoning", "forged"])
def test_what_this_server_did_not_seal_is_refused_with_its_path(sealed: str):
    with pytest.raises(InvalidRequest) as refused:
        context(user("a"), {"type": "compaction", "encrypted_content": sealed})
    assert (refused.value.code, refused.value.param) == ("invalid_encrypted_content", "input[1].encrypted_content")


def test_reasoning_s_place_takes_no_compaction():
    sealed = seal_compacted(Compacted("s"), SEAL)
    with pytest.raises(InvalidRequest) as refused:
        context({"type": "reasoning", "summary": [], "encrypted_content": sealed}, user("a"))
    assert refused.value.code == "invalid_encrypted_content"


def test_a_stored_item_whose_key_is_lost_is_refused_unless_a_newer_one_stands_for_it():
    lost = {"type": "compaction", "id": "cmp_1", "encrypted_content": "of a lost key"}
    with pytest.raises(InvalidRequest) as refused:
        context(user("a"), chain=[lost])
    assert (refused.value.code, refused.value.param) == ("invalid_encrypted_content", "input")
    assert seen(compaction("new"), chain=[lost]) == [summed("new")]


# -- What to compact --------------------------------------------------------------------------------------------------------


def test_the_last_messages_are_those_right_before_each_other():
    kept = [user("kept")]
    given = [user("a"), assistant("b"), user("c"), user("d"), call("c1"), output("c1")]

    def last(*items: dict[str, Any]) -> list[Any]:
        found = last_messages(list(context(*items).items), SEAL.open)
        return [part.text for one in found for part in one.content if isinstance(part, InputText)]

    assert last(*given) == ["c", "d"]
    assert last(user("a"), compaction("s", *kept), user("b")) == ["b"]
    normal = {"role": "user", "content": [{"type": "input_text", "text": "kept"}]}
    assert last(user("a"), compaction("s", normal), assistant("b")) == ["kept"]
    assert last(assistant("b")) == []


@pytest.mark.parametrize(
    ("given", "can"),
    [
        ([user("a"), user("b")], False),
        ([user("a"), assistant("b")], True),
        ([user("a"), assistant("b"), compaction()], False),
        ([user("a"), assistant("b"), compaction(), user("c")], False),
        ([compaction(), call("c"), output("c")], True),
        ([{"role": "system", "content": "x"}, user("a"), {"type": "compaction", "encrypted_content": ""}], False),
    ],
)
def test_a_context_of_nothing_but_messages_to_the_model_is_not_compacted(given: list[dict[str, Any]], *, can: bool):
    assert can_compact(context(*given).items) is can


def test_the_estimate_is_a_quarter_of_the_bytes_and_does_not_count_those_of_images():
    text = item(user("x" * 4000))
    assert 1000 <= estimated_tokens([text]) <= 1030
    image = item({"role": "user", "content": [IMAGE]})
    assert MEDIA_TOKENS <= estimated_tokens([image]) <= MEDIA_TOKENS + 30
    shown = item(output("c", [{"type": "input_text", "text": "x"}, IMAGE]))
    assert MEDIA_TOKENS <= estimated_tokens([shown]) <= MEDIA_TOKENS + 60


def test_a_whole_context_is_estimated_with_its_instructions_and_tools():
    asked = request(instructions="x" * 400, tools=[function("f", description="y" * 400)])
    assert 200 <= context_tokens(asked, []) <= 240


def test_the_messages_of_a_prompt_are_estimated_as_those_of_a_context():
    prompted = [
        PromptedMessage("developer", [InputText(text="x" * 400)]),
        PromptedMessage("user", [InputImage(image_url=IMAGE["image_url"])]),
    ]
    asked = replace(request(), prompted=prompted)
    assert MEDIA_TOKENS + 100 <= context_tokens(asked, []) <= MEDIA_TOKENS + 150


def summarized(text: str, summary: str) -> dict[str, Any]:
    """Reasoning with a summary."""
    parts = [{"type": "summary_text", "text": summary}]
    return {"type": "reasoning", "summary": parts, "content": [{"type": "reasoning_text", "text": text}]}


@pytest.mark.parametrize(
    ("output", "counted"),
    [
        ([assistant("x")], 30),
        ([{"type": "reasoning", "summary": []}, call("c")], 30),
        ([summarized("hm", "hm"), assistant("x")], 30),
        ([summarized("hm", "by another model"), assistant("x")], None),
        ([], None),
        ([assistant("x"), {"type": "web_search_call", "id": "ws_1"}], None),
        ([compaction(), assistant("x")], None),
    ],
)
def test_the_usage_of_a_response_counts_its_context_if_that_took_one_turn(output: list[Any], counted: int | None):
    usage = Usage(20, InputTokensDetails(), 10, OutputTokensDetails(), 30)
    assert counted_tokens(usage, [item(one) for one in output]) == counted
    assert counted_tokens(None, [item(one) for one in output]) is None


def test_an_item_is_no_longer_than_the_api_allows():
    big = {**IMAGE, "image_url": "data:image/png;base64," + "A" * 8_000_000}
    [text] = context(user("x")).items
    [shown] = context({"role": "user", "content": [{"type": "input_text", "text": "see"}, big]}).items
    [long] = context(user("\n" * 4_500_000)).items
    assert isinstance(text, Message) and isinstance(shown, Message) and isinstance(long, Message)
    assert fitting("s", [text]).messages == [text]
    [kept] = fitting("s", [shown]).messages
    assert [plain(part)["text"] for part in kept.content] == ["see", LEFT_OUT]
    assert fitting("s", [long]).messages == []
    most = Compacted("s" * (COMPACTED_BYTES_MAX - 14))
    assert len(plain(most)["summary"]) > 7_000_000
    sealed = seal_compacted(most, SEAL)
    assert open_compacted(Compaction(encrypted_content=sealed), SEAL.open) == most
    assert SEALED_CHARS_MAX - 2000 < len(sealed) <= SEALED_CHARS_MAX
