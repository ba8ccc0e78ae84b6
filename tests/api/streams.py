"""Reads an event stream byte by byte, as other clients than the official one do."""

from collections.abc import Iterable
from typing import Any

import httpx
import msgspec
import openai

from tests.replay import replay
from tests.servers import Served


def events_of(answer: httpx.Response) -> list[dict[str, Any]]:
    """The events of a whole stream; asserts what every stream must hold: frames of `event:` and `data:`, then `[DONE]`."""
    assert answer.status_code == 200, answer.read()
    *frames, done, rest = answer.read().decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    events = []
    for frame in frames:
        if frame.startswith(":"):
            continue
        event, data = frame.split("\n")
        events.append(msgspec.json.decode(data.removeprefix("data: ")))
        assert event == f"event: {events[-1]['type']}"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def types_of(events: Iterable[dict[str, Any]]) -> list[str]:
    """The types in order, without `response.`; the same delta many times is one."""
    types: list[str] = []
    for event in events:
        name = event["type"].removeprefix("response.")
        if not (name.endswith(".delta") and types and types[-1] == name):
            types.append(name)
    return types


def streamed(server: Served, **body: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A streamed response: its events, and the response that both the oracle and the official client fold them into."""
    answer = httpx.post(f"{server.url}/responses", json={"model": "m", "stream": True, **body}, timeout=30)
    events = events_of(answer)
    made = replay(events)
    if made["status"] == "completed":  # the official accumulator knows no other end
        assert accumulated(answer.content) == [_plain(item) for item in made["output"]]
    return events, made


def accumulated(stream: bytes) -> list[dict[str, Any]]:
    """The output items that the official client puts together from a stream."""
    head = {"content-type": "text/event-stream"}
    transport = httpx.MockTransport(lambda _: httpx.Response(200, headers=head, content=stream))
    with (
        openai.OpenAI(api_key="none", http_client=httpx.Client(transport=transport)) as client,
        client.responses.stream(model="m", input="") as events,
    ):
        return [_plain(item.to_dict()) for item in events.get_final_response().output]


def _plain(item: dict[str, Any]) -> dict[str, Any]:
    """Without what the client's parsing adds."""
    content = [{**part, "parsed": None} for part in item.get("content") or ()]
    return {**item, "content": content, "parsed_arguments": None}
