"""The tables. The tenant leads every primary key, so that nothing is found across tenants by accident.

A chain is laid out as threads: a response that continues the tip of its thread takes the next `turn` of it, one that
continues anything else opens a new thread, which `branches` ties to the turn it grew from. `turn` counts from the root of
the chain, so it orders a whole context, and a context is one range of `items` per branch point on its way.

A conversation is a pointer to a turn, as a branch of git is one to a commit. What changes it is a turn more, and moves the pointer: a
response that has ended, items that a client adds, items that it removes. No turn changes, so responses and forks keep what they had.
"""

from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Date,
    DateTime,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    Table,
    Text,
    UniqueConstraint,
    func,
    text,
    true,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSON, JSONB

from app.domain import lifecycle

metadata = MetaData(
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "ix": "%(table_name)s_%(column_0_N_name)s_idx",
        "uq": "%(table_name)s_%(column_0_N_name)s_key",
        "fk": "%(table_name)s_%(column_0_name)s_fkey",
    }
)

tenants = Table(
    "tenants",
    metadata,
    Column("id", Text, primary_key=True, comment="a tenant, or one user of it: what rows have as their tenant_id"),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("tenant", Text, comment="of a user its tenant; else null"),
    Column("limits", JSONB, comment="its quotas, by name; null: as the settings have them"),
    Column("stored_bytes", BigInteger, comment="as last measured; null: never"),
    Column("measured_at", DateTime(timezone=True), comment="when a process last began to, or the next may"),
    Index("tenants_tenant_idx", "tenant", postgresql_where=text("tenant is not null")),
)

keys = Table(
    "keys",
    metadata,
    Column("hash", LargeBinary, primary_key=True, comment="SHA-256 of the key; the key itself is kept nowhere"),
    Column("id", Text, nullable=False, unique=True),
    Column("tenant_id", Text, ForeignKey("tenants.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("revoked_at", DateTime(timezone=True)),
    Column("user_name", Text, nullable=False, server_default=text("''"), comment="empty: it is bound to no user"),
    Column("scopes", ARRAY(Text), nullable=False, server_default=text("array['responses.read', 'responses.write']")),
    Column("models", ARRAY(Text), comment="names or patterns; null: all"),
    Column("expires_at", DateTime(timezone=True)),
    Column("limits", JSONB, comment="its quotas, by name; null: as the settings have them"),
    Index("keys_tenant_id_id_idx", "tenant_id", "id"),
    CheckConstraint(r"concat(tenant_id, user_name) !~ '[\x01-\x1f]'", name="keys_names_check"),
)

retired_secrets = Table(
    "retired_secrets",
    metadata,
    Column("hash", LargeBinary, primary_key=True, comment="SHA-256 of a secret that its key had before"),
    Column("tenant_id", Text, nullable=False),
    Column("key_id", Text, ForeignKey("keys.id"), nullable=False),
    Column("valid_until", DateTime(timezone=True), nullable=False),
    Index("retired_secrets_key_id_idx", "key_id"),
)

tool_credentials = Table(
    "tool_credentials",
    metadata,
    Column("tenant_id", Text, primary_key=True, comment="the tenant, also of what is for one of its users"),
    Column("id", Text, primary_key=True),
    Column("server", Text, nullable=False, comment="a normalized URL, or a server's name in the catalog"),
    Column("server_hash", LargeBinary, nullable=False, comment="SHA-256 of it"),
    Column("user_name", Text, nullable=False, comment="whose runs get it; empty: it is not for a user"),
    Column("key_id", Text, nullable=False, comment="whose runs get it; empty: it is not for a key"),
    Column("name", Text, nullable=False),
    Column("sealed", Text, nullable=False, comment="authorization and headers, with what they are for"),
    Column("has_authorization", Boolean, nullable=False),
    Column("header_names", ARRAY(Text), nullable=False),
    Column("created_at", BigInteger, nullable=False, comment="unix seconds"),
    Column("updated_at", BigInteger, nullable=False, comment="unix seconds"),
    Index("tool_credentials_server_idx", "server_hash", "tenant_id", "user_name", "key_id", unique=True),
    CheckConstraint("user_name = '' or key_id = ''", name="tool_credentials_holder_check"),
)

audit_log = Table(
    "audit_log",
    metadata,
    Column("tenant_id", Text, primary_key=True, comment="the tenant, also for what its users do"),
    Column("id", Text, primary_key=True),
    Column("created_at", BigInteger, nullable=False, comment="unix seconds"),
    Column("actor", Text, nullable=False, comment="api_key, command_line, anonymous"),
    Column("key_id", Text),
    Column("user_name", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("target", Text, nullable=False, comment="the id of what was acted on"),
)


def _parts() -> list[Column[Any]]:
    """The columns of a body that may have parts which are kept once (storage/parts.py)."""
    return [
        Column(
            "part_hashes",
            LargeBinary,
            comment="SHA-256 of each, one after another; then `body` lists the texts around them",
        ),
        Column("bytes", Integer, comment="of the body with its parts; null without them"),
    ]


responses = Table(
    "responses",
    metadata,
    Column("tenant_id", Text, primary_key=True),
    Column("id", Text, primary_key=True),
    Column("thread_id", Text, nullable=False),
    Column("turn", Integer, nullable=False),
    Column("previous_response_id", Text),
    Column("conversation_id", Text, comment="whose thread it is made in; nothing else continues that thread"),
    Column("status", Text, nullable=False),
    Column("background", Boolean, nullable=False),
    Column("is_chat", Boolean, comment="true: it was made as a chat completion; else null"),
    Column("model", Text, nullable=False),
    Column("metadata", JSONB, nullable=False),
    Column("created_at", BigInteger, nullable=False, comment="unix seconds"),
    Column("deleted_at", DateTime(timezone=True), comment="set while later responses still need the items"),
    # json, not jsonb: it keeps the exact bytes, and takes \u0000, which tool outputs contain.
    Column("body", JSON, nullable=False, comment="the response object without its output"),
    Column(
        "context_bytes",
        BigInteger,
        comment="of the items of its context and its own; null where that was not counted yet",
    ),
    *_parts(),
    # Not by tenant first: of two such indexes Postgres takes any for its first plans, as long as it has not analyzed the table,
    # and may read all of a tenant's rows for one id.
    Index("responses_thread_id_tenant_id_turn_key", "thread_id", "tenant_id", "turn", unique=True),
    postgresql_with={"fillfactor": "85"},
)

facets = Table(
    "facets",
    metadata,
    Column("tenant_id", Text, primary_key=True),
    Column("facet", BigInteger, primary_key=True, autoincrement=False),
    Column("created_at", BigInteger, primary_key=True, autoincrement=False),
    Column("response_id", Text, primary_key=True, comment="or the id of a conversation"),
)

items = Table(
    "items",
    metadata,
    Column("tenant_id", Text, primary_key=True),
    Column("thread_id", Text, primary_key=True),
    Column("turn", Integer, primary_key=True),
    Column("position", Integer, primary_key=True, comment="input items from 0, output items from OUTPUT_POSITION"),
    Column("id", Text, nullable=False),
    Column("body", JSON, nullable=False),
    *_parts(),
    # Not unique: a client that resends its history resends the items' ids.
    Index("items_tenant_id_id_idx", "tenant_id", "id"),
)

parts = Table(
    "parts",
    metadata,
    Column("tenant_id", Text, primary_key=True),
    Column("hash", LargeBinary, primary_key=True, comment="SHA-256 of the body"),
    Column("body", Text, nullable=False, comment="what rows share: tool lists, instructions, long strings, as JSON"),
)

part_uses = Table(
    "part_uses",
    metadata,
    Column("tenant_id", Text, primary_key=True),
    Column("hash", LargeBinary, primary_key=True),
    Column("thread_id", Text, primary_key=True),
    Column("turn", Integer, primary_key=True),
    Column("position", Integer, primary_key=True, comment="of the item; -1: the response"),
    ForeignKeyConstraint(["tenant_id", "hash"], ["parts.tenant_id", "parts.hash"]),
)

branches = Table(
    "branches",
    metadata,
    Column("tenant_id", Text, primary_key=True),
    Column("thread_id", Text, primary_key=True),
    Column("parent_thread_id", Text, nullable=False),
    Column("parent_turn", Integer, nullable=False),
    Column("parent_position", Integer, comment="the last item of that turn that it has; null: the whole turn"),
    Index("branches_tenant_id_parent_idx", "tenant_id", "parent_thread_id", "parent_turn"),
)

conversations = Table(
    "conversations",
    metadata,
    Column("tenant_id", Text, primary_key=True),
    Column("id", Text, primary_key=True),
    Column("created_at", BigInteger, nullable=False, comment="unix seconds"),
    Column("metadata", JSONB, nullable=False),
    Column("thread_id", Text, nullable=False),
    Column("turn", Integer, nullable=False, comment="the last one that belongs to it; 0: it has no items"),
    Column("context_bytes", BigInteger, comment="of its items; null where that was not counted yet"),
    Column("writer", Text, comment="the response that took it last; it is locked while that one is in flight"),
    Index("conversations_tenant_id_thread_id_idx", "tenant_id", "thread_id"),
)

removals = Table(
    "removals",
    metadata,
    Column("tenant_id", Text, primary_key=True),
    Column("thread_id", Text, primary_key=True),
    Column("turn", Integer, primary_key=True, comment="contexts up to an earlier turn keep the item"),
    Column("item_thread_id", Text, primary_key=True),
    Column("item_turn", Integer, primary_key=True),
    Column("item_position", Integer, primary_key=True),
)

files = Table(
    "files",
    metadata,
    Column("tenant_id", Text, primary_key=True),
    Column("id", Text, primary_key=True),
    Column("created_at", BigInteger, nullable=False, comment="unix seconds"),
    Column("filename", Text, nullable=False),
    Column("purpose", Text, comment="null while it is uploaded: then it is no file yet"),
    Column("bytes", BigInteger, nullable=False, comment="those that are stored"),
    Column("written_at", DateTime(timezone=True), nullable=False, comment="when its last piece was stored"),
    Index("files_uploads_idx", "written_at", postgresql_where=text("purpose is null")),
    postgresql_with={"fillfactor": "85"},
)

file_pieces = Table(
    "file_pieces",
    metadata,
    Column("tenant_id", Text, primary_key=True),
    Column("file_id", Text, primary_key=True),
    Column("number", Integer, primary_key=True, comment="from 0; all but the last have PIECE_BYTES"),
    Column("data", LargeBinary, nullable=False),
    ForeignKeyConstraint(["tenant_id", "file_id"], ["files.tenant_id", "files.id"], ondelete="CASCADE"),
)

runs = Table(
    "runs",
    metadata,
    Column("tenant_id", Text, primary_key=True),
    Column("response_id", Text, primary_key=True),
    Column(
        "state",
        Text,
        nullable=False,
        comment="queued, running, cancelled: its end is decided, not yet made; sealed: its last event is not yet out",
    ),
    Column(
        "due_at", DateTime(timezone=True), nullable=False, comment="queued: since when; else: when the lease runs out"
    ),
    Column("lease_s", Float, comment="how long that lease lasts without a heartbeat"),
    Column("lease", Integer, nullable=False, comment="one more with each owner; 0: never owned"),
    Column(
        "handed_over", Integer, nullable=False, server_default=text("0"), comment="owners that gave it back in peace"
    ),
    Column("worker", Text),
    Column("request", JSON, comment="what to make; absent for foreground runs, which nobody can take over"),
    Column(
        "secrets", Text, comment="the caller's key and those of tool servers, sealed; kept only while the run lives"
    ),
    Column("streamed", Boolean, nullable=False),
    Column("number_ceiling", BigInteger, nullable=False, comment="no owner has sent an event with a number this high"),
    Column("redis_run", Text, comment="which life of its stream in Redis holds all that was sent"),
    Column("usage", JSON, comment="of the turns that the journal holds"),
    Column("key_id", Text, comment="of the key that asked for it, which may be revoked; null without one"),
    Column("reserved_tokens", BigInteger, comment="of its quotas; null: it has taken nothing that is to be settled"),
    Index("runs_queued_idx", "tenant_id", "due_at", postgresql_where=text("state = 'queued'")),
    Index("runs_due_idx", "due_at", postgresql_where=text("state <> 'queued'")),
)

event_journal = Table(
    "event_journal",
    metadata,
    Column("tenant_id", Text, primary_key=True),
    Column("response_id", Text, primary_key=True),
    Column("first_number", BigInteger, primary_key=True),
    Column(
        "frames",
        LargeBinary,
        nullable=False,
        comment="events up to the end of an item, before their readers hear of it",
    ),
)

event_archive = Table(
    "event_archive",
    metadata,
    Column("tenant_id", Text, primary_key=True),
    Column("response_id", Text, primary_key=True),
    Column("first_number", BigInteger, primary_key=True, server_default=text("0")),
    Column("frames", LargeBinary, nullable=False, comment="a page of the events of an ended response, zstd"),
)

approvals = Table(
    "approvals",
    metadata,
    Column("tenant_id", Text, primary_key=True),
    Column("request_id", Text, primary_key=True, comment="of the item that asked; its call is made once at most"),
    Column("approve", Boolean, nullable=False),
    Column("response_id", Text, nullable=False, comment="whose input has answered"),
)

agents = Table(
    "agents",
    metadata,
    Column("tenant_id", Text, primary_key=True, comment="the tenant: its users share agents"),
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False, comment="unix seconds"),
    Column("updated_at", BigInteger, nullable=False, comment="unix seconds"),
    Column("model", Text, nullable=False, comment="like the next two for lists, which do not read the body"),
    Column("description", Text, nullable=False),
    Column("users", ARRAY(Text), comment="whose keys may use it; null: all"),
    Column("body", JSON, nullable=False, comment="its definition without the secrets of its tools"),
    Column("secrets", Text, comment="these, sealed"),
    Column("bytes", Integer, nullable=False, comment="of the definition with the secrets"),
    UniqueConstraint("tenant_id", "name"),
)

_TOKENS = ("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens")
_COST = "in trillionths of the currency"

usage_ledger = Table(
    "usage_ledger",
    metadata,
    Column("tenant_id", Text, primary_key=True, comment="the tenant, also for what its users do"),
    Column("id", Text, primary_key=True, comment="of the response, or of a count of tokens"),
    Column("ended_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("user_name", Text, nullable=False, comment="empty: none"),
    Column("model", Text, nullable=False, comment="as the request named it"),
    Column("key_id", Text, nullable=False, comment="empty: none"),
    Column("currency", Text, nullable=False),
    Column("run_count", Integer, nullable=False, comment="1; 0: it was no run"),
    Column("tool_calls", Integer, nullable=False, comment="that this server has made"),
    *(Column(name, BigInteger, nullable=False) for name in _TOKENS),
    Column("cost", Numeric, nullable=False, comment=_COST),
    Index("usage_ledger_ended_at_idx", "ended_at"),
)

usage_days = Table(
    "usage_days",
    metadata,
    Column("tenant_id", Text, primary_key=True),
    Column("day", Date, primary_key=True, comment="in UTC, on which the runs have ended"),
    *(Column(name, Text, primary_key=True) for name in ("model", "key_id", "user_name", "currency")),
    # Sums of whatever upstreams report.
    *(Column(name, Numeric, nullable=False) for name in ("run_count", "tool_calls", *_TOKENS)),
    Column("cost", Numeric, nullable=False, comment=_COST),
)

sealing = Table(
    "sealing",
    metadata,
    Column("is_only", Boolean, primary_key=True, server_default=true()),
    Column("fingerprint", Text, nullable=False, comment="of the secret key, which is kept nowhere"),
    CheckConstraint("is_only", name="sealing_one_row"),
)

OF_TENANT = "= any(array(select id from tenants where tenant = :tenant) || cast(:tenant as text))"
"""What a `tenant_id` is that is the tenant's or one of its users', as SQL's condition: `tenant_id …`."""

OUTPUT_POSITION = 1_000_000
"""The `position` of a turn's first output item; a request holds far fewer input items."""

HASH_BYTES = 32
"""Of a part's SHA-256."""

LAST_POSITION = 2**31 - 1
"""No `position` is higher."""

IN_FLIGHT = "(" + ", ".join(f"'{status}'" for status in sorted(lifecycle.IN_FLIGHT)) + ")"
"""The statuses of responses that have not ended, as SQL's list: `status in (…)`."""
