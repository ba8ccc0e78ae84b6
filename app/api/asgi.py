"""The ASGI application: routes, dependencies, error translation."""

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any

from litestar import Litestar
from litestar.di import Provide
from litestar.types import ASGIApp

from app.api.auth import Auth
from app.api.bodies import Bodies
from app.api.models import ModelsController
from app.api.operations import home, livez, readyz
from app.api.problems import HANDLERS, with_request_id
from app.api.responses import ResponsesController
from app.api.services import Services, provide_caller
from app.outbound.catalog import Catalog
from app.outbound.upstream import Upstream
from app.runs.background import Background
from app.runs.executor import Executor
from app.runs.rooms import Rooms
from app.runs.worker import Worker
from app.settings import Settings
from app.storage.backlog import Backlogs
from app.storage.database import Database

Lifespan = Callable[[Any], AbstractAsyncContextManager[None]]


def build(
    *,
    settings: Settings,
    database: Database,
    catalog: Catalog,
    upstreams: Mapping[str, Upstream],
    executor: Executor,
    background: Background,
    worker: Worker,
    backlogs: Backlogs,
    bodies: Bodies,
    outdated_schemas: frozenset[str],
    lifespan: Lifespan,
) -> ASGIApp:
    """The application around things that `assembly` has built."""
    services = Services(
        settings=settings,
        database=database,
        catalog=catalog,
        upstreams=upstreams,
        executor=executor,
        background=background,
        worker=worker,
        backlogs=backlogs,
        bodies=bodies,
        reads=Rooms(settings.reads_bytes_max, waiting_max=settings.connections_max),
        outdated_schemas=outdated_schemas,
        auth=Auth(settings, database),
    )
    app = Litestar(
        route_handlers=[ResponsesController, ModelsController, home, livez, readyz],
        dependencies={
            "services": Provide(lambda: services, sync_to_thread=False),
            "caller": Provide(provide_caller),
        },
        exception_handlers=HANDLERS,
        request_max_body_size=settings.body_bytes_max,
        lifespan=[lifespan],
        openapi_config=None,
        logging_config=None,
    )
    return with_request_id(app)
