"""The tool servers that a request declares or needs."""

from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from msgspec.structs import replace

from app.domain.client_tools import client_tool_of
from app.domain.hosted import names_data
from app.domain.tools.table import kind_of, missing_server
from app.errors import InvalidParameter, UnsupportedParameter
from app.outbound.catalog import Catalog
from app.outbound.toolserver import ToolServer
from app.settings import Settings
from app.wire.requests import CreateResponse
from app.wire.tools import AnyTool, HostedTool, McpTool


class DeclaredTools:
    """Checks declared tools against the operator's catalog and limits."""

    def __init__(self, settings: Settings, catalog: Catalog) -> None:
        self._settings, self._catalog = settings, catalog
        self.operators: Mapping[str, ToolServer] = {
            name: server for name in catalog.tool_servers if (server := catalog.tool_server(name))
        }
        """The operator's tool servers, by name."""

    def servers(self, request: CreateResponse) -> dict[str, ToolServer]:
        """The declared MCP servers by label. Raises InvalidParameter for one without a URL whose name is not known here."""
        self._refuse_long_headers(request.tools)
        servers: dict[str, ToolServer] = {}
        for index, tool in enumerate(request.tools):
            if isinstance(tool, McpTool):
                server = self._server(tool, f"tools[{index}]")
                if request.agent:  # what it has set its users do not know: that is secret, whatever it looks like
                    secret = frozenset(tool.headers or ())
                    server = replace(server, secret_headers=secret, is_url_secret=bool(tool.server_url))
                servers[tool.server_label] = server
        if len(servers) > self._settings.tool_servers_max:
            raise InvalidParameter(
                f"'tools' declares more than {self._settings.tool_servers_max} MCP servers.", param="tools"
            )
        return servers

    def _server(self, tool: McpTool, at: str) -> ToolServer:
        server = ToolServer(label=tool.server_label, url=tool.server_url or "")
        if not tool.server_url:
            known = self._catalog.nameable_server(tool.server_label)
            if known is None:
                raise InvalidParameter(
                    f"'{at}.server_url' is missing, and this server has no tool server '{tool.server_label}' "
                    "that requests may name.",
                    param=f"{at}.server_url",
                    code="missing_required_parameter",
                )
            server = known
        elif not _is_http(tool.server_url):
            raise InvalidParameter(f"'{at}.server_url' must be an http or https URL.", param=f"{at}.server_url")
        return server.sent(tool.authorization or "", tool.headers or {})

    def _refuse_long_headers(self, tools: Sequence[AnyTool]) -> None:
        """Limit headers: they are sent with every request, and masked in every answer."""
        most, sent = self._settings.tool_headers_bytes_max, 0
        for index, tool in enumerate(tools):
            if not isinstance(tool, McpTool):
                continue
            at, headers = f"tools[{index}].headers", tool.headers or {}
            if len(headers) > self._settings.tool_headers_max:
                raise InvalidParameter(f"'{at}' has more than {self._settings.tool_headers_max} headers.", param=at)
            sent += sum(len(name.encode()) + len(value.encode()) for name, value in headers.items())
            if sent <= most:
                sent += len((tool.authorization or "").encode())
                at = f"tools[{index}].authorization"
            if sent > most:
                raise InvalidParameter(
                    f"With '{at}' the headers of all MCP servers have more than {most} bytes.", param=at
                )

    def refuse_hosted(self, request: CreateResponse) -> None:
        """Raises InvalidParameter for a hosted tool that the answer depends on and that has no tool server; UnsupportedParameter
        for what restricts one and its server would not receive."""
        for index, tool in enumerate(request.tools):
            if not isinstance(tool, HostedTool):
                continue
            kind = kind_of(tool)
            route = self._catalog.hosted.get(kind) if kind else None
            if kind and route is None and self._depends_on(tool, request):
                raise missing_server(tool.type, f"tools[{index}].type")
            if route and (key := route.drops(tool.fields)):
                raise UnsupportedParameter(
                    f"'{key}' of tools of type '{tool.type}' is not supported by this server.",
                    param=f"tools[{index}].{key}",
                )

    def _depends_on(self, tool: HostedTool, request: CreateResponse) -> bool:
        """Whether a hosted tool without a tool server is refused; otherwise it is an offer, which is left out."""
        if self._catalog.refuse_missing_tools is not None:
            return self._catalog.refuse_missing_tools
        return names_data(tool.fields) or not any(map(self._is_offered, request.tools))

    def _is_offered(self, tool: AnyTool) -> bool:
        return not isinstance(tool, HostedTool) or bool(client_tool_of(tool)) or kind_of(tool) in self._catalog.hosted


def _is_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return url.isprintable() and parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
