"""Completes the settings: embedded servers where no address is set, and the secret key."""

import contextlib
import os
import secrets
import tempfile
from pathlib import Path

import msgspec

from app import embedded
from app.domain.sealed import KEY_BYTES, Seal, parse_key
from app.settings import Settings, SettingsError

OTHER_KEY = (
    "the secret key is not the one that this database knows: give every process the same REPRISE_SECRET_KEY, and former ones in "
    "REPRISE_OLD_SECRET_KEYS; if the key is lost, `reprise rekey` gives up what it has sealed."
)


def compaction_prompt(settings: Settings) -> str:
    """The text that asks a model for the summary of a compaction. Raises SettingsError."""
    return _prompt(settings.compaction_prompt, "compaction_prompt")


def reasoning_summary_prompt(settings: Settings) -> str:
    """The text that asks a model for a summary of reasoning. Raises SettingsError."""
    return _prompt(settings.reasoning_summary_prompt, "reasoning_summary_prompt")


def _prompt(given: str, name: str) -> str:
    path = Path(given) if given else Path(__file__).with_name(f"{name}.md")
    setting = f"REPRISE_{name.upper()}"
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeError) as error:
        raise SettingsError(f"{setting} can't be read: {error}.") from None
    if not text:
        raise SettingsError(f"{setting}: {path} is empty.")
    return text


def missing_servers(settings: Settings) -> frozenset[str]:
    """The servers without an address in the settings: POSTGRES, VALKEY."""
    addresses = {embedded.POSTGRES: settings.database_url, embedded.VALKEY: settings.redis_url}
    return frozenset(server for server, address in addresses.items() if not address)


def with_servers(
    settings: Settings, servers: frozenset[str] = embedded.BOTH, *, create_database: bool = False
) -> Settings:
    """The settings with an address for each of `servers`. Those that are missing are embedded, and run as long as this process.

    Raises EmbeddedError, and SettingsError if there is no database and it may not be created.
    """
    missing = missing_servers(settings) & servers
    if not missing:
        return settings
    if embedded.POSTGRES in missing and not (create_database or has_embedded(settings, embedded.POSTGRES)):
        raise SettingsError(
            f"there is no database in {settings.data_path}: `reprise serve` makes one, or set DATABASE_URL."
        )
    started = embedded.start(settings.data_path, servers=missing, durable=settings.durable)
    return msgspec.structs.replace(
        settings,
        database_url=started.database_url if embedded.POSTGRES in missing else settings.database_url,
        redis_url=started.redis_url if embedded.VALKEY in missing else settings.redis_url,
    )


def has_embedded(settings: Settings, server: str) -> bool:
    """Whether the data directory holds data of an embedded server."""
    return embedded.exists(settings.data_path, server)


def open_seal(settings: Settings) -> Seal:
    """REPRISE_SECRET_KEY, or a key that is made once in the data directory; and REPRISE_OLD_SECRET_KEYS to open with. Raises
    SettingsError."""
    old = [
        _parsed("REPRISE_OLD_SECRET_KEYS", part) for part in map(str.strip, settings.old_secret_keys.split(",")) if part
    ]
    if settings.secret_key:
        return Seal(_parsed("REPRISE_SECRET_KEY", settings.secret_key), *old)
    path = secret_key_path(settings)
    try:
        return Seal(_kept_key(path), *old)
    except OSError as error:
        raise SettingsError(f"{path} can't be used: {error.strerror}; set REPRISE_SECRET_KEY.") from None
    except ValueError as error:
        raise SettingsError(f"{path} is not valid: {error}.") from None


def has_secret_key(settings: Settings) -> bool:
    """Whether a key is set or was made."""
    return bool(settings.secret_key) or os.path.lexists(secret_key_path(settings))


def secret_key_path(settings: Settings) -> Path:
    """The file of a key that is made."""
    return settings.data_path / "secret.key"


def _parsed(variable: str, key: str) -> bytes:
    try:
        return parse_key(key)
    except ValueError as error:
        raise SettingsError(f"{variable} is not valid: {error}.") from None


def _kept_key(path: Path) -> bytes:
    """The key in a file, which is made atomically: of processes that make one at the same time, all get the first."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix="secret.key.") as made:  # mode 0600
            made.write(secrets.token_bytes(KEY_BYTES))
            made.flush()
            os.fsync(made.fileno())
            with contextlib.suppress(FileExistsError):
                os.link(made.name, path)
    return path.read_bytes()
