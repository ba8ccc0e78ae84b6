"""Events → response, folded at item borders: an item's last event carries the whole item, so no delta need be looked at."""

from msgspec.structs import replace

from app.wire.events import Event, ItemDone, Lifecycle
from app.wire.resources import Response


def apply(response: Response, event: Event) -> Response:
    """The response after one event of its run."""
    if isinstance(event, ItemDone):
        return replace(response, output=[*response.output, event.item])
    if isinstance(event, Lifecycle):
        return event.response
    return response
