"""The toolbox: the tools of one run, resolved: what the model sees, and what may become of a call.

The model sees plain functions with unique names. `verdict` maps the name of a call back to who runs it, and refuses calls of
tools that were not offered or not allowed: `allowed_tools` is enforced here, not only asked of the model.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

from msgspec import UNSET, Struct

from app.domain.hosted import KINDS, SEEN, Kind, kind_of, missing_server, owner_of
from app.errors import InvalidParameter, UnsupportedParameter
from app.wire.decoding import Json
from app.wire.tools import (
    AllowedTools,
    AnyTool,
    CustomTool,
    FunctionTool,
    HostedTool,
    ListedTool,
    McpApproval,
    McpFilter,
    McpTool,
    NamedTool,
    NamespaceTool,
    ToolChoice,
    ToolMode,
)

MODEL_NAME_CHARS_MAX = 64
"""Chat Completions takes no longer function names."""


class ByClient(Struct, frozen=True):
    """The client runs the call."""

    namespace: str | None = None


class ByServer(Struct, frozen=True):
    """An MCP server runs the call; `ask` if only with the client's approval."""

    label: str
    ask: bool


class ByHost(Struct, frozen=True):
    """The tool server behind a hosted type runs the call."""

    kind: Kind
    declaration: Json


class Offer(Struct, frozen=True):
    """A tool as the model sees it, and who runs it."""

    model_name: str
    tool: FunctionTool | CustomTool
    by: ByClient | ByServer | ByHost


class HandOver(Struct, frozen=True):
    """The call goes to the client."""

    kind: Literal["function", "custom"]
    name: str
    namespace: str | None


class Run(Struct, frozen=True):
    """The call is run by us."""

    name: str
    by: ByServer | ByHost


class Ask(Struct, frozen=True):
    """The call waits for the client's approval."""

    name: str
    label: str


class Refuse(Struct, frozen=True):
    """The call goes nowhere; the model reads why."""

    reason: str


Verdict = HandOver | Run | Ask | Refuse


class Toolbox(Struct, frozen=True):
    """`offers` is what the model may call, of `every` tool that there is; `mode` how it should; `only` a single tool that it
    must call."""

    every: dict[str, Offer]
    offers: dict[str, Offer]
    mode: ToolMode
    only: Offer | None
    left_out: tuple[str, ...]
    """Hosted tools that nobody here runs: the model does not see them."""
    unlisted: tuple[str, ...] = ()
    """Labels of declared MCP servers whose tools are not known yet."""

    def verdict(self, model_name: str) -> Verdict:
        """What becomes of a call."""
        offer = self.offers.get(model_name)
        if offer is None or self.mode == "none" or (self.only and self.only is not offer):
            return Refuse(f"There is no tool named '{model_name}' that may be called now.")
        match offer.by:
            case ByServer(label, ask=True):
                return Ask(offer.tool.name, label)
            case ByServer() | ByHost():
                return Run(offer.tool.name, offer.by)
            case ByClient(namespace):
                kind: Literal["function", "custom"] = "custom" if isinstance(offer.tool, CustomTool) else "function"
                return HandOver(kind, offer.tool.name, namespace)

    def model_name(self, name: str, of: str | None, *, qualified: bool = True) -> str:
        """How the model knows a tool of this namespace or server; calls in old context may name tools that are no longer
        offered: then with its owner's name, if `qualified`."""
        for offer in self.every.values():
            if offer.tool.name == name and _of(offer) == of:
                return offer.model_name
        return _model_name(name, of if qualified else None)

    def runs(self, label: str, name: str) -> bool:
        """Whether a server's tool may be called once the client has approved: what the model should call is another matter."""
        return any(offer.tool.name == name and _of(offer) == label for offer in self.every.values())


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
    kinds that a tool server stands behind. Raises InvalidParameter or UnsupportedParameter."""
    _refuse_twice(declared)
    tools = (*declared, *added)
    every, left_out = _offers(tools, listed or {}, hosted)
    labels = [tool.server_label for tool in tools if isinstance(tool, McpTool)]
    unlisted = tuple(
        tool.server_label for tool in tools if isinstance(tool, McpTool) and tool.server_label not in (listed or {})
    )
    if isinstance(choice, str):
        if choice == "required" and not every and not unlisted:
            raise InvalidParameter(
                "Tool choice 'required' must be specified with 'tools' parameter.", param="tool_choice"
            )
        return Toolbox(every, every, choice, None, left_out, unlisted)
    if isinstance(choice, AllowedTools):
        allowed = {}
        for index, named in enumerate(choice.tools):
            allowed.update(_chosen(every, named, f"tool_choice.tools[{index}]", left_out, labels, unlisted))
        return Toolbox(every, allowed, choice.mode, None, left_out, unlisted)
    chosen = _chosen(every, choice, "tool_choice", left_out, labels, unlisted)
    if not chosen or (choice.type == "mcp" and not choice.name):
        return Toolbox(every, chosen, "required", None, left_out, unlisted)
    return Toolbox(every, every, "required", next(iter(chosen.values())), left_out, unlisted)


def _refuse_twice(declared: Sequence[AnyTool]) -> None:
    names = [tool.name for tool in declared if not isinstance(tool, HostedTool | McpTool)]
    for name in names:
        if names.count(name) > 1:
            raise InvalidParameter(f"Duplicate tool name '{name}'. Tool names must be unique.", param="tools")
    labels = [tool.server_label for tool in declared if isinstance(tool, McpTool)]
    for label in labels:
        if labels.count(label) > 1:
            raise InvalidParameter(f"Duplicate server_label '{label}'. Labels must be unique.", param="tools")
    for tool in declared:
        if isinstance(tool, NamespaceTool):
            _refuse_twice(tool.tools)


Found = tuple[FunctionTool | CustomTool, ByClient | ByServer | ByHost]


def _offers(
    tools: Sequence[AnyTool], listed: Mapping[str, Sequence[ListedTool]], hosted: frozenset[Kind]
) -> tuple[dict[str, Offer], tuple[str, ...]]:
    found: list[Found] = []
    left_out = []
    for index, tool in enumerate(tools):
        match tool:
            case HostedTool():
                kind = kind_of(tool)
                if kind in hosted:
                    found.append((SEEN[kind], ByHost(kind, tool.fields)))
                elif kind or tool.type == "tool_search":
                    left_out.append(tool.type)
                else:
                    raise UnsupportedParameter(
                        f"Tools of type '{tool.type}' are not supported by this server.", param=f"tools[{index}].type"
                    )
            case NamespaceTool():
                found += [(inner, ByClient(tool.name)) for inner in tool.tools]
            case McpTool():
                found += _of_server(tool, listed.get(tool.server_label, ()))
            case _:
                found.append((tool, ByClient()))
    return _named(found), tuple(left_out)


def _of_server(server: McpTool, listed: Sequence[ListedTool]) -> list[Found]:
    return [
        (
            FunctionTool(name=tool.name, description=tool.description or None, parameters=tool.input_schema),
            ByServer(server.server_label, _needs_approval(server, tool)),
        )
        for tool in allowed(server, listed)
    ]


def allowed(server: McpTool, listed: Sequence[ListedTool]) -> list[ListedTool]:
    """Those of a server's tools that the request allows."""
    wanted = server.allowed_tools
    if wanted is None:
        return list(listed)
    filter = McpFilter(tool_names=wanted) if isinstance(wanted, list) else wanted
    return [tool for tool in listed if _matches(filter, tool)]


def _matches(filter: McpFilter, tool: ListedTool) -> bool:
    if filter.tool_names is None and filter.read_only is None:
        return False  # whoever names nothing has mistyped something
    named = filter.tool_names is None or tool.name in filter.tool_names
    return named and (filter.read_only is None or filter.read_only == tool.read_only)


def _needs_approval(server: McpTool, tool: ListedTool) -> bool:
    wanted = server.require_approval
    if isinstance(wanted, McpApproval):
        always, never = wanted.always, wanted.never
        return never is None or not _matches(never, tool) or (always is not None and _matches(always, tool))
    return wanted != "never"


def _named(found: Sequence[Found]) -> dict[str, Offer]:
    """Each under a name of its own. A server's tool has its plain name, unless another tool has it too."""
    plain = Counter(_safe(tool.name) for tool, by in found if not (isinstance(by, ByClient) and by.namespace))
    offers: dict[str, Offer] = {}
    for tool, by in found:
        of = by.namespace if isinstance(by, ByClient) else None
        if isinstance(by, ByServer) and plain[_safe(tool.name)] > 1:
            of = by.label
        base = name = _model_name(tool.name, of)
        number = 2
        while name in offers and (_of(offers[name]), offers[name].tool.name) != (_whose(by), tool.name):
            name = f"{base[: MODEL_NAME_CHARS_MAX - 3]}_{number}"
            number += 1
        offers[name] = Offer(name, tool, by)
    return offers


def _of(offer: Offer) -> str | None:
    return _whose(offer.by)


def _whose(by: ByClient | ByServer | ByHost) -> str | None:
    match by:
        case ByClient(namespace):
            return namespace
        case ByServer(label):
            return label
        case ByHost(kind):
            return owner_of(kind)


def _model_name(name: str, of: str | None) -> str:
    full = _safe(f"{of}__{name}" if of else name)
    if len(full) <= MODEL_NAME_CHARS_MAX:
        return full
    return f"{full[: MODEL_NAME_CHARS_MAX - 9]}_{hashlib.sha256(full.encode()).hexdigest()[:8]}"


def _safe(name: str) -> str:
    """MCP's names may hold characters that a function's may not."""
    return re.sub(r"[^a-zA-Z0-9_-]", "_", name)


def _chosen(
    offers: dict[str, Offer],
    named: NamedTool,
    at: str,
    left_out: tuple[str, ...],
    labels: Sequence[str],
    unlisted: Sequence[str],
) -> dict[str, Offer]:
    """The offers that a choice names: one, or all of a server. None while the server's tools are not known."""
    found = {model_name: offer for model_name, offer in offers.items() if _names(named, offer)}
    if named.type == "mcp" and (found or named.server_label in unlisted):
        return found
    if found:
        return dict([next(iter(found.items()))])
    if named.type == "mcp":
        if named.server_label not in labels:
            raise InvalidParameter(f"Tool choice 'mcp' server '{named.server_label}' not found in 'tools'.", param=at)
        raise InvalidParameter(f"The server '{named.server_label}' has no such tool that is allowed.", param=at)
    if named.type in {"function", "custom"}:
        raise InvalidParameter(f"Tool choice '{named.name}' not found in 'tools' parameter.", param=at)
    if named.type in left_out or named.type in KINDS:
        raise missing_server(named.type, at)
    raise UnsupportedParameter(f"Tool choice of type '{named.type}' is not supported by this server.", param=at)


def _names(named: NamedTool, offer: Offer) -> bool:
    match offer.by:
        case ByServer(label):
            return named.type == "mcp" and named.server_label == label and named.name in {None, offer.tool.name, UNSET}
        case ByHost(kind):
            return KINDS.get(named.type) == kind
        case ByClient():
            type_ = "custom" if isinstance(offer.tool, CustomTool) else "function"
            return named.type == type_ and named.name == offer.tool.name
