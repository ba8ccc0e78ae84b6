"""Agents, purely: what is applied to a request, and what is updated."""

from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from app.domain.agents import CREATE, NamedAgent, apply, is_agent_name, new_agent, updated, with_messages
from app.domain.rights import Rights
from app.errors import ApiError, InvalidParameter
from app.wire.requests import CreateResponse, ToolSecrets, as_stored, decode_create
from app.wire.run_limits import RunLimits
from app.wire.tools import McpTool

BOX = {
    "type": "mcp",
    "server_label": "box",
    "server_url": "https://tools.example/key-in-path",
    "authorization": "t0ken",
    "headers": {"x-key": "k3y"},
}


def made(**fields: Any) -> NamedAgent:
    return new_agent(CREATE.decode(msgspec.json.encode({"name": "a", "model": "own", **fields})), id="agent_1", now=5)


def asked(agent: NamedAgent, **body: Any) -> tuple[CreateResponse, bytes]:
    """A request that names an agent, applied, and its raw body."""
    raw = msgspec.json.encode({"model": agent.name, "input": "hi", **body})
    return with_messages(agent, apply(agent, decode_create(raw, {"top_k"}), bytes_max=10_000), bytes_max=10_000), raw


def raws(given: Mapping[str, Any]) -> dict[str, Raw]:
    return {name: Raw(msgspec.json.encode(value)) for name, value in given.items()}


@pytest.mark.parametrize(
    ("name", "good"),
    [
        ("a", True),
        ("gpt-4.1:mini_2", True),
        ("x" * 64, True),
        ("", False),
        ("x" * 65, False),
        ("-a", False),
        ("a b", False),
        ("a/b", False),
        ("up@a", False),
        ("qwen*", False),
        ("agent_1", False),
        ("agents", True),
        ("ä", False),
        ("a\n", False),
    ],
)
def test_names(name: str, good: bool):
    assert is_agent_name(name) == good


def test_a_request_names_the_agent_and_asks_its_model():
    request, _ = asked(made(instructions="Be.", temperature=0.5))
    assert (request.named, request.model, request.body.temperature) == ("a", "own", 0.5)
    assert request.prompted[0].role == "developer"


def test_its_size_counts():
    agent = made(instructions="x" * 500, tools=[BOX])
    request, raw = asked(agent)
    assert request.size >= len(raw) + agent.bytes
    assert agent.bytes > 500 + len("key-in-path")


def test_secrets_stand_apart_from_the_definition_and_come_together_for_a_request():
    agent = made(tools=[BOX, {"type": "function", "name": "wave"}])
    secret = ToolSecrets("t0ken", {"x-key": "k3y"}, "https://tools.example/key-in-path")
    assert agent.secrets == {"box": secret}
    text = msgspec.json.encode(agent.agent).decode()
    assert not any(word in text for word in ("t0ken", "k3y", "key-in-path"))
    request, raw = asked(agent)
    [box, _] = request.tools
    assert isinstance(box, McpTool)
    assert (box.authorization, box.headers, box.server_url) == (secret.authorization, secret.headers, secret.server_url)
    stored, apart = as_stored(raw.replace(b"{", b'{"agent":{"variables":{}},', 1), request)
    assert apart == {"box": secret}
    assert not any(word in stored.decode() for word in ("t0ken", "k3y", "key-in-path", "agent"))
    again = decode_create(stored, ())
    assert (again.model, [type(tool) for tool in again.tools]) == ("own", [type(tool) for tool in request.tools])


def test_what_an_update_does_not_name_stays_with_its_secrets():
    agent = made(tools=[BOX], temperature=0.5, instructions="{{a}}", variables={"a": "string"})
    later = updated(agent, raws({"temperature": None, "name": "b"}), now=9)
    assert (later.name, later.agent.temperature, later.created_at, later.updated_at) == ("b", None, agent.created_at, 9)
    assert (later.secrets, later.agent.tools) == (agent.secrets, agent.agent.tools)
    assert (agent.name, agent.agent.temperature) == ("a", 0.5)
    bare = {name: value for name, value in BOX.items() if name not in {"authorization", "headers"}}
    assert updated(agent, raws({"tools": [bare]}), now=9).secrets == {"box": ToolSecrets(None, None, BOX["server_url"])}
    assert updated(agent, raws({"tools": None}), now=9).secrets == {}


@pytest.mark.parametrize(("given_", "param"), [({"name": None}, "name"), ({"tols": []}, "tols"), ({"id": "x"}, "id")])
def test_a_wrong_update_names_its_path(given_: dict[str, Any], param: str):
    with pytest.raises(InvalidParameter) as caught:
        updated(made(), raws(given_), now=9)
    assert caught.value.param == param


def test_tools_of_a_request_leave_the_choice_among_the_agent_s_own():
    agent = made(
        tools=[{"type": "function", "name": "nod"}],
        tool_choice={"type": "function", "name": "nod"},
        overrides=["tools"],
    )
    assert asked(agent)[0].tool_choice.name == "nod"  # type: ignore[union-attr]
    request, raw = asked(agent, tools=[{"type": "function", "name": "bow"}])
    assert (request.tool_choice, request.tools[0].name) == ("auto", "bow")  # type: ignore[union-attr]
    again = decode_create(as_stored(raw, request)[0], ())
    assert (again.tool_choice, again.tools) == ("auto", request.tools)
    assert asked(agent, tools=[])[0].tools == []


def test_its_limits_of_a_run_can_be_lowered_and_not_raised():
    agent = made(run_limits={"tokens": 100, "tool_calls": 3}, overrides=["run_limits"])
    assert asked(agent)[0].body.run_limits == RunLimits(tokens=100, tool_calls=3)
    lowered, raw = asked(agent, run_limits={"tokens": 50, "cost": 0.5})
    assert lowered.body.run_limits == RunLimits(tokens=50, tool_calls=3, cost=0.5)
    assert decode_create(as_stored(raw, lowered)[0], ()).body.run_limits == lowered.body.run_limits
    with pytest.raises(InvalidParameter) as caught:
        asked(agent, run_limits={"tokens": 101})
    assert caught.value.param == "run_limits.tokens"


PARAMETERS = {
    "temperature": 0.5,
    "top_p": 0.5,
    "max_output_tokens": 20,
    "instructions": "x",
    "tools": [{"type": "function", "name": "bow"}],
    "tool_choice": "none",
    "text": {"verbosity": "low"},
    "reasoning": {"effort": "low"},
    "truncation": "auto",
    "top_k": 3,
    "parallel_tool_calls": False,
}


@given(st.sets(st.sampled_from(sorted(PARAMETERS))), st.sets(st.sampled_from(sorted(PARAMETERS))))
def test_a_request_sets_what_it_may_and_nothing_else(sent: set[str], allowed: set[str]):
    agent = made(overrides=sorted(allowed))
    body = {name: PARAMETERS[name] for name in sent}
    if sent <= allowed:
        request, _ = asked(agent, **body)
        assert all(getattr(request.body, name) is not None for name in sent - {"top_k"})
        return
    with pytest.raises(ApiError) as caught:
        asked(agent, **body)
    assert caught.value.param
    assert caught.value.param.partition(".")[0] in sent - allowed


@pytest.mark.parametrize(
    ("users", "models", "may"),
    [
        (None, None, True),
        (["ada"], None, True),
        (["bob"], None, False),
        ([], None, False),
        (None, ("a*",), True),
        (None, ("own",), False),
        (["ada"], ("b",), False),
    ],
)
def test_users_and_models_say_who_may_use_it(users: list[str] | None, models: tuple[str, ...] | None, may: bool):
    agent = made(users=users)
    assert agent.may_be_used(Rights("acme", "ada", models=models)) == may
