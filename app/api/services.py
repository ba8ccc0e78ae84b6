"""Services that handlers depend on."""

import asyncio
from collections.abc import Mapping
from typing import Any

import structlog
from litestar import Request
from msgspec import Struct

from app.api import queries
from app.api.attempts import FailedAttempts
from app.api.auth import Auth
from app.api.bodies import Bodies
from app.api.connected import while_connected
from app.api.problems import REPLY_HEADERS
from app.domain.rights import logged
from app.domain.sealed import Seal
from app.errors import AuthenticationFailed
from app.outbound.catalog import Catalog
from app.outbound.upstream import Upstream
from app.rooms import Rooms
from app.runs.admission import Admission, Caller
from app.runs.agents import Agents
from app.runs.cancellation import Cancellation
from app.runs.claims import Claims
from app.runs.counting import TokenCounts
from app.runs.following import Following
from app.runs.storage_quota import StorageQuota
from app.settings import Settings
from app.storage.backlog import Backlogs
from app.storage.database import Database
from app.wire.admin import Scope

log = structlog.get_logger()


class Services(Struct, frozen=True):
    """One dependency for all of them: Litestar starts a task for each that can be provided beside another."""

    settings: Settings
    database: Database
    seal: Seal
    catalog: Catalog
    agents: Agents
    upstreams: Mapping[str, Upstream]
    admission: Admission
    counts: TokenCounts
    storage_quota: StorageQuota
    following: Following
    cancellation: Cancellation
    claims: Claims
    backlogs: Backlogs
    bodies: Bodies
    reads: Rooms
    outdated_schemas: frozenset[str]
    auth: Auth
    attempts: FailedAttempts


async def provide_caller(request: Request[Any, Any, Any], services: Services) -> Caller:
    """The caller, which every handler below /v1 depends on: it is known, may call this, and asks for nothing that this does not take."""
    # Not `request.headers`: Litestar keeps what it has parsed as long as the reply takes, which may be long.
    headers = request.scope["headers"]
    try:
        caller = await services.auth.caller(headers, http_version=request.scope["http_version"])
    except AuthenticationFailed as error:
        await _slow_down(request, services.attempts, error)
        raise
    request.scope["state"][REPLY_HEADERS] = caller.reply_headers
    structlog.contextvars.bind_contextvars(**logged(caller.tenant_id, caller.rights.key_id))
    options = request.route_handler.opt
    if scope := scope_of(options, request.method):
        caller.rights.demand_scope(scope, or_admin=bool(options.get("or_admin")))
    queries.refuse_unless_taken(request)
    return caller


async def _slow_down(request: Request[Any, Any, Any], attempts: FailedAttempts, error: AuthenticationFailed) -> None:
    """Log a failed attempt, and let its reply wait where its client has failed often."""
    peer = request.scope["client"]
    address = attempts.address(peer[0] if peer else None, request.scope["headers"])
    delay_s = attempts.count(address)
    log.warning(
        "A request was not authenticated.",
        action="authentication_failed",
        client=address,
        code=error.code,
        key_id=error.key_id,
        delay_s=round(delay_s, 3),
    )
    if delay_s:
        await while_connected(request.receive, asyncio.sleep(delay_s))


def scope_of(options: Mapping[str, Any], method: str) -> Scope | None:
    """What a route with these options demands: its `scope`, or else to read for GET and to write for other methods. Where it has
    `or_admin`, the scope `admin` will do, too."""
    scope: Scope | None = options.get("scope", "responses.read" if method == "GET" else "responses.write")
    return scope
