"""The server-run tools of one run: listing them, calling them.

Nothing here raises for what a tool server does: a server that can't be listed is an error of its list, a call that fails is
an answer that says so, for the model to read.
"""

import asyncio
import hashlib
import time

import structlog
from msgspec import UNSET

from app.domain.calls import PendingCall, arguments_for, container_of, hosted_call, mcp_call
from app.domain.hosted import container_named
from app.domain.rights import tenant_of
from app.domain.toolbox import ByHost, ServerCall
from app.domain.tools.answers import INVALID_PARAMS, Answer, failure, not_json
from app.ids import NewId, new_id
from app.outbound.guard import Guard
from app.outbound.masking import Mask
from app.outbound.mcp import Listed, ToolFailure, ToolPrograms, ToolServer, ToolSessions
from app.runs.plan import RunPlan
from app.settings import Settings
from app.wire.items import CallError, McpCall
from app.wire.tools import ListedTool

log = structlog.get_logger()

UNAVAILABLE = -32601
"""JSON-RPC's code for what can't be called."""

REQUEST_TIMEOUT = -32001
"""MCP's code for what took too long."""


class Tools:
    """The tools that this server runs for one response; `close` it."""

    def __init__(self, plan: RunPlan, guard: Guard, programs: ToolPrograms, settings: Settings) -> None:
        hosting = {route.server for route in plan.hosted.values()}
        servers = (*plan.servers.values(), *(plan.tool_servers[name] for name in sorted(hosting)))
        mask = Mask(secret for server in servers for secret in server.secrets)
        self._plan, self._sessions = plan, ToolSessions(guard, settings, mask, programs, tenant=plan.tenant_id)
        self._arguments_bytes_max = settings.tool_arguments_bytes_max
        self._sees_images = any(upstream.dialect.tool_images for upstream, _ in plan.routes)
        self._places = asyncio.Semaphore(settings.tool_calls_at_once_max)
        used = [container for item in plan.context.items if (container := container_of(item))]
        self._container = used[-1] if used else new_id("cntr")
        """Where code runs, unless its tool's declaration names another: where it ran last, or somewhere new."""

    async def close(self) -> None:
        """Close every session, after the run has ended: servers may be slow. A cancellation, as by a lost lease, does not break
        this off."""
        await asyncio.shield(self._sessions.close())

    async def list(self, label: str) -> tuple[list[ListedTool], str | None]:
        """The tools of a declared server; or none, and why."""
        server = self._plan.servers[label]
        try:
            return [_listed(tool) for tool in await self._sessions.list_tools(server)], None
        except ToolFailure as error:
            log.warning(
                "A tool server can't be listed.", action="tools_unlisted", label=label, kind=error.kind, code=error.code
            )
            return [], error.message

    def pending(self, call: ServerCall, arguments: str, ids: NewId) -> PendingCall:
        """A call of the model, before it is sent."""
        if isinstance(call.by, ByHost):
            container = container_named(call.by.declaration) or self._container
            return hosted_call(ids, call.by, self._plan.hosted[call.by.kind], arguments, container)
        return mcp_call(ids, call.by.label, call.name, arguments)

    async def answer(self, call: PendingCall, timeout_s: float | None = None) -> tuple[Answer, float]:
        """Make a call, once, and break it off after so many seconds; and how long it has taken."""
        async with self._places:
            begun = time.monotonic()
            try:
                async with asyncio.timeout(timeout_s):
                    answer = await self._answer(call)
            except TimeoutError:
                assert timeout_s is not None
                why = f"The call was broken off after {timeout_s:.3g} s: the run's tool_seconds are used up."
                answer = failure("mcp_protocol_error", REQUEST_TIMEOUT, why)
            return answer, time.monotonic() - begun

    async def _answer(self, call: PendingCall) -> Answer:
        try:
            return await self._send(call)
        except ToolFailure as error:
            log.warning(
                "A tool call failed.",
                action="tool_call_failed",
                call=call.item.id,
                kind=error.kind,
                code=error.code,
            )
            return failure(error.kind, error.code, error.message)

    async def _send(self, call: PendingCall) -> Answer:
        if len(call.arguments.encode()) > self._arguments_bytes_max:
            why = f"The arguments are longer than {self._arguments_bytes_max} bytes."
            return failure("mcp_protocol_error", INVALID_PARAMS, why)
        server, name, arguments = self._addressed(call)
        if arguments is None:
            return not_json()
        result = await self._sessions.call(server, name, arguments, call_id=call.item.id)
        error = None
        if result.is_error:
            content = [{"type": "text", "text": result.text}]
            error = CallError(type="mcp_tool_execution_error", content=content)
        images = result.images if self._sees_images or call.by else ()
        return Answer(result.text, result.structured, images, error)

    def _addressed(self, call: PendingCall) -> tuple[ToolServer, str, dict[str, object] | None]:
        if isinstance(call.item, McpCall):
            return self._plan.servers[call.item.server_label], call.item.name, call.given
        route = call.route
        assert route is not None
        arguments = arguments_for(
            call, tenant=tenant_of(self._plan.tenant_id), container=_private(self._plan, call.container)
        )
        return self._plan.tool_servers[route.server], route.tool, arguments


def unavailable(name: str) -> Answer:
    """The answer of an approved call whose tool is not there any more."""
    return failure("mcp_protocol_error", UNAVAILABLE, f"There is no tool named '{name}' that may be called now.")


def _listed(tool: Listed) -> ListedTool:
    return ListedTool(
        name=tool.name,
        description=tool.description or UNSET,
        input_schema=tool.input_schema,
        annotations=tool.annotations or UNSET,
    )


def _private(plan: RunPlan, container: str) -> str:
    """A container's name for its tool server: no tenant can name another's. Empty for a call that needs none."""
    return container and hashlib.sha256(f"{plan.tenant_id}\0{container}".encode()).hexdigest()[:32]
