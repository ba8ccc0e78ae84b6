"""What a caller may do: scopes and models; and whose data it sees.

A user within a tenant owns data as a tenant does: the `tenant_id` of every row is the owner, which is the tenant, or one user of it.
So each statement that keeps tenants apart keeps users apart, too.
"""

import unicodedata
from typing import get_args

from msgspec import Struct

from app.errors import MissingScope, ModelNotAllowed
from app.wire.admin import NAME_CHARS_MAX, OwnLimits, Scope

SCOPES: tuple[Scope, ...] = get_args(Scope)

ORDINARY: frozenset[Scope] = frozenset({"responses.read", "responses.write"})
"""The scopes of a key that names none."""

NAME_RULE = f"expected 1 to {NAME_CHARS_MAX} characters, none of them control characters"
"""Of tenants and users."""

_SEPARATOR = "\x1f"
"""Between a tenant and its user; no name contains it."""


class Rights(Struct, frozen=True):
    """What a key, or a bearer token, stands for."""

    tenant: str
    user: str = ""
    """Empty for a key that is bound to no user."""
    scopes: frozenset[Scope] = ORDINARY
    models: tuple[str, ...] | None = None
    """Names of models, or patterns with `*`; None for all."""
    key_id: str | None = None
    """Of a token `jwt:` and the name of its issuer in the catalog."""
    keyless: bool = False
    """Whether the server has no keys: then every caller is the tenant."""
    limits: OwnLimits = OwnLimits()
    """The quotas of the key, as far as it has some of its own."""

    @property
    def owner(self) -> str:
        """Whose data it sees: the `tenant_id` of rows."""
        return owner_of(self.tenant, self.user)

    @property
    def usage_seen(self) -> tuple[str | None, str | None]:
        """The key and the user whose usage it sees; None for all, empty for none: an administrator sees the tenant's, a key of a user that
        user's, any other key its own."""
        if "admin" in self.scopes:
            return None, None
        return (None, self.user) if self.user else (self.key_id or "", "")

    def demand_scope(self, scope: Scope, *, or_admin: bool = False) -> None:
        """Raises MissingScope; with `or_admin` not for an administrator."""
        if scope not in self.scopes and not (or_admin and "admin" in self.scopes):
            raise MissingScope(scope)

    def may_use(self, model: str) -> bool:
        """Whether requests may name this model."""
        return self.models is None or any(matches(model, one) for one in self.models)

    def demand_model(self, model: str) -> None:
        """Raises ModelNotAllowed."""
        if not self.may_use(model):
            raise ModelNotAllowed(model)

    def demand_grantable(self, scopes: frozenset[Scope], models: tuple[str, ...] | None) -> None:
        """Raises MissingScope where a key with these scopes is an operator's and this one is not, ModelNotAllowed where a key for these
        models, or None for all, may use more than this one."""
        if "operator" in scopes:
            self.demand_scope("operator")
        for model in ("*",) if models is None else models:
            if not self.may_use(model):  # a `*` in it is a character that only a `*` matches
                raise ModelNotAllowed(model, param="models")


def matches(name: str, pattern: str) -> bool:
    """Whether a name fits a pattern with `*`. Clients choose names and administrators patterns: it takes linear time for any of them."""
    first, *others = pattern.split("*")
    if not others:
        return name == first
    *middle, last = others
    at, end = len(first), len(name) - len(last)
    if end < at or not (name.startswith(first) and name.endswith(last)):
        return False
    for part in middle:
        found = name.find(part, at, end)
        if found < 0:
            return False
        at = found + len(part)
    return True


def owner_of(tenant: str, user: str) -> str:
    """The owner of a user's data, or with no user of the tenant's own."""
    return f"{tenant}{_SEPARATOR}{user}" if user else tenant


def tenant_of(owner: str) -> str:
    """The tenant of an owner."""
    return owner.partition(_SEPARATOR)[0]


def user_of(owner: str) -> str:
    """The user of an owner; empty for the tenant itself."""
    return owner.partition(_SEPARATOR)[2]


def logged(owner: str, key_id: str | None = None) -> dict[str, str]:
    """An owner, and the id of the key that asks, as fields of a log line."""
    tenant, _, user = owner.partition(_SEPARATOR)
    fields = {"tenant_id": tenant, "user": user, "key_id": key_id or ""}
    return {name: value for name, value in fields.items() if value or name == "tenant_id"}


def is_name(text: str) -> bool:
    """Whether a tenant or a user can have this name."""
    return 0 < len(text) <= NAME_CHARS_MAX and not has_controls(text)


def has_controls(text: str) -> bool:
    """Whether a text has control characters, or halves of surrogate pairs."""
    return any(unicodedata.category(char) in {"Cc", "Cs"} for char in text)
