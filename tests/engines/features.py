"""What a client may ask of Reprise, each asked of it in front of a real engine: the functions of ALL, in the table's order.

A feature that works returns. One that the engine refuses raises the client's own error, with the engine's words in it; one that the
engine takes and does not carry out raises Differs. Anything else that is raised is a fault of ours. The weights are random: where an
answer must be long, or be a call or a thought, the request biases a token.
"""

import base64
import itertools
import json
import struct
import time
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import openai
from openai.types.responses import Response, ResponseFunctionToolCall

from tests.api.streams import streamed
from tests.engines import CONTEXT_TOKENS, MODEL
from tests.engines.servers import Engine
from tests.servers import Served

BIAS = 100.0
"""Added to a token's logit: it comes for certain."""
SEED = 7
ENDED = {"completed", "failed", "cancelled", "incomplete"}
WAIT_S = 60.0
TURNS_MAX = 3
"""Of the server's."""
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}},
    "required": ["city"],
    "additionalProperties": False,
}
ECHO = {"type": "function", "name": "echo", "description": "Echoes a city.", "parameters": CITY, "strict": True}


class Differs(Exception):
    """The engine took the request and did something else."""


Bias = Mapping[str, float]
"""By the names of `Engine.tokens`."""
NONE: Mapping[str, Any] = {}
NO_THOUGHT = {"chat_template_kwargs": {"enable_thinking": False}}
"""llama-server has models think that can."""


@dataclass(frozen=True)
class Setup:
    """A server of ours in front of an engine."""

    engine: Engine
    server: Served
    client: openai.OpenAI
    tools_url: str
    """An MCP server with the tool `echo`."""

    def create(self, said: Any = "Tell me of the sea.", *, bias: Bias = NONE, **options: Any) -> Response:
        """A create with a seed; engine parameters in `extra_body`."""
        return self.client.responses.create(model=MODEL, input=said, **self.options(bias, **options))

    def options(self, bias: Bias = NONE, *, extra_body: Mapping[str, Any] = NONE, **options: Any) -> dict[str, Any]:
        """The options of a create."""
        named = {self.engine.tokens[name]: value for name, value in bias.items()}
        extra = {"seed": SEED, **NO_THOUGHT, **({"logit_bias": named} if named else {}), **extra_body}
        return {"max_output_tokens": 200, **options, "extra_body": extra}

    def streamed(self, said: Any, *, bias: Bias = NONE, **options: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """A stream's events, and the response that they fold into, which is the stored one."""
        whole = self.options(bias, **options)
        events, made = streamed(self.server, model=MODEL, input=said, **whole.pop("extra_body"), **whole)
        stored = self.client.responses.retrieve(made["id"]).to_dict()
        assert [item["id"] for item in stored["output"]] == [item["id"] for item in made["output"]]
        return events, made

    def ended(self, response_id: str) -> Response:
        """A background response, once it has ended."""
        deadline = time.monotonic() + WAIT_S
        while (found := self.client.responses.retrieve(response_id)).status not in ENDED:
            assert time.monotonic() < deadline, f"still {found.status}"
            time.sleep(0.05)
        return found


Feature = Callable[[Setup], None]
ALL: dict[str, Feature] = {}
"""Label → function, in the order in which they stand here."""

ENDLESS = {"end": -BIAS}
CALL = {"call": BIAS}
"""One call, and the end."""
CALLS = {"call": BIAS, "end": -2 * BIAS}
"""Calls until the limit."""
CALL_START = {"call_start": BIAS}
THOUGHT: dict[str, Any] = {
    "bias": {"thought": BIAS},
    "extra_body": {"chat_template_kwargs": {"enable_thinking": True}},
}
"""A thought, which the template begins, and an answer."""


def feature(label: str) -> Callable[[Feature], Feature]:
    """Gives a function its line in the table."""

    def enter(function: Feature) -> Feature:
        ALL[label] = function
        return function

    return enter


@feature("models are listed")
def models(setup: Setup) -> None:
    assert MODEL in [model.id for model in setup.client.models.list()]
    assert setup.client.models.retrieve(MODEL).id == MODEL


@feature("create")
def create(setup: Setup) -> None:
    made = setup.create()
    assert made.status == "completed"
    assert made.output_text
    assert setup.client.responses.retrieve(made.id).output == made.output


@feature("stream")
def stream(setup: Setup) -> None:
    events, made = setup.streamed("Tell me of the sea.")
    deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    assert len(deltas) > 1
    stored = setup.client.responses.retrieve(made["id"])
    assert stored.output_text == "".join(deltas)


@feature("usage")
def usage(setup: Setup) -> None:
    counted = setup.create().usage
    assert counted is not None
    assert counted.input_tokens > 0
    assert counted.output_tokens > 0
    assert counted.total_tokens == counted.input_tokens + counted.output_tokens


@feature("`input_tokens` counts what a create uses")
def counted(setup: Setup) -> None:
    given: dict[str, Any] = {"instructions": "Be brief.", "tools": [ECHO], "extra_body": NO_THOUGHT}
    first = setup.create()
    found = setup.client.responses.input_tokens.count(
        model=MODEL, input="And then?", previous_response_id=first.id, **given
    )
    used = _input_tokens(setup.create("And then?", previous_response_id=first.id, **given))
    if found.input_tokens != used:
        raise Differs(f"{found.input_tokens} are counted, {used} are used")


@feature("usage: cached tokens")
def cached(setup: Setup) -> None:
    first = setup.create("A long beginning that stays the same. " * 10)
    again = setup.create("And on.", previous_response_id=first.id)
    assert again.usage is not None
    if not again.usage.input_tokens_details.cached_tokens:
        raise Differs("none are reported")


@feature("`max_output_tokens` ends as `incomplete`")
def limit(setup: Setup) -> None:
    made = setup.create(bias=ENDLESS, max_output_tokens=16)
    assert made.status == "incomplete"
    assert made.incomplete_details is not None
    assert made.incomplete_details.reason == "max_output_tokens"
    assert made.usage is not None
    assert made.usage.output_tokens == 16


@feature("`instructions`")
def instructions(setup: Setup) -> None:
    without, instructed = setup.create(), setup.create(instructions="Answer in the words of a sailor.")
    assert _input_tokens(instructed) > _input_tokens(without)


@feature("`previous_response_id`")
def chain(setup: Setup) -> None:
    first = setup.create()
    second = setup.create("And then?", previous_response_id=first.id)
    assert _input_tokens(second) > _input_tokens(first) + first.usage.output_tokens  # type: ignore[union-attr]


@feature("a system message later in the input")
def later_system(setup: Setup) -> None:
    made = setup.create(
        [
            {"role": "user", "content": "Hello."},
            {"role": "assistant", "content": "Hello!"},
            {"role": "developer", "content": "Be brief from now on."},
            {"role": "user", "content": "And now?"},
        ]
    )
    assert made.status == "completed"


@feature("`temperature: 0` says the same twice")
def greedy(setup: Setup) -> None:
    texts = {setup.create(bias=ENDLESS, temperature=0, max_output_tokens=20).output_text for _ in range(2)}
    assert len(texts) == 1
    assert texts != {""}


@feature("`top_p`, `presence_penalty`, `frequency_penalty` are taken")
def sampling(setup: Setup) -> None:
    setup.create(top_p=0.5, extra_body={"presence_penalty": 0.5, "frequency_penalty": 0.5})


@feature("engine's own: `seed`")
def seed(setup: Setup) -> None:
    texts = [
        setup.create(bias=ENDLESS, max_output_tokens=20, extra_body={"seed": number}).output_text
        for number in (1, 1, 2)
    ]
    if texts[0] != texts[1] or texts[1] == texts[2]:
        raise Differs("the same seed does not give the same answer")


@feature("engine's own: `logit_bias`")
def logit_bias(setup: Setup) -> None:
    assert setup.create(bias={"end": BIAS}).usage.output_tokens <= 1  # type: ignore[union-attr]


@feature("engine's own: `stop`")
def stop(setup: Setup) -> None:
    made = setup.create(bias=ENDLESS, max_output_tokens=200, extra_body={"stop": ["a"]})
    assert made.status == "completed"


@feature("engine's own: `top_k`")
def top_k(setup: Setup) -> None:
    texts = {
        setup.create(bias=ENDLESS, max_output_tokens=20, extra_body={"top_k": 1, "seed": number}).output_text
        for number in (1, 2)
    }
    if len(texts) > 1:
        raise Differs("answers differ")


@feature("engine's own: `chat_template_kwargs`")
def template(setup: Setup) -> None:
    thinking = setup.create(max_output_tokens=16, extra_body={"chat_template_kwargs": {"enable_thinking": True}})
    assert _input_tokens(thinking) > _input_tokens(setup.create())


@feature("engine's own: `grammar`")
def grammar(setup: Setup) -> None:
    made = setup.create(extra_body={"grammar": 'root ::= "blåbær 日本 🫐"'})
    assert made.output_text == "blåbær 日本 🫐"


@feature("`text.format: json_schema`")
def json_schema(setup: Setup) -> None:
    made = setup.create(text={"format": {"type": "json_schema", "name": "place", "schema": CITY, "strict": True}})
    assert list(_json(made)) == ["city"]


@feature("`text.format: json_object`")
def json_object(setup: Setup) -> None:
    made = setup.create(text={"format": {"type": "json_object"}}, max_output_tokens=500)
    assert isinstance(_json(made), dict)


@feature("`top_logprobs`")
def logprobs(setup: Setup) -> None:
    made = setup.create(bias=ENDLESS, include=["message.output_text.logprobs"], top_logprobs=2, max_output_tokens=16)
    said = [part for item in made.output if item.type == "message" for part in item.content]
    found = [one for part in said if part.type == "output_text" for one in part.logprobs or ()]
    if not found:
        raise Differs("no logprobs come")
    assert "".join(one.token for one in found) == made.output_text
    assert {len(one.top_logprobs) for one in found} == {2}


@feature("function call, and its output in the next turn")
def call(setup: Setup) -> None:
    made = setup.create(bias=CALL, tools=[ECHO])
    calls = _calls(made)
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [("echo", {"city": "Oslo"})]
    outputs = [{"type": "function_call_output", "call_id": calls[0].call_id, "output": "Rain."}]
    answer = setup.create(outputs, previous_response_id=made.id, tools=[ECHO])
    assert answer.output_text


@feature("function call, streamed")
def call_streamed(setup: Setup) -> None:
    events, made = setup.streamed("Oslo?", bias=CALL, tools=[ECHO])
    assert any(event["type"] == "response.function_call_arguments.done" for event in events)
    assert [item["type"] for item in made["output"]] == ["function_call"]


@feature("parallel function calls")
def parallel(setup: Setup) -> None:
    made = setup.create(bias=CALLS, tools=[ECHO], max_output_tokens=16)
    calls = _calls(made)
    assert len({call.call_id for call in calls}) == len(calls) > 1
    outputs = [{"type": "function_call_output", "call_id": call.call_id, "output": "Rain."} for call in calls]
    assert setup.create(outputs, previous_response_id=made.id, tools=[ECHO]).output_text


@feature("`parallel_tool_calls: false`")
def one_call(setup: Setup) -> None:
    made = setup.create(bias=CALLS, tools=[ECHO], max_output_tokens=16, parallel_tool_calls=False)
    if len(_calls(made)) > 1:
        raise Differs("several come")


@feature("`tool_choice: required`")
def required(setup: Setup) -> None:
    _demand(setup, "required", [ECHO])


@feature("`tool_choice`: a function")
def named(setup: Setup) -> None:
    for name in ("echo", "find_out"):  # the model likes one of them better
        _demand(setup, {"type": "function", "name": name}, [ECHO, {**ECHO, "name": "find_out"}], name)


@feature("`tool_choice: none`")
def none(setup: Setup) -> None:
    made = setup.create(bias=CALL, tools=[ECHO], tool_choice="none")
    if _calls(made):
        raise Differs("a call comes")


@feature("custom tool")
def custom(setup: Setup) -> None:
    tool = {"type": "custom", "name": "note", "description": "Takes a note."}
    made = setup.create(bias=CALL_START, tools=[tool], tool_choice="required", max_output_tokens=400)
    if [item.type for item in made.output] != ["custom_tool_call"]:
        raise Differs("no call comes")


@feature("MCP tool, called by Reprise")
def mcp(setup: Setup) -> None:
    tools = [{"type": "mcp", "server_label": "tools", "server_url": setup.tools_url, "require_approval": "never"}]
    made = setup.create(bias=CALL, tools=tools)
    assert made.incomplete_details is not None  # the bias makes every turn a call
    assert made.incomplete_details.reason == "max_turns"
    outputs = [json.loads(item.output or "") for item in made.output if item.type == "mcp_call"]
    assert outputs == [{"city": "Oslo"}] * (TURNS_MAX - 1)


@feature("reasoning is an item of its own")
def reasoning(setup: Setup) -> None:
    made = setup.create("Think.", **THOUGHT)
    types = [item.type for item in made.output]
    assert types == ["reasoning", "message"], types
    assert made.output[0].content  # type: ignore[union-attr]


@feature("reasoning, streamed")
def reasoning_streamed(setup: Setup) -> None:
    events, made = setup.streamed("Think.", **THOUGHT)
    assert any(event["type"] == "response.reasoning_text.delta" for event in events)
    assert [item["type"] for item in made["output"]] == ["reasoning", "message"]


@feature("reasoning goes back to the model")
def reasoning_back(setup: Setup) -> None:
    thought = setup.create("Think.", **THOUGHT)
    assert [item.type for item in thought.output] == ["reasoning", "message"]
    again = [{"role": "user", "content": "Think."}, *(item.to_dict() for item in thought.output)]
    more = {"role": "user", "content": "And so?"}
    without = [item for item in again if item.get("type") != "reasoning"]
    if _input_tokens(setup.create([*again, more])) <= _input_tokens(setup.create([*without, more])):
        raise Differs("the model does not see it")


@feature("background: polled")
def background(setup: Setup) -> None:
    made = setup.ended(setup.create(background=True).id)
    assert made.status == "completed"
    assert made.output_text


@feature("background: a broken stream is resumed")
def resume(setup: Setup) -> None:
    options = setup.options(ENDLESS, max_output_tokens=100)
    seen = []
    with setup.client.responses.create(model=MODEL, input="Go on.", background=True, stream=True, **options) as events:
        for event in events:
            seen.append(event)
            if event.type == "response.output_text.delta":
                break
    run = seen[0].response.id  # type: ignore[union-attr]
    seen += setup.client.responses.retrieve(run, stream=True, starting_after=seen[-1].sequence_number)
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    deltas = "".join(event.delta for event in seen if event.type == "response.output_text.delta")
    assert deltas == setup.client.responses.retrieve(run).output_text


@feature("background: cancelled in mid-stream")
def cancel(setup: Setup) -> None:
    options = setup.options(ENDLESS, max_output_tokens=CONTEXT_TOKENS - 500)
    events = setup.client.responses.create(model=MODEL, input="Go on.", background=True, stream=True, **options)
    run = next(iter(events)).response.id  # type: ignore[union-attr]
    next(event for event in events if event.type == "response.output_text.delta")
    setup.client.responses.cancel(run)
    *_, last = events
    assert last.type == "response.cancelled" or last.response.status == "cancelled", last.type  # type: ignore[union-attr]
    stored = setup.client.responses.retrieve(run)
    assert stored.status == "cancelled"
    assert stored.output_text


@feature("a client that leaves frees the engine")
def leave(setup: Setup) -> None:
    options = setup.options(ENDLESS, max_output_tokens=CONTEXT_TOKENS - 500)
    for _ in range(3):
        with setup.client.responses.create(model=MODEL, input="Go on.", stream=True, **options) as events:
            next(event for event in events if event.type == "response.output_text.delta")
    begun = time.monotonic()
    setup.create(bias=ENDLESS, max_output_tokens=16)
    whole = time.monotonic()
    setup.create(bias=ENDLESS, max_output_tokens=16)
    assert whole - begun < 10 * (time.monotonic() - whole) + 2, "the engine continues for clients that disconnected"


@feature("eight at once")
def together(setup: Setup) -> None:
    with ThreadPoolExecutor(8) as clients:
        made = list(
            clients.map(lambda number: setup.create(f"Number {number}.", bias=ENDLESS, max_output_tokens=16), range(8))
        )
    assert {one.status for one in made} == {"incomplete"}


@feature("a context that is too long is `context_length_exceeded`")
def overflow(setup: Setup) -> None:
    assert _refusal(lambda: setup.create(_long(), max_output_tokens=16)).code == "context_length_exceeded"


@feature("`truncation: auto` makes it fit")
def truncation(setup: Setup) -> None:
    turns = [
        {"role": role, "content": _long(share=8)} for _, role in zip(range(17), itertools.cycle(["user", "assistant"]))
    ]
    made = setup.create(turns, truncation="auto", max_output_tokens=16)
    if _input_tokens(made) > CONTEXT_TOKENS:
        raise Differs(f"{_input_tokens(made)} tokens go into a window of {CONTEXT_TOKENS}")


@feature("an image is refused with a 400")
def image(setup: Setup) -> None:
    parts = [{"type": "input_text", "text": "What is this?"}, {"type": "input_image", "image_url": _png()}]
    assert "image" in _refusal(lambda: setup.create([{"role": "user", "content": parts}])).message.lower()


@feature("a model that it lacks is `model_not_found`")
def unknown_model(setup: Setup) -> None:
    try:
        setup.client.responses.create(model="nobody-has-this", input="Hello.")
    except openai.APIStatusError as error:
        if error.code != "model_not_found":
            raise
    else:
        raise Differs("any name is answered")


@feature("an unknown parameter is a 400 with its name")
def unknown_parameter(setup: Setup) -> None:
    assert _refusal(lambda: setup.create(extra_body={"no_such_thing": 1})).param == "no_such_thing"


@feature("a value that the engine refuses is a 400, streamed too")
def refused_value(setup: Setup) -> None:
    for in_stream in (False, True):
        try:
            refusal = _refusal(lambda: setup.create(stream=in_stream, extra_body={"seed": "no seed"}))  # noqa: B023
        except openai.InternalServerError as error:
            raise Differs(error.message.partition(" - ")[2]) from None
        assert refusal.type == "invalid_request_error"


def _refusal(create: Callable[[], object]) -> openai.BadRequestError:
    try:
        create()
    except openai.BadRequestError as error:
        return error
    raise Differs("it is answered")


def _input_tokens(made: Response) -> int:
    assert made.usage is not None
    return made.usage.input_tokens


def _json(made: Response) -> Any:
    try:
        return json.loads(made.output_text)
    except ValueError:
        raise Differs("the answer is no JSON") from None


def _calls(made: Response) -> list[ResponseFunctionToolCall]:
    """The calls that are whole."""
    return [item for item in made.output if item.type == "function_call" and item.status == "completed"]


def _demand(setup: Setup, choice: Any, tools: list[Any], name: str = "echo") -> None:
    """A model begins a call, whose rest only a grammar can make right; one or two have room."""
    made = setup.create(bias=CALL_START, tools=tools, tool_choice=choice, max_output_tokens=100)
    calls = _calls(made)
    if not calls:
        raise Differs("no call comes")
    if {call.name for call in calls} != {name}:
        raise Differs("another function is called")
    assert all(list(json.loads(call.arguments)) == ["city"] for call in calls)


def _long(*, share: int = 1) -> str:
    """Some two windows of text, or a share of it."""
    return "far out at sea " * (CONTEXT_TOKENS // 4 // share)


def _png() -> str:
    """One white pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b"\0\xff\xff\xff"))
        + chunk(b"IEND", b"")
    )
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
