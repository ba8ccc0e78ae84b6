"""Context → chat request: messages, tools, parameters."""

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec.structs import replace

from app.domain.chat_template import fitted
from app.domain.context import Context
from app.domain.dialect import WRAPPED_INPUT, Dialect
from app.domain.files import NO_FILES, Files
from app.domain.messages import messages
from app.domain.sealed import Unseal
from app.domain.toolbox import Offer, Toolbox
from app.errors import UnsupportedParameter
from app.wire.chat import ChatMessage
from app.wire.items import InputText, Message
from app.wire.requests import CreateResponse, Detail, JsonObjectFormat, JsonSchemaFormat
from app.wire.tools import CustomTool, FunctionTool, Grammar

DETAILS: Mapping[Detail, str] = {
    "auto": "",
    "concise": "Be concise: one or two sentences.",
    "detailed": "Be detailed: a short paragraph for each step.",
}
"""`reasoning.summary` → what is added to the prompt for the summary."""


def chat_request(
    request: CreateResponse,
    context: Context,
    *,
    model: str,
    dialect: Dialect,
    unseal: Unseal,
    output_tokens_max: int | None = None,
    files: Files = NO_FILES,
) -> bytes:
    """The body of the upstream's `POST /chat/completions`; `output_tokens_max` is what this turn may still use, `files` are those that
    the context refers to. Raises UnsupportedParameter for what the upstream can't be asked."""
    reasoning = request.body.reasoning
    recall = (reasoning.context if reasoning else None) or "auto"
    chat = messages(context, dialect, unseal, recall, files=files)
    body = _streamed(model, chat, dialect) | (
        _sampling(request, dialect, output_tokens_max)
        | _text(request, dialect)
        | _tools(request, context.toolbox, dialect)
        | request.extra
    )
    return msgspec.json.encode(body)


def _streamed(model: str, chat: list[ChatMessage], dialect: Dialect) -> dict[str, Any]:
    body: dict[str, Any] = {"model": model, "messages": chat, "stream": True}
    if "stream_options" not in dialect.lacks:
        body["stream_options"] = {"include_usage": True}
    return body


def reasoning_summary_request(text: str, prompt: str, detail: Detail, *, model: str, dialect: Dialect) -> bytes:
    """The body of the request that asks a model for a summary of another's reasoning."""
    asked = "\n\n".join(filter(None, (prompt, DETAILS[detail])))
    chat: list[ChatMessage] = [{"role": "system", "content": asked}, {"role": "user", "content": text}]
    return msgspec.json.encode(_streamed(model, fitted(chat, dialect), dialect))


def compaction_turn(request: CreateResponse, context: Context, prompt: str) -> tuple[CreateResponse, Context]:
    """The request and the context of the turn in which the model makes the summary of a compaction: the same messages and tools, which the upstream's
    cache of the prompt knows, and then what asks for the summary. It is plain text, without calls."""
    body = replace(request.body, text=None, include=None, top_logprobs=None)
    asked = Message(role="user", content=[InputText(text=prompt)])
    toolbox = replace(context.toolbox, mode="none", only=None)
    return replace(request, body=body), replace(context, items=(*context.items, asked), toolbox=toolbox)


def _sampling(request: CreateResponse, dialect: Dialect, output_tokens_max: int | None) -> dict[str, Any]:
    body = request.body
    given: dict[str, Any] = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "frequency_penalty": body.frequency_penalty,
        "presence_penalty": body.presence_penalty,
        dialect.max_tokens: output_tokens_max,
    }
    given |= {name: getattr(body, name) for name in sorted(dialect.takes)}
    if body.reasoning and "reasoning_effort" not in dialect.lacks:
        given["reasoning_effort"] = body.reasoning.effort
    if body.top_logprobs or "message.output_text.logprobs" in request.include:
        given |= {"logprobs": True, "top_logprobs": body.top_logprobs or 0}
    return {name: value for name, value in given.items() if value is not None}


def _text(request: CreateResponse, dialect: Dialect) -> dict[str, Any]:
    text = request.body.text
    if text is None:
        return {}
    made: dict[str, Any] = {}
    if text.verbosity and dialect.verbosity:
        made["verbosity"] = text.verbosity
    match text.format:
        case JsonSchemaFormat() as format:
            dialect.demand("json_schema", "text.format")
            schema = {
                "name": format.name,
                "schema": format.schema,
                "description": format.description,
                "strict": format.strict,
            }
            made["response_format"] = {
                "type": "json_schema",
                "json_schema": {key: value for key, value in schema.items() if value is not None},
            }
        case JsonObjectFormat():
            dialect.demand("json_object", "text.format")
            made["response_format"] = {"type": "json_object"}
    return made


def _tools(request: CreateResponse, toolbox: Toolbox, dialect: Dialect) -> dict[str, Any]:
    # An upstream that ignores tool_choice ignores "none" too: then declaring no tools is the only way.
    if not toolbox.offers or (toolbox.mode == "none" and "tool_choice_required" in dialect.lacks):
        return {}
    is_choice = dialect.allowed_tools and toolbox.mode != "none" and len(toolbox.offers) < len(toolbox.every)
    is_alone = toolbox.only is not None and "tool_choice_named" in dialect.lacks
    declared = toolbox.every if is_choice else toolbox.offers
    offers = [toolbox.only] if toolbox.only and is_alone else declared.values()
    made: dict[str, Any] = {"tools": [_tool(offer, dialect) for offer in offers]}
    if toolbox.only:
        made["tool_choice"] = "required" if is_alone else _named(toolbox.only, dialect)
    elif is_choice:
        allowed = {"mode": toolbox.mode, "tools": [_named(offer, dialect) for offer in toolbox.offers.values()]}
        made["tool_choice"] = {"type": "allowed_tools", "allowed_tools": allowed}
    elif toolbox.mode != "auto":
        made["tool_choice"] = toolbox.mode
    if toolbox.only or toolbox.mode == "required":
        dialect.demand("tool_choice_required", "tool_choice")
    if request.body.parallel_tool_calls is not None and "parallel_tool_calls" not in dialect.lacks:
        made["parallel_tool_calls"] = request.body.parallel_tool_calls
    return made


def _named(offer: Offer, dialect: Dialect) -> dict[str, Any]:
    kind = "custom" if isinstance(offer.tool, CustomTool) and dialect.custom_tools == "native" else "function"
    return {"type": kind, kind: {"name": offer.model_name}}


def _tool(offer: Offer, dialect: Dialect) -> dict[str, Any]:
    if isinstance(offer.tool, CustomTool):
        return _custom_tool(offer, offer.tool, dialect)
    return {"type": "function", "function": _function(offer, offer.tool, dialect)}


def _function(offer: Offer, tool: FunctionTool, dialect: Dialect) -> dict[str, Any]:
    function: dict[str, Any] = {
        "name": offer.model_name,
        "description": tool.description,
        "parameters": tool.parameters if tool.parameters is not None else {"type": "object", "properties": {}},
        "strict": None if "strict" in dialect.lacks else tool.strict,
    }
    return {key: value for key, value in function.items() if value is not None}


def _custom_tool(offer: Offer, tool: CustomTool, dialect: Dialect) -> dict[str, Any]:
    grammar = tool.format if isinstance(tool.format, Grammar) else None
    described = tool.description or ""
    if dialect.custom_tools == "native":
        custom: dict[str, Any] = {"name": offer.model_name, "description": described}
        if grammar:
            inner = {"syntax": grammar.syntax, "definition": grammar.definition}
            custom["format"] = {"type": "grammar", "grammar": inner}
        return {"type": "custom", "custom": custom}
    if grammar and dialect.custom_tools != "describe":
        raise UnsupportedParameter(
            f"The grammar of custom tool '{tool.name}' is not supported with this model.", param="tools"
        )
    if grammar:
        described += f"\n\nThe input must follow this {grammar.syntax} grammar:\n{grammar.definition}"
    parameters = {
        "type": "object",
        "properties": {WRAPPED_INPUT: {"type": "string", "description": "The tool's whole input, as free text."}},
        "required": [WRAPPED_INPUT],
        "additionalProperties": False,
    }
    return {
        "type": "function",
        "function": {"name": offer.model_name, "description": described, "parameters": parameters},
    }
