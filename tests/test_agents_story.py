"""The story of many users with the official client: two tenants, two users, two replicas and the same agents, over both APIs; one quota
that is kept exactly, and a report that adds up."""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx
import openai
import pytest
from msgspec import Struct

from tests.servers import Served, reprise
from tests.upstream import Upstream

ADMIN = ("--scope=admin", "--scope=responses.read", "--scope=responses.write")
ADA = {"agent": {"variables": {"name": "Ada"}}}
REQUESTS = 10
"""The quota of a minute: one comes back every six seconds, and the test asks for a shorter time."""
HEALED_S = 60 / REQUESTS
ASKED = 200


class Tenancy(Struct):
    """Two replicas of one deployment, and the keys of its tenants and users."""

    env: dict[str, str]
    one: Served
    other: Served
    keys: dict[str, str]

    def client(self, who: str, served: Served | None = None) -> openai.OpenAI:
        return (served or self.one).client(self.keys[who])

    def get(self, who: str, path: str, **query: Any) -> Any:
        reply = httpx.get(f"{self.one.url}{path}", params=query, headers=self.bearer(who), timeout=30)
        reply.raise_for_status()
        return reply.json()

    def post(self, who: str, path: str, **body: Any) -> Any:
        reply = httpx.post(f"{self.one.url}{path}", json=body, headers=self.bearer(who), timeout=30)
        reply.raise_for_status()
        return reply.json()

    def bearer(self, who: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.keys[who]}"}


@pytest.fixture(scope="module")
def tenancy(base_env: Mapping[str, str], new_database: Callable[[], str]) -> Iterator[Tenancy]:
    env = {
        **base_env,
        "DATABASE_URL": new_database(),
        "REPRISE_REDIS_PREFIX": "agents-story",
        "REPRISE_KEY_CACHE_S": "0.2",
    }
    keys = {
        tenant: reprise(env, "keys", "create", "--tenant", tenant, *ADMIN).stdout.strip()
        for tenant in ("acme", "umbra")
    }
    with Served(env) as one, Served(env) as other:
        made = Tenancy(env, one, other, keys)
        for who in ("ada", "bob"):
            keys[who] = made.post("acme", "/admin/keys", name=who, user=who)["value"]
        for tenant in ("acme", "umbra"):
            made.post(
                tenant,
                "/agents",
                name="greeter",
                model="m",
                description=f"Greets for {tenant}.",
                instructions=f"Greet {{{{name}}}} from {tenant}.",
                variables={"name": "string"},
                overrides=["max_output_tokens"],
            )
        yield made


def test_two_tenants_and_two_users_talk_to_the_same_agents_over_both_apis(tenancy: Tenancy, upstream: Upstream) -> None:
    conversations = {}
    for who, tenant in (("ada", "acme"), ("bob", "acme"), ("umbra", "umbra")):
        with tenancy.client(who) as client, tenancy.client(who, tenancy.other) as elsewhere:
            assert "greeter" in [model.id for model in client.models.list()]
            conversation = client.conversations.create().id
            first = client.responses.create(
                model="greeter", input=f"the story of {who}, 1", conversation=conversation, extra_body=ADA
            )
            chat = elsewhere.chat.completions.create(
                model="greeter",
                messages=[{"role": "user", "content": f"the story of {who}, 2"}],
                extra_body={**ADA, "conversation": conversation},
            )
            (second,) = upstream.asked(f"the story of {who}, 2")
            continued = str(chat.to_dict()["response_id"])
            third = client.responses.create(
                model="greeter", input=f"the story of {who}, 3", previous_response_id=continued, extra_body=ADA
            )
            (asked,) = upstream.asked(f"the story of {who}, 3")
            assert second.body["messages"] == asked.body["messages"][:4]
            assert [message["content"] for message in asked.body["messages"]] == [
                f"Greet Ada from {tenant}.",
                f"the story of {who}, 1",
                first.output_text,
                f"the story of {who}, 2",
                chat.choices[0].message.content,
                f"the story of {who}, 3",
            ]
            assert third.model == chat.model == "greeter"
            conversations[who] = (conversation, continued)
    see_only_their_own(tenancy, conversations)
    rows = tenancy.get("acme", "/usage", group_by=["user", "model"])["data"]
    assert [(row["user"], row["model"], row["runs"]) for row in rows] == [("ada", "greeter", 3), ("bob", "greeter", 3)]
    (own,) = tenancy.get("ada", "/usage", group_by="user")["data"]
    assert (own["user"], own["runs"]) == ("ada", 3)


def see_only_their_own(tenancy: Tenancy, made: Mapping[str, tuple[str, str]]) -> None:
    """Each finds its own conversation and response on either replica, and the others' nowhere, whatever its rights."""
    for who, (conversation, response) in made.items():
        with tenancy.client(who, tenancy.other) as client:
            assert len(client.conversations.items.list(conversation).data) == 4
            assert client.responses.retrieve(response).model == "greeter"
        for other in {*made, "acme"} - {who}:
            with tenancy.client(other, tenancy.other) as client:
                for look in looks(client, conversation, response):
                    with pytest.raises(
                        (openai.NotFoundError, openai.BadRequestError),
                        match=r"not found|[Nn]o .* with id|does not exist",
                    ):
                        look()


def looks(client: openai.OpenAI, conversation: str, response: str) -> list[Callable[[], object]]:
    """Every way to see or to continue what is stored."""
    return [
        lambda: client.conversations.retrieve(conversation),
        lambda: client.conversations.items.list(conversation),
        lambda: client.responses.retrieve(response),
        lambda: client.chat.completions.retrieve(response.replace("resp_", "chatcmpl-")),
        lambda: client.responses.create(model="m", input="x", previous_response_id=response),
        lambda: client.responses.create(model="m", input="x", conversation=conversation),
    ]


async def test_two_replicas_under_load_keep_one_quota_exactly(tenancy: Tenancy) -> None:
    """Over either API, streamed and not, in the background: as many as the quota has are served, and they are counted."""
    done = reprise(tenancy.env, "tenants", "limit", "umbra", f"--requests-per-minute={REQUESTS}")
    assert done.returncode == 0, done.stderr
    key = tenancy.post("umbra", "/admin/keys", name="load")
    chat = {"model": "greeter", "messages": [{"role": "user", "content": "hi"}], **ADA}
    asked = {"model": "greeter", "input": "hi", **ADA}
    kinds = [
        ("/responses", asked),
        ("/responses", {**asked, "stream": True}),
        ("/responses", {**asked, "store": False}),
        ("/chat/completions", chat),
        ("/chat/completions", {**chat, "stream": True}),
    ]
    headers = {"Authorization": f"Bearer {key['value']}"}
    async with httpx.AsyncClient(headers=headers, timeout=60, limits=httpx.Limits(max_connections=50)) as http:

        async def ask(number: int) -> int:
            path, body = kinds[number % len(kinds)]
            served = (tenancy.one, tenancy.other)[number % 2]
            reply = await http.post(f"{served.url}{path}", json=body)
            if reply.status_code == 429:
                assert reply.json()["error"]["code"] == "rate_limit_exceeded"
                assert float(reply.headers["retry-after-ms"]) > 0
            return reply.status_code

        begun = time.monotonic()
        answered = await asyncio.gather(*map(ask, range(ASKED)))
        healed = int((time.monotonic() - begun) / HEALED_S)
    assert set(answered) == {200, 429}
    served = answered.count(200)
    print(f"{ASKED} requests at two replicas, a quota of {REQUESTS} and {healed} more in that time: {served} served")
    assert REQUESTS <= served <= REQUESTS + healed
    assert tenancy.get("umbra", "/usage", key_id=key["id"])["data"][0]["runs"] == served
