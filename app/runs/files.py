"""The files that a run's context refers to: looked up, fetched, read, and made text where an upstream takes no files."""

import base64
import mimetypes
from collections.abc import Collection, Mapping, Sequence

from msgspec import Struct

from app.domain.dialect import Dialect
from app.domain.files import (
    FileData,
    Files,
    FileText,
    Gone,
    Needs,
    Place,
    Wanted,
    data_of,
    is_document,
    media_type,
    name_of,
    not_found,
    unfetched,
)
from app.errors import InvalidRequest, StoredFileNotFound
from app.offload import offload
from app.outbound.downloads import Allowance, NotFetched, fetch
from app.outbound.extraction import CpuTime, Extraction, Key, Unreadable, content_key
from app.outbound.guard import Guard
from app.settings import Settings
from app.storage import files
from app.storage.database import Database
from app.storage.files import StoredFile


class Found(Struct, frozen=True):
    """What a context's files take at most, as far as that is known before they are read."""

    stored: Mapping[str, StoredFile]
    fetched_bytes_max: int
    text_bytes_max: int
    bytes: int
    """In requests to upstreams, all together, each as often as it is sent."""
    unfetched: Collection[str] = ()
    """Addresses that are too many."""


class FileReading:
    """Reads files for the runs of this process."""

    def __init__(self, settings: Settings, database: Database, guard: Guard, extraction: Extraction) -> None:
        self.settings, self.database, self.guard, self.extraction = settings, database, guard, extraction

    async def find(self, tenant_id: str, wanted: Mapping[str, Wanted], needs: Needs, size: int) -> Found:
        """What has to be read, beside a context of this size. Raises InvalidRequest for a file of the request that there is not, with
        the path of what refers to it, or for too many."""
        settings = self.settings
        if len(wanted) > settings.context_files_max:
            raise InvalidRequest(
                f"The context refers to {len(wanted)} files; more than {settings.context_files_max} are not possible.",
                param="input",
            )
        too_many = unfetched(wanted, settings.context_fetched_files_max)
        ids = [key for key, one in wanted.items() if one.source == "id"]
        stored = {}
        if ids:
            async with self.database.autocommit() as tx:
                stored = {file.id: file for file in await files.find_files(tx, tenant_id, ids)}
        for id in ids:
            if id not in stored and wanted[id].place.is_new:
                raise not_found(id, wanted[id].place)
        most = settings.context_bytes_max - size
        needed = sum(_encoded(file.bytes) for file in stored.values())
        left = max(0, most - needed)
        reads_text = needs.texts and any(one.is_file for one in wanted.values())
        text_bytes_max = min(settings.file_text_bytes_max, left) if reads_text else 0
        fetches = any(one.source == "url" for one in wanted.values())
        fetched = min(settings.file_fetch_bytes_max, (left - text_bytes_max) * 3 // 4) if fetches else 0
        once = needed + text_bytes_max + _encoded(fetched)
        again = sum(_encoded(file.bytes) * (wanted[id].times - 1) for id, file in stored.items())
        again += _encoded(fetched) * max((one.times - 1 for one in wanted.values() if one.source == "url"), default=0)
        return Found(stored, fetched, text_bytes_max, max(once, min(once + again, most)), too_many)

    async def read(
        self,
        tenant_id: str,
        wanted: Mapping[str, Wanted],
        found: Found,
        dialects: Sequence[Dialect],
        *,
        wait_s: float | None,
    ) -> Files:
        """The contents, as the upstreams need them. Raises InvalidRequest for one that can't be read."""
        reading = _Reading(self, tenant_id, Needs.of(dialects), found, wait_s, is_text=dialects[0].files == "text")
        # Earlier addresses come last: they may be slow, and what is left out for that reason must not be the request's own.
        in_order = sorted(wanted.items(), key=lambda item: item[1].source == "url" and not item[1].place.is_new)
        return {key: await reading.read(key, one) for key, one in in_order}


class _Reading:
    """Reads the files of one context."""

    def __init__(
        self, files: FileReading, tenant_id: str, needs: Needs, found: Found, wait_s: float | None, *, is_text: bool
    ) -> None:
        self._files, self._database = files, files.database
        self._tenant_id, self._needs, self._found, self._wait_s = tenant_id, needs, found, wait_s
        self._is_text = is_text
        """Whether the first upstream takes texts only."""
        settings = self._settings = files.settings
        self._left, self._text_left = found.bytes, found.text_bytes_max
        self._cpu_time = CpuTime(settings.file_text_cpu_s)
        self._allowance = Allowance(
            found.fetched_bytes_max,
            settings.file_fetch_timeout_s,
            self._too_large(found.fetched_bytes_max, settings.file_fetch_bytes_max, "of files at addresses"),
        )

    async def read(self, key: str, one: Wanted) -> FileData | Gone:
        """One content."""
        file = await self._read(key, one)
        self._left -= one.times * size_of(file)
        if self._left < 0:
            raise InvalidRequest(self._too_long, param=one.place.param, code="context_length_exceeded")
        return file

    async def _read(self, key: str, one: Wanted) -> FileData | Gone:
        match one.source:
            case "id":
                return await self._stored(key, one)
            case "url":
                return await self._fetched(key, one)
        return await self._given(key, one)

    async def _stored(self, file_id: str, one: Wanted) -> FileData | Gone:
        file = self._found.stored.get(file_id)
        if file is None:
            return Gone()
        key = (self._tenant_id, file_id.encode())
        pieces = []
        type_ = ""
        try:
            for number in file.pieces:
                async with self._database.autocommit() as tx:
                    pieces.append(await files.read_piece(tx, self._tenant_id, file_id, number))
                if number == 0:
                    type_ = media_type(pieces[0], mimetypes.guess_type(file.filename)[0])
                    if not self._needs.data and (text := await self._known_text(key, one, file.filename, type_)):
                        return FileData(file.filename, type_, text=text)
        except StoredFileNotFound:
            if one.place.is_new:
                raise not_found(file_id, one.place) from None
            return Gone()
        return await self._made(key, one, file.filename, type_, pieces)

    async def _fetched(self, url: str, one: Wanted) -> FileData | Gone:
        if url in self._found.unfetched:
            return Gone()
        try:
            got = await fetch(self._files.guard, self._tenant_id, url, self._allowance)
        except NotFetched as error:
            if not one.place.is_new:
                return Gone()
            raise InvalidRequest(
                f"The file can't be fetched. {error}", param=one.place.param, code="file_not_fetched"
            ) from None
        filename = name_of(one.place.part) or got.filename or "file"
        type_ = media_type(got.content, got.media_type or mimetypes.guess_type(filename)[0])
        key = await offload(len(got.content), content_key, self._tenant_id, got.content)
        return await self._made(key, one, filename, type_, [got.content])

    async def _given(self, file_data: str, one: Wanted) -> FileData:
        """The text of what a part holds itself."""
        filename = name_of(one.place.part) or "file"
        try:
            content = await offload(len(file_data), data_of, file_data)
        except ValueError as error:
            raise InvalidRequest(
                f"The file can't be read: {error}.", param=one.place.param, code="invalid_value"
            ) from None
        key = await offload(len(content), content_key, self._tenant_id, content)
        type_ = media_type(content, mimetypes.guess_type(filename)[0])
        return FileData(filename, type_, text=await self._text(key, one, filename, content))

    async def _made(self, key: Key, one: Wanted, filename: str, type_: str, pieces: list[bytes]) -> FileData:
        text = None
        size = sum(map(len, pieces))
        if one.is_file and self._needs.texts and is_document(type_):
            text = await self._text(key, one, filename, b"".join(pieces))
        is_sent = self._needs.data or text is None
        return FileData(filename, type_, await offload(size, _in_base64, pieces) if is_sent else "", text)

    async def _known_text(self, key: Key, one: Wanted, filename: str, type_: str) -> FileText | None:
        """The text of a document, if it need not be read."""
        if not is_document(type_):
            return None
        try:
            return self._counted(self._files.extraction.known(key), one)
        except Unreadable as error:
            raise _unreadable(filename, one.place, error) from None

    async def _text(self, key: Key, one: Wanted, filename: str, content: bytes) -> FileText | None:
        """The text of a document; None if it has none, and the first upstream takes it as it is."""
        extraction = self._files.extraction
        try:
            return self._counted(await extraction.text(key, content, self._cpu_time, wait_s=self._wait_s), one)
        except Unreadable as error:
            if not self._is_text:
                return None
            raise _unreadable(filename, one.place, error) from None

    def _counted(self, text: FileText | None, one: Wanted) -> FileText | None:
        if text is None:
            return None
        self._text_left -= one.times * len(text.text.encode())
        if self._text_left < 0:
            raise InvalidRequest(
                self._too_large(self._found.text_bytes_max, self._settings.file_text_bytes_max, "of text"),
                param=one.place.param,
                code="context_length_exceeded",
            )
        return text

    def _too_large(self, most: int, setting: int, what: str) -> str:
        """What is wrong with more than `most` bytes, which the setting allows, unless the rest of the context leaves less."""
        return (
            self._too_long
            if most < setting
            else f"The context has more than {setting} bytes {what}, which is not possible."
        )

    @property
    def _too_long(self) -> str:
        return (
            f"With its files the context has more than {self._settings.context_bytes_max} bytes, which is not possible."
        )


def sizes(read: Files, wanted: Mapping[str, Wanted]) -> int:
    """What files take in a request to an upstream, each as often as it is sent."""
    return sum(wanted[key].times * size_of(file) for key, file in read.items())


def size_of(file: FileData | Gone) -> int:
    """What a file takes in one place."""
    if isinstance(file, Gone):
        return 0
    return len(file.base64) + (len(file.text.text.encode()) if file.text else 0)


def _unreadable(filename: str, place: Place, error: Unreadable) -> InvalidRequest:
    return InvalidRequest(
        f"The file '{filename}' {error}, and this model takes no files but their text.",
        param=place.param,
        code="unsupported_file",
    )


def _encoded(size: int) -> int:
    return -(-size // 3) * 4


def _in_base64(pieces: Sequence[bytes]) -> str:
    """The pieces as one; all but the last have a multiple of three bytes."""
    return "".join(base64.b64encode(piece).decode() for piece in pieces)
