"""A run's files as tar archives: those it gets, and what it changed."""

import hashlib
import io
import mimetypes
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

NEW = ".new"
"""Suffix of an archive that is being written."""
IMAGES = ("image/png", "image/jpeg", "image/gif", "image/webp")
IMAGE_BYTES_MAX = 5 * 1024 * 1024
IMAGES_MAX = 10
TEXT_BYTES_MAX = 16 * 1024
TEXTS_MAX = 50


@dataclass(frozen=True)
class ChangedFile:
    """A file that a run has created or changed."""

    name: str
    size: int  # bytes
    mime_type: str
    text: str | None = None  # of a small text file
    image: bytes | None = None  # the content of a small image


@contextmanager
def scratch(text: str = "") -> Iterator[IO[bytes]]:
    """A file without a name, at its beginning. Raises UnicodeEncodeError."""
    with tempfile.TemporaryFile() as file:
        file.write(text.encode())
        file.seek(0)
        yield file


@contextmanager
def new_archive(directory: Path) -> Iterator[IO[bytes]]:
    """A file in the directory that is removed after the block, unless it was moved."""
    with tempfile.NamedTemporaryFile(dir=directory, suffix=NEW, delete=False) as file:
        try:
            yield file
        finally:
            Path(file.name).unlink(missing_ok=True)


@contextmanager
def archive_of(files: Mapping[str, bytes]) -> Iterator[IO[bytes]]:
    """An archive of these contents by name."""
    with tempfile.TemporaryFile() as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size, member.mode, member.mtime = len(content), 0o600, int(time.time())
                archive.addfile(member, io.BytesIO(content))
        file.flush()
        yield file


def changes(before: Sequence[IO[bytes]], after: IO[bytes]) -> list[ChangedFile]:
    """The files of the archive `after` that no archive of `before` has with the same content."""
    known = {member.name: _digest(content) for file in before for member, content in _members(file)}
    changed: list[ChangedFile] = []
    images = 0
    for member, content in _members(after):
        if known.get(member.name) == _digest(content):
            continue
        mime_type = mimetypes.guess_type(member.name)[0] or "application/octet-stream"
        text = image = None
        content.seek(0)
        if mime_type in IMAGES and member.size <= IMAGE_BYTES_MAX and images < IMAGES_MAX:
            image = content.read()
            images += 1
        elif member.size <= TEXT_BYTES_MAX and len(changed) < TEXTS_MAX:
            text = _text(content.read())
        changed.append(ChangedFile(member.name, member.size, mime_type, text, image))
    return changed


def _members(file: IO[bytes]) -> Iterator[tuple[tarfile.TarInfo, IO[bytes]]]:
    file.seek(0)
    with tarfile.open(fileobj=file) as archive:
        for member in archive:
            content = archive.extractfile(member)
            assert content  # an archive has only regular files
            yield member, content


def _digest(content: IO[bytes]) -> bytes:
    return hashlib.file_digest(content, "sha256").digest()  # type: ignore[arg-type]


def _text(content: bytes) -> str | None:
    """The content as text; None for binary data."""
    try:
        return None if b"\0" in content else content.decode()
    except UnicodeDecodeError:
        return None
