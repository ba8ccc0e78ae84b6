"""A scripted Chat Completions upstream over real HTTP; the script travels in the request itself.

The last user message is the script: one JSON array of steps per line, one line per upstream turn. The turn asked for is
the number of assistant messages after that user message. So a test needs nothing but the server under test:

    client.responses.create(model="scripted", input=script(
        [call("get_weather", {"city": "Oslo"}), finish("tool_calls")],
        [text("Cold."), finish()],
    ))

A user message that is no script is answered with "ok: <text>" in words. Nothing is added to a script but the role (in
its first delta), the usage chunk (when the request asks for it) and the final [DONE]; a script without `finish` ends
without one, as some real servers do. The response head leaves with the first bytes of the body (`raw("")` sends it
alone).

Steps are JSON objects, built by text, reasoning, refusal, size, call, delta, chunk, raw, junk, finish, usage, no_usage,
usage_in_finish, error, status, stall, gate, cut, no_done, split, coalesce, repeat, forever, note, endpoint; whole turns by answer
and calling. Inside `repeat` and `forever`, "{i}" in a text stands for the number of the round, so that a lost or
doubled chunk is seen; "{t}" anywhere for the monotonic clock at that moment, in seconds; "{key}" in an error for the
authorization that the request came with.

`python -m tests.upstream --port N` serves other processes; there `POST /gates/<name>` opens a gate.
"""

from tests.upstream.reply import Recorded
from tests.upstream.script import (
    Step,
    answer,
    call,
    calling,
    chunk,
    coalesce,
    cut,
    delta,
    endpoint,
    error,
    finish,
    forever,
    gate,
    junk,
    no_done,
    no_usage,
    note,
    raw,
    reasoning,
    refusal,
    repeat,
    script,
    size,
    split,
    stall,
    status,
    text,
    usage,
    usage_in_finish,
    words,
)
from tests.upstream.server import Upstream

__all__ = [
    "Recorded",
    "Step",
    "Upstream",
    "answer",
    "call",
    "calling",
    "chunk",
    "coalesce",
    "cut",
    "delta",
    "endpoint",
    "error",
    "finish",
    "forever",
    "gate",
    "junk",
    "no_done",
    "no_usage",
    "note",
    "raw",
    "reasoning",
    "refusal",
    "repeat",
    "script",
    "size",
    "split",
    "stall",
    "status",
    "text",
    "usage",
    "usage_in_finish",
    "words",
]
