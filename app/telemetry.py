"""Logging by structlog: a sentence for people, `action` for programs, ids from context variables.

Lines are plain text on a terminal, JSON elsewhere. Prompts, outputs and keys are never logged. What an exception or a
library's record quotes is unknown: the log has the classes, codes and places of exceptions, and the places of records.
"""

import asyncio
import errno
import logging
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import stamina.instrumentation
import structlog
from stamina.instrumentation import RetryDetails

log = structlog.get_logger()

NOISY = ("mcp", "client", "httpx2", "httpcore2")
"""Loggers of the libraries that call tool servers; Reprise logs their faults itself ("client" is the MCP session's)."""

PLAIN_SPOKEN = frozenset({"uvicorn"})
"""Libraries whose messages quote nothing."""

RETRIED = {
    "app.outbound.upstream.Upstream._open": "an upstream's answer",
    "<context block>": "a write to the database",
    "env_py.run_migrations": "the migrations",
}
"""The retry library's name of an operation → what it is."""

CAUSES_MAX = 10


def start_logging(level: str) -> None:
    """Log to standard error from `level` on; warnings of libraries included."""
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: list[structlog.typing.Processor] = [
        structlog.processors.ExceptionRenderer(_traced),
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
        if sys.stderr.isatty()
        else structlog.processors.JSONRenderer(),
    ]
    structlog.configure(
        processors=[*shared, *renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, _place_only],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *renderer,
            ],
        )
    )
    logging.basicConfig(level=max(logging.WARNING, logging.getLevelName(level.upper())), handlers=[handler], force=True)
    stamina.instrumentation.set_on_retry_hooks([_log_retry])
    sys.unraisablehook = _log_unraisable


def describe(error: BaseException | None) -> str:
    """An exception with its causes, without their messages."""
    return " < ".join(_name(one) for one in _causes(error))


def log_loop_fault(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """The event loop's exception handler: the default one prints arguments of callbacks and results of tasks."""
    error = context.get("exception")
    log.error("A task failed because of a bug." if error else context["message"], action="task_failed", exc_info=error)


def _log_unraisable(fault: "sys.UnraisableHookArgs") -> None:
    log.error("A failure was ignored by Python.", action="unraisable", exc_info=fault.exc_value)


def _log_retry(details: RetryDetails) -> None:
    """Instead of the retry library's hook, which prints arguments: whole conversations, callers' keys."""
    log.warning(
        "An attempt failed; it will be retried.",
        action="retry",
        what=RETRIED.get(details.name, details.name),
        attempt=details.retry_num,
        wait_s=round(details.wait_for, 2),
        error=describe(details.caused_by),
    )


def _place_only(
    _logger: Any, _method: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:  # a processor
    record: logging.LogRecord = event["_record"]
    event["logger"] = record.name
    if record.name.partition(".")[0] not in PLAIN_SPOKEN:
        event["event"] = f"A library logged a message in {record.module}.py, line {record.lineno}."
    return event


def _traced(exc_info: structlog.typing.ExcInfo) -> str:
    """Where an exception and its causes were raised."""
    return "\nbecause of\n".join(
        f"{''.join(traceback.format_tb(error.__traceback__))}{_name(error)}" for error in _causes(exc_info[1])
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The exception, its cause, the cause of that, and so on; of a group the first member."""
    for _ in range(CAUSES_MAX):
        if error is None:
            return
        yield error
        if isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        else:
            error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _name(error: BaseException) -> str:
    """Its class, and a code that distinguishes faults of one class: errno, SQLSTATE, or the upstream's name."""
    code = (errno.errorcode.get(error.errno or 0) if isinstance(error, OSError) else None) or next(
        (found for name in ("sqlstate", "upstream") if (found := getattr(error, name, None))), None
    )
    return f"{type(error).__name__}({code})" if code else type(error).__name__
