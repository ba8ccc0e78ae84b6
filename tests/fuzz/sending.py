"""Sends broken requests, and says what is wrong with the replies."""

import json
import re
import socket
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException, HTTPResponse
from random import Random
from typing import Any
from urllib.parse import urlsplit

from msgspec import Struct

from tests.fuzz.mutations import encoded, mutated, wire
from tests.fuzz.shapes import ENDED, Known, valid
from tests.servers import Served
from tests.upstream import Upstream

WHOLE = 0.04
"""The share of requests that stay as they are, which must succeed."""
TIMEOUT_S = 30.0
PATHLESS = frozenset({"could not parse", "nested too deeply", "it is empty", "'body'"})
"""The errors of a body that has no parameters."""
NAMING = frozenset(
    "invalid_value invalid_type missing_required_parameter unknown_parameter unsupported_parameter "
    "previous_response_not_found empty_array array_above_max_length".split()
)
"""Codes of errors that are about one parameter; only this server gives them."""


class Violation(Exception):
    """A reply that may not be."""


class Answer(Struct):
    """A reply."""

    status: int
    kind: str
    body: bytes


class Wire:
    """One connection, which is opened again when the server has closed it."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._open: socket.socket | None = None

    def ask(self, head: bytes, body: bytes, method: str) -> Answer:
        """Send these bytes, read the reply."""
        fresh = self._open is None
        try:
            return self._ask(head, body, method)
        except (OSError, HTTPException) as error:
            self.close()
            if fresh:
                raise Violation(f"no reply: {error!r}") from None
        return self.ask(head, body, method)

    def _ask(self, head: bytes, body: bytes, method: str) -> Answer:
        if self._open is None:
            self._open = socket.create_connection(self._address, TIMEOUT_S)
        self._open.sendall(head + body)
        reply = HTTPResponse(self._open, method=method)
        try:
            reply.begin()
            answer = Answer(reply.status, reply.getheader("content-type", ""), reply.read())
            if reply.will_close:
                self.close()
        finally:
            reply.close()
        return answer

    def close(self) -> None:
        """Hang up."""
        if self._open is not None:
            self._open.close()
            self._open = None


class Fuzzer:
    """Sends to one server, in front of one upstream."""

    def __init__(self, served: Served, upstream: Upstream, seed: int) -> None:
        self._served, self._upstream, self._seed = served, upstream, seed
        parts = urlsplit(served.url)
        self._address = (str(parts.hostname), int(parts.port or 0))
        self._local = threading.local()
        self._wires: list[Wire] = []
        self._known = self._prepare()
        self.statuses: Counter[int] = Counter()

    def _prepare(self) -> Known:
        """What the requests can be about."""
        known = Known([], [], [], [])
        with self._served.client() as client:
            for number in range(3 * ENDED):
                kind = number // ENDED
                asked: dict[str, Any] = {"model": "m", "input": f"known {number}", "metadata": {"k": "v"}}
                if kind == 1:
                    events = list(client.responses.create(**asked, background=True, stream=True))
                    known.background.append(events[0].response.id)
                else:
                    (known.responses if kind == 0 else known.doomed).append(client.responses.create(**asked).id)
            known.items = [item.id for item in client.responses.input_items.list(known.responses[0])]
        return known

    def run(self, first: int, count: int, at_once: int) -> list[str]:
        """Send so many, by number; gives what was wrong."""
        with ThreadPoolExecutor(at_once) as threads:
            said = list(threads.map(self._try, range(first, first + count)))
        for one in self._wires:
            one.close()
        return [one for one in said if one]

    def _try(self, number: int) -> str | None:
        random = Random(f"{self._seed} {number}")
        mark = f"mark-{random.getrandbits(64):016x}-"  # no other becomes this one when a byte of it is flipped
        sent = valid(random, self._known, mark)
        whole = random.random() < WHOLE and sent.method != "DELETE"
        if whole:
            body = encoded(sent.body)
            head = wire(sent.method, sent.target.encode(), [*sent.headers.items()], body)
        else:
            head, body = mutated(random, sent)
        try:
            answer = self._wire.ask(head, body, sent.method)
            self.statuses[answer.status] += 1
            self._check(answer, mark, whole=whole)
        except Violation as error:
            return f"--first {number}: {error}\n    {head[:300]!r}\n    {body[:3000]!r}"
        return None

    @property
    def _wire(self) -> Wire:
        if not hasattr(self._local, "wire"):
            self._local.wire = Wire(self._address)
            self._wires.append(self._local.wire)
        made: Wire = self._local.wire
        return made

    # -- What a reply must be -------------------------------------------------------------------------------------------------

    def _check(self, answer: Answer, mark: str, *, whole: bool) -> None:
        if answer.status >= 500:
            raise Violation(f"{answer.status}: {answer.body[:500]!r}")
        if answer.status >= 400:
            if whole:
                raise Violation(f"a valid request is refused: {answer.status} {answer.body[:500]!r}")
            self._check_refusal(answer, mark)
        elif answer.kind.startswith("text/event-stream"):
            _check_stream(answer)
        elif answer.status == 200:
            made = _json(answer)
            if made.get("object") == "response":
                _check_made(made)

    def _check_refusal(self, answer: Answer, mark: str) -> None:
        said = _json(answer)
        error = said.get("error")
        if not isinstance(error, dict) or list(error) != ["message", "type", "param", "code"]:
            if answer.kind.startswith("text/plain") and answer.body.startswith(b"Invalid HTTP request"):
                return  # below HTTP there are no parameters
            raise Violation(f"an error of another shape: {answer.body[:300]!r}")
        if not (error["message"] and isinstance(error["message"], str) and isinstance(error["type"], str)):
            raise Violation(f"an error that says nothing: {error}")
        if not (isinstance(error["param"], str | None) and isinstance(error["code"], str | None)):
            raise Violation(f"an error whose parameter or code is no text: {error}")
        if error["code"] in NAMING:
            if error["param"] is None and not any(words in error["message"] for words in PATHLESS):
                raise Violation(f"an error that names no parameter: {error}")
            if any(mark.encode() in record.raw for record in list(self._upstream.requests)[-50:]):
                raise Violation(f"refused, but the upstream was asked: {error}")

    def afterwards(self) -> list[str]:
        """Errors that no reply shows: in the log, and in responses that failed later."""
        mistakes = [line for line in self._served.printed if re.search("own mistake|because of a bug|Traceback", line)]
        with self._served.client() as client:
            failed = client.get("/responses?status=failed&limit=100", cast_to=dict)  # type: ignore[type-var]
        wrong = [one["error"] for one in failed["data"] if one["error"]["message"] in OURS]
        return [f"in the log: {line}" for line in mistakes] + [f"a response failed: {error}" for error in wrong]


OURS = frozenset({"The server had an error while making the response.", "The response could not be stored."})
"""What responses say that failed by a mistake of ours."""


def _json(answer: Answer) -> dict[str, Any]:
    if answer.kind.startswith("text/plain"):
        return {}
    try:
        made = json.loads(answer.body)
    except ValueError:
        raise Violation(f"{answer.status} with what is no JSON: {answer.body[:300]!r}") from None
    return made if isinstance(made, dict) else {}


def _check_made(made: dict[str, Any]) -> None:
    if (made.get("error") or {}).get("message") in OURS:
        raise Violation(f"the response failed by a mistake: {made['error']}")


def _check_stream(answer: Answer) -> None:
    frames = [frame for frame in answer.body.split(b"\n\n") if frame and not frame.startswith(b":")]
    if not frames or frames[-1] != b"data: [DONE]":
        raise Violation(f"a stream that broke off: {answer.body[-300:]!r}")
    for frame in frames[-2:-1]:
        event = json.loads(frame.partition(b"\ndata: ")[2])
        if "response" in event:
            _check_made(event["response"])


def report(fuzzer: Fuzzer, wrong: Sequence[str]) -> str:
    """Some lines for people."""
    counts = ", ".join(f"{count} x {status}" for status, count in sorted(fuzzer.statuses.items()))
    failed = sum(count for status, count in fuzzer.statuses.items() if status >= 500)
    return f"{fuzzer.statuses.total()} requests, {failed} x 5xx, {len(wrong)} violations ({counts})"
