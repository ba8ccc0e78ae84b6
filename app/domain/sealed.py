"""Sealed content: what a client carries and can't read or change, like `reasoning.encrypted_content`.

Fernet (AES-128-CBC with HMAC-SHA256) of the `cryptography` package does the work.
"""

import base64
import binascii
import hashlib
import hmac
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec
from cryptography.fernet import Fernet, InvalidToken, MultiFernet

KEY_BYTES = 32

SIGNATURE_DIGITS = 32

Purpose = Literal["seal", "compaction", "tool_credential", "agent"]
"""What a tenant's text is sealed for: reasoning, a compaction item, a tool server, an agent's tools. What is sealed for one opens for no other."""


Unseal = Callable[[str, Purpose], str | None]
"""Opens sealed content; None for what another server sealed."""


class Seal:
    """Seals text with the server's key, and opens what that or an old one has sealed."""

    def __init__(self, key: bytes, *old: bytes) -> None:
        """Keys are KEY_BYTES random bytes. Raises ValueError for any other length."""
        self._keys = (key, *old)
        self._fernets = [_fernet(one) for one in self._keys]
        self._fernet = MultiFernet(self._fernets)
        self.fingerprints = [hashlib.sha256(b"reprise secret key\0" + one).hexdigest() for one in self._keys]
        """They identify keys and reveal nothing; that of the key that seals comes first."""

    def close(self, text: str) -> str:
        """The sealed form of `text`."""
        return self._fernet.encrypt(text.encode()).decode()

    def open(self, sealed: str) -> str | None:
        """The text, or None if this server did not seal it."""
        return _opened(self._fernet, sealed)

    def of(self, tenant_id: str) -> "TenantSeal":
        """The seal of one tenant."""
        return TenantSeal(self._keys, self._fernets, tenant_id)


class TenantSeal:
    """Seals text that clients keep, for one tenant: no other can open it."""

    def __init__(self, keys: Sequence[bytes], shared: Sequence[Fernet], tenant_id: str) -> None:
        """The first of `keys` seals; `shared` open what was sealed before each tenant had a key."""
        self._keys, self._shared, self._tenant_id = keys, shared, tenant_id
        self._fernets: dict[Purpose, MultiFernet] = {}

    def _fernet(self, purpose: Purpose) -> MultiFernet:
        if purpose not in self._fernets:
            own = [_fernet(self._derived(key, purpose)) for key in self._keys]
            self._fernets[purpose] = MultiFernet([*own, *(self._shared if purpose == "seal" else ())])
        return self._fernets[purpose]

    def close(self, text: str, purpose: Purpose = "seal") -> str:
        """The sealed form of `text`."""
        return self._fernet(purpose).encrypt(text.encode()).decode()

    def open(self, sealed: str, purpose: Purpose = "seal") -> str | None:
        """The text, or None if this server did not seal it for this tenant and purpose."""
        return _opened(self._fernet(purpose), sealed)

    def sign(self, *texts: str) -> str:
        """SIGNATURE_DIGITS hex digits that only this server can make of these texts, for this tenant."""
        return self._signature(self._keys[0], texts)

    def has_signed(self, signature: str, *texts: str) -> bool:
        """Whether this server has made the signature of these texts, for this tenant."""
        return any(hmac.compare_digest(signature.encode(), self._signature(key, texts).encode()) for key in self._keys)

    def _signature(self, key: bytes, texts: Sequence[str]) -> str:
        digest = hmac.digest(self._derived(key, "sign"), msgspec.json.encode(texts), "sha256")
        return digest.hex()[:SIGNATURE_DIGITS]

    def _derived(self, key: bytes, purpose: str) -> bytes:
        return hmac.digest(key, f"{purpose}\0{self._tenant_id}".encode(), "sha256")


def _fernet(key: bytes) -> Fernet:
    return Fernet(base64.urlsafe_b64encode(key))


def _opened(fernet: Fernet | MultiFernet, sealed: str) -> str | None:
    try:
        return fernet.decrypt(sealed.encode()).decode()
    except (InvalidToken, UnicodeError):
        return None


def parse_key(text: str) -> bytes:
    """KEY_BYTES from base64, standard or URL-safe. Raises ValueError."""
    try:
        key = base64.b64decode(text.replace("-", "+").replace("_", "/") + "==", validate=False)
    except binascii.Error as error:
        raise ValueError(str(error)) from None
    if len(key) != KEY_BYTES:
        raise ValueError(f"the key has {len(key)} bytes, not {KEY_BYTES}")
    return key
