"""What a tool defines whose calls the server runs.

A call's item is opened whole, after its turn has ended, so the intent is stored before the call is sent: a stored call without
an end may have been carried out.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Generic, TypeVar

import msgspec
from msgspec import Raw, Struct
from msgspec.structs import replace

from app.domain.hosted import HostedRoute, Kind, owner_of
from app.domain.tools.answers import Answer, unknown_outcome
from app.ids import NewId
from app.wire.decoding import Json, json_object
from app.wire.events import Event, ItemAdded, ItemDone, progress
from app.wire.hosted_tools import declared_keys
from app.wire.items import AnyItem, ItemStatus, OpaqueItem, ServerCallItem, encode_item, type_of
from app.wire.tools import FunctionTool

OwnItem = ServerCallItem | OpaqueItem
"""The item of a server-run call; a shell call is carried, as clients' are."""

T = TypeVar("T", bound=OwnItem)


class ModelCall(Struct, frozen=True):
    """A server-run call as the model made it: the tool, its owner, the arguments."""

    name: str
    owner: str
    arguments: str


class ServerTool(ABC, Generic[T]):
    """How the calls of a tool become items and events, and what the model reads of them in later turns."""

    item_type: str
    id_prefix: str = ""
    """Of the items' ids; empty for items that are carried."""
    stages: Sequence[str] = ()
    """Those that have an event before the call is sent."""
    streamed: str = ""
    """The field that is empty when the item is added, and comes as deltas."""

    def open(self, item: T, output_index: int) -> list[Event]:
        """The events before the call is sent: the item, whole but for its result."""
        return [ItemAdded(output_index=output_index, item=item), *progress_of(item, output_index, *self.stages)]

    def close(self, item: T, output_index: int, answer: Answer, route: HostedRoute | None) -> list[Event]:
        """The events of the call's end. Without a route, only an answer that is an error."""
        done = self.done(item, answer, route)
        return [*progress_of(done, output_index, status_of(done)), item_done(output_index, done)]

    @abstractmethod
    def done(self, item: T, answer: Answer, route: HostedRoute | None) -> T:
        """The item with its result."""

    def close_unknown(self, item: T, output_index: int) -> list[Event]:
        """The events that end a call whose outcome is unknown."""
        return self.close(item, output_index, unknown_outcome(), None)

    def output(self, item: T, output_index: int, answer: Answer, route: HostedRoute | None) -> list[Event]:
        """The events of an output that is an item of its own, after all calls of its turn."""
        return []

    def container(self, item: T) -> str:
        """Where the call runs; empty for a call that needs no container."""
        return ""

    @abstractmethod
    def call(self, item: T) -> ModelCall | None:
        """The call as the model made it; None where another server's history has lost its result."""

    @abstractmethod
    def result(self, item: T) -> str:
        """What the model reads of the result."""


class Hosted(ServerTool[T]):
    """A tool that the hosted API runs itself, and here a tool server of the operator's catalog; the model calls a function."""

    kind: Kind
    types: Sequence[str]
    """What a declaration may call it."""
    function: FunctionTool
    result_keys: Collection[str] = ()
    """Keys of a result that the catalog's `fields` may rename."""

    @property
    def parameters(self) -> Collection[str]:
        """Names of the function's parameters."""
        names: Json = (self.function.parameters or {})["properties"]
        return names.keys()

    @property
    def placeholders(self) -> frozenset[str]:
        """The names that the catalog's `arguments` may use, without their `$`."""
        declared = (key for type_ in self.types for key in declared_keys(type_))
        return frozenset({"tenant", "container", *self.parameters, *self.values({}), *declared})

    def is_server_run(self, declaration: Json) -> bool:
        """Whether the server runs what is declared so, and not the client."""
        return True

    def parse(self, arguments: str) -> Json | None:
        """The arguments that the model gave; None if they are not a JSON object."""
        return parse_arguments(arguments)

    def values(self, given: Json) -> Json:
        """Placeholder → value, of the model's arguments: only the function's parameters, so that the model decides neither whose
        files are searched nor where code runs."""
        return {name: value for name, value in given.items() if name in self.parameters}

    @abstractmethod
    def item(self, new_id: NewId, given: Json, arguments: str, container: str) -> T:
        """The item of a new call; `given` is empty if the arguments are not a JSON object."""

    def call(self, item: T) -> ModelCall | None:
        given = self.given(item)
        if given is None:
            return None
        return ModelCall(self.function.name, owner_of(self.kind), msgspec.json.encode(given).decode())

    @abstractmethod
    def given(self, item: T) -> Json | None:
        """The arguments of `call`."""


def function(name: str, description: str, **parameters: Json) -> FunctionTool:
    """The function that the model sees; its first parameter is required."""
    schema = {"type": "object", "properties": parameters, "required": [next(iter(parameters))]}
    return FunctionTool(name=name, description=description, parameters=schema)


def parse_arguments(arguments: str) -> Json | None:
    """A call's arguments; an empty text is an empty object, and None stands for what is not a JSON object."""
    return json_object(arguments or "{}")


def progress_of(item: AnyItem, output_index: int, *stages: str) -> list[Event]:
    """The events of these stages of an item."""
    return progress(type_of(item), *stages, item_id=item.id, output_index=output_index)


def item_done(output_index: int, item: AnyItem) -> ItemDone:
    """The event that ends an item."""
    return ItemDone(output_index=output_index, item=Raw(encode_item(item)))


def status_of(item: OwnItem) -> str:
    """A call's status."""
    return str(item.fields["status"] if isinstance(item, OpaqueItem) else item.status)


def with_status(item: T, status: ItemStatus) -> T:
    """The same call with another status."""
    if isinstance(item, OpaqueItem):
        return replace(item, fields={**item.fields, "status": status})
    return replace(item, status=status)
