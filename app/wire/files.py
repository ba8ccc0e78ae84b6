"""Files: what clients get, and what a file may be for."""

from typing import Literal

from msgspec import Struct

Purpose = Literal["user_data", "vision"]


class File(Struct):
    """A file as clients get it."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    expires_at: None = None
    status_details: None = None
    object: Literal["file"] = "file"
