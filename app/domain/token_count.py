"""Chat request → the requests that count its tokens.

A count is exact or refused: what an endpoint does not take into account is not counted with it.
"""

from typing import Any

import msgspec
from msgspec import Raw, Struct

TOKENIZED = frozenset(
    "model messages tools chat_template chat_template_kwargs add_generation_prompt continue_final_message "
    "add_special_tokens mm_processor_kwargs media_io_kwargs".split()
)
"""What vLLM's `/tokenize` takes of a chat request."""

NOT_TOKENIZED = frozenset("documents reasoning_effort response_format tool_choice truncate_prompt_tokens".split())
"""What vLLM puts into the prompt of a chat request, or takes from it, and its `/tokenize` does not know."""

NO_OUTPUT = ("stream_options", "min_tokens")
"""What a completion of one token, which is not streamed, can't have."""


class _Part(Struct):
    type: str | None = None


class _Message(Struct):
    content: str | list[_Part] | None = None


_KEYS = msgspec.json.Decoder(dict[str, Raw])
_MESSAGES = msgspec.json.Decoder(list[_Message])


def is_text(body: bytes) -> bool:
    """Whether a chat request has no images, files or audio: endpoints that tokenize text do not count them."""
    parts = (part for message in _MESSAGES.decode(_KEYS.decode(body)["messages"]) for part in _parts(message))
    return all(part.type == "text" for part in parts)


def _parts(message: _Message) -> list[_Part]:
    return message.content if isinstance(message.content, list) else []


def tokenize(body: bytes) -> bytes | None:
    """The body of vLLM's `POST /tokenize`; None for a request that it would count otherwise."""
    keys = _KEYS.decode(body)
    if NOT_TOKENIZED & keys.keys() or not is_text(body):
        return None
    taken = {name: value for name, value in keys.items() if name in TOKENIZED}
    return msgspec.json.encode({"add_generation_prompt": True, **taken})


def completion(body: bytes, **limit: int) -> bytes:
    """The body of a completion that is as long as the limit, by its name in the dialect, and not streamed: a stream without
    `stream_options` has no usage."""
    keys: dict[str, Any] = {name: value for name, value in _KEYS.decode(body).items() if name not in NO_OUTPUT}
    return msgspec.json.encode({**keys, "stream": False, **limit})
