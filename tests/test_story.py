"""One user's whole story with the official client, on a server with nothing configured, across a restart."""

import json

import openai
import pydantic

from tests.servers import Served


class Person(pydantic.BaseModel):
    """What structured output shall look like."""

    name: str
    age: int


def tool(name):
    """A function tool with one argument."""
    properties = {"city": {"type": "string"}}
    return {
        "type": "function",
        "name": name,
        "parameters": {"type": "object", "properties": properties, "required": ["city"]},
        "strict": False,
    }


def chat(client, turns):
    """Streamed turns, each continuing the last; gives the responses."""
    made = []
    for said in turns:
        previous = made[-1].id if made else None
        with client.responses.stream(model="echo", input=said, previous_response_id=previous) as stream:
            deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
            made.append(stream.get_final_response())
        assert "".join(deltas) == made[-1].output_text
        print(f"{said!r} -> {made[-1].output_text!r}")
    return made


def test_a_conversation_with_tools_outlives_the_server(tmp_path):
    with Served({"REPRISE_DATA_DIR": str(tmp_path)}) as served:
        with served.client() as client:
            responses = chat(
                client, ["My name is Ada.", "My city is Paris.", "Hello", "How are you?", "What is my name?"]
            )
            assert "Ada" in responses[-1].output_text
            last = ask_with_tools(client, responses[-1].id)
            person = client.responses.parse(model="echo", input="A person, please.", text_format=Person)
            print(f"parsed {person.output_parsed!r}")
            assert isinstance(person.output_parsed, Person)
            before = look(client, last)
            client.responses.delete(person.id)
        assert served.stop() == 0
        served.start()
        with served.client() as client:
            assert look(client, last) == before
            ids = [one["id"] for one in client.get("/responses", cast_to=object)["data"]]  # type: ignore[index]
            assert ids[0] == last
            assert person.id not in ids
            try:
                client.responses.retrieve(person.id)
            except openai.NotFoundError as error:
                print(f"deleted: {error.message}")
            else:
                raise AssertionError("it is still there")
            (after,) = chat_on(client, last, "What is my city?")
            assert "Paris" in after.output_text


def ask_with_tools(client, previous):
    """Two parallel calls and their outputs; gives the id of the last response."""
    tools = [tool("get_weather"), tool("get_time")]
    asked = client.responses.create(
        model="echo", input="Call get_weather and get_time for Paris", tools=tools, previous_response_id=previous
    )
    calls = [item for item in asked.output if item.type == "function_call"]
    assert sorted(call.name for call in calls) == ["get_time", "get_weather"]
    outputs = [
        {"type": "function_call_output", "call_id": call.call_id, "output": json.dumps({"of": call.name, "is": "fine"})}
        for call in calls
    ]
    answered = client.responses.create(model="echo", input=outputs, tools=tools, previous_response_id=asked.id)
    print(f"{[call.name for call in calls]} -> {answered.output_text!r}")
    assert "fine" in answered.output_text
    return answered.id


def look(client, response_id):
    """A response, and its context in both orders, page by page."""
    newest = [item.id for item in client.responses.input_items.list(response_id, limit=2)]
    oldest = [item.id for item in client.responses.input_items.list(response_id, limit=3, order="asc")]
    assert newest == oldest[::-1]
    print(f"{response_id} has {len(oldest)} input items")
    return client.responses.retrieve(response_id).to_dict(), oldest


def chat_on(client, previous, said):
    """One more turn, not streamed."""
    made = client.responses.create(model="echo", input=said, previous_response_id=previous)
    print(f"{said!r} -> {made.output_text!r}")
    return [made]
