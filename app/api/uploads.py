"""The form of an upload. Its file is stored in pieces while it arrives, so that no more than one is in memory."""

import asyncio
import contextlib
import time
import unicodedata
from collections.abc import AsyncIterator
from typing import get_args

from multipart import MultipartError, MultipartSegment, PushMultipartParser, parse_options_header

from app.api.bodies import Body
from app.errors import BodyTooLarge, DatabaseUnavailable, InvalidParameter, InvalidRequest, UnsupportedParameter
from app.ids import new_id
from app.settings import Settings
from app.storage.database import Database
from app.storage.files import PIECE_BYTES, Quota, StoredFile, Upload
from app.wire.files import Purpose

FIELDS = ("file", "purpose")

FORM_BYTES_MAX = 64 * 1024
"""What a form may hold beside its file."""

BOUNDARY_CHARS_MAX = 200
"""Standards allow 70."""

FILENAME_CHARS_MAX = 255

PURPOSES: tuple[str, ...] = get_args(Purpose)


async def receive(body: Body, content_type: str, settings: Settings, database: Database, tenant_id: str) -> StoredFile:
    """The file of a form, stored. Nothing is left of one that breaks off. Raises InvalidRequest, BodyTooLarge, and what `Body.read` raises."""
    quota = Quota(settings.files_tenant_max, settings.files_tenant_bytes_max)
    upload = Upload(database, tenant_id, new_id("file"), quota)
    form = _Form(_boundary(content_type), upload, body, settings.file_bytes_max)
    try:
        return await body.receive(form.read)
    except BaseException:
        if form.has_begun:
            with contextlib.suppress(DatabaseUnavailable):  # then it is deleted as abandoned
                await asyncio.shield(upload.discard())
        raise


def _boundary(content_type: str) -> str:
    kind, options = parse_options_header(content_type)
    boundary = str(options.get("boundary", ""))
    if kind != "multipart/form-data" or not 0 < len(boundary) <= BOUNDARY_CHARS_MAX:
        raise InvalidRequest("The body must be multipart/form-data, with a boundary.")
    return boundary


class _Form:
    """A form as it arrives."""

    def __init__(self, boundary: str, upload: Upload, body: Body, file_bytes_max: int) -> None:
        self._boundary, self._upload, self._body, self._file_bytes_max = boundary, upload, body, file_bytes_max
        self._seen: set[str] = set()
        self._field = ""
        """The field that arrives."""
        self._buffer = bytearray()
        """What has arrived of it and is not stored."""
        self._file_bytes = 0
        self._purpose: Purpose | None = None
        self.has_begun = False
        """Whether anything may be stored."""

    async def read(self, parts: AsyncIterator[bytes]) -> StoredFile:
        """The whole form. Raises InvalidRequest, BodyTooLarge."""
        received = 0
        try:
            with PushMultipartParser(self._boundary, max_segment_count=len(FIELDS) + 1) as parser:
                async for part in parts:
                    received += len(part)
                    if received > self._file_bytes_max + FORM_BYTES_MAX:
                        raise _too_large()
                    for event in parser.parse(part) if part else ():
                        await self._take(event)
        except MultipartError:
            raise InvalidRequest("The body is not valid multipart/form-data.") from None
        if "file" not in self._seen:
            raise InvalidRequest("Missing required parameter: 'file'.", param="file", code="missing_required_parameter")
        if self._purpose is None:
            raise InvalidRequest(
                "Missing required parameter: 'purpose'.", param="purpose", code="missing_required_parameter"
            )
        return await self._upload.end(self._purpose)

    async def _take(self, event: MultipartSegment | bytes | None) -> None:
        if isinstance(event, MultipartSegment):
            await self._begin(event.name or "", event.filename)
        elif event is None:
            await self._end()
        elif self._field == "file":
            await self._take_data(event)
        else:
            self._buffer += event
            if len(self._buffer) > FORM_BYTES_MAX:
                raise _unknown_purpose()

    async def _begin(self, name: str, filename: str | None) -> None:
        field = name.partition("[")[0]
        if field == "expires_after":
            raise UnsupportedParameter("'expires_after' is not supported: files stay until deleted.", param=field)
        if field not in FIELDS:
            raise InvalidParameter(f"Unknown parameter: '{field}'.", param=field, code="unknown_parameter")
        if field in self._seen:
            raise InvalidParameter(f"'{field}' is given twice.", param=field)
        self._seen.add(field)
        self._field = field
        if field == "file":
            name = _checked_name(filename)
            self.has_begun = True
            await self._upload.begin(name, int(time.time()))

    async def _take_data(self, data: bytes) -> None:
        self._file_bytes += len(data)
        if self._file_bytes > self._file_bytes_max:
            raise _too_large()
        self._buffer += data
        self._body.hold(min(self._file_bytes, PIECE_BYTES))
        while len(self._buffer) >= PIECE_BYTES:
            await self._upload.write(bytes(self._buffer[:PIECE_BYTES]))
            del self._buffer[:PIECE_BYTES]

    async def _end(self) -> None:
        rest = bytes(self._buffer)
        self._buffer.clear()
        if self._field == "purpose":
            self._purpose = _purpose(rest)
        elif not self._file_bytes:
            raise InvalidParameter("The file is empty.", param="file")
        elif rest:
            await self._upload.write(rest)


def _purpose(given: bytes) -> Purpose:
    for purpose in get_args(Purpose):
        if given == purpose.encode():
            return purpose  # type: ignore[no-any-return]
    raise _unknown_purpose()


def _unknown_purpose() -> InvalidParameter:
    known = " or ".join(f"'{purpose}'" for purpose in PURPOSES)
    return InvalidParameter(f"'purpose' must be {known}; this server has no others.", param="purpose")


def _checked_name(filename: str | None) -> str:
    """A name that can be stored, listed and sent in a header."""
    if not filename:
        raise InvalidParameter("'file' must be a file, with a name.", param="file")
    if len(filename) > FILENAME_CHARS_MAX:
        raise InvalidParameter(f"The file's name is longer than {FILENAME_CHARS_MAX} characters.", param="file")
    if any(unicodedata.category(char) in {"Cc", "Cs"} for char in filename):
        raise InvalidParameter("The file's name contains control characters.", param="file")
    return filename


def _too_large() -> BodyTooLarge:
    return BodyTooLarge("The file is larger than this server takes (REPRISE_FILE_BYTES_MAX).", param="file")
