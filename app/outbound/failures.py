"""What an upstream says of its failures, by a status or inside its stream → our error.

Engines have types and codes of their own, write statuses where codes belong, and have a message for everything. Clients know
the API's: what they can do about a failure is read from its status and its code.
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
    UpstreamBusy,
    UpstreamGarbled,
    UpstreamRefused,
    UpstreamUnavailable,
)
from app.outbound.masking import Mask

CONTEXT_TOO_LONG = "context_length_exceeded"
MODEL_NOT_FOUND = "model_not_found"
NO_CREDIT = "insufficient_quota"
INVALID = "invalid_request_error"

MESSAGE_CHARS_MAX = 1000
"""An upstream's own words in an error; longer ones are cut."""

NO_JSON = (ValueError, RecursionError)
"""What decoding raises for bytes that are no JSON of the wanted form, UTF-8, or nested by the thousand."""

_TYPES = frozenset({INVALID, NO_CREDIT, "image_generation_user_error"})
"""The API's own for what is not to be sent again."""

_STATUSES = {
    "badrequesterror": 400,
    "invalid_request_error": 400,
    "exceed_context_size_error": 400,
    CONTEXT_TOO_LONG: 400,
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
"""What types and codes mean where no status is given."""

_TOO_LONG = re.compile(
    r"maximum (context|model) length|context (length|window|size)|exceeds? the available context|ContextWindowExceeded"
    r"|prompt is too long|longer than the max|exceeds the maximum number of tokens|`inputs` tokens \+",
    re.IGNORECASE,
)
_TOO_LONG_TYPES = frozenset({CONTEXT_TOO_LONG, "exceed_context_size_error", "contextwindowexceedederror"})
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
"""What a model can't read, it can't read the next time either; llama.cpp says so with a 500."""


class KeyRefused(UpstreamUnavailable):
    """The upstream does not accept this server's key, however often one asks."""

    is_final = True


class Asked(Struct, frozen=True):
    """Who has failed: the upstream's name, and whether it was asked with the caller's own key."""

    upstream: str
    passes_caller: bool
    mask: Mask


class _Said(Struct, frozen=True):
    """An upstream's error object, in any of the shapes seen."""

    message: str = ""
    type: str = ""
    param: str | None = None
    code: str = ""
    status: int | None = None
    has_reasons: bool = False
    """It names what was wrong with the content, as OpenRouter's moderation does."""


def refused(status: int, headers: Mapping[str, str], raw: bytes, asked: Asked) -> ApiError:
    """Our error for an answer with this status, which is no success."""
    if status < 400:
        return UpstreamGarbled(
            f"Upstream '{asked.upstream}' answered with status {status}, and redirects are not followed."
        )
    try:
        body = asked.mask.json(msgspec.json.decode(raw))
    except NO_JSON:
        body = asked.mask.text(raw.decode(errors="replace").strip())
    error = _error(status, _read(body), asked, f"The upstream failed with status {status}")
    after = _retry_after(headers.get("retry-after", ""))
    if after and isinstance(error, UpstreamBusy):
        error.headers["Retry-After"] = after
    return error


def failed_in_stream(raw: msgspec.Raw, asked: Asked) -> ApiError:
    """Our error for an error object in the place of a chunk."""
    try:
        said = _read(asked.mask.json(msgspec.json.decode(raw)))
    except NO_JSON:
        said = _Said()
    status = said.status or _STATUSES.get(said.code.lower()) or _STATUSES.get(said.type.lower()) or 500
    return _error(status, said, asked, "The upstream failed")


def _error(status: int, said: _Said, asked: Asked, failed: str) -> ApiError:
    if _refuses_key(status, said) and not asked.passes_caller:
        return KeyRefused(f"Upstream '{asked.upstream}' does not accept this server's key.")
    if status == 401:
        return AuthenticationFailed(said.message or "The upstream does not accept the key.")
    if status == 429:
        code = NO_CREDIT if NO_CREDIT in {said.code, said.type} else None
        return UpstreamBusy(said.message or "The upstream is busy.", code=code)
    if _is_too_long(status, said):
        return UpstreamRefused(said.message or "The context is too long.", param="input", code=CONTEXT_TOO_LONG)
    if status < 502 and _NO_MEDIA.search(said.message):
        return UpstreamRefused(said.message, param=said.param or "input", code=_own_code(said))
    if status >= 500 and status != 501:
        return UpstreamUnavailable(f"{failed}: {said.message or 'it gave no reason'}", code=_own_code(said))
    code = _own_code(said)
    if code is None and status in {400, 404} and _NO_MODEL.search(said.message):
        code = MODEL_NOT_FOUND
    return UpstreamRefused(
        said.message or f"The upstream refused the request with status {status}.",
        status=status if status < 500 else 400,
        type=said.type if said.type in _TYPES else INVALID,
        param=said.param or ("model" if code == MODEL_NOT_FOUND else None),
        code=code or (NO_CREDIT if status == 402 else None),
    )


def _refuses_key(status: int, said: _Said) -> bool:
    """A 403 may as well be about the model, or about what was asked; then it says so."""
    if status != 403 or said.has_reasons:
        return status == 401
    code = _own_code(said)
    return code is None or _STATUSES.get(code) in {401, 403}


def _is_too_long(status: int, said: _Said) -> bool:
    if _TOO_LONG_TYPES & {said.code.lower(), said.type.lower()}:
        return True
    return status in _TOO_LONG_STATUSES and bool(_TOO_LONG.search(said.message))


def _own_code(said: _Said) -> str | None:
    """The upstream's code, as far as it says more than a status or a type does."""
    is_more = re.fullmatch(r"[a-z][a-z0-9_.-]*", said.code) and said.code not in {said.type, INVALID}
    return said.code if is_more else None


def _read(body: Any) -> _Said:
    """The error of an upstream's answer; some servers send it bare, some a text."""
    if not isinstance(body, dict):
        return _Said(message=_words(body))
    inner = body.get("error") or body
    if not isinstance(inner, dict):
        return _Said(message=_words(inner), type=_words(body.get("error_type")))
    code = inner.get("code")
    metadata = inner.get("metadata")
    numbers = (code, inner.get("status"), inner.get("status_code"), inner.get("http_status_code"))
    return _Said(
        message=_words(inner.get("message") or inner.get("detail") or inner.get("msg")),
        type=_words(inner.get("type")),
        param=_words(inner.get("param")) or None,
        code="" if _status(code) else _words(code),
        status=next(filter(None, map(_status, numbers)), None),
        has_reasons=isinstance(metadata, dict) and bool(metadata.get("reasons")),
    )


def _words(value: Any) -> str:
    """An upstream's words, in bearable length; LiteLLM writes None as a word."""
    if value is None or value == "None":
        return ""
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return text[:MESSAGE_CHARS_MAX]


def _status(value: Any) -> int | None:
    """A failure's HTTP status, as a number or in digits."""
    if isinstance(value, str) and re.fullmatch("[45][0-9][0-9]", value):
        return int(value)
    return value if type(value) is int and 400 <= value < 600 else None


def _retry_after(said: str) -> str | None:
    """The seconds of a Retry-After, as a number or as a time; None for what is neither. It becomes a header of ours."""
    if re.fullmatch(r"[0-9]{1,9}", said):
        return said
    try:
        at = parsedate_to_datetime(said)
        return str(max(0, math.ceil(at.timestamp() - time.time())))
    except (ValueError, OverflowError, OSError):
        return None
