"""Folds the chunks of a completion into its choice, as a client does."""

from typing import Any


def added_up(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """The choice that chunks add up to, as a completion has it."""
    message: dict[str, Any] = {"content": None, "refusal": None, "annotations": [], "tool_calls": []}
    logprobs: list[Any] = []
    reason = None
    for one in chunks:
        for choice in one["choices"]:
            assert reason is None, "nothing follows the finish reason"
            reason, delta = choice["finish_reason"], choice["delta"]
            logprobs += (choice["logprobs"] or {}).get("content", [])
            message["role"] = delta.get("role", message.get("role"))
            message["annotations"] += delta.get("annotations", [])
            for key in ("content", "refusal", "reasoning_content"):
                if delta.get(key) is not None:
                    message[key] = (message.get(key) or "") + delta[key]
            for call in delta.get("tool_calls", []):
                if "id" in call:
                    assert call.pop("index") == len(message["tool_calls"])
                    message["tool_calls"].append(call)
                else:
                    [kind] = {"function", "custom"} & call.keys()
                    key = "arguments" if kind == "function" else "input"
                    message["tool_calls"][call["index"]][kind][key] += call[kind][key]
    if not message["tool_calls"]:
        del message["tool_calls"]
    whole = {"content": logprobs, "refusal": None} if logprobs else None
    return {"index": 0, "message": message, "logprobs": whole, "finish_reason": reason}
