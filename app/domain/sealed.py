"""Sealed content: what a client carries for us and can't read or change, such as `reasoning.encrypted_content`.

Fernet (AES-128-CBC with HMAC-SHA256) of the `cryptography` package does the work. What another server sealed can't be
opened here and counts as absent.
"""

import base64
import binascii

from cryptography.fernet import Fernet, InvalidToken

KEY_BYTES = 32


class Seal:
    """Seals and opens text with the server's key."""

    def __init__(self, key: bytes) -> None:
        """`key` is KEY_BYTES random bytes. Raises ValueError for any other length."""
        self._fernet = Fernet(base64.urlsafe_b64encode(key))

    def close(self, text: str) -> str:
        """The sealed form of `text`."""
        return self._fernet.encrypt(text.encode()).decode()

    def open(self, sealed: str) -> str | None:
        """The text, or None if this server did not seal it."""
        try:
            return self._fernet.decrypt(sealed.encode()).decode()
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
