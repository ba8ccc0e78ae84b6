"""The endpoints of the application, by their methods and paths."""

from litestar.handlers import HTTPRouteHandler

from app.api.openapi.routes import routes


def handlers() -> dict[str, HTTPRouteHandler]:
    """Every endpoint of the application, by its method and path."""
    return {route.name: route.handler for route in routes()}
