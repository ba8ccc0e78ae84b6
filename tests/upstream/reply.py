"""One reply: the steps of a turn performed on the wire, and the record that is kept of it."""

import asyncio
import http.client
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tests.upstream.script import Step, usage_of
from tests.upstream.strictness import Refused, text_of


@dataclass(eq=False)
class Recorded:
    """One request that arrived, and what became of its reply; times are `time.monotonic()`."""

    number: int
    method: str
    path: str
    headers: dict[str, str]
    raw: bytes
    body: Any = None
    said: str = ""
    turn: int = 0
    arrived_s: float = field(default_factory=time.monotonic)
    first_byte_s: float | None = None
    closed_s: float | None = None
    status: int | None = None
    peer_left: bool = False
    closed: threading.Event = field(default_factory=threading.Event)

    async def until_closed(self, timeout_s: float = 5.0) -> bool:
        """Wait in a coroutine, without blocking its loop, until the reply ended or the peer left."""
        return await asyncio.to_thread(self.closed.wait, timeout_s)


class Cut(Exception):
    """The script breaks the connection here."""


class Answered(Exception):
    """The reply is complete already; the steps that follow do not count."""


class Gate:
    """One place where replies wait for the test."""

    def __init__(self) -> None:
        """Closed, without arrivals."""
        self.reached = threading.Event()
        self.opened = asyncio.Event()

    async def go_through(self) -> None:
        """Record an arrival, and wait."""
        self.reached.set()
        await self.opened.wait()


class Wire:
    """The body of one reply on its way out, in pieces or in one as the script says."""

    def __init__(self, write: Callable[[bytes], Awaitable[None]], record: Recorded) -> None:
        """Nothing is sent yet."""
        self.piece: int | None = None
        self.coalesced = False
        self._held = bytearray()
        self._write = write
        self._record = record

    async def send(self, data: bytes) -> None:
        """Send a part of a streamed body; what fills no piece is held back."""
        self._held += data
        if self.coalesced:
            return
        step = self.piece or len(self._held)
        while self._held and len(self._held) >= step:
            await self._write(self._head() + self._take(step))
        if not data:
            await self._write(self._head())

    async def flush(self) -> None:
        """Send what is held back for a whole piece, before a silence."""
        if self._held and not self.coalesced:
            await self._write(self._head() + self._take(len(self._held)))

    async def end(self) -> None:
        """Send all that is held back, and the last HTTP chunk in the same write."""
        await self._write(self._head() + self._take(len(self._held)) + b"0\r\n\r\n")

    async def break_off(self) -> None:
        """Send all that is held back, but no last HTTP chunk."""
        if self._held:
            await self._write(self._head() + self._take(len(self._held)))

    async def whole(self, status: int, body: object, headers: Mapping[str, str] | None = None) -> None:
        """Send a complete, unstreamed reply."""
        kind, data = (
            ("text/html", body.encode()) if isinstance(body, str) else ("application/json", msgspec.json.encode(body))
        )
        self._started(status)
        lines = {"content-type": kind, "content-length": str(len(data)), **(headers or {})}
        await self._write(_head(status, lines) + data)

    def _take(self, count: int) -> bytes:
        """The next piece as one HTTP chunk; nothing is nothing, since an empty HTTP chunk would be the last."""
        taken = bytes(self._held[:count])
        del self._held[:count]
        return b"%x\r\n%b\r\n" % (len(taken), taken) if taken else b""

    def _head(self) -> bytes:
        """The head before the first bytes, nothing later."""
        if self._record.first_byte_s is not None:
            return b""
        self._started(200)
        return _head(200, {"content-type": "text/event-stream; charset=utf-8", "transfer-encoding": "chunked"})

    def _started(self, status: int) -> None:
        assert self._record.first_byte_s is None, "a status after the first bytes of a stream"
        self._record.first_byte_s = time.monotonic()
        self._record.status = status


def _head(status: int, headers: Mapping[str, str]) -> bytes:
    phrase = http.client.responses.get(status, "Unknown")
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status} {phrase}\r\n{lines}\r\n".encode("latin-1")


class Whole:
    """Chunks folded into a chat.completion, for requests that do not stream."""

    def __init__(self) -> None:
        """An empty assistant message."""
        self.message: dict[str, Any] = {"role": "assistant", "content": None}
        self.calls: dict[int, dict[str, Any]] = {}
        self.finish: str | None = None
        self.usage: dict[str, Any] | None = None

    def add(self, chunk: Mapping[str, Any]) -> None:
        """Fold one chunk."""
        if "error" in chunk:
            raise Refused(str(chunk["error"].get("message")), code="scripted_error", status=500)
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk.get("choices", ()):
            self.finish = choice.get("finish_reason") or self.finish
            for key, value in choice.get("delta", {}).items():
                if key == "tool_calls":
                    for part in value:
                        self._add_call(part)
                elif key != "role":
                    self.message[key] = (self.message.get(key) or "") + (value or "")

    def _add_call(self, part: Mapping[str, Any]) -> None:
        whole = self.calls.setdefault(part.get("index", 0), {})
        for key, value in part.items():
            if isinstance(value, dict):
                inner = whole.setdefault(key, {})
                for name, piece in value.items():
                    inner[name] = inner.get(name, "") + piece
            elif key != "index":
                whole[key] = value

    def completion(self, base: Mapping[str, Any]) -> dict[str, Any]:
        """The chat.completion object."""
        calls = [self.calls[index] for index in sorted(self.calls)]
        message = self.message | ({"tool_calls": calls} if calls else {})
        choice = {"index": 0, "message": message, "finish_reason": self.finish, "logprobs": None}
        return {**base, "object": "chat.completion", "choices": [choice], "usage": self.usage}


class Reply:
    """One reply: performs the steps of one turn."""

    def __init__(
        self, record: Recorded, wire: Wire, gate: Callable[[str], Gate], count: Callable[[Recorded, Step], int]
    ) -> None:
        """Nothing is performed yet; `gate` finds a gate, `count` says how often a step has been reached."""
        body = record.body
        self._record, self._wire, self._gate, self._count = record, wire, gate, count
        self._whole = None if body.get("stream") else Whole()
        self._base = {
            "id": f"chatcmpl-{record.number}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": body["model"],
        }
        self._role: dict[str, Any] = {"role": "assistant"}
        self._usage_due = self._whole is not None or bool((body.get("stream_options") or {}).get("include_usage"))
        self._finish_usage: dict[str, Any] = {}
        self._written = 0
        self._done = True
        self._round = ""

    async def run(self, steps: Sequence[Step]) -> None:
        """Perform all the steps, then end the reply."""
        await self._perform_all(steps)
        if self._usage_due:
            await self._emit(self._chunk_of_usage(self._computed_usage()))
        if self._whole is not None:
            await self._wire.whole(200, self._whole.completion(self._base))
            return
        if self._done:
            await self._wire.send(b"data: [DONE]\n\n")
        await self._wire.end()

    async def _perform_all(self, steps: Sequence[Step]) -> None:
        for step in steps:
            if not await self._perform_control(step):
                await self._perform_output(step)

    async def _perform_control(self, step: Step) -> bool:
        """Perform a step that steers the reply; False if it is a step that says something."""
        match step:
            case {"status": int()}:
                await self._answer_status(step)
            case {"stall": seconds}:
                await self._wire.flush()
                await (asyncio.Event().wait() if seconds is None else asyncio.sleep(seconds))
            case {"gate": str(name)}:
                await self._wire.flush()
                await self._gate(name).go_through()
            case {"cut": kind}:
                await self._wire.break_off()
                raise Cut(kind)
            case {"done": bool(flag)}:
                self._done = flag
            case {"split": piece}:
                self._wire.piece = piece
            case {"coalesce": _}:
                self._wire.coalesced = True
            case {"repeat": int(count), "steps": list(steps)}:
                await self._perform_rounds(count, steps, step.get("every_ms", 0))
            case {"forever": list(steps)}:
                await self._perform_rounds(None, steps, step.get("every_ms", 10))
            case {"note": _} | {"endpoint": _}:
                pass
            case _:
                return False
        return True

    async def _perform_output(self, step: Step) -> None:
        """Perform a step that puts something on the wire."""
        match step:
            case {"raw": str(content)}:
                await self._wire.send(content.encode())
            case {"junk": int(count)}:
                await self._wire.send((b"junk\xff\x00" * (count // 6 + 1))[:count])
            case {"chunk": dict(chunk)}:
                await self._emit(chunk)
            case {"error": body}:
                self._usage_due = False
                await self._emit({"error": self._with_key(body)})
            case {"usage": given}:
                self._usage_due = False
                if given is not None:
                    await self._emit(self._chunk_of_usage(given))
            case {"usage_in_finish": dict(given)}:
                self._usage_due = False
                self._finish_usage = {"usage": given}
            case {"finish": reason}:
                await self._emit(self._chunk_of({}, finish_reason=reason) | self._finish_usage)
            case {"delta": dict(delta)}:
                await self._emit(self._chunk_of(delta))
            case _:
                await self._say(step)

    async def _say(self, step: Step) -> None:
        """Send one delta made from a step, with the role if it is the first."""
        delta = self._role | _delta_of(step, self._round)
        self._role = {}
        self._written += sum(
            len(value.split()) for key, value in delta.items() if isinstance(value, str) and key != "role"
        )
        logprobs = {"logprobs": step["logprobs"]} if "logprobs" in step else {}
        await self._emit(self._chunk_of(delta, **logprobs))

    async def _perform_rounds(self, count: int | None, steps: Sequence[Step], every_ms: float) -> None:
        done, outer = 0, self._round
        while count is None or done < count:
            if done and every_ms:
                await self._wire.flush()
                await asyncio.sleep(every_ms / 1000)
            self._round = str(done)
            await self._perform_all(steps)
            done += 1
            await asyncio.sleep(0)  # A round without output must not keep the loop to itself.
        self._round = outer

    async def _answer_status(self, step: Step) -> None:
        code, times = step["status"], step.get("times")
        if times is not None and self._count(self._record, step) > times:
            return
        kind = "server_error" if code >= 500 else "invalid_request_error"
        shaped = {"error": {"message": f"scripted {code}", "type": kind, "param": None, "code": None}}
        await self._wire.whole(code, self._with_key(step.get("body", shaped)), step.get("headers"))
        raise Answered

    def _with_key(self, body: Any) -> Any:
        """A body with the caller's key in the places of `{key}`."""
        key = msgspec.json.encode(self._record.headers.get("authorization", ""))[1:-1]
        return msgspec.json.decode(msgspec.json.encode(body).replace(b"{key}", key))

    async def _emit(self, chunk: Mapping[str, Any]) -> None:
        if self._whole is not None:
            self._whole.add(chunk)
        else:
            await self._wire.send(b"data: %b\n\n" % msgspec.json.encode(chunk))

    def _chunk_of(self, delta: Mapping[str, Any], **beside: Any) -> dict[str, Any]:
        return {**self._base, "choices": [{"index": 0, "delta": delta, "finish_reason": None, **beside}]}

    def _chunk_of_usage(self, given: Mapping[str, Any]) -> dict[str, Any]:
        return {**self._base, "choices": [], "usage": given}

    def _computed_usage(self) -> dict[str, Any]:
        """Words as tokens: of all messages, and of the deltas that steps made."""
        asked = sum(len(text_of(message.get("content")).split()) for message in self._record.body["messages"])
        return usage_of(asked, self._written)


def _delta_of(step: Step, round: str) -> dict[str, Any]:
    """The delta of a step that says something."""
    match step:
        case {"text": str(content)}:
            return {"content": _filled(content, round)}
        case {"size": int(count)}:
            return {"content": "x" * count}
        case {"call": dict(given)}:
            function = {key: given[key] for key in ("name", "arguments") if key in given}
            beside = {key: given[key] for key in given if key not in function}
            return {"tool_calls": [beside | ({"function": function} if function else {})]}
    for key in ("reasoning_content", "reasoning", "refusal"):
        if key in step:
            return {key: _filled(step[key], round)}
    raise AssertionError(f"a step with wrong values: {step}")


def _filled(content: str, round: str) -> str:
    if round:
        content = content.replace("{i}", round)
    return content.replace("{t}", f"{time.monotonic():.6f}") if "{t}" in content else content
