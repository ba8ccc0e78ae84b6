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
from weakref import WeakValueDictionary

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


class OutOfTime(Unreadable):
    """Files before this one have taken the time that it needs."""


class CpuTime(Struct):
    """What children may still take for the files of one context, in seconds."""

    left: float


class _Outcome(Struct):
    """What a child has made of a file; without `kind` it is a fault."""

    cpu_s: float
    fault: str = ""
    kind: str = ""
    pages: int = 0
    unit: str = ""


class Extraction:
    """The texts that this process has extracted, and the children that do."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._places = asyncio.Semaphore(settings.file_programs_max)
        self._own_places: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        """Of tenants: all places but one, so that others come to their turn."""
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

    async def text(self, key: Key, content: bytes, time: CpuTime, *, wait_s: float | None) -> FileText:
        """The text of a file. Raises Unreadable; TooManyRequests if no child is free in time, unless `wait_s` is None, or if the child
        gets no time from this machine."""
        if found := self.known(key):
            return found
        try:
            found = await self._read(key[0], content, time, wait_s)
        except OutOfTime:
            raise
        except Unreadable as error:
            self._remember(key, str(error))
            raise
        self._remember(key, found)
        return found

    async def _read(self, tenant_id: str, content: bytes, time: CpuTime, wait_s: float | None) -> FileText:
        if content.startswith((PDF, ARCHIVE)):
            async with self._place(tenant_id, wait_s):
                return await self._ask_child(content, time)
        try:
            text = await offload(len(content), decoded, content)
        except UnreadableFile:
            raise Unreadable("is of no type that can be read as text") from None
        if len(text) > self._settings.file_text_bytes_max:
            raise Unreadable(f"has more than {self._settings.file_text_bytes_max} bytes of text")
        return FileText("plain text", text)

    @contextlib.asynccontextmanager
    async def _place(self, tenant_id: str, wait_s: float | None) -> AsyncIterator[None]:
        most = max(1, self._settings.file_programs_max - 1)
        own = self._own_places.setdefault(tenant_id, asyncio.Semaphore(most))
        async with contextlib.AsyncExitStack() as places:
            try:
                async with asyncio.timeout(wait_s):
                    await places.enter_async_context(own)
                    await places.enter_async_context(self._places)
            except TimeoutError:
                raise TooManyRequests(
                    "Too many files are being read; please try again.", headers={"Retry-After": "5"}
                ) from None
            yield

    async def _ask_child(self, content: bytes, time: CpuTime) -> FileText:
        """The child's text of a file. It takes all the time unless it says how much."""
        settings = self._settings
        given_s, time.left = time.left, 0.0
        too_long = (
            f"takes too long to be read: all files of a context have {settings.file_text_cpu_s:g} seconds of CPU time"
        )
        if given_s <= 0:
            raise OutOfTime(too_long)
        limits = {
            "cpu_s": math.ceil(given_s),
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
        if child.returncode in {-signal.SIGXCPU, -signal.SIGKILL}:
            raise (Unreadable if given_s >= settings.file_text_cpu_s else OutOfTime)(too_long)
        outcome, text = await offload(len(answer), _answered, answer, child.returncode or 0)
        time.left = given_s - outcome.cpu_s
        if outcome.fault:
            raise Unreadable(outcome.fault)
        return FileText(outcome.kind, text, outcome.pages, outcome.unit)

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


def _answered(answer: bytes, status: int) -> tuple[_Outcome, str]:
    """What a child has answered. Raises Unreadable."""
    head, _, text = answer.partition(b"\n")
    if status or not head:
        log.warning("A process that reads files failed.", action="file_reader_failed", status=status)
        raise Unreadable("can't be read")
    return _Outcome(**json.loads(head)), text.decode()


def content_key(tenant_id: str, content: bytes) -> Key:
    """The key of a content without an id."""
    return tenant_id, hashlib.sha256(content).digest()
