"""What comes back of a call, and the errors that stand in place of an answer."""

from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from msgspec import Struct

from app.wire.items import CallError

INVALID_PARAMS = -32602
"""JSON-RPC's code for invalid arguments."""

INTERNAL_ERROR = -32603

BROKEN_OFF = "This call was broken off before its result was known: it may have been carried out."


class Answer(Struct, frozen=True):
    """What came back of a call; `error` if it failed."""

    text: str = ""
    structured: Any = None
    images: Sequence[tuple[str, str]] = ()
    """Media type and base64 of each."""
    error: CallError | None = None

    @property
    def status(self) -> Literal["completed", "failed"]:
        """The status of the call's item."""
        return "completed" if self.error is None else "failed"

    @property
    def error_message(self) -> str:
        """Why the call failed, or what came back in place of a result."""
        return error_text(self.error) if self.error is not None else self.text or "nothing came back"

    @property
    def image_urls(self) -> list[str]:
        """The images as data URLs."""
        return [f"data:{type_};base64,{data}" for type_, data in self.images]


def not_json() -> Answer:
    """For a call whose arguments are not a JSON object: it is not sent."""
    return failure("mcp_protocol_error", INVALID_PARAMS, "The arguments are not a JSON object.")


def unknown_outcome() -> Answer:
    """For a call that may or may not have been carried out when its run broke off: it is not sent again."""
    return failure("mcp_protocol_error", INTERNAL_ERROR, BROKEN_OFF)


def failure(type: str, code: int, message: str) -> Answer:
    """The answer of a call that failed on its way."""
    return Answer(error=CallError(type=type, code=code, message=message))


def error_text(error: CallError | str) -> str:
    """A call's error, as the model reads it."""
    if isinstance(error, str):
        return error
    if error.message:
        return str(error.message)
    if error.content is msgspec.UNSET:
        return error.type
    parts = error.content if isinstance(error.content, list) else [error.content]
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    return "\n".join(text for text in texts if isinstance(text, str)) or msgspec.json.encode(error.content).decode()
