"""Answers of tool servers, read from plain JSON: servers break their schemas, and omit required fields."""

import base64
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Struct


class Listed(Struct, frozen=True):
    """A tool as its server lists it. `annotations` have MCP's keys (`readOnlyHint`)."""

    name: str
    description: str | None
    input_schema: dict[str, Any]
    annotations: dict[str, Any] | None


class CallResult(Struct, frozen=True):
    """A tool's result."""

    text: str  # all of it, rendered for the model
    structured: Any | None
    images: tuple[tuple[str, str], ...]  # (media type, base64)
    is_error: bool  # the tool reports its failure


def read_tools(page: Mapping[str, Any]) -> list[Listed]:
    """The tools of one page that have names; other fields of a wrong type get defaults."""
    tools = page.get("tools")
    return [
        Listed(
            name=name,
            description=_text(tool.get("description")),
            input_schema=_object_schema(tool.get("inputSchema")),
            annotations=_object(tool.get("annotations")),
        )
        for tool in (tools if isinstance(tools, list) else [])
        if isinstance(tool, dict) and (name := _text(tool.get("name")))
    ]


def _object(value: object) -> dict[str, Any] | None:
    return value if isinstance(value, dict) else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _object_schema(schema: object) -> dict[str, Any]:
    """A schema of type object; upstreams refuse others."""
    if isinstance(schema, dict) and schema.get("type", "object") == "object":
        return {"type": "object", **schema}
    return {"type": "object"}


def read_result(result: Mapping[str, Any], bytes_max: int) -> CallResult:
    """A tool's result; its text is cut after `bytes_max` bytes of UTF-8."""
    content = result.get("content")
    parts = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    structured = result.get("structuredContent")
    lines, images = [], []
    for part in parts:
        line, image = _render(part)
        lines.append(line)
        images += [image] if image else []
    if structured is not None and not any(part.get("type") == "text" for part in parts):
        lines.insert(0, msgspec.json.encode(structured).decode())
    text = _cut("\n".join(lines), bytes_max)
    return CallResult(text, structured, tuple(images), is_error=result.get("isError") is True)


def _render(part: Mapping[str, Any]) -> tuple[str, tuple[str, str] | None]:
    """A part of a result as text, and as an image where it is one."""
    match part:
        case {"type": "text", "text": str(text)}:
            return text, None
        case {"type": "image" | "audio", "data": str(data)}:
            return _binary("", part.get("mimeType"), data)
        case {"type": "resource", "resource": {"text": str(text)}}:
            return text, None
        case {"type": "resource", "resource": {"blob": str(data), **resource}}:
            return _binary(f"resource {resource.get('uri')}, ", resource.get("mimeType"), data)
        case {"type": "resource_link", "uri": str(uri)}:
            named = ": ".join(str(part[key]) for key in ("name", "description") if part.get(key))
            return f"[resource link {uri}{f', {named}' if named else ''}]", None
        case _:
            return f"[content of type {part.get('type')!r}]", None


def _binary(what: str, media_type: object, data: str) -> tuple[str, tuple[str, str] | None]:
    media = media_type if isinstance(media_type, str) and media_type else "application/octet-stream"
    try:
        size = len(base64.b64decode(data, validate=True))
    except ValueError:
        return f"[{what}{media}, not readable]", None
    return f"[{what}{media}, {size} bytes]", (media, data) if media.startswith("image/") else None


def _cut(text: str, bytes_max: int) -> str:
    encoded = text.encode(errors="replace")
    if len(encoded) <= bytes_max:
        return text
    shown = encoded[:bytes_max].decode(errors="ignore")
    return f"{shown}\n[cut off here: {len(encoded)} bytes in all, {bytes_max} are shown]"
