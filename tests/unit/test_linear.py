"""Whatever a client or an upstream sends, the work that it makes grows no faster than its size.

Each case builds its worst input of a size and gives the work on it. That is timed at two sizes, one eight times the other: linear
work takes eight times as long, quadratic work sixty-four times. A new function of the request path is one more line here.
"""

import asyncio
import gc
import json
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import msgspec
import pytest
from msgspec import Raw

from app.domain.approvals import was_asked
from app.domain.calls import hosted_call
from app.domain.citations import Sources, sources_of
from app.domain.compaction import Compacted, estimated_tokens, last_messages, seal_compacted
from app.domain.context import pair, proceed, resolve
from app.domain.dialect import Dialect
from app.domain.fold import Fold
from app.domain.hosted import HostedRoute
from app.domain.lifecycle import open_response
from app.domain.prompt import chat_request
from app.domain.prompt_templates import Prompt, fill_in
from app.domain.recovery import recover
from app.domain.think import ThinkSplitter, Where
from app.domain.token_count import completion, tokenize
from app.domain.tool_transcript import answer_for_model
from app.domain.toolbox import ByHost, open_toolbox
from app.domain.tools.answers import Answer, error_text
from app.domain.tools.file_search import queries_of
from app.domain.tools.mcp import Mcp
from app.domain.tools.server_tool import parse_arguments
from app.domain.tools.web_search import WebSearch
from app.domain.truncation import later_start, truncated
from app.domain.turn import Turn
from app.errors import ApiError
from app.outbound.upstream import LineBuffer
from app.runs.recorder import Recorder
from app.storage.backlog import pages_of, size_of
from app.wire.chat import Chunk
from app.wire.events import (
    AnnotationAdded,
    ArgumentsDelta,
    Event,
    ItemAdded,
    ItemDone,
    PartAdded,
    TextDelta,
    encode_event,
    split_frames,
)
from app.wire.items import CallError, FileSearchCall, McpApprovalRequest, McpCall, WebSearchCall
from app.wire.redaction import Redaction
from app.wire.requests import as_stored, decode_create
from app.wire.tools import decode_tool_choice, decode_tools
from tests.unit.build import (
    SEAL,
    assistant,
    call,
    chunk,
    counting,
    function,
    item,
    output,
    piece,
    request,
    toolbox,
    user,
)

Work = Callable[[], object]
Make = Callable[[int], Work]

GROWTH = 8
RATIO_MAX = 28.0
"""Less than half of what quadratic work takes. Linear work may take so long once its input no longer fits into the caches."""
LEAST_S = 0.004
"""The larger run of a case takes at least so long: less is not worth a comparison."""


def best_of(make: Make, size: int, times: int) -> float:
    """Seconds of CPU; what is built before is not counted."""
    took = []
    for _ in range(times):
        work = make(size)
        begun = time.process_time()
        work()
        took.append(time.process_time() - begun)
    return min(took)


def words(count: int, length: int = 8) -> list[str]:
    return [f"w{number:0{length}d}" for number in range(count)]


def refused(work: Work) -> Work:
    """Work that ends in a refusal."""

    def run() -> object:
        try:
            return work()
        except ApiError as error:
            return error

    return run


# -- Tools ------------------------------------------------------------------------------------------------------------------


def declared(tools: Iterable[dict[str, Any]], choice: Any = "auto", *, listed: Any = None) -> Work:
    decoded = decode_tools([Raw(msgspec.json.encode(tool)) for tool in tools])
    chosen = decode_tool_choice(Raw(msgspec.json.encode(choice)))
    return lambda: open_toolbox(decoded, [], chosen, listed=listed)


def listing(names: Sequence[str], label: str = "box") -> Any:
    tools = [{"name": name, "input_schema": {"type": "object"}} for name in names]
    return {label: item({"type": "mcp_list_tools", "id": "mcpl", "server_label": label, "tools": tools}).tools}


def server(label: str = "box", **fields: Any) -> dict[str, Any]:
    return {"type": "mcp", "server_label": label, "server_url": "http://a.example", **fields}


def namespace(name: str, *tools: str) -> dict[str, Any]:
    return {"type": "namespace", "name": name, "tools": [function(tool) for tool in tools]}


def clashing(n: int) -> Work:
    """Names that differ only in what a function's name may not hold."""
    return declared([server()], listed=listing([chr(0x4E00 + number) for number in range(n)]))


def chosen(n: int) -> Work:
    choice = {"type": "allowed_tools", "tools": [{"type": "mcp", "server_label": "box"}] * 128}
    return declared([server()], choice, listed=listing(words(n)))


TOOLS: dict[str, tuple[int, Make]] = {
    "functions": (500, lambda n: declared(function(name) for name in words(n))),
    "labels": (500, lambda n: declared(server(name) for name in words(n))),
    "namespaces": (500, lambda n: declared(namespace(name, "f") for name in words(n))),
    "inside a namespace": (500, lambda n: declared([namespace("a", *words(n))])),
    "clashing names": (400, clashing),
    "allowed names": (400, lambda n: declared([server(allowed_tools=words(n))], listed=listing(words(n)))),
    "names to approve": (
        400,
        lambda n: declared(
            [server(require_approval={"never": {"tool_names": words(n)}, "always": {"tool_names": words(n)}})],
            listed=listing(words(n)),
        ),
    ),
    "a chosen server": (300, chosen),
    "hosted tools": (1000, lambda n: declared([{"type": "tool_search"}] * n)),
    "tools decoded": (
        400,
        lambda n: partial(decode_tools, [Raw(msgspec.json.encode(function(name))) for name in words(n)]),
    ),
}

# -- Context and prompt -------------------------------------------------------------------------------------------------------


def resolved(items: list[dict[str, Any]], chain: Sequence[dict[str, Any]] = (), **body: Any) -> Work:
    asked, earlier = request(input=items, **body), [item(one) for one in chain]
    return lambda: resolve(asked, earlier, {}, counting(), seal=SEAL)


def prompted(items: list[dict[str, Any]], dialect: Dialect | None = None, **body: Any) -> Work:
    asked = request(input=items, **body)
    context = resolve(asked, [], {}, counting(), seal=SEAL)
    speaks = dialect or Dialect()
    return lambda: chat_request(asked, context, model="m", dialect=speaks, unseal=SEAL.open)


def shortened(items: list[dict[str, Any]]) -> Work:
    asked = request(input=items)
    context = resolve(asked, [], {}, counting(), seal=SEAL)
    return lambda: truncated(context, later_start(asked, context, 0, None) or 0)


def calls(n: int, *, one_id: bool = False, **more: Any) -> list[dict[str, Any]]:
    ids = ["c"] * n if one_id else words(n)
    return [call(id, name=name, **more) for id, name in zip(ids, words(n), strict=True)] + [output(id) for id in ids]


def referenced(n: int) -> Work:
    asked = request(input=[{"type": "item_reference", "id": name} for name in words(n)])
    stored = {name: item({**user("x"), "id": name}) for name in words(n)}
    return lambda: resolve(asked, [], stored, counting(), seal=SEAL)


def approved(n: int) -> Work:
    asks = [
        {"type": "mcp_approval_request", "id": name, "server_label": "box", "name": "f", "arguments": "{}"}
        for name in words(n)
    ]
    answers = [{"type": "mcp_approval_response", "approval_request_id": name, "approve": True} for name in words(n)]
    asked = request(input=[*asks, *answers], tools=[server()])
    requests = {one["id"]: item(one) for one in asks}
    return lambda: resolve(asked, [], {}, counting(), seal=SEAL, requests=requests)  # type: ignore[arg-type]


def grown(n: int) -> Work:
    asked = request(input="x")
    context = resolve(asked, [], {}, counting(), seal=SEAL)
    more = [item(one) for one in calls(n)]
    return lambda: proceed(context, asked, more)


def searched(n: int) -> list[dict[str, Any]]:
    results = [{"url": f"https://a.example/{name}", "title": name} for name in words(n)]
    return [{"type": "web_search_call", "id": "ws_1", "results": results}]


def cited(n: int) -> Work:
    sources = Sources({f"https://a.example/{name}": name for name in words(n)}, {})
    text = "see https://a.example/w0000x and [one](https://a.example/w00000001) " * n
    return lambda: sources.cited(text)


def nested_names(n: int) -> Work:
    sources = Sources({"a" * length: "" for length in range(1, 200)}, {})
    return lambda: sources.cited("a" * n)


def counted(n: int) -> Work:
    message = {"role": "user", "content": [{"type": "text", "text": "x"}] * 2}
    body = msgspec.json.encode({"model": "m", "messages": [message] * n, **dict.fromkeys(words(n))})
    return lambda: (tokenize(body), completion(body, max_tokens=1))


COMPACTION = {"type": "compaction", "encrypted_content": seal_compacted(Compacted("x"), SEAL)}
LACKING = Dialect(lacks=frozenset({"later_system_messages", "content_parts"}))
FITTED = Dialect(lacks=frozenset({"repeated_roles", "parallel_calls_in_history"}), call_id_format="nine_alphanumerics")
PART = {"type": "input_text", "text": "x"}

CONTEXT: dict[str, tuple[int, Make]] = {
    "messages": (500, lambda n: resolved([user("x")] * n)),
    "a long chain": (500, lambda n: resolved([user("x")], [{**user("x"), "id": name} for name in words(n)])),
    "calls of one id": (1000, lambda n: partial(pair, [item(one) for one in calls(n, one_id=True)])),
    "calls that nobody answers": (500, lambda n: refused(resolved(calls(n)[:-1]))),
    "compactions": (100, lambda n: resolved([user("x"), assistant("y"), COMPACTION] * n)),
    "calls that are answered after a compaction": (400, lambda n: prompted([*calls(n)[:n], COMPACTION, *calls(n)[n:]])),
    "calls before a compaction": (400, lambda n: prompted([*calls(n), COMPACTION])),
    "an estimate": (500, lambda n: partial(estimated_tokens, [item(one) for one in calls(n)])),
    "last messages": (500, lambda n: partial(last_messages, [item(user("x"))] * n, SEAL.open)),
    "references": (500, referenced),
    "approvals": (500, approved),
    "the next turn": (500, grown),
    "prompt of messages": (500, lambda n: prompted([user("x"), assistant("y")] * n)),
    "prompt of calls": (400, lambda n: prompted(calls(n), tools=[function(name) for name in words(n)])),
    "prompt of calls of one tool more": (400, lambda n: prompted(calls(n), tools=[namespace("a", *words(n))])),
    "prompt of parts": (500, lambda n: prompted([{"role": "user", "content": [PART] * n}], LACKING)),
    "prompt of system messages": (
        500,
        lambda n: prompted([{"role": "system", "content": "x"}, user("y")] * n, LACKING),
    ),
    "prompt of one role": (500, lambda n: prompted([{"role": "user", "content": [PART] * 2}, user("y")] * n, FITTED)),
    "prompt of calls one by one": (400, lambda n: prompted(calls(n), FITTED)),
    "a later start": (500, lambda n: shortened([user("x"), assistant("y"), *calls(2)] * n)),
    "a later start after calls of one turn": (500, lambda n: shortened([*calls(n), user("x")])),
    "a count": (1000, counted),
    "long arguments": (40_000, lambda n: prompted(calls(1, arguments=json.dumps({"a": '"\\' * n})))),
    "sources": (1000, lambda n: partial(sources_of, [item(one) for one in searched(n)] * 3)),
    "citations": (300, cited),
    "names inside names": (5_000, nested_names),
    "brackets": (10_000, lambda n: lambda: Sources({"a": "b"}, {}).cited("[" * n + "](a)" * n)),
}

# -- What the upstream says ---------------------------------------------------------------------------------------------------

FUNCTION = toolbox(function("f"))
THEIRS = open_toolbox(
    decode_tools([Raw(msgspec.json.encode(server(require_approval="never")))]), [], "auto", listed=listing(["f"])
)


def turned(chunks: Sequence[Chunk], toolbox: Any = FUNCTION) -> Work:
    def run() -> object:
        turn = Turn(toolbox, counting())
        for one in chunks:
            turn.feed(one)
        return turn.close()

    return run


def split(pieces: Sequence[str], where: Where = "start") -> Work:
    def run() -> object:
        splitter = ThinkSplitter(where)
        return [splitter.feed(one) for one in pieces], splitter.close()

    return run


def called(n: int, *, named: bool = False, followed: bool = False) -> list[Chunk]:
    """One call in pieces, perhaps named in each of them, perhaps with another call already begun behind it."""
    first = [chunk(tool_calls=[piece(0, "c0", "f", '{"a":"')])]
    second = [chunk(tool_calls=[piece(1, "c1", "f", "{")])] if followed else []
    pieces = [piece(0, None, "f" if named else None, "xxxxxxxx") for _ in range(n)]
    return [*first, *second, *(chunk(tool_calls=[one]) for one in pieces)]


def lines_of_pieces(n: int) -> Work:
    lines = LineBuffer(1 << 30)
    return lambda: [lines.feed(b"x") for _ in range(n)]


LOGPROBS = {"content": [{"token": "x", "logprob": 0.0}]}

SPOKEN: dict[str, tuple[int, Make]] = {
    "text": (1000, lambda n: turned([chunk(content="x")] * n)),
    "white space": (3000, lambda n: turned([chunk(content="    ")] * n)),
    "white space behind thoughts": (
        3000,
        lambda n: turned([chunk(content="<think>a</think>"), *[chunk(content="    ")] * n]),
    ),
    "white space that refuses": (3000, lambda n: turned([chunk(refusal="    ")] * n)),
    "probabilities of white space": (1000, lambda n: turned([chunk(content=" ", logprobs=LOGPROBS)] * n)),
    "many thoughts at once": (2000, lambda n: split(["<think>a</think>" * n])),
    "empty thoughts at once": (2000, lambda n: split(["<think></think>" * n])),
    "thoughts piece by piece": (1000, lambda n: split(list("<think>a</think> " * (n // 4)))),
    "thoughts anywhere": (1000, lambda n: split(["a <think>b</think> <thi"] * n, "anywhere")),
    "line breaks of thoughts": (2000, lambda n: split(["<think>", *["\n"] * n])),
    "beginnings of a tag": (2000, lambda n: split(["<think>", *["</thin"] * n])),
    "thoughts and text in turns": (
        500,
        lambda n: turned([chunk(reasoning_content="a"), chunk(content="b")] * n),
    ),
    "text and refusals in turns": (500, lambda n: turned([chunk(content="a"), chunk(refusal="b")] * n)),
    "a long name": (
        1000,
        lambda n: turned([chunk(tool_calls=[piece(0, "c", name)]) for name in ("a" * 50, "b" * 50)] * n),
    ),
    "arguments": (1000, lambda n: turned(called(n))),
    "arguments that another call follows": (1000, lambda n: turned(called(n, followed=True))),
    "arguments, each with a name": (
        1000,
        lambda n: turned([chunk(tool_calls=[piece(0, None, "f", '{"a":"x')]), *called(n, named=True)[1:]]),
    ),
    "arguments of our own call": (1000, lambda n: turned(called(n, followed=True), THEIRS)),
    "brackets as arguments": (
        4000,
        lambda n: turned([*called(1, followed=True), chunk(tool_calls=[piece(0, None, None, "[{" * n)])]),
    ),
    "calls at once": (
        500,
        lambda n: turned([chunk(tool_calls=[piece(at, f"c{at}", "f", "{}") for at in range(n)])]),
    ),
    "calls that stay open": (
        500,
        lambda n: turned([chunk(tool_calls=[piece(at, f"c{at}", "f", "{") for at in range(n)])], THEIRS),
    ),
    "lines of a stream": (
        4000,
        lambda n: partial(LineBuffer(1 << 30).feed, b"data: {}\n" * n),
    ),
    "pieces of a line": (8000, lines_of_pieces),
}

# -- What is recorded -----------------------------------------------------------------------------------------------------------

DONE = Raw(b'{"type":"message","id":"msg_1","role":"assistant","status":"completed","content":[]}')
MESSAGE = {"type": "message", "id": "msg_1", "role": "assistant", "content": [], "status": "in_progress"}
CALL = {"type": "function_call", "id": "fc_1", "call_id": "c", "name": "f", "arguments": ""}
AT: dict[str, Any] = {"item_id": "x", "output_index": 0}


def response() -> Any:
    return open_response(request(), id="resp_1", created_at=1)


def folded(n: int) -> Work:
    def run() -> object:
        fold = Fold(response())
        for number in range(n):
            fold.apply(ItemDone(output_index=number, item=DONE))
        return fold.response

    return run


def recorded(events: Sequence[Event]) -> Work:
    async def record() -> object:
        recorder = Recorder(response(), None, bytes_max=1 << 40, events_max=1 << 40)
        for event in events:
            await recorder.record([event])
        return recorder.response

    return lambda: asyncio.run(record())


def recovered(events: Sequence[Event]) -> Work:
    entries = []
    for number, event in enumerate(events):
        event.sequence_number = number
        entries.append(encode_event(event))
    return lambda: recover(entries)


def paged(n: int) -> Work:
    entries = [encode_event(ItemDone(output_index=0, item=DONE))] * n
    return lambda: list(pages_of(entries, size_of(entries), page_bytes=1))


TEXT_PART = {"type": "output_text", "text": "", "annotations": []}
OPENED = [ItemAdded(output_index=0, item=MESSAGE), PartAdded(**AT, part=TEXT_PART)]

RECORDED: dict[str, tuple[int, Make]] = {
    "items": (3000, folded),
    "items recorded": (3000, lambda n: recorded([ItemDone(output_index=at, item=DONE) for at in range(n)])),
    "items recovered": (1000, lambda n: recovered([ItemDone(output_index=at, item=DONE) for at in range(n)])),
    "open items recovered": (500, lambda n: recovered([ItemAdded(output_index=at, item=CALL) for at in range(n)])),
    "text recovered": (4000, lambda n: recovered([*OPENED, *(TextDelta(**AT, delta="x" * 40) for _ in range(n))])),
    "arguments recovered": (
        4000,
        lambda n: recovered(
            [ItemAdded(output_index=0, item=CALL), *(ArgumentsDelta(**AT, delta="x" * 40) for _ in range(n))]
        ),
    ),
    "annotations recovered": (
        1000,
        lambda n: recovered([*OPENED, *(AnnotationAdded(**AT, annotation_index=i, annotation={}) for i in range(n))]),
    ),
    "frames": (
        1000,
        lambda n: partial(split_frames, encode_event(ItemDone(output_index=0, item=DONE)).frame * n),
    ),
    "pages": (4000, paged),
    "items shown": (
        500,
        lambda n: partial(Redaction(()).output, [Raw(msgspec.json.encode(item(one))) for one in searched(3) * n]),
    ),
}

# -- What is read -------------------------------------------------------------------------------------------------------------

ROUTE = HostedRoute(server="s", tool="t", fields={"url": "link"})


def approval(arguments: str) -> McpApprovalRequest:
    return McpApprovalRequest(id="mcpr_1", server_label="box", name="f", arguments=arguments)


def body(**fields: Any) -> Work:
    raw = json.dumps({"model": "m", "input": "x", **fields}).encode()
    return refused(lambda: decode_create(raw, frozenset({"top_k"})))


def raw_body(raw: bytes) -> Work:
    return refused(lambda: decode_create(raw, frozenset({"top_k"})))


def templated(template: str, variables: dict[str, str]) -> Work:
    entry = {
        "versions": {
            "1": {"instructions": template, "variables": {"v": "string", **dict.fromkeys(variables, "string")}}
        }
    }
    fill = partial(fill_in, prompts={"p": msgspec.convert(entry, Prompt)}, bytes_max=1 << 30)
    raw = msgspec.json.encode({"model": "m", "prompt": {"id": "p", "variables": {"v": "x", **variables}}})
    return lambda: decode_create(raw, (), fill)


def without(n: int) -> Work:
    fields = {"model": "m", "input": "x", "tools": [server(name, authorization="x") for name in words(n)]}
    raw = msgspec.json.encode(fields)
    asked = decode_create(raw, frozenset())
    return lambda: as_stored(raw, asked)


def ran(n: int) -> Work:
    arguments = json.dumps({"commands": words(n)})
    return lambda: hosted_call(counting(), ByHost("shell", {}), ROUTE, arguments, "c").open(0)


READ: dict[str, tuple[int, Make]] = {
    "input items": (500, lambda n: body(input=[user("x")] * n)),
    "input parts": (2000, lambda n: body(input=[{"role": "user", "content": [PART] * n}])),
    "annotations": (
        4000,
        lambda n: body(input=[assistant("x", content=[{"type": "output_text", "text": "", "annotations": [{}] * n}])]),
    ),
    "unknown keys": (2000, lambda n: body(**dict.fromkeys(words(n), 1))),
    "input objects": (2000, lambda n: body(input=[{}] * n)),
    "half surrogates": (4000, lambda n: raw_body(b'{"model": "m", "input": "' + b"\\ud83d" * n + b'"}')),
    "backslashes": (4000, lambda n: raw_body(b'{"model": "m", "input": "\\ud83d' + b"\\\\" * n + b'"}')),
    "brackets opened": (4000, lambda n: raw_body(b"[" * n)),
    "brackets": (4000, lambda n: raw_body(b'{"model": "m", "input": [' + b"[]," * n + b"[]]}")),
    "quotes that nobody closes": (4000, lambda n: raw_body(b'{"model": "' + b'[\\"{' * n)),
    "letters beyond ASCII": (
        40_000,
        lambda n: raw_body(b'{"model": "m", "input": "' + "ä".encode() * n + b'"}'),
    ),
    "secrets taken out": (500, without),
    "variables": (2000, lambda n: templated("{{v}}", dict.fromkeys(words(n), "x"))),
    "a value that looks like variables": (4000, lambda n: templated("{{v}}", {"v": "{{v}}" * n})),
    "a variable that stands often": (4000, lambda n: templated("{{v}}" * n, {"v": "x"})),
    "braces": (40_000, lambda n: templated("{{ " * n, {})),
    "a long wrong value": (40_000, lambda n: body(truncation=" - at `$" * n)),
    "a wrong value among many": (4000, lambda n: body(metadata={**dict.fromkeys(words(n), "x"), "z": 1})),
    "a key that looks like a path": (40_000, lambda n: body(metadata={" - at `$.a" * n: 1})),
    "arguments": (8000, lambda n: partial(parse_arguments, json.dumps({"a": ["{["] * n}))),
    "brackets as arguments": (8000, lambda n: lambda: parse_arguments("[{" * n)),
    "queries": (4000, lambda n: lambda: queries_of({"queries": ["x"] * n})),
    "results": (1000, lambda n: partial(WebSearch().results, Answer(structured={"web": [{"link": "x"}] * n}), ROUTE)),
    "results read": (
        2000,
        lambda n: partial(answer_for_model, FileSearchCall(results=[{"filename": "x", "text": "y"}] * n)),
    ),
    "results of a search": (
        2000,
        lambda n: partial(WebSearch().close, WebSearchCall(), 0, Answer(structured=[{"link": "x"}] * n), ROUTE),
    ),
    "an error's parts": (
        2000,
        lambda n: lambda: error_text(CallError(type="x", content=[{"type": "text", "text": "y"}] * n)),
    ),
    "an answer": (
        400_000,
        lambda n: partial(Mcp().close, McpCall(server_label="a", name="f", arguments="{}"), 0, Answer("x" * n), None),
    ),
    "commands": (1000, ran),
    "sealed": (100_000, lambda n: lambda: SEAL.open(SEAL.close("x" * n))),
    "a request that was asked": (
        4000,
        lambda n: partial(was_asked, SEAL, approval(json.dumps(dict.fromkeys(words(n), 1.0)))),
    ),
}

CASES = {
    f"{group}: {name}": case
    for group, cases in {
        "tools": TOOLS,
        "context": CONTEXT,
        "upstream": SPOKEN,
        "record": RECORDED,
        "wire": READ,
    }.items()
    for name, case in cases.items()
}


@pytest.mark.parametrize("name", CASES)
def test_work_grows_no_faster_than_its_input(name: str):
    size, make = CASES[name]
    gc.disable()
    try:
        while (large := best_of(make, size * GROWTH, 1)) < LEAST_S:
            size *= 2
        ratio = large / best_of(make, size, 3)
        if ratio > RATIO_MAX:  # the machine may have been busy with something else
            ratio = best_of(make, size * GROWTH, 3) / best_of(make, size, 5)
    finally:
        gc.enable()
    assert ratio < RATIO_MAX, f"at {size} and {size * GROWTH}: {ratio:.0f} times the work"
