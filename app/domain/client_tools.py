"""Tools of the API that the client runs: shells, patches, a computer, a search for tools.

To the model each is a plain function; its call becomes an item of a type of its own. The item is added once the arguments are whole,
because it has no event for a part of them. Arguments that do not fit are not handed to the client: the model reads why.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeGuard

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from app.domain.tools.shell import command_events, is_in_container
from app.wire.decoding import Json, json_object
from app.wire.events import Event
from app.wire.items import AnyItem, OpaqueItem
from app.wire.tools import AnyTool, FunctionTool, HostedTool

Milliseconds = int | UnsetType | None


class _Shell(Struct):
    commands: Annotated[list[str], Meta(min_length=1)]
    timeout_ms: Milliseconds = UNSET
    max_output_length: int | UnsetType | None = UNSET


class _LocalShell(Struct):
    command: Annotated[list[str], Meta(min_length=1)]
    timeout_ms: Milliseconds = UNSET
    user: str | UnsetType | None = UNSET
    working_directory: str | UnsetType | None = UNSET
    env: dict[str, str] | None = None


class _Operation(Struct, tag_field="type"):
    path: Annotated[str, Meta(min_length=1)]


class _CreateFile(_Operation, tag="create_file"):
    diff: str


class _UpdateFile(_Operation, tag="update_file"):
    diff: str


class _DeleteFile(_Operation, tag="delete_file"):
    pass


class _Action(Struct, tag_field="type", kw_only=True):
    pass


class _Click(_Action, tag="click"):
    x: int
    y: int
    button: Literal["left", "right", "wheel", "back", "forward"] = "left"
    keys: list[str] | UnsetType | None = UNSET


class _DoubleClick(_Action, tag="double_click"):
    x: int
    y: int
    keys: list[str] | None = None


class _Point(Struct):
    x: int
    y: int


class _Drag(_Action, tag="drag"):
    path: Annotated[list[_Point], Meta(min_length=2)]
    keys: list[str] | UnsetType | None = UNSET


class _Keypress(_Action, tag="keypress"):
    keys: Annotated[list[str], Meta(min_length=1)]


class _Move(_Action, tag="move"):
    x: int
    y: int
    keys: list[str] | UnsetType | None = UNSET


class _Screenshot(_Action, tag="screenshot"):
    pass


class _Scroll(_Action, tag="scroll"):
    x: int
    y: int
    scroll_x: int = 0
    scroll_y: int = 0
    keys: list[str] | UnsetType | None = UNSET


class _Type(_Action, tag="type"):
    text: str


class _Wait(_Action, tag="wait"):
    pass


_AnyAction = _Click | _DoubleClick | _Drag | _Keypress | _Move | _Screenshot | _Scroll | _Type | _Wait


class _Actions(Struct):
    actions: Annotated[list[_AnyAction], Meta(min_length=1)]


class _OneAction(Struct):
    action: _AnyAction


_STRING: Json = {"type": "string"}
_STRINGS: Json = {"type": "array", "items": _STRING}
_INTEGER: Json = {"type": "integer"}
_TIMEOUT: Json = {**_INTEGER, "description": "After so many milliseconds a command is stopped."}
_POINT: Json = {"type": "object", "properties": {"x": _INTEGER, "y": _INTEGER}, "required": ["x", "y"]}
_ACTION: Json = {
    "type": "object",
    "properties": {
        "type": {
            "type": "string",
            "enum": ["click", "double_click", "drag", "keypress", "move", "screenshot", "scroll", "type", "wait"],
        },
        "x": {**_INTEGER, "description": "Where to click, double_click, move or scroll: pixels from the left."},
        "y": {**_INTEGER, "description": "The same, from the top."},
        "button": {"type": "string", "enum": ["left", "right", "wheel", "back", "forward"], "description": "Of click."},
        "path": {"type": "array", "items": _POINT, "description": "Of drag: from the first point to the last."},
        "keys": {**_STRINGS, "description": "Of keypress: the keys, pressed together. Of others: those that are held."},
        "scroll_x": {**_INTEGER, "description": "Of scroll: pixels to the right."},
        "scroll_y": {**_INTEGER, "description": "Of scroll: pixels down."},
        "text": {**_STRING, "description": "Of type: the text to type."},
    },
    "required": ["type"],
}


class Unfit(Exception):
    """Arguments that the tool can't be called with; the message is for the model."""


class ClientTool(Struct, frozen=True, kw_only=True):
    """A tool of the client that has items of its own."""

    kind: str
    """Its name for the model, unless another tool has that."""
    description: str
    parameters: Json
    item_type: str
    id_prefix: str
    shape: Any
    """What the arguments must be."""
    field: str = ""
    """The key of the item that holds them; empty if the item has their keys."""
    fixed: Mapping[str, Any] = {}
    """Other keys of the item."""
    cut_off: str = "incomplete"
    """The status of a call in a turn that breaks off."""

    def function(self, declaration: Json) -> FunctionTool:
        """The function that the model sees."""
        given = declaration.get("parameters")
        return FunctionTool(
            name=self.kind,
            description="\n".join((declaration.get("description") or self.description, *_details(declaration))),
            parameters=given if isinstance(given, dict) else self.parameters,
        )

    def item(self, id: str, call_id: str, arguments: str) -> OpaqueItem:
        """The item of a call. Raises Unfit."""
        given = json_object(arguments)
        if given is None:
            raise Unfit("The arguments are not a JSON object.")
        try:
            fitting = msgspec.to_builtins(msgspec.convert(given, self.shape, strict=False))
        except msgspec.ValidationError as error:
            raise Unfit(f"The arguments do not fit the tool: {error}") from None
        if self.kind == "local_shell":
            fitting = {"type": "exec", **fitting, "env": fitting.get("env") or {}}
        fields = {
            "type": self.item_type,
            "id": id,
            "call_id": call_id,
            **({self.field: fitting} if self.field else fitting),
            **self.fixed,
            "status": "in_progress",
        }
        return OpaqueItem(id, self.item_type, fields)

    def progress(self, item: OpaqueItem, output_index: int) -> list[Event]:
        """The events between the item's beginning and its end."""
        return command_events(item.fields["action"]["commands"], output_index) if self.kind == "shell" else []


def _details(declaration: Json) -> list[str]:
    """What a declaration says of the client's computer or shell."""
    found = []
    width, height, environment = (declaration.get(key) for key in ("display_width", "display_height", "environment"))
    if width and height:
        found.append(f"The screen of the {environment} has {width} x {height} pixels.")
    skills = environment.get("skills") if isinstance(environment, dict) else None
    for skill in skills or ():
        name, path, described = (skill.get(key) for key in ("name", "path", "description"))
        found.append(f"Skill {name}, in {path}: {described}")
    return found


_COMPUTER = "Use a computer. After the actions you get a screenshot."

_SHELL = ClientTool(
    kind="shell",
    description="Run shell commands on the user's machine and get what they print.",
    parameters={
        "type": "object",
        "properties": {
            "commands": {**_STRINGS, "description": "The commands, which run one after the other."},
            "timeout_ms": _TIMEOUT,
            "max_output_length": {**_INTEGER, "description": "The most characters of each command's output."},
        },
        "required": ["commands"],
    },
    item_type="shell_call",
    id_prefix="sh",
    shape=_Shell,
    field="action",
    fixed={"environment": {"type": "local"}},
)

_OTHERS = (
    ClientTool(
        kind="local_shell",
        description="Run a command on the user's machine and get what it prints.",
        parameters={
            "type": "object",
            "properties": {
                "command": {
                    **_STRINGS,
                    "description": 'The program and its arguments. A line for a shell is ["bash", "-lc", LINE].',
                },
                "env": {
                    "type": "object",
                    "additionalProperties": _STRING,
                    "description": "More environment variables.",
                },
                "working_directory": _STRING,
                "user": {**_STRING, "description": "The user who runs it."},
                "timeout_ms": _TIMEOUT,
            },
            "required": ["command"],
        },
        item_type="local_shell_call",
        id_prefix="lsh",
        shape=_LocalShell,
        field="action",
    ),
    ClientTool(
        kind="apply_patch",
        description="Create, update or delete one file on the user's machine.",
        parameters={
            "type": "object",
            "properties": {
                "type": {"type": "string", "enum": ["create_file", "update_file", "delete_file"]},
                "path": _STRING,
                "diff": {
                    **_STRING,
                    "description": "Of update_file: hunks, each a line '@@' (which may name the function or class that"
                    " the hunk is in) and then lines that begin with ' ' for context, '-' for removed or '+' for added."
                    " Of create_file: every line of the file with '+' before it.",
                },
            },
            "required": ["type", "path"],
        },
        item_type="apply_patch_call",
        id_prefix="apc",
        shape=_CreateFile | _UpdateFile | _DeleteFile,
        field="operation",
        cut_off="in_progress",  # the type has no other
    ),
    ClientTool(
        kind="computer",
        description=_COMPUTER,
        parameters={
            "type": "object",
            "properties": {"actions": {"type": "array", "items": _ACTION}},
            "required": ["actions"],
        },
        item_type="computer_call",
        id_prefix="cu",
        shape=_Actions,
        fixed={"pending_safety_checks": []},
    ),
    ClientTool(
        kind="tool_search",
        description="Search for further tools that you can call afterwards.",
        parameters={
            "type": "object",
            "properties": {"query": {**_STRING, "description": "What the tool should do."}},
            "required": ["query"],
        },
        item_type="tool_search_call",
        id_prefix="tsc",
        shape=dict[str, Any],
        field="arguments",
        fixed={"execution": "client"},
    ),
)

_PREVIEW = ClientTool(
    kind="computer",
    description="Use a computer. After the action you get a screenshot.",
    parameters={"type": "object", "properties": {"action": _ACTION}, "required": ["action"]},
    item_type="computer_call",
    id_prefix="cu",
    shape=_OneAction,
    fixed={"pending_safety_checks": []},
)

_TOOLS: Mapping[str, ClientTool] = {
    **{tool.kind: tool for tool in (_SHELL, *_OTHERS)},
    "computer_use_preview": _PREVIEW,
}

CHOICES: Mapping[str, str] = {**{type_: tool.kind for type_, tool in _TOOLS.items()}, "computer_use": "computer"}
"""What a tool choice may name → the kind of the tool."""

ID_PREFIXES: Mapping[str, str] = {tool.item_type: tool.id_prefix for tool in _TOOLS.values()}
"""Type of a call's item → the prefix of its id."""

CUT_OFF_STATUSES: Mapping[str, str] = {tool.item_type: tool.cut_off for tool in _TOOLS.values()}
"""Type of a call's item → its status in a turn that breaks off."""


def owner_of(kind: str) -> str:
    """The owner of such a tool, beside the labels of MCP servers and the namespaces of clients; neither holds a space."""
    return f"client {kind}"


def client_tool_of(declared: HostedTool) -> ClientTool | None:
    """The client's tool of a declaration; None for one that the client does not run."""
    is_elsewhere = is_in_container(declared.fields) or _is_search_elsewhere(
        declared.type, "tool_search", declared.fields
    )
    return None if is_elsewhere else _TOOLS.get(declared.type)


def is_client_run(item: AnyItem) -> TypeGuard[OpaqueItem]:
    """Whether an item is a call of a client's tool."""
    return isinstance(item, OpaqueItem) and is_client_call(item.type, item.fields)


def is_client_call(type_: str, fields: Json) -> bool:
    """Whether an item of this type, with these fields, is a call of a client's tool."""
    is_elsewhere = is_in_container(fields) or _is_search_elsewhere(type_, "tool_search_call", fields)
    return type_ in ID_PREFIXES and not is_elsewhere


def is_found_by(declared: Sequence[AnyTool], item: AnyItem) -> bool:
    """Whether an item has what a search for tools has found that is among the declared ones."""
    is_found = isinstance(item, OpaqueItem) and item.type == "tool_search_output"
    return is_found and any(_is_search(tool) for tool in declared)


def _is_search(tool: AnyTool) -> bool:
    client_tool = client_tool_of(tool) if isinstance(tool, HostedTool) else None
    return client_tool is not None and client_tool.kind == "tool_search"


def _is_search_elsewhere(type_: str, search: str, fields: Json) -> bool:
    return type_ == search and fields.get("execution") != "client"
