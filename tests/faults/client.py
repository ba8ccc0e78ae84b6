"""Clients of background streams over plain sockets: cheap enough for hundreds of them."""

import contextlib
import http.client
import itertools
import random
import threading
import time
import urllib.parse
from collections.abc import Sequence
from typing import Any

import msgspec

ENDED_S = 40.0
"""A run of these tests that has not ended by then never will."""


def connect(url: str, timeout_s: float = 20.0) -> tuple[http.client.HTTPConnection, str]:
    """A connection to a server, and the path of its API."""
    parts = urllib.parse.urlsplit(url)
    assert parts.hostname
    return http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout_s), parts.path


def call(
    url: str, method: str, path: str, body: Any = None, *, key: str = "none", timeout_s: float = 20.0
) -> tuple[int, Any]:
    """One request: the status and the decoded JSON."""
    connection, base = connect(url, timeout_s)
    with contextlib.closing(connection):
        headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
        connection.request(method, base + path, msgspec.json.encode(body) if body is not None else None, headers)
        reply = connection.getresponse()
        return reply.status, msgspec.json.decode(reply.read())


def get(url: str, response_id: str) -> dict[str, Any]:
    """The current response."""
    status, body = call(url, "GET", f"/responses/{response_id}")
    assert status == 200, body
    return body


def begin(url: str, said: str, *, key: str = "none", stream: bool = True, **more: Any) -> str:
    """A background response; gives its id, and drops the connection of its stream at the first event."""
    body = {"model": "m", "input": said, "background": True, "stream": stream, **more}
    if not stream:
        status, queued = call(url, "POST", "/responses", body, key=key)
        assert status == 200, queued
        return queued["id"]
    connection, base = connect(url)
    with contextlib.closing(connection):
        headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
        connection.request("POST", f"{base}/responses", msgspec.json.encode(body), headers)
        reply = connection.getresponse()
        assert reply.status == 200, reply.read()
        created = reply.readline() + reply.readline()
    return msgspec.json.decode(created.split(b"data: ")[1])["response"]["id"]


def stream(url: str, said: str) -> tuple[int, list[dict[str, Any]]]:
    """A foreground stream: the status and every event."""
    connection, base = connect(url, 60)
    with contextlib.closing(connection):
        body = msgspec.json.encode({"model": "m", "stream": True, "input": said})
        connection.request("POST", f"{base}/responses", body, {"content-type": "application/json"})
        reply = connection.getresponse()
        *frames, _, _ = reply.read().split(b"\n\n") if reply.status == 200 else [b"", b""]
    return reply.status, [decoded(frame) for frame in frames if not frame.startswith(b":")]


def cancel(url: str, response_id: str) -> dict[str, Any]:
    """Cancel a response; gives the answer."""
    status, body = call(url, "POST", f"/responses/{response_id}/cancel")
    assert status == 200, body
    return body


def frames_of(url: str, response_id: str, after: int | None = None, *, key: str = "none") -> list[bytes]:
    """The frames of a stream to its end, as bytes."""
    connection, base = connect(url)
    query = "" if after is None else f"&starting_after={after}"
    with contextlib.closing(connection):
        connection.request(
            "GET", f"{base}/responses/{response_id}?stream=true{query}", headers={"authorization": f"Bearer {key}"}
        )
        reply = connection.getresponse()
        body = reply.read()
    assert reply.status == 200, body
    *frames, done, rest = body.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b""), body[-200:]
    return [frame for frame in frames if not frame.startswith(b":")]


def decoded(frame: bytes) -> dict[str, Any]:
    """The event of a frame."""
    return msgspec.json.decode(frame.split(b"\ndata: ", 1)[1])


class Follower:
    """A client that reads a background stream in a thread, drops its connection now and then, and resumes on any replica."""

    def __init__(self, urls: Sequence[str], response_id: str, *, drops: int = 0, seed: int = 0) -> None:
        """With `drops` it leaves as often after a random number of events; it also resumes whenever it is cut off."""
        self.urls, self.response_id = list(urls), response_id
        self.frames: list[bytes] = []
        self.arrived: list[float] = []
        self.cuts = 0
        self.resumed_at: list[int] = []
        self._random = random.Random(seed)
        self._drops = drops
        self._failed = ""
        self._grown = threading.Condition()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    @property
    def seen(self) -> list[dict[str, Any]]:
        """The events so far."""
        return [decoded(frame) for frame in list(self.frames)]

    def join(self, timeout_s: float = ENDED_S) -> list[dict[str, Any]]:
        """Wait for the end of the stream; gives every event."""
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), f"not ended: {self.frames[-1:]}"
        assert not self._failed, self._failed
        return self.seen

    @property
    def slowest_s(self) -> float:
        """The longest time between two events."""
        return max((after - before for before, after in itertools.pairwise(self.arrived)), default=0.0)

    def wait_events(self, count: int, timeout_s: float = 20.0) -> None:
        """Wait until so many events have come."""
        with self._grown:
            assert self._grown.wait_for(lambda: len(self.frames) >= count, timeout_s), f"only {len(self.frames)} events"

    def wait_for(self, type: str, timeout_s: float = 20.0) -> None:
        """Wait until an event of that type has come."""
        wanted = f"event: {type}\n".encode()
        with self._grown:
            came = self._grown.wait_for(lambda: any(frame.startswith(wanted) for frame in self.frames), timeout_s)
            assert came, f"no {type}"

    def _follow(self) -> None:
        deadline = time.monotonic() + 3 * ENDED_S
        while time.monotonic() < deadline:
            try:
                if self._read():
                    return
                self.resumed_at.append(len(self.frames))
            except (OSError, http.client.HTTPException):
                self.cuts += 1
                time.sleep(0.02)
            except AssertionError as error:
                self._failed = str(error)
                return
        self._failed = "not ended in time"

    def _read(self) -> bool:
        """One connection; whether it came to the end of the stream."""
        connection, base = connect(self._random.choice(self.urls))
        after = f"&starting_after={decoded(self.frames[-1])['sequence_number']}" if self.frames else ""
        left = self._random.randrange(1, 12) if self._drops else 10**9
        with contextlib.closing(connection):
            connection.request("GET", f"{base}/responses/{self.response_id}?stream=true{after}")
            reply = connection.getresponse()
            if reply.status != 200:
                body = reply.read()
                assert reply.status >= 500, body
                time.sleep(0.05)
                return False
            held = bytearray()
            while piece := reply.read1(65536):
                begin = max(0, len(held) - 1)
                held += piece
                if held.find(b"\n\n", begin) < 0:  # a frame of megabytes is not searched again with each piece
                    continue
                *whole, rest = bytes(held).split(b"\n\n")
                held = bytearray(rest)
                for frame in whole:
                    if frame == b"data: [DONE]":
                        return True
                    if not frame.startswith(b":"):
                        self._take(frame)
                        left -= 1
                    if left <= 0:
                        self._drops -= 1
                        return False
        raise http.client.IncompleteRead(b"")

    def _take(self, frame: bytes) -> None:
        with self._grown:
            self.frames.append(frame)
            self.arrived.append(time.monotonic())
            self._grown.notify_all()
