"""What unit tests are made from: requests, ids that count, chunks, events as a client hears them."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from app.domain.context import Context, resolve
from app.domain.fold import Fold
from app.domain.lifecycle import Outcome, close_response, open_response
from app.domain.sealed import KEY_BYTES, Seal
from app.domain.toolbox import Toolbox, open_toolbox
from app.domain.turn import Turn
from app.ids import NewId
from app.wire.chat import Chunk, decode_chunk
from app.wire.events import TERMINAL, Created, Event, InProgress, encode_event
from app.wire.items import AnyItem, decode_item, encode_item
from app.wire.requests import CreateResponse, decode_create
from app.wire.tools import decode_tool_choice, decode_tools
from tests.replay import replay

ECHO: dict[str, Any] = {
    "object": "response",
    "background": False,
    "error": None,
    "incomplete_details": None,
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "model": "m",
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "conversation": None,
    "prompt_cache_key": None,
    "reasoning": {"effort": None, "summary": None},
    "safety_identifier": None,
    "service_tier": "default",
    "store": True,
    "temperature": 1.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "truncation": "disabled",
    "user": None,
    "metadata": {},
}
"""What a response to nothing but model and input says of its request."""


SEAL = Seal(bytes(KEY_BYTES)).of("tenant")


def counting() -> NewId:
    """Ids that count: msg_1, fc_2 and so on."""
    numbers = itertools.count(1)
    return lambda prefix: f"{prefix}_{next(numbers)}"


def request(**body: Any) -> CreateResponse:
    """A decoded create request."""
    return decode_create(msgspec.json.encode({"model": "m", "input": "hi", **body}), frozenset({"top_k"}))


def item(fields: dict[str, Any]) -> AnyItem:
    """A decoded item."""
    return decode_item(msgspec.json.encode(fields), "input[0]")


def plain(one: Any) -> Any:
    """Any Struct as JSON says it."""
    return msgspec.json.decode(msgspec.json.encode(one))


def plain_item(one: AnyItem) -> dict[str, Any]:
    """An item as JSON says it."""
    fields: dict[str, Any] = msgspec.json.decode(encode_item(one))
    return fields


def context(
    *given: dict[str, Any], chain: Sequence[dict[str, Any]] = (), referenced: dict[str, Any] | None = None, **body: Any
) -> Context:
    """A resolved context of these input items after a chain's."""
    return resolve(
        request(input=list(given), **body),
        [item(one) for one in chain],
        {id: item(one) for id, one in (referenced or {}).items()},
        counting(),
        seal=SEAL,
    )


def toolbox(*tools: dict[str, Any], choice: Any = "auto") -> Toolbox:
    """The toolbox of these declarations."""
    declared = decode_tools([msgspec.Raw(msgspec.json.encode(tool)) for tool in tools])
    return open_toolbox(declared, [], decode_tool_choice(msgspec.Raw(msgspec.json.encode(choice))))


def function(name: str, **more: Any) -> dict[str, Any]:
    """A function's declaration."""
    return {"type": "function", "name": name, **more}


def user(text: str) -> dict[str, Any]:
    """A user message."""
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    """An earlier answer of the model."""
    return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}], **more}


def call(call_id: str, name: str = "f", arguments: str = "{}", **more: Any) -> dict[str, Any]:
    """A function call."""
    return {"type": "function_call", "call_id": call_id, "name": name, "arguments": arguments, **more}


def output(call_id: str, said: Any = "done", **more: Any) -> dict[str, Any]:
    """A function call's output."""
    return {"type": "function_call_output", "call_id": call_id, "output": said, **more}


def chunk(finish: str | None = None, logprobs: Any = None, **delta: Any) -> Chunk:
    """A chunk with one choice, as it is decoded from the wire."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
    return decode_chunk(msgspec.json.encode({"choices": [choice]}))


def piece(
    index: int | None = 0, id: str | None = None, name: str | None = None, arguments: Any = None
) -> dict[str, Any]:
    """One element of `tool_calls`."""
    inner = {key: value for key, value in {"name": name, "arguments": arguments}.items() if value is not None}
    fields = {"index": index, "id": id, "function": inner or None}
    return {key: value for key, value in fields.items() if value is not None}


def said(turn: Turn, chunks: Iterable[Chunk], status: Any = "completed") -> list[Event]:
    """Every event of a turn."""
    events = [event for one in chunks for event in turn.feed(one)]
    return events + turn.close(status)


def heard(events: Iterable[Event]) -> list[dict[str, Any]]:
    """Events of a turn as a client hears them: between the response's first and last, numbered and encoded."""
    response = open_response(request(), id="resp_1", created_at=1)
    numbered: list[dict[str, Any]] = []
    fold = Fold(response)

    def say(event: Event) -> None:
        event.sequence_number = len(numbered)
        numbered.append(msgspec.json.decode(encode_event(event).body))
        fold.apply(event)

    for event in (Created(response=response), InProgress(response=response), *events):
        say(event)
    closed = close_response(fold.response, Outcome("completed"), usage=None, now=2)
    say(TERMINAL["completed"](response=closed))
    return numbered


def made(turn: Turn, chunks: Iterable[Chunk], status: Any = "completed") -> list[dict[str, Any]]:
    """The output items of a turn, put together by the oracle, which also checks every event."""
    items: list[dict[str, Any]] = replay(heard(said(turn, chunks, status)))["output"]
    return items


def deltas(events: Iterable[Event], kind: str) -> list[str]:
    """The deltas of one kind, in order."""
    decoded = [plain(event) for event in events]
    return [event["delta"] for event in decoded if event["type"] == f"response.{kind}.delta"]
