"""The text of files, for upstreams that take none: read by child processes with limits (`app/documents.py`), and remembered."""

import asyncio
import contextlib
import hashlib
import json
import math
import signal
import sys
from collections import OrderedDict
from collections.abc import AsyncIterator

import structlog
from msgspec import Struct

from app.domain.files import FileText
from app.errors import TooManyRequests
from app.offload import offload
from app.settings import PROJECT, Settings
from app.toolservers.texts import UnreadableFile, decoded

log = structlog.get_logger()

BOOTSTRAP = f"import sys; sys.path.insert(0, {str(PROJECT)!r}); from app.documents import main; main()"
"""The child's Python is isolated from its environment and the working directory, and so does not find the package itself."""

WALL_TIMES = 10
"""A child that has not ended after so many times its CPU seconds does not run."""

ENTRY_BYTES = 512
"""What a remembered text or fault takes beside its characters, about."""

ARCHIVE = b"PK\x03\x04"
PDF = b"%PDF-"

Key = tuple[str, bytes]
"""The tenant and what identifies the content."""


class Unreadable(Exception):
    """A file has no text that can be read; the message is a predicate for its name."""


class _Outcome(Struct):
    """What a child has made of a file; without `kind` it is a fault."""

    fault: str = ""
    kind: str = ""
    pages: int = 0
    unit: str = ""


class Extraction:
    """The texts that this process has extracted, and the children that do."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._places = asyncio.Semaphore(settings.file_programs_max)
        self._known: OrderedDict[Key, FileText | str] = OrderedDict()
        """Texts and faults, the most recently used one last."""
        self._bytes = 0

    def known(self, key: Key) -> FileText | None:
        """The text, if it is remembered. Raises Unreadable if it is known that there is none."""
        found = self._known.get(key)
        if found is None:
            return None
        self._known.move_to_end(key)
        if isinstance(found, str):
            raise Unreadable(found)
        return found

    async def text(self, key: Key, content: bytes, *, wait_s: float | None) -> FileText:
        """The text of a file. Raises Unreadable; TooManyRequests if no child is free in time, unless `wait_s` is None."""
        if found := self.known(key):
            return found
        try:
            found = await self._read(content, wait_s)
        except Unreadable as error:
            self._remember(key, str(error))
            raise
        self._remember(key, found)
        return found

    async def _read(self, content: bytes, wait_s: float | None) -> FileText:
        if content.startswith((PDF, ARCHIVE)):
            async with self._place(wait_s):
                return await self._ask_child(content)
        try:
            text = await offload(len(content), decoded, content)
        except UnreadableFile:
            raise Unreadable("is of no type that can be read as text") from None
        if len(text) > self._settings.file_text_bytes_max:
            raise Unreadable(f"has more than {self._settings.file_text_bytes_max} bytes of text")
        return FileText("plain text", text)

    @contextlib.asynccontextmanager
    async def _place(self, wait_s: float | None) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(wait_s):
                await self._places.acquire()
        except TimeoutError:
            raise TooManyRequests(
                "Too many files are being read; please try again.", headers={"Retry-After": "5"}
            ) from None
        try:
            yield
        finally:
            self._places.release()

    async def _ask_child(self, content: bytes) -> FileText:
        settings = self._settings
        limits = {
            "cpu_s": math.ceil(settings.file_text_cpu_s),
            "memory_bytes": settings.file_text_memory_bytes_max,
            "bytes_max": settings.file_text_bytes_max,
        }
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-IBc", BOOTSTRAP, json.dumps(limits)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={},
        )
        try:
            async with asyncio.timeout(WALL_TIMES * settings.file_text_cpu_s):
                answer, _ = await child.communicate(content)
        except TimeoutError:
            raise TooManyRequests("A file could not be read in time; please try again.") from None
        finally:
            if child.returncode is None:
                child.kill()
                await child.wait()
        return await offload(len(answer), _text, answer, child.returncode or 0)

    def _remember(self, key: Key, found: FileText | str) -> None:
        most, size = self._settings.file_texts_cached_bytes_max, _size(found)
        if size > most or key in self._known:
            return
        self._known[key] = found
        self._bytes += size
        while self._bytes > most:
            _, oldest = self._known.popitem(last=False)
            self._bytes -= _size(oldest)


def _size(found: FileText | str) -> int:
    """The memory that a remembered text or fault takes: a single wide character makes all of them wide."""
    text = found if isinstance(found, str) else found.text
    return ENTRY_BYTES + len(text) * (1 if text.isascii() else 4)


def _text(answer: bytes, status: int) -> FileText:
    """What a child has answered. Raises Unreadable."""
    if status in {-signal.SIGXCPU, -signal.SIGKILL}:
        raise Unreadable("takes too long to be read")
    head, _, text = answer.partition(b"\n")
    if status or not head:
        log.warning("A process that reads files failed.", action="file_reader_failed", status=status)
        raise Unreadable("can't be read")
    outcome = _Outcome(**json.loads(head))
    if outcome.fault:
        raise Unreadable(outcome.fault)
    return FileText(outcome.kind, text.decode(), outcome.pages, outcome.unit)


def content_key(tenant_id: str, content: bytes) -> Key:
    """The key of a content without an id."""
    return tenant_id, hashlib.sha256(content).digest()
