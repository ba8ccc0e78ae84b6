"""The routes of the application."""

import inspect
import re
import warnings
from collections.abc import Mapping
from typing import Any

from litestar import Controller, Litestar
from litestar.exceptions import LitestarDeprecationWarning
from litestar.handlers import HTTPRouteHandler
from litestar.routes import HTTPRoute
from msgspec import Struct

from app.api import asgi


class Route(Struct, frozen=True):
    """One method of one path."""

    method: str
    path: str
    """With the names of its parameters in braces."""
    handler: HTTPRouteHandler
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Its method and path."""
        return f"{self.method} {self.path}"


def routes() -> list[Route]:
    """Every route of the application."""
    routed = [
        one
        for one in vars(asgi).values()
        if isinstance(one, HTTPRouteHandler)
        or (inspect.isclass(one) and issubclass(one, Controller) and one is not Controller)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LitestarDeprecationWarning)  # without their dependencies
        made = Litestar(routed, openapi_config=None).routes
    assert all(isinstance(route, HTTPRoute) for route in made), "the document has routes of HTTP only"
    return [
        Route(method, re.sub(r":(?:str|path)}", "}", route.path), handler, handler.opt)
        for route in made
        if isinstance(route, HTTPRoute)
        for handler in route.route_handlers
        for method in sorted(handler.http_methods - {"OPTIONS"})
    ]
