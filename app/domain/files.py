"""Images, files and sounds in the parts of items: where their content is, and what an upstream gets in their place.

Stored items keep ids and addresses. The content, or the text of a file for upstreams that take no files, stands in for them only in
what an upstream is sent.
"""

import base64
import binascii
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from msgspec import Struct
from msgspec.structs import replace

from app.domain.compaction import open_compacted
from app.domain.context import Context
from app.domain.dialect import Dialect, Lack
from app.domain.sealed import Unseal
from app.errors import InvalidParameter, InvalidRequest, UnsupportedParameter
from app.wire.items import (
    AnyItem,
    Audio,
    Compaction,
    CompactionTrigger,
    Content,
    FunctionCallOutput,
    InputAudio,
    InputFile,
    InputImage,
    InputText,
    OpaqueItem,
    call_id_of,
    screenshot_of,
)
from app.wire.requests import CreateResponse

IMAGE_TYPES = frozenset({"image/png", "image/jpeg", "image/gif", "image/webp"})
"""What models see."""

AUDIO_FORMATS = {
    "audio/wav": "wav",
    "audio/x-wav": "wav",
    "audio/mpeg": "mp3",
    "audio/flac": "flac",
    "audio/ogg": "ogg",
    "audio/mp4": "m4a",
    "audio/webm": "webm",
}
"""What models hear: type → the format's name in a chat request."""

_MAGIC = {
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF8": "image/gif",
    b"%PDF-": "application/pdf",
    b"fLaC": "audio/flac",
    b"OggS": "audio/ogg",
    b"ID3": "audio/mpeg",
}
_RIFF = {b"WEBP": "image/webp", b"WAVE": "audio/wav"}

UNKNOWN_TYPE = "application/octet-stream"
_TYPE = re.compile("[a-z0-9][a-z0-9!#$&^_.+-]{0,126}/[a-z0-9][a-z0-9!#$&^_.+-]{0,126}")
"""As RFC 6838 has them."""

_HEAD_CHARS = 32
"""Of base64: enough to know a type."""

Media = InputImage | InputFile | InputAudio
Source = Literal["id", "url", "data"]


class FileText(Struct, frozen=True):
    """The text of a file; `pages` are counted in `unit`s, where the kind has any."""

    kind: str
    text: str
    pages: int = 0
    unit: str = "page"


class FileData(Struct, frozen=True):
    """The content of a file: its bytes in base64, its text, or both, as the upstreams need it."""

    filename: str
    media_type: str
    base64: str = ""
    text: FileText | None = None

    @property
    def url(self) -> str:
        """The content as a data URL."""
        return f"data:{self.media_type};base64,{self.base64}"


class Gone(Struct, frozen=True):
    """A file of an earlier item that is deleted, or can't be fetched any more."""


Files = Mapping[str, FileData | Gone]
"""By their ids, addresses, or data: the text of data that a part holds itself."""

NO_FILES: Files = MappingProxyType({})


class Place(Struct, frozen=True):
    """A part that the model gets, and its path: `input` if an earlier item has it."""

    part: Media
    path: str
    is_new: bool
    """Whether the request gives it."""

    @property
    def param(self) -> str:
        """The path of the part's content."""
        return f"{self.path}.{_key_of(self.part)}" if "[" in self.path else self.path


class Wanted(Struct, frozen=True):
    """A content that has to be read, and the first place that needs it."""

    source: Source
    place: Place
    is_file: bool
    """Whether it is a part of the type `input_file`."""
    times: int = 1
    """How many places need it: each is sent the whole."""


class Needs(Struct, frozen=True):
    """What the upstreams that may answer need."""

    texts: bool
    """Whether one takes no files, but their text."""
    data: bool
    """Whether one takes files."""
    images: bool
    """Whether one takes images without their addresses."""

    @classmethod
    def of(cls, dialects: Sequence[Dialect]) -> "Needs":
        """Those of upstreams with these dialects."""
        return cls(
            texts=any(dialect.files == "text" for dialect in dialects),
            data=any(dialect.files == "native" for dialect in dialects),
            images=any("image_urls" in dialect.lacks for dialect in dialects),
        )


# -- Types ------------------------------------------------------------------------------------------------------------------


def media_type(content: bytes, default: str | None) -> str:
    """The type of a content by how it begins, else the default, if it is a type in small letters."""
    if content.startswith(b"RIFF") and (found := _RIFF.get(content[8:12])):
        return found
    if content[:1] == b"\xff" and len(content) > 1 and content[1] & 0xE6 == 0xE2:  # a frame of MPEG layer 3
        return "audio/mpeg"
    known = (type_ for magic, type_ in _MAGIC.items() if content.startswith(magic))
    return next(known, default if default and _TYPE.fullmatch(default) else UNKNOWN_TYPE)


def is_document(type_: str) -> bool:
    """Whether a file of this type is sent as a file, or its text: it is neither an image nor a sound."""
    return type_ not in IMAGE_TYPES and type_ not in AUDIO_FORMATS


def data_of(file_data: str) -> bytes:
    """The content of a data URL, or of base64. Raises ValueError."""
    try:
        return base64.b64decode("".join(_base64_of(file_data).split()), validate=True)
    except binascii.Error:
        raise ValueError("it is no base64") from None


def _base64_of(file_data: str) -> str:
    return file_data.partition(",")[2] if file_data[:5] == "data:" else file_data


def _given_type(file_data: str) -> str:
    """The type of data in a part."""
    given = file_data[5:100].partition(",")[0].partition(";")[0] if file_data[:5] == "data:" else ""
    comma = file_data.find(",", 0, 1024) + 1 if file_data[:5] == "data:" else 0
    try:
        head = base64.b64decode(file_data[comma : comma + _HEAD_CHARS])
    except binascii.Error:
        head = b""
    return media_type(head, given.lower())


# -- What is to be read -----------------------------------------------------------------------------------------------------


def places(request: CreateResponse, context: Context, own: Collection[str], unseal: Unseal) -> list[Place]:
    """Every image, file and sound that the model gets. `own` are ids of the request's own items."""
    given = (at for at, item in enumerate(request.input) if not isinstance(item, CompactionTrigger))
    paths = {item.id: f"input[{at}]" for at, item in zip(given, context.input, strict=False)}
    variables = "prompt.variables" if request.body.prompt else "agent.variables"
    return [Place(part, path, is_new) for part, path, is_new in _media(context, variables, paths, own, unseal)]


def wanted(found: Sequence[Place], needs: Needs) -> dict[str, Wanted]:
    """The contents that have to be read, by id, address or data."""
    made: dict[str, Wanted] = {}
    for place in found:
        source, key = _source(place.part)
        if not key or not _is_needed(place.part, source, key, needs):
            continue
        known = made.get(key)
        if known and place.is_new and not known.place.is_new:
            del made[key]  # from now on it is one of the request's own, in their order
        first = known.place if known and (known.place.is_new or not place.is_new) else place
        is_file = isinstance(place.part, InputFile) or bool(known and known.is_file)
        made[key] = Wanted(source, first, is_file, known.times + 1 if known else 1)
    return made


def _is_needed(part: Media, source: Source, key: str, needs: Needs) -> bool:
    match part:
        case InputImage():
            return source == "id" or (source == "url" and needs.images)
        case InputFile() if source == "data":
            return needs.texts and is_document(_given_type(key))
    return source != "data"


def unfetched(wanted: Mapping[str, Wanted], fetches_max: int) -> frozenset[str]:
    """Addresses of earlier items that are too many to be fetched: the oldest ones. Raises InvalidParameter if the request itself has
    too many."""
    own = [one.place for one in wanted.values() if one.source == "url" and one.place.is_new]
    earlier = [key for key, one in wanted.items() if one.source == "url" and not one.place.is_new]
    if len(own) > fetches_max:
        raise InvalidParameter(
            f"The request has {len(own)} files that have to be fetched; more than {fetches_max} are not possible.",
            param=own[fetches_max].param,
        )
    return frozenset(earlier[: max(0, len(own) + len(earlier) - fetches_max)])


def check(found: Sequence[Place], files: Files, dialect: Dialect) -> None:
    """Raises InvalidRequest for what an upstream of this dialect can't be sent."""
    for place in found:
        if place.is_new and _is_no_address(place.part):
            raise InvalidRequest(
                "The address of an image must begin with http:// or https://.",
                param=place.param,
                code="invalid_image_url",
            )
        if place.is_new and len(given := _given_sources(place.part)) > 1:
            raise InvalidParameter(
                f"Mutually exclusive parameters: give {' or '.join(map(repr, given))}, not both.",
                param=place.param,
                code="mutually_exclusive_parameters",
            )
        try:
            _form(place.part, files, dialect)
        except InvalidRequest as error:
            raise type(error)(error.message, param=place.param, code=error.code) from None


def not_found(file_id: str, place: Place) -> InvalidRequest:
    """The error for a file that is unknown, deleted, or another tenant's."""
    return InvalidRequest(f"File with id '{file_id}' not found.", param=place.param, code="file_not_found")


def name_of(part: Media) -> str:
    """What a part calls its file, or the last part of its address."""
    if isinstance(part, InputFile) and part.filename:
        return part.filename
    source, key = _source(part)
    if source != "url":
        return ""
    try:
        address = urlsplit(key)
        return unquote(address.path.rpartition("/")[2]) or address.hostname or ""
    except ValueError:
        return ""


def _media(
    context: Context, variables: str, paths: Mapping[str, str], own: Collection[str], unseal: Unseal
) -> Iterator[tuple[Media, str, bool]]:
    """Each part with its path, and whether the request gives it."""
    if isinstance(context.instructions, Sequence) and not isinstance(context.instructions, str):
        for message in context.instructions:
            yield from ((part, variables, True) for part in message.content if isinstance(part, Media))
    for _, item in context.visible:
        for part, path in _media_of(item, paths.get(item.id)):
            yield part, path, item.id in own
        if isinstance(item, Compaction) and (compacted := open_compacted(item, unseal)):
            for kept in compacted.messages:
                yield from ((part, path, False) for part, path in _media_of(kept, None))


def _media_of(item: AnyItem, path: str | None) -> Iterator[tuple[Media, str]]:
    for field in ("content", "output"):
        parts = getattr(item, field, None)
        for at, part in enumerate(parts if isinstance(parts, list) else ()):
            if isinstance(part, Media):
                yield part, f"{path}.{field}[{at}]" if path else "input"
    if screenshot := screenshot_of(item):
        yield screenshot, f"{path}.output" if path else "input"


def _source(part: Media) -> tuple[Source, str]:
    """Where a part's content is; its key is empty if it has none."""
    match part:
        case InputImage(image_url=str(url)) if url:
            return ("data" if url[:5].lower() == "data:" else "url"), url
        case InputFile(file_data=str(data)) if data:
            return "data", data
        case InputAudio(input_audio=Audio(data=data)):
            return "data", data
        case InputFile(file_url=str(url)) | InputAudio(audio_url=str(url)) if url and not part.file_id:
            return "url", url
    return "id", part.file_id or ""


_SOURCES: Mapping[type, tuple[str, ...]] = {
    InputImage: ("image_url", "file_id"),
    InputFile: ("file_data", "file_url", "file_id"),
    InputAudio: ("input_audio", "audio_url", "file_id"),
}


def _given_sources(part: Media) -> list[str]:
    """The keys under which a part has a content: one, or what it has under the others would count for nothing."""
    return [key for key in _SOURCES[type(part)] if getattr(part, key)]


def _is_no_address(part: Media) -> bool:
    """Whether a part names an image where no web server is asked: an upstream would look among its own files."""
    source, key = _source(part)
    return isinstance(part, InputImage) and source == "url" and not key[:8].lower().startswith(("http://", "https://"))


def _key_of(part: Media) -> str:
    """The key of a part that holds its content."""
    source, key = _source(part)
    if source == "id" and key:
        return "file_id"
    match part:
        case InputImage():
            return "image_url"
        case InputFile():
            return "file_url" if source == "url" else "file_data"
    return "audio_url" if source == "url" else "input_audio"


# -- What an upstream gets --------------------------------------------------------------------------------------------------

Form = Literal["note", "given", "image", "file", "text", "audio"]
"""What stands for a part; `given` is the part itself."""


def filled(item: Any, files: Files, dialect: Dialect) -> Any:
    """An item, or a message of a prompt, in the form that an upstream takes: with the content of files in the place of their ids.
    Raises InvalidRequest."""
    if isinstance(item, OpaqueItem) and (screenshot := screenshot_of(item)):
        return FunctionCallOutput(call_id=call_id_of(item), output=[_filled(screenshot, files, dialect)])
    for field in ("content", "output"):
        parts = getattr(item, field, None)
        if isinstance(parts, list) and any(isinstance(part, Media) for part in parts):
            return replace(item, **{field: [_filled(part, files, dialect) for part in parts]})
    return item


def _filled(part: Content, files: Files, dialect: Dialect) -> Content:
    if not isinstance(part, Media):
        return part
    form, file = _form(part, files, dialect)
    match form:
        case "note":
            name = json.dumps(name_of(part) or part.file_id, ensure_ascii=False)
            return InputText(text=f"(The file {name}, which was attached here, is not available any more.)")
        case "text" if file.text:
            return InputText(text=_described(file.filename, file.text))
        case "image" if isinstance(part, InputImage):
            return replace(part, image_url=file.url)
        case "image":
            return InputImage(
                image_url=file.url, detail=part.detail or "auto" if isinstance(part, InputFile) else "auto"
            )
        case "audio":
            return InputAudio(input_audio=Audio(data=file.base64, format=AUDIO_FORMATS[file.media_type]))
        case "file" if isinstance(part, InputFile) and not part.file_data:
            return replace(part, file_data=file.url, filename=file.filename)
    return part


def _described(filename: str, text: FileText) -> str:
    name = json.dumps(filename, ensure_ascii=False)
    pages = f", {text.pages} {text.unit}{'' if text.pages == 1 else 's'}" if text.pages else ""
    return f"Extracted text of the file {name} ({text.kind}{pages}):\n\n{text.text}\n\n(End of the file {name}.)"


def _form(part: Media, files: Files, dialect: Dialect) -> tuple[Form, FileData]:
    """The form in which a part is sent, and its content. Raises InvalidRequest without a path."""
    source, key = _source(part)
    if not key:
        raise UnsupportedParameter(_NOTHING[type(part)], param="input")
    file = files.get(key)
    if isinstance(file, Gone) or _is_no_address(part):
        return "note", NO_DATA
    match part:
        case InputImage():
            is_sent = source == "url" and "image_urls" not in dialect.lacks
            return _form_as(_IMAGE, None if is_sent else file, dialect)
        case InputAudio():
            return _form_as(_SOUND, file, dialect)
    file = _with_name(part, key, file) if file or source != "data" else _own(part, key)
    if file.media_type in IMAGE_TYPES:
        return _form_as(_IMAGE, file, dialect)
    if file.media_type in AUDIO_FORMATS:
        return _form_as(_SOUND, file, dialect)
    if dialect.files == "none":
        raise UnsupportedParameter("Files are not supported with this model.", param="input")
    is_text = file.text is not None and (dialect.files == "text" or not (file.base64 or part.file_data))
    return ("text" if is_text else "file"), file


def _form_as(medium: "_Medium", file: FileData | None, dialect: Dialect) -> tuple[Form, FileData]:
    if medium.lack in dialect.lacks:
        raise UnsupportedParameter(f"{medium.name} not supported with this model.", param="input")
    if file is None:
        return "given", NO_DATA
    if file.media_type not in medium.types:
        raise InvalidRequest(f"File '{file.filename}' is {medium.otherwise}.", param="input", code=medium.code)
    return medium.form, file


def _with_name(part: InputFile, key: str, file: FileData | None) -> FileData:
    assert file is not None, f"{key} was read"
    return replace(file, filename=part.filename) if part.filename else file


def _own(part: InputFile, file_data: str) -> FileData:
    """What a part holds itself."""
    type_ = _given_type(file_data)
    held = "" if is_document(type_) else _base64_of(file_data)
    return FileData(part.filename or "file", type_, held)


NO_DATA = FileData("", UNKNOWN_TYPE)


class _Medium(Struct, frozen=True):
    """What models see or hear."""

    form: Form
    types: Collection[str]
    lack: Lack
    """Of a dialect that does not take it."""
    name: str
    """With its verb."""
    otherwise: str
    """What a file of another type is."""
    code: str


_IMAGE = _Medium(
    form="image",
    types=IMAGE_TYPES,
    lack="images",
    name="Images are",
    otherwise="no image that models see: those are PNG, JPEG, GIF and WebP",
    code="unsupported_image_media_type",
)
_SOUND = _Medium(
    form="audio",
    types=AUDIO_FORMATS,
    lack="audio",
    name="Audio is",
    otherwise="no audio that models hear: that is WAV, MP3, FLAC, Ogg, M4A and WebM",
    code="unsupported_audio_media_type",
)

_NOTHING: Mapping[type, str] = {
    InputImage: "An image needs an 'image_url' or a 'file_id'.",
    InputFile: "A file needs 'file_data', a 'file_id' or a 'file_url'.",
    InputAudio: "Audio needs 'input_audio', a 'file_id' or an 'audio_url'.",
}
