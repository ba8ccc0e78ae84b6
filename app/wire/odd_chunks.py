"""Chunks, completions and lists of servers whose JSON has other types than the API's: read slowly, as far as they have a
meaning."""

import json
import math
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Raw

from app.wire.chat import (
    CallDelta,
    ChatUsage,
    Choice,
    Choices,
    Chunk,
    CompletionTokensDetails,
    CustomDelta,
    Delta,
    FunctionDelta,
    Logprob,
    Logprobs,
    ModelEntry,
    PromptTokensDetails,
    TopLogprob,
    decode_chunk,
)
from app.wire.requests import mend_surrogates

LEAST_LOGPROB = -9999.0
"""The API's value for a token that is all but impossible; other servers send null or minus infinity."""

COUNT_MAX = 2**53
"""Of tokens, and of seconds since 1970: many readers of JSON know no greater integer."""

Object = Mapping[str, Any]


class NoMeaning(ValueError):
    """JSON that is not what was asked for, in any form."""


def read_chunk(data: bytes) -> Chunk:
    """One `data:` of a stream. Raises ValueError for what is not a chunk, RecursionError for what nests too deeply."""
    try:
        chunk = decode_chunk(data)
    except msgspec.DecodeError:
        return _odd_chunk(_object(data))
    return chunk if chunk.choices or chunk.usage or is_error(chunk.error) else _odd_chunk(_object(data))


def read_completion(data: bytes) -> Chunk:
    """The answer of a server that does not stream, as one chunk. Raises as `read_chunk`, also for an answer without choices
    or error."""
    chunk = _odd_chunk(_object(data))
    if chunk.choices is None and not chunk.error:
        raise NoMeaning("it has no choices")
    if chunk.choices and chunk.choices.first:
        chunk.choices.first.finish_reason = chunk.choices.first.finish_reason or "stop"
    return chunk


def read_models(data: bytes) -> list[ModelEntry]:
    """The models of a list, as far as they have names. Raises as `read_chunk`."""
    given = _json(data)
    if isinstance(given, dict):
        given = given.get("data", given.get("models"))
    if not isinstance(given, list):
        raise NoMeaning("it is not a list")
    return [entry for one in given if (entry := _model(one))]


def _model(given: Any) -> ModelEntry | None:
    if isinstance(given, str) and given:
        return ModelEntry(given)
    if not isinstance(given, dict):
        return None
    id = given.get("id") or given.get("name")
    if not isinstance(id, str) or not id:
        return None
    return ModelEntry(
        id,
        created=_count(given.get("created")) or 0,
        owned_by=_text(given.get("owned_by")) or None,
        context_window=_context_window(given),
    )


def _context_window(given: Object) -> int | None:
    """The size of a model's context, by the keys of vLLM and SGLang, of several hosts, and of llama.cpp."""
    meta = given.get("meta")
    sizes = [given.get(key) for key in ("max_model_len", "context_window", "context_length", "max_context_length")]
    sizes += [meta.get(key) for key in ("n_ctx", "n_ctx_train")] if isinstance(meta, dict) else []
    return next((size for one in sizes if (size := _count(one))), None)


def _json(data: bytes) -> Any:
    """The standard library takes NaN, infinities and bare control characters."""
    return json.loads(mend_surrogates(data).decode(), strict=False)


def _object(data: bytes) -> Object:
    given = _json(data)
    if not isinstance(given, dict):
        raise NoMeaning("it is not an object")
    return given


def is_error(raw: Raw) -> bool:
    """Whether an `error` is an error: some servers send null or an empty object with every chunk."""
    return bytes(raw) not in {b"", b"null", b"{}", b'""', b"false"}


def _odd_chunk(given: Object) -> Chunk:
    if error := given.get("error"):
        return Chunk(error=_raw(error))
    choices = given.get("choices")
    if choices is None and (given.get("object") == "error" or given.get("message") or given.get("detail")):
        return Chunk(error=_raw(given))  # bare
    if not isinstance(choices, list | None):
        raise NoMeaning("its `choices` are not a list")
    first = choices[0] if choices else None
    if not isinstance(first, dict | None):
        raise NoMeaning("its choice is not an object")
    made = Choices(_choice(first) if first is not None else None) if choices is not None else None
    return Chunk(choices=made, usage=_usage(given.get("usage")))


def _raw(value: Any) -> Raw:
    return Raw(msgspec.json.encode(value))


def _choice(given: Object) -> Choice:
    message = given.get("delta") or given.get("message")
    logprobs = given.get("logprobs")
    tokens = logprobs.get("content") if isinstance(logprobs, dict) else None
    return Choice(
        delta=_delta(message) if isinstance(message, dict) else None,
        finish_reason=_text(given.get("finish_reason")) or None,
        logprobs=Logprobs([_logprob(one) for one in tokens if isinstance(one, dict)])
        if isinstance(tokens, list)
        else None,
    )


def _delta(given: Object) -> Delta:
    content, thought = _parts(given.get("content"))
    calls = _list(given.get("tool_calls"))
    annotations = _list(given.get("annotations"))
    return Delta(
        content=content,
        refusal=_text(given.get("refusal")),
        reasoning=_parts(given.get("reasoning"))[0],
        reasoning_content=_parts(given.get("reasoning_content"))[0],
        tool_calls=[_call(one) for one in calls if isinstance(one, dict)] or None,
        annotations=[_raw(one) for one in annotations if isinstance(one, dict)] or None,
        thinking=thought or None,
    )


def _parts(content: Any) -> tuple[str | None, str]:
    """Content as a text, and the reasoning in it: some servers send parts."""
    if not isinstance(content, list | dict):
        return _text(content), ""
    texts, thoughts = [], []
    for part in _list(content):
        if not isinstance(part, dict):
            texts.append(_text(part) or "")
        elif part.get("type") in ("thinking", "reasoning"):
            thoughts.append(_parts(part.get("thinking") or part.get("text") or part.get("reasoning"))[0] or "")
        else:
            texts.append(_text(part.get("text")) or "")
    return "".join(texts), "".join(thoughts)


def _call(given: Object) -> CallDelta:
    function, custom = given.get("function"), given.get("custom")
    return CallDelta(
        index=_integer(given.get("index")),
        id=_text(given.get("id")),
        function=FunctionDelta(_text(function.get("name")), _arguments(function.get("arguments")))
        if isinstance(function, dict)
        else None,
        custom=CustomDelta(_text(custom.get("name")), _text(custom.get("input"))) if isinstance(custom, dict) else None,
    )


def _arguments(value: Any) -> str | dict[str, Any] | None:
    return value if isinstance(value, dict) else _text(value)


def _logprob(given: Object) -> Logprob:
    top = [_one_logprob(one) for one in _list(given.get("top_logprobs")) if isinstance(one, dict)]
    one = _one_logprob(given)
    return Logprob(one.token, one.logprob, one.bytes, top)


def _one_logprob(given: Object) -> TopLogprob:
    value, raw = given.get("logprob"), given.get("bytes")
    is_bytes = isinstance(raw, list) and all(isinstance(one, int) and 0 <= one < 256 for one in raw)
    return TopLogprob(_text(given.get("token")) or "", _finite(value), raw if is_bytes else None)


def _finite(value: Any) -> float:
    try:
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else LEAST_LOGPROB
    except OverflowError:  # an integer that is no float
        return LEAST_LOGPROB


def _usage(given: Any) -> ChatUsage | None:
    if not isinstance(given, dict):
        return None
    read, made = given.get("prompt_tokens_details"), given.get("completion_tokens_details")
    return ChatUsage(
        prompt_tokens=_count(given.get("prompt_tokens")),
        completion_tokens=_count(given.get("completion_tokens")),
        total_tokens=_count(given.get("total_tokens")),
        prompt_tokens_details=PromptTokensDetails(
            _count(read.get("cached_tokens")), _count(read.get("cache_write_tokens"))
        )
        if isinstance(read, dict)
        else None,
        completion_tokens_details=CompletionTokensDetails(_count(made.get("reasoning_tokens")))
        if isinstance(made, dict)
        else None,
    )


def _list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _text(value: Any) -> str | None:
    """A text; other values, like a number for an id, as JSON."""
    if isinstance(value, str | None):
        return value
    return json.dumps(value)


def _integer(value: Any) -> int | None:
    try:
        return int(value) if isinstance(value, int | float | str) else None
    except (ValueError, OverflowError):  # no number, not a number, infinite
        return None


def _count(value: Any) -> int | None:
    number = _integer(value)
    return None if number is None else min(max(number, 0), COUNT_MAX)
