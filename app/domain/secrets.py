"""The secrets of a background run: sealed while it waits in a table, since no table may hold them in plain."""

import msgspec
from msgspec import Struct

from app.domain.sealed import Seal
from app.errors import ServerError
from app.wire.requests import ToolSecrets


class Secrets(Struct, frozen=True):
    """What a run needs to know."""

    key: str | None = None
    """The caller's own, for the upstream."""
    tools: dict[str, ToolSecrets] = {}
    """Those of MCP servers, by label."""


def seal_secrets(seal: Seal, secrets: Secrets) -> str | None:
    """The sealed text; None if there is nothing to seal."""
    return seal.close(msgspec.json.encode(secrets).decode()) if secrets.key or secrets.tools else None


def open_secrets(seal: Seal, sealed: str | None) -> Secrets:
    """The secrets of a sealed text. Raises ServerError if it was sealed with another key."""
    if sealed is None:
        return Secrets()
    opened = seal.open(sealed)
    if opened is None:
        raise ServerError("The secrets of this response can't be opened: the server's secret key has changed.")
    return msgspec.json.decode(opened, type=Secrets)
