"""Background responses: enqueue, poll, stream, resume, cancel, through the official client."""

import time

import httpx
import msgspec
import pytest

from tests.replay import replay
from tests.upstream import answer, finish, gate, reasoning, script, text, usage, words

ENDED_S = 15


def ended(client, response_id):
    """The response once it has ended."""
    deadline = time.monotonic() + ENDED_S
    while True:
        response = client.responses.retrieve(response_id)
        if response.status not in {"queued", "in_progress"}:
            return response
        assert time.monotonic() < deadline, response


def events_of(stream):
    return [event.to_dict() for event in stream]


def test_a_background_response_is_queued_at_once_and_polled_to_its_end(client):
    queued = client.responses.create(model="m", input=script(answer("Hello there")), background=True)
    assert (queued.status, queued.background, queued.output) == ("queued", True, [])
    done = ended(client, queued.id)
    assert (done.status, done.output_text) == ("completed", "Hello there")
    again = client.responses.create(model="m", input="more", previous_response_id=queued.id)
    assert again.output_text == "ok: more"


def frames(server, method, path, **options):
    """The frames of a stream, as bytes."""
    with httpx.stream(method, f"{server.url}{path}", timeout=ENDED_S, **options) as reply:
        assert reply.status_code == 200, reply.read()
        *made, done, rest = reply.read().split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    return [frame for frame in made if not frame.startswith(b":")]


def decoded(made):
    return [msgspec.json.decode(frame.split(b"\ndata: ")[1]) for frame in made]


def test_a_background_stream_tells_the_whole_story_and_is_replayed_byte_for_byte(server):
    body = {"model": "m", "input": script(answer("Hello there my friend")), "background": True, "stream": True}
    live = frames(server, "POST", "/responses", json=body)
    events = decoded(live)
    assert [event["type"] for event in events[:3]] == ["response.created", "response.queued", "response.in_progress"]
    response = replay(events)
    assert response["status"] == "completed"
    path = f"/responses/{response['id']}"
    assert httpx.get(f"{server.url}{path}").json() == response
    assert frames(server, "GET", f"{path}?stream=true") == live
    for after in range(len(events)):
        assert frames(server, "GET", f"{path}?stream=true&starting_after={after}") == live[after + 1 :]


def test_a_resumed_stream_is_padded_for_a_reader_that_asks_for_it(server):
    """Padding is made as the bytes are written out: what is kept, and what another reader gets, knows nothing of it."""
    body = {"model": "m", "input": script(answer("Hello there my friend")), "background": True, "stream": True}
    live = frames(server, "POST", "/responses", json=body)
    path = f"/responses/{decoded(live)[0]['response']['id']}?stream=true&starting_after=3"
    padded = decoded(frames(server, "GET", f"{path}&include_obfuscation=true"))
    deltas = [event for event in padded if event["type"].endswith(".delta")]
    assert deltas and [event for event in padded if event.pop("obfuscation", "")] == deltas
    assert padded == decoded(live[4:])
    assert frames(server, "GET", f"{path}&include_obfuscation=false") == frames(server, "GET", path) == live[4:]


def test_a_client_that_leaves_resumes_where_it_was(client, upstream):
    said = script([*words("one two three "), gate("resume"), *words("four five"), finish()])
    stream = client.responses.create(model="m", input=said, background=True, stream=True)
    seen = []
    for event in stream:
        seen.append(event.to_dict())
        if len([one for one in seen if one["type"].endswith("text.delta")]) == 2:
            break
    stream.close()
    rest = client.responses.retrieve(seen[0]["response"]["id"], stream=True, starting_after=seen[-1]["sequence_number"])
    upstream.open("resume")
    seen += events_of(rest)
    assert replay(seen)["output"][0]["content"][0]["text"] == "one two three four five"


def test_the_sdk_helper_replays_a_background_response(client):
    made = client.responses.create(model="m", input=script(answer("Hello you")), background=True, stream=True)
    response_id = events_of(made)[0]["response"]["id"]
    with client.responses.stream(response_id=response_id, starting_after=4) as stream:
        assert stream.get_final_response().output_text == "Hello you"


def test_cancelling_a_running_response_keeps_what_was_said_and_closes_the_upstream(client, upstream):
    said = script([text("partial "), gate("never"), text("rest"), finish()])
    stream = client.responses.create(model="m", input=said, background=True, stream=True)
    seen = []
    for event in stream:
        seen.append(event.to_dict())
        if event.type == "response.output_text.delta":
            break
    response_id = seen[0]["response"]["id"]
    begun = time.monotonic()
    cancelled = client.responses.cancel(response_id)
    took = time.monotonic() - begun
    assert cancelled.status == "cancelled"
    seen += events_of(stream)
    assert seen[-1]["response"]["status"] == "cancelled"
    assert client.responses.cancel(response_id).to_dict() == cancelled.to_dict()
    (asked,) = upstream.asked(said)
    assert asked.closed.wait(2)
    print(f"cancel took {took * 1000:.0f} ms")


def test_cancelling_a_response_that_nobody_follows_keeps_what_was_said_and_the_tokens_that_are_known(client, upstream):
    said = script([reasoning("Hm."), text("partial "), text("text"), usage(7, 4), gate("unheard"), finish()])
    queued = client.responses.create(model="m", input=said, background=True)
    upstream.wait_reached("unheard")
    cancelled = client.responses.cancel(queued.id)
    assert (cancelled.status, cancelled.output_text) == ("cancelled", "partial text")
    assert [item.status for item in cancelled.output] == ["completed", "incomplete"]
    assert (cancelled.usage.input_tokens, cancelled.usage.output_tokens) == (7, 4)
    assert client.responses.retrieve(queued.id).to_dict() == cancelled.to_dict()
    (asked,) = upstream.asked(said)
    assert asked.closed.wait(2)


def test_a_failed_background_response_says_why(client):
    from tests.upstream import status

    queued = client.responses.create(
        model="m", input=script([status(400, {"error": {"message": "no"}})]), background=True
    )
    done = ended(client, queued.id)
    assert (done.status, done.error.message) == ("failed", "no")


def test_background_needs_store(client):
    import openai

    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="m", input="x", background=True, store=False)
    assert (refused.value.code, refused.value.param) == ("unsupported_parameter", "background")
