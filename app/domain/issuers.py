"""Issuers of bearer JWTs: what the operator's catalog states of one, and which rights its tokens give.

    [issuers.company]
    issuer = "https://login.example.com"
    audience = "reprise"
    algorithms = ["RS256"]
    tenants = ["team-*"]
    claims = { tenant = "team", user = "sub", scopes = "scope" }

A claim that the catalog names and a token lacks gives nothing: no scope, no model, and without a tenant or a user no access.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, get_args

from msgspec import Meta, Struct

from app.domain.rights import ORDINARY, Rights, has_controls, is_name, matches
from app.errors import AuthenticationFailed
from app.wire.admin import MODEL_CHARS_MAX, MODELS_MAX, ModelName, Scope, TokenScope

PublicKeyAlgorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
SecretAlgorithm = Literal["HS256", "HS384", "HS512"]
Algorithm = Literal[PublicKeyAlgorithm, SecretAlgorithm]

PUBLIC_KEY_ALGORITHMS: frozenset[str] = frozenset(get_args(PublicKeyAlgorithm))
SECRET_BYTES_MIN: Mapping[str, int] = {"HS256": 32, "HS384": 48, "HS512": 64}
"""A secret is as long as the algorithm's hash."""

LABEL = "jwt:"
"""Before an issuer's name, where a key's id would stand."""


class ClaimNames(Struct, frozen=True, forbid_unknown_fields=True):
    """The claims that hold what a caller may do: a claim's name, or a path with dots into it. Empty: no claim."""

    tenant: str = ""
    user: str = ""
    scopes: str = ""
    models: str = ""


class Issuer(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[issuers.NAME]`."""

    issuer: Annotated[str, Meta(min_length=1)]
    audience: (
        Annotated[str, Meta(min_length=1)]
        | Annotated[tuple[Annotated[str, Meta(min_length=1)], ...], Meta(min_length=1)]
    )
    """One of these is in a token's `aud`."""
    algorithms: Annotated[tuple[Algorithm, ...], Meta(min_length=1)]
    jwks_url: str = ""
    """Without it, a file and a secret, OpenID discovery of the issuer finds the URL."""
    jwks_file: str = ""
    secret_env: str = ""
    """The environment variable with the secret of HS256 and its like, which issuer and server share."""
    secret: str = ""
    """The value of that variable; never in the file."""
    tenant: str = ""
    """The tenant of all tokens; else `claims` names the claim, and `tenants` what it may be."""
    tenants: tuple[Annotated[str, Meta(min_length=1)], ...] = ()
    """Names, or patterns with `*`."""
    creates_tenants: bool = False
    """Whether a token makes a tenant that does not exist yet."""
    claims: ClaimNames = ClaimNames()
    scopes: dict[str, tuple[TokenScope, ...]] = {}
    """What the issuer's scopes give, never `operator`. Without it `responses.read` and `responses.write` give themselves, and nothing gives `admin`."""
    default_scopes: tuple[TokenScope, ...] | None = None
    """Of tokens without the claim."""
    default_models: Annotated[tuple[ModelName, ...], Meta(max_length=MODELS_MAX)] | None = None
    """Of tokens without the claim."""
    leeway_s: Annotated[float, Meta(ge=0, le=300)] = 30.0
    """How far the issuer's clock and this server's may be apart."""
    lifetime_max_s: Annotated[float, Meta(gt=0)] = 86_400.0
    """From `iat` to `exp`."""

    @property
    def audiences(self) -> tuple[str, ...]:
        """The audiences of which a token needs one."""
        return (self.audience,) if isinstance(self.audience, str) else self.audience

    @property
    def makes_tenants(self) -> bool:
        """Whether a tenant that does not exist yet is made: the operator has named it, or allows it."""
        return bool(self.tenant) or self.creates_tenants

    def faults(self) -> Iterator[str]:
        """What is wrong with the entry."""
        yield from self._faults_of_keys()
        yield from self._faults_of_tenants()
        granted = {*(self.default_scopes or ()), *(scope for scopes in self.scopes.values() for scope in scopes)}
        if self.claims.user and "admin" in granted:
            yield "a token with a user can't have the scope 'admin'; name another issuer's entry for administrators"
        if self.scopes and not self.claims.scopes:
            yield "'scopes' needs 'claims.scopes', the claim that holds the issuer's scopes"
        if any(map(has_controls, self.default_models or ())):
            yield "'default_models' may not contain control characters"

    def _faults_of_keys(self) -> Iterator[str]:
        sources = [name for name in ("jwks_url", "jwks_file", "secret_env") if getattr(self, name)]
        if len(sources) > 1:
            yield f"needs one of {' and '.join(map(repr, sources))}"
        if self.secret:
            yield "a secret does not belong into a file; 'secret_env' names the environment variable that has it"
        wrong = [one for one in self.algorithms if (one in PUBLIC_KEY_ALGORITHMS) is bool(self.secret_env)]
        if wrong and self.secret_env:
            yield f"{wrong[0]} verifies with a public key, not with the secret of 'secret_env'"
        elif wrong:
            yield f"{wrong[0]} needs a secret, which 'secret_env' names"
        if not sources and not self.issuer.startswith(("http://", "https://")):
            yield "needs 'jwks_url', 'jwks_file' or 'secret_env', because 'issuer' is no URL"

    def _faults_of_tenants(self) -> Iterator[str]:
        if bool(self.tenant) == bool(self.claims.tenant):
            yield "needs either 'tenant', or 'claims.tenant' with 'tenants'"
        elif self.claims.tenant and not self.tenants:
            yield "'claims.tenant' needs 'tenants', the names or patterns that the claim may have"
        elif self.tenant and (self.tenants or self.creates_tenants):
            yield "'tenants' and 'creates_tenants' need 'claims.tenant'; with 'tenant' there is one, and it is made"
        if self.tenant and not is_name(self.tenant):
            yield "'tenant' is no name of a tenant"

    def faults_of_secret(self) -> Iterator[str]:
        """What is wrong with the secret, which is not quoted."""
        for algorithm in self.algorithms:
            least = SECRET_BYTES_MIN.get(algorithm, 0)
            if len(self.secret.encode()) < least:
                yield f"the secret of {algorithm} needs at least {least} bytes"


def rights_of(name: str, issuer: Issuer, claims: Mapping[str, Any]) -> Rights:
    """What the verified claims of a token give. `name` is the issuer's in the catalog. Raises AuthenticationFailed."""
    names, credential = issuer.claims, f"{LABEL}{name}"
    try:
        return Rights(
            issuer.tenant or _tenant(issuer, claims),
            _name(claims, names.user) if names.user else "",
            _scopes(issuer, _texts(claims, names.scopes)),
            _models(issuer, _texts(claims, names.models)),
            credential,
        )
    except _Unusable as error:
        raise AuthenticationFailed(str(error), key_id=credential) from None


class _Unusable(Exception):
    """A claim is missing, or does not have the form that it needs."""


def _claim(claims: Mapping[str, Any], name: str) -> Any:
    """A claim; None if the token lacks it. Names with dots are names first: many issuers use addresses."""
    if name in claims:
        return claims[name]
    found: Any = claims
    for part in name.split("."):
        if not isinstance(found, dict):
            return None
        found = found.get(part)
    return found


def _name(claims: Mapping[str, Any], name: str) -> str:
    found = _claim(claims, name)
    if not isinstance(found, str) or not is_name(found):
        raise _Unusable(f"The token has no claim '{name}' with a name.")
    return found


def _tenant(issuer: Issuer, claims: Mapping[str, Any]) -> str:
    tenant = _name(claims, issuer.claims.tenant)
    if not any(matches(tenant, one) for one in issuer.tenants):
        raise _Unusable("The token's tenant is none that its issuer may name.")
    return tenant


def _texts(claims: Mapping[str, Any], name: str) -> list[str] | None:
    """The texts of a claim: a list, or one text with spaces between them. None if the catalog or the token has no such claim."""
    found = _claim(claims, name) if name else None
    if isinstance(found, str):
        return found.split()
    if found is None or (isinstance(found, list) and all(isinstance(one, str) for one in found)):
        return found
    raise _Unusable(f"The token's claim '{name}' is neither a text nor a list of texts.")


def _scopes(issuer: Issuer, named: list[str] | None) -> frozenset[Scope]:
    if named is None:
        default = frozenset[Scope]() if issuer.claims.scopes else ORDINARY
        return default if issuer.default_scopes is None else frozenset(issuer.default_scopes)
    if issuer.scopes:
        return frozenset(scope for one in named for scope in issuer.scopes.get(one, ()))
    return frozenset(scope for scope in ORDINARY if scope in named)


def _models(issuer: Issuer, named: list[str] | None) -> tuple[str, ...] | None:
    if named is None:
        default = () if issuer.claims.models else None
        return default if issuer.default_models is None else issuer.default_models
    if len(named) > MODELS_MAX or any(len(one) > MODEL_CHARS_MAX or has_controls(one) for one in named):
        raise _Unusable(f"The token's claim '{issuer.claims.models}' has too many models, or one that is none.")
    return tuple(named)
