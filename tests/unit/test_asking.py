"""How an upstream is asked: over which connections, what is remembered of its models, and what of its words is masked."""

import httpx2
import pytest

from app.outbound.catalog import Route, UpstreamEntry
from app.outbound.upstream import FORMS_MAX, Upstream, _Transport
from app.settings import Settings


async def test_what_goes_out_once_more_may_have_as_many_connections():
    transport = _Transport(limits=httpx2.Limits(max_connections=7))
    async with transport.get_client() as first, transport._without_keepalive.get_client() as again:
        assert (first.connector.limit, again.connector.limit) == (7, 7)


@pytest.mark.parametrize(
    ("auth", "key", "callers", "said", "shown"),
    [
        ("configured", "ollama", None, "try ollama pull x", "try ollama pull x"),
        ("configured", "sk-12345678", None, "sk-12345678 is odd", "*** is odd"),
        ("configured", "", "sk-12345678", "sk-12345678 is odd", "sk-12345678 is odd"),
        ("caller", "", "sk-12345678", "sk-12345678 is odd", "*** is odd"),
        ("caller", "", "ollama", "try ollama pull x", "try ollama pull x"),
    ],
)
def test_keys_that_the_upstream_gets_are_masked_unless_they_are_mere_words(auth, key, callers, said, shown):
    upstream = Upstream("u", UpstreamEntry(base_url="http://h/v1", key=key), Settings(upstream_auth=auth))
    assert upstream.mask(callers).text(said) == shown


def test_the_reasoning_of_so_many_models_is_remembered_and_those_heard_last_stay():
    upstream = Upstream("u", UpstreamEntry(base_url="http://h/v1"), Settings())
    for name in ("kept", "forgotten", "kept", *map(str, range(FORMS_MAX - 1))):
        upstream.record_reasoning_form(name, "think")
    assert [upstream.dialect_for(Route("u", name)).reasoning for name in ("kept", "forgotten", "unheard")] == [
        "think",
        "same",
        "same",
    ]


def test_the_size_of_a_context_is_believed_for_a_while(monkeypatch):
    upstream = Upstream("u", UpstreamEntry(base_url="http://h/v1"), Settings())
    upstream.record_context_tokens("m", 4096)
    upstream.record_context_tokens("m", None)
    assert (upstream.context_tokens("m"), upstream.context_tokens("n")) == (4096, None)
    upstream.record_context_tokens("m", 8192)
    assert upstream.context_tokens("m") == 8192
    monkeypatch.setattr("app.outbound.upstream.CONTEXT_TOKENS_S", 0)
    assert upstream.context_tokens("m") is None
