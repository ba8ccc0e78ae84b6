"""Keys, tenants and the audit log: what administrators and operators ask for, and what they get."""

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

NAME_CHARS_MAX = 256
"""Of a tenant's, a user's and a key's name."""

MODELS_MAX = 100
MODEL_CHARS_MAX = 512
LAST_TIME = 253_402_300_799
"""The end of the year 9999, in unix seconds."""

Name = Annotated[str, Meta(max_length=NAME_CHARS_MAX)]
ModelName = Annotated[str, Meta(min_length=1, max_length=MODEL_CHARS_MAX)]
TokenScope = Literal["responses.read", "responses.write", "admin"]
"""What a bearer token may have: no issuer makes operators."""

Scope = Literal[TokenScope, "operator"]
LIMIT_MAX = 1_000_000_000
"""Of what a quota may allow, as in the settings."""

STORED_BYTES_MAX = 10**15

Limit = Annotated[int, Meta(ge=0, le=LIMIT_MAX)]
"""0 is no limit; where null is allowed it is the default of the settings."""

Actor = Literal["api_key", "jwt", "command_line", "anonymous", "operator"]
Action = Literal[
    "key.created",
    "key.updated",
    "key.rotated",
    "key.revoked",
    "response.deleted",
    "conversation.deleted",
    "conversation.item.deleted",
    "file.deleted",
    "tool_credential.created",
    "tool_credential.updated",
    "tool_credential.deleted",
    "agent.created",
    "agent.updated",
    "agent.deleted",
    "tenant.created",
    "tenant.updated",
]


class OwnLimits(Struct, frozen=True, forbid_unknown_fields=True):
    """The quotas that a tenant or a key has of its own."""

    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    concurrent_runs: Limit | None = None
    stored_bytes: Annotated[int, Meta(ge=0, le=STORED_BYTES_MAX)] | None = None


class CreateKey(Struct, forbid_unknown_fields=True):
    """`POST /v1/admin/keys`. Without `models` every model is allowed; without `user` the key is bound to none."""

    name: Name = ""
    user: Annotated[Name, Meta(min_length=1)] | None = None
    scopes: Annotated[list[Scope], Meta(min_length=1)] | None = None
    models: Annotated[list[ModelName], Meta(min_length=1, max_length=MODELS_MAX)] | None = None
    expires_at: Annotated[int, Meta(ge=0, le=LAST_TIME)] | None = None
    limits: OwnLimits = OwnLimits()


class UpdateKey(Struct, forbid_unknown_fields=True):
    """`POST /v1/admin/keys/{id}`: what is given replaces what there was. `models` of null allows every model."""

    name: Name | UnsetType = UNSET
    scopes: Annotated[list[Scope], Meta(min_length=1)] | UnsetType = UNSET
    models: Annotated[list[ModelName], Meta(min_length=1, max_length=MODELS_MAX)] | UnsetType | None = UNSET
    limits: OwnLimits | UnsetType = UNSET


class RotateKey(Struct, forbid_unknown_fields=True):
    """`POST /v1/admin/keys/{id}/rotate`: how long earlier secrets stay valid."""

    overlap_s: Annotated[int, Meta(ge=0)] | None = None


class ApiKey(Struct, kw_only=True):
    """A key; `value` is the secret, shown once."""

    id: str
    object: Literal["api_key"] = "api_key"
    name: str
    tenant: str
    user: str | None
    scopes: list[str]
    models: list[str] | None
    limits: OwnLimits
    created_at: int
    expires_at: int | None
    revoked_at: int | None
    value: str | UnsetType = UNSET


class CreateTenant(Struct, forbid_unknown_fields=True):
    """`POST /v1/admin/tenants`. Limits that are not given are those of the settings."""

    id: Annotated[Name, Meta(min_length=1)]
    limits: OwnLimits = OwnLimits()


class UpdateTenant(Struct, forbid_unknown_fields=True):
    """`POST /v1/admin/tenants/{id}`: all limits are replaced."""

    limits: OwnLimits


class Tenant(Struct, kw_only=True):
    """A tenant; its `id` is its name. `keys` are those that are valid, `stored_bytes` is what was measured last, which it is only where
    there is a limit."""

    id: str
    object: Literal["tenant"] = "tenant"
    created_at: int
    keys: int
    users: int
    stored_bytes: int | None
    limits: OwnLimits


class AuditActor(Struct):
    """Who has acted: a key, a bearer token (`key_id` names its issuer), the operator on the command line or with a key, which may be of
    another tenant, or a caller of a server without keys."""

    type: Actor
    key_id: str | None
    user: str | None


class AuditEntry(Struct, kw_only=True):
    """One action; `target` is the id of what it was done to."""

    id: str
    object: Literal["audit_log"] = "audit_log"
    type: Action
    effective_at: int
    actor: AuditActor
    target: str


CREATE_KEY = msgspec.json.Decoder(CreateKey)
UPDATE_KEY = msgspec.json.Decoder(UpdateKey)
ROTATE_KEY = msgspec.json.Decoder(RotateKey)
CREATE_TENANT = msgspec.json.Decoder(CreateTenant)
UPDATE_TENANT = msgspec.json.Decoder(UpdateTenant)
