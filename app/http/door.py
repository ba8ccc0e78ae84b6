"""What the connections of a server share: their limits, how many there may be, and whether it is shutting down."""

import contextlib
import resource
from collections.abc import Iterable
from typing import Any

import structlog

from app.settings import Settings

log = structlog.get_logger()

OWN_FILES = 128
"""Open files of a process besides connections and pools: Redis, pipes of tool servers, those of the event loop."""

REFUSED_MAX = 64
"""Refused connections that stay open until their clients have read why; more are aborted at once."""


class Door:
    """One per server."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.connections_max = settings.connections_max
        self.refused = 0
        """Connections that stay open only until their refusal is read."""
        self.closing = False
        """Whether the server is shutting down: then each connection closes with its next reply."""

    def close(self, connections: Iterable[Any]) -> None:
        """The server shuts down."""
        self.closing = True
        for connection in connections:
            connection.wind_down()

    def fit_open_files(self) -> None:
        """Raise this process's limit of open files as far as possible, and fit `connections_max` to it: a connection may need
        another one to the upstream, and without free files the server accepts none."""
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(ValueError, OSError):  # macOS' real limit is lower than the one it reports
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if files == resource.RLIM_INFINITY:
            return
        fitting = (files - OWN_FILES - REFUSED_MAX - self.settings.database_pool_size) // 2
        self.connections_max = max(1, min(self.settings.connections_max, fitting))
        if self.connections_max < self.settings.connections_max:
            log.warning(
                "The limit of open files allows fewer connections than REPRISE_CONNECTIONS_MAX.",
                action="connections_limited",
                files=files,
                connections=self.connections_max,
            )
