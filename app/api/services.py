"""What the handlers turn to."""

from collections.abc import Mapping
from typing import Any

import structlog
from litestar import Request
from msgspec import Struct

from app.api.auth import Auth
from app.api.bodies import Bodies
from app.outbound.catalog import Catalog
from app.outbound.upstream import Upstream
from app.runs.background import Background
from app.runs.executor import Caller, Executor
from app.runs.rooms import Rooms
from app.runs.worker import Worker
from app.settings import Settings
from app.storage.backlog import Backlogs
from app.storage.database import Database


class Services(Struct, frozen=True):
    """One dependency for all of them: Litestar starts a task for each that can be provided beside another."""

    settings: Settings
    database: Database
    catalog: Catalog
    upstreams: Mapping[str, Upstream]
    executor: Executor
    background: Background
    worker: Worker
    backlogs: Backlogs
    bodies: Bodies
    reads: Rooms
    outdated_schemas: frozenset[str]
    auth: Auth


async def provide_caller(request: Request[Any, Any, Any], services: Services) -> Caller:
    """The dependency of every handler below /v1."""
    # Litestar keeps the headers that it has parsed as long as the reply takes, which may be long.
    caller = await services.auth.caller(request.scope["headers"], http_version=request.scope["http_version"])
    structlog.contextvars.bind_contextvars(tenant_id=caller.tenant_id)
    return caller
