"""Two tenants and two users with tokens of their single sign-on, on both endpoints, with the same agents: the official client."""

from collections.abc import Iterator

import openai
import pytest
from msgspec import Struct

from tests.issuer import Issuer
from tests.servers import Served
from tests.upstream import Upstream

PEOPLE = {"ada": ("a", "ada"), "bob": ("a", "bob"), "ada of b": ("b", "ada")}

CATALOG = """
[upstreams.up]
base_url = "{upstream}"

[[models]]
name = "good"
routes = [{{ upstream = "up", model = "scripted" }}]

[agents.greeter]
model = "good"
instructions = "Greet people."
overrides = ["temperature"]

[agents.secretary]
model = "good"
instructions = "Keep secrets."
tenants = ["a"]
users = ["ada"]

[issuers.company]
issuer = "{issuer}"
audience = "reprise"
algorithms = ["RS256"]
tenants = ["a", "b"]
creates_tenants = true
claims = {{ tenant = "team", user = "sub", scopes = "scope" }}
"""


class House(Struct):
    """A server, and a client for each of the people."""

    clients: dict[str, openai.OpenAI]
    upstream: Upstream

    def seen(self, text: str) -> list[str]:
        """What the model read the last time that someone wrote this text."""
        return [message["content"] for message in self.upstream.asked(text)[-1].body["messages"]]


@pytest.fixture(scope="module")
def house(base_env, new_database, upstream, tmp_path_factory) -> Iterator[House]:
    with Issuer() as issuer:
        catalog = tmp_path_factory.mktemp("users") / "catalog.toml"
        catalog.write_text(CATALOG.format(upstream=upstream.base_url, issuer=issuer.url))
        env = {name: value for name, value in base_env.items() if name != "OPENAI_BASE_URL"}
        with Served({**env, "DATABASE_URL": new_database(), "REPRISE_CATALOG": str(catalog)}) as served:
            scope = "openid responses.read responses.write"
            tokens = {name: issuer.token(team=team, sub=sub, scope=scope) for name, (team, sub) in PEOPLE.items()}
            yield House({name: served.client(api_key=token) for name, token in tokens.items()}, upstream)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("name", PEOPLE)
def test_a_conversation_begun_on_one_endpoint_is_continued_on_the_other(house, said, name):
    client = house.clients[name]
    kept = {"conversation": client.conversations.create().id}
    first, second, third, fourth = (f"{said} {number}" for number in range(4))
    asked = {"model": "greeter", "extra_body": kept}
    begun = client.chat.completions.create(messages=user(first), **asked)
    assert begun.choices[0].message.content == f"ok: {first}"
    with client.responses.stream(model="greeter", input=second, conversation=kept["conversation"]) as stream:
        assert stream.get_final_response().output_text == f"ok: {second}"
    with client.chat.completions.stream(messages=user(third), **asked) as streamed:
        assert streamed.get_final_completion().choices[0].message.content == f"ok: {third}"
    client.responses.create(model="greeter", input=fourth, conversation=kept["conversation"], temperature=0.5)
    before = [part for text in (first, second, third) for part in (text, f"ok: {text}")]
    assert house.seen(fourth) == ["Greet people.", *before, fourth]
    items = client.conversations.items.list(kept["conversation"], order="asc", limit=20)
    assert [item.content[0].text for item in items] == [*before, fourth, f"ok: {fourth}"]


@pytest.mark.parametrize("name", PEOPLE)
def test_a_response_of_one_endpoint_is_continued_on_the_other(house, said, name):
    client = house.clients[name]
    begun = client.responses.create(model="greeter", input=f"{said} 0")
    more = {"previous_response_id": begun.id}
    completion = client.chat.completions.create(
        model="greeter", messages=user(f"{said} 1"), extra_body=more, store=True
    )
    last = client.responses.create(
        model="greeter", input=f"{said} 2", previous_response_id=completion.model_extra["response_id"]
    )
    assert house.seen(f"{said} 2")[1:] == [f"{said} 0", f"ok: {said} 0", f"{said} 1", f"ok: {said} 1", f"{said} 2"]
    assert client.responses.retrieve(last.id).output_text == f"ok: {said} 2"
    assert client.chat.completions.retrieve(completion.id).choices == completion.choices


def test_what_one_has_is_unknown_to_the_others(house, said):
    ada = house.clients["ada"]
    conversation = ada.conversations.create().id
    made = ada.responses.create(model="greeter", input=said, conversation=conversation)
    completion = ada.chat.completions.create(model="greeter", messages=user(said), store=True)
    unknown = (openai.NotFoundError, openai.BadRequestError)
    for name in ("bob", "ada of b"):
        other = house.clients[name]
        for call in (
            lambda: other.responses.retrieve(made.id),  # noqa: B023 it is called here
            lambda: other.responses.create(model="greeter", input="x", previous_response_id=made.id),  # noqa: B023
            lambda: other.responses.create(model="greeter", input="x", conversation=conversation),  # noqa: B023
            lambda: other.chat.completions.retrieve(completion.id),  # noqa: B023
            lambda: other.chat.completions.create(  # noqa: B023
                model="greeter", messages=user("x"), extra_body={"conversation": conversation}
            ),
        ):
            with pytest.raises(unknown, match="not found"):
                call()
        assert all(one.id != completion.id for one in other.chat.completions.list())
    assert ada.responses.retrieve(made.id).output_text == f"ok: {said}"


def test_an_agent_is_used_by_those_for_whom_it_is(house, said):
    listed = {name: {model.id for model in client.models.list()} for name, client in house.clients.items()}
    assert {name: "secretary" in models for name, models in listed.items()} == {
        "ada": True,
        "bob": False,
        "ada of b": False,
    }
    assert all({"good", "greeter"} <= models for models in listed.values())
    assert house.clients["ada"].responses.create(model="secretary", input=said).output_text == f"ok: {said}"
    assert house.seen(said)[0] == "Keep secrets."
    bob, stranger = house.clients["bob"], house.clients["ada of b"]
    with pytest.raises(openai.PermissionDeniedError):
        bob.responses.create(model="secretary", input=said)
    with pytest.raises(openai.PermissionDeniedError):
        bob.chat.completions.create(model="secretary", messages=user(said))
    # To another tenant it is a name like any other, which the only upstream is asked for.
    stranger.responses.create(model="secretary", input=f"{said} of b")
    stranger.chat.completions.create(model="secretary", messages=user(f"{said} of b, too"))
    assert house.seen(f"{said} of b") == [f"{said} of b"]
    assert house.seen(f"{said} of b, too") == [f"{said} of b, too"]
