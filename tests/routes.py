"""The routes of the application."""

import inspect
import re
import warnings

from litestar import Controller, Litestar
from litestar.exceptions import LitestarDeprecationWarning
from litestar.handlers import HTTPRouteHandler
from litestar.routes import HTTPRoute

from app.api import asgi


def handlers() -> dict[str, HTTPRouteHandler]:
    """Every endpoint of the application, by its method and path."""
    routed = [
        one
        for one in vars(asgi).values()
        if isinstance(one, HTTPRouteHandler)
        or (inspect.isclass(one) and issubclass(one, Controller) and one is not Controller)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LitestarDeprecationWarning)  # without their dependencies
        routes = Litestar(routed, openapi_config=None).routes
    assert all(isinstance(route, HTTPRoute) for route in routes), "tests of HTTP do not reach the others"
    return {
        f"{method} {re.sub(r':(?:str|path)}', '}', route.path)}": handler
        for route in routes
        if isinstance(route, HTTPRoute)
        for handler in route.route_handlers
        for method in handler.http_methods - {"OPTIONS"}
    }
