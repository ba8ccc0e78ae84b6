"""Clients that leave, come back, crowd or do not read; and replays after Redis has forgotten."""

import asyncio
import itertools
import socket
import time
import urllib.parse

import pytest

from tests.faults.client import Follower, begin, call, connect, decoded, frames_of
from tests.faults.stream_oracle import rounds_of, text_of
from tests.upstream import answer, finish, gate, repeat, script, size, text
from tests.waiting import until

CROWD = 200


def test_a_client_that_leaves_and_resumes_fifty_times(cluster, check):
    said = script([repeat(300, text("w{i} "), every_ms=5), finish()])
    follower = Follower(cluster.urls, begin(cluster.urls[0], said), drops=50, seed=7)
    response = check(follower)
    assert rounds_of(text_of(response)) == list(range(300))
    assert len(follower.resumed_at) >= 25
    assert follower.cuts == 0


async def read_stream(url, response_id):
    """The raw body of a stream over a socket of its own, without chunk sizes."""
    parts = urllib.parse.urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(f"GET {parts.path}/responses/{response_id}?stream=true HTTP/1.0\r\nhost: localhost\r\n\r\n".encode())
    body = await asyncio.wait_for(reader.read(), 60)
    writer.close()
    head, _, body = body.partition(b"\r\n\r\n")
    assert b" 200 " in head, head
    if b"chunked" in head.lower():
        whole = b""
        while body:
            count, _, body = body.partition(b"\r\n")
            whole, body = whole + body[: int(count, 16)], body[int(count, 16) + 2 :]
        body = whole
    return body


def test_two_hundred_clients_of_one_run_cost_one_connection_to_redis(cluster, upstream):
    said = script([repeat(20, text("w{i} ")), gate("crowd"), repeat(100, text("v{i} "), every_ms=5), finish()])
    response_id = begin(cluster.urls[0], said)
    upstream.wait_reached("crowd", 20)
    redis = cluster.servers.redis
    before = len(redis.client_list())

    async def crowd():
        url = cluster.urls[0]
        reading = [asyncio.create_task(read_stream(url, response_id)) for _ in range(CROWD)]
        waiting = asyncio.get_running_loop().run_in_executor(None, until, blocked_reads_have_come, "one read blocks")
        await waiting
        upstream.open("crowd")
        return await asyncio.gather(*reading)

    def blocked_reads_have_come():
        return any(one["cmd"] == "xread" for one in redis.client_list())

    begun = time.monotonic()
    bodies = asyncio.run(crowd())
    print(f"FIGURE {CROWD} clients served in {time.monotonic() - begun:.2f} s")
    without_comments = {
        b"".join(frame + b"\n\n" for frame in body.split(b"\n\n") if frame and not frame.startswith(b":"))
        for body in bodies
    }
    assert len(without_comments) == 1
    (one,) = without_comments
    assert one == b"".join(f + b"\n\n" for f in frames_of(cluster.urls[1], response_id)) + b"data: [DONE]\n\n"
    after = redis.client_list()
    print(f"FIGURE connections to Redis: {before} before the crowd, {len(after)} after")
    assert len(after) - before <= 8
    assert len([one for one in after if one["cmd"] == "xread"]) <= len(cluster.replicas)


def test_a_client_that_does_not_read_slows_nobody(cluster, upstream, check):
    said = script([text("begin"), gate("slow"), repeat(300, size(20_000)), finish()])
    response_id = begin(cluster.urls[0], said)
    upstream.wait_reached("slow", 20)
    parts = urllib.parse.urlsplit(cluster.urls[0])
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.settimeout(20)
        slow.connect((parts.hostname, parts.port))
        slow.sendall(
            f"GET {parts.path}/responses/{response_id}?stream=true HTTP/1.0\r\nhost: localhost\r\n\r\n".encode()
        )
        assert slow.recv(10)
        follower = Follower(cluster.urls[:1], response_id)
        follower.wait_events(4)
        begun = time.monotonic()
        upstream.open("slow")
        check(follower)
        print(f"FIGURE 6 MB beside a client that does not read: {time.monotonic() - begun:.2f} s")
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        body = b""
        while piece := slow.recv(1 << 20):
            body += piece
    for frame in follower.frames[-3:]:
        assert frame.splitlines()[0] in body
    assert body.count(b"event: response.output_text.delta\n") == 301
    assert b"data: [DONE]" in body[-40:]


def test_an_ended_run_is_replayed_byte_for_byte_when_redis_has_forgotten(cluster, check):
    follower = Follower(cluster.urls, begin(cluster.urls[0], script(answer("Hello there my friend"))))
    response = check(follower)
    until(lambda: cluster.run_of(response["id"]) is None, "the row goes")
    assert cluster.servers.redis.delete(cluster.key(response["id"])) == 1
    assert frames_of(cluster.urls[0], response["id"]) == follower.frames
    for after in range(len(follower.frames) + 3):
        assert frames_of(cluster.urls[after % 2], response["id"], after) == follower.frames[after + 1 :]
    assert cluster.servers.redis.exists(cluster.key(response["id"])) == 0


def test_the_events_of_an_ended_run_leave_redis(cluster, upstream):
    cluster.kill_workers()
    cluster.start_worker(REPRISE_EVENT_TTL_S="0.3")
    said = script([repeat(5, text("w{i} ")), gate("expiry"), finish()])
    response_id = begin(cluster.urls[0], said)
    upstream.wait_reached("expiry", 20)
    redis, key = cluster.servers.redis, cluster.key(response_id)
    until(lambda: redis.exists(key), "the stream is there")
    first = redis.pttl(key)
    until(lambda: redis.pttl(key) > first - 100, "its life is prolonged, however quiet it is")
    upstream.open("expiry")
    cluster.ended(response_id)
    until(lambda: not redis.exists(key), "it has gone")
    assert len(frames_of(cluster.urls[0], response_id)) > 5


@pytest.mark.parametrize("status", ["running", "ended"])
def test_what_cannot_be_streamed(cluster, upstream, status):
    said = script([text("x"), gate(f"unstreamed{status}"), finish()])
    response_id = begin(cluster.urls[0], said, stream=False)
    upstream.wait_reached(f"unstreamed{status}", 20)
    if status == "ended":
        upstream.open(f"unstreamed{status}")
        cluster.ended(response_id)
    code, refused = call(cluster.urls[0], "GET", f"/responses/{response_id}?stream=true")
    assert (code, refused["error"]["message"]) == (
        400,
        "This response cannot be streamed because it was not created with stream=true.",
    )
    upstream.open(f"unstreamed{status}")
    cluster.ended(response_id)


def test_a_foreground_response_cannot_be_streamed_again(cluster):
    _, made = call(cluster.urls[0], "POST", "/responses", {"model": "m", "input": script(answer("x"))})
    code, refused = call(cluster.urls[0], "GET", f"/responses/{made['id']}?stream=true")
    assert (code, refused["error"]["message"]) == (
        400,
        "This response cannot be streamed because it was not created with background=true.",
    )
    assert call(cluster.urls[0], "GET", "/responses/resp_nobody?stream=true")[0] == 404


def test_a_silent_stream_shows_that_it_lives(cluster, upstream):
    replica = cluster.start_replica(REPRISE_KEEPALIVE_S="0.3")
    said = script([text("x"), gate("silence"), finish()])
    response_id = begin(cluster.urls[0], said)
    upstream.wait_reached("silence", 20)
    connection, base = connect(replica.url)
    connection.request("GET", f"{base}/responses/{response_id}?stream=true")
    reply, held = connection.getresponse(), b""
    while held.count(b": keep-alive\n\n") < 3:
        held += reply.read1(65536)
    upstream.open("silence")
    held += reply.read()
    connection.close()
    replica.kill()
    assert held.endswith(b"data: [DONE]\n\n")
    assert b": keep-alive" not in held[-100:]


def test_a_stream_that_can_not_be_read_keeps_no_other_from_its_signs_of_life(cluster, upstream, check):
    """All streams of a process are read at once, so one spoils the reading of all, again and again: each of their readers is
    woken for nothing, and must look at Postgres all the same."""
    replica = cluster.start_replica(REPRISE_KEEPALIVE_S="0.3")
    quiet = begin(replica.url, script([text("Hel"), gate("spoilt"), text("lo"), finish()]))
    spoilt = Follower([replica.url], begin(replica.url, script([text("Hel"), gate("spoilt"), text("lo"), finish()])))
    spoilt.wait_events(6)
    cluster.servers.redis.delete(cluster.key(spoilt.response_id))
    cluster.servers.redis.set(cluster.key(spoilt.response_id), "no stream")
    connection, base = connect(replica.url)
    connection.request("GET", f"{base}/responses/{quiet}?stream=true")
    reply, held = connection.getresponse(), b""
    while held.count(b": keep-alive\n\n") < 3:
        held += reply.read1(65536)
    cluster.servers.redis.delete(cluster.key(spoilt.response_id))
    upstream.open("spoilt")
    held += reply.read()
    connection.close()
    assert held.endswith(b"data: [DONE]\n\n")
    assert text_of(check(spoilt)) == "Hello"
    replica.kill()


def test_a_sign_of_life_may_be_an_event_that_disturbs_no_cursor(cluster, upstream, official):
    replica = cluster.start_replica(REPRISE_KEEPALIVE_S="0.3", REPRISE_KEEPALIVE_EVENTS="true")
    said = script([text("Hel"), gate("alive"), text("lo"), finish()])
    client = official.with_options(base_url=replica.url)
    heard = []
    with client.responses.stream(model="m", input=said, background=True) as stream:
        for event in stream:
            heard.append(event)
            if [one.type for one in heard].count("keepalive") == 3:
                upstream.open("alive")
        response = stream.get_final_response()
    assert response.output_text == "Hello"
    signs = [(event, before) for before, event in itertools.pairwise(heard) if event.type == "keepalive"]
    assert len(signs) >= 3
    assert all(sign.sequence_number == before.sequence_number for sign, before in signs)
    numbers = [event.sequence_number for event in heard if event.type != "keepalive"]
    assert numbers == list(range(len(numbers)))
    number = signs[0][0].sequence_number
    rest = frames_of(cluster.urls[0], response.id, after=number)
    assert [decoded(frame)["sequence_number"] for frame in rest] == numbers[number + 1 :]
    assert b"keepalive" not in b"".join(frames_of(replica.url, response.id))
    replica.kill()
