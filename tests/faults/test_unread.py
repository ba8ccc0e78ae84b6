"""Clients that take nothing of what they have asked for: what they cost, and whom."""

import contextlib
import http.client
import os
import socket
import time
import urllib.parse
from pathlib import Path

import httpx
import msgspec
import pytest

from tests.faults.client import Follower, begin, connect, frames_of, get
from tests.faults.cluster import query
from tests.servers import Served
from tests.upstream import finish, gate, note, repeat, script, size, text
from tests.waiting import until

CROWD = 50
PIECES, PIECE_BYTES = 1_000, 10_000
LONG = repeat(PIECES, size(PIECE_BYTES))
"""10 MB of deltas."""
PATIENT = {"REPRISE_SEND_TIMEOUT_S": "600", "REPRISE_STREAM_WAIT_S": "600"}
"""No deadline ends what is measured."""
GROWTH_BYTES_MAX = 400 * 1024 * 1024
"""What the crowd asked for are 500 MB, which take 2.8 GB of memory without the bounds; with them it is 180 to 265 MB."""

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")


class Unread:
    """A client that sends a request over a socket with tiny buffers, and reads when it is told to."""

    def __init__(self, url, method, path, body=None):
        parts = urllib.parse.urlsplit(url)
        sent = msgspec.json.encode(body) if body is not None else b""
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.settimeout(40)
        self.socket.connect((parts.hostname, parts.port))
        head = f"{method} {parts.path}{path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n"
        self.socket.sendall(f"{head}content-length: {len(sent)}\r\n\r\n".encode() + sent)

    def peek(self):
        """Wait until the reply begins; its first bytes stay unread."""
        return self.socket.recv(12, socket.MSG_PEEK)

    def reply(self):
        """Begin to read."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        reply = http.client.HTTPResponse(self.socket)
        reply.begin()
        return reply

    def frames(self):
        """The frames of a whole stream."""
        *frames, done, rest = self.reply().read().split(b"\n\n")
        assert (done, rest) == (b"data: [DONE]", b"")
        return [frame for frame in frames if not frame.startswith(b":")]


@contextlib.contextmanager
def crowd_of(url, method, path, body=None, count=CROWD):
    """So many of them; each has the beginning of its reply."""
    with contextlib.ExitStack() as stack:
        clients = []
        for at in range(count):
            client = Unread(url, method, path, body(at) if body else None)
            stack.enter_context(client.socket)
            clients.append(client)
        for client in clients:
            assert client.peek().endswith(b" 200")
        yield clients


def resident(process):
    """Bytes in memory."""
    pages = int(Path(f"/proc/{process.process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def settled(process, still_s=1.0):
    """Its memory once it has not grown for a while."""
    most, since = resident(process), time.monotonic()
    while time.monotonic() - since < still_s:
        time.sleep(0.02)
        now = resident(process)
        if now > most + 1024 * 1024:
            most, since = now, time.monotonic()
    return most


@pytest.fixture(scope="module")
def served(base_env, new_database):
    """A server whose memory has seen a long run; the process reuses what that took."""
    with Served({**base_env, "DATABASE_URL": new_database(), **PATIENT}) as running:
        frames_of(running.url, ended(running.url, LONG))
        yield running


def ended(url, *steps):
    """The id of a background response that has been made."""
    response_id = begin(url, script([*steps, finish()]))
    until(lambda: get(url, response_id)["status"] == "completed", "it has ended", 60)
    return response_id


def undisturbed(url):
    """Somebody else's small stream; how long it took."""
    begun = time.monotonic()
    body = {"model": "m", "input": script([repeat(20, text("w{i} ")), finish()]), "stream": True}
    connection, base = connect(url)
    with contextlib.closing(connection):
        connection.request("POST", f"{base}/responses", msgspec.json.encode(body))
        assert b"response.completed" in connection.getresponse().read()
    return time.monotonic() - begun


@contextlib.contextmanager
def cheap(served, capsys, what):
    """The crowd must not cost more than this."""
    before = settled(served)
    yield
    grown = settled(served) - before
    with capsys.disabled():
        print(f"\nFIGURE {CROWD} clients that read nothing of {what}: {grown / 2**20:+.0f} MB")
    assert grown < GROWTH_BYTES_MAX


def test_unread_foreground_streams_cost_little(served, upstream, capsys):
    body = {"model": "m", "stream": True, "store": False}
    with contextlib.ExitStack() as stack, cheap(served, capsys, "foreground streams"):
        stack.enter_context(
            crowd_of(
                served.url,
                "POST",
                "/responses",
                lambda at: {**body, "input": script([note(f"{at}"), LONG, finish()])},
            )
        )
        undisturbed(served.url)
    until(lambda: not upstream.connections, "their runs end with them")


def test_unread_streams_of_a_living_run_cost_little_and_lose_nothing(served, upstream, capsys):
    response_id = begin(served.url, script([text("begin"), gate("unread"), LONG, finish()]))
    upstream.wait_reached("unread", 20)
    with crowd_of(served.url, "GET", f"/responses/{response_id}?stream=true") as clients:
        with cheap(served, capsys, "a living run"):
            follower = Follower([served.url], response_id)
            follower.wait_events(4)
            upstream.open("unread")
            follower.join(120)
        assert follower.cuts == 0
        assert clients[0].frames() == follower.frames
        assert clients[-1].frames() == follower.frames
    assert frames_of(served.url, response_id) == follower.frames


def test_unread_replays_of_a_living_run_cost_little_and_lose_nothing(served, upstream, capsys):
    response_id = begin(served.url, script([LONG, gate("replays"), text("end"), finish()]))
    upstream.wait_reached("replays", 40)
    with contextlib.ExitStack() as stack:
        with cheap(served, capsys, "replays from Redis"):
            clients = stack.enter_context(crowd_of(served.url, "GET", f"/responses/{response_id}?stream=true"))
        follower = Follower([served.url], response_id)
        upstream.open("replays")
        follower.join(120)
        assert clients[0].frames() == follower.frames


def test_unread_replays_of_an_ended_run_cost_little_and_lose_nothing(served, capsys):
    response_id = ended(served.url, LONG)
    frames = frames_of(served.url, response_id)
    with contextlib.ExitStack() as stack:
        with cheap(served, capsys, "replays from Postgres"):
            clients = stack.enter_context(crowd_of(served.url, "GET", f"/responses/{response_id}?stream=true"))
        assert frames_of(served.url, response_id) == frames
        assert clients[0].frames() == frames


@pytest.mark.parametrize("path", ["/responses/{id}", "/responses?limit=1"])
def test_unread_json_costs_little_and_those_who_read_get_all(served, new_server, capsys, path):
    path = path.format(id=ended(served.url, LONG))
    strict = new_server(DATABASE_URL=served.database_url, REPRISE_UNREAD_BYTES_MAX=str(40 * 1024 * 1024), **PATIENT)
    whole = http_get(strict.url, path)
    assert len(whole) > PIECES * PIECE_BYTES
    with contextlib.ExitStack() as stack:
        with cheap(strict, capsys, f"JSON of {len(whole) / 2**20:.0f} MB"):
            for _ in range(CROWD):
                stack.enter_context(Unread(strict.url, "GET", path).socket)
        until(lambda: http_get(strict.url, path) == whole, "somebody who reads gets all")
        assert undisturbed(strict.url) < 20


@pytest.mark.parametrize("how", ["stored", "lost", "queued"])
def test_a_response_whose_reply_is_too_large_is_not_made_again(narrow, how):
    said = script([note(how), size(200_000) if how != "queued" else text("x"), finish()])
    body = {"model": "m", "input": said, "store": how != "lost", "background": how == "queued"}
    if how == "queued":
        body["instructions"] = "x" * 200_000
    reply = httpx.post(f"{narrow.url}/responses", json=body, timeout=60)
    assert (reply.status_code, reply.headers["x-should-retry"]) == (503, "false")
    message, made = reply.json()["error"]["message"], reply.headers.get("x-reprise-response-id")
    if how == "lost":
        assert made is None and "resp_" not in message and "lost" in message
    else:
        status = until(lambda: statuses_of(narrow.database_url).get(made), "it is there")
        assert status in {"queued", "in_progress", "completed"} and f"retrieve '{made}' later" in message


@pytest.fixture(scope="module")
def narrow(base_env, new_database):
    """A server that holds next to nothing for its clients."""
    env = {"DATABASE_URL": new_database(), "REPRISE_UNREAD_BYTES_MAX": "100000"}
    with Served({**base_env, **env}) as running:
        yield running


def statuses_of(database_url):
    """Of every response, by id."""
    return {row["id"]: row["status"] for row in query(database_url, "select id, status from responses")}


def http_get(url, path):
    """The body of a reply; empty where there is none, or not all of it."""
    connection, base = connect(url, 60)
    with contextlib.closing(connection):
        connection.request("GET", base + path)
        reply = connection.getresponse()
        with contextlib.suppress(http.client.IncompleteRead, ConnectionResetError):
            body = reply.read()
            return body if reply.status == 200 else b""
    return b""


def connections_of(process):
    """How many connections of clients a server has."""
    port = f":{urllib.parse.urlsplit(process.url).port:04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening, orphan = "0A", "0"
    return sum(row[1].endswith(port) and row[3] != listening and row[9] != orphan for row in rows)


def test_clients_that_take_nothing_are_disconnected(served, new_server, upstream):
    response_id = ended(served.url, LONG)
    hasty = new_server(DATABASE_URL=served.database_url, REPRISE_SEND_TIMEOUT_S="0.5")
    body = {"model": "m", "input": script([note("hasty"), LONG, finish()]), "metadata": {"test": "hasty"}}
    asked = [
        ("GET", f"/responses/{response_id}", None),
        ("GET", f"/responses/{response_id}?stream=true", None),
        ("POST", "/responses", {**body, "stream": True}),
        ("POST", "/responses", {**body, "stream": True, "background": True}),
        ("POST", "/responses", {**body, "store": False}),
    ]
    with contextlib.ExitStack() as stack:
        for method, path, sent in asked:
            stack.enter_context(Unread(hasty.url, method, path, sent).socket)
        until(lambda: connections_of(hasty) == len(asked), "they are there")
        until(lambda: not connections_of(hasty), "they are disconnected", 60)
        until(lambda: not upstream.connections, "the upstream is not kept waiting", 60)
        status = until(lambda: statuses(hasty.url, "hasty"), "both are stored", 60)
    assert status == {("completed", True), ("cancelled", False)}


def statuses(url, test):
    """How two responses have ended, and which of them was made in the background."""
    found = msgspec.json.decode(http_get(url, f"/responses?metadata[test]={test}"))["data"]
    ends = {(one["status"], one["background"]) for one in found}
    return ends if len(ends) == 2 and not any(status in {"queued", "in_progress"} for status, _ in ends) else None


@pytest.mark.parametrize("policy", ["cancel", "finish"])
def test_a_run_whose_client_does_not_read_ends_as_if_it_had_gone(served, new_server, upstream, policy):
    server = new_server(
        DATABASE_URL=served.database_url,
        **{**PATIENT, "REPRISE_STREAM_WAIT_S": "0.5", "REPRISE_ON_DISCONNECT": policy},
    )
    body = {"model": "m", "input": script([note(policy), LONG, finish()]), "metadata": {"test": policy}, "stream": True}
    with Unread(server.url, "POST", "/responses", body).socket:

        def end():
            found = msgspec.json.decode(http_get(server.url, f"/responses?metadata[test]={policy}"))["data"]
            return found and found[0]

        response = until(end, "it has ended", 60)
    said = len(response["output"][0]["content"][0]["text"])
    if policy == "finish":
        assert (response["status"], said) == ("completed", PIECES * PIECE_BYTES)
    else:
        assert response["status"] == "cancelled"
        assert 500_000 < said < PIECES * PIECE_BYTES / 2
