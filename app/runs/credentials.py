"""Stored credentials of tool servers, for the runs that may use them.

They are looked up when a run is made, in the background by each of its owners, and are in no plan that waits: so a credential that is
deleted or replaced meanwhile is used no more, and no copy of a secret is stored with a run.
"""

from msgspec import Struct
from msgspec.structs import replace

from app.domain.rights import tenant_of, user_of
from app.domain.sealed import Seal
from app.domain.tool_credentials import open_secret
from app.errors import InvalidParameter
from app.outbound.credentials import size_of, unauthorized
from app.outbound.toolserver import ToolServer
from app.runs.plan import RunPlan
from app.settings import Settings
from app.storage import tool_credentials
from app.storage.database import Database
from app.wire.requests import CreateResponse
from app.wire.tools import McpTool


class Credentials(Struct, frozen=True):
    """Looks up what is stored for the servers of runs."""

    settings: Settings
    database: Database
    seal: Seal

    async def added_to(self, plan: RunPlan) -> RunPlan:
        """The plan, with the credentials for those servers for which its request has none: at most one read. Raises InvalidParameter if
        they are too long together, DatabaseUnavailable."""
        wanted = unauthorized(plan.request.tools, plan.servers) if plan.request.generate else {}
        if not wanted:
            return plan
        tenant, user = tenant_of(plan.tenant_id), user_of(plan.tenant_id)
        async with self.database.autocommit() as tx:
            found = await tool_credentials.find(tx, tenant, user, plan.key_id or "", sorted(set(wanted.values())))
        if not found:
            return plan
        seal, servers = self.seal.of(tenant), dict(plan.servers)
        left = self.settings.tool_headers_bytes_max - _declared_bytes(plan.request)
        for label, server in wanted.items():
            if (one := found.get(server)) is None:
                continue
            secret = open_secret(seal, one.server, one.holder, one.sealed)
            if secret is None:
                servers[label] = replace(servers[label], fault=_unopened(servers[label]))
                continue
            left -= size_of(secret)
            servers[label] = replace(
                servers[label].sent(secret.authorization, secret.headers), secret_headers=frozenset(secret.headers)
            )
        if left < 0:
            raise InvalidParameter(
                f"With their stored credentials the headers of all MCP servers have more than "
                f"{self.settings.tool_headers_bytes_max} bytes.",
                param="tools",
            )
        return replace(plan, servers=servers)


def _declared_bytes(request: CreateResponse) -> int:
    """The bytes of the headers that a request declares."""
    tools = [tool for tool in request.tools if isinstance(tool, McpTool)]
    texts = [tool.authorization or "" for tool in tools]
    texts += [text for tool in tools for pair in (tool.headers or {}).items() for text in pair]
    return sum(len(text.encode()) for text in texts)


def _unopened(server: ToolServer) -> str:
    return (
        f"The stored credential of the tool server '{server.label}' can't be opened, because the secret key of this server has changed: "
        "store it again."
    )
