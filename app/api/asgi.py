"""The ASGI application: routes, dependencies, error translation."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from litestar import Litestar
from litestar.di import Provide
from litestar.types import ASGIApp

from app.api.admin import AuditController, KeysController
from app.api.agents import AgentsController
from app.api.chat import ChatCompletionsController
from app.api.compactions import CompactionsController
from app.api.conversations import ConversationsController
from app.api.files import FilesController
from app.api.input_tokens import input_tokens
from app.api.models import ModelsController
from app.api.operations import home, livez, readyz
from app.api.problems import HANDLERS, answer_options, with_request_id
from app.api.reference import openapi, redoc, viewer
from app.api.responses import ResponsesController
from app.api.services import Services, provide_caller
from app.api.tenants import TenantsController
from app.api.tool_credentials import ToolCredentialsController
from app.api.usage import UsageController

Lifespan = Callable[[Any], AbstractAsyncContextManager[None]]


def build(services: Services, lifespan: Lifespan) -> ASGIApp:
    """The application around services that `assembly` has built."""
    app = Litestar(
        route_handlers=[
            ResponsesController,
            CompactionsController,
            ChatCompletionsController,
            ConversationsController,
            FilesController,
            input_tokens,
            ModelsController,
            AgentsController,
            KeysController,
            AuditController,
            TenantsController,
            ToolCredentialsController,
            UsageController,
            home,
            livez,
            readyz,
            openapi,
            viewer,
            redoc,
        ],
        dependencies={
            "services": Provide(lambda: services, sync_to_thread=False),
            "caller": Provide(provide_caller),
        },
        before_request=answer_options,
        exception_handlers=HANDLERS,
        request_max_body_size=services.settings.body_bytes_max,
        lifespan=[lifespan],
        openapi_config=None,
        logging_config=None,
    )
    return with_request_id(app)
