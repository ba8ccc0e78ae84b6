"""Events → response, folded at item borders: an item's last event carries the whole item, so deltas are ignored."""

from msgspec import Raw
from msgspec.structs import replace

from app.wire.events import Event, ItemDone, Lifecycle
from app.wire.resources import Response


class Fold:
    """The response that the events of its run add up to. An event costs the same however many came before it."""

    def __init__(self, response: Response) -> None:
        self._become(response)

    def _become(self, response: Response) -> None:
        self._response = response
        self._output: list[Raw] = list(response.output)

    def apply(self, event: Event) -> None:
        """Apply one more event."""
        if isinstance(event, ItemDone):
            self._output.append(event.item)
        elif isinstance(event, Lifecycle):
            self._become(event.response)

    @property
    def response(self) -> Response:
        """The response so far: a copy, which takes time linear in its output."""
        return replace(self._response, output=list(self._output))
