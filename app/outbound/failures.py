"""An upstream's failure, by status or inside its stream → our error.

Engines have types and codes of their own, and put statuses where codes belong. Clients know the API's: they decide by status and
code what to do about a failure.
"""

import math
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

import msgspec
from msgspec import Struct

from app.errors import (
    ApiError,
    AuthenticationFailed,
    ContextTooLong,
    UpstreamBusy,
    UpstreamGarbled,
    UpstreamRefused,
    UpstreamUnavailable,
)
from app.outbound.masking import Mask

MODEL_NOT_FOUND = "model_not_found"
NO_CREDIT = "insufficient_quota"
INVALID = "invalid_request_error"

MESSAGE_CHARS_MAX = 1000
"""Limit of an upstream's message in an error; longer ones are cut."""

NO_JSON = (ValueError, RecursionError)
"""What decoding raises for bytes that are not UTF-8, not JSON of the wanted form, or nested too deeply."""

_TYPES = frozenset({INVALID, NO_CREDIT, "image_generation_user_error"})
"""The API's types of requests that must not be repeated."""

_STATUSES = {
    "badrequesterror": 400,
    "invalid_request_error": 400,
    "exceed_context_size_error": 400,
    "context_length_exceeded": 400,
    "contextwindowexceedederror": 400,
    "unprocessableentityerror": 422,
    "validation": 422,
    "authenticationerror": 401,
    "authentication_error": 401,
    "invalid_api_key": 401,
    "permissiondeniederror": 403,
    "permission_error": 403,
    "permission_denied": 403,
    "insufficient_permissions": 403,
    "access_denied": 403,
    "forbidden": 403,
    "notfounderror": 404,
    "not_found_error": 404,
    MODEL_NOT_FOUND: 404,
    "ratelimiterror": 429,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    NO_CREDIT: 429,
    "not_supported_error": 501,
}
"""The status that a type or a code implies where none is given."""

_TOO_LONG = re.compile(
    r"maximum (context|model) length|context (length|window|size)|exceeds? the available context|ContextWindowExceeded"
    r"|tokens exceed the configured limit|prompt is too long|longer than the max|exceeds the maximum number of tokens|`inputs` tokens \+",
    re.IGNORECASE,
)
_TOO_LONG_TYPES = frozenset({"context_length_exceeded", "exceed_context_size_error", "contextwindowexceedederror"})
_TOKENS_MAX = re.compile(
    r"(?:maximum (?:context|model) length (?:is|of)|configured limit of|context (?:size|length) \(|tokens >) ?(?P<max>\d{1,15})"
    r"|with (?P<of_model>\d{1,15}) maximum context",
    re.IGNORECASE,
)
_TOKENS = re.compile(
    r"(?:requested(?: a total of)?|resulted in|prompt contains|too long:|(?:request|input) \() ?(?P<tokens>\d{1,15}) tokens"
    r"|request has (?P<input>\d{1,15}) input tokens(?: plus (?P<output>\d{1,15}))?",
    re.IGNORECASE,
)
_PROMPT_TOKENS = re.compile(r"(\d{1,15}) (?:in the messages|tokens from the input)", re.IGNORECASE)
_LEAST = "at least"
"""A prompt was counted only so far."""
_TOO_LONG_STATUSES = frozenset({400, 413, 422, 500})
_NO_MODEL = re.compile(
    r"\bmodel\b.{0,300}(not found|does not exist|doesn't exist|not exist\b)|(invalid model name|no such model|unknown model)",
    re.IGNORECASE | re.DOTALL,
)
_NO_MEDIA = re.compile(
    r"\b(images?|audio|video|vision|multi-?modal)\b.{0,60}\bnot (supported|enabled|available)"
    r"|not support (images?|audio|video|vision|multi-?modal)|not a multi-?modal model|failed to load (the )?(image|audio)"
    r"|(cannot identify|invalid|unsupported) image",
    re.IGNORECASE,
)
"""A model that can't read an input can't read it the next time either; llama.cpp sends a 500 for that."""


class KeyRefused(UpstreamUnavailable):
    """The upstream does not accept this server's key; a retry does not help."""

    is_final = True


class ErrorContext(Struct, frozen=True):
    """The upstream's name, whether the caller's own key was sent, and the mask for its messages."""

    upstream: str
    passes_caller: bool
    mask: Mask


class _ErrorObject(Struct, frozen=True):
    """An upstream's error object, whatever its shape."""

    message: str = ""
    type: str = ""
    param: str | None = None
    code: str = ""
    status: int | None = None
    has_reasons: bool = False
    """It lists what was wrong with the content, as OpenRouter's moderation does."""
    tokens: tuple[int, int] | None = None
    """Those of the prompt and those of the context, as llama.cpp counts them."""


def refused(status: int, headers: Mapping[str, str], raw: bytes, context: ErrorContext) -> ApiError:
    """Our error for an answer with this status, which is not a 2xx."""
    if status < 400:
        return UpstreamGarbled(
            f"Upstream '{context.upstream}' answered with status {status}, and redirects are not followed."
        )
    try:
        body = context.mask.json(msgspec.json.decode(raw))
    except NO_JSON:
        body = context.mask.text(raw.decode(errors="replace").strip())
    error = _error(status, _read(body), context, f"The upstream failed with status {status}")
    after = _retry_after(headers.get("retry-after", ""))
    if after and isinstance(error, UpstreamBusy):
        error.headers["Retry-After"] = after
    return error


def failed_in_stream(raw: msgspec.Raw, context: ErrorContext) -> ApiError:
    """Our error for an error object in place of a chunk."""
    try:
        found = _read(context.mask.json(msgspec.json.decode(raw)))
    except NO_JSON:
        found = _ErrorObject()
    status = found.status or _STATUSES.get(found.code.lower()) or _STATUSES.get(found.type.lower()) or 500
    return _error(status, found, context, "The upstream failed")


def _error(status: int, found: _ErrorObject, context: ErrorContext, failed: str) -> ApiError:
    if _refuses_key(status, found) and not context.passes_caller:
        return KeyRefused(f"Upstream '{context.upstream}' does not accept this server's key.")
    if status == 401:
        return AuthenticationFailed(found.message or "The upstream does not accept the key.")
    if status == 429:
        code = NO_CREDIT if NO_CREDIT in {found.code, found.type} else None
        return UpstreamBusy(found.message or "The upstream is busy.", code=code)
    if _is_too_long(status, found):
        return _too_long(found)
    if status < 502 and _NO_MEDIA.search(found.message):
        return UpstreamRefused(found.message, param=found.param or "input", code=_own_code(found))
    if status >= 500 and status != 501:
        return UpstreamUnavailable(f"{failed}: {found.message or 'it gave no reason'}", code=_own_code(found))
    code = _own_code(found)
    if code is None and status in {400, 404} and _NO_MODEL.search(found.message):
        code = MODEL_NOT_FOUND
    return UpstreamRefused(
        found.message or f"The upstream refused the request with status {status}.",
        status=status if status < 500 else 400,
        type=found.type if found.type in _TYPES else INVALID,
        param=found.param or ("model" if code == MODEL_NOT_FOUND else None),
        code=code or (NO_CREDIT if status == 402 else None),
    )


def _refuses_key(status: int, found: _ErrorObject) -> bool:
    """A 403 may also be about the model or the input; then its code or its reasons show that."""
    if status != 403 or found.has_reasons:
        return status == 401
    code = _own_code(found)
    return code is None or _STATUSES.get(code) in {401, 403}


def _is_too_long(status: int, found: _ErrorObject) -> bool:
    if _TOO_LONG_TYPES & {found.code.lower(), found.type.lower()}:
        return True
    return status in _TOO_LONG_STATUSES and bool(_TOO_LONG.search(found.message))


def _too_long(found: _ErrorObject) -> ContextTooLong:
    """With the upstream's counts, in its message too."""
    message = found.message or "The context is too long."
    if found.tokens:
        prompt, most = found.tokens
        if str(prompt) not in message or str(most) not in message:
            message += f" (The prompt has {prompt} tokens, the model's context {most}.)"
        return ContextTooLong(message, tokens_max=most, share_over=_share(prompt, prompt, most))
    named = _TOKENS_MAX.search(message)
    most = int(named["max"] or named["of_model"]) if named else 0
    return ContextTooLong(message, tokens_max=most or None, share_over=_share_over(message, most))


def _share_over(message: str, most: int) -> float | None:
    """The share of the prompt that is too much, from the counts in a message."""
    given = _TOKENS.search(message)
    if not given or _LEAST in message:
        return None
    asked = sum(int(count) for count in given.groups() if count)
    prompt = _PROMPT_TOKENS.search(message) or re.match(r"(\d+)", given["input"] or "")
    return _share(int(prompt[1]) if prompt else asked, asked, most)


def _share(prompt: int, asked: int, most: int) -> float | None:
    return min((asked - most) / prompt, 1.0) if 0 < most < asked and prompt else None


def _counts(prompt: Any, most: Any) -> tuple[int, int] | None:
    return (prompt, most) if type(prompt) is type(most) is int and min(prompt, most) > 0 else None


def _own_code(found: _ErrorObject) -> str | None:
    """The upstream's code, if it adds to the status and the type."""
    is_more = re.fullmatch(r"[a-z][a-z0-9_.-]*", found.code) and found.code not in {found.type, INVALID}
    return found.code if is_more else None


def _read(body: Any) -> _ErrorObject:
    """The error object of an answer; some servers send it without `error` around it, some send text."""
    if not isinstance(body, dict):
        return _ErrorObject(message=_text(body))
    inner = body.get("error") or body
    if not isinstance(inner, dict):
        return _ErrorObject(message=_text(inner), type=_text(body.get("error_type")))
    code = inner.get("code")
    metadata = inner.get("metadata")
    numbers = (code, inner.get("status"), inner.get("status_code"), inner.get("http_status_code"))
    return _ErrorObject(
        message=_text(inner.get("message") or inner.get("detail") or inner.get("msg")),
        type=_text(inner.get("type")),
        param=_text(inner.get("param")) or None,
        code="" if _status(code) else _text(code),
        status=next(filter(None, map(_status, numbers)), None),
        has_reasons=isinstance(metadata, dict) and bool(metadata.get("reasons")),
        tokens=_counts(inner.get("n_prompt_tokens"), inner.get("n_ctx")),
    )


def _text(value: Any) -> str:
    """Text of an upstream, cut to MESSAGE_CHARS_MAX; LiteLLM writes None as a string."""
    if value is None or value == "None":
        return ""
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return text[:MESSAGE_CHARS_MAX]


def _status(value: Any) -> int | None:
    """A failure's HTTP status, from a number or a string of digits."""
    if isinstance(value, str) and re.fullmatch("[45][0-9][0-9]", value):
        return int(value)
    return value if type(value) is int and 400 <= value < 600 else None


def _retry_after(value: str) -> str | None:
    """The seconds of a Retry-After, which has a number or a time; None for anything else. It is sent to our client."""
    if re.fullmatch(r"[0-9]{1,9}", value):
        return value
    try:
        at = parsedate_to_datetime(value)
        return str(max(0, math.ceil(at.timestamp() - time.time())))
    except (ValueError, OverflowError, OSError):
        return None
