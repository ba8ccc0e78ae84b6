"""One conversation's whole story with the official client: six turns of every kind, killed once, forked, compacted, counted, and
shown a stored image."""

import base64

import openai

from tests.upstream import finish, script, text
from tests.waiting import until

PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)
GATE = {"gate": "the story's kill"}


def ended(client, response_id):
    """The response once it has ended."""
    return until(
        lambda: one if (one := client.responses.retrieve(response_id)).status == "completed" else None,
        f"{response_id} has ended",
        40,
    )


def texts(client, conversation_id):
    """What the conversation's messages say."""
    items = client.conversations.items.list(conversation_id, order="asc", limit=4)
    return [part.text for item in items if item.type == "message" for part in item.content]


def test_a_conversation_of_six_turns_is_killed_forked_compacted_and_counted(new_server, upstream):
    served = new_server(REPRISE_LEASE_S="1")
    with served.client() as client:
        conversation = client.conversations.create(metadata={"of": "Ada"}).id
        options = {"model": "m", "conversation": conversation}
        first = client.responses.create(input="I am Ada.", **options)
        streamed = list(client.responses.create(input="I live in Paris.", stream=True, **options))[-1].response
        waited = ended(client, client.responses.create(input="Who am I?", background=True, **options).id)
        resumed = list(client.responses.create(input="Where?", background=True, stream=True, **options))[-1].response
        made = [first, streamed, waited, resumed]
        assert [one.output_text for one in made] == [
            "ok: I am Ada.",
            "ok: I live in Paris.",
            "ok: Who am I?",
            "ok: Where?",
        ]
        asking = script([text("It was "), GATE, text("Ada."), finish()])
        killed = client.responses.create(input=asking, background=True, **options)
        upstream.wait_reached(GATE["gate"], 20)
    served.kill()
    upstream.open(GATE["gate"])
    served.start()
    with served.client() as client:
        made.append(ended(client, killed.id))
        assert made[-1].output_text.endswith("It was Ada.")
        made.append(client.responses.create(input="Thanks", **options))
        said = texts(client, conversation)
        assert said[:8] == [
            line for one in ("I am Ada.", "I live in Paris.", "Who am I?", "Where?") for line in (one, f"ok: {one}")
        ]
        assert said[-2:] == ["Thanks", "ok: Thanks"]
        assert [one.conversation.id for one in made] == [conversation] * 6
        look(client, served, conversation, said, upstream)
        show(client, conversation, upstream)


def look(client, served, conversation, said, upstream):
    """Fork it after its second turn, compact the fork, count both."""
    [*_, third] = client.conversations.items.list(conversation, order="asc", limit=4).data
    fork = client.post(
        f"/conversations/{conversation}/fork", body={"after": third.id}, cast_to=openai.types.conversations.Conversation
    )
    assert texts(client, fork.id) == said[:4]

    def count(id):
        return client.responses.input_tokens.count(model="m", input="And now?", conversation=id).input_tokens

    before, whole = count(fork.id), count(conversation)
    assert 0 < before < whole
    trigger = [{"type": "compaction_trigger"}]
    compacted = client.responses.create(model="m", input=trigger, conversation=fork.id)
    assert [item.type for item in compacted.output] == ["compaction"]
    client.responses.create(model="m", input="And now?", conversation=fork.id)
    summary, question = [one["content"] for one in upstream.asked("And now?")[-1].body["messages"]]
    assert summary.startswith("The conversation so far was replaced by this summary of it:")
    assert question == "And now?"
    assert texts(client, conversation) == said
    print(f"{len(said)} messages; fork {fork.id}; tokens {whole}, fork {before}, compacted {count(fork.id)}")


def show(client, conversation, upstream):
    """A stored image, by its id."""
    file = client.files.create(file=("dot.png", PNG), purpose="vision")
    image = {"type": "input_image", "file_id": file.id, "detail": "auto"}
    for parts in (
        [{"type": "input_text", "text": "Look at this"}, image],
        [{"type": "input_text", "text": "What was it?"}],
    ):
        client.responses.create(model="m", conversation=conversation, input=[{"role": "user", "content": parts}])
    messages = upstream.asked("What was it?")[-1].body["messages"]
    [seen] = [part["image_url"]["url"] for one in messages for part in one["content"] if "image_url" in part]
    assert seen == f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
    print(f"{file.id} reached the model in the turn after its own, too")
