"""Credentials for tool servers: for whom they are, who manages them, and how their secrets are sealed."""

import msgspec
from msgspec import Struct

from app.domain.issuers import LABEL
from app.domain.rights import Rights, is_name
from app.domain.sealed import TenantSeal
from app.errors import InvalidParameter, MissingScope


class Holder(Struct, frozen=True):
    """Whose runs use a credential: those of one key, of one user, or with neither those of the whole tenant."""

    user: str = ""
    key_id: str = ""


TENANT = Holder()


class Secret(Struct, frozen=True, omit_defaults=True):
    """What a tool server is sent."""

    authorization: str = ""
    headers: dict[str, str] = {}


class _Bound(Struct, frozen=True, array_like=True):
    """A secret with what it is for: in the row of another server or holder it does not open."""

    server: str
    holder: Holder
    secret: Secret


_BOUND = msgspec.json.Decoder(_Bound)


def seal_secret(seal: TenantSeal, server: str, holder: Holder, secret: Secret) -> str:
    """The sealed form of a secret, for this tenant, server and holder only."""
    return seal.close(msgspec.json.encode(_Bound(server, holder, secret)).decode(), "tool_credential")


def open_secret(seal: TenantSeal, server: str, holder: Holder, sealed: str) -> Secret | None:
    """The secret; None if it was sealed with another key, or for another tenant, server or holder."""
    opened = seal.open(sealed, "tool_credential")
    bound = _BOUND.decode(opened) if opened is not None else None
    return bound.secret if bound and (bound.server, bound.holder) == (server, holder) else None


def own_key_of(rights: Rights) -> str:
    """The id of the caller's key; empty for a token, and without a key."""
    return "" if rights.key_id is None or rights.key_id.startswith(LABEL) else rights.key_id


def manages_all(rights: Rights) -> bool:
    """Whether a caller sees and changes every credential of its tenant."""
    return "admin" in rights.scopes or rights.keyless


def holder_for(rights: Rights, user: str | None, key_id: str | None) -> Holder:
    """Whom a new credential is for: as asked, or else the widest that the caller manages. Raises InvalidParameter, MissingScope."""
    if user is not None and key_id is not None:
        raise InvalidParameter("Give 'user' or 'key_id', not both.", param="key_id")
    if user is not None and not is_name(user):
        raise InvalidParameter("Invalid value for 'user': no user can have this name.", param="user")
    if user is not None or key_id is not None:
        holder = Holder(user or "", key_id or "")
    elif manages_all(rights):
        holder = TENANT
    elif rights.user:
        holder = Holder(user=rights.user)
    else:
        holder = Holder(key_id=own_key_of(rights))
    demand_managed(rights, holder)
    return holder


def demand_managed(rights: Rights, holder: Holder) -> None:
    """Raises MissingScope for a credential of the tenant, or of another user or key, unless the caller administers the tenant."""
    own = {Holder(user=rights.user), Holder(key_id=own_key_of(rights))} - {TENANT}
    if holder not in own and not manages_all(rights):
        raise MissingScope("admin")
