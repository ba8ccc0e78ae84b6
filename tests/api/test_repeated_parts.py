"""What an agent repeats with every request is stored once: tools, instructions, images."""

import base64
import hashlib
import random

import httpx
import openai
import pytest

from tests.servers import Served
from tests.upstream import answer, finish, repeat, script, text
from tests.waiting import fetch

TURNS = 6
TOOLS = [
    {
        "type": "function",
        "name": f"tool_{number}",
        "description": f"What tool {number} does: {hashlib.sha512(str(number).encode()).hexdigest()}",
        "parameters": {
            "type": "object",
            "properties": {f"argument_{at}": {"type": "string", "description": "a word " * 10} for at in range(6)},
        },
    }
    for number in range(40)
]
INSTRUCTIONS = " ".join(hashlib.sha256(str(number).encode()).hexdigest() for number in range(460))
"""30 kB that do not compress well."""
GROWTH_BYTES_MAX = 1_500

SIZE = """
select sum(pg_column_size(response.*)) + (select sum(pg_column_size(item.*)) from items item)
     + coalesce((select sum(pg_column_size(part.*)) from parts part), 0)
     + coalesce((select sum(pg_column_size(used.*)) from part_uses used), 0)
     + coalesce((select sum(pg_column_size(page.*)) from event_archive page), 0)
from responses response
"""


@pytest.fixture(scope="module")
def own(base_env, new_database):
    """A server whose database has nothing else."""
    with Served({**base_env, "DATABASE_URL": new_database()}) as running:
        yield running


@pytest.fixture(scope="module")
def client(own):
    """The official client of that server."""
    with openai.OpenAI(base_url=own.url, api_key="none", max_retries=0) as made:
        yield made


def streamed(client, **request):
    """The events and the last response of a background run, read as a stream."""
    events = [*client.responses.create(model="m", background=True, stream=True, store=True, **request)]
    assert events[-1].type == "response.completed"
    return events, events[-1].response


def turn(client, kind, **request):
    """A response, made in one of the ways."""
    if kind == "background":
        return streamed(client, **request)[1]
    return client.responses.create(model="m", **request)


def grown(own, client, kind, **request):
    """Bytes that a turn of a chain adds, and the chain's last response."""
    made = turn(client, kind, input=script([text("0"), finish()]), **request)
    before = fetch(own.database_url, SIZE)[0][0]
    for number in range(1, TURNS + 1):
        given = script([repeat(20, text("w{i} ")), text(str(number)), finish()])
        made = turn(client, kind, input=given, previous_response_id=made.id, **request)
    return (fetch(own.database_url, SIZE)[0][0] - before) / TURNS, made


@pytest.mark.parametrize("kind", ["foreground", "background"])
def test_a_chain_that_repeats_its_tools_and_instructions_grows_little_more(own, client, kind):
    bare, _ = grown(own, client, kind)
    full, last = grown(own, client, kind, tools=TOOLS, instructions=INSTRUCTIONS)
    assert full - bare < GROWTH_BYTES_MAX
    assert last.instructions == INSTRUCTIONS
    assert client.responses.retrieve(last.id).to_dict() == last.to_dict()
    assert [tool.to_dict()["description"] for tool in last.tools] == [tool["description"] for tool in TOOLS]


def test_a_stored_stream_is_what_was_sent(client):
    events, last = streamed(client, input=script([text("hi"), finish()]), tools=TOOLS, instructions=INSTRUCTIONS)
    again = [*client.responses.retrieve(last.id, stream=True)]
    assert [event.to_dict() for event in again] == [event.to_dict() for event in events]
    resumed = [*client.responses.retrieve(last.id, stream=True, starting_after=2)]
    assert [event.to_dict() for event in resumed] == [event.to_dict() for event in events[3:]]


def test_a_client_that_resends_its_images_stores_them_once(own, client):
    noise = random.Random(1).randbytes(300_000)
    image = {
        "type": "input_image",
        "detail": "auto",
        "image_url": f"data:image/png;base64,{base64.b64encode(noise).decode()}",
    }
    history, sizes = [], []
    for number in range(3):
        history += [
            {"role": "user", "content": [image, {"type": "input_text", "text": script([text(f"{number}"), finish()])}]}
        ]
        made = client.responses.create(model="m", input=history)
        history += [{"role": "assistant", "content": made.output_text}]
        sizes.append(fetch(own.database_url, SIZE)[0][0])
    assert sizes[2] - sizes[0] < 10_000
    items = client.responses.input_items.list(made.id, order="asc", limit=100).data
    images = [part for item in items if item.role == "user" for part in item.content if part.type == "input_image"]
    assert [one.image_url for one in images] == [image["image_url"]] * 3


def test_a_chat_completion_with_other_metadata_is_read_as_it_was(own, client):
    tools = [{"type": "function", "function": {key: tool[key] for key in tool if key != "type"}} for tool in TOOLS]
    messages = [{"role": "system", "content": INSTRUCTIONS * 3}, {"role": "user", "content": script(answer("hi"))}]
    made = client.chat.completions.create(model="m", messages=messages, tools=tools, store=True, metadata={"is": "old"})
    count = "select (select count(*) from parts) as stored, (select count(*) from part_uses) as used"
    before, response = fetch(own.database_url, count), client.responses.retrieve(made.response_id).to_dict()
    updated = client.chat.completions.update(made.id, metadata={"is": "new"})
    assert updated.to_dict() == {**made.to_dict(), "metadata": {"is": "new"}}
    assert client.responses.retrieve(made.response_id).to_dict() == {**response, "metadata": {"is": "new"}}
    assert client.chat.completions.messages.list(made.id).data[0].content == INSTRUCTIONS * 3
    assert fetch(own.database_url, count) == before
    [shown] = client.chat.completions.list(metadata={"is": "new"})
    assert shown.to_dict() == updated.to_dict()
    client.chat.completions.delete(made.id)


def test_lists_show_what_was_given_and_the_last_deletion_frees_it(own, client):
    with httpx.Client(base_url=own.url) as http:
        page = http.get("/responses", params={"limit": 100}).json()["data"]
    assert {one["instructions"] for one in page} == {None, INSTRUCTIONS}
    count = "select (select count(*) from parts) + (select count(*) from part_uses)"
    assert fetch(own.database_url, count)[0][0] > TURNS
    for row in fetch(own.database_url, "select id from responses order by turn desc"):
        client.responses.delete(row["id"])
    assert fetch(own.database_url, count)[0][0] == 0
