"""The toolbox: the tools of one run, resolved: what the model sees, and where a call goes.

The model sees plain functions with unique names. `verdict` maps the name of a call back to who runs it, and refuses calls of
tools that were not offered or not allowed: `allowed_tools` is enforced here, not only asked of the model.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from msgspec import UNSET, Struct
from msgspec.structs import replace

from app.domain import client_tools
from app.domain.approvals import needs_approval
from app.domain.client_tools import ClientTool, client_tool_of
from app.domain.hosted import Kind, owner_of
from app.domain.tool_filters import matching
from app.domain.tools.table import HOSTED, KINDS, kind_of, missing_server
from app.errors import InvalidParameter, InvalidRequest, UnsupportedParameter
from app.wire.decoding import Json
from app.wire.tools import (
    AllowedTools,
    AnyTool,
    CustomTool,
    FunctionTool,
    HostedTool,
    ListedTool,
    McpFilter,
    McpTool,
    NamedTool,
    NamespaceTool,
    ToolChoice,
    ToolMode,
)

MODEL_NAME_CHARS_MAX = 64
"""Chat Completions takes no longer function names."""

NUMBER_CHARS_MAX = 8
"""Of the number that keeps equal names apart."""


class ByClient(Struct, frozen=True):
    """The client runs the call; of a `tool` that has items of its own."""

    namespace: str | None = None
    tool: ClientTool | None = None


class ByServer(Struct, frozen=True):
    """An MCP server runs the call; `ask` if only with the client's approval."""

    label: str
    ask: bool


class ByHost(Struct, frozen=True):
    """The operator's tool server for a hosted type runs the call."""

    kind: Kind
    declaration: Json


class Offer(Struct, frozen=True):
    """A tool as the model sees it, and who runs it."""

    model_name: str
    tool: FunctionTool | CustomTool
    by: ByClient | ByServer | ByHost


class ClientCall(Struct, frozen=True):
    """The call goes to the client."""

    kind: Literal["function", "custom"]
    name: str
    namespace: str | None
    tool: ClientTool | None = None
    """One that has items of its own."""


class ServerCall(Struct, frozen=True):
    """The server runs the call."""

    name: str
    by: ByServer | ByHost


class NeedsApproval(Struct, frozen=True):
    """The call waits for the client's approval."""

    name: str
    label: str


class Rejected(Struct, frozen=True):
    """The call is not made; the model reads why."""

    reason: str


Verdict = ClientCall | ServerCall | NeedsApproval | Rejected


class Toolbox(Struct, frozen=True):
    """`offers` is what the model may call, of `every` declared tool; `mode` how it should; `only` a single tool that it
    must call."""

    every: dict[str, Offer]
    offers: dict[str, Offer]
    mode: ToolMode
    only: Offer | None
    left_out: tuple[str, ...]
    """Types of tools that the model does not see: hosted ones without a tool server, and those that this version does not know."""
    unlisted: tuple[str, ...] = ()
    """Labels of declared MCP servers whose tools are not known yet."""
    names: Mapping[tuple[str | None, str], str] = {}
    """A tool's owner and its own name → the model's name for it."""

    def verdict(self, model_name: str) -> Verdict:
        """Where a call goes."""
        offer = self.offers.get(model_name)
        if offer is None or self.mode == "none" or (self.only and self.only is not offer):
            return Rejected(f"There is no tool named '{model_name}' that may be called now.")
        match offer.by:
            case ByServer(label, ask=True):
                return NeedsApproval(offer.tool.name, label)
            case ByServer() | ByHost():
                return ServerCall(offer.tool.name, offer.by)
            case ByClient(namespace, tool):
                kind: Literal["function", "custom"] = "custom" if isinstance(offer.tool, CustomTool) else "function"
                return ClientCall(kind, offer.tool.name, namespace, tool)

    def model_name(self, name: str, owner: str | None, *, qualified: bool = True) -> str:
        """The model's name for a tool of this namespace or server. A tool that is no longer offered, as in old context, gets its
        owner's name as a prefix if `qualified`."""
        return self.names.get((owner, name)) or _model_name(name, owner if qualified else None)

    def runs(self, label: str, name: str) -> bool:
        """Whether a server's tool may be called after the client's approval, whatever `tool_choice` allows the model."""
        return (label, name) in self.names


def open_toolbox(
    declared: Sequence[AnyTool],
    added: Sequence[AnyTool],
    choice: ToolChoice,
    *,
    listed: Mapping[str, Sequence[ListedTool]] | None = None,
    hosted: frozenset[Kind] = frozenset(),
) -> Toolbox:
    """Resolve the tools of a request: those it declares, and those that `additional_tools` items of the context add (the
    later of two with one name counts). `listed` are the tools of MCP servers, as far as they are known, by label; `hosted` the
    kinds that have a tool server. Raises InvalidParameter or UnsupportedParameter."""
    _refuse_twice(declared)
    tools = (*declared, *added)
    every, left_out = _offers(tools, listed or {}, hosted)
    labels = dict.fromkeys(tool.server_label for tool in tools if isinstance(tool, McpTool))
    unlisted = tuple(label for label in labels if label not in (listed or {}))
    names: dict[tuple[str | None, str], str] = {}
    for offer in every.values():
        names.setdefault((_owner(offer.by), offer.tool.name), offer.model_name)
    box = Toolbox(every, every, "auto", None, left_out, unlisted, names)
    if isinstance(choice, str):
        if choice == "required" and not every and not unlisted:
            raise InvalidParameter(
                "Tool choice 'required' must be specified with 'tools' parameter.", param="tool_choice"
            )
        return replace(box, mode=choice)
    choices = _Choices(box, labels)
    if isinstance(choice, AllowedTools):
        allowed = {}
        for index, named in enumerate(choice.tools):
            allowed.update(choices.take(named, f"tool_choice.tools[{index}]"))
        return replace(box, offers=allowed, mode=choice.mode)
    chosen = choices.take(choice, "tool_choice")
    if not chosen or (choice.type == "mcp" and not choice.name):
        return replace(box, offers=chosen, mode="required")
    return replace(box, mode="required", only=next(iter(chosen.values())))


def _refuse_twice(declared: Sequence[AnyTool]) -> None:
    names: set[str] = set()
    labels: set[str] = set()
    for tool in declared:
        match tool:
            case HostedTool():
                continue
            case McpTool(server_label=label):
                if label in labels:
                    raise InvalidParameter(f"Duplicate server_label '{label}'. Labels must be unique.", param="tools")
                labels.add(label)
            case _:
                if tool.name in names:
                    raise InvalidParameter(
                        f"Duplicate tool name '{tool.name}'. Tool names must be unique.", param="tools"
                    )
                names.add(tool.name)
        if isinstance(tool, NamespaceTool):
            _refuse_twice(tool.tools)


Found = tuple[FunctionTool | CustomTool, ByClient | ByServer | ByHost]


def _offers(
    tools: Sequence[AnyTool], listed: Mapping[str, Sequence[ListedTool]], hosted: frozenset[Kind]
) -> tuple[dict[str, Offer], tuple[str, ...]]:
    found: list[Found] = []
    left_out = []
    for tool in tools:
        match tool:
            case HostedTool():
                kind = kind_of(tool)
                if own := client_tool_of(tool):
                    found.append((own.function(tool.fields), ByClient(tool=own)))
                elif kind in hosted:
                    found.append((HOSTED[kind].function, ByHost(kind, tool.fields)))
                else:
                    left_out.append(tool.type)
            case NamespaceTool():
                found += [(inner, ByClient(tool.name)) for inner in tool.tools]
            case McpTool():
                found += _of_server(tool, listed.get(tool.server_label, ()))
            case _:
                found.append((tool, ByClient()))
    return _named(found), tuple(dict.fromkeys(left_out))


def _of_server(server: McpTool, listed: Sequence[ListedTool]) -> list[Found]:
    asks = needs_approval(server)
    return [
        (
            FunctionTool(name=tool.name, description=tool.description or None, parameters=tool.input_schema),
            ByServer(server.server_label, asks(tool)),
        )
        for tool in _allowed(server, listed)
    ]


def _allowed(server: McpTool, listed: Sequence[ListedTool]) -> list[ListedTool]:
    """Those of a server's tools that the request allows."""
    wanted = server.allowed_tools
    if wanted is None:
        return list(listed)
    return list(filter(matching(McpFilter(tool_names=wanted) if isinstance(wanted, list) else wanted), listed))


def _named(found: Sequence[Found]) -> dict[str, Offer]:
    """Each under a unique name. A server's tool has its plain name, unless another tool has it too."""
    plain = Counter(_safe(tool.name) for tool, by in found if not (isinstance(by, ByClient) and by.namespace))
    offers: dict[str, Offer] = {}
    given: dict[tuple[str, str | None, str], str] = {}
    numbers: dict[str, int] = {}
    for tool, by in found:
        prefix = by.namespace if isinstance(by, ByClient) else None
        if isinstance(by, ByServer) and plain[_safe(tool.name)] > 1:
            prefix = by.label
        base = _model_name(tool.name, prefix)
        same = (base, _owner(by), tool.name)
        name = given.get(same, base)
        stem = base[: MODEL_NAME_CHARS_MAX - NUMBER_CHARS_MAX]
        while same not in given and name in offers:
            numbers[stem] = numbers.get(stem, 1) + 1
            name = f"{stem}_{numbers[stem]}"
        given[same] = name
        offers[name] = Offer(name, tool, by)
    return offers


def _owner(by: ByClient | ByServer | ByHost) -> str | None:
    match by:
        case ByClient(namespace, tool):
            return client_tools.owner_of(tool.kind) if tool else namespace
        case ByServer(label):
            return label
        case ByHost(kind):
            return owner_of(kind)


def _model_name(name: str, prefix: str | None) -> str:
    full = _safe(f"{prefix}__{name}" if prefix else name)
    if len(full) <= MODEL_NAME_CHARS_MAX:
        return full
    return f"{full[: MODEL_NAME_CHARS_MAX - 9]}_{hashlib.sha256(full.encode()).hexdigest()[:8]}"


def _safe(name: str) -> str:
    """MCP's names may hold characters that a function's may not."""
    return re.sub(r"[^a-zA-Z0-9_-]", "_", name)


Key = tuple[str, str | None, str | None]
"""What a choice names: its type, a server's label, a tool's name."""


class _Choices:
    """The offers by everything that a choice may name."""

    def __init__(self, box: Toolbox, labels: Collection[str]) -> None:
        self._labels, self._unlisted, self._left_out = labels, frozenset(box.unlisted), frozenset(box.left_out)
        self._offers: dict[Key, dict[str, Offer]] = {}
        self._taken: set[Key] = set()
        for model_name, offer in box.every.items():
            for key in _keys(offer):
                self._offers.setdefault(key, {})[model_name] = offer

    def take(self, named: NamedTool, at: str) -> dict[str, Offer]:
        """The offers that a choice names: one, or all of a server, once. None while the server's tools are not known."""
        key = _key(named)
        found = self._offers.get(key, {})
        if named.type == "mcp" and (found or named.server_label in self._unlisted):
            found = {} if key in self._taken else found
            self._taken.add(key)
            return found
        if found:
            return dict([next(iter(found.items()))])
        raise self._refusal(named, at)

    def _refusal(self, named: NamedTool, at: str) -> InvalidRequest:
        label, type_ = named.server_label, named.type
        if type_ == "mcp" and label not in self._labels:
            return InvalidParameter(f"Tool choice 'mcp' server '{label}' not found in 'tools'.", param=at)
        if type_ == "mcp":
            return InvalidParameter(f"The server '{label}' has no tool of this name that is allowed.", param=at)
        if type_ in {"function", "custom"}:
            return InvalidParameter(f"Tool choice '{named.name}' not found in 'tools' parameter.", param=at)
        if type_ in client_tools.CHOICES and type_ not in self._left_out:
            return InvalidParameter(f"Tool choice '{type_}' not found in 'tools' parameter.", param=at)
        if type_ in KINDS:
            return missing_server(type_, at)
        return UnsupportedParameter(f"Tool choice of type '{type_}' is not supported by this server.", param=at)


def _key(named: NamedTool) -> Key:
    name = None if named.name is UNSET else named.name
    if named.type == "mcp":
        return ("mcp", None if named.server_label is UNSET else named.server_label, name)
    kind = KINDS.get(named.type) or client_tools.CHOICES.get(named.type)
    return (kind, None, None) if kind else (named.type, None, name)


def _keys(offer: Offer) -> list[Key]:
    match offer.by:
        case ByServer(label):
            return [("mcp", label, offer.tool.name), ("mcp", label, None)]
        case ByHost(kind):
            return [(kind, None, None)]
        case ByClient(tool=ClientTool(kind=kind)):
            return [(kind, None, None)]
        case ByClient():
            return [("custom" if isinstance(offer.tool, CustomTool) else "function", None, offer.tool.name)]
