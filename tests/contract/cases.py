"""Scripted cases: what an upstream says, in every dialect, and what becomes of it.

A case is a request body, a script, and an outline of the output items; `outline` makes such a line from an item.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tests.upstream import (
    Step,
    answer,
    call,
    calling,
    chunk,
    cut,
    delta,
    error,
    finish,
    junk,
    no_done,
    no_usage,
    raw,
    reasoning,
    refusal,
    script,
    stall,
    status,
    text,
    usage,
    usage_in_finish,
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One scripted case."""

    turns: Sequence[Sequence[Step]]
    made: Sequence[str]
    """The outline of the output."""
    ends: str = "completed"
    """The status, and after a colon the reason or the error's code."""
    body: Mapping[str, Any] = field(default_factory=dict)
    before: Sequence[Mapping[str, Any]] = ()
    """Items in front of the script."""
    after: Sequence[Mapping[str, Any]] = ()
    """Items that follow it."""
    used: tuple[int, ...] | None = None
    """Input and output tokens, where the script says them; none of them where it says that there are none."""

    @property
    def request(self) -> dict[str, Any]:
        """The body of the create request."""
        asked = {"role": "user", "content": script(*self.turns)}
        return {"model": "scripted", "input": [*self.before, asked, *self.after], **self.body}


_MADE_UP = re.compile(r"^call_[0-9a-f]{36}$")


def outline(item: Mapping[str, Any]) -> str:
    """An item in one line; a call id that the server made up is a question mark."""
    if item["type"] == "compaction":
        return "compacts"
    mark = "" if item["status"] == "completed" else f"[{item['status']}] "
    id = "?" if _MADE_UP.match(item.get("call_id", "")) else item.get("call_id")
    name = ".".join(part for part in (item.get("namespace"), item.get("name")) if part)
    match item["type"]:
        case "message":
            parts = [f"(no) {part['refusal']}" if "refusal" in part else part["text"] for part in item["content"]]
            return f"{mark}says {' | '.join(parts)}"
        case "reasoning":
            summary = "".join(part["text"] for part in item["summary"])
            thought = "".join(part["text"] for part in item["content"])
            return f"{mark}thinks {thought}{f' ({summary})' if summary else ''}"
        case "shell_call" | "local_shell_call" | "apply_patch_call" | "computer_call" | "tool_search_call" as type_:
            held = next(item[key] for key in ("action", "actions", "operation", "arguments") if key in item)
            return f"{mark}{type_} {id} {msgspec.json.encode(held).decode()}"
        case "custom_tool_call":
            return f"{mark}runs {id} {name} <{item['input']}>"
        case _:
            return f"{mark}calls {id} {name} {item['arguments']}"


def function(name: str, **more: Any) -> dict[str, Any]:
    """A function's declaration."""
    schema = {"type": "object", "properties": {}, "additionalProperties": True}
    return {"type": "function", "name": name, "parameters": schema, "strict": False, **more}


def token(said: str) -> dict[str, Any]:
    """A token's log probability, with one rival."""
    rival = {"token": "x", "logprob": -3.25, "bytes": [120]}
    return {"token": said, "logprob": -0.5, "bytes": list(said.encode()), "top_logprobs": [rival]}


def completion(message: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """The answer of an upstream that does not stream."""
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": "stop", **more}
    counts = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    return {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": counts}


F = {"tools": [function("f"), function("g")]}
RUN = {"tools": [{"type": "custom", "name": "run", "description": "Runs a command."}]}
CRM = {
    "type": "namespace",
    "name": "crm",
    "description": "",
    "tools": [function("find"), {"type": "custom", "name": "sql"}],
}
CLIENTS = {
    "tools": [
        function("f"),
        *({"type": type_} for type_ in ("shell", "local_shell", "apply_patch", "computer")),
        {"type": "tool_search", "execution": "client"},
    ]
}
ONLY_F = {
    **F,
    "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
}
TWO_CALLS = ['calls c1 f {"a":1}', 'calls c2 g {"b":2}']
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
HISTORY = [
    {"role": "system", "content": "be brief"},
    {
        "role": "user",
        "content": [{"type": "input_text", "text": "roll"}, {"type": "input_image", "image_url": "data:x"}],
    },
    {"type": "reasoning", "id": "rs_old", "summary": [], "content": [{"type": "reasoning_text", "text": "dice"}]},
    {"type": "function_call", "call_id": "c0", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c0", "output": [{"type": "input_text", "text": "4"}]},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "A four."}]},
]
EVERYTHING = {
    "instructions": "be brief",
    "max_output_tokens": 100,
    "max_tool_calls": 3,
    "metadata": {"a": "b"},
    "parallel_tool_calls": False,
    "prompt_cache_key": "k",
    "reasoning": {"effort": "low", "summary": None},
    "safety_identifier": "s",
    "service_tier": "auto",
    "temperature": 0.5,
    "text": {"format": {"type": "text"}, "verbosity": "low"},
    "tool_choice": {"type": "function", "name": "f"},
    "tools": [function("f", description="F.", strict=True)],
    "top_p": 0.5,
    "frequency_penalty": 0.5,
    "presence_penalty": -0.5,
    "truncation": "auto",
    "top_k": 5,
}

READ = stall(0.2)
"""Silence of the upstream: a connection that breaks takes with it what is still unread."""

CASES: dict[str, Case] = {
    # -- Text and refusals --
    "text": Case(turns=[answer("Hello there, world.")], made=["says Hello there, world."]),
    "text in one chunk": Case(turns=[[text("Hello."), finish()]], made=["says Hello."]),
    "text of every plane": Case(turns=[[text('ü\n"\\\u2028'), text("😀"), finish()]], made=['says ü\n"\\\u2028😀']),
    "nothing": Case(turns=[[finish()]], made=[]),
    "white space alone": Case(turns=[[text("\n \n"), finish()]], made=[]),
    "refusal": Case(turns=[[refusal("I "), refusal("can't."), finish()]], made=["says (no) I can't."]),
    "text, then refusal": Case(
        turns=[[text("Well, "), refusal("no."), text("Sorry."), finish()]], made=["says Well,  | (no) no. | Sorry."]
    ),
    "nulls for everything else": Case(
        turns=[
            [
                delta(
                    role="assistant", content=None, refusal=None, tool_calls=None, reasoning_content=None, audio=None
                ),
                delta(content="Hi", tool_calls=[], function_call=None, reasoning=None, refusal=None),
                finish(),
            ]
        ],
        made=["says Hi"],
    ),
    # -- Reasoning --
    "reasoning_content": Case(
        turns=[[reasoning("Let me "), reasoning("think."), text("Yes."), finish()]],
        made=["thinks Let me think.", "says Yes."],
    ),
    "reasoning": Case(
        turns=[[reasoning("Hm.", "reasoning"), text("Yes."), finish()]], made=["thinks Hm.", "says Yes."]
    ),
    "reasoning in both fields": Case(
        turns=[[delta(reasoning="Hm.", reasoning_content="Hm."), text("Yes."), finish()]],
        made=["thinks Hm.", "says Yes."],
    ),
    "<think> in content": Case(
        turns=[[text("<thi"), text("nk>\nHm"), text(".</"), text("think>"), text("\n\nYes."), finish()]],
        made=["thinks Hm.", "says Yes."],
    ),
    "<think> quoted later": Case(
        turns=[[text("Write "), text("<think>"), text("x</think>"), finish()]], made=["says Write <think>x</think>"]
    ),
    "reasoning before a call": Case(
        turns=[[reasoning("Hm."), *calling("f", {"a": 1}, id="c1")]],
        made=["thinks Hm.", 'calls c1 f {"a":1}'],
        body=F,
    ),
    "reasoning between answers": Case(
        turns=[[reasoning("a"), text("b"), reasoning("c"), text("d"), finish()]],
        made=["thinks a", "says b", "thinks c", "says d"],
    ),
    "reasoning that is cut off": Case(
        turns=[[reasoning("Let me"), finish("length")]],
        made=["[incomplete] thinks Let me"],
        ends="incomplete:max_output_tokens",
    ),
    "summary": Case(
        turns=[[reasoning("Let me "), reasoning("think."), text("Yes."), finish()]],
        made=["thinks Let me think. (Let me think.)", "says Yes."],
        body={"reasoning": {"effort": "low", "summary": "auto"}},
    ),
    "encrypted reasoning": Case(
        turns=[[reasoning("Hm."), text("Yes."), finish()]],
        made=["thinks Hm.", "says Yes."],
        body={"include": ["reasoning.encrypted_content"], "store": False},
    ),
    # -- Calls --
    "one call": Case(turns=[calling("f", {"a": 1}, id="c1")], made=['calls c1 f {"a":1}'], body=F),
    "parallel calls": Case(
        turns=[[call("f", {"a": 1}, id="c1"), call("g", {"b": 2}, index=1, id="c2"), finish("tool_calls")]],
        made=TWO_CALLS,
        body=F,
    ),
    "interleaved calls": Case(
        turns=[
            [
                call("f", '{"a"', id="c1"),
                call("g", '{"b"', index=1, id="c2"),
                call(arguments=":1}"),
                call(arguments=":2}", index=1),
                finish("tool_calls"),
            ]
        ],
        made=TWO_CALLS,
        body=F,
    ),
    "calls in one chunk": Case(
        turns=[
            [
                delta(
                    tool_calls=[
                        {"index": 0, "id": "c1", "function": {"name": "f", "arguments": '{"a":1}'}},
                        {"index": 1, "id": "c2", "function": {"name": "g", "arguments": '{"b":2}'}},
                    ]
                ),
                finish("tool_calls"),
            ]
        ],
        made=TWO_CALLS,
        body=F,
    ),
    "call id late": Case(
        turns=[[call("f", '{"a"'), call(arguments=":1}"), call(id="c1"), finish("tool_calls")]],
        made=TWO_CALLS[:1],
        body=F,
    ),
    "call id never": Case(
        turns=[[call("f", {"a": 1}), call("g", {"b": 2}, index=1), finish("tool_calls")]],
        made=['calls ? f {"a":1}', 'calls ? g {"b":2}'],
        body=F,
    ),
    "name late": Case(
        turns=[[call(arguments='{"a"', id="c1"), call("f", ":1}"), finish("tool_calls")]], made=TWO_CALLS[:1], body=F
    ),
    "name repeated": Case(
        turns=[[call("f", '{"a"', id="c1"), call("f", ":1}", id="c1"), finish("tool_calls")]],
        made=TWO_CALLS[:1],
        body=F,
    ),
    "name in pieces": Case(
        turns=[[call("get_", id="c1"), call("it"), call(arguments="{}"), finish("tool_calls")]],
        made=["calls c1 get_it {}"],
        body={"tools": [function("get_it")]},
    ),
    "no index": Case(
        turns=[
            [
                call("f", '{"a"', index=None, id="c1"),
                call(arguments=":1}", index=None),
                call("g", {"b": 2}, index=None, id="c2"),
                finish("tool_calls"),
            ]
        ],
        made=TWO_CALLS,
        body=F,
    ),
    "neither index nor id": Case(
        turns=[[call("f", {"a": 1}, index=None), call("g", {"b": 2}, index=None), finish("tool_calls")]],
        made=['calls ? f {"a":1}', 'calls ? g {"b":2}'],
        body=F,
    ),
    "the same index with new ids": Case(
        turns=[[call("f", {"a": 1}, id="c1"), call("g", {"b": 2}, id="c2"), finish("tool_calls")]],
        made=TWO_CALLS,
        body=F,
    ),
    "the same id for every call": Case(
        turns=[[*(call("f", {"a": n}, index=n, id="c1") for n in range(3)), finish("tool_calls")]],
        made=['calls c1 f {"a":0}', 'calls ? f {"a":1}', 'calls ? f {"a":2}'],
        body=F,
    ),
    "arguments as an object": Case(
        turns=[
            [
                delta(tool_calls=[{"index": 0, "id": "c1", "function": {"name": "f", "arguments": {"a": 1}}}]),
                finish("tool_calls"),
            ]
        ],
        made=TWO_CALLS[:1],
        body=F,
    ),
    "empty arguments": Case(
        turns=[[call("f", "", id="c1"), call("g", index=1, id="c2"), finish("tool_calls")]],
        made=["calls c1 f {}", "calls c2 g {}"],
        body=F,
    ),
    "arguments that are no JSON": Case(
        turns=[
            [call("f", "a = ", id="c1"), call(arguments="1"), call("g", {"b": 2}, index=1, id="c2"), finish("stop")]
        ],
        made=["calls c1 f a = 1", TWO_CALLS[1]],
        body=F,
    ),
    "text before a call": Case(
        turns=[[text("Let me "), text("look."), *calling("f", {"a": 1}, id="c1")]],
        made=["says Let me look.", TWO_CALLS[0]],
        body=F,
    ),
    "text after a call": Case(
        turns=[[call("f", {"a": 1}, id="c1"), text("Looking."), finish("tool_calls")]],
        made=[TWO_CALLS[0], "says Looking."],
        body=F,
    ),
    "text between the pieces of a call": Case(
        turns=[[call("f", '{"a"', id="c1"), text("Looking."), call(arguments=":1}"), finish("tool_calls")]],
        made=[TWO_CALLS[0], "says Looking."],
        body=F,
    ),
    "white space before a call": Case(
        turns=[[text("\n\n"), *calling("f", {"a": 1}, id="c1")]], made=TWO_CALLS[:1], body=F
    ),
    "a call that is cut off": Case(
        turns=[[text("Wait."), call("f", '{"a"', id="c1"), finish("length")]],
        made=["says Wait.", '[incomplete] calls c1 f {"a"'],
        ends="incomplete:max_output_tokens",
        body=F,
    ),
    # -- Custom tools and namespaces --
    "custom tool, wrapped": Case(
        turns=[[call("run", '{"input":"ls', id="c1"), call(arguments=' -l"}'), finish("tool_calls")]],
        made=["runs c1 run <ls -l>"],
        body=RUN,
    ),
    "custom tool, native": Case(
        turns=[
            [call(id="c1", custom={"name": "run", "input": "ls"}), call(custom={"input": " -l"}), finish("tool_calls")]
        ],
        made=["runs c1 run <ls -l>"],
        body=RUN,
    ),
    "custom tool without input": Case(
        turns=[calling("run", '{"input":""}', id="c1")], made=["runs c1 run <>"], body=RUN
    ),
    "namespace": Case(
        turns=[
            [call("crm__find", {}, id="c1"), call("crm__sql", {"input": "x"}, index=1, id="c2"), finish("tool_calls")]
        ],
        made=["calls c1 crm.find {}", "runs c2 crm.sql <x>"],
        body={"tools": [CRM, function("f")]},
    ),
    # -- Tools of the client with items of their own --
    "tools of the client": Case(
        turns=[
            [
                call("shell", '{"commands":["ls', id="c1"),
                call(arguments='","pwd"],"why":"to see"}'),
                call("local_shell", {"command": ["ls"]}, index=1, id="c2"),
                call("apply_patch", {"type": "delete_file", "path": "a"}, index=2, id="c3"),
                call("computer", {"actions": [{"type": "screenshot"}]}, index=3, id="c4"),
                call("tool_search", {"query": "time"}, index=4, id="c5"),
                call("f", {"a": 1}, index=5, id="c6"),
                finish("tool_calls"),
            ]
        ],
        made=[
            'shell_call c1 {"commands":["ls","pwd"]}',
            'local_shell_call c2 {"type":"exec","command":["ls"],"env":{}}',
            'apply_patch_call c3 {"type":"delete_file","path":"a"}',
            'computer_call c4 [{"type":"screenshot"}]',
            'tool_search_call c5 {"query":"time"}',
            'calls c6 f {"a":1}',
        ],
        body=CLIENTS,
    ),
    "a tool of the client, arguments that do not fit": Case(
        turns=[
            [text("Wait."), *calling("shell", {"command": "ls"}, id="c1")],
            calling("shell", {"commands": ["ls"]}, id="c2"),
        ],
        made=["says Wait.", 'shell_call c2 {"commands":["ls"]}'],
        body=CLIENTS,
    ),
    "a tool of the client, cut off": Case(
        turns=[[text("Wait."), call("shell", '{"commands":["ls"', id="c1"), finish("length")]],
        made=["says Wait."],
        ends="incomplete:max_output_tokens",
        body=CLIENTS,
    ),
    "tools of the client, cut off when whole": Case(
        turns=[
            [
                call("shell", {"commands": ["ls"]}, id="c1"),
                call("apply_patch", {"type": "delete_file", "path": "a"}, index=1, id="c2"),
                finish("length"),
            ]
        ],
        made=[
            'shell_call c1 {"commands":["ls"]}',
            '[in_progress] apply_patch_call c2 {"type":"delete_file","path":"a"}',
        ],
        ends="incomplete:max_output_tokens",
        body=CLIENTS,
    ),
    # -- Tools that may not be called --
    "allowed_tools, refused call": Case(
        turns=[calling("g", {"b": 2}, id="c1"), answer("Then not.")], made=["says Then not."], body=ONLY_F
    ),
    "allowed_tools, text around a refused call": Case(
        turns=[[text("One."), *calling("g", {"b": 2}, id="c1")], answer("Two.")],
        made=["says One.", "says Two."],
        body=ONLY_F,
    ),
    "allowed_tools, one of two": Case(
        turns=[[call("g", {"b": 2}, id="c2"), call("f", {"a": 1}, index=1, id="c1"), finish("tool_calls")]],
        made=TWO_CALLS[:1],
        body=ONLY_F,
    ),
    "an invented tool": Case(turns=[calling("h", {}, id="c1"), answer("Sorry.")], made=["says Sorry."], body=F),
    "tool_choice none": Case(
        turns=[calling("f", {}, id="c1"), answer("Sorry.")], made=["says Sorry."], body={**F, "tool_choice": "none"}
    ),
    # -- Log probabilities --
    "logprobs": Case(
        turns=[
            [
                text("Hel", logprobs={"content": [token("Hel")]}),
                text("lo", logprobs={"content": [token("l"), token("o")]}),
                finish(),
            ]
        ],
        made=["says Hello"],
        body={"include": ["message.output_text.logprobs"], "top_logprobs": 1},
    ),
    # -- Usage --
    "usage at the end": Case(turns=[[text("Hi"), finish(), usage(3, 4)]], made=["says Hi"], used=(3, 4)),
    "usage with details": Case(
        turns=[
            [
                text("Hi"),
                finish(),
                usage(
                    30,
                    40,
                    prompt_tokens_details={"cached_tokens": 10, "audio_tokens": None},
                    completion_tokens_details={"reasoning_tokens": 20},
                ),
            ]
        ],
        made=["says Hi"],
        used=(30, 40),
    ),
    "usage in the finish chunk": Case(
        turns=[[text("Hi"), usage_in_finish(3, 4), finish()]], made=["says Hi"], used=(3, 4)
    ),
    "usage missing": Case(turns=[[text("Hi"), finish(), no_usage()]], made=["says Hi"], used=()),
    "usage of two turns": Case(
        turns=[[*calling("h", {}, id="c1"), usage(3, 4)], [*answer("Sorry."), usage(5, 6)]],
        made=["says Sorry."],
        body=F,
        used=(8, 10),
    ),
    # -- Ends --
    "length": Case(
        turns=[[text("Once upon a"), finish("length")]],
        made=["[incomplete] says Once upon a"],
        ends="incomplete:max_output_tokens",
    ),
    "content_filter": Case(
        turns=[[text("How to"), finish("content_filter")]],
        made=["[incomplete] says How to"],
        ends="incomplete:content_filter",
    ),
    "content_filter at once": Case(turns=[[finish("content_filter")]], made=[], ends="incomplete:content_filter"),
    "tool_calls without calls": Case(turns=[[text("Hi"), finish("tool_calls")]], made=["says Hi"]),
    "stop with calls": Case(turns=[[call("f", {"a": 1}, id="c1"), finish("stop")]], made=TWO_CALLS[:1], body=F),
    "a finish reason of its own": Case(
        turns=[[text("Hi"), finish("eos")]], made=["[incomplete] says Hi"], ends="incomplete"
    ),
    "no finish reason": Case(turns=[[text("Hi")]], made=["says Hi"]),
    "text behind [DONE]": Case(
        turns=[[text("Hi"), finish(), raw("data: [DONE]\n\n"), text(" never")]], made=["says Hi"]
    ),
    "no [DONE]": Case(turns=[[text("Hi"), finish(), no_done()]], made=["says Hi"]),
    # -- The stream itself --
    "comments, bare lines, carriage returns": Case(
        turns=[
            [
                raw(": ping\n\nevent: x\nid: 7\nretry: 3\n\n"),
                raw('data:{"choices":[{"delta":{"content":"Hi"}}]}\r\n\r\n'),
                raw("data: \n\n"),
                finish(),
            ]
        ],
        made=["says Hi"],
    ),
    "chunks without choices": Case(
        turns=[[chunk(id="x"), chunk(choices=None), chunk(choices=[]), text("Hi"), finish()]], made=["says Hi"]
    ),
    "a whole completion instead of a stream": Case(
        turns=[[status(200, completion({"content": "Hello.", "reasoning_content": "Hm."}))]],
        made=["thinks Hm.", "says Hello."],
        used=(3, 4),
    ),
    "whole calls instead of a stream": Case(
        turns=[
            [
                status(
                    200,
                    completion(
                        {
                            "content": None,
                            "tool_calls": [
                                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}},
                                {"id": "c2", "type": "function", "function": {"name": "g", "arguments": '{"b":2}'}},
                            ],
                        },
                        finish_reason="tool_calls",
                    ),
                )
            ]
        ],
        made=TWO_CALLS,
        body=F,
    ),
    # -- Values of other types --
    "content as parts": Case(
        turns=[
            [
                delta(content=[{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}]),
                delta(content=[{"type": "text", "text": "Ye"}, {"type": "text", "text": "s."}]),
                finish(),
            ]
        ],
        made=["thinks Hm.", "says Yes."],
    ),
    "a whole completion of parts": Case(
        turns=[[status(200, completion({"content": [{"type": "text", "text": "Hello."}]}))]], made=["says Hello."]
    ),
    "half a surrogate pair": Case(
        turns=[[raw('data: {"choices":[{"delta":{"content":"\\ud83d Hi"}}]}\n\n'), finish()]], made=["says \ufffd Hi"]
    ),
    "indexes as texts, ids as numbers": Case(
        turns=[
            [
                call("f", '{"a"', index="0", id=7),
                call("g", {"b": 2}, index="1", id=8),
                call(arguments=":1}", index="0"),
                finish("tool_calls"),
            ]
        ],
        made=['calls 7 f {"a":1}', 'calls 8 g {"b":2}'],
        body=F,
    ),
    "log probabilities of null": Case(
        turns=[[text("Hi", logprobs={"content": [{"token": "Hi", "logprob": None, "bytes": None}]}), finish()]],
        made=["says Hi"],
        body={"top_logprobs": 1},
    ),
    "counts as floats": Case(
        turns=[
            [
                text("Hi"),
                finish(),
                usage(3, 4, prompt_tokens=3.0, total_tokens=7.0, prompt_tokens_details={"cached_tokens": 2.0}),
            ]
        ],
        made=["says Hi"],
        used=(3, 4),
    ),
    # -- Faults in mid-stream --
    "error": Case(
        turns=[[text("Once upon"), error("out of memory")]],
        made=["[incomplete] says Once upon"],
        ends="failed:server_error",
    ),
    "error with a code": Case(
        turns=[[reasoning("Hm"), error("no credit", code="insufficient_quota")]],
        made=["[incomplete] thinks Hm"],
        ends="failed:insufficient_quota",
    ),
    "error of too many requests": Case(
        turns=[[reasoning("Hm"), error("slow down", code=429)]],
        made=["[incomplete] thinks Hm"],
        ends="failed:rate_limit_exceeded",
    ),
    "cut": Case(
        turns=[[text("Once upon"), READ, cut()]], made=["[incomplete] says Once upon"], ends="failed:server_error"
    ),
    "cut in a call": Case(
        turns=[[text("Wait."), call("f", '{"a"', id="c1"), READ, cut(reset=True)]],
        made=["says Wait.", '[incomplete] calls c1 f {"a"'],
        ends="failed:server_error",
        body=F,
    ),
    "junk": Case(
        turns=[[text("Once upon"), raw("data: "), junk(100), raw("\n\n")]],
        made=["[incomplete] says Once upon"],
        ends="failed:server_error",
    ),
    # -- Requests --
    "json schema": Case(
        turns=[[text('{"a":'), text("1}"), finish()]],
        made=['says {"a":1}'],
        body={"text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}}},
    ),
    "json object": Case(
        turns=[[text("{}"), finish()]], made=["says {}"], body={"text": {"format": {"type": "json_object"}}}
    ),
    "every parameter": Case(turns=[calling("f", {"a": 1}, id="c1")], made=TWO_CALLS[:1], body=EVERYTHING),
    "history": Case(turns=[answer("And now?")], made=["says And now?"], before=HISTORY, body=F),
    "compaction": Case(turns=[answer("Hi")], made=["compacts"], after=[{"type": "compaction_trigger"}]),
    "not stored": Case(turns=[answer("Secret.")], made=["says Secret."], body={"store": False}),
}
