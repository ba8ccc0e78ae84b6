"""An issuer of JWTs: it signs tokens, and publishes its keys over HTTP."""

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Iterable
from typing import Any

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from tests.rogue import JSON, Rogue, Visit

AUDIENCE = "reprise"
LIFETIME_S = 600

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey


class Issuer(Rogue):
    """Publishes at `/keys`, and at `/.well-known/openid-configuration` where that is."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: dict[str, PrivateKey] = {"first": rsa.generate_private_key(65537, 2048)}
        self.answers |= {"keys": self._publish, "openid-configuration": self._configuration}

    @property
    def url(self) -> str:
        """Its name in tokens."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def jwks_url(self) -> str:
        """Where its keys are."""
        return f"{self.url}/keys"

    @property
    def fetches(self) -> int:
        """How often its keys were fetched."""
        return len(self.asked("keys"))

    def rotate(self, kid: str) -> None:
        """Sign with one new key from now on, and withdraw the others."""
        self.keys = {kid: ec.generate_private_key(ec.SECP256R1())}

    def claims(self, **claims: Any) -> dict[str, Any]:
        """What stands in a token; None leaves a claim out."""
        now = int(time.time())
        whole = {"iss": self.url, "aud": AUDIENCE, "iat": now, "exp": now + LIFETIME_S, **claims}
        return {name: value for name, value in whole.items() if value is not None}

    def token(
        self,
        *,
        key: PrivateKey | None = None,
        kid: str | None = "",
        headers: dict[str, Any] | None = None,
        **claims: Any,
    ) -> str:
        """A token, signed with the newest key; `kid` None leaves its name out, `headers` are added."""
        newest = list(self.keys)[-1]
        signing = key or self.keys[newest]
        named = {} if kid is None else {"kid": kid or newest}
        algorithm = "RS256" if isinstance(signing, rsa.RSAPrivateKey) else "ES256"
        return jwt.encode(self.claims(**claims), signing, algorithm, {**named, **(headers or {})})

    def forged(self, algorithm: str, **claims: Any) -> str:
        """A token without a signature (`none`), or with one that takes the public key for a secret (`HS256`)."""
        kid, key = next(iter(self.keys.items()))
        parts = ({"alg": algorithm, "kid": kid}, self.claims(**claims))
        signed = ".".join(_encoded(json.dumps(part).encode()) for part in parts)
        pem = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        signature = hmac.digest(pem, signed.encode(), hashlib.sha256) if algorithm == "HS256" else b""
        return f"{signed}.{_encoded(signature)}"

    def published(self) -> list[dict[str, Any]]:
        """Its public keys."""
        return [public(key, kid) for kid, key in self.keys.items()]

    def _publish(self, _: Visit) -> Iterable[bytes]:
        yield JSON + json.dumps({"keys": self.published()}).encode()

    def _configuration(self, visit: Visit) -> Iterable[bytes]:
        path = visit.head.split(" ")[1].removesuffix("/.well-known/openid-configuration")
        yield JSON + json.dumps({"issuer": f"{self.url}{path}", "jwks_uri": self.jwks_url}).encode()


def public(key: PrivateKey, kid: str | None = None) -> dict[str, Any]:
    """The public half of a key, as JSON."""
    found: dict[str, Any]
    if isinstance(key, rsa.RSAPrivateKey):
        found = RSAAlgorithm.to_jwk(key.public_key(), as_dict=True)
    else:
        found = ECAlgorithm.to_jwk(key.public_key(), as_dict=True)
    return found if kid is None else {**found, "kid": kid, "use": "sig"}


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
