"""Counting tokens: the requests that are sent for it, and the counts that are remembered."""

import json
from typing import Any

import pytest

from app.domain.token_count import completion, is_text, tokenize
from app.outbound.catalog import UpstreamEntry
from app.outbound.tokens import ChatRequest, RememberedCounts
from app.outbound.upstream import Upstream
from app.settings import Settings

USER = {"role": "user", "content": "Hi"}


def chat(*messages: dict[str, Any], **more: Any) -> bytes:
    return json.dumps({"model": "m", "messages": list(messages) or [USER], "stream": True, **more}).encode()


def with_part(type_: str) -> bytes:
    return chat({"role": "user", "content": [{"type": "text", "text": "x"}, {"type": type_}]})


# -- Requests ---------------------------------------------------------------------------------------------------------------


def test_messages_without_content_or_with_parts_of_text_are_text():
    assert is_text(chat(USER, {"role": "assistant", "content": None, "tool_calls": []}))
    assert is_text(with_part("text"))


@pytest.mark.parametrize("type_", ["image_url", "input_audio", "file"])
def test_media_are_no_text_and_not_tokenized(type_: str):
    assert not is_text(with_part(type_))
    assert tokenize(with_part(type_)) is None


def test_tokenize_takes_what_a_chat_template_reads():
    tools, kwargs = [{"type": "function"}], {"thinking": True}
    body = chat(tools=tools, chat_template_kwargs=kwargs, temperature=1, stream_options={}, parallel_tool_calls=True)
    assert json.loads(tokenize(body) or b"") == {
        "model": "m",
        "messages": [USER],
        "tools": tools,
        "chat_template_kwargs": kwargs,
        "add_generation_prompt": True,
    }


def test_a_request_without_a_generation_prompt_is_tokenized_without_one():
    body = tokenize(chat(add_generation_prompt=False, continue_final_message=True)) or b""
    assert json.loads(body)["add_generation_prompt"] is False


@pytest.mark.parametrize("name", ["reasoning_effort", "response_format", "tool_choice", "documents"])
def test_a_prompt_with_what_tokenize_does_not_know_is_not_tokenized(name: str):
    assert tokenize(chat(**{name: "x"})) is None


def test_a_completion_has_the_limit_of_its_dialect_and_no_stream():
    body = completion(chat(stream_options={"include_usage": True}, min_tokens=7, seed=1), max_completion_tokens=1)
    assert json.loads(body) == {
        "model": "m",
        "messages": [USER],
        "stream": False,
        "seed": 1,
        "max_completion_tokens": 1,
    }


# -- Remembered counts ------------------------------------------------------------------------------------------------------


def upstream(name: str = "u", **settings: Any) -> Upstream:
    return Upstream(name, UpstreamEntry(base_url="http://h/v1"), Settings(**settings))


async def test_the_content_hash_names_the_tenant_the_upstream_the_model_and_the_request():
    one, other, body = upstream(), upstream("v"), chat()
    hashes = {
        ChatRequest(one, "m", body, None).content_hash("a"),
        ChatRequest(one, "m", body, None).content_hash("b"),
        ChatRequest(other, "m", body, None).content_hash("a"),
        ChatRequest(one, "n", body, None).content_hash("a"),
        ChatRequest(one, "m", body + b" ", None).content_hash("a"),
    }
    assert len(hashes) == 5
    assert ChatRequest(one, "m", bytes(body), "k").content_hash("a") in hashes


async def test_a_caller_whose_key_the_upstream_gets_finds_no_count_of_another_key():
    passing = upstream(upstream_auth="caller")
    hashes = {ChatRequest(passing, "m", chat(), key).content_hash("a") for key in (None, "k", "l")}
    assert len(hashes) == 3


def test_the_count_that_was_not_asked_for_longest_is_forgotten():
    counts = RememberedCounts(2, 60)
    counts.add(b"a", 1)
    counts.add(b"b", 2)
    assert counts.get(b"a") == 1
    counts.add(b"c", 3)
    assert [counts.get(key) for key in (b"a", b"b", b"c")] == [1, None, 3]


@pytest.mark.parametrize("counts", [RememberedCounts(0, 60), RememberedCounts(10, 0)])
def test_no_room_or_no_time_remembers_nothing(counts: RememberedCounts):
    counts.add(b"a", 1)
    assert counts.get(b"a") is None


# -- Addresses --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base_url", "beside", "below"),
    [
        ("http://h:1/v1", "http://h:1/tokenize", "http://h:1/v1/x/y"),
        ("http://h:1/v1/", "http://h:1/tokenize", "http://h:1/v1/x/y"),
        ("http://h:1", "http://h:1/tokenize", "http://h:1/x/y"),
        ("https://h/llm/v1?key=k", "https://h/llm/tokenize?key=k", "https://h/llm/v1/x/y?key=k"),
        ("https://h/llm", "https://h/llm/tokenize", "https://h/llm/x/y"),
        ("https://h/rev1", "https://h/rev1/tokenize", "https://h/rev1/x/y"),
    ],
)
async def test_endpoints_are_below_the_base_url_or_beside_its_v1(base_url: str, beside: str, below: str):
    made = Upstream("u", UpstreamEntry(base_url=base_url), Settings())
    assert str(made._url("/tokenize")) == beside
    assert str(made._url("x/y")) == below
