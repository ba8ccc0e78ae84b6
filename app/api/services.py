"""Services that handlers depend on."""

from collections.abc import Mapping
from typing import Any

import structlog
from litestar import Request
from msgspec import Struct

from app.api.auth import Auth
from app.api.bodies import Bodies
from app.domain.sealed import Seal
from app.outbound.catalog import Catalog
from app.outbound.upstream import Upstream
from app.rooms import Rooms
from app.runs.admission import Admission, Caller
from app.runs.cancellation import Cancellation
from app.runs.claims import Claims
from app.runs.counting import TokenCounts
from app.runs.following import Following
from app.settings import Settings
from app.storage.backlog import Backlogs
from app.storage.database import Database


class Services(Struct, frozen=True):
    """One dependency for all of them: Litestar starts a task for each that can be provided beside another."""

    settings: Settings
    database: Database
    seal: Seal
    catalog: Catalog
    upstreams: Mapping[str, Upstream]
    admission: Admission
    counts: TokenCounts
    following: Following
    cancellation: Cancellation
    claims: Claims
    backlogs: Backlogs
    bodies: Bodies
    reads: Rooms
    outdated_schemas: frozenset[str]
    auth: Auth


async def provide_caller(request: Request[Any, Any, Any], services: Services) -> Caller:
    """The caller, which every handler below /v1 depends on."""
    # Not `request.headers`: Litestar keeps what it has parsed as long as the reply takes, which may be long.
    caller = await services.auth.caller(request.scope["headers"], http_version=request.scope["http_version"])
    structlog.contextvars.bind_contextvars(tenant_id=caller.tenant_id)
    return caller
