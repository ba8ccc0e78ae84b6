"""What the programs of `chat_*.py` share: scripts for the upstream. They run in environments of their own, without the project's packages."""

import json
import os
from typing import Any

URL = os.environ.get("REPRISE_URL", "")


def script(*turns: list[dict[str, Any]]) -> str:
    """The user message that makes the upstream take these steps, a list for each of its turns."""
    return "\n".join(map(json.dumps, turns))


def answer(*texts: str) -> list[dict[str, Any]]:
    """A turn of text."""
    return [*({"text": text} for text in texts), {"finish": "stop"}]


def call(name: str, **arguments: Any) -> list[dict[str, Any]]:
    """A turn that calls a function."""
    called = {"index": 0, "id": "call_1", "name": name, "arguments": json.dumps(arguments)}
    return [{"call": called}, {"finish": "tool_calls"}]


WEATHER = script(call("weather", city="Oslo"), answer("It is ", "sunny."))
ADA = script(answer('{"name": ', '"Ada"}'))
THOUGHT = script([{"reasoning_content": "Hm."}, *answer("Yes.")])
PIXEL = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
