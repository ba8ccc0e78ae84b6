"""Credentials for tool servers: what clients ask for, and what they get."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from app.wire.admin import NAME_CHARS_MAX, Name
from app.wire.tools import SERVER_URL_CHARS_MAX, ServerLabel

KEY_ID_CHARS_MAX = 64


class CreateToolCredential(Struct, forbid_unknown_fields=True):
    """`POST /v1/tool_credentials`: either `server_url` or `server_label`, and at most one of `user` and `key_id`."""

    server_url: Annotated[str, Meta(min_length=1, max_length=SERVER_URL_CHARS_MAX)] | None = None
    server_label: ServerLabel | None = None
    authorization: str | None = None
    headers: dict[str, str] | None = None
    name: Name = ""
    user: Annotated[str, Meta(min_length=1, max_length=NAME_CHARS_MAX)] | None = None
    key_id: Annotated[str, Meta(min_length=1, max_length=KEY_ID_CHARS_MAX)] | None = None


class UpdateToolCredential(Struct, forbid_unknown_fields=True):
    """`POST /v1/tool_credentials/{id}`. `authorization` and `headers` together replace the whole secret; without both it stays."""

    authorization: str | None = None
    headers: dict[str, str] | None = None
    name: Name | None = None


class ToolCredential(Struct, kw_only=True):
    """A credential without its secret. With neither a `user` nor a `key_id` it is for the whole tenant."""

    id: str
    object: Literal["tool_credential"] = "tool_credential"
    name: str
    server_url: str | None
    server_label: str | None
    user: str | None
    key_id: str | None
    has_authorization: bool
    header_names: list[str]
    created_at: int
    updated_at: int


CREATE_TOOL_CREDENTIAL = msgspec.json.Decoder(CreateToolCredential)
UPDATE_TOOL_CREDENTIAL = msgspec.json.Decoder(UpdateToolCredential)
