"""Files that parts refer to by id: which they are, and what the model gets in their place.

Stored items keep the ids. The content stands in for them only in what an upstream is sent.
"""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from app.domain.compaction import open_compacted
from app.domain.context import Context
from app.domain.sealed import Unseal
from app.errors import InvalidRequest
from app.wire.items import AnyItem, Compaction, CompactionTrigger, Content, InputFile, InputImage
from app.wire.requests import CreateResponse

IMAGE_TYPES = frozenset({"image/png", "image/jpeg", "image/gif", "image/webp"})
"""What models see."""

_MAGIC = {
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF8": "image/gif",
    b"%PDF-": "application/pdf",
}


class Reference(Struct, frozen=True):
    """Where a file is referred to: the parameter's path, and the one of a part that needs an image."""

    param: str
    image_param: str | None = None


class FileData(Struct, frozen=True):
    """The content of a file."""

    filename: str
    media_type: str
    base64: str

    @property
    def url(self) -> str:
        """The content as a data URL."""
        return f"data:{self.media_type};base64,{self.base64}"


Files = Mapping[str, FileData]
"""By their ids."""

NO_FILES: Files = MappingProxyType({})


def media_type(content: bytes, default: str | None) -> str:
    """The type of a content by how it begins, else the default."""
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        return "image/webp"
    found = (type_ for magic, type_ in _MAGIC.items() if content.startswith(magic))
    return next(found, default or "application/octet-stream")


def references(request: CreateResponse, context: Context, unseal: Unseal) -> dict[str, Reference]:
    """Files that the model gets, by id: those that visible items refer to. A file of an earlier item has the path `input`."""
    given = (at for at, item in enumerate(request.input) if not isinstance(item, CompactionTrigger))
    paths = {item.id: f"input[{at}]" for at, item in zip(given, context.input, strict=False)}
    found: dict[str, Reference] = {}
    for part, param in _parts(context, paths, unseal):
        file_id = _file_id(part)
        if file_id is None:
            continue
        known = found.get(file_id) or Reference(param)
        if isinstance(part, InputImage) and known.image_param is None:
            known = replace(known, image_param=param)
        found[file_id] = known
    return found


def filled(item: Any, files: Files) -> Any:
    """An item, or a message of a prompt, with the content of files in the place of their ids."""
    if not files:
        return item
    for field in ("content", "output"):
        parts = getattr(item, field, None)
        if isinstance(parts, list) and any(_file_id(part) for part in parts):
            return replace(item, **{field: [_filled(part, files) for part in parts]})
    return item


def check_image(file_id: str, type_: str, reference: Reference) -> None:
    """Raises InvalidRequest if a part needs an image, and the file is none."""
    if reference.image_param is not None and type_ not in IMAGE_TYPES:
        raise InvalidRequest(
            f"File '{file_id}' is no image that models see: those are PNG, JPEG, GIF and WebP.",
            param=reference.image_param,
            code="unsupported_image_media_type",
        )


def not_found(file_id: str, reference: Reference) -> InvalidRequest:
    """The error for a file that is unknown, deleted, or another tenant's."""
    return InvalidRequest(f"File with id '{file_id}' not found.", param=reference.param, code="file_not_found")


def _parts(context: Context, paths: Mapping[str, str], unseal: Unseal) -> Iterator[tuple[Any, str]]:
    """Every part that the model gets, with its path."""
    if isinstance(context.instructions, Sequence) and not isinstance(context.instructions, str):
        for message in context.instructions:
            yield from ((part, "prompt.variables") for part in message.content)
    for _, item in context.visible:
        yield from _parts_of(item, paths.get(item.id))
        if isinstance(item, Compaction) and (compacted := open_compacted(item, unseal)):
            for kept in compacted.messages:
                yield from _parts_of(kept, None)


def _parts_of(item: AnyItem, path: str | None) -> Iterator[tuple[Any, str]]:
    for field in ("content", "output"):
        parts = getattr(item, field, None)
        for at, part in enumerate(parts if isinstance(parts, list) else ()):
            yield part, f"{path}.{field}[{at}].file_id" if path else "input"


def _file_id(part: Any) -> str | None:
    """The file that stands for a part's content; None if that has its content in itself."""
    match part:
        case InputImage(image_url=content) | InputFile(file_data=content):
            return None if content else part.file_id or None
    return None


def _filled(part: Content, files: Files) -> Content:
    file = files.get(_file_id(part) or "")
    match part:
        case InputImage() if file:
            return replace(part, image_url=file.url)
        case InputFile() if file:
            return replace(part, file_data=file.url, filename=part.filename or file.filename)
    return part
