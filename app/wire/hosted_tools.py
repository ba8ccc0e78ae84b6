"""Declarations of the tools that the hosted API runs: they are carried as they came, once these Structs have checked them."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Raw, Struct

from app.wire.decoding import Json, decode

Caller = Literal["direct", "programmatic"]


class _Declaration(Struct, forbid_unknown_fields=True, kw_only=True):
    """A tool that has no parameters of its own."""

    type: str
    allowed_callers: list[Caller] | None = None


class _UserLocation(Struct, forbid_unknown_fields=True):
    type: Literal["approximate"] | None = "approximate"
    city: str | None = None
    country: str | None = None
    region: str | None = None
    timezone: str | None = None


class _Domains(Struct, forbid_unknown_fields=True):
    allowed_domains: list[str] | None = None
    blocked_domains: list[str] | None = None


class WebSearch(_Declaration):
    external_web_access: bool | None = None
    filters: _Domains | None = None
    search_context_size: Literal["low", "medium", "high"] | None = None
    search_content_types: list[Literal["text", "image"]] | None = None
    user_location: _UserLocation | None = None


class _HybridSearch(Struct, forbid_unknown_fields=True):
    embedding_weight: float
    text_weight: float


class _RankingOptions(Struct, forbid_unknown_fields=True):
    hybrid_search: _HybridSearch | None = None
    ranker: str | None = None
    score_threshold: Annotated[float, Meta(ge=0, le=1)] | None = None


class FileSearch(_Declaration):
    vector_store_ids: Annotated[list[str], Meta(min_length=1)]
    filters: Json | None = None
    max_num_results: Annotated[int, Meta(ge=1, le=50)] | None = None
    ranking_options: _RankingOptions | None = None


class _AutoContainer(Struct, forbid_unknown_fields=True):
    type: Literal["auto"]
    file_ids: list[str] | None = None
    memory_limit: Literal["1g", "4g", "16g", "64g"] | None = None
    network_policy: Json | None = None


class CodeInterpreter(_Declaration):
    container: str | _AutoContainer | None = None


class _Mask(Struct, forbid_unknown_fields=True):
    file_id: str | None = None
    image_url: str | None = None


class ImageGeneration(_Declaration):
    action: Literal["generate", "edit", "auto"] | None = None
    background: Literal["transparent", "opaque", "auto"] | None = None
    complexity: Literal["low", "medium", "high"] | None = None
    frame_count: Annotated[int, Meta(ge=1)] | None = None
    frame_duration_ms: Annotated[int, Meta(ge=1)] | None = None
    input_fidelity: Literal["high", "low"] | None = None
    input_image_mask: _Mask | None = None
    model: str | None = None
    moderation: Literal["auto", "low"] | None = None
    output_compression: Annotated[int, Meta(ge=0, le=100)] | None = None
    output_format: Literal["png", "webp", "jpeg", "gif", "svg"] | None = None
    partial_images: Annotated[int, Meta(ge=0, le=3)] | None = None
    quality: Literal["low", "medium", "high", "xhigh", "max", "auto"] | None = None
    size: str | None = None
    svg: Json | None = None


class _ShellEnvironment(Struct, forbid_unknown_fields=True):
    """`local`, `container_auto` and `container_reference` together."""

    type: Literal["local", "container_auto", "container_reference"]
    container_id: str | None = None
    file_ids: list[str] | None = None
    memory_limit: Literal["1g", "4g", "16g", "64g"] | None = None
    network_policy: Json | None = None
    skills: list[Json] | None = None


class Shell(_Declaration):
    environment: _ShellEnvironment | None = None


class ToolSearch(_Declaration):
    description: str | None = None
    execution: Literal["server", "client"] | None = None
    parameters: Any = None


class ComputerUsePreview(_Declaration):
    display_height: int
    display_width: int
    environment: Literal["windows", "mac", "linux", "ubuntu", "browser"]


DECLARATIONS: dict[str, type[_Declaration]] = {
    "web_search": WebSearch,
    "web_search_2025_08_26": WebSearch,
    "web_search_preview": WebSearch,
    "web_search_preview_2025_03_11": WebSearch,
    "file_search": FileSearch,
    "code_interpreter": CodeInterpreter,
    "image_generation": ImageGeneration,
    "tool_search": ToolSearch,
    "programmatic_tool_calling": _Declaration,
    "computer": _Declaration,
    "computer_use_preview": ComputerUsePreview,
    "local_shell": _Declaration,
    "shell": Shell,
    "apply_patch": _Declaration,
}
HOSTED = frozenset(DECLARATIONS)
"""Types of hosted tools that the API knows."""

_DECODERS = {type_: msgspec.json.Decoder(struct) for type_, struct in DECLARATIONS.items()}
_FIELDS = msgspec.json.Decoder(Json)


def declared_keys(type_: str) -> frozenset[str]:
    """The keys that the declaration of a hosted tool may have."""
    return frozenset(DECLARATIONS[type_].__struct_encode_fields__)


def decode_declaration(type_: str, raw: Raw, at: str) -> Json:
    """The keys of a hosted tool's declaration, as they came. Raises InvalidParameter with the path of the one that is wrong."""
    decode(_DECODERS[type_], raw, at)
    return decode(_FIELDS, raw, at)
