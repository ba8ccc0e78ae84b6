"""The toolbox: the tools of one run, resolved: what the model sees, and what may become of a call.

The model sees plain functions with unique names. `verdict` maps the name of a call back to who runs it, and refuses calls of
tools that were not offered or not allowed: `allowed_tools` is enforced here, not only asked of the model.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Literal

from msgspec import Struct

from app.errors import InvalidParameter, UnsupportedParameter
from app.wire.tools import (
    AllowedTools,
    AnyTool,
    CustomTool,
    FunctionTool,
    HostedTool,
    NamedTool,
    NamespaceTool,
    ToolChoice,
    ToolMode,
)

MODEL_NAME_CHARS_MAX = 64
"""Chat Completions takes no longer function names."""


class Offer(Struct, frozen=True):
    """A tool that the client runs, as the model sees it."""

    model_name: str
    tool: FunctionTool | CustomTool
    namespace: str | None


class HandOver(Struct, frozen=True):
    """The call goes to the client."""

    kind: Literal["function", "custom"]
    name: str
    namespace: str | None


class Refuse(Struct, frozen=True):
    """The call goes nowhere; the model reads why."""

    reason: str


Verdict = HandOver | Refuse


class Toolbox(Struct, frozen=True):
    """`offers` is what the model may call; `mode` how it should; `only` a single tool that it must call."""

    offers: dict[str, Offer]
    mode: ToolMode
    only: Offer | None
    left_out: tuple[str, ...]
    """Hosted tools that nobody here runs: the model does not see them."""

    def verdict(self, model_name: str) -> Verdict:
        """What becomes of a call."""
        offer = self.offers.get(model_name)
        if offer is None or self.mode == "none" or (self.only and self.only is not offer):
            return Refuse(f"There is no tool named '{model_name}' that may be called now.")
        kind: Literal["function", "custom"] = "custom" if isinstance(offer.tool, CustomTool) else "function"
        return HandOver(kind, offer.tool.name, offer.namespace)

    def model_name(self, name: str, namespace: str | None) -> str:
        """How the model knows a tool; calls in old context may name tools that are no longer offered."""
        for offer in self.offers.values():
            if offer.tool.name == name and offer.namespace == namespace:
                return offer.model_name
        return _model_name(name, namespace)


def open_toolbox(declared: Sequence[AnyTool], added: Sequence[AnyTool], choice: ToolChoice) -> Toolbox:
    """Resolve the tools of a request: those it declares, and those that `additional_tools` items of the context add (the
    later of two with one name counts). Raises InvalidParameter or UnsupportedParameter."""
    _refuse_twice(declared)
    every, left_out = _offers((*declared, *added))
    if isinstance(choice, str):
        if choice == "required" and not every:
            raise InvalidParameter(
                "Tool choice 'required' must be specified with 'tools' parameter.", param="tool_choice"
            )
        return Toolbox(every, choice, None, left_out)
    if isinstance(choice, AllowedTools):
        allowed = {}
        for index, named in enumerate(choice.tools):
            allowed.update(_chosen(every, named, f"tool_choice.tools[{index}]", left_out))
        return Toolbox(allowed, choice.mode, None, left_out)
    (only,) = _chosen(every, choice, "tool_choice", left_out).values()
    return Toolbox(every, "required", only, left_out)


def _refuse_twice(declared: Sequence[AnyTool]) -> None:
    names = [tool.name for tool in declared if not isinstance(tool, HostedTool)]
    for name in names:
        if names.count(name) > 1:
            raise InvalidParameter(f"Duplicate tool name '{name}'. Tool names must be unique.", param="tools")
    for tool in declared:
        if isinstance(tool, NamespaceTool):
            _refuse_twice(tool.tools)


def _offers(tools: Iterable[AnyTool]) -> tuple[dict[str, Offer], tuple[str, ...]]:
    offers: dict[str, Offer] = {}
    left_out = []
    for index, tool in enumerate(tools):
        if isinstance(tool, HostedTool):
            if tool.type not in LEFT_OUT:
                raise UnsupportedParameter(
                    f"Tools of type '{tool.type}' are not supported by this server.", param=f"tools[{index}].type"
                )
            left_out.append(tool.type)
        elif isinstance(tool, NamespaceTool):
            for inner in tool.tools:
                _add(offers, inner, tool.name)
        else:
            _add(offers, tool, None)
    return offers, tuple(left_out)


LEFT_OUT = frozenset(
    "web_search web_search_2025_08_26 web_search_preview web_search_preview_2025_03_11 file_search code_interpreter "
    "image_generation tool_search".split()
)
"""Hosted tools that clients declare whether or not the server has them; they are left out of what the model sees, with a
warning. Other hosted tools are refused: a client that declares them depends on them."""


def _add(offers: dict[str, Offer], tool: FunctionTool | CustomTool, namespace: str | None) -> None:
    name = _model_name(tool.name, namespace)
    number = 2
    while name in offers and (offers[name].namespace, offers[name].tool.name) != (namespace, tool.name):
        name = f"{_model_name(tool.name, namespace)[: MODEL_NAME_CHARS_MAX - 3]}_{number}"
        number += 1
    offers[name] = Offer(name, tool, namespace)


def _model_name(name: str, namespace: str | None) -> str:
    full = f"{namespace}__{name}" if namespace else name
    if len(full) <= MODEL_NAME_CHARS_MAX:
        return full
    return f"{full[: MODEL_NAME_CHARS_MAX - 9]}_{hashlib.sha256(full.encode()).hexdigest()[:8]}"


def _chosen(offers: dict[str, Offer], named: NamedTool, at: str, left_out: tuple[str, ...]) -> dict[str, Offer]:
    found = {
        model_name: offer
        for model_name, offer in offers.items()
        if offer.tool.name == named.name
        and named.type == ("custom" if isinstance(offer.tool, CustomTool) else "function")
    }
    if found:
        return dict([next(iter(found.items()))])
    if named.type in {"function", "custom"}:
        raise InvalidParameter(f"Tool choice '{named.name}' not found in 'tools' parameter.", param=at)
    if named.type in left_out:
        raise UnsupportedParameter(f"No server is configured for tools of type '{named.type}'.", param=at)
    raise UnsupportedParameter(f"Tool choice of type '{named.type}' is not supported by this server.", param=at)
