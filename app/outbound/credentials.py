"""Stored credentials of tool servers: which server one is for, what it may hold, and which declared servers get it."""

from collections.abc import Mapping, Sequence

from app.domain.tool_credentials import Secret
from app.errors import InvalidParameter
from app.outbound.catalog import Catalog
from app.outbound.masking import KEY_NAME, SECRET_CHARS_MIN
from app.outbound.toolserver import NAME, TRANSPORT_HEADERS, VALUE, ToolServer, http_url
from app.settings import Settings
from app.wire.tools import AnyTool, McpTool

URL_RULE = "an http or https URL of an origin and a path, without a user, a query or a fragment"

DEFAULT_PORTS = {"http": 80, "https": 443}


def server_of_url(url: str) -> str:
    """The name under which a server's credentials are stored: its normalized URL. Raises InvalidParameter."""
    parsed = http_url(url)
    if parsed is None or parsed.userinfo or parsed.query or parsed.fragment or "?" in url or "#" in url:
        raise InvalidParameter(f"'server_url' must be {URL_RULE}.", param="server_url")
    return _address(url) or ""


def check_label(label: str, catalog: Catalog, secret: Secret) -> None:
    """Raises InvalidParameter for an operator's tool server that no request may name, that takes no headers, or for which the catalog
    has what this secret would set."""
    known = catalog.nameable_server(label)
    if known is None:
        raise InvalidParameter(
            f"This server has no tool server '{label}' that requests may name.", param="server_label"
        )
    if known.command:
        raise InvalidParameter(
            f"The tool server '{known.label}' is a program, which is sent no headers.", param="server_label"
        )
    fixed = {name.lower() for name in known.headers} | ({"authorization"} if known.authorization else set())
    if secret.authorization and "authorization" in fixed:
        raise InvalidParameter(
            f"The operator has set the authorization of the tool server '{known.label}'.", param="authorization"
        )
    for name in secret.headers:
        if name.lower() in fixed:
            raise InvalidParameter(
                f"The operator has set the header '{name}' of the tool server '{known.label}'.", param="headers"
            )


def checked_secret(authorization: str | None, headers: Mapping[str, str] | None, settings: Settings) -> Secret:
    """What a credential holds. Raises InvalidParameter, which quotes no value."""
    secret = Secret((authorization or "").strip(), dict(headers or {}))
    if not secret.authorization and not secret.headers:
        raise InvalidParameter(
            "A credential needs 'authorization' or 'headers'.",
            param="authorization",
            code="missing_required_parameter",
        )
    if len(secret.headers) > settings.tool_headers_max:
        raise InvalidParameter(f"'headers' has more than {settings.tool_headers_max} headers.", param="headers")
    if size_of(secret) > settings.tool_credential_bytes_max:
        raise InvalidParameter(
            f"The credential has more than {settings.tool_credential_bytes_max} bytes.",
            param="headers" if secret.headers else "authorization",
        )
    if secret.authorization:
        _check_value("authorization", secret.authorization, "authorization")
    names: set[str] = {"authorization"} if secret.authorization else set()
    for name, value in secret.headers.items():
        at = f"headers.{name}" if NAME.fullmatch(name) else "headers"
        if at == "headers":
            raise InvalidParameter("'headers' has a name that no header may have.", param=at)
        if name.lower() in TRANSPORT_HEADERS:
            raise InvalidParameter(f"'{at}' is the connection's own and can't be set.", param=at)
        if name.lower() in names:
            raise InvalidParameter(f"'{at}' is given twice.", param=at)
        names.add(name.lower())
        _check_value(name, value, at)
    return secret


def _check_value(name: str, value: str, at: str) -> None:
    if not VALUE.fullmatch(value):
        raise InvalidParameter(f"'{at}' holds characters that no header may have.", param=at)
    # A shorter one would not be masked where the server echoes it.
    if KEY_NAME.search(name) and len(value.strip().rpartition(" ")[2]) < SECRET_CHARS_MIN:
        raise InvalidParameter(f"'{at}' must have at least {SECRET_CHARS_MIN} characters.", param=at)


def size_of(secret: Secret) -> int:
    """The bytes of a secret, names of headers included."""
    texts = (secret.authorization, *secret.headers.keys(), *secret.headers.values())
    return sum(len(text.encode()) for text in texts)


def unauthorized(tools: Sequence[AnyTool], servers: Mapping[str, ToolServer]) -> dict[str, str]:
    """The declared servers for which the request has neither `authorization` nor headers of its own, by label, and the names under which
    their credentials are stored."""
    found = {}
    for tool in tools:
        if not isinstance(tool, McpTool) or tool.authorization or tool.headers:
            continue
        server = servers[tool.server_label]
        if server.command:
            continue
        name = _address(tool.server_url) if tool.server_url else tool.server_label
        if name:
            found[tool.server_label] = name
    return found


def _address(url: str) -> str | None:
    """Origin and path as they are sent. None for a URL with a user, or of another scheme: it is not called."""
    parsed = http_url(url)
    if parsed is None or parsed.userinfo:
        return None
    # The library leaves a default port where the scheme is in capitals.
    normal = parsed.copy_with(port=None) if parsed.port == DEFAULT_PORTS[parsed.scheme] else parsed
    return f"{normal.scheme}://{normal.netloc.decode()}{normal.raw_path.partition(b'?')[0].decode()}"
