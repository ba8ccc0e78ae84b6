"""What reaches the server before a key is looked at: endless, slow, idle and numerous connections. Each has its limit and its
answer, none costs memory, and others are answered meanwhile."""

import contextlib
import json
import resource
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.servers import Served
from tests.waiting import until

GROWTH_BYTES_MAX = 24 * 1024 * 1024
FLOOD_BYTES = 96 * 1024 * 1024
"""Far more than may be kept."""

HEAD = b"POST /v1/responses HTTP/1.1\r\nhost: localhost\r\n"


@pytest.fixture(scope="module")
def served(base_env, new_database) -> Iterator[Served]:
    """Impatient."""
    env = {
        "REPRISE_HEAD_TIMEOUT_S": "1",
        "REPRISE_IDLE_TIMEOUT_S": "1",
        "REPRISE_SEND_TIMEOUT_S": "1",
        "REPRISE_BODY_TIMEOUT_S": "1",
        "REPRISE_BODY_BYTES_MAX": "4000000",
    }
    with Served({**base_env, "DATABASE_URL": new_database(), **env}) as running:
        assert httpx.get(f"{running.url}/responses").status_code == 200
        yield running


def port_of(served):
    return int(served.url.split(":")[2].split("/")[0])


def resident(served):
    """Bytes of memory of the process."""
    pages = int(Path(f"/proc/{served.process.pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize()


class Peer:
    """A client on a bare socket."""

    def __init__(self, served: Served) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port_of(served)), timeout=15)
        self.received = b""

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def flood(self, piece: bytes, size: int = FLOOD_BYTES, wait_s: float = 3.0) -> int:
        """Send the same again and again, until the server takes no more; how much it took."""
        block, sent = memoryview(piece * (65536 // len(piece) + 1)), 0
        self.socket.settimeout(wait_s)
        with contextlib.suppress(OSError):
            while sent < size:
                at = sent % len(piece)
                sent += self.socket.send(block[at:])
        self.socket.settimeout(15)
        return sent

    def read_reply(self) -> "tuple[int, dict[str, str], bytes]":
        """The next reply that has a length."""
        while (ends := self.received.find(b"\r\n\r\n")) < 0:
            self._receive()
        line, *lines = self.received[:ends].decode().split("\r\n")
        headers = dict(one.lower().split(": ", 1) for one in lines)
        whole = ends + 4 + int(headers["content-length"])
        while len(self.received) < whole:
            self._receive()
        body, self.received = self.received[ends + 4 : whole], self.received[whole:]
        return int(line.split()[1]), headers, body

    def _receive(self) -> None:
        data = self.socket.recv(65536)
        assert data, f"the connection ended after {self.received!r}"
        self.received += data

    def is_closed(self) -> bool:
        """Whether the server closes the connection, and says nothing before it does."""
        with contextlib.suppress(ConnectionResetError):
            return self.received == b"" and self.socket.recv(1) == b""
        return True

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()


@contextlib.contextmanager
def bounded(served):
    """Memory does not grow by more than a little, and others are answered all the time."""
    before, grown, late, ended = resident(served), 0, 0.0, threading.Event()

    def watch():
        nonlocal grown, late
        with httpx.Client(timeout=30) as client:
            while not ended.wait(0.05):
                begun_s = time.monotonic()
                assert client.get(f"{served.url}/responses").status_code == 200
                late = max(late, time.monotonic() - begun_s)
                grown = max(grown, resident(served) - before)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield
    finally:
        ended.set()
        watching.join(60)
    print(f"memory grew by {grown / 1e6:.1f} MB at most; others waited for {late:.2f} s at most")
    assert grown < GROWTH_BYTES_MAX
    assert late < 5


def refused(peer, status, code, message, headers=()):
    """The reply is that error in OpenAI's shape, and the last one."""
    got, given, body = peer.read_reply()
    error = json.loads(body)["error"]
    assert (got, error["code"], error["type"]) == (status, code, "server_error" if status >= 500 else error["type"])
    assert error["param"] is None
    assert message in error["message"]
    assert given["content-type"] == "application/json"
    assert given["connection"] == "close"
    assert given["x-request-id"].startswith("req_")
    assert set(headers) <= given.keys()
    assert peer.is_closed()


LARGE_HEAD = (431, "request_headers_too_large")


@pytest.mark.parametrize(
    ("begin", "piece", "answer"),
    [
        pytest.param(HEAD, b"x: y\r\n", (*LARGE_HEAD, "REPRISE_HEADERS_MAX"), id="headers"),
        pytest.param(HEAD, b"x: " + b"y" * 2_000 + b"\r\n", (*LARGE_HEAD, "REPRISE_HEAD_BYTES_MAX"), id="bytes"),
        pytest.param(HEAD + b"x: ", b"y", (*LARGE_HEAD, "REPRISE_HEAD_BYTES_MAX"), id="one line"),
        pytest.param(HEAD, b"y", (*LARGE_HEAD, "REPRISE_HEAD_BYTES_MAX"), id="one name"),
        pytest.param(b"GET /v1/", b"y", (414, "uri_too_long", "REPRISE_HEAD_BYTES_MAX"), id="url"),
    ],
)
def test_an_endless_head_is_refused(served, begin, piece, answer):
    with bounded(served), Peer(served) as peer:
        peer.send(begin)
        taken = peer.flood(piece)
        refused(peer, *answer)
    print(f"{taken / 1e6:.1f} MB were taken")


def test_a_head_at_the_limits_is_served(served):
    with Peer(served) as peer:
        lines = b"".join(b"x-%d: y\r\n" % number for number in range(98))
        peer.send(b"GET /v1/responses HTTP/1.1\r\nhost: localhost\r\n" + lines + b"x: y\r\n\r\n")
        assert peer.read_reply()[0] == 200
        url = b"/v1/responses?model=" + b"m" * 30_000
        peer.send(b"GET " + url + b" HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert peer.read_reply()[0] in {200, 400}


def test_a_head_that_comes_byte_by_byte_is_served(served):
    with Peer(served) as peer:
        for byte in b"\r\nGET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n":
            peer.send(bytes([byte]))
        assert peer.read_reply()[2] == b"ok"


def test_empty_lines_in_front_of_a_request_cost_nothing(served):
    with contextlib.ExitStack() as stack, bounded(served):
        peers = [stack.enter_context(Peer(served)) for _ in range(30)]
        for peer in peers:
            peer.flood(b"\r\n", 1_000_000, wait_s=1)
        assert all(peer.is_closed() for peer in peers)  # they are no beginning of a request


def test_what_is_no_http_gets_400_in_shape(served):
    with Peer(served) as peer:
        peer.send(b"\x16\x03\x01 hello\r\n\r\n")
        refused(peer, 400, None, "Invalid HTTP request")


def test_requests_that_nobody_reads_the_replies_of_wait_outside(served):
    asked = b"GET /v1/responses HTTP/1.1\r\nhost: localhost\r\n\r\n"
    with bounded(served), Peer(served) as peer:
        assert peer.flood(asked, wait_s=0.5) < FLOOD_BYTES


def test_pipelined_requests_are_answered_in_order(served, upstream):
    with Peer(served) as peer:
        body = json.dumps({"model": "m", "input": "piped"}).encode()
        create = HEAD + b"content-length: %d\r\n\r\n" % len(body) + body
        peer.send((create + b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n" + create) * 2)
        replies = [peer.read_reply() for _ in range(6)]
    assert [status for status, _, _ in replies] == [200] * 6
    assert [body == b"ok" for _, _, body in replies] == [False, True, False] * 2


def chunked(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)


def test_a_body_in_chunks_is_read_and_its_trailers_are_not(served):
    with Peer(served) as peer:
        body = chunked(b'{"model": "m", ', b'"input": "in chunks"}') + b"0\r\nx-trailer: y\r\nauthorization: z\r\n\r\n"
        for _ in range(2):
            peer.send(HEAD + b"transfer-encoding: chunked\r\n\r\n" + body)
            status, headers, made = peer.read_reply()
            assert (status, json.loads(made)["status"]) == (200, "completed")
            assert "connection" not in headers


def test_what_comes_too_early_behind_a_body_in_chunks_is_left_to_another_connection(served):
    with Peer(served) as peer:
        body = chunked(b'{"model": "m", "input": "in chunks"}') + b"0\r\n\r\n"
        peer.send((HEAD + b"transfer-encoding: chunked\r\n\r\n" + body) * 2)
        status, headers, _ = peer.read_reply()
        assert (status, headers["connection"]) == (200, "close")
        assert peer.is_closed()


@pytest.mark.parametrize(
    ("begin", "piece"),
    [(b"0\r\n", b"x: y\r\n"), (b"0\r\nx: ", b"y"), (b"1;", b"y")],
    ids=["trailers", "one trailer", "an extension"],
)
def test_endless_trailers_are_refused(served, begin, piece):
    with bounded(served), Peer(served) as peer:
        peer.send(HEAD + b"transfer-encoding: chunked\r\n\r\n" + begin)
        peer.flood(piece)
        refused(peer, *LARGE_HEAD, "trailers")


@pytest.mark.parametrize("sends", ["length", "chunks"])
def test_a_body_that_is_too_large_is_refused_before_it_is_held(served, sends):
    with bounded(served), Peer(served) as peer:
        if sends == "length":
            peer.send(HEAD + b"content-length: %d\r\n\r\n" % FLOOD_BYTES)
            peer.flood(b"y" * 1000, wait_s=0.5)
        else:
            peer.send(HEAD + b"transfer-encoding: chunked\r\n\r\n")
            peer.flood(chunked(b"y" * 65536), wait_s=0.5)
        status, headers, body = peer.read_reply()
        assert (status, headers["connection"]) == (413, "close")
        assert json.loads(body)["error"]["code"] == "request_too_large"
        assert peer.is_closed()


def test_slow_heads_and_bodies_are_refused(served):
    slow = {"head": HEAD + b"x: ", "body": HEAD + b"content-length: 100000\r\n\r\n"}
    for what, begin in slow.items():
        with Peer(served) as peer:
            begun_s = time.monotonic()
            peer.send(begin)
            with contextlib.suppress(OSError):
                while time.monotonic() - begun_s < 1.5:
                    peer.send(b"y")
                    time.sleep(0.1)  # the very thing under test
            refused(peer, 408, "request_timeout", what.replace("head", "headers"))
            assert 0.9 < time.monotonic() - begun_s < 5


def test_a_body_at_the_least_rate_may_take_longer(served):
    body = json.dumps({"model": "m", "input": "slowly"}).encode() + b" " * 60_000
    with Peer(served) as peer:
        peer.send(HEAD + b"content-length: %d\r\n\r\n" % len(body))
        for at in range(0, len(body), 3_000):
            peer.send(body[at : at + 3_000])
            time.sleep(0.1)  # the very thing under test: 30 kB/s for two seconds
        assert peer.read_reply()[0] == 200


def test_a_body_that_came_fast_may_not_be_silent_for_its_credit(served):
    with Peer(served) as peer:
        peer.send(HEAD + b"content-length: 3000000\r\n\r\n" + b" " * 2_000_000)  # two minutes at the least rate
        begun_s = time.monotonic()
        refused(peer, 408, "request_timeout", "body")
        assert time.monotonic() - begun_s < 10


ROOM = {"REPRISE_BODY_BYTES_MAX": "4000000", "REPRISE_BODIES_BYTES_MAX": "10000000"}
"""For the bodies of three."""


@contextlib.contextmanager
def full(served):
    """All room for long bodies is taken by the three that are given, and the one more was refused."""
    with contextlib.ExitStack() as stack:
        peers = {peer.socket: peer for peer in [stack.enter_context(Peer(served)) for _ in range(4)]}
        for peer in peers.values():
            with contextlib.suppress(ConnectionError):
                peer.send(HEAD + b"content-length: 4000000\r\n\r\n" + b" " * 3_100_000)
        [answered], _, _ = select.select(peers, [], [], 15)
        status, headers, _ = peers.pop(answered).read_reply()
        assert (status, headers["retry-after"]) == (429, "5")
        yield peers


def test_long_bodies_are_bounded_together(new_server):
    """One is refused as long as the others are not late; short ones always come through."""
    served = new_server(**ROOM)
    with full(served) as arriving:
        assert create(served, b"") == (200, None)
        assert create(served, b" " * 3_000_000) == (429, "5")
        assert select.select(arriving, [], [], 0)[0] == []


def test_bodies_that_are_late_make_room_for_new_ones(new_server):
    served = new_server(**ROOM, REPRISE_BODY_TIMEOUT_S="3")
    with full(served) as late:

        def is_taken() -> bool:
            for peer in late.values():
                peer.send(b" " * 2_000)  # they are slow, and not silent
            return create(served, b" " * 3_000_000) == (200, None)

        until(is_taken)
        [given_up], _, _ = select.select(late, [], [], 15)
        assert late[given_up].read_reply()[0] == 429


def test_a_body_that_is_not_whole_when_the_server_ends_is_refused(new_server):
    served = new_server(REPRISE_SHUTDOWN_GRACE_S="0.5", REPRISE_SHUTDOWN_DELAY_S="0")
    with Peer(served) as peer:
        peer.send(HEAD + b"content-length: 1000\r\n\r\n{")
        until(lambda: httpx.get(f"{served.url}/responses").status_code == 200)
        served.process.send_signal(signal.SIGTERM)
        refused(peer, 503, None, "shutting down", headers=["retry-after", "x-request-id"])
    assert served.process.wait(20) == 0
    assert not any("Traceback" in line or '"level": "error"' in line for line in served.printed)


def create(served, padding):
    """A request of so many bytes; its status, and when to come again."""
    with Peer(served) as peer:
        body = json.dumps({"model": "m", "input": "x"}).encode() + padding
        with contextlib.suppress(ConnectionError):
            peer.send(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
        status, headers, _ = peer.read_reply()
        return status, headers.get("retry-after")


@pytest.mark.parametrize("method", ["POST", "GET", "DELETE", "CONNECT"])
@pytest.mark.parametrize("protocol", ["h2c", "websocket", "any"])
@pytest.mark.parametrize("is_chunked", [False, True])
def test_what_looks_like_another_protocol_smuggles_no_request(served, method, protocol, is_chunked):
    """A body is a body, and not the next request."""
    inner = b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n"
    length = b"transfer-encoding: chunked" if is_chunked else b"content-length: %d" % len(inner)
    head = f"{method} /v1/responses HTTP/1.1\r\nhost: localhost\r\nConnection: Upgrade, HTTP2-Settings\r\nUPGRADE: {protocol}\r\n"
    with Peer(served) as peer:
        peer.send(head.encode() + length + b"\r\n\r\n" + (chunked(inner, b"") if is_chunked else inner))
        peer.read_reply()
        assert b"ok" not in everything(peer)


def test_a_client_that_offers_http2_is_answered_in_http1(served):
    """So the JDK's client does with each request."""
    body = json.dumps({"model": "m", "input": "x"}).encode()
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n"
    with Peer(served) as peer:
        for _ in range(2):
            peer.send(HEAD + offer + b"content-length: %d\r\n\r\n" % len(body) + body)
            assert peer.read_reply()[0] == 200


def everything(peer):
    """All that the server still says, until it closes the connection, or has been idle for long."""
    said = peer.received
    with contextlib.suppress(ConnectionResetError):
        while data := peer.socket.recv(65536):
            said += data
    return said


def test_idle_connections_are_closed_without_a_word(served):
    with Peer(served) as fresh, Peer(served) as used:
        used.send(b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n")
        used.read_reply()
        begun_s = time.monotonic()
        assert fresh.is_closed()
        assert used.is_closed()
        assert 0.5 < time.monotonic() - begun_s < 5


def test_a_reply_that_nobody_takes_does_not_stay(served):
    """The connection ends although there is something left to send."""
    large = [{"role": "developer", "content": "large " * 500_000}, {"role": "user", "content": "hi"}]
    made = httpx.post(f"{served.url}/responses", json={"model": "m", "input": large}, timeout=30).json()
    asked = f"GET /v1/responses/{made['id']}/input_items HTTP/1.1\r\nhost: localhost\r\n\r\n".encode()
    with Peer(served) as peer:
        peer.send(asked * 8)
        assert is_open(peer)
        until(lambda: not is_open(peer))


def is_open(peer):
    """Whether the server's side of a connection is still established."""
    ends = f":{peer.socket.getpeername()[1]:04X}", f":{peer.socket.getsockname()[1]:04X}"
    sides = [line.split()[1:4] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(here.endswith(ends[0]) and there.endswith(ends[1]) and state == "01" for here, there, state in sides)


def test_a_key_is_asked_for_before_the_body(base_env, new_database):
    from tests.servers import reprise

    env = {**base_env, "DATABASE_URL": new_database()}
    key = reprise(env, "keys", "create").stdout.strip()
    with Served(env) as served:
        for expects in (b"", b"expect: 100-continue\r\n"):
            with Peer(served) as peer:
                peer.send(HEAD + expects + b"content-length: 1000000\r\nauthorization: Bearer no\r\n\r\n")
                status, headers, _ = peer.read_reply()
                assert (status, headers["connection"]) == (401, "close")
        with bounded_by_key(served, key), Peer(served) as peer:
            peer.send(HEAD + b"content-length: %d\r\n\r\n" % 60_000_000)
            peer.flood(b"y" * 1000, size=60_000_000, wait_s=0.5)
            assert peer.read_reply()[0] == 401


@contextlib.contextmanager
def bounded_by_key(served, key):
    before = resident(served)
    yield
    assert resident(served) - before < GROWTH_BYTES_MAX
    assert httpx.get(f"{served.url}/responses", headers={"authorization": f"Bearer {key}"}).status_code == 200


def test_more_connections_than_allowed_are_refused_and_places_become_free(new_server):
    served = new_server(REPRISE_CONNECTIONS_MAX="20")
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(Peer(served)) for _ in range(20)]
        for _ in range(100):
            with Peer(served) as late:
                late.send(b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n")
                refused(late, 503, None, "Too many connections", headers=["retry-after"])
        for peer in peers:
            peer.send(b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert peer.read_reply()[0] == 200
    until(lambda: httpx.get(f"{served.url}/responses").status_code == 200)


def test_a_low_limit_of_open_files_bounds_the_connections(base_env, new_database):
    """Postgres and upstreams are reached however many connect."""
    env = {**base_env, "DATABASE_URL": new_database()}
    with Served(env, files_max=(128, 300)) as served, contextlib.ExitStack() as stack:
        assert any("connections_limited" in line for line in served.printed)
        first = stack.enter_context(Peer(served))
        first.send(b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert first.read_reply()[0] == 200
        peers = [stack.enter_context(Peer(served)) for _ in range(400)]
        body = json.dumps({"model": "m", "input": "crowded"}).encode()
        first.send(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
        assert first.read_reply()[0] == 200
        assert len(peers) == 400
