"""`shell`, in a container. The calls of a client's shell look the same, but for their environment."""

from collections.abc import Mapping, Sequence
from typing import Any

from app.domain.hosted import HostedRoute, container_named
from app.domain.tools.answers import Answer
from app.domain.tools.server_tool import Hosted, function, item_done, with_status
from app.ids import NewId
from app.wire.decoding import Json
from app.wire.events import CommandAdded, CommandDelta, CommandDone, CommandOutputDone, Event, ItemAdded
from app.wire.items import OpaqueItem


class Shell(Hosted[OpaqueItem]):
    kind = "shell"
    types = ("shell",)
    function = function(
        "shell",
        "Run shell commands in a container and get what they print.",
        commands={"type": "array", "items": {"type": "string"}, "description": "The commands, one after the other."},
    )
    item_type = "shell_call"
    result_keys = ("stdout", "stderr", "timed_out", "exit_code")

    def is_server_run(self, declaration: Json) -> bool:
        """In a container only."""
        return is_in_container(declaration)

    def item(self, new_id: NewId, given: Json, arguments: str, container: str) -> OpaqueItem:
        commands = given.get("commands")
        id = new_id("sh")
        fields = {
            "type": "shell_call",
            "id": id,
            "call_id": new_id("call"),
            "action": {"commands": [str(command) for command in commands] if isinstance(commands, list) else []},
            "environment": {"type": "container_reference", "container_id": container},
            "status": "in_progress",
        }
        return OpaqueItem(id, "shell_call", fields)

    def open(self, item: OpaqueItem, output_index: int) -> list[Event]:
        added = ItemAdded(output_index=output_index, item=item.fields)
        return [added, *command_events(item.fields["action"]["commands"], output_index)]

    def done(self, item: OpaqueItem, answer: Answer, route: HostedRoute | None) -> OpaqueItem:
        """A call that failed is completed, too: its output says why."""
        return with_status(item, "completed")

    def close_unknown(self, item: OpaqueItem, output_index: int) -> list[Event]:
        return [item_done(output_index, with_status(item, "incomplete"))]

    def output(self, item: OpaqueItem, output_index: int, answer: Answer, route: HostedRoute | None) -> list[Event]:
        outputs = outputs_of(answer, route)
        id = f"{item.id}_output"
        fields = {"type": "shell_call_output", "id": id, "call_id": item.fields["call_id"], "output": outputs}
        done = OpaqueItem(id, "shell_call_output", {**fields, "status": "completed"})
        return [
            ItemAdded(output_index=output_index, item={**fields, "output": [], "status": "in_progress"}),
            *(
                CommandOutputDone(item_id=id, output_index=output_index, command_index=index, output=[output])
                for index, output in enumerate(outputs)
            ),
            item_done(output_index, done),
        ]

    def container(self, item: OpaqueItem) -> str:
        return container_named(item.fields)

    def given(self, item: OpaqueItem) -> None:
        """The model reads carried calls as they are."""

    def result(self, item: OpaqueItem) -> str:
        """The output is an item of its own."""
        return ""


def is_in_container(fields: Json) -> bool:
    """Whether the environment of a declaration or a call is a container."""
    environment = fields.get("environment")
    return isinstance(environment, dict) and str(environment.get("type")).startswith("container")


def command_events(commands: Sequence[str], output_index: int) -> list[Event]:
    """The events of a call's commands, each of which comes whole."""
    events: list[Event] = []
    for index, command in enumerate(commands):
        at: dict[str, Any] = {"output_index": output_index, "command_index": index}
        events += [
            CommandAdded(**at, command=""),
            CommandDelta(**at, delta=command),
            CommandDone(**at, command=command),
        ]
    return events


def outputs_of(answer: Answer, route: HostedRoute | None) -> list[Json]:
    """The output of each command: the structured answer, or a list of them; else the text is what was printed."""
    if answer.error is not None or route is None:
        stderr = f"Error: {answer.error_message}"
        return [{"stdout": "", "stderr": stderr, "outcome": {"type": "exit", "exit_code": 1}}]
    found = route.find(answer)
    ran = [one for one in (found if isinstance(found, list) else [found]) if isinstance(one, dict)]
    return [_output(one, route.fields) for one in ran] or [_output({"stdout": answer.text}, {})]


def _output(ran: Json, fields: Mapping[str, str]) -> Json:
    timed_out = ran.get(fields.get("timed_out", "timed_out"))
    exit_code = ran.get(fields.get("exit_code", "exit_code"), 0)
    return {
        "stdout": str(ran.get(fields.get("stdout", "stdout")) or ""),
        "stderr": str(ran.get(fields.get("stderr", "stderr")) or ""),
        "outcome": {"type": "timeout"}
        if timed_out
        else {"type": "exit", "exit_code": exit_code if isinstance(exit_code, int) else 1},
    }
