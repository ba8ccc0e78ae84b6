"""python -m tests.faults.replicas: a worker and a replica are killed under the official client, and the figures of all this.

A long background stream begins at replica A; its worker and A are killed with -9 in mid-stream; the client resumes at replica B
with `starting_after`, and what it has heard over both connections is, byte for byte, what an undisturbed replay says.
"""

import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2  # whose errors the official client lets through in mid-stream
import openai
from msgspec import Struct

from tests.faults.client import Follower, begin, decoded, frames_of
from tests.faults.cluster import LEASE_S, POLL_S, Cluster, Servers
from tests.faults.stream_oracle import checked_response, closed_as, rounds_of, text_of
from tests.upstream import Upstream, finish, note, reasoning, repeat, script, text
from tests.waiting import until

ROUNDS = 150
LONG = script([repeat(10, reasoning("r{i} "), every_ms=10), repeat(ROUNDS, text("w{i} "), every_ms=10), finish()])
KILLED_AT = 80
"""Events that the client has heard by then."""

CROWDS = (1, 5, 20)
EVENTS_PER_S = 50
TALK_S = 6


class Story(Struct, frozen=True):
    """How it ended."""

    response_id: str
    heard: list[bytes]
    """Every frame that the client got, over both connections."""
    recovery_s: float
    """From the kill to the next event."""


def kill_and_resume(cluster: Cluster, official: openai.OpenAI, said: str = LONG) -> Story:
    """The story. Raises AssertionError unless it ends well."""
    replica_a, replica_b = cluster.replicas[:2]
    cluster.ensure(workers=2)
    heard: list[bytes] = []
    killed = 0.0
    client = official.with_options(base_url=replica_a.url).responses.with_streaming_response
    with (
        contextlib.suppress(httpx2.TransportError),
        client.create(model="m", input=said, background=True, stream=True) as reply,
    ):
        for frame in frames(reply):
            heard.append(frame)
            if len(heard) == KILLED_AT:
                cluster.kill_owner(decoded(heard[0])["response"]["id"])
                cluster.kill(replica_a)
                killed = time.monotonic()
    assert killed, "the stream ended before anything was killed"
    response_id, number = decoded(heard[0])["response"]["id"], decoded(heard[-1])["sequence_number"]
    recovered = 0.0
    client = official.with_options(base_url=replica_b.url).responses.with_streaming_response
    with client.retrieve(response_id, stream=True, starting_after=number) as reply:
        for frame in frames(reply):
            heard.append(frame)
            recovered = recovered or time.monotonic()
    replay = frames_of(replica_b.url, response_id)
    assert heard == replay
    seen = [decoded(frame) for frame in heard]
    response = checked_response(seen)
    assert rounds_of(text_of({"output": response["output"][-1:]})) == list(range(ROUNDS))
    assert "incomplete" in closed_as(seen), "no worker took over"
    with official.with_options(base_url=replica_b.url).responses.stream(response_id=response_id) as stream:
        assert stream.get_final_response().output_text.endswith(f"w{ROUNDS - 1} ")
    return Story(response_id, heard, recovered - killed)


def frames(reply: openai.APIResponse) -> Iterator[bytes]:
    """The frames of a stream as bytes, without comments."""
    held = b""
    for piece in reply.iter_bytes():
        *whole, held = (held + piece).split(b"\n\n")
        yield from (frame for frame in whole if frame.startswith(b"event:"))


def latencies(cluster: Cluster, runs: int) -> list[float]:
    """Milliseconds from the upstream's chunks to the clients, of so many runs at once, each with a client of its own."""
    rounds = EVENTS_PER_S * TALK_S
    said = [
        script([note(f"{number} of {runs}"), repeat(rounds, text("t{t} "), every_ms=1000 / EVENTS_PER_S), finish()])
        for number in range(runs)
    ]
    followers = [Follower(cluster.urls, begin(cluster.urls[0], one)) for one in said]
    for follower in followers:
        follower.join()
    found = []
    for follower in followers:
        for frame, arrived in zip(follower.frames, follower.arrived, strict=True):
            event = decoded(frame)
            if event["type"] == "response.output_text.delta":
                found += [(arrived - float(sent.removeprefix("t"))) * 1000 for sent in event["delta"].split()]
    return found[runs * EVENTS_PER_S :]  # without the first second, in which everything is opened


def weights(cluster: Cluster, response_id: str) -> str:
    """What one run weighs in Redis and in Postgres."""
    until(lambda: cluster.run_of(response_id) is None, "all is stored")
    in_redis = cluster.servers.redis.memory_usage(cluster.key(response_id))
    row = cluster.query(
        "select sum(octet_length(frames)) as bytes from event_archive where response_id = $1", response_id
    )[0]
    frames = frames_of(cluster.urls[0], response_id)
    said = sum(len(frame) + 2 for frame in frames)
    return f"{len(frames)} events of {said:,} bytes: {in_redis:,} bytes in Redis, {row['bytes']:,} in the archive"


def main() -> None:
    """The story, then the figures."""
    with tempfile.TemporaryDirectory(prefix="replicas-") as home, Upstream() as upstream:
        servers = Servers(Path(home) / "servers")
        cluster = Cluster(servers, {"OPENAI_BASE_URL": upstream.base_url, "REPRISE_DATA_DIR": f"{home}/data"})
        try:
            cluster.ensure(workers=2)
            with openai.OpenAI(base_url="http://nowhere", api_key="none", max_retries=0) as official:
                story = kill_and_resume(cluster, official)
            print(f"resumed: {len(story.heard)} events, byte for byte those of an undisturbed replay")
            print(
                f"recovery: {story.recovery_s:.2f} s from kill -9 to the next event (lease {LEASE_S} s, poll {POLL_S} s)"
            )
            cluster.ensure(workers=1)
            for runs in CROWDS:
                found = sorted(latencies(cluster, runs))
                p99 = found[int(len(found) * 0.99)]
                print(
                    f"latency: {runs} runs at {EVENTS_PER_S} events/s: "
                    f"p50 {statistics.median(found):.1f} ms, p99 {p99:.1f} ms from the upstream's chunk to the client"
                )
            print(f"weight: {weights(cluster, story.response_id)}")
        finally:
            cluster.close()
            servers.close()


if __name__ == "__main__":
    main()
