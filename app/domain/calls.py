"""Calls that the server runs: what is said of one before it is sent, and what after it has come back.

A call's item is opened whole, when its turn has ended: so the intent can be kept before the call is sent, and whoever finds it
without an end knows that nobody can tell whether it was carried out.
"""

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Raw, Struct
from msgspec.structs import replace

from app.domain.hosted import (
    Asked,
    HostedRoute,
    Kind,
    arguments_of,
    container_named,
    queries_of,
    results_of,
    shell_outputs,
)
from app.domain.toolbox import ByHost
from app.ids import NewId
from app.wire.decoding import Json, json_object
from app.wire.events import (
    CodeCompleted,
    CodeDelta,
    CodeDone,
    CodeInProgress,
    CodeInterpreting,
    CommandAdded,
    CommandDelta,
    CommandDone,
    CommandOutputDone,
    Event,
    FileSearchCompleted,
    FileSearchInProgress,
    FileSearchSearching,
    ImageCompleted,
    ImageGenerating,
    ImageInProgress,
    ItemAdded,
    ItemDone,
    McpArgumentsDelta,
    McpArgumentsDone,
    McpCallCompleted,
    McpCallFailed,
    McpCallInProgress,
    McpListCompleted,
    McpListFailed,
    McpListInProgress,
    WebSearchCompleted,
    WebSearchInProgress,
    WebSearchSearching,
)
from app.wire.items import (
    AnyItem,
    CallError,
    CodeInterpreterCall,
    FileSearchCall,
    ImageGenerationCall,
    InputImage,
    ItemStatus,
    McpApprovalRequest,
    McpCall,
    McpListTools,
    OpaqueItem,
    ServerCallItem,
    WebSearchCall,
    encode_item,
)
from app.wire.tools import ListedTool

INVALID_PARAMS = -32602
"""JSON-RPC's code for arguments that are none."""

INTERNAL_ERROR = -32603

BROKEN_OFF = "This call was broken off before its result was known: it may have been carried out."


OwnItem = ServerCallItem | OpaqueItem
"""The item of a server-run call; a shell call is carried, as clients' are."""


class Answer(Struct, frozen=True):
    """What came back of a call; `error` says that it failed."""

    text: str = ""
    structured: Any = None
    images: Sequence[tuple[str, str]] = ()
    """Media type and base64 of each."""
    error: CallError | None = None


def not_json() -> Answer:
    """For a call whose arguments are no JSON object: it is not sent."""
    return failure("mcp_protocol_error", INVALID_PARAMS, "The arguments are not a JSON object.")


def unknown_outcome() -> Answer:
    """For a call that may or may not have been carried out when its run broke off: it is not sent again."""
    return failure("mcp_protocol_error", INTERNAL_ERROR, BROKEN_OFF)


def failure(type: str, code: int, message: str) -> Answer:
    """The answer of a call that failed on its way."""
    return Answer(error=CallError(type=type, code=code, message=message))


class PendingCall:
    """A server-run call of the model: from its arguments to its end."""

    def __init__(
        self, item: OwnItem, arguments: str, by: ByHost | None = None, route: HostedRoute | None = None
    ) -> None:
        """`by` and `route` are those of a hosted tool."""
        self.item = item
        self.arguments = arguments
        self.by, self.route = by, route
        self.output_index = -1

    @property
    def given(self) -> Json | None:
        """The arguments; None if they are no JSON object."""
        return given_of(self.arguments)

    def open(self, output_index: int) -> list[Event]:
        """What is said before the call is sent: the item, whole but for its end."""
        self.output_index = output_index
        at: dict[str, Any] = {"item_id": self.item.id, "output_index": output_index}
        match self.item:
            case McpCall() as item:
                return [
                    ItemAdded(output_index=output_index, item=replace(item, arguments="")),
                    McpCallInProgress(**at),
                    McpArgumentsDelta(**at, delta=item.arguments),
                    McpArgumentsDone(**at, arguments=item.arguments),
                ]
            case WebSearchCall() as item:
                said: list[Event] = [WebSearchInProgress(**at), WebSearchSearching(**at)]
            case FileSearchCall() as item:
                said = [FileSearchInProgress(**at), FileSearchSearching(**at)]
            case CodeInterpreterCall() as item:
                code = item.code or ""
                said = [
                    CodeInProgress(**at),
                    CodeDelta(**at, delta=code),
                    CodeDone(**at, code=code),
                    CodeInterpreting(**at),
                ]
                return [ItemAdded(output_index=output_index, item=replace(item, code="", outputs=[])), *said]
            case ImageGenerationCall() as item:
                said = [ImageInProgress(**at), ImageGenerating(**at)]
            case OpaqueItem() as item:
                return [ItemAdded(output_index=output_index, item=item.fields), *_commands(item, output_index)]
        return [ItemAdded(output_index=output_index, item=item), *said]

    @property
    def container(self) -> str:
        """Where it runs; empty for a call that needs no container."""
        return container_of(self.item) or ""

    def close(self, answer: Answer) -> list[Event]:
        """What is said when the call has come back."""
        if isinstance(self.item, OpaqueItem):
            done = OpaqueItem(self.item.id, self.item.type, {**self.item.fields, "status": "completed"})
            return [_done(self.output_index, done)]
        return close_call(self.item, self.output_index, answer, self.route)

    def output(self, answer: Answer, output_index: int) -> list[Event]:
        """A shell's output is an item of its own, behind all calls of its turn; other calls have none."""
        return (
            _shell_output_item(self.item, answer, self.route, output_index) if isinstance(self.item, OpaqueItem) else []
        )

    def cut_off(self) -> list[Event]:
        """What is said of a call that nobody waits for any more, or that was never sent."""
        return [_done(self.output_index, incomplete(self.item))]


def incomplete(item: OwnItem) -> OwnItem:
    """A call that has no end."""
    if isinstance(item, OpaqueItem):
        return OpaqueItem(item.id, item.type, {**item.fields, "status": "incomplete"})
    return replace(item, status="incomplete")


def _commands(item: OpaqueItem, output_index: int) -> list[Event]:
    said: list[Event] = []
    for index, command in enumerate(item.fields["action"]["commands"]):
        at: dict[str, Any] = {"output_index": output_index, "command_index": index}
        said += [CommandAdded(**at, command=""), CommandDelta(**at, delta=command), CommandDone(**at, command=command)]
    return said


def container_of(item: AnyItem) -> str | None:
    """The container that a call ran in."""
    match item:
        case CodeInterpreterCall():
            return item.container_id
        case OpaqueItem(type="shell_call"):
            return container_named(item.fields)
    return None


def _shell_output_item(item: OpaqueItem, answer: Answer, route: HostedRoute | None, output_index: int) -> list[Event]:
    output_id = f"{item.id}_output"
    if answer.error is not None or route is None:
        outputs = [{"stdout": "", "stderr": f"Error: {_message(answer)}", "outcome": {"type": "exit", "exit_code": 1}}]
    else:
        outputs = shell_outputs(route, answer.structured, answer.text)
    fields = {"type": "shell_call_output", "id": output_id, "call_id": item.fields["call_id"], "output": outputs}
    begun = OpaqueItem(output_id, "shell_call_output", {**fields, "output": [], "status": "in_progress"})
    done = OpaqueItem(output_id, "shell_call_output", {**fields, "status": "completed"})
    return [
        ItemAdded(output_index=output_index, item=begun.fields),
        *(
            CommandOutputDone(item_id=output_id, output_index=output_index, command_index=index, output=[output])
            for index, output in enumerate(outputs)
        ),
        _done(output_index, done),
    ]


def close_call(
    item: ServerCallItem, output_index: int, answer: Answer, route: HostedRoute | None = None
) -> list[Event]:
    """The end of a call's item, with its answer. Without a route, only an answer that is an error."""
    at: dict[str, Any] = {"item_id": item.id, "output_index": output_index}
    failed = answer.error is not None
    status: ItemStatus = "failed" if failed else "completed"
    said: list[Event] = []
    done: ServerCallItem
    match item:
        case McpCall():
            said = [McpCallFailed(**at) if failed else McpCallCompleted(**at)]
            output = None if failed else answer.text
            images = [] if failed else _seen(answer.images)
            done = replace(item, output=output, error=answer.error, status=status, images=images or msgspec.UNSET)
        case WebSearchCall():
            results = _results("web_search", route, answer)
            sources = [{"type": "url", "url": result["url"]} for result in results if "url" in result]
            action = {**(item.action or {}), "sources": sources}
            said = [] if failed else [WebSearchCompleted(**at)]
            done = replace(item, action=action, results=results, status=status)
        case FileSearchCall():
            said = [] if failed else [FileSearchCompleted(**at)]
            done = replace(item, results=_results("file_search", route, answer), status=status)
        case CodeInterpreterCall():
            said = [] if failed else [CodeCompleted(**at)]
            done = replace(item, outputs=_outputs(answer), status=status)
        case ImageGenerationCall():
            image = answer.images[0] if answer.images else None
            failed = failed or image is None
            said = [] if failed else [ImageCompleted(**at)]
            status = "failed" if failed else "completed"
            error = {"type": "image_generation_error", "message": _message(answer)} if failed else msgspec.UNSET
            done = replace(item, result=image[1] if image else None, error=error, status=status)
    return [*said, _done(output_index, done)]


def _results(kind: Kind, route: HostedRoute | None, answer: Answer) -> list[Json]:
    if answer.error is not None or route is None:
        return [{"text": f"Error: {_message(answer)}"}]
    return results_of(kind, route, answer.structured, answer.text)


def _outputs(answer: Answer) -> list[Json]:
    logs = f"Error: {_message(answer)}" if answer.error is not None else answer.text
    images = [{"type": "image", "url": f"data:{type_};base64,{data}"} for type_, data in answer.images]
    return [*([{"type": "logs", "logs": logs}] if logs else []), *images]


def _seen(images: Sequence[tuple[str, str]]) -> list[InputImage]:
    return [InputImage(image_url=f"data:{type_};base64,{data}") for type_, data in images]


def _message(answer: Answer) -> str:
    return error_text(answer.error) if answer.error is not None else answer.text or "nothing came back"


def error_text(error: CallError | str) -> str:
    """A call's error, as the model reads it."""
    if isinstance(error, str):
        return error
    if error.message:
        return str(error.message)
    if error.content is msgspec.UNSET:
        return error.type
    parts = error.content if isinstance(error.content, list) else [error.content]
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    return "\n".join(text for text in texts if isinstance(text, str)) or msgspec.json.encode(error.content).decode()


def given_of(arguments: str) -> Json | None:
    """A call's arguments; none at all are an empty object, and None says that they are no JSON object."""
    return json_object(arguments or "{}")


def mcp_call(new_id: NewId, label: str, name: str, arguments: str, *, approval: str | None = None) -> PendingCall:
    """A call of an MCP server's tool."""
    item = McpCall(
        id=new_id("mcp"),
        server_label=label,
        name=name,
        arguments=arguments,
        approval_request_id=approval,
        status="in_progress",
    )
    return PendingCall(item, arguments)


def hosted_call(new_id: NewId, by: ByHost, route: HostedRoute, arguments: str, container: str) -> PendingCall:
    """A call of a hosted tool."""
    given = given_of(arguments) or {}
    item: OwnItem
    match by.kind:
        case "web_search":
            query = str(given.get("query", ""))
            action = {"type": "search", "query": query, "queries": [query]}
            item = WebSearchCall(id=new_id("ws"), status="in_progress", action=action)
        case "file_search":
            item = FileSearchCall(id=new_id("fs"), status="in_progress", queries=queries_of(given))
        case "code_interpreter":
            code = str(given.get("code", arguments if not given else ""))
            item = CodeInterpreterCall(id=new_id("ci"), status="in_progress", code=code, container_id=container)
        case "image_generation":
            item = ImageGenerationCall(
                id=new_id("ig"), status="in_progress", revised_prompt=str(given.get("prompt", ""))
            )
        case "shell":
            item = _shell_call(new_id, given, container)
    return PendingCall(item, arguments, by, route)


def _shell_call(new_id: NewId, given: Json, container: str) -> OpaqueItem:
    """Shell calls are the client's as a rule, and are carried; ours look the same."""
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


def arguments_for(call: PendingCall, *, tenant: str, container: str) -> Json | None:
    """The arguments of the tool behind a hosted call; None if the model's are no JSON. Bare code is taken as code."""
    assert call.route is not None
    assert call.by is not None
    given = call.given
    if given is None and call.by.kind == "code_interpreter":
        given = {"code": call.arguments}
    if given is None:
        return None
    return arguments_of(call.by.kind, call.route, Asked(given, call.by.declaration, tenant, container))


def approval_request(new_id: NewId, label: str, name: str, arguments: str, output_index: int) -> list[Event]:
    """A call that waits for the client's approval: only added and done."""
    item = McpApprovalRequest(id=new_id("mcpr"), server_label=label, name=name, arguments=arguments)
    return [ItemAdded(output_index=output_index, item=item), _done(output_index, item)]


def open_list(new_id: NewId, label: str, output_index: int) -> tuple[McpListTools, list[Event]]:
    """The listing of a server's tools begins."""
    item = McpListTools(id=new_id("mcpl"), server_label=label, tools=[])
    at: dict[str, Any] = {"item_id": item.id, "output_index": output_index}
    return item, [ItemAdded(output_index=output_index, item=item), McpListInProgress(**at)]


def close_list(
    item: McpListTools, output_index: int, tools: Sequence[ListedTool], error: str | None = None
) -> list[Event]:
    """The listing has come back, or failed."""
    at: dict[str, Any] = {"item_id": item.id, "output_index": output_index}
    done = replace(item, tools=list(tools), error=error if error is not None else msgspec.UNSET)
    said: Event = McpListFailed(**at) if error is not None else McpListCompleted(**at)
    return [said, _done(output_index, done)]


SERVER_RUN = frozenset((*(str(item.__struct_config__.tag) for item in ServerCallItem.__args__), "shell_call"))
"""Types of the items of calls that the server runs."""


def _done(output_index: int, item: AnyItem) -> ItemDone:
    return ItemDone(output_index=output_index, item=Raw(encode_item(item)))
