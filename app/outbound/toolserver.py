"""Tool servers: how to reach one, and how it fails."""

import re
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, Literal

import httpx2
import mcp_types
import msgspec
import structlog
from mcp.shared.exceptions import MCPError
from msgspec import Struct
from msgspec.structs import replace

from app.outbound.guard import OutboundRefused
from app.outbound.masking import KEY_NAME, WORDS, Mask, is_secret, secrets_of

log = structlog.get_logger()

MESSAGE_CHARS_MAX = 1000
"""Limit of a server's message in a failure; longer ones are cut."""

PUBLIC_VARIABLES = re.compile(
    r".*(PATH|DIR|DIRECTORY|ROOT|HOME|FILE|HOST|PORT|LANG|LEVEL|MODE|TZ)|LC_.*", re.IGNORECASE
)
"""Variables of a program's environment that are no secrets: results may name its files."""

KEY_IN_URL = re.compile(r"(?=.*\d)(?=.*[A-Za-z]).{12,}|.{32,}")
"""A part of a URL's path or query that is probably a secret."""

CODE_MAX = 2**31
"""JSON-RPC's error codes have 32 bits."""

TRANSPORT_HEADERS = frozenset(
    "accept accept-encoding connection content-length content-type expect host keep-alive last-event-id "
    "mcp-protocol-version mcp-session-id te trailer transfer-encoding upgrade".split()
)
"""Headers that the transport sets; those of a tool's `headers` are ignored."""


NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
VALUE = re.compile(r"[\t\x20-\x7e]*")
"""The characters that a header may have."""


Shared = Literal["all", "tenant", "run"]
"""Which runs share a program of a server: all, those of one tenant, or none."""


class ToolServer(Struct, frozen=True):
    """How to reach a tool server."""

    label: str
    url: str = ""  # http(s), or
    command: tuple[str, ...] = ()  # a program, from the operator's catalog only, with
    environment: Mapping[str, str] = {}
    headers: Mapping[str, str] = {}
    authorization: str = ""  # a bearer token, unless it names a scheme
    trusted: bool = False  # the operator's own: no guard
    shared: Shared = "tenant"  # which runs share a program
    secret_headers: frozenset[str] = frozenset()  # those whose values are secret, whatever they look like
    is_url_secret: bool = False  # all of it but the origin
    fault: str = ""  # why it can't be called

    def __repr__(self) -> str:
        return f"ToolServer({self.label!r})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("label", self.label)]

    @property
    def key(self) -> bytes:
        """The same for equal servers."""
        return msgspec.json.encode(self, order="sorted")

    def sent(self, authorization: str, headers: Mapping[str, str]) -> "ToolServer":
        """The server, as it is called with these. What the operator has set stays."""
        fixed = {name.lower() for name in self.headers}
        others = {name: value for name, value in headers.items() if name.lower() not in fixed}
        return replace(
            self,
            headers={**others, **self.headers},
            authorization=self.authorization or ("" if "authorization" in fixed else authorization),
        )

    @property
    def request_headers(self) -> dict[str, str]:
        """The headers of every request. Raises ToolFailure for a name or a value with other characters."""
        headers = {name: value for name, value in self.headers.items() if name.lower() not in TRANSPORT_HEADERS}
        given = self.authorization.strip()
        if given:
            headers = {name: value for name, value in headers.items() if name.lower() != "authorization"}
            headers["Authorization"] = given if " " in given else f"Bearer {given}"
        if not all(NAME.fullmatch(name) and VALUE.fullmatch(value) for name, value in headers.items()):
            raise ToolFailure("http_error", 400, f"A header for '{self.label}' can't be sent as it stands.")
        return {**headers, "Accept-Encoding": "identity"}

    @property
    def secrets(self) -> Iterator[str]:
        """The secrets that it is sent."""
        headers = {name: value for name, value in self.headers.items() if name.lower() not in TRANSPORT_HEADERS}
        yield from secrets_of(headers, always=self.secret_headers)
        yield from secrets_of({"Authorization": self.authorization})
        for name, value in self.environment.items():
            if is_secret(name, value) and not PUBLIC_VARIABLES.fullmatch(name):
                yield value
        try:
            url = httpx2.URL(self.url)
        except httpx2.InvalidURL:
            return
        yield url.userinfo.decode()
        yield url.password
        if self.is_url_secret:  # words of its path alone may stand in any answer
            yield url.raw_path.decode()
            yield url.path
            yield from url.params.values()
        for name, value in chain(url.params.multi_items(), (("", part) for part in url.path.split("/"))):
            if KEY_NAME.search(name) or (KEY_IN_URL.fullmatch(value) and not WORDS.fullmatch(value)):
                yield value


def http_url(text: str) -> httpx2.URL | None:
    """An http or https URL; None for what is none."""
    try:
        url = httpx2.URL(text)
    except (httpx2.InvalidURL, ValueError):
        return None
    return url if url.scheme in {"http", "https"} and url.host and url.port != 0 else None


class ToolFailure(Exception):
    """A tool server could not be listed or called; clients may see the message once it is `masked`.

    `http_error` has an HTTP status as its code: the server's, or 403 where the guard refuses, 502 where the server can't be
    reached or closes the connection, 504 where it is too slow. `mcp_protocol_error` has a JSON-RPC code.
    """

    def __init__(self, kind: Literal["http_error", "mcp_protocol_error"], code: int, message: str) -> None:
        super().__init__(message)
        self.kind: Literal["http_error", "mcp_protocol_error"] = kind
        self.code = code
        self.message = message

    def masked(self, mask: Mask) -> "ToolFailure":
        """With secrets masked, and cut to MESSAGE_CHARS_MAX."""
        text = mask.text(self.message)
        cut = text if len(text) <= MESSAGE_CHARS_MAX else f"{text[:MESSAGE_CHARS_MAX]}…"
        return ToolFailure(self.kind, self.code, cut)


def failure_of(error: BaseException, server: ToolServer) -> ToolFailure:
    """The failure to show to a client; it quotes only errors of the server or the guard."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    match error:
        case ToolFailure():
            return error
        case MCPError():
            return _json_rpc_failure(error, server)
        case OutboundRefused():
            return ToolFailure("http_error", 403, str(error))
        case httpx2.HTTPStatusError():
            return refused(error.response.status_code, server)
        case httpx2.HTTPError() | httpx2.InvalidURL():
            return _unreachable(error, server)
        case OSError() if server.command:
            why = f"The program of the tool server '{server.label}' can't be started."
            return ToolFailure("mcp_protocol_error", mcp_types.CONNECTION_CLOSED, why)
    log.warning("A tool server does not speak MCP.", action="tool_server_garbled", error=type(error).__name__)
    return garbled(server, "it does not speak MCP as we know it")


def _json_rpc_failure(error: MCPError, server: ToolServer) -> ToolFailure:
    """A JSON-RPC error, of the server or of the SDK."""
    match error.code, error.message:
        case mcp_types.PARSE_ERROR, _:
            return garbled(server, "what it sends is not JSON-RPC")
        case mcp_types.CONNECTION_CLOSED, "Connection closed":  # the SDK's message
            return closed(server)
    code = error.code if abs(error.code) <= CODE_MAX else mcp_types.INTERNAL_ERROR
    return ToolFailure("mcp_protocol_error", code, error.message)


def _unreachable(error: Exception, server: ToolServer) -> ToolFailure:
    who = f"The tool server '{server.label}'"
    match error:
        case httpx2.TimeoutException():
            return ToolFailure("http_error", 504, f"{who} did not answer in time.")
        case httpx2.ConnectError() | httpx2.UnsupportedProtocol() | httpx2.InvalidURL():
            return ToolFailure("http_error", 502, f"{who} can't be reached.")
    return ToolFailure("http_error", 502, f"{who} broke off the connection.")


def lists_too_much(server: ToolServer, most: str) -> ToolFailure:
    """Its list of tools is over a limit."""
    return ToolFailure(
        "mcp_protocol_error", mcp_types.INVALID_REQUEST, f"The tool server '{server.label}' lists more than {most}."
    )


def closed(server: ToolServer) -> ToolFailure:
    """Its session has ended."""
    return ToolFailure(
        "mcp_protocol_error", mcp_types.CONNECTION_CLOSED, f"The session with the tool server '{server.label}' is over."
    )


def busy(server: ToolServer, programs_max: int) -> ToolFailure:
    """No program of it was free in time."""
    return ToolFailure(
        "http_error", 503, f"All {programs_max} programs of the tool server '{server.label}' are in use."
    )


def refused(status: int, server: ToolServer) -> ToolFailure:
    """It answered with an HTTP error."""
    return ToolFailure("http_error", status, f"The tool server '{server.label}' answered with HTTP status {status}.")


def garbled(server: ToolServer, why: str) -> ToolFailure:
    """Its answer is not MCP."""
    return ToolFailure(
        "mcp_protocol_error", mcp_types.PARSE_ERROR, f"The tool server '{server.label}' is not understood: {why}."
    )


def too_slow(server: ToolServer, what: str, timeout_s: float) -> ToolFailure:
    """It missed a deadline."""
    return ToolFailure(
        "mcp_protocol_error",
        mcp_types.REQUEST_TIMEOUT,
        f"The tool server '{server.label}' did not answer within {timeout_s:g} s ({what}).",
    )
