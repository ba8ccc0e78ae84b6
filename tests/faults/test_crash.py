"""kill -9 of workers and replicas in mid-run: clients resume elsewhere, nothing is lost, nothing comes twice."""

import random
import threading
import time

import httpx
import msgspec
import pytest

from app.domain.fold import replay
from tests.servers import Served
from tests.upstream import answer, finish, gate, repeat, script, text

LEASE_S = "1.5"


class Follower:
    """A client that reads a background stream, drops its connection now and then, and resumes on any replica."""

    def __init__(self, urls, response_id, *, drops=0, seed=0):
        self.urls, self.response_id = urls, response_id
        self.seen = []
        self.frames = []
        self.resumes = 0
        self._random = random.Random(seed)
        self._drops = drops
        self.failed = None
        self.thread = threading.Thread(target=self._follow, daemon=True)
        self.thread.start()

    def _follow(self):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                if self._read():
                    return
            except (httpx.HTTPError, OSError):
                pass
            self.resumes += 1
        self.failed = "not ended in time"

    def _read(self):
        url = self._random.choice(self.urls)
        query = {"stream": "true"} | ({"starting_after": self.seen[-1]["sequence_number"]} if self.seen else {})
        left = self._random.randrange(1, 40) if self._drops else 10**9
        with httpx.stream("GET", f"{url}/responses/{self.response_id}", params=query, timeout=20) as reply:
            if reply.status_code != 200:
                return False
            held = b""
            for piece in reply.iter_raw():
                held += piece
                *whole, held = held.split(b"\n\n")
                for frame in whole:
                    if frame.startswith(b":"):
                        continue
                    if frame == b"data: [DONE]":
                        return True
                    self.frames.append(frame)
                    self.seen.append(msgspec.json.decode(frame.split(b"\ndata: ")[1]))
                    left -= 1
                    if left <= 0:
                        self._drops -= 1
                        return False
        return False

    def join(self):
        self.thread.join(70)
        assert self.failed is None, self.failed
        return self.seen


def begin(url, said):
    """A background stream's id, its connection dropped at once."""
    body = {"model": "m", "input": said, "background": True, "stream": True}
    with httpx.stream("POST", f"{url}/responses", json=body, timeout=20) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: "):
                return msgspec.json.decode(line[6:])["response"]["id"]
    raise AssertionError("no event")


def frames_of(url, response_id, after=None):
    query = {"stream": "true"} | ({} if after is None else {"starting_after": after})
    reply = httpx.get(f"{url}/responses/{response_id}", params=query, timeout=20)
    assert reply.status_code == 200, reply.text
    return [frame for frame in reply.content.split(b"\n\n")[:-2] if not frame.startswith(b":")]


@pytest.fixture
def cluster(base_env, new_database):
    """Two API replicas that make nothing, and as many workers as a test starts."""
    started = []
    env = {**base_env, "DATABASE_URL": new_database(), "REPRISE_LEASE_S": LEASE_S, "REPRISE_POLL_S": "0.2"}

    def start(command="serve"):
        own = {"REPRISE_WORKERS_IN_API": "false"} if command == "serve" else {}
        started.append(Served({**env, **own}, command=command))
        return started[-1]

    yield start
    for one in started:
        one.__exit__()


def check(seen, frames, url, response_id):
    """Gapless, in order, ended; equal to the row and to a later replay, byte for byte."""
    response = replay(seen)
    assert response["status"] == "completed"
    assert httpx.get(f"{url}/responses/{response_id}", timeout=20).json() == response
    assert frames_of(url, response_id) == frames
    return response


def test_a_worker_killed_in_mid_text_is_replaced_and_its_half_item_left_out(cluster, upstream):
    replica = cluster()
    first = cluster("worker")
    said = script([repeat(30, text("word{i} "), every_ms=10), gate("crash"), text("end"), finish()])
    response_id = begin(replica.url, said)
    follower = Follower([replica.url], response_id)
    upstream.wait_reached("crash", 20)
    first.kill()
    killed = time.monotonic()
    cluster("worker")
    upstream.open("crash")
    seen = follower.join()
    print(f"ended {time.monotonic() - killed:.1f} s after the kill")
    response = check(seen, follower.frames, replica.url, response_id)
    assert len(response["output"]) == 1
    assert response["output"][0]["content"][0]["text"].endswith("word29 end")
    closed = [event["item"]["status"] for event in seen if event["type"] == "response.output_item.done"]
    assert closed == ["incomplete", "completed"]
