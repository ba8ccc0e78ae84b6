"""The contract of Chat Completions: what is streamed, and what a reply holds that is not streamed, is what is stored."""

from typing import Any

import httpx
import msgspec
import pytest

from tests.chunks import added_up
from tests.contract.cases import CASES, Case, outline


def _body(case: Case) -> dict[str, Any] | None:
    """A case as a chat request; None for one that Chat Completions does not have."""
    if case.before or case.after or not case.body.keys() <= {"tools", "include", "top_logprobs"}:
        return None
    if {tool["type"] for tool in case.body.get("tools", ())} - {"function", "custom"}:
        return None
    tools = [{"type": tool["type"], tool["type"]: _without_type(tool)} for tool in case.body.get("tools", ())]
    logprobs = {"logprobs": True, "top_logprobs": 1} if "top_logprobs" in case.body else {}
    message = {"role": "user", "content": case.request["input"][-1]["content"]}
    return {
        "model": "scripted",
        "messages": [message],
        "store": True,
        **({"tools": tools} if tools else {}),
        **logprobs,
    }


def _without_type(tool: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in tool.items() if key != "type"}


BODIES = {name: body for name, case in CASES.items() if (body := _body(case))}
FAILED = [name for name in BODIES if CASES[name].ends.startswith("failed")]
REASONS = {"completed": "stop", "incomplete:content_filter": "content_filter"}


def _chunks(http: httpx.Client, name: str) -> list[dict[str, Any]]:
    reply = http.post("/chat/completions", json={**BODIES[name], "stream": True})
    *frames, done, rest = reply.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [msgspec.json.decode(frame.removeprefix("data: ")) for frame in frames]


def _choice(response: dict[str, Any], ends: str) -> dict[str, Any]:
    """The choice that a stored response should be, without log probabilities, which are not stored unasked."""
    texts: dict[str, list[str]] = {"content": [], "refusal": [], "reasoning_content": []}
    calls = []
    for item in response["output"]:
        match item["type"]:
            case "message":
                texts["content"].append("".join(part.get("text", "") for part in item["content"]))
                texts["refusal"].append("".join(part.get("refusal", "") for part in item["content"]))
            case "reasoning":
                texts["reasoning_content"].append("".join(part["text"] for part in item["content"]))
            case "function_call":
                called = {"name": item["name"], "arguments": item["arguments"]}
                calls.append({"id": item["call_id"], "type": "function", "function": called})
            case _:
                called = {"name": item["name"], "input": item["input"]}
                calls.append({"id": item["call_id"], "type": "custom", "custom": called})
    message = {key: "\n\n".join(filter(None, pieces)) or None for key, pieces in texts.items()}
    if not message["reasoning_content"]:
        del message["reasoning_content"]
    reason = "tool_calls" if calls and ends == "completed" else REASONS.get(ends, "length")
    message = {"role": "assistant", "annotations": [], **message, **({"tool_calls": calls} if calls else {})}
    return {"index": 0, "message": message, "finish_reason": reason}


@pytest.mark.parametrize("name", [name for name in BODIES if name not in FAILED])
def test_a_completion_is_what_is_stored(name: str, http: httpx.Client):
    case, chunks = CASES[name], _chunks(http, name)
    whole = http.post("/chat/completions", json=BODIES[name]).json()
    scored = []
    for id, choice in (
        (chunks[-1]["response_id"], added_up(chunks)),
        (whole["response_id"], whole["choices"][0]),
    ):
        stored = http.get(f"/responses/{id}", params={"include": "message.output_text.logprobs"}).json()
        assert [outline(item) for item in stored["output"]] == list(case.made)
        scored.append(choice.pop("logprobs"))
        assert choice == _choice(stored, case.ends)
    assert scored[0] == scored[1]
    assert bool(scored[0]) == ("logprobs" in BODIES[name])


@pytest.mark.parametrize("name", FAILED)
def test_a_failed_stream_ends_with_the_error_of_a_reply(name: str, http: httpx.Client):
    *chunks, last = _chunks(http, name)
    whole = http.post("/chat/completions", json=BODIES[name])
    assert whole.status_code >= 400
    assert last == whole.json()
    assert not any(choice["finish_reason"] for one in chunks for choice in one["choices"])
