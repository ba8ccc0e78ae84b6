"""The one log line about a run's end: what was asked of whom, how it ended, what it took."""

import re

import structlog

from app.runs.recorder import Recorder
from app.wire.resources import Response

log = structlog.get_logger()

MODEL_CHARS_MAX = 100
"""Of a model's name. A name that no model has may be anything that a client has written, and is not logged at all."""

_CODE = re.compile(r"[a-z_]{1,64}")


def log_ended(response: Response, recorder: Recorder, *, attempts: int = 1) -> None:
    """Log that a response has ended; `attempts` counts the owners that a background run has had."""
    error, incomplete, usage = response.error, response.incomplete_details, response.usage
    log.info(
        "A response has ended.",
        action="run_ended",
        status=response.status,
        model=None if error and error.code == "model_not_found" else response.model[:MODEL_CHARS_MAX],
        upstream=recorder.upstream,
        error=error.code if error and _CODE.fullmatch(error.code) else error and "other",
        reason=incomplete.reason if incomplete else None,
        input_tokens=usage.input_tokens if usage else None,
        output_tokens=usage.output_tokens if usage else None,
        duration_s=round(recorder.duration_s, 3),
        attempts=attempts,
    )
