"""The files that a run's context refers to: looked up and read when the run is planned."""

import base64
import mimetypes
from collections.abc import Mapping, Sequence

from app.domain.files import FileData, Files, Reference, check_image, media_type, not_found
from app.errors import InvalidRequest, StoredFileNotFound
from app.storage import files
from app.storage.database import Database
from app.storage.files import StoredFile


async def find(
    database: Database, tenant_id: str, wanted: Mapping[str, Reference], *, files_max: int
) -> list[StoredFile]:
    """These files. Raises InvalidRequest for one that there is not, with the path of what refers to it, or for too many."""
    if len(wanted) > files_max:
        raise InvalidRequest(
            f"The context refers to {len(wanted)} files; more than {files_max} are not possible.", param="input"
        )
    async with database.autocommit() as tx:
        found = await files.find_files(tx, tenant_id, list(wanted))
    known = {file.id for file in found}
    for file_id, reference in wanted.items():
        if file_id not in known:
            raise not_found(file_id, reference)
    return found


def encoded_bytes(found: Sequence[StoredFile]) -> int:
    """What files take in a request to an upstream."""
    return sum(-(-file.bytes // 3) * 4 for file in found)


async def read(
    database: Database, tenant_id: str, found: Sequence[StoredFile], wanted: Mapping[str, Reference]
) -> Files:
    """The content of files. Raises InvalidRequest for one that is deleted meanwhile, or is not the image that it should be."""
    made: dict[str, FileData] = {}
    for file in found:
        reference = wanted[file.id]
        try:
            made[file.id] = await _read(database, tenant_id, file, reference)
        except StoredFileNotFound:
            raise not_found(file.id, reference) from None
    return made


async def _read(database: Database, tenant_id: str, file: StoredFile, reference: Reference) -> FileData:
    pieces: list[str] = []
    type_ = ""
    for number in file.pieces:
        async with database.autocommit() as tx:
            piece = await files.read_piece(tx, tenant_id, file.id, number)
        if number == 0:
            type_ = media_type(piece, mimetypes.guess_type(file.filename)[0])
            check_image(file.id, type_, reference)
        pieces.append(base64.b64encode(piece).decode())
    return FileData(file.filename, type_, "".join(pieces))
