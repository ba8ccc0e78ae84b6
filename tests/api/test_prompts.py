"""Prompts of the catalog, through the official client: what the model gets, what is echoed, what lasts."""

import openai
import pytest

from tests.conftest import NewServer
from tests.servers import Served
from tests.upstream import Upstream
from tests.waiting import until

CATALOG = """
[upstreams.plain]
base_url = "{upstream}"

[prompts.greeting]
default = "1"

[prompts.greeting.versions.1]
model = "greeter"
temperature = 0.25
max_output_tokens = 64
instructions = "Greet {{{{name}}}}."
variables = {{ name = "string" }}
tools = [{{ type = "function", name = "wave", parameters = {{ type = "object" }} }}]

[prompts.greeting.versions.2]
instructions = "Hail {{{{name}}}}."
variables = {{ name = "string" }}

[prompts.looking.versions.1]
instructions = [
    {{ role = "system", content = "Be brief." }},
    {{ role = "user", content = "What is {{{{photo}}}}, {{{{who}}}}?" }},
    {{ role = "assistant", content = "A dot." }},
]
variables = {{ photo = "input_image", who = "string" }}
"""

CHANGED = """
[upstreams.plain]
base_url = "{upstream}"

[prompts.greeting.versions.1]
model = "another"
instructions = "Ignore everybody."
"""

PHOTO = {"type": "input_image", "image_url": "data:image/png;base64,AAAA", "detail": "auto"}

GREETING = {"id": "greeting", "variables": {"name": "Ada"}}
GREET = [
    {
        "type": "message",
        "role": "developer",
        "content": [{"type": "input_text", "text": "Greet Ada."}],
    }
]


@pytest.fixture(scope="module")
def server(new_cataloged: NewServer, upstream: Upstream) -> Served:
    """A server with prompts. Background responses wait in its queue for another process."""
    return new_cataloged(CATALOG.format(upstream=upstream.base_url), REPRISE_WORKERS_IN_API="false")


def test_a_prompt_gives_the_model_the_instructions_and_the_parameters(client, said, heard):
    made = client.responses.create(prompt=GREETING, input=said)
    assert made.output_text == f"ok: {said}"
    asked = heard()
    assert (asked["model"], asked["temperature"], asked["max_tokens"]) == ("greeter", 0.25, 64)
    assert asked["messages"] == [{"role": "system", "content": "Greet Ada."}, {"role": "user", "content": said}]
    assert [tool["function"]["name"] for tool in asked["tools"]] == ["wave"]


def test_it_is_echoed_with_its_version_and_the_instructions_that_it_became(client, said):
    made = client.responses.create(prompt=GREETING, input=said)
    assert made.prompt.to_dict() == {**GREETING, "version": "1"}
    assert made.to_dict()["instructions"] == GREET
    assert (made.model, made.temperature, made.max_output_tokens, made.tools[0].name) == ("greeter", 0.25, 64, "wave")
    assert client.responses.retrieve(made.id).to_dict() == made.to_dict()
    events = list(client.responses.create(prompt=GREETING, input=said, stream=True))
    assert [one.response.to_dict()["instructions"] for one in (events[0], events[-1])] == [GREET, GREET]
    assert events[-1].response.prompt.version == "1"
    assert [item.content[0].text for item in client.responses.input_items.list(made.id)] == [said]


def test_what_the_request_gives_wins(client, said, heard):
    made = client.responses.create(
        prompt=GREETING, input=said, model="mine", temperature=1.5, instructions="Be loud.", tools=[]
    )
    asked = heard()
    assert (asked["model"], asked["temperature"], asked["max_tokens"]) == ("mine", 1.5, 64)
    assert asked["messages"][0] == {"role": "system", "content": "Be loud."}
    assert "tools" not in asked
    assert (made.instructions, made.model, made.prompt.id) == ("Be loud.", "mine", "greeting")


def test_messages_and_images_stand_before_the_input(client, said, heard):
    prompt = {"id": "looking", "variables": {"photo": PHOTO, "who": "{{photo}}"}}
    made = client.responses.create(model="m", prompt=prompt, input=said)
    image = {"type": "image_url", "image_url": {"url": PHOTO["image_url"]}}
    assert heard()["messages"] == [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "What is "}, image, {"type": "text", "text": ", {{photo}}?"}],
        },
        {"role": "assistant", "content": "A dot."},
        {"role": "user", "content": said},
    ]
    assert [message.role for message in made.instructions] == ["system", "user", "assistant"]
    assert made.instructions[1].content[1].image_url == PHOTO["image_url"]
    assert made.to_dict()["prompt"] == {**prompt, "version": "1"}


def test_a_prompt_is_input_enough(client, upstream):
    name = "Ada of test_a_prompt_is_input_enough"
    made = client.responses.create(model="m", prompt={"id": "looking", "variables": {"photo": PHOTO, "who": name}})
    [asked] = [one for one in upstream.requests if name in str(one.body)]
    assert len(asked.body["messages"]) == 3
    assert client.responses.input_items.list(made.id).data == []


def test_the_next_response_of_a_chain_does_not_inherit_it(client, said, upstream):
    first = client.responses.create(prompt=GREETING, input=f"{said} 1")
    second = client.responses.create(model="m", input=f"{said} 2", previous_response_id=first.id)
    third = client.responses.create(
        prompt={**GREETING, "version": "2"}, model="m", input=f"{said} 3", previous_response_id=second.id
    )
    assert (second.prompt, second.instructions, third.prompt.version) == (None, None, "2")
    [asked] = upstream.asked(f"{said} 3")
    assert [one["content"] for one in asked.body["messages"]] == [
        "Hail Ada.",
        f"{said} 1",
        f"ok: {said} 1",
        f"{said} 2",
        f"ok: {said} 2",
        f"{said} 3",
    ]


def test_a_queued_response_is_made_as_it_was_admitted_whatever_the_catalog_has_then(
    client, server, said, heard, new_server, catalog_file, upstream
):
    queued = client.responses.create(prompt=GREETING, input=said, background=True)
    assert (queued.status, queued.to_dict()["instructions"]) == ("queued", GREET)
    changed = catalog_file(CHANGED.format(upstream=upstream.base_url))
    second = new_server(DATABASE_URL=server.database_url, REPRISE_CATALOG=changed)
    with second.client() as later:
        until(lambda: later.responses.retrieve(queued.id).status == "completed", "it is made")
        done = later.responses.retrieve(queued.id)
    asked = heard()
    assert (asked["model"], asked["temperature"], asked["tools"][0]["function"]["name"]) == ("greeter", 0.25, "wave")
    assert asked["messages"] == [{"role": "system", "content": "Greet Ada."}, {"role": "user", "content": said}]
    assert (done.output_text, done.prompt.to_dict()) == (f"ok: {said}", {**GREETING, "version": "1"})
    assert done.to_dict()["instructions"] == GREET


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(
    ("prompt", "param", "message"),
    [
        ({"id": "nope"}, "prompt.id", "Prompt with id 'nope' not found."),
        ({"id": "greeting", "version": "7"}, "prompt.version", "Prompt with id 'greeting' has no version '7'."),
    ],
)
def test_an_unknown_prompt_is_a_404_that_names_it(client, prompt, param, message, background):
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.create(prompt=prompt, input="Hi", background=background)
    assert (caught.value.param, caught.value.code, caught.value.body["message"]) == (param, "prompt_not_found", message)


@pytest.mark.parametrize(
    ("variables", "param"),
    [
        ({}, "prompt.variables.name"),
        ({"name": "x", "age": "y"}, "prompt.variables.age"),
        ({"name": PHOTO}, "prompt.variables.name"),
    ],
)
def test_a_wrong_variable_is_a_400_with_its_path(client, variables, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(prompt={"id": "greeting", "variables": variables}, input="Hi")
    assert caught.value.param == param


async def test_an_agent_of_the_agents_sdk_leaves_its_model_and_instructions_to_the_prompt(server, said, heard):
    from agents import Agent, OpenAIProvider, RunConfig, Runner

    async with server.async_client() as own:
        config = RunConfig(model_provider=OpenAIProvider(openai_client=own), tracing_disabled=True)
        result = await Runner.run(Agent(name="Greeter", prompt=GREETING), said, run_config=config)
    assert result.final_output == f"ok: {said}"
    assert (heard()["model"], heard()["messages"][0]["content"]) == ("greeter", "Greet Ada.")
