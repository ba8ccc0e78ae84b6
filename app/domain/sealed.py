"""Sealed content: what a client carries for us and can't read or change, such as `reasoning.encrypted_content`.

Fernet (AES-128-CBC with HMAC-SHA256) of the `cryptography` package does the work.
"""

import base64
import binascii
import hmac
from functools import cached_property

import msgspec
from cryptography.fernet import Fernet, InvalidToken, MultiFernet

KEY_BYTES = 32

SIGNATURE_DIGITS = 32


class Seal:
    """Seals and opens text with the server's key."""

    def __init__(self, key: bytes) -> None:
        """`key` is KEY_BYTES random bytes. Raises ValueError for any other length."""
        self._key = key
        self._fernet = Fernet(base64.urlsafe_b64encode(key))

    def close(self, text: str) -> str:
        """The sealed form of `text`."""
        return self._fernet.encrypt(text.encode()).decode()

    def open(self, sealed: str) -> str | None:
        """The text, or None if this server did not seal it."""
        return _opened(self._fernet, sealed)

    def of(self, tenant_id: str) -> "TenantSeal":
        """The seal of one tenant."""
        return TenantSeal(self._key, self._fernet, tenant_id)


class TenantSeal:
    """Seals text that clients keep: what one tenant was given opens for no other."""

    def __init__(self, key: bytes, shared: Fernet, tenant_id: str) -> None:
        """`shared` opens what was sealed before each tenant had a key."""
        self._key, self._shared, self._tenant_id = key, shared, tenant_id

    @cached_property
    def _fernet(self) -> MultiFernet:
        return MultiFernet([Fernet(base64.urlsafe_b64encode(self._derived("seal"))), self._shared])

    def close(self, text: str) -> str:
        """The sealed form of `text`."""
        return self._fernet.encrypt(text.encode()).decode()

    def open(self, sealed: str) -> str | None:
        """The text, or None if this server did not seal it for this tenant."""
        return _opened(self._fernet, sealed)

    def sign(self, *texts: str) -> str:
        """SIGNATURE_DIGITS hex digits that only this server can make of these texts, for this tenant."""
        digest = hmac.digest(self._derived("sign"), msgspec.json.encode(texts), "sha256")
        return digest.hex()[:SIGNATURE_DIGITS]

    def has_signed(self, signature: str, *texts: str) -> bool:
        """Whether this server has made the signature of these texts, for this tenant."""
        return hmac.compare_digest(signature.encode(), self.sign(*texts).encode())

    def _derived(self, purpose: str) -> bytes:
        return hmac.digest(self._key, f"{purpose}\0{self._tenant_id}".encode(), "sha256")


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
