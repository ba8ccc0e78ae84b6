"""A request as long as one may be does not make others wait: a stream beside it goes on."""

import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from tests.conftest import NewServer
from tests.servers import ROOT
from tests.upstream import Upstream, forever, script, text

BODY_BYTES = 60_000_000
SILENCE_MAX = 0.25
"""The longest silence of a stream beside a long request, as a share of the time that this request takes; so it does not matter how
busy the machine is. It is a tenth; where the long request is decoded in one go it is a half."""


@pytest.fixture
def elsewhere() -> Iterator[str]:
    """The address of an upstream in a process of its own, so that what it reads does not slow down who measures."""
    command = [sys.executable, "-m", "tests.upstream", "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def long_body() -> bytes:
    """A legal body of many small values."""
    annotation = {"type": "url_citation", "url": "u", "title": "t", "start_index": 0, "end_index": 1}
    part = {"type": "output_text", "text": "x", "annotations": [annotation] * 10}
    item = {"role": "assistant", "content": [part] * 10}
    asked = {"role": "user", "content": "hi"}
    count = BODY_BYTES // len(json.dumps(item) + ", ")
    return json.dumps({"model": "other@m", "store": False, "input": [item] * count + [asked]}).encode()


def test_a_stream_goes_on_beside_a_long_request(
    new_server: NewServer, upstream: Upstream, elsewhere: str, catalog_file: Callable[[str], str]
):
    catalog = catalog_file(
        f'default = "near"\n[upstreams.near]\nbase_url = "{upstream.base_url}"\n'
        f'[upstreams.other]\nbase_url = "{elsewhere}"\n'
    )
    served = new_server(REPRISE_CATALOG=catalog)
    heard: list[float] = []
    ended = threading.Event()
    speaking = threading.Event()

    def follow() -> None:
        asked = {"model": "m", "input": script([forever(text("x"), every_ms=20)]), "stream": True}
        with httpx.stream("POST", f"{served.url}/responses", json=asked, timeout=60) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: "):
                    heard.append(time.monotonic())
                    speaking.set()
                if ended.is_set():
                    return

    body = long_body()
    following = threading.Thread(target=follow)
    following.start()
    try:
        assert speaking.wait(30)
        begun = time.monotonic()
        reply = httpx.post(f"{served.url}/responses", content=body, timeout=100)
        took = time.monotonic() - begun
    finally:
        ended.set()
        following.join()
    assert reply.status_code == 200, reply.text
    times = [begun, *(at for at in heard if begun < at < begun + took), begun + took]
    silence = max(after - before for before, after in itertools.pairwise(times))
    assert silence < SILENCE_MAX * took, f"silent for {silence:.2f} of {took:.2f} seconds"
