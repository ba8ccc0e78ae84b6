"""Logging, wired from structlog: a sentence for people, `action` for programs, ids from context variables.

On a terminal lines are for reading, elsewhere they are JSON. Prompts, outputs and keys are never logged.
"""

import logging
import sys

import structlog

TELLTALES = ("mcp", "client", "httpx2", "httpcore2")
"""Loggers of libraries that call tool servers; they print messages, results and headers ("client" is the MCP session's)."""


def start_logging(level: str) -> None:
    """Log to standard error from `level` on; other libraries' warnings included, unless they would tell secrets."""
    for name in TELLTALES:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    readable = sys.stderr.isatty()
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: list[structlog.typing.Processor] = (
        [
            structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
        ]  # others print local variables
        if readable
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=[*shared, *renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *renderer,
            ],
        )
    )
    logging.basicConfig(level=max(logging.WARNING, logging.getLevelName(level.upper())), handlers=[handler], force=True)
